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
from dataclasses import dataclass, replace

import torch
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor

from circuits.attribution.active_features import ActiveFeatures, FeatureOutputs, Sources
from circuits.attribution.local_model import Gradient, LocalModel, Residual, TargetNumbers
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


@dataclass(frozen=True, eq=False)
class EdgeWeights:
    """The weights of all edges into some targets. A row sums to the target's pre-activation."""

    features: Float[Tensor, "target feature"]
    errors: Float[Tensor, "target layer pos"]
    embeddings: Float[Tensor, "target pos"]
    constants: Float[Tensor, "target constant"]


def feature_targets(
    model: LocalModel, transcoders: Transcoders, features: ActiveFeatures
) -> SweepTargets:
    """Return the encoder vectors of features as targets in the residual stream."""
    n, d_model = len(features), model.embedding.shape[1]
    vectors = model.embedding.new_empty(n, d_model)
    biases = model.embedding.new_empty(n)
    for layer, frozen in enumerate(model.layers):
        mine = true_rows(features.layer == layer)
        index = features.index[mine]
        rows = transcoders.encoder_rows(layer, index, vectors)
        reading = frozen.reading[features.position[mine]]
        # pre-activation = w_enc (LN(residual) + b_LN) + b_enc, so vector = LN^T w_enc
        vectors[mine] = reading.transposed(rows)
        bias = transcoders.encoders[layer].bias
        biases[mine] = bias[index.to(bias.device)].to(biases)
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
        blocks, weights = zip(*self.by_block(targets), strict=True)
        order = torch.argsort(torch.cat(blocks))
        return select_rows(join_rows(weights), order)

    @torch.no_grad()
    def by_block(
        self, targets: SweepTargets
    ) -> Iterator[tuple[Int[Tensor, " block"], EdgeWeights]]:
        """Yield the same rows in the blocks of `split`, with the numbers of their targets."""
        for block in self.split(targets):
            some = select_rows(targets, block)
            length = len(self.model.tokens)
            if self.model.causal:
                length = int(some.position.max()) + 1
            gradient = some.vector.new_zeros(length, *some.vector.shape)
            gradient[some.position, row_numbers(block)] = some.vector
            descent = _BlockSweep(self, gradient, slice(0, length), some.position)
            weights = descent.edge_weights(int(some.layer[0]))
            # Row sum: pre-activation = G . (all that is written) + own bias
            weights.constants[:, OWN_BIAS] = some.bias
            yield block, weights

    @torch.no_grad()
    def direct(self, block: SweepTargets) -> tuple[EdgeWeights, TargetNumbers]:
        """Compute the direct part of the edges into a block of `split`.

        The direct part passes through the residual stream and skips only, so it stays at the
        target's position. One row therefore serves a target of each position.

        Returns:
            Rows, and the number of each target's row. Its entries for sources at other positions
            than the target's belong to other targets.
        """
        first, last = block.position[[0, -1]].tolist()
        place = block.position - first
        # Number the targets at each position.
        counts = torch.bincount(place)
        starts = counts.cumsum(0) - counts
        row = row_numbers(place) - starts[place]
        n_rows, d_model = int(counts.max()), block.vector.shape[1]
        gradient = block.vector.new_zeros(len(counts), n_rows, d_model)
        gradient[place, row] = block.vector
        descent = _BlockSweep(self, gradient, slice(first, last + 1), None)
        return descent.edge_weights(int(block.layer[0])), row

    def split(self, targets: SweepTargets) -> Iterator[TargetNumbers]:
        """Yield blocks of targets of one layer and neighbouring positions that fit in memory."""
        most_rows = self._most_rows()
        keys = targets.layer * len(self.model.tokens) + targets.position
        order = torch.argsort(keys, stable=True)
        layers = targets.layer[order].tolist()
        positions = targets.position[order].tolist()
        start = 0
        for stop in range(1, len(order)):
            size = stop - start
            full = size >= TARGETS_PER_BLOCK and positions[stop] != positions[stop - 1]
            # The gradient of a block covers all positions up to the last of its targets.
            too_large = (size + 1) * (positions[stop] + 1) > most_rows
            if full or too_large or layers[stop] != layers[start]:
                yield order[start:stop]
                start = stop
        yield order[start:]

    def _most_rows(self) -> int:
        # How many vectors (targets times positions) the gradient of a block may hold. Four times
        # the gradient leaves room for what a layer computes from it.
        like = self.model.embedding
        row_bytes = 4 * like.shape[1] * like.element_size()
        cpu_bytes = CPU_ROWS * row_bytes
        return memory_budget(like.device, self.max_memory, cpu_bytes=cpu_bytes) // row_bytes


class _BlockSweep:
    """One block of targets on its way down to the embeddings, with the edge weights so far.

    Args:
        gradient: G; overwritten.
        positions: the positions that `gradient` covers.
        target_position: the position of each target, where alone `gradient` is not zero; None to
            leave out attention.
    """

    def __init__(
        self,
        sweep: LinearSweep,
        gradient: Gradient,
        positions: slice,
        target_position: TargetNumbers | None,
    ) -> None:
        self.model, self.sources = sweep.model, sweep.sources
        self.gradient, self.positions = gradient, positions
        self.target_position = target_position
        self.above_attention = True
        n_targets = gradient.shape[1]
        n_layers, length = len(self.model.layers), len(self.model.tokens)
        self.weights = EdgeWeights(
            # In the order of `Sources.order` until the end.
            features=gradient.new_zeros(n_targets, len(self.sources.order)),
            errors=gradient.new_zeros(n_targets, n_layers, length),
            embeddings=gradient.new_zeros(n_targets, length),
            constants=gradient.new_zeros(n_targets, len(CONSTANTS)),
        )

    def edge_weights(self, layer: int) -> EdgeWeights:
        """Carry the gradient down from the input of the MLP of `layer`."""
        parallel = self.model.parallel
        if layer < len(self.model.layers) and not parallel:
            self._pass_attention(layer)
        for below in reversed(range(layer)):
            self._read_off_mlp_output(below)
            skip = self.model.layers[below].skip_gradient(self.gradient, self.positions)
            # The MLP reads the residual stream after attention, in a parallel block before it.
            if skip is not None and not parallel:
                self.gradient += skip
            self._pass_attention(below)
            if skip is not None and parallel:
                self.gradient += skip
        self._read_off_embeddings()
        features = self.weights.features.index_select(1, self.sources.column)
        return replace(self.weights, features=features)

    def _pass_attention(self, layer: int) -> None:
        if self.target_position is None:
            return
        frozen = self.model.layers[layer]
        (constant,) = self._products(frozen.attention_constant)
        self.weights.constants[:, ATTENTION_BIAS] += constant.sum(1)
        # G += LN^T(sum_h A_h^T G W_O[h]^T W_V[h]^T)
        if self.above_attention:
            values = frozen.value_gradient_of_one_position(self.gradient, self.target_position)
        else:
            values = frozen.value_gradient(self.gradient)
        frozen.add_attention_gradient(values, self.gradient)
        self.above_attention = False

    def _read_off_mlp_output(self, layer: int) -> None:
        self._read_off_features(layer)
        sources, weights = self.sources, self.weights
        # A[t, e] = G_t . error_e; bias and skip constant: sum over positions of G_t . constant
        error, constant = self._products(sources.errors[layer], sources.mlp_constants[layer])
        weights.errors[:, layer, self.positions] = error
        weights.constants[:, MLP_BIAS] += constant.sum(1)

    def _read_off_features(self, layer: int) -> None:
        outputs, features = self.sources.outputs[layer], self.weights.features
        # A[t, n] += G_t . out_n, the activation times the decoder row of feature n
        if self._pads(outputs):
            self._read_off_padded(outputs)
            return
        starts, column_slices = outputs.starts, outputs.column_slices
        for position, gradient in enumerate(self.gradient, start=self.positions.start):
            rows = outputs.rows[starts[position] : starts[position + 1]]
            features[:, column_slices[position]].addmm_(gradient, rows.T)

    def _pads(self, outputs: FeatureOutputs) -> bool:
        # One padded product for all positions may be faster than one for each.
        n_rows = outputs.starts[self.positions.stop] - outputs.starts[self.positions.start]
        n_padded = outputs.n_slots * len(self.gradient)
        small = n_padded <= min(MOST_PADDED * n_rows, PADDED_ROWS)
        return small and self.gradient.device.type in PADDED_ON

    def _read_off_padded(self, outputs: FeatureOutputs) -> None:
        first, end = self.positions.start, self.positions.stop
        here = slice(outputs.starts[first], outputs.starts[end])
        rows = outputs.rows[here]
        slots = outputs.slot[here] - first * outputs.n_slots
        padded = rows.new_zeros(len(self.gradient) * outputs.n_slots, rows.shape[1])
        padded.index_copy_(0, slots, rows)
        by_position = padded.view(len(self.gradient), outputs.n_slots, -1)
        products = torch.bmm(self.gradient, by_position.mT)
        products = rearrange(products, "pos target slot -> target (pos slot)")
        self.weights.features.index_add_(1, outputs.columns[here], products[:, slots])

    def _read_off_embeddings(self) -> None:
        vectors = [self.model.embedding]
        if self.model.position_embedding is not None:
            vectors.append(self.model.position_embedding)
        # A[t, token] = G_t . embedding of the token
        token, *position = self._products(*vectors)
        self.weights.embeddings[:, self.positions] = token
        if position:
            self.weights.constants[:, POSITION_EMBEDDING] = position[0].sum(1)

    def _products(self, *vectors: Residual) -> Sequence[Float[Tensor, "target covered"]]:
        # G . v at each position, for each of the vectors v.
        stacked = torch.stack([vector[self.positions] for vector in vectors], dim=-1)
        return torch.bmm(self.gradient, stacked).permute(2, 1, 0).unbind()
