"""The global graph of transcoder features: virtual weights, which hold for all prompts.

A virtual weight is what source feature s adds to the pre-activation of target feature t at the same
position, if s fires with activation 1 and acts through the residual stream alone: attention, skips
and norm scales are left out. TWERA, the target-weighted expected residual attribution, is the mean
contribution of s to t, weighted by the activation of t.

    V[t, s] = W_enc[t] . (sum over layers l, layer(s) <= l < layer(t), of W_dec[s, l])
    TWERA[t, s] = V[t, s] E[a_s a_t] / E[a_t]

With a model, V includes the linear parts of its norms before the MLP of t, if features read after
the norm, and after the MLP of s, if features write before the norm.

Reference: Ameisen, Lindsey et al. 2025, Circuit tracing, section "Global weights",
https://transformer-circuits.pub/2025/attribution-graphs/methods.html
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import product
from typing import Any

import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional

from circuits.attribution.local_model import check_transcoders, norm_without_scale, read_by_features
from circuits.models import Model, shape_of
from circuits.models.layers.functional import LinearNorm
from circuits.system.arguments import checked_arguments
from circuits.system.errors import InputError, OutOfRangeError
from circuits.system.kinds import expect
from circuits.system.memory import memory_budget
from circuits.system.numbers import RealNumber, WholeNumber, python_number, shown, whole
from circuits.system.torch_modes import without_modes
from circuits.transcoders.extraction import (
    BLOCK,
    ExtractedFeatures,
    HiddenStates,
    extract_features,
    largest_columns,
)
from circuits.transcoders.transcoder import Device, Dtype, Transcoders, check_is_transcoders

FeatureColumn = Int[Tensor, " edge"]
Firings = Int[Tensor, " fired"]
FiredValues = Float[Tensor, " fired"]
TokenValues = Float[Tensor, "token feature"]
PairValues = Float[Tensor, "target source"]
FeatureRows = Float[Tensor, "feature d_model"]
# Layer and numbers of the targets, number of the first source, and weights.
Block = tuple[tuple[int, slice], int, PairValues]


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
        columns = {}
        for name, column in vars(self).items():
            columns[name] = column.cpu().numpy()
        return pd.DataFrame(columns)


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

    token: Firings
    activation: FiredValues
    starts: Int[Tensor, " feature_and_end"]
    shape: tuple[int, int]
    n_tokens: int

    @checked_arguments
    def mean(self, layer: WholeNumber, features: slice) -> Float[Tensor, " feature"]:
        """Return E[a] of some features of a layer."""
        # E[a] = E[a 1]
        one = self.activation.new_ones(self.n_tokens, 1)
        return self.together(layer, features, one).flatten()

    @checked_arguments
    def activations(self, layer: WholeNumber, features: slice) -> TokenValues:
        """Return the activations of some features at every token; most are zero."""
        firings = self._firings(layer, features)
        return firings.t().to_dense()

    @checked_arguments
    def together(
        self, layer: WholeNumber, features: slice, others: Float[Tensor, "token other"]
    ) -> Float[Tensor, "feature other"]:
        """Return E[a b] of some features with others, given the others' activations.

        Raises:
            InputError: there is no such layer, or `others` is of another text.
        """
        if len(others) != self.n_tokens:
            raise InputError(
                f"others has {len(others)} rows; give one for each of the {self.n_tokens} tokens."
            )
        firings = self._firings(layer, features)
        return torch.sparse.mm(firings, others) / self.n_tokens

    @checked_arguments
    def to(self, device: Device, dtype: Dtype = None) -> Coactivation:
        """Return the same coactivation on a device, with activations in a precision."""
        token = self.token.to(device)
        activation = self.activation.to(device, dtype)
        return replace(self, token=token, activation=activation)

    def _firings(self, layer: WholeNumber, features: slice) -> Tensor:
        """Return activations as a sparse matrix [feature token]."""
        n_layers, n_features = self.shape
        if layer not in range(n_layers):
            raise OutOfRangeError(f"there is no layer {layer}: there are 0 to {n_layers - 1}.")
        first, stop, step = features.indices(n_features)
        if step != 1 or stop <= first:
            raise InputError(f"features={features}: give a slice of some features, without a step.")
        offset = int(layer) * n_features
        starts = self.starts[offset + first : offset + stop + 1]
        ends = starts[[0, -1]].tolist()
        fired = slice(*ends)
        token = self.token[fired]
        rows = torch.arange(len(starts) - 1)
        feature = rows.repeat_interleave(starts.diff())
        places = torch.stack([feature.to(token), token])
        size = (len(rows), self.n_tokens)
        activation = self.activation[fired]
        # Firings are sorted and unique.
        return torch.sparse_coo_tensor(
            places, activation, size, is_coalesced=True, check_invariants=False
        )


@checked_arguments
@torch.no_grad()
@without_modes()
def expected_coactivation(
    batches: HiddenStates | ExtractedFeatures | Iterable[HiddenStates | ExtractedFeatures],
    transcoders: Transcoders,
    *,
    top_k: WholeNumber | None = None,
    threshold: RealNumber = 0.0,
    leading: WholeNumber = 1,
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
    leading = whole(leading, "leading", least=0)
    several: Any = [batches] if isinstance(batches, Mapping | ExtractedFeatures) else batches
    # Tensors without an axis look iterable, too.
    if not isinstance(several, Iterable) or python_number(several) is not None:
        raise InputError(f"batches={shown(several)}: give hidden states, or a list of them.")
    check_is_transcoders(transcoders)
    firings, n_tokens = [], 0
    for found in several:
        if not isinstance(found, ExtractedFeatures):
            found = extract_features(found, transcoders, top_k, threshold, max_memory=max_memory)
        _check_batch(found, transcoders, leading)
        n_prompts, n_positions = found.shape
        length = n_positions - leading
        kept = found.position >= leading
        feature = found.layer * transcoders.n_features + found.index
        token = n_tokens + found.batch * length + found.position - leading
        values = (feature, token, found.activation)
        firings.append([each[kept] for each in values])
        n_tokens += n_prompts * length
    if not firings:
        raise InputError("there are no batches; give hidden states of at least one.")
    columns = zip(*firings, strict=True)
    feature, token, activation = map(torch.cat, columns)
    order = torch.argsort(feature * n_tokens + token)
    token, activation = token[order], activation[order]
    shape = (transcoders.n_layers, transcoders.n_features)
    n_features = math.prod(shape)
    counts = torch.bincount(feature, minlength=n_features)
    ends = counts.cumsum(0).cpu()
    starts = functional.pad(ends, (1, 0))
    dtype = torch.promote_types(activation.dtype, torch.float32)
    activation = activation.to(dtype)
    return Coactivation(token, activation, starts, shape, n_tokens)


@checked_arguments
@torch.no_grad()
@without_modes()
def virtual_weights(
    transcoders: Transcoders,
    *,
    top_k: WholeNumber = 16,
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
    top_k = whole(top_k, "top_k", least=1)
    check_is_transcoders(transcoders)
    _check(transcoders, model, coactivation)
    n_layers, n_features = transcoders.n_layers, transcoders.n_features
    pairs = _Pairs(transcoders, model, coactivation)
    # The strongest weights into each target so far, and the numbers of their sources, ascending.
    n_kept = min(top_k, (n_layers - 1) * n_features)
    weights = pairs.like.new_zeros(n_layers, n_features, n_kept)
    numbers = torch.zeros_like(weights, dtype=torch.long)
    for targets, first_source, block in pairs.blocks(max_memory):
        _add_block(weights[targets], numbers[targets], first_source, block)
    return _strongest_first(weights, numbers)


def _strongest_first(
    weights: Float[Tensor, "layer target kept"],
    sources: Int[Tensor, "layer target kept"],
) -> VirtualWeights:
    """Make columns of all weights that are not zero."""
    sizes = weights.abs()
    _, order = sizes.sort(dim=2, descending=True, stable=True)
    weights = weights.gather(2, order)
    found = weights.nonzero(as_tuple=True)
    source = sources.gather(2, order)[found]
    layer, target, _ = found
    # source number = layer * number of features + index
    n_layers_features = weights.shape[:2]
    source_layer, source = torch.unravel_index(source, n_layers_features)
    weight = weights[found]
    return VirtualWeights(source_layer, source, layer, target, weight)


def _add_block(
    weights: Float[Tensor, "target kept"],
    numbers: Int[Tensor, "target kept"],
    first_source: int,
    block: PairValues,
) -> None:
    """Update the strongest weights by a block whose sources follow all earlier ones."""
    n_kept = weights.shape[1]
    # Reduce the block first: a selection from the whole block and the old weights needs a copy.
    n_columns = min(n_kept, block.shape[1])
    place = largest_columns(block.abs(), n_columns)
    block = block.gather(1, place)
    all_weights = torch.cat([weights, block], 1)
    source = place + first_source
    all_numbers = torch.cat([numbers, source], 1)
    place = largest_columns(all_weights.abs(), n_kept)
    weights.copy_(all_weights.gather(1, place))
    numbers.copy_(all_numbers.gather(1, place))


@dataclass(frozen=True, eq=False)
class _Pairs:
    """The weights of all pairs of features, with the constant linear parts of norms."""

    transcoders: Transcoders
    model: Model | None
    coactivation: Coactivation | None

    @cached_property
    def like(self) -> Tensor:
        """An empty tensor on the device and in the precision of the weights."""
        weight = self.transcoders.encoders[0].weight
        dtype = torch.promote_types(weight.dtype, torch.float32)
        like = weight[:0].to(dtype)
        return like if self.model is None else like.to(shape_of(self.model).device)

    def blocks(self, max_memory: int | None) -> Iterator[Block]:
        """Yield all weights, those from the first sources first."""
        n_features, like = self.transcoders.n_features, self.like
        fired = self.coactivation
        if fired is not None:
            fired = fired.to(like.device, like.dtype)
        size = self._block_size(max_memory)
        starts = range(0, n_features, size)
        blocks = [slice(start, start + size) for start in starts]
        layers = range(self.transcoders.n_layers - 1)
        for layer, sources in product(layers, blocks):
            first_source = layer * n_features + sources.start
            activations = None if fired is None else fired.activations(layer, sources)
            for reader, written in self._written_before(layer, sources):
                for targets in blocks:
                    # V[t, s] = W_enc[t] . (sum over l of W_dec[s, l])
                    weights = self._read(reader, targets) @ written.T
                    if fired is not None and activations is not None:
                        together = fired.together(reader, targets, activations)
                        # E[a_s a_t] / E[a_t], and 0 for a target that never fires
                        mean = fired.mean(reader, targets)[:, None]
                        weights *= together / mean.masked_fill(mean == 0, 1.0)
                    yield (reader, targets), first_source, weights

    def _written_before(self, layer: int, sources: slice) -> Iterator[tuple[int, FeatureRows]]:
        """Yield each later layer, and what features of `layer` have written before it."""
        transcoders = self.transcoders
        decoder = transcoders.decoders[layer]
        total = self.like.new_zeros(1, 1)
        for written in range(layer, transcoders.n_layers - 1):
            if written in transcoders.written_by(layer):
                rows = decoder[sources, written - layer]
                rows = rows.to(self.like)
                if transcoders.writes == "mlp":
                    rows = self._norm(written, "ln2_post").linear(rows)
                total = total + rows
            yield written + 1, total

    def _read(self, layer: int, targets: slice) -> FeatureRows:
        """Return the directions in the residual stream that features of `layer` read."""
        weight = self.transcoders.encoders[layer].weight
        rows = weight[targets].to(self.like)
        norm = self._norm(layer, "ln2")
        reading, _ = read_by_features(self.transcoders, norm, self.like)
        return reading.transposed(rows)

    def _norm(self, layer: int, name: str) -> LinearNorm:
        """Return a norm with scale 1; the identity without a model or without this norm."""
        if self.model is None:
            return LinearNorm()
        return norm_without_scale(self.model, layer, name, self.like)

    def _block_size(self, max_memory: int | None) -> int:
        """Return how many features' rows, and weights between them, fit into the memory."""
        budget = memory_budget(self.like.device, max_memory)
        n_numbers = budget // self.like.element_size()
        # A pair of features: weight, coactivation, and two for selecting the strongest.
        per_pair = 4
        # A feature: rows as stored, converted and normed, their sum, and activations at all tokens.
        n_tokens = 0 if self.coactivation is None else self.coactivation.n_tokens
        per_feature = 6 * self.transcoders.d_model + n_tokens
        # Solve per_pair size^2 + per_feature size = n_numbers.
        root = math.sqrt(per_feature**2 + 4 * per_pair * n_numbers)
        size = int(root - per_feature) // (2 * per_pair)
        # `largest_columns` is faster on multiples of its own blocks.
        return size // BLOCK * BLOCK or max(1, size)


def _check(
    transcoders: Transcoders, model: Model | None, coactivation: Coactivation | None
) -> None:
    if model is not None:
        check_transcoders(model, transcoders)
    shape = (transcoders.n_layers, transcoders.n_features)
    expect(
        coactivation, Coactivation | None, "a Coactivation", "make one with expected_coactivation"
    )
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
    if found.shape[1] <= leading:
        raise InputError(
            f"leading={leading} of {found.shape[1]} positions are left out; "
            "give a smaller number, or longer prompts."
        )
    if (found.index >= transcoders.n_features).any():
        raise InputError(
            f"a batch has a feature {int(found.index.max())}, and {transcoders.name!r} has "
            f"{transcoders.n_features}; extract features with these transcoders."
        )
