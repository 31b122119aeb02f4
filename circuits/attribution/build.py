"""Attribution graphs of prompts, from a local model, transcoders and the directions to explain.

The steps for one prompt: gather what its active features write (`active_features`); compute the
rows of edges into features and directions (`linear_sweep`), either all of them or, with a budget,
those of the most influential features; collect nodes and nonzero edges in a `FeatureGraph`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from jaxtyping import Float, Int
from torch import Tensor

from circuits.attribution.active_features import ActiveFeatures, gather_sources
from circuits.attribution.feature_graph import (
    EMBEDDING,
    ERROR,
    FEATURE,
    TARGET,
    FeatureGraph,
    LogitTarget,
    Nodes,
)
from circuits.attribution.influence import SMALLEST_SUM
from circuits.attribution.linear_sweep import (
    CONSTANTS,
    EdgeWeights,
    LinearSweep,
    SweepTargets,
    TargetVectors,
    feature_targets,
    logit_targets,
)
from circuits.attribution.local_model import LocalModel, ModelVector, TargetNumbers
from circuits.attribution.tensor_table import join_rows, row_numbers, select_rows, true_rows
from circuits.system.errors import InputError
from circuits.transcoders.transcoder import Transcoders

# The constant that sums the edges from features outside the budget.
UNSELECTED = "unselected_features"

# The numbers of some targets, and the weights of the edges into them.
Blocks = Iterable[tuple[Int[Tensor, " block"], EdgeWeights]]
TargetValues = Float[Tensor, " target"]
SelectedFeatures = Int[Tensor, " selected"]
SourceNodes = Int[Tensor, " _"]
KindNodes = Int[Tensor, " node"]
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


def top_logits(
    model: LocalModel, *, most: int, probability: float, position: int | None = None
) -> list[tuple[int, float]]:
    """Return the fewest next tokens, at most `most`, that together reach `probability`.

    Returns:
        Pairs of a token and its probability, the most probable first.
    """
    probabilities = model.logits(-1 if position is None else position).softmax(-1)
    values, tokens = probabilities.topk(min(most, len(probabilities)))
    below = int((values.cumsum(0) < probability).sum())
    pairs = zip(tokens.tolist(), values.tolist(), strict=True)
    return list(pairs)[: below + 1]


def token_direction(
    model: LocalModel, token: int, label: str, weight: float, position: int | None = None
) -> Direction:
    """Return the direction of a token's logit minus the mean logit."""
    direction = difference_direction(model, [token], None, label, position)
    return replace(direction, weight=weight, token=token)


def difference_direction(
    model: LocalModel,
    right: Sequence[int],
    wrong: Sequence[int] | None,
    label: str,
    position: int | None = None,
) -> Direction:
    """Return the direction of the mean logit of some tokens minus that of others.

    Args:
        wrong: the other tokens; None: the whole vocabulary.
    """
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
    vectors = model.unembedding[:, list(tokens)].to(model.mean_unembedding)
    return vectors.mean(1), model.unembedding_bias[list(tokens)].mean()


@dataclass(frozen=True)
class Budget:
    """How many features get rows of incoming edges.

    Attributes:
        features: the number of features, the most influential ones; None: all of them.
        at_a_time: how many are chosen before influence is computed again.
    """

    features: int | None = None
    at_a_time: int = 512


@torch.no_grad()
def build_feature_graph(
    model: LocalModel,
    transcoders: Transcoders,
    features: ActiveFeatures,
    directions: Sequence[Direction],
    *,
    words: Sequence[str],
    budget: Budget,
    leading: int = 1,
    max_memory: int | None = None,
) -> FeatureGraph:
    """Build the attribution graph of one prompt, whose tokens have the texts `words`.

    For `leading` see `active_features`, for `max_memory` see `LinearSweep`.

    Raises:
        InputError: no feature is active, or edges are not finite.
    """
    if not len(features):
        raise InputError(
            f"no feature of {transcoders.name!r} is active on the prompt {' '.join(words)!r}: "
            "there is no graph; give a longer prompt or transcoders that were trained on this "
            "model."
        )
    sources = gather_sources(model, transcoders, features, leading=leading)
    sweep = LinearSweep(model, sources, max_memory)
    into_features = feature_targets(model, transcoders, features)
    explained = _explained(model, directions)
    search = _RowSearch(sweep, into_features, explained, budget)
    selected, targets, blocks = search.rows()
    nodes = _nodes(model, select_rows(features, selected), explained)
    edges, constants = _EdgeReader(sweep, selected, nodes).read(targets, blocks)
    if not torch.isfinite(edges.weight).all():
        raise InputError(
            f"some edges are not finite: check the decoders of {transcoders.name!r}, or load "
            "model and transcoders in float32."
        )
    return FeatureGraph(
        nodes=nodes,
        source=edges.source,
        target=edges.target,
        weight=edges.weight,
        direct=edges.direct,
        constants=constants,
        constant_names=(*CONSTANTS, UNSELECTED),
        tokens=model.tokens,
        words=tuple(words),
        targets=tuple(LogitTarget(one.label, one.token) for one in directions),
        directions=explained.vectors,
        n_layers=len(model.layers),
    )


@dataclass(frozen=True, eq=False)
class _ExplainedDirections:
    """The directions to explain, in columns and as targets of the sweep."""

    vectors: TargetVectors
    weight: TargetValues
    targets: SweepTargets


def _explained(model: LocalModel, directions: Sequence[Direction]) -> _ExplainedDirections:
    like, last = model.embedding, len(model.tokens) - 1
    vectors = torch.stack([one.vector.to(like) for one in directions])
    biases = vectors.new_tensor([one.bias for one in directions])
    weight = vectors.new_tensor([one.weight for one in directions])
    positions = [last if one.position is None else one.position for one in directions]
    position = torch.tensor(positions, device=like.device)
    targets = logit_targets(model, vectors, biases, position)
    return _ExplainedDirections(vectors, weight.float(), targets)


@dataclass(frozen=True, eq=False)
class _RowSearch:
    """Computes the rows of edges into directions and the features within the budget."""

    sweep: LinearSweep
    into_features: SweepTargets
    explained: _ExplainedDirections
    budget: Budget

    def rows(self) -> tuple[SelectedFeatures, SweepTargets, Blocks]:
        """Return the selected features, ascending; these and directions as targets; their rows."""
        every = row_numbers(self.into_features.layer)
        n_features = self.budget.features
        if n_features is None or n_features >= len(every):
            targets = join_rows([self.into_features, self.explained.targets])
            return every, targets, self.sweep.by_block(targets)
        chosen, weights = self._most_influential(n_features)
        selected, order = chosen.sort()
        into_selected = select_rows(self.into_features, selected)
        targets = join_rows([into_selected, self.explained.targets])
        # `weights` holds directions first. Reorder by block: a copy of all rows is too large.
        directions = row_numbers(self.explained.weight)
        row = torch.cat([len(directions) + order, directions])
        split = self.sweep.split(targets)
        blocks = ((block, select_rows(weights, row[block])) for block in split)
        return selected, targets, blocks

    def _most_influential(self, n_features: int) -> tuple[SelectedFeatures, EdgeWeights]:
        """The most influential features; the rows of directions and then of these features."""
        weights = self.sweep.rows(self.explained.targets)
        chosen = row_numbers(self.into_features.layer)[:0]
        while len(chosen) < n_features:
            influence = self._partial_influence(weights, chosen)
            influence[chosen] = -1.0
            order = torch.argsort(influence, descending=True, stable=True)
            size = min(self.budget.at_a_time, n_features - len(chosen))
            following = select_rows(self.into_features, order[:size])
            weights = join_rows([weights, self.sweep.rows(following)])
            chosen = torch.cat([chosen, order[:size]])
        return chosen, weights

    def _partial_influence(
        self, weights: EdgeWeights, chosen: SelectedFeatures
    ) -> Float[Tensor, " feature"]:
        """The influence of every feature on the directions through chosen features alone."""
        # A = |edge weights|, each row divided by its sum
        sizes = weights.features.abs()
        sums = sizes.sum(1)
        sums += weights.errors.abs().sum((1, 2))
        sums += weights.embeddings.abs().sum(1)
        shares = sizes / sums.clamp(min=SMALLEST_SUM)[:, None]
        # influence = p A + p A^2 + ...; a path has at most one feature of each layer.
        direction_weight = self.explained.weight.to(shares)
        of_directions, of_chosen = shares.tensor_split([len(direction_weight)])
        flow = direction_weight @ of_directions
        influence = flow.clone()
        for _ in self.sweep.model.layers:
            flow = flow[chosen] @ of_chosen
            influence += flow
        return influence


def _nodes(model: LocalModel, features: ActiveFeatures, explained: _ExplainedDirections) -> Nodes:
    tokens, targets = model.tokens, explained.targets
    position, layers = row_numbers(tokens), range(len(model.layers))
    errors = [_blank_nodes(ERROR, torch.full_like(tokens, layer), position) for layer in layers]
    embeddings = _blank_nodes(EMBEDDING, torch.full_like(tokens, -1), position)
    nodes = _blank_nodes(FEATURE, features.layer, features.position)
    return join_rows(
        [
            replace(nodes, index=features.index, activation=features.activation.float()),
            *errors,
            replace(embeddings, index=tokens),
            replace(
                _blank_nodes(TARGET, targets.layer, targets.position),
                index=row_numbers(targets.layer),
                probability=explained.weight,
            ),
        ]
    )


def _blank_nodes(kind: int, layer: KindNodes, position: KindNodes) -> Nodes:
    """Nodes of one kind without index, activation and probability."""
    zeros = torch.zeros_like(layer)
    no_activation = torch.full_like(layer, torch.nan, dtype=torch.float32)
    return Nodes(zeros + kind, layer, position, zeros, no_activation, zeros.float())


@dataclass(frozen=True, eq=False)
class _Edges:
    """The edges of a graph, by the numbers of the nodes they connect."""

    target: EdgeNodes
    source: EdgeNodes
    weight: EdgeValues
    direct: EdgeValues


@dataclass(frozen=True, eq=False)
class _EdgeReader:
    """Reads the edges between nodes of the graph from rows of edge weights."""

    sweep: LinearSweep
    selected: SelectedFeatures
    nodes: Nodes

    def read(
        self, targets: SweepTargets, blocks: Blocks
    ) -> tuple[_Edges, Float[Tensor, "node constant"]]:
        """Return the nonzero edges by target and then source, and the constants of every node."""
        constants = targets.vector.new_zeros(len(self.nodes), len(CONSTANTS) + 1)
        is_target = (self.nodes.kind == FEATURE) | (self.nodes.kind == TARGET)
        node_of_target = true_rows(is_target)
        swept, parts = [], []
        for block, weights in blocks:
            node = node_of_target[block]
            swept.append(node)
            constants[node, :-1] = weights.constants
            # Sum them apart: a difference of two sums would lose digits.
            unselected = weights.features.index_select(1, self.unselected)
            constants[node, -1] = unselected.sum(1)
            parts.append(self._edges(select_rows(targets, block), node, weights))
        edges = join_rows(parts)
        # The sweep takes directions by position, which need not be the order of their nodes.
        if (torch.cat(swept).diff() < 0).any():
            order = torch.argsort(edges.target, stable=True)
            edges = select_rows(edges, order)
        return edges, constants

    @cached_property
    def unselected(self) -> SelectedFeatures:
        """The active features that are not nodes."""
        every = row_numbers(self.sweep.sources.order)
        return true_rows(~torch.isin(every, self.selected))

    def _edges(self, targets: SweepTargets, node: TargetNumbers, weights: EdgeWeights) -> _Edges:
        """The nonzero edges into some targets, whose nodes have the numbers `node`."""
        features, others = self._reaching(targets)
        source = torch.cat([features, others])
        weight = self._columns(weights, features, others)
        nonzero = weight != 0
        direct_weights, row = self.sweep.direct(targets)
        same_position = self.nodes.position[source] == targets.position[:, None]
        # A direct row holds a target of every position; keep the target's own.
        direct = self._columns(direct_weights, features, others).index_select(0, row)
        return _Edges(
            target=node.repeat_interleave(nonzero.sum(1)),
            source=source.expand_as(nonzero).masked_select(nonzero),
            weight=weight.masked_select(nonzero),
            direct=(direct * same_position).masked_select(nonzero),
        )

    def _reaching(self, targets: SweepTargets) -> tuple[SourceNodes, SourceNodes]:
        """The features, and the errors and embeddings, from which edges into targets can start."""
        reaching = self.nodes.layer < targets.layer[0]
        if self.sweep.model.causal:
            reaching &= self.nodes.position <= targets.position.max()
        n_features = len(self.selected)
        return true_rows(reaching[:n_features]), n_features + true_rows(reaching[n_features:])

    def _columns(
        self, weights: EdgeWeights, features: SourceNodes, others: SourceNodes
    ) -> Float[Tensor, "target source"]:
        # Errors and embeddings are nodes in the order of their columns, after the features.
        from_others = torch.cat([weights.errors.flatten(1), weights.embeddings], 1)
        from_others = from_others.index_select(1, others - len(self.selected))
        from_features = weights.features.index_select(1, self.selected[features])
        return torch.cat([from_features, from_others], 1)
