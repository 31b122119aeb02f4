"""The order in which sequential searches try edges, which is part of their result.

Every order goes from the logits back to the embeddings, so that nothing upstream of the tested edge
has been ablated, unless the search started without it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import groupby
from typing import Literal, get_args

import numpy as np
from jaxtyping import Int

from circuits.graph.graph import EdgeMask, Graph
from circuits.graph.nodes import MLP, Head, Logits, Node
from circuits.system.errors import InputError

OrderName = Literal["topological", "original", "grouped"]
GroupName = Literal["target", "layer"]
EdgeNumbers = Int[np.ndarray, " edge"]
Stage = tuple[float, int]
"""A layer, infinite for the logits, and a kind: within a layer the MLP comes before the heads."""
NOT_HEADS, HEADS = 0, 1
# When the slots q, k and v have their turn, and -1, the slot of targets that have none.
SLOT_TURNS = np.array([2, 1, 0, 0])


@dataclass(frozen=True)
class Trial:
    """Edges into one slot of one target: tried one by one, or removed all at once (`together`)."""

    edges: tuple[int, ...]
    together: bool = False


Chain = list[Trial]
"""Trials into one target, or the group tests of one layer."""


def edge_order(graph: Graph, order: OrderName, tried: EdgeMask | None = None) -> list[Trial]:
    """Every edge of a component graph, or those to be `tried`, in the order in which to try them.

    "topological": the logits; then, layer by layer from the top, the MLP and the heads from the
    highest, each v, k, q. Sources come from the most downstream up, `pos_embed` before `tok_embed`;
    with positions, the last position comes first.

    "original": the order of the original code
    (github.com/ArthurConmy/Automatic-Circuit-Discovery). In each layer the MLP; then, as group
    tests, v of all heads from the highest, k of all heads, q of all heads; then the edges of these
    slots one by one, in the same order.

    "grouped": "topological" with group tests. Before the edges into a layer's MLP come those into
    it all at once; before those into a layer's heads come the group tests of all their slots. What
    passes is removed without its edges being tried, so the circuit may be another one.
    """
    _check_order(graph, order)
    stages = _stages(graph)
    slots = _slots_in_order(graph, order, tried, stages)

    def stage_of(edges: tuple[int, ...]) -> Stage:
        target = graph.target[edges[0]]
        return stages[int(target)]

    trials: list[Trial] = []
    for stage, some in groupby(slots, key=stage_of):
        edges = list(some)
        if _has_group_tests(order, stage):
            trials += [Trial(each, together=True) for each in edges]
        trials += map(Trial, edges)
    return trials


def chains(graph: Graph, order: OrderName, tried: EdgeMask | None = None) -> list[Chain]:
    """The trials of an order, in chains."""
    stages = _stages(graph)

    def chain_of(trial: Trial) -> tuple[bool, float]:
        first = trial.edges[0]
        target = int(graph.target[first])
        layer, _ = stages[target]
        return trial.together, layer if trial.together else target

    trials = edge_order(graph, order, tried)
    groups = groupby(trials, key=chain_of)
    return [list(chain) for _, chain in groups]


def edge_groups(
    graph: Graph, group: GroupName | int, tried: EdgeMask | None = None
) -> list[tuple[int, ...]]:
    """The topological order, cut into groups of consecutive edges.

    "target" groups the edges into one node (a head's v, k and q together), at one position if the
    graph is split by position; "layer" groups the edges into a layer's MLP, into all heads of a
    layer, or into the logits; a number groups that many edges.
    """
    trials = edge_order(graph, "topological", tried)
    edges = [edge for trial in trials for edge in trial.edges]
    if isinstance(group, int):
        starts = range(0, len(edges), group)
        return [tuple(edges[start : start + group]) for start in starts]

    stages = _stages(graph)

    def group_of(edge: int) -> int | Stage:
        target = int(graph.target[edge])
        return target if group == "target" else stages[target]

    groups = groupby(edges, key=group_of)
    return [tuple(part) for _, part in groups]


def _check_order(graph: Graph, order: OrderName) -> None:
    if order not in get_args(OrderName):
        raise InputError(
            f"there is no order {order!r}; choose 'topological', 'original' or 'grouped'."
        )
    if order == "original" and graph.positions is not None:
        raise InputError(
            "the original code knows no positions; use order='topological' for a graph split by "
            "position."
        )


def _slots_in_order(
    graph: Graph, order: OrderName, tried: EdgeMask | None, stages: dict[int, Stage]
) -> list[tuple[int, ...]]:
    """The edges into each slot of each target, from the most downstream source up."""
    edges = np.arange(len(graph))
    if tried is not None:
        edges = np.flatnonzero(tried.numpy())
    if not len(edges):
        return []
    columns = (graph.source, graph.target, graph.slot)
    source, target, slot = (column.numpy()[edges] for column in columns)
    by_edge = map(stages.__getitem__, target.tolist())
    layer, kind = np.array([*by_edge]).T
    # The highest head comes first and, as a node's positions follow each other, the last one.
    turns = [SLOT_TURNS[slot], -target]
    if order == "original":
        turns.reverse()
    # The last key counts most.
    in_order = np.lexsort([-source, *turns, kind, -layer])
    places = np.stack([target, slot])
    steps = np.diff(places[:, in_order])
    starts = 1 + np.flatnonzero(steps.any(0))
    parts = np.split(edges[in_order], starts)
    return [tuple(part.tolist()) for part in parts]


def _has_group_tests(order: OrderName, stage: Stage) -> bool:
    """Whether all edges into a slot of this kind are tried together before they are tried alone."""
    layer, kind = stage
    if order == "grouped":
        return math.isfinite(layer)
    return order == "original" and kind == HEADS


def _stages(graph: Graph) -> dict[int, Stage]:
    """The stage of each target, by its number among the graph's nodes."""
    numbers = graph.target.unique().tolist()
    return {number: _stage(graph.nodes[number]) for number in numbers}


def _stage(target: Node) -> Stage:
    match target:
        case Logits():
            return math.inf, NOT_HEADS
        case MLP(layer=layer):
            return layer, NOT_HEADS
        case Head(layer=layer):
            return layer, HEADS
    raise InputError(
        f"{target} is not a target in a component graph; searches over edges need a component "
        "graph."
    )
