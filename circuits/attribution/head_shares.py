"""By which heads edges of an attribution graph are carried: for every layer, the exact split of an edge into its heads and what goes around them.

With patterns frozen, an edge is a sum over paths, and in each layer a path goes through one head or stays at its position. A source's effect carried
up to a head's values meets a target's direction carried down to them there; their product is the head's share.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from circuits.attribution.active_features import (
    ActiveFeatures,
    Sources,
    active_features,
    gather_sources,
)
from circuits.attribution.feature_graph import EMBEDDING, ERROR, FEATURE, TARGET, FeatureGraph
from circuits.attribution.linear_sweep import SweepTargets, feature_targets, logit_targets
from circuits.attribution.local_model import LocalModel, check_transcoders, freeze
from circuits.models import Model
from circuits.models.identity import identity
from circuits.system.errors import InputError
from circuits.transcoders.transcoder import Transcoders

AT_ONCE = 128


@torch.no_grad()
def head_shares(
    model: Model, transcoders: Transcoders, graph: FeatureGraph
) -> Float[Tensor, "edge layer head"]:
    """The part of every edge's weight whose paths go through each head. In a layer, what the heads leave of the weight goes around them.

    Meant for pruned graphs: it holds edges times layers times heads numbers.

    Raises:
        InputError: the graph was not made of this model's run with these transcoders.
    """
    if graph.directions is None:
        raise InputError(
            "this graph came from another program and does not say what it explains; make it here to split its edges by head."
        )
    check_transcoders(model, transcoders)
    for what, made_with, given in (
        ("a model", graph.model, identity(model)),
        ("transcoders", graph.transcoders, transcoders.identity),
    ):
        if made_with is not None and made_with.weights != given.weights:
            raise InputError(
                f"the graph was made with {what} of other weights than {given.name!r} has; give those it was made with."
            )
    leading = 1 if graph.transcoders is None else graph.transcoders.leading
    (local,) = freeze(model, transcoders, [graph.tokens.cpu()])
    (features,) = active_features([local], transcoders, leading=leading)
    place = _places(graph, features)
    sources = gather_sources(local, transcoders, features, leading=leading)
    result = graph.weight.new_zeros(len(graph), len(local.layers), model.cfg.n_heads)
    targets = _targets(local, transcoders, graph, features, place)
    for some in _split(graph.source.unique()):
        values = list(_carried_up(local, sources, graph, some, place))
        for explained in _split(graph.target.unique()):
            for layer, shares in _met(local, targets[explained], values):
                _put(result[:, layer], graph, some, explained, shares)
    return result


def _split(numbers: Int[Tensor, " node"]) -> tuple[Int[Tensor, " some"], ...]:
    return numbers.split(AT_ONCE)


def _places(graph: FeatureGraph, features: ActiveFeatures) -> Int[Tensor, " node"]:
    """The number among all active features of each of the graph's; -1 for other nodes."""
    known = {
        key: number
        for number, key in enumerate(
            zip(
                features.layer.tolist(),
                features.position.tolist(),
                features.index.tolist(),
                strict=True,
            )
        )
    }
    nodes = graph.nodes
    keys = zip(
        nodes.kind.tolist(),
        nodes.layer.tolist(),
        nodes.position.tolist(),
        nodes.index.tolist(),
        strict=True,
    )
    place = [
        known.get((layer, position, index), -2) if kind == FEATURE else -1
        for kind, layer, position, index in keys
    ]
    if -2 in place:
        raise InputError(
            f"{graph.node(place.index(-2))} does not fire in this model: the graph was made with another model or other transcoders."
        )
    return torch.tensor(place, device=features.layer.device)


@dataclass(frozen=True, eq=False)
class _NodeTargets:
    """The directions of all nodes with incoming edges, by the number of the node."""

    targets: SweepTargets
    row: Int[Tensor, " node"]

    def __getitem__(self, nodes: Int[Tensor, " some"]) -> SweepTargets:
        return self.targets[self.row[nodes]]


def _targets(
    local: LocalModel,
    transcoders: Transcoders,
    graph: FeatureGraph,
    features: ActiveFeatures,
    place: Int[Tensor, " node"],
) -> _NodeTargets:
    chosen = place[place >= 0]
    some = ActiveFeatures(
        features.layer[chosen],
        features.position[chosen],
        features.index[chosen],
        features.activation[chosen],
    )
    explained = (graph.nodes.kind == TARGET).nonzero().flatten().to(place.device)
    assert graph.directions is not None
    directions = graph.directions.to(local.embedding)[graph.nodes.index[explained.cpu()]]
    positions = graph.nodes.position.to(place.device)[explained]
    logits = logit_targets(local, directions, directions.new_zeros(len(directions)), positions)
    row = torch.full_like(place, -1)
    row[place >= 0] = torch.arange(len(chosen), device=place.device)
    row[explained] = len(chosen) + torch.arange(len(explained), device=place.device)
    return _NodeTargets(feature_targets(local, transcoders, some) + logits, row)


def _carried_up(
    local: LocalModel,
    sources: Sources,
    graph: FeatureGraph,
    some: Int[Tensor, " some"],
    place: Int[Tensor, " node"],
) -> Iterator[Float[Tensor, "head pos some d_head"]]:
    """What some sources put into every head's values, layer by layer."""
    nodes = graph.nodes[some.cpu()]
    column = torch.arange(len(some), device=place.device)
    residual = local.embedding.new_zeros(len(local.tokens), len(some), local.embedding.shape[1])
    tokens = (nodes.kind == EMBEDDING).to(place.device)
    position = nodes.position.to(place.device)
    residual[position[tokens], column[tokens]] = local.embedding[position[tokens]]
    for layer, frozen in enumerate(local.layers):
        values = frozen.values(residual)
        yield values
        before = residual
        residual = residual + frozen.attention(values)
        if frozen.skip is not None:
            residual = residual + frozen.skipped(before if local.parallel else residual)
        errors = ((nodes.kind == ERROR) & (nodes.layer == layer)).to(place.device)
        residual[position[errors], column[errors]] += sources.errors[layer, position[errors]]
        written = sources.written[layer]
        for number in (place[some.to(place.device)] >= 0).nonzero().flatten().tolist():
            rows, columns = written.at(int(position[number]))
            row = int(sources.places[place[some[number]]]) - columns.start
            if 0 <= row < len(rows):
                residual[position[number], number] += rows[row]


def _met(
    local: LocalModel, targets: SweepTargets, values: list[Float[Tensor, "head pos some d_head"]]
) -> Iterator[tuple[int, Float[Tensor, "head target some"]]]:
    """The products of what comes up and what comes down, in each layer's heads, from the top."""
    gradient = local.embedding.new_zeros(len(local.tokens), len(targets), local.embedding.shape[1])
    _read_at(len(local.layers), targets, gradient)
    for layer in reversed(range(len(local.layers))):
        frozen = local.layers[layer]
        skipped = None if frozen.skip is None else frozen.skip_transposed(gradient)
        if not local.parallel:
            gradient += 0.0 if skipped is None else skipped
            _read_at(layer, targets, gradient)
        down = frozen.values_transposed(gradient)
        yield (
            layer,
            torch.bmm(
                down.transpose(1, 2).flatten(2),
                values[layer].transpose(1, 2).flatten(2).transpose(1, 2),
            ),
        )
        frozen.add_through_values(down, gradient)
        if local.parallel:
            gradient += 0.0 if skipped is None else skipped
            _read_at(layer, targets, gradient)


def _read_at(
    layer: int, targets: SweepTargets, gradient: Float[Tensor, "pos target d_model"]
) -> None:
    """Start the targets that read at a layer."""
    here = (targets.layer == layer).nonzero().flatten()
    gradient[targets.position[here], here] += targets.vector[here]


def _put(
    into: Float[Tensor, "edge head"],
    graph: FeatureGraph,
    some: Tensor,
    explained: Tensor,
    shares: Float[Tensor, "head target some"],
) -> None:
    """The shares of those edges that lead from some of the sources to some of the targets."""
    column = torch.full((len(graph.nodes),), -1, device=into.device)
    row = column.clone()
    column[some], row[explained] = (
        torch.arange(len(some), device=into.device),
        torch.arange(len(explained), device=into.device),
    )
    edges = ((column[graph.source] >= 0) & (row[graph.target] >= 0)).nonzero().flatten()
    into[edges] = shares[:, row[graph.target[edges]], column[graph.source[edges]]].T.to(into)
