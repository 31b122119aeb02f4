"""The order in which sequential searches try edges, which is part of their result.

Every order goes from the logits back to the embeddings, so that nothing upstream of the tested edge
has been ablated, unless the search started without it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from typing import Literal, get_args

from circuits.graph.graph import EdgeMask, Graph
from circuits.graph.nodes import MLP, Head, Logits, Node
from circuits.system.errors import InputError

OrderName = Literal["topological", "original", "grouped"]
GroupName = Literal["target", "layer"]
TargetSlot = tuple[Node, str | None]
SLOT_ORDER = "vkq"  # v is tried first
NOT_HEADS, HEADS = 0, 1


@dataclass(frozen=True)
class Trial:
    """Edges into one slot of one target: tried one by one, or removed all at once (`together`)."""

    edges: tuple[int, ...]
    together: bool = False


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
    slots = _edges_by_slot(graph, tried)
    trials: list[Trial] = []
    rank = partial(_rank, graph, order)
    targets = sorted(slots, key=rank)
    for (layer, kind), some in groupby(targets, key=_layer_and_kind):
        edges = [tuple(slots[target]) for target in some]
        if _has_group_tests(order, layer, kind):
            trials += [Trial(each, together=True) for each in edges]
        trials += map(Trial, edges)
    return trials


def chains(graph: Graph, order: OrderName, tried: EdgeMask | None = None) -> list[list[Trial]]:
    """The trials of an order, in groups: those into one target, or the group tests of one layer."""

    def chain_of(trial: Trial) -> tuple[bool, object]:
        edge = graph.edges[trial.edges[0]]
        layer, _ = _layer_and_kind((edge.target, edge.slot))
        return trial.together, layer if trial.together else edge.target

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

    def group_of(index: int) -> object:
        edge = graph.edges[index]
        if group == "target":
            return edge.target
        return _layer_and_kind((edge.target, edge.slot))

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


def _edges_by_slot(graph: Graph, tried: EdgeMask | None) -> dict[TargetSlot, list[int]]:
    """The edges into each slot of each target, from the most downstream source up."""
    slots: dict[TargetSlot, list[int]] = {}
    order = graph.source.argsort(descending=True, stable=True)
    if tried is not None:
        order = order[tried[order]]
    for index in order.tolist():
        edge = graph.edges[index]
        slot = (edge.target, edge.slot)
        slots.setdefault(slot, []).append(index)
    return slots


def _rank(graph: Graph, order: OrderName, target: TargetSlot) -> tuple[float, ...]:
    """Targets of lower rank come first."""
    node, slot = target
    layer, kind = _layer_and_kind(target)
    slot_rank = SLOT_ORDER.index(slot or "v")
    # The highest head comes first and, as a node's positions follow each other, the last one.
    node_rank = -graph.node_index[node]
    if order == "original":
        return -layer, kind, slot_rank, node_rank
    return -layer, kind, node_rank, slot_rank


def _has_group_tests(order: OrderName, layer: float, kind: int) -> bool:
    """Whether all edges into a slot of this kind are tried together before they are tried alone."""
    if order == "grouped":
        return math.isfinite(layer)
    return order == "original" and kind == HEADS


def _layer_and_kind(target: TargetSlot) -> tuple[float, int]:
    """The layer (the logits above all), and the kind; within a layer the MLP is tried first."""
    match target[0]:
        case Logits():
            return math.inf, NOT_HEADS
        case MLP(layer=layer):
            return layer, NOT_HEADS
        case Head(layer=layer):
            return layer, HEADS
    raise InputError(
        f"{target[0]} is not a target in a component graph; searches over edges need a component "
        "graph."
    )
