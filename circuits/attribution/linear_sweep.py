"""Edges of an attribution graph by one linear sweep from each target down to the embeddings: no autograd, no run of the model.

A target is a direction in the residual stream at some layer and position. Carried downwards it becomes one direction at every position; its
product with what a source writes is the weight of that source's edge. Targets are taken in blocks of one layer and neighbouring positions, so
that nothing above a target's layer or after its position is touched, and all work is products of matrices.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from circuits.attribution.active_features import ActiveFeatures, Sources
from circuits.attribution.local_model import LocalModel
from circuits.system.memory import memory_budget
from circuits.transcoders.transcoder import Transcoders

CONSTANTS = ("attention_bias", "mlp_bias", "position_embedding", "own_bias")
ATTENTION_BIAS, MLP_BIAS, POSITION_EMBEDDING, OWN_BIAS = range(4)
"""What is in no node: biases of attention (its norm's and b_V, b_O); the MLPs' (decoder bias, the skip's constant, at the leading positions
the whole output); the learned position embedding; and the target's own (b_enc, or the logit's)."""

# A block has at least so many targets where there are so many, and on a CPU at most so many rows (targets times positions).
TARGETS_PER_BLOCK = 48
CPU_ROWS = 1 << 13
# On these devices one call for all positions is faster than one for each, though it goes over padding: at most so many times the work, and at most so
# many rows, which are copied for it.
PADDED_ON = {"cuda"}
MOST_PADDED, PADDED_ROWS = 4, 1 << 17


@dataclass(frozen=True, eq=False)
class SweepTargets:
    """Directions whose incoming edges are wanted.

    Attributes:
        layer: whose input is read; the number of layers for logits.
        position: where.
        vector: the direction in the residual stream that is read.
        bias: what the target's value holds besides its product with the residual stream.
    """

    layer: Int[Tensor, " target"]
    position: Int[Tensor, " target"]
    vector: Float[Tensor, "target d_model"]
    bias: Float[Tensor, " target"]

    def __len__(self) -> int:
        return len(self.layer)

    def __getitem__(self, chosen: Tensor) -> SweepTargets:
        return SweepTargets(
            self.layer[chosen], self.position[chosen], self.vector[chosen], self.bias[chosen]
        )

    def __add__(self, other: SweepTargets) -> SweepTargets:
        """These and those after them."""
        return SweepTargets(
            *(
                torch.cat([mine, theirs])
                for mine, theirs in zip(vars(self).values(), vars(other).values(), strict=True)
            )
        )


@dataclass(frozen=True, eq=False)
class EdgeWeights:
    """The weights of all edges into some targets."""

    features: Float[Tensor, "target feature"]
    errors: Float[Tensor, "target layer pos"]
    embeddings: Float[Tensor, "target pos"]
    constants: Float[Tensor, "target constant"]

    def __add__(self, other: EdgeWeights) -> EdgeWeights:
        """The rows of these targets and of those after them."""
        return EdgeWeights(
            *(
                torch.cat([mine, theirs])
                for mine, theirs in zip(vars(self).values(), vars(other).values(), strict=True)
            )
        )

    def __getitem__(self, chosen: Tensor) -> EdgeWeights:
        return EdgeWeights(*(part[chosen] for part in vars(self).values()))

    def sums(self) -> Float[Tensor, " target"]:
        """All edges and constants together: each target's pre-activation."""
        return (
            self.features.sum(1)
            + self.errors.sum((1, 2))
            + self.embeddings.sum(1)
            + self.constants.sum(1)
        )


def feature_targets(
    model: LocalModel, transcoders: Transcoders, features: ActiveFeatures
) -> SweepTargets:
    """What each active feature reads along, carried into the residual stream."""
    like = model.embedding
    vectors = like.new_empty(len(features), like.shape[1])
    biases = like.new_empty(len(features))
    for layer, frozen in enumerate(model.layers):
        mine = (features.layer == layer).nonzero().flatten()
        rows = transcoders.encoder_rows(layer, features.index[mine], like)
        bias = transcoders.encoders[layer].bias
        biases[mine] = bias[features.index[mine].to(bias.device)].to(like)
        if frozen.reading.bias is not None:
            biases[mine] += rows @ frozen.reading.bias
        vectors[mine] = frozen.reading[features.position[mine]].transposed(rows)
    return SweepTargets(features.layer, features.position, vectors, biases)


def logit_targets(
    model: LocalModel,
    directions: Float[Tensor, "target d_model"],
    biases: Float[Tensor, " target"],
    positions: Int[Tensor, " target"],
) -> SweepTargets:
    """Directions in the output of the last norm, such as a logit less the mean logit, carried into the residual stream."""
    if model.final.bias is not None:
        biases = biases + directions @ model.final.bias
    return SweepTargets(
        torch.full_like(positions, len(model.layers)),
        positions,
        model.final[positions].transposed(directions),
        biases,
    )


@dataclass(frozen=True, eq=False)
class LinearSweep:
    """Carries targets down through one prompt's local model, reading off the sources on the way."""

    model: LocalModel
    sources: Sources
    max_memory: int | None = None

    def rows(self, targets: SweepTargets) -> EdgeWeights:
        """The weights of all edges into `targets`."""
        parts = list(self.by_block(targets))
        back = torch.argsort(torch.cat([block for block, _ in parts]))
        return EdgeWeights(
            *(
                torch.cat(columns)[back]
                for columns in zip(*(vars(rows).values() for _, rows in parts), strict=True)
            )
        )

    @torch.no_grad()
    def by_block(
        self, targets: SweepTargets
    ) -> Iterator[tuple[Int[Tensor, " block"], EdgeWeights]]:
        """The same, some targets at a time, by layer and position: their numbers and rows."""
        for block in self.split(targets):
            some = targets[block]
            length = int(some.position.max()) + 1 if self.model.causal else len(self.model.tokens)
            gradient = some.vector.new_zeros(length, len(some), some.vector.shape[1])
            gradient[some.position, torch.arange(len(some), device=gradient.device)] = some.vector
            rows = _Descent(
                self, int(some.layer[0]), gradient, starts=some.position
            ).to_embeddings()
            rows.constants[:, OWN_BIAS] = some.bias
            yield block, rows

    @torch.no_grad()
    def direct(self, block: SweepTargets) -> tuple[EdgeWeights, Int[Tensor, " target"]]:
        """Of the edges into one block of `split`, the part that stays at its position: through residual stream and skips, not attention.

        Every source stands at one position, so that one row serves a target of each position.

        Returns:
            Rows, and the number of each target's row: it holds its edges from sources at its own position, and edges of other targets.
        """
        first = int(block.position[0])
        place = block.position - first
        counts = torch.bincount(place)
        slot = torch.arange(len(block), device=place.device) - (counts.cumsum(0) - counts)[place]
        gradient = block.vector.new_zeros(len(counts), int(counts.max()), block.vector.shape[1])
        gradient[place, slot] = block.vector
        return _Descent(self, int(block.layer[0]), gradient, first).to_embeddings(), slot

    def split(self, targets: SweepTargets) -> Iterator[Int[Tensor, " target"]]:
        """Targets of one layer at neighbouring positions, few enough for the memory."""
        like = self.model.embedding
        per_row = 4 * like.shape[1] * like.element_size()
        most = max(
            1, memory_budget(like.device, self.max_memory, cpu_bytes=CPU_ROWS * per_row) // per_row
        )
        # Features come in this order, so that it mostly changes nothing.
        order = torch.argsort(
            targets.layer * len(self.model.tokens) + targets.position, stable=True
        )
        layers, positions = targets.layer[order].tolist(), targets.position[order].tolist()
        start = 0
        while start < len(order):
            stop = start + 1
            while stop < len(order) and layers[stop] == layers[start]:
                new_place, enough = (
                    positions[stop] != positions[stop - 1],
                    stop - start >= TARGETS_PER_BLOCK,
                )
                if (new_place and enough) or (stop + 1 - start) * (positions[stop] + 1) > most:
                    break
                stop += 1
            yield order[start:stop]
            start = stop


class _Descent:
    """Some directions of one layer on their way down, at neighbouring positions."""

    def __init__(
        self,
        sweep: LinearSweep,
        layer: int,
        gradient: Float[Tensor, "pos target d_model"],
        first: int = 0,
        starts: Int[Tensor, " target"] | None = None,
    ) -> None:
        """
        Args:
            gradient: overwritten.
            first: its first position.
            starts: where each direction stands, there alone; None: they do not go through attention.
        """
        self.model, self.sources = sweep.model, sweep.sources
        self.layer, self.gradient, self.starts = layer, gradient, starts
        self.spread = False  # not yet beyond their own positions
        self.positions, whole, n = (
            slice(first, first + len(gradient)),
            len(sweep.model.tokens),
            gradient.shape[1],
        )
        self.features = gradient.new_zeros(n, len(sweep.sources.order))
        self.errors, self.embeddings = (
            gradient.new_zeros(n, len(sweep.model.layers), whole),
            gradient.new_zeros(n, whole),
        )
        self.constants = gradient.new_zeros(n, len(CONSTANTS))

    def to_embeddings(self) -> EdgeWeights:
        """What is met on the way."""
        if self.layer < len(self.model.layers) and not self.model.parallel:
            self._attention(self.layer)
        for layer in reversed(range(self.layer)):
            self._read_off(layer)
            frozen = self.model.layers[layer]
            skipped = (
                None
                if frozen.skip is None
                else frozen.skip_transposed(self.gradient, self.positions)
            )
            # In a parallel block the MLP reads what attention reads; otherwise what it writes too.
            if skipped is not None and not self.model.parallel:
                self.gradient += skipped
            self._attention(layer)
            if skipped is not None and self.model.parallel:
                self.gradient += skipped
        vectors = [
            self.model.embedding,
            *([] if self.model.position_embedding is None else [self.model.position_embedding]),
        ]
        embedding, *position = self._products(vectors)
        self.embeddings[:, self.positions] = embedding
        self.constants[:, POSITION_EMBEDDING] = position[0].sum(1) if position else 0.0
        return EdgeWeights(
            self.features.index_select(1, self.sources.places),
            self.errors,
            self.embeddings,
            self.constants,
        )

    def _attention(self, layer: int) -> None:
        if self.starts is None:
            return
        frozen = self.model.layers[layer]
        self.constants[:, ATTENTION_BIAS] += self._products([frozen.attention_constant])[0].sum(1)
        if self.spread:
            values = frozen.values_transposed(self.gradient)
        else:
            values = frozen.values_transposed_from(self.gradient, self.starts)
        frozen.add_through_values(values, self.gradient)
        self.spread = True

    def _read_off(self, layer: int) -> None:
        written = self.sources.written[layer]
        rows = slice(written.bounds[self.positions.start], written.bounds[self.positions.stop])
        padded = written.slots.shape[1] * len(self.gradient)
        if self.gradient.device.type in PADDED_ON and padded <= min(
            MOST_PADDED * (rows.stop - rows.start), PADDED_ROWS
        ):
            products = (
                torch.bmm(self.gradient, written.together(self.positions).transpose(1, 2))
                .transpose(0, 1)
                .flatten(1)
            )
            filled = written.filled[rows] - self.positions.start * written.slots.shape[1]
            self.features.index_add_(1, written.places[rows], products.index_select(1, filled))
        else:
            for gradient, position in zip(
                self.gradient, range(self.positions.start, self.positions.stop), strict=True
            ):
                numbers, columns = written.at(position)
                self.features[:, columns].addmm_(gradient, numbers.T)
        error, constant = self._products(
            [self.sources.errors[layer], self.sources.mlp_constants[layer]]
        )
        self.errors[:, layer, self.positions] = error
        self.constants[:, MLP_BIAS] += constant.sum(1)

    def _products(
        self, vectors: Sequence[Float[Tensor, "pos d_model"]]
    ) -> list[Float[Tensor, "target seen"]]:
        """Of every target's direction with some vectors at each position."""
        together = torch.stack([vector[self.positions] for vector in vectors], dim=-1)
        return list(torch.bmm(self.gradient, together).permute(2, 1, 0))
