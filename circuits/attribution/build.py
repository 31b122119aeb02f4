"""Attribution graphs of prompts: from a model, transcoders and what is to be explained to `FeatureGraph`s.

For each prompt: the local replacement model (`replacement`), its active features (`active_features`), the rows of edges into features and targets
(`linear_sweep`), all of them or those into a budget of the most influential features.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

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
    feature_targets,
    logit_targets,
)
from circuits.attribution.local_model import LocalModel
from circuits.system.errors import InputError
from circuits.transcoders.transcoder import Transcoders

UNSELECTED = "unselected_features"
"""The constant that holds the edges from features outside the budget."""


@dataclass(frozen=True, eq=False)
class Direction:
    """A direction in the output of the last norm to be explained.

    Attributes:
        label: for people.
        vector: the direction.
        bias: what the explained number holds besides.
        weight: what it counts for in influence.
        position: where; None is the prompt's last position.
        token: the token whose logit it is, if it is one's.
    """

    label: str
    vector: Float[Tensor, " d_model"]
    bias: float = 0.0
    weight: float = 1.0
    position: int | None = None
    token: int | None = None


def top_logits(
    model: LocalModel, *, most: int, probability: float, position: int | None = None
) -> list[tuple[int, float]]:
    """The fewest most probable next tokens that reach `probability` together, at most so many, each with its probability."""
    probabilities = model.logits(-1 if position is None else position).softmax(-1)
    values, tokens = probabilities.topk(min(most, len(probabilities)))
    number = min(len(values), int(torch.searchsorted(values.cumsum(0), probability)) + 1)
    return list(zip(tokens[:number].tolist(), values[:number].tolist(), strict=True))


def token_direction(
    model: LocalModel, token: int, label: str, weight: float, position: int | None = None
) -> Direction:
    """A token's logit less the mean logit."""
    vector = model.unembedding[:, token].to(model.mean_unembedding) - model.mean_unembedding
    bias = float(model.unembedding_bias[token] - model.unembedding_bias.mean())
    return Direction(label, vector, bias, weight, position, token)


def difference_direction(
    model: LocalModel,
    right: Sequence[int],
    wrong: Sequence[int] | None,
    label: str,
    position: int | None = None,
) -> Direction:
    """The mean logit of some tokens less that of others, or of all (None)."""
    like, others = model.mean_unembedding, slice(None) if wrong is None else list(wrong)
    against = like if wrong is None else model.unembedding[:, others].to(like).mean(1)
    vector = model.unembedding[:, list(right)].to(like).mean(1) - against
    bias = float(model.unembedding_bias[list(right)].mean() - model.unembedding_bias[others].mean())
    return Direction(label, vector, bias, 1.0, position)


@dataclass(frozen=True)
class Budget:
    """How many features get rows of incoming edges (None: all), and how many of them are chosen at a time by the influence known so far."""

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
    """One prompt's graph.

    Raises:
        InputError: no feature is active, or edges are not finite.
    """
    if not len(features):
        raise InputError(
            f"no feature of {transcoders.name!r} is active on the prompt {' '.join(words)!r}: there is no graph; give a longer prompt or "
            "transcoders that were trained on this model."
        )
    sources = gather_sources(model, transcoders, features, leading=leading)
    every, logits = (
        feature_targets(model, transcoders, features),
        _direction_targets(model, directions),
    )
    probability = torch.tensor(
        [one.weight for one in directions], dtype=torch.float32, device=every.vector.device
    )
    sweep = LinearSweep(model, sources, max_memory)
    found: Iterable[tuple[Tensor, EdgeWeights]]
    if budget.features is None or budget.features >= len(features):
        selected, targets = (
            torch.arange(len(features), device=features.layer.device),
            every + logits,
        )
        found = sweep.by_block(targets)
    else:
        known, row_of, selected = _most_influential(sweep, every, logits, probability, budget)
        targets = every[selected] + logits
        found = ((block, known[row_of[block]]) for block in sweep.split(targets))
    nodes = _nodes(model, features, selected, directions, logits.position, probability)
    columns = _Columns(
        selected, nodes.layer[: -len(directions)], nodes.position[: -len(directions)]
    )
    # Targets are features, then directions: with errors and embeddings between them, they are the nodes.
    number = torch.cat(
        [torch.arange(len(selected)), torch.arange(len(nodes) - len(directions), len(nodes))]
    ).to(selected.device)
    edges = _Edges.joined(
        [_edges(sweep, targets[block], number[block], rows, columns) for block, rows in found]
    )
    if not torch.isfinite(edges.weight).all():
        raise InputError(
            f"some edges are not finite numbers: check the decoders of {transcoders.name!r}, or load model and transcoders in float32."
        )
    constants = edges.constants.new_zeros(len(nodes), edges.constants.shape[1])
    constants[edges.numbers] = edges.constants
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
        directions=torch.stack([one.vector for one in directions]).to(model.embedding),
        n_layers=len(model.layers),
    )


@dataclass(frozen=True, eq=False)
class _Edges:
    """Edges that are not zero, by target and then source; and which nodes are targets, with their constants."""

    numbers: Int[Tensor, " target"]
    target: Int[Tensor, " edge"]
    source: Int[Tensor, " edge"]
    weight: Float[Tensor, " edge"]
    direct: Float[Tensor, " edge"]
    constants: Float[Tensor, "target constant"]

    @staticmethod
    def joined(parts: Sequence[_Edges]) -> _Edges:
        together = _Edges(
            *(
                torch.cat(columns)
                for columns in zip(*(vars(part).values() for part in parts), strict=True)
            )
        )
        if bool((together.numbers.diff() >= 0).all()):
            return together
        # Directions at several positions are carried down in another order than they were given in.
        order = torch.argsort(together.target, stable=True)
        sorted_columns = {
            name: getattr(together, name)[order]
            for name in ("target", "source", "weight", "direct")
        }
        return replace(together, **sorted_columns)


def _edges(
    sweep: LinearSweep,
    targets: SweepTargets,
    numbers: Int[Tensor, " block"],
    rows: EdgeWeights,
    columns: _Columns,
) -> _Edges:
    """The edges in some rows; those from features that were not selected are a constant."""
    direct, row_of = sweep.direct(targets)
    unselected = rows.constants.new_zeros(len(numbers), 1)
    if len(columns.selected) < rows.features.shape[1]:
        # Summed apart: a difference of two sums would lose digits.
        others = torch.ones(
            rows.features.shape[1], dtype=torch.bool, device=numbers.device
        ).index_fill_(0, columns.selected, False)
        unselected = rows.features[:, others].sum(1, keepdim=True)
    reaching = columns.layer < targets.layer[0]
    if sweep.model.causal:
        reaching &= columns.position <= targets.position.max()
    sources = reaching.nonzero().flatten()
    n_features = int(reaching[: len(columns.selected)].sum())
    weights, stays = (columns.of(part, sources, n_features) for part in (rows, direct))
    found = weights != 0
    here = columns.position[sources] == targets.position[:, None]
    return _Edges(
        numbers=numbers,
        target=numbers.repeat_interleave(found.sum(1)),
        source=sources.expand(found.shape).masked_select(found),
        weight=weights.masked_select(found),
        direct=(stays.index_select(0, row_of) * here).masked_select(found),
        constants=torch.cat([rows.constants, unselected], 1),
    )


@dataclass(frozen=True, eq=False)
class _Columns:
    """The nodes that write, in the order of nodes: the selected features, then errors and embeddings; where each stands."""

    selected: Int[Tensor, " selected"]
    layer: Int[Tensor, " source"]
    position: Int[Tensor, " source"]

    def of(
        self, rows: EdgeWeights, sources: Int[Tensor, " some"], n_features: int
    ) -> Float[Tensor, "target some"]:
        """Some nodes' columns, of which so many are features."""
        others = torch.cat([rows.errors.flatten(1), rows.embeddings], 1).index_select(
            1, sources[n_features:] - len(self.selected)
        )
        return torch.cat(
            [rows.features.index_select(1, self.selected[sources[:n_features]]), others], 1
        )


def _direction_targets(model: LocalModel, directions: Sequence[Direction]) -> SweepTargets:
    like, last = model.embedding, len(model.tokens) - 1
    positions = torch.tensor(
        [last if one.position is None else one.position for one in directions], device=like.device
    )
    biases = torch.tensor([one.bias for one in directions], dtype=like.dtype, device=like.device)
    return logit_targets(
        model, torch.stack([one.vector.to(like) for one in directions]), biases, positions
    )


def _most_influential(
    sweep: LinearSweep,
    every: SweepTargets,
    logits: SweepTargets,
    probability: Float[Tensor, " target"],
    budget: Budget,
) -> tuple[EdgeWeights, Int[Tensor, " row"], Int[Tensor, " selected"]]:
    """The rows of the most influential features and of the directions; the row of each, in their order; and which features those are."""
    assert budget.features is not None
    found, chosen = sweep.rows(logits), torch.zeros(0, dtype=torch.long, device=every.layer.device)
    while len(chosen) < budget.features:
        rank = _partial_influence(found, chosen, probability, sweep.model)
        rank[chosen] = -1.0
        order = torch.argsort(rank, descending=True, stable=True)
        following = order[: min(budget.at_a_time, budget.features - len(chosen))]
        found, chosen = found + sweep.rows(every[following]), torch.cat([chosen, following])
    order = torch.argsort(chosen)
    into_directions = torch.arange(len(logits), device=order.device)
    return found, torch.cat([len(logits) + order, into_directions]), chosen[order]


def _partial_influence(
    rows: EdgeWeights,
    chosen: Int[Tensor, " chosen"],
    probability: Float[Tensor, " target"],
    model: LocalModel,
) -> Float[Tensor, " feature"]:
    """Influence of every feature as far as it flows through features whose rows are known; the others are dead ends."""
    sizes = rows.features.abs()
    sums = sizes.sum(1) + rows.errors.abs().sum((1, 2)) + rows.embeddings.abs().sum(1)
    shares = sizes / sums.clamp(min=SMALLEST_SUM)[:, None]
    flow = probability.to(shares) @ shares[: len(probability)]
    reached = flow.clone()
    for _ in model.layers:
        flow = flow[chosen] @ shares[len(probability) :]
        reached += flow
    return reached


def _nodes(
    model: LocalModel,
    features: ActiveFeatures,
    selected: Int[Tensor, " selected"],
    directions: Sequence[Direction],
    positions: Int[Tensor, " target"],
    probability: Float[Tensor, " target"],
) -> Nodes:
    device, length, layers = selected.device, len(model.tokens), len(model.layers)
    place, level = torch.arange(length, device=device), torch.arange(layers, device=device)
    counts = torch.tensor([len(selected), layers * length, length, len(directions)], device=device)
    kind = torch.tensor([FEATURE, ERROR, EMBEDDING, TARGET], device=device).repeat_interleave(
        counts
    )
    others = torch.full((len(kind) - len(selected),), torch.nan, device=device)
    layer = [
        features.layer[selected],
        level.repeat_interleave(length),
        torch.full_like(place, -1),
        torch.full_like(positions, layers),
    ]
    index = [
        features.index[selected],
        torch.zeros_like(place).repeat(layers),
        model.tokens,
        torch.arange(len(directions), device=device),
    ]
    return Nodes(
        kind=kind,
        layer=torch.cat(layer),
        position=torch.cat([features.position[selected], place.repeat(layers), place, positions]),
        index=torch.cat(index),
        activation=torch.cat([features.activation[selected].float(), others]),
        probability=torch.cat(
            [torch.zeros(len(kind) - len(directions), device=device), probability]
        ),
    )
