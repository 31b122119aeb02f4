"""Edge weights of an attribution graph, computed by a linear sweep without autograd.

A target reads the residual stream at one layer and position along a vector. The sweep carries the
gradient G of the target with respect to the residual stream from there down to the embeddings.
Each layer adds the gradient through attention (and through the transcoder's skip):

    G += LN^T(sum_h A_h^T G W_O[h]^T W_V[h]^T).

On the way, the weight of the edge from a source is read off as the dot product of G, at the
source's position, with what the source writes. All edges of a target and its constants sum to its
pre-activation.

Targets are taken in blocks of one layer and neighbouring positions. The sweep touches nothing
above a block's layer or after its last position.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor

from circuits.attribution.active_features import ActiveFeatures, FeatureOutputs, Sources
from circuits.attribution.local_model import (
    FrozenLayer,
    Gradient,
    LocalModel,
    Residual,
    TargetNumbers,
)
from circuits.attribution.tensor_table import join_rows, row_numbers, select_rows, true_rows
from circuits.system.memory import memory_budget
from circuits.transcoders.transcoder import Transcoders

# What belongs to no node: the biases of attention (of its norm, b_V and b_O); the biases of MLPs
# (decoder bias, the skip's constant, the whole output at leading positions); the learned position
# embedding; and the target's own bias (b_enc or the logit's).
CONSTANTS = ("attention_bias", "mlp_bias", "position_embedding", "own_bias")
ATTENTION_BIAS, MLP_BIAS, POSITION_EMBEDDING, OWN_BIAS = range(len(CONSTANTS))

# A block ends at a new position once it has this many targets. On a CPU its number of targets
# times positions stays below CPU_ROWS, so that the gradient fits the caches.
TARGETS_PER_BLOCK = 48
CPU_ROWS = 1 << 13
# On these devices one product over all positions, padded to equal numbers of rows, is faster than
# one per position. Padding may multiply the work by MOST_PADDED and copy PADDED_ROWS rows.
PADDED_ON = {"cuda"}
MOST_PADDED, PADDED_ROWS = 4, 1 << 17

TargetBias = Float[Tensor, " target"]
TargetVectors = Float[Tensor, "target d_model"]


@dataclass(frozen=True, eq=False)
class SweepTargets:
    """The readers of the residual stream whose incoming edges are wanted.

    Attributes:
        layer: the layer whose input is read; for logits, the number of layers.
        position: the position that is read.
        vector: the gradient with respect to the residual stream there.
        bias: the part of the target's pre-activation that is not vector @ residual.
    """

    layer: TargetNumbers
    position: TargetNumbers
    vector: TargetVectors
    bias: TargetBias

    def __len__(self) -> int:
        return len(self.layer)

    def zero_gradient(self, n_positions: int) -> Gradient:
        """Return a gradient of every target that is zero at all of these positions."""
        shape = (n_positions, *self.vector.shape)
        return self.vector.new_zeros(shape)


@dataclass(frozen=True, eq=False)
class EdgeWeights:
    """The weights of all edges into some targets. A row sums to the target's pre-activation.

    Attributes:
        weight: a column per source: features in the order of `Sources.order`, then the errors of
            all layers, then embeddings, both by position.
        constants: a column for each of `CONSTANTS`.
        sources: what the columns are.
    """

    weight: Float[Tensor, "target source"]
    constants: Float[Tensor, "target constant"]
    sources: Sources

    @property
    def features(self) -> Float[Tensor, "target feature"]:
        """The weights of edges from features, in the order of `Sources.features`."""
        return self.weight[:, self.sources.column]

    @property
    def errors(self) -> Float[Tensor, "target layer pos"]:
        """The weights of edges from errors, as a view."""
        return self._others[:, :-1]

    @property
    def embeddings(self) -> Float[Tensor, "target pos"]:
        """The weights of edges from embeddings, as a view."""
        return self._others[:, -1]

    @property
    def _others(self) -> Float[Tensor, "target layer_or_embedding pos"]:
        n_features = len(self.sources.order)
        n_positions = self.sources.errors.shape[1]
        others = self.weight[:, n_features:]
        return others.unflatten(1, (-1, n_positions))


Blocks = Iterator[tuple[TargetNumbers, EdgeWeights]]


def feature_targets(
    model: LocalModel, transcoders: Transcoders, features: ActiveFeatures
) -> SweepTargets:
    """Return the encoder vectors of features as targets in the residual stream."""
    like = model.embedding
    vectors = like.new_empty(len(features), like.shape[1])
    biases = like.new_empty(len(features))
    for layer, frozen in enumerate(model.layers):
        mine = true_rows(features.layer == layer)
        index = features.index[mine]
        rows = transcoders.encoder_rows(layer, index, like)
        # pre-activation = w_enc (LN(residual) + b_LN) + b_enc, so vector = LN^T w_enc
        reading = frozen.reading[features.position[mine]]
        vectors[mine] = reading.transposed(rows)
        bias = transcoders.encoders[layer].bias.to(like)
        biases[mine] = bias[index]
        if reading.bias is not None:
            biases[mine] += rows @ reading.bias
    return SweepTargets(features.layer, features.position, vectors, biases)


def logit_targets(
    model: LocalModel, directions: TargetVectors, biases: TargetBias, positions: TargetNumbers
) -> SweepTargets:
    """Return directions in the output of the last norm as targets in the residual stream."""
    # value = direction (LN(residual) + b_LN) + bias, so vector = LN^T direction
    if model.final.bias is not None:
        biases = biases + directions @ model.final.bias
    vectors = model.final[positions].transposed(directions)
    layers = torch.full_like(positions, len(model.layers))
    return SweepTargets(layers, positions, vectors, biases)


@dataclass(frozen=True, eq=False)
class LinearSweep:
    """Computes the weights of edges into targets of one prompt.

    Attributes:
        max_memory: bytes that the gradients of a block may take; None chooses from what is free.
    """

    model: LocalModel
    sources: Sources
    max_memory: int | None = None

    def rows(self, targets: SweepTargets) -> EdgeWeights:
        """Compute the weights of all edges into `targets`."""
        by_block = self.by_block(targets)
        blocks, weights = zip(*by_block, strict=True)
        order = torch.cat(blocks).argsort()
        return select_rows(join_rows(weights), order)

    @torch.no_grad()
    def by_block(self, targets: SweepTargets) -> Blocks:
        """Yield the same rows in the blocks of `split`, with the numbers of their targets."""
        for numbers in self.split(targets):
            block = select_rows(targets, numbers)
            length = len(self.model.tokens)
            if self.model.causal:
                length = int(block.position.max()) + 1
            positions = slice(0, length)
            weights = self._descend(block, positions, with_attention=True)
            # Row sum: pre-activation = G . (all that is written) + own bias
            weights.constants[:, OWN_BIAS] = block.bias
            yield numbers, weights

    @torch.no_grad()
    def direct(self, block: SweepTargets) -> EdgeWeights:
        """Compute the direct part of the edges into a block of `split`.

        It passes through the residual stream and skips only, so it stays at the target's position.
        """
        first, last = block.position[[0, -1]].tolist()
        positions = slice(first, last + 1)
        return self._descend(block, positions, with_attention=False)

    def _descend(
        self, block: SweepTargets, positions: slice, *, with_attention: bool
    ) -> EdgeWeights:
        gradient = block.zero_gradient(positions.stop - positions.start)
        # G starts as each target's vector, at its own position.
        position = block.position - positions.start
        gradient[position, row_numbers(position)] = block.vector
        descent = _Descent(self, gradient, positions, block.position, with_attention)
        return descent.edge_weights(int(block.layer[0]))

    def split(self, targets: SweepTargets) -> Iterator[TargetNumbers]:
        """Yield blocks of targets of one layer and neighbouring positions that fit in memory."""
        most_rows = self._most_rows()
        n_positions = len(self.model.tokens)
        keys = targets.layer * n_positions + targets.position
        order = keys.argsort(stable=True)
        layers = targets.layer[order].tolist()
        positions = targets.position[order].tolist()
        start = 0
        for stop in range(1, len(order)):
            position, size = positions[stop], stop - start
            full = size >= TARGETS_PER_BLOCK and position != positions[stop - 1]
            # The gradient of a block covers all positions up to the last of its targets.
            too_large = (size + 1) * (position + 1) > most_rows
            if full or too_large or layers[stop] != layers[start]:
                yield order[start:stop]
                start = stop
        yield order[start:]

    def _most_rows(self) -> int:
        # How many vectors (targets times positions) the gradient of a block may hold. Four times
        # the gradient leaves room for what a layer computes from it.
        like = self.model.embedding
        _, d_model = like.shape
        row_bytes = 4 * d_model * like.element_size()
        cpu_bytes = CPU_ROWS * row_bytes
        budget = memory_budget(like.device, self.max_memory, cpu_bytes=cpu_bytes)
        return budget // row_bytes


@dataclass(eq=False)
class _Descent:
    """One block of targets on its way down to the embeddings.

    Attributes:
        gradient: G; overwritten.
        positions: the positions that `gradient` covers.
        target_position: the position of each target, as long as `gradient` is zero elsewhere.
        with_attention: whether paths through attention count.
    """

    sweep: LinearSweep
    gradient: Gradient
    positions: slice
    target_position: TargetNumbers | None
    with_attention: bool
    weights: EdgeWeights = field(init=False)

    def __post_init__(self) -> None:
        sources = self.sweep.sources
        n_layers, length = sources.errors.shape[:2]
        n_sources = len(sources.order) + (n_layers + 1) * length
        n_targets = self.gradient.shape[1]
        weight = self.gradient.new_zeros(n_targets, n_sources)
        constants = self.gradient.new_zeros(n_targets, len(CONSTANTS))
        self.weights = EdgeWeights(weight, constants, sources)

    def edge_weights(self, layer: int) -> EdgeWeights:
        """Carry the gradient down from the input of the MLP of `layer`."""
        model = self.sweep.model
        if layer < len(model.layers) and not model.parallel:
            self._pass_attention(model.layers[layer])
        for below in reversed(range(layer)):
            frozen = model.layers[below]
            self._read_off_mlp_output(below)
            skip = frozen.skip_gradient(self.gradient, self.positions)
            # The MLP reads the residual stream after attention, in a parallel block before it.
            if skip is not None and not model.parallel:
                self.gradient += skip
            self._pass_attention(frozen)
            if skip is not None and model.parallel:
                self.gradient += skip
        self._read_off_embeddings()
        return self.weights

    def _pass_attention(self, frozen: FrozenLayer) -> None:
        if not self.with_attention:
            return
        (constant,) = self._products(frozen.attention_constant)
        constants = self.weights.constants
        constants[:, ATTENTION_BIAS] += constant.sum(1)
        # G += LN^T(sum_h A_h^T G W_O[h]^T W_V[h]^T)
        values = frozen.value_gradient(self.gradient, self.target_position)
        frozen.add_attention_gradient(values, self.gradient)
        self.target_position = None

    def _read_off_mlp_output(self, layer: int) -> None:
        sources = self.sweep.sources
        self._read_off_features(sources.outputs[layer])
        # A[t, e] = G_t . error_e; bias and skip constant: sum over positions of G_t . constant
        written = (sources.errors[layer], sources.mlp_constants[layer])
        error, constant = self._products(*written)
        weights = self.weights
        weights.errors[:, layer, self.positions] = error
        weights.constants[:, MLP_BIAS] += constant.sum(1)

    def _read_off_features(self, outputs: FeatureOutputs) -> None:
        starts, positions = outputs.starts, self.positions
        first, stop = positions.start, positions.stop
        here = slice(starts[first], starts[stop])
        # A[t, n] += G_t . out_n, the activation times the decoder row of feature n
        if self._pads(outputs, here):
            self._read_off_padded(outputs, here)
            return
        weight = self.weights.weight
        counts = outputs.counts[positions]
        by_position = outputs.rows[here].split(counts)
        columns = outputs.first_columns[positions]
        parts = zip(self.gradient, by_position, columns, strict=True)
        for gradient, rows, first in parts:
            last = first + len(rows)
            weight[:, first:last].addmm_(gradient, rows.T)

    def _pads(self, outputs: FeatureOutputs, here: slice) -> bool:
        n_rows = here.stop - here.start
        n_padded = len(self.gradient) * max(outputs.counts)
        small = n_padded <= min(MOST_PADDED * n_rows, PADDED_ROWS)
        return small and self.gradient.device.type in PADDED_ON

    def _read_off_padded(self, outputs: FeatureOutputs, here: slice) -> None:
        rows = outputs.rows[here]
        n_slots = max(outputs.counts)
        first_slot = self.positions.start * n_slots
        slots = outputs.slot[here] - first_slot
        n_positions, _, d_model = self.gradient.shape
        padded = rows.new_zeros(n_positions, n_slots, d_model)
        in_slots = padded.view(-1, d_model)
        in_slots.index_copy_(0, slots, rows)
        # products[p, t, slot] = G_t[p] . out_n of the feature n in that slot
        products = torch.bmm(self.gradient, padded.mT)
        products = rearrange(products, "pos target slot -> target (pos slot)")
        columns = outputs.columns[here]
        self.weights.weight.index_add_(1, columns, products[:, slots])

    def _read_off_embeddings(self) -> None:
        model, weights = self.sweep.model, self.weights
        # A[t, token] = G_t . embedding of the token
        (token,) = self._products(model.embedding)
        weights.embeddings[:, self.positions] = token
        if model.position_embedding is not None:
            (position,) = self._products(model.position_embedding)
            weights.constants[:, POSITION_EMBEDDING] = position.sum(1)

    def _products(self, *vectors: Residual) -> Sequence[Float[Tensor, "target covered"]]:
        # G . v at each position, for each of the vectors v.
        covered = [vector[self.positions] for vector in vectors]
        stacked = torch.stack(covered, dim=-1)
        products = torch.bmm(self.gradient, stacked)
        return products.permute(2, 1, 0).unbind()
