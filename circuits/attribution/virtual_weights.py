"""The global graph of transcoder features: virtual weights, which hold for all prompts.

A virtual weight is what source feature s adds to the pre-activation of target feature t at the same
position, if s fires with activation 1 and acts through the residual stream alone:

    V[t, s] = W_enc[t] . (sum over layers l, layer(s) <= l < layer(t), of W_dec[s, l])

What depends on the prompt is left out: attention, also from a position to itself, and the scales
of norms. So are skips, which pass through the inputs of other MLPs. With a model, V includes the
constant linear parts of its norms: the centring and weights of the norm before the MLP of t, if
features read after it, and of a norm after the MLP of s, if features write before it.

Many virtual weights are large between features that never fire together. Weighting by coactivation
on some text removes this interference and gives the target-weighted expected residual attribution,
the mean contribution of s to t weighted by the activation of t:

    TWERA[t, s] = V[t, s] E[a_s a_t] / E[a_t]

Reference: Ameisen, Lindsey et al. 2025, Circuit tracing, section "Global weights",
https://transformer-circuits.pub/2025/attribution-graphs/methods.html
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property

import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional

from circuits.attribution.local_model import check_transcoders, read_by_features
from circuits.models import Model, ModelWeights, scale_hooks
from circuits.models.functional import LinearNorm
from circuits.system.errors import InputError
from circuits.system.memory import memory_budget
from circuits.transcoders.extraction import BLOCK, ExtractedFeatures, extract_features, largest
from circuits.transcoders.transcoder import Transcoders

HiddenStates = Mapping[int, Float[Tensor, "batch pos d_model"]]
"""The hidden states of all layers on some prompts."""

FeatureColumn = Int[Tensor, " edge"]
FiredTokens = Int[Tensor, " fired"]
FiredValues = Float[Tensor, " fired"]


@dataclass(frozen=True, eq=False)
class VirtualWeights:
    """The strongest virtual weights into each feature, in columns.

    Rows are sorted by target layer, target index, and descending absolute weight. No weight is 0.

    >>> import circuits
    >>> weights = circuits.virtual_weights(circuits.load_transcoders("toy-world-clt"), top_k=1)
    >>> list(weights.table().columns)
    ['source_layer', 'source_index', 'target_layer', 'target_index', 'weight']

    Attributes:
        source_layer, source_index: the feature that writes.
        target_layer, target_index: the feature that reads.
        weight: the virtual weight, or with a coactivation the TWERA.
    """

    source_layer: FeatureColumn
    source_index: FeatureColumn
    target_layer: FeatureColumn
    target_index: FeatureColumn
    weight: Float[Tensor, " edge"]

    def __len__(self) -> int:
        return len(self.weight)

    def table(self) -> pd.DataFrame:
        """Return one row per weight, with the attributes as columns."""
        return pd.DataFrame({name: column.cpu().numpy() for name, column in vars(self).items()})


@dataclass(frozen=True, eq=False)
class Coactivation:
    """Where the features of all layers fired on some text.

    There are too many pairs of coactive features to store: expectations are computed when needed.

    >>> import circuits, torch
    >>> transcoders = circuits.load_transcoders("toy-world-clt")
    >>> states = {layer: torch.randn(2, 5, transcoders.d_model) for layer in range(4)}
    >>> circuits.expected_coactivation(states, transcoders).mean(0, slice(0, 10)).shape
    torch.Size([10])

    Attributes:
        token, activation: of each firing, sorted by layer, feature and token.
        starts: the first firing of each feature, layer after layer, and the end of the last one.
        shape: the number of layers, and of features per layer.
        n_tokens: the number of tokens of the text.
    """

    token: FiredTokens
    activation: FiredValues
    starts: Int[Tensor, " feature_and_end"]
    shape: tuple[int, int]
    n_tokens: int

    def mean(self, layer: int, features: slice) -> Float[Tensor, " feature"]:
        """Return E[a] of some features of a layer."""
        n, feature, _, activation = self._firings(layer, features)
        return activation.new_zeros(n).index_add_(0, feature, activation) / self.n_tokens

    def activations(self, layer: int, features: slice) -> Float[Tensor, "token feature"]:
        """Return the activations of some features at every token; most are zero."""
        n, feature, token, activation = self._firings(layer, features)
        dense = activation.new_zeros(self.n_tokens, n)
        dense[token, feature] = activation
        return dense

    def together(
        self, layer: int, features: slice, others: Float[Tensor, "token other"]
    ) -> Float[Tensor, "feature other"]:
        """Return E[a b] of some features with others, given the others' activations."""
        n, feature, token, activation = self._firings(layer, features)
        sparse = torch.sparse_coo_tensor(
            torch.stack([feature, token]),
            activation,
            (n, self.n_tokens),
            is_coalesced=True,  # firings are sorted and unique
            check_invariants=False,
        )
        return torch.sparse.mm(sparse, others) / self.n_tokens

    def to(self, device: torch.device | str, dtype: torch.dtype | None = None) -> Coactivation:
        """Return the same coactivation on a device, with activations in a precision."""
        activation = self.activation.to(device, dtype or self.activation.dtype)
        return replace(self, token=self.token.to(device), activation=activation)

    def _firings(
        self, layer: int, features: slice
    ) -> tuple[int, FiredTokens, FiredTokens, FiredValues]:
        """Return the number of features; feature (from the first), token, activation per firing."""
        first, stop, _ = features.indices(self.shape[1])
        offset = layer * self.shape[1]
        starts = self.starts[offset + first : offset + stop + 1]
        fired = slice(int(starts[0]), int(starts[-1]))
        feature = torch.arange(stop - first).repeat_interleave(starts.diff())
        token, activation = self.token[fired], self.activation[fired]
        return stop - first, feature.to(token.device), token, activation


@torch.no_grad()
def expected_coactivation(
    batches: HiddenStates | ExtractedFeatures | Iterable[HiddenStates | ExtractedFeatures],
    transcoders: Transcoders,
    *,
    top_k: int | None = None,
    threshold: float = 0.0,
    leading: int = 1,
    max_memory: int | None = None,
) -> Coactivation:
    """Record which features fire together on some text, for `virtual_weights`.

    >>> import circuits, torch
    >>> transcoders = circuits.load_transcoders("toy-world-clt")
    >>> states = {layer: torch.randn(2, 5, transcoders.d_model) for layer in range(4)}
    >>> circuits.expected_coactivation(states, transcoders).n_tokens
    8

    Args:
        batches: one or several batches of hidden states of all layers on unpadded prompts, or of
            results of `extract_features`. They are consumed one at a time.
        top_k, threshold, max_memory: see `extract_features`.
        leading: the number of first positions to leave out, as in attribution graphs.

    Raises:
        InputError: there is no batch, or one that lacks a layer, is too short, or belongs to other
            transcoders; see also `extract_features`.
    """
    several = [batches] if isinstance(batches, Mapping | ExtractedFeatures) else batches
    shape = (transcoders.n_layers, transcoders.n_features)
    columns, n_tokens = [], 0
    for found in several:
        if not isinstance(found, ExtractedFeatures):
            found = extract_features(found, transcoders, top_k, threshold, max_memory=max_memory)
        _check_batch(found, transcoders, leading)
        feature, token, activation = _without_leading(found, leading, transcoders.n_features)
        columns.append((feature, n_tokens + token, activation))
        n_prompts, length = found.shape
        n_tokens += n_prompts * (length - leading)
    if not columns:
        raise InputError("there are no batches; give hidden states of at least one.")
    feature, token, activation = map(torch.cat, zip(*columns, strict=True))
    counts = torch.bincount(feature, minlength=math.prod(shape))
    starts = functional.pad(counts.cumsum(0), (1, 0)).cpu()
    order = torch.argsort(feature * n_tokens + token)
    activation = activation[order].to(torch.promote_types(activation.dtype, torch.float32))
    return Coactivation(token[order], activation, starts, shape, n_tokens)


def _without_leading(
    found: ExtractedFeatures, leading: int, n_features: int
) -> tuple[FiredTokens, FiredTokens, FiredValues]:
    """Return feature and token, each as one number, and activation of each firing."""
    kept = (found.position >= leading).nonzero().flatten()
    feature = found.layer[kept] * n_features + found.index[kept]
    first_token = found.batch[kept] * (found.shape[1] - leading)
    return feature, first_token + found.position[kept] - leading, found.activation[kept]


@torch.no_grad()
def virtual_weights(
    transcoders: Transcoders,
    *,
    top_k: int = 16,
    model: Model | None = None,
    coactivation: Coactivation | None = None,
    max_memory: int | None = None,
) -> VirtualWeights:
    """Find the strongest virtual weights into each feature, among all pairs.

    >>> import circuits
    >>> transcoders = circuits.load_transcoders("toy-world-clt")
    >>> model = circuits.load_model("toy-world")
    >>> len(circuits.virtual_weights(transcoders, model=model, top_k=4))  # 3 layers x 512 x 4
    6144

    Args:
        top_k: how many weights to keep per target; of equal ones, those of earlier sources.
        model: include the linear part of its norms, and compute on its device.
        coactivation: weight each pair by it, which gives TWERA.
        max_memory: the bytes to use besides the result; None chooses from the free memory.

    Raises:
        InputError: `top_k` is below 1, or transcoders, model and coactivation do not fit together.
    """
    _check(transcoders, top_k, model, coactivation)
    rows = _FeatureRows(transcoders, model)
    like = rows.like
    budget = memory_budget(like.device, max_memory) // like.element_size()
    blocks = _blocks(transcoders, coactivation, budget)
    fired = None if coactivation is None else coactivation.to(like.device, like.dtype)
    strongest = _StrongestWeights(transcoders, top_k, like)
    for source_layer in range(transcoders.n_layers - 1):
        for sources in blocks:
            activations = None if fired is None else fired.activations(source_layer, sources)
            for target_layer, written in rows.written_before(source_layer, sources):
                for targets in blocks:
                    # V[t, s] = W_enc[t] . (sum over l of W_dec[s, l])
                    weights = rows.read(target_layer, targets) @ written.T
                    if fired is not None and activations is not None:
                        weights *= _target_weighted(fired, target_layer, targets, activations)
                    strongest.add(target_layer, targets, source_layer, sources, weights)
    return strongest.columns()


def _target_weighted(
    fired: Coactivation, layer: int, targets: slice, activations: Float[Tensor, "token source"]
) -> Float[Tensor, "target source"]:
    mean = fired.mean(layer, targets)[:, None]
    # E[a_s a_t] / E[a_t], and 0 for a target that never fires
    return fired.together(layer, targets, activations) / mean.masked_fill(mean == 0, 1.0)


class _StrongestWeights:
    """The strongest weights into each target so far, sorted by source."""

    def __init__(self, transcoders: Transcoders, top_k: int, like: Tensor) -> None:
        n_layers, self.n_features = transcoders.n_layers, transcoders.n_features
        self.top_k = min(top_k, (n_layers - 1) * self.n_features)
        self.weights = like.new_zeros(n_layers, self.n_features, self.top_k)
        self.sources = torch.zeros_like(self.weights, dtype=torch.long)

    def add(
        self,
        target_layer: int,
        targets: slice,
        source_layer: int,
        sources: slice,
        block: Float[Tensor, "target source"],
    ) -> None:
        """Add a block of weights whose sources follow all earlier ones."""
        here = (target_layer, targets)
        first_source = source_layer * self.n_features + sources.start
        # Reduce the block first: a selection from the whole block and the old weights needs a copy.
        _, place = largest(block.abs(), min(self.top_k, block.shape[1]))
        weights = torch.cat([self.weights[here], block.gather(1, place)], 1)
        numbers = torch.cat([self.sources[here], place + first_source], 1)
        _, place = largest(weights.abs(), self.top_k)
        self.weights[here] = weights.gather(1, place)
        self.sources[here] = numbers.gather(1, place)

    def columns(self) -> VirtualWeights:
        """Return all weights that are not zero, the strongest of each target first."""
        order = self.weights.abs().sort(dim=2, descending=True, stable=True).indices
        weights, sources = self.weights.gather(2, order), self.sources.gather(2, order)
        found = weights.nonzero().unbind(1)
        layer, target, _ = found
        source = sources[found]
        source_layer, source_index = source // self.n_features, source % self.n_features
        return VirtualWeights(source_layer, source_index, layer, target, weights[found])


@dataclass(frozen=True, eq=False)
class _FeatureRows:
    """The encoder and decoder rows of features, with the constant linear parts of norms."""

    transcoders: Transcoders
    model: Model | None

    @cached_property
    def like(self) -> Tensor:
        """An empty tensor on the device and in the precision of the result."""
        weight = self.transcoders.encoders[0].weight
        device = weight.device if self.model is None else self.model.cfg.device
        dtype = torch.promote_types(weight.dtype, torch.float32)
        return torch.empty(0, self.transcoders.d_model, dtype=dtype, device=device)

    def written_before(
        self, layer: int, sources: slice
    ) -> Iterator[tuple[int, Float[Tensor, "source d_model"]]]:
        """Yield each later layer, and what features of `layer` have written before it."""
        decoder = self.transcoders.decoders[layer]
        total = self.like.new_zeros(1, 1)
        for reader in range(layer + 1, self.transcoders.n_layers):
            written = reader - 1
            if written in self.transcoders.written_by(layer):
                rows = decoder[sources, written - layer].to(self.like)
                if self.transcoders.writes == "mlp":
                    rows = self._norm(written, "ln2_post").linear(rows)
                total = total + rows
            yield reader, total

    def read(self, layer: int, targets: slice) -> Float[Tensor, "target d_model"]:
        """Return the directions in the residual stream that features of `layer` read."""
        rows = self.transcoders.encoders[layer].weight[targets].to(self.like)
        norm, _ = read_by_features(self.transcoders, self._norm(layer, "ln2"), self.like)
        return norm.transposed(rows)

    def _norm(self, layer: int, name: str) -> LinearNorm:
        """Return a norm with scale 1; the identity without a model or without this norm."""
        if self.model is None:
            return LinearNorm(scale=None, centres=False, weight=None, bias=None)
        exists = (layer, name) in scale_hooks(self.model)
        scale = self.like.new_ones(1, 1) if exists else None
        return ModelWeights(self.model).linear_norm(layer, name, scale)


def _blocks(
    transcoders: Transcoders, coactivation: Coactivation | None, numbers: int
) -> list[slice]:
    """Split a layer's features into blocks such that two blocks need at most `numbers` numbers."""
    # A pair of features: weight, coactivation, and two for selecting the strongest.
    per_pair = 4
    # A feature: its rows as stored, converted and normed, their sum, and activations at all tokens.
    n_tokens = 0 if coactivation is None else coactivation.n_tokens
    per_feature = 6 * transcoders.d_model + n_tokens
    # Solve per_pair size^2 + per_feature size = numbers.
    root = math.sqrt(per_feature**2 + 4 * per_pair * numbers)
    size = max(1, int((root - per_feature) / (2 * per_pair)))
    # `largest` is faster on multiples of its own blocks.
    size = size // BLOCK * BLOCK or size
    n = transcoders.n_features
    return [slice(start, min(start + size, n)) for start in range(0, n, size)]


def _check(
    transcoders: Transcoders, top_k: int, model: Model | None, coactivation: Coactivation | None
) -> None:
    if top_k < 1:
        raise InputError(f"top_k={top_k}: give how many weights to keep per feature, at least 1.")
    if model is not None:
        check_transcoders(model, transcoders)
    shape = (transcoders.n_layers, transcoders.n_features)
    if coactivation is not None and coactivation.shape != shape:
        raise InputError(
            "the coactivation is of {} layers of {} features, and {!r} has {} of {}; compute it "
            "with these transcoders.".format(*coactivation.shape, transcoders.name, *shape)
        )


def _check_batch(found: ExtractedFeatures, transcoders: Transcoders, leading: int) -> None:
    if found.layers != tuple(range(transcoders.n_layers)):
        raise InputError(
            f"a batch has layers {list(found.layers)}; "
            f"give all {transcoders.n_layers} of {transcoders.name!r}, from 0."
        )
    if leading < 0 or found.shape[1] <= leading:
        raise InputError(
            f"leading={leading} of {found.shape[1]} positions are left out; "
            "give a smaller number, 0 or more, or longer prompts."
        )
    if len(found) and int(found.index.max()) >= transcoders.n_features:
        raise InputError(
            f"a batch has a feature {int(found.index.max())}, and {transcoders.name!r} has "
            f"{transcoders.n_features}; extract features with these transcoders."
        )
