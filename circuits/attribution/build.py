"""Attribution graphs of prompts, from a local model, transcoders and the directions to explain.

The steps for one prompt: gather what its active features write (`active_features`); compute the
rows of edges into features and directions (`edge_weights`), either all of them or, with a budget,
those of the most influential features; collect nodes and nonzero edges in a `FeatureGraph`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Float, Int
from torch import Tensor

from circuits.attribution.active_features import ActiveFeatures, gather_sources
from circuits.attribution.edge_weights import (
    CONSTANTS,
    Blocks,
    EdgeWeights,
    LinearSweep,
    SweepTargets,
    TargetVectors,
    feature_targets,
    logit_targets,
)
from circuits.attribution.feature_graph import FEATURE, TARGET, FeatureGraph, LogitTarget, Nodes
from circuits.attribution.influence import SMALLEST_SUM
from circuits.attribution.local_model import LocalModel, ModelVector, TargetNumbers
from circuits.attribution.tensor_table import join_rows, row_numbers, select_rows, true_rows
from circuits.models import count_not_finite
from circuits.system.errors import InputError
from circuits.transcoders.transcoder import Transcoders

# The constant that sums the edges from features outside the budget.
UNSELECTED = "unselected_features"

# The numbers of some targets, and the weights of the edges into them.
DirectionWeights = Float[Tensor, " direction"]
NodeConstants = Float[Tensor, "node constant"]
SourceNodes = Int[Tensor, " _"]
EdgeNodes = Int[Tensor, " edge"]
EdgeValues = Float[Tensor, " edge"]


@dataclass(frozen=True, eq=False)
class Direction:
    """A direction in the output of the last norm to be explained.

    >>> import circuits
    >>> model = circuits.load_model("toy-world")
    >>> difference = model.W_U[:, 7] - model.W_U[:, 21]
    >>> circuits.Direction("7 against 21", difference, position=4).label
    '7 against 21'

    Attributes:
        label: a name for people; no number and without "@".
        vector: the direction.
        bias: a constant that is part of the explained value.
        weight: how much the direction counts in influence, such as the token's probability.
        position: the position of the output; None: the prompt's last position.
        token: the token whose logit is explained, if it is one.
    """

    label: str
    vector: ModelVector
    bias: float = 0.0
    weight: float = 1.0
    position: int | None = None
    token: int | None = None


def difference_direction(
    model: LocalModel,
    right: Sequence[int],
    wrong: Sequence[int] | None,
    label: str,
    position: int | None = None,
) -> Direction:
    """Return the direction of the mean logit of some tokens minus that of others, or of all."""
    right_vector, right_bias = _mean_logit(model, right)
    wrong_vector, wrong_bias = _mean_logit(model, wrong)
    bias = float(right_bias - wrong_bias)
    return Direction(label, right_vector - wrong_vector, bias, position=position)


def _mean_logit(
    model: LocalModel, tokens: Sequence[int] | None
) -> tuple[ModelVector, Float[Tensor, ""]]:
    # mean logit = LN_final(residual) . mean(W_U) + mean(b_U), over some tokens or all
    if tokens is None:
        return model.mean_unembedding, model.unembedding_bias.mean()
    columns = list(tokens)
    vectors = model.unembedding[:, columns].to(model.mean_unembedding)
    biases = model.unembedding_bias[columns]
    return vectors.mean(1), biases.mean()


@torch.no_grad()
def build_feature_graph(
    model: LocalModel,
    transcoders: Transcoders,
    features: ActiveFeatures,
    directions: Sequence[Direction],
    *,
    words: Sequence[str],
    budget: int | None = None,
    at_a_time: int = 512,
    leading: int = 1,
    max_memory: int | None = None,
) -> FeatureGraph:
    """Build the attribution graph of one prompt, whose tokens have the texts `words`.

    Args:
        budget: the number of features that get rows of incoming edges, the most influential ones;
            None: all of them.
        at_a_time: how many are chosen before influence is computed again.
        leading: see `active_features`.
        max_memory: see `LinearSweep`.

    Raises:
        InputError: no feature is active, or edges are not finite.
    """
    if not len(features):
        raise InputError(
            f"no feature of {transcoders.name!r} is active on the prompt {' '.join(words)!r}: "
            "there is no graph; give a longer prompt or transcoders that were trained on this "
            "model."
        )
    direction_weights = [one.weight for one in directions]
    weight = model.embedding.new_tensor(direction_weights)
    vectors, into_directions = _direction_targets(model, directions)
    into_features = feature_targets(model, transcoders, features)
    targets = join_rows([into_features, into_directions])
    sources = gather_sources(model, transcoders, features, leading=leading)
    sweep = LinearSweep(model, sources, max_memory)
    n_chosen = len(features)
    if budget is not None:
        n_chosen = min(budget, n_chosen)
    chosen, blocks = _rows(sweep, targets, weight, n_chosen, at_a_time)
    selected = chosen[:n_chosen]
    with_rows = select_rows(features, selected)
    nodes = _nodes(model, with_rows, into_directions, weight)
    reader = _EdgeReader(sweep, selected, nodes)
    targets = select_rows(targets, chosen)
    edges, constants = reader.read(targets, blocks)
    source, target, weights, direct = edges
    graph = FeatureGraph(
        nodes=nodes,
        source=source,
        target=target,
        weight=weights,
        direct=direct,
        constants=constants,
        constant_names=(*CONSTANTS, UNSELECTED),
        tokens=model.tokens,
        words=tuple(words),
        targets=tuple(LogitTarget(one.label, one.token) for one in directions),
        directions=vectors,
        n_layers=len(model.layers),
    )
    numbers = (weights, graph.direct, constants)
    if any(map(count_not_finite, numbers)):
        raise InputError(
            f"some edges are not finite: check the decoders of {transcoders.name!r}, or load "
            "model and transcoders in float32."
        )
    return graph


def _direction_targets(
    model: LocalModel, directions: Sequence[Direction]
) -> tuple[TargetVectors, SweepTargets]:
    like = model.embedding
    last = len(model.tokens) - 1
    vectors = torch.stack([one.vector.to(like) for one in directions])
    biases = like.new_tensor([one.bias for one in directions])
    positions = [last if one.position is None else one.position for one in directions]
    position = model.tokens.new_tensor(positions)
    return vectors, logit_targets(model, vectors, biases, position)


def _rows(
    sweep: LinearSweep,
    targets: SweepTargets,
    weight: DirectionWeights,
    n_chosen: int,
    at_a_time: int,
) -> tuple[TargetNumbers, Blocks]:
    """Compute the rows of edges into the `n_chosen` most influential features and into directions.

    `targets` are all features, then the directions, which have these weights. Returns the numbers
    of the chosen targets, ascending, and their rows.
    """
    every = row_numbers(targets.layer)
    n_features = len(every) - len(weight)
    if n_chosen == n_features:
        return every, sweep.by_block(targets)
    directions = every[n_features:]
    chosen = every[:0]
    weights = sweep.rows(select_rows(targets, directions))
    while len(chosen) < n_chosen:
        n_following = min(at_a_time, n_chosen - len(chosen))
        following = _most_influential(weights, chosen, weight)
        following = following[:n_following]
        rows = sweep.rows(select_rows(targets, following))
        weights = join_rows([weights, rows])
        chosen = torch.cat([chosen, following])
    # `weights` holds directions first. Reorder by block: a copy of all rows is too large.
    numbers = torch.cat([directions, chosen])
    numbers, row = numbers.sort()
    split = sweep.split(select_rows(targets, numbers))
    blocks = ((block, select_rows(weights, row[block])) for block in split)
    return numbers, blocks


def _most_influential(
    weights: EdgeWeights, chosen: TargetNumbers, direction_weight: DirectionWeights
) -> Int[Tensor, " feature"]:
    """Sort features by their influence on the directions through chosen features alone.

    `weights` are the rows of directions, then of the chosen features, which come last.
    """
    shares, n_directions = _feature_shares(weights), len(direction_weight)
    of_directions, of_chosen = shares.tensor_split([n_directions])
    # influence = p A + p A^2 + ...; a path has at most one feature of each layer.
    flow = direction_weight @ of_directions
    influence = flow.clone()
    column = weights.sources.column
    for _ in weights.sources.outputs:
        flow = flow[column[chosen]] @ of_chosen
        influence += flow
    influence[column[chosen]] = -1.0
    by_feature = influence[column]
    return by_feature.argsort(descending=True, stable=True)


def _feature_shares(weights: EdgeWeights) -> Float[Tensor, "target feature"]:
    # A = |edge weights|, each row divided by its sum
    sizes = weights.weight.abs()
    sums = sizes.sum(1, keepdim=True)
    n_features = len(weights.sources.order)
    of_features = sizes[:, :n_features]
    return of_features / sums.clamp(min=SMALLEST_SUM)


def _nodes(
    model: LocalModel, features: ActiveFeatures, directions: SweepTargets, weight: DirectionWeights
) -> Nodes:
    position = row_numbers(model.tokens)
    n_layers = len(model.layers)
    layers = position.new_tensor(range(n_layers))
    error_layer = layers.repeat_interleave(len(position))
    error_position = position.repeat(n_layers)
    before_layers = torch.full_like(position, -1)
    # Layer, position and index of features, errors, embeddings and directions, as in `NodeKind`
    kinds = (
        (features.layer, features.position, features.index),
        (error_layer, error_position, torch.zeros_like(error_layer)),
        (before_layers, position, model.tokens),
        (directions.layer, directions.position, row_numbers(weight)),
    )
    columns = zip(*kinds, strict=True)
    layer, positions, index = map(torch.cat, columns)
    sizes = layer.new_tensor([len(layers) for layers, _, _ in kinds])
    kind = row_numbers(sizes).repeat_interleave(sizes)
    probability = torch.zeros_like(layer, dtype=torch.float32)
    probability[-len(weight) :] = weight
    activation = torch.full_like(probability, torch.nan)
    activation[: len(features)] = features.activation
    return Nodes(kind, layer, positions, index, activation, probability)


@dataclass(frozen=True, eq=False)
class _EdgeReader:
    """Reads the edges between nodes of the graph from rows of edge weights."""

    sweep: LinearSweep
    selected: TargetNumbers
    nodes: Nodes

    def read(self, targets: SweepTargets, blocks: Blocks) -> tuple[Sequence[Tensor], NodeConstants]:
        """Read all nonzero edges by target and then source, and the constants of every node."""
        nodes = self.nodes
        n_constants = len(CONSTANTS) + 1
        constants = targets.vector.new_zeros(len(nodes), n_constants)
        kind = nodes.kind
        is_target = (kind == FEATURE) | (kind == TARGET)
        node_of_target = true_rows(is_target)
        unselected = self._unselected()
        parts = []
        for numbers, weights in blocks:
            node, block = node_of_target[numbers], select_rows(targets, numbers)
            parts.append(self._edges(block, node, weights))
            constants[node, :-1] = weights.constants
            # Sum them apart: a difference of two sums would lose digits.
            outside = weights.weight.index_select(1, unselected)
            constants[node, -1] = outside.sum(1)
        columns = zip(*parts, strict=True)
        edges = list(map(torch.cat, columns))
        # The sweep takes directions by position, which need not be the order of their nodes.
        _, target, *_ = edges
        if (target.diff() < 0).any():
            order = target.argsort(stable=True)
            edges = [column[order] for column in edges]
        return edges, constants

    def _unselected(self) -> SourceNodes:
        """The columns of features that are no nodes."""
        column = self.sweep.sources.column
        is_node = torch.isin(row_numbers(column), self.selected)
        return column[~is_node]

    def _edges(
        self, block: SweepTargets, node: TargetNumbers, weights: EdgeWeights
    ) -> tuple[EdgeNodes, EdgeNodes, EdgeValues, EdgeValues]:
        """Source, target, weight and direct part of the edges into a block of targets."""
        source = self._reaching(block)
        column = self.column[source]
        weight = weights.weight.index_select(1, column)
        nonzero = weight != 0
        direct_weights = self.sweep.direct(block)
        direct = direct_weights.weight.index_select(1, column)
        return (
            source.expand_as(nonzero).masked_select(nonzero),
            node.repeat_interleave(nonzero.sum(1)),
            weight.masked_select(nonzero),
            direct.masked_select(nonzero),
        )

    def _reaching(self, block: SweepTargets) -> SourceNodes:
        # Edges come from earlier layers and, with causal attention, not from later positions.
        reaches = self.nodes.layer < block.layer[0]
        if self.sweep.model.causal:
            reaches &= self.nodes.position <= block.position.max()
        # Reading only their columns halves the work.
        return true_rows(reaches)

    @cached_property
    def column(self) -> SourceNodes:
        """The column in `EdgeWeights` of each node that can be a source."""
        sources = self.sweep.sources
        n_nodes = len(self.selected)
        n_unselected = len(sources.order) - n_nodes
        column = row_numbers(self.nodes.kind) + n_unselected
        column[:n_nodes] = sources.column[self.selected]
        return column
