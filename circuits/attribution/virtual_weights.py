"""The global graph of transcoder features: virtual weights, which hold for every prompt.

What feature s adds to the pre-activation of feature t at the same position, when it fires with strength 1 and nothing but the residual stream lies
between them, is

    V[t, s] = W_enc[t] . (sum over layers l of W_dec[s, l]),  layer of s <= l < layer of t, l a layer that s writes to.

Left out is what depends on the prompt: attention, which carries what s writes to later positions and through W_OV at its own; what the norm before
the MLP divides by; and skips, which stay in the residual stream but pass through other MLPs' inputs. With a model, the parts of norms that do not
depend on the prompt belong to V: the centring and weights of the norm before the MLP of t where features read behind it, and those of a norm after
the MLP of s where features write before it. Without, rows of encoder and decoder are multiplied as they are.

Many virtual weights are large between features that never fire together. Weighted by how they do, on some text, that interference is gone:

    TWERA[t, s] = V[t, s] E[a_s a_t] / E[a_t],

the mean of what s adds to t, weighted by the activation of t: target-weighted expected residual attribution.

Reference: Ameisen, Lindsey et al. 2025, Circuit tracing, section "Global weights", https://transformer-circuits.pub/2025/attribution-graphs/methods.html
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace

import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor

from circuits.attribution.local_model import check_transcoders
from circuits.models import Model, ModelWeights, scale_hooks
from circuits.models.functional import LinearNorm
from circuits.system.errors import InputError
from circuits.system.memory import memory_budget
from circuits.transcoders.extraction import BLOCK, ExtractedFeatures, extract_features, largest
from circuits.transcoders.transcoder import Transcoders

Batch = Mapping[int, Float[Tensor, "batch pos d_model"]] | ExtractedFeatures
"""The hidden states of all layers on some prompts, or what fires on them."""


@dataclass(frozen=True, eq=False)
class VirtualWeights:
    """The strongest virtual weights into each feature, in columns: ordered by target layer, target index, and descending absolute weight.

    Attributes:
        source_layer, source_index: the feature that writes.
        target_layer, target_index: the one that reads.
        weight: virtual weight, or with a coactivation TWERA; none is zero.
    """

    source_layer: Int[Tensor, " edge"]
    source_index: Int[Tensor, " edge"]
    target_layer: Int[Tensor, " edge"]
    target_index: Int[Tensor, " edge"]
    weight: Float[Tensor, " edge"]

    def __len__(self) -> int:
        return len(self.weight)

    def table(self) -> pd.DataFrame:
        """A row for each, with the columns of this class."""
        return pd.DataFrame({name: column.cpu().numpy() for name, column in vars(self).items()})


@dataclass(frozen=True, eq=False)
class Coactivation:
    """Where the features of all layers fired on some text. Of pairs that fired together there are too many to hold: they are multiplied as needed.

    Attributes:
        token, activation: of each time a feature fired, ordered by layer, index and token.
        starts: where those of each feature start, layer after layer; and where the last one's end.
        shape: how many layers and features per layer there are.
        n_tokens: how many tokens the text has.
    """

    token: Int[Tensor, " fired"]
    activation: Float[Tensor, " fired"]
    starts: Int[Tensor, " feature_and_end"]
    shape: tuple[int, int]
    n_tokens: int

    def mean(self, layer: int, features: slice) -> Float[Tensor, " feature"]:
        """E[a] of some features."""
        feature, _, activation = self._fired(layer, features)
        count = len(range(*features.indices(self.shape[1])))
        return activation.new_zeros(count).index_add_(0, feature, activation) / self.n_tokens

    def activations(self, layer: int, features: slice) -> Float[Tensor, "token feature"]:
        """Those of some features at every token, mostly zero."""
        feature, token, activation = self._fired(layer, features)
        dense = activation.new_zeros(self.n_tokens, len(range(*features.indices(self.shape[1]))))
        dense[token, feature] = activation
        return dense

    def together(
        self, layer: int, features: slice, others: Float[Tensor, "token other"]
    ) -> Float[Tensor, "feature other"]:
        """E[a b] of some features with others whose activations at every token are given."""
        feature, token, activation = self._fired(layer, features)
        size = (len(range(*features.indices(self.shape[1]))), self.n_tokens)
        # In order and without repetitions, as `starts` has them.
        sparse = torch.sparse_coo_tensor(
            torch.stack([feature, token]),
            activation,
            size,
            is_coalesced=True,
            check_invariants=False,
        )
        return torch.sparse.mm(sparse, others) / self.n_tokens

    def to(self, device: torch.device | str) -> Coactivation:
        """The same on a device."""
        return replace(self, token=self.token.to(device), activation=self.activation.to(device))

    def _fired(
        self, layer: int, features: slice
    ) -> tuple[Int[Tensor, " fired"], Int[Tensor, " fired"], Float[Tensor, " fired"]]:
        """Which of some features (counted from the first of them) fired at which tokens, and how strongly."""
        first, stop, _ = features.indices(self.shape[1])
        starts = self.starts[layer * self.shape[1] + first : layer * self.shape[1] + stop + 1]
        fired = slice(int(starts[0]), int(starts[-1]))
        feature = torch.arange(stop - first).repeat_interleave(starts.diff())
        return feature.to(self.token.device), self.token[fired], self.activation[fired]


@torch.no_grad()
def expected_coactivation(
    batches: Batch | Iterable[Batch],
    transcoders: Transcoders,
    *,
    top_k: int | None = None,
    threshold: float = 0.0,
    leading: int = 1,
    max_memory: int | None = None,
) -> Coactivation:
    """Which features fire together on some text, for `virtual_weights`.

    Args:
        batches: hidden states of all layers, one batch of prompts after the other, without pads; or what `extract_features` found on them.
            They are taken one at a time, so they may be made as they are asked for.
        top_k, threshold, max_memory: for `extract_features`.
        leading: so many first positions are left out, as in attribution graphs: what fires at a beginning-of-sequence token says little.

    Raises:
        InputError: there is no batch, one lacks a layer or is of other transcoders, or all its positions are left out; see also `extract_features`.
    """
    n_layers, n_features = transcoders.n_layers, transcoders.n_features
    parts, tokens = [], 0
    for batch in [batches] if isinstance(batches, Mapping | ExtractedFeatures) else batches:
        found = (
            batch
            if isinstance(batch, ExtractedFeatures)
            else extract_features(batch, transcoders, top_k, threshold, max_memory=max_memory)
        )
        _check_batch(found, transcoders, leading)
        kept, length = (found.position >= leading).nonzero().flatten(), found.shape[1] - leading
        token = tokens + found.batch[kept] * length + found.position[kept] - leading
        parts.append(
            (found.layer[kept] * n_features + found.index[kept], token, found.activation[kept])
        )
        tokens += found.shape[0] * length
    if not parts:
        raise InputError("there are no batches; give hidden states of at least one.")
    feature, token, activation = (torch.cat(part) for part in zip(*parts, strict=True))
    order = torch.argsort(feature * tokens + token)
    starts = torch.cat(
        [
            torch.zeros(1, dtype=torch.long),
            torch.bincount(feature, minlength=n_layers * n_features).cumsum(0).cpu(),
        ]
    )
    wide = activation[order].to(torch.promote_types(activation.dtype, torch.float32))
    return Coactivation(token[order], wide, starts, (n_layers, n_features), tokens)


@torch.no_grad()
def virtual_weights(
    transcoders: Transcoders,
    *,
    top_k: int = 16,
    model: Model | None = None,
    coactivation: Coactivation | None = None,
    max_memory: int | None = None,
) -> VirtualWeights:
    """The strongest virtual weights into each feature; all pairs are computed, block by block, and none but the strongest are kept.

    Args:
        top_k: at most so many are kept into each target, of largest absolute value; of equal ones those of earlier sources.
        model: whose norms are taken into account; what they divide by is not. Weights are then computed where it is, else where the encoders are.
        coactivation: weigh each pair by it: the result is TWERA, and zero for features that never fire together.
        max_memory: bytes that it may take besides the result; None chooses from what is free.

    Raises:
        InputError: `top_k` is out of range, or transcoders, model and coactivation do not fit together.
    """
    _check(transcoders, top_k, model, coactivation)
    like = _like(transcoders, model)
    size = _block_size(
        transcoders, coactivation, memory_budget(like.device, max_memory) // like.element_size()
    )
    strongest = _Strongest(transcoders, top_k, like)
    fired = None if coactivation is None else coactivation.to(like.device)
    for source_layer in range(transcoders.n_layers - 1):
        for sources in _blocks(transcoders.n_features, size):
            activations = (
                None if fired is None else fired.activations(source_layer, sources).to(like)
            )
            for target_layer, written in _written(transcoders, model, source_layer, sources, like):
                for targets in _blocks(transcoders.n_features, size):
                    block = _read(transcoders, model, target_layer, targets, like) @ written.T
                    if fired is not None and activations is not None:
                        mean = fired.mean(target_layer, targets).to(like)
                        shares = (
                            fired.together(target_layer, targets, activations)
                            / mean.masked_fill(mean == 0, 1.0)[:, None]
                        )
                        block *= shares
                    strongest.update(target_layer, targets, source_layer, sources, block)
    return strongest.columns()


class _Strongest:
    """The strongest weights into each target so far, in the order in which their sources stand."""

    def __init__(self, transcoders: Transcoders, top_k: int, like: Tensor) -> None:
        self.n_features = transcoders.n_features
        shape = (
            transcoders.n_layers,
            self.n_features,
            min(top_k, (transcoders.n_layers - 1) * self.n_features),
        )
        self.weights = like.new_zeros(shape)
        self.sources = torch.zeros(shape, dtype=torch.long, device=like.device)

    def update(
        self,
        target_layer: int,
        targets: slice,
        source_layer: int,
        sources: slice,
        block: Float[Tensor, "target source"],
    ) -> None:
        """Take in the weights of a block of pairs, whose sources stand after all earlier ones."""
        k = self.weights.shape[2]
        weights, number = self.weights[target_layer, targets], self.sources[target_layer, targets]
        _, place = largest(block.abs(), min(k, block.shape[1]))
        weights = torch.cat([weights, block.gather(1, place)], 1)
        number = torch.cat([number, place + (source_layer * self.n_features + sources.start)], 1)
        _, place = largest(weights.abs(), k)
        self.weights[target_layer, targets], self.sources[target_layer, targets] = (
            weights.gather(1, place),
            number.gather(1, place),
        )

    def columns(self) -> VirtualWeights:
        """All that are not zero, into each target the strongest first."""
        order = self.weights.abs().sort(dim=2, descending=True, stable=True).indices
        weights, sources = self.weights.gather(2, order), self.sources.gather(2, order)
        layer, target, rank = weights.nonzero().unbind(1)
        source = sources[layer, target, rank]
        return VirtualWeights(
            source // self.n_features,
            source % self.n_features,
            layer,
            target,
            weights[layer, target, rank],
        )


def _written(
    transcoders: Transcoders, model: Model | None, layer: int, sources: slice, like: Tensor
) -> Iterator[tuple[int, Float[Tensor, "source d_model"]]]:
    """Each later layer, and what some features of `layer` have written into the residual stream before it."""
    total: Tensor | None = None
    for reader in range(layer + 1, transcoders.n_layers):
        if reader - 1 in transcoders.written_by(layer):
            rows = transcoders.decoders[layer][sources, reader - 1 - layer].to(like)
            if model is not None and transcoders.writes == "mlp":
                rows = _norm(model, reader - 1, "ln2_post", like).linear(rows)
            total = rows if total is None else total + rows
        assert total is not None  # every feature writes to its own layer
        yield reader, total


def _read(
    transcoders: Transcoders, model: Model | None, layer: int, targets: slice, like: Tensor
) -> Float[Tensor, "target d_model"]:
    """What some features of `layer` read along in the residual stream, but for what the norm divides by."""
    rows = transcoders.encoders[layer].weight[targets].to(like)
    if model is None or transcoders.reads == "residual":
        return rows
    norm = _norm(model, layer, "ln2", like)
    return (replace(norm, weight=None) if transcoders.reads == "normalized" else norm).transposed(
        rows
    )


def _norm(model: Model, layer: int, name: str, like: Tensor) -> LinearNorm:
    """A norm that divides by one."""
    return ModelWeights(model).linear_norm(
        layer, name, like.new_ones(1, 1) if (layer, name) in scale_hooks(model) else None
    )


def _like(transcoders: Transcoders, model: Model | None) -> Tensor:
    """A tensor on the device and in the precision of the result."""
    weight = transcoders.encoders[0].weight
    dtype = torch.promote_types(weight.dtype, torch.float32)
    return torch.empty(0, dtype=dtype, device=weight.device if model is None else model.cfg.device)


def _block_size(transcoders: Transcoders, coactivation: Coactivation | None, numbers: int) -> int:
    """How many sources, and targets, a block may have if it may hold so many numbers."""
    # Pairs: weights, shares and what selects. A source or target: its row as stored, brought and normed; the sum; activations at every token.
    pair, one = 4, 6 * transcoders.d_model + (0 if coactivation is None else coactivation.n_tokens)
    size = max(1, int((math.sqrt(one**2 + 4 * pair * numbers) - one) / (2 * pair)))
    return size // BLOCK * BLOCK or size  # whole blocks are searched faster for their largest


def _blocks(n: int, size: int) -> Iterator[slice]:
    return (slice(start, min(start + size, n)) for start in range(0, n, size))


def _check(
    transcoders: Transcoders, top_k: int, model: Model | None, coactivation: Coactivation | None
) -> None:
    if top_k < 1:
        raise InputError(
            f"top_k={top_k}: give how many virtual weights into each feature are kept, at least 1."
        )
    if model is not None:
        check_transcoders(model, transcoders)
    expected = (transcoders.n_layers, transcoders.n_features)
    if coactivation is not None and coactivation.shape != expected:
        raise InputError(
            f"the coactivation is of {coactivation.shape[0]} layers of {coactivation.shape[1]} features, and {transcoders.name!r} has {expected[0]} "
            f"of {expected[1]}; compute it with these transcoders."
        )


def _check_batch(found: ExtractedFeatures, transcoders: Transcoders, leading: int) -> None:
    if found.layers != tuple(range(transcoders.n_layers)):
        raise InputError(
            f"a batch has layers {list(found.layers)}; give all {transcoders.n_layers} of {transcoders.name!r}, from 0."
        )
    if leading < 0 or found.shape[1] <= leading:
        raise InputError(
            f"leading={leading} of {found.shape[1]} positions are left out; give fewer, from 0 up, or longer prompts."
        )
    if len(found) and int(found.index.max()) >= transcoders.n_features:
        raise InputError(
            f"a batch has a feature {int(found.index.max())}, and {transcoders.name!r} has {transcoders.n_features}; extract it with these."
        )
