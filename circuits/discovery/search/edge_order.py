"""The order in which greedy methods try edges. Their result depends on it, so it is part of the record.

Both orders go from the logits up, so that everything upstream of the edge at hand is still whole.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby
from typing import Literal, get_args

from circuits.graph.graph import Graph
from circuits.graph.nodes import MLP, Head, Logits, Node
from circuits.system.errors import InputError

OrderName = Literal["topological", "original"]
GroupName = Literal["target", "layer"]


@dataclass(frozen=True)
class Trial:
    """Edges into one slot of one target: tried one after the other, or removed all at once (`together`)."""

    edges: tuple[int, ...]
    together: bool = False


def edge_order(graph: Graph, order: OrderName) -> list[Trial]:
    """Every edge of a component graph, in the order in which to try them.

    "topological": the logits; then layer by layer from the top the MLP, then heads from the highest, each v, k, q; sources from the most
    downstream up, `pos_embed` before `tok_embed`; with positions, the last position first.
    "original": that of the original ACDC code (github.com/ArthurConmy/Automatic-Circuit-Discovery). Per layer the MLP; then v of all heads
    from the highest, then k, then q, each slot first as a whole; then the edges of the slots, v of all heads, then k, then q.

    Raises:
        InputError: there is no such order, or it does not fit the graph.
    """
    if order not in get_args(OrderName):
        raise InputError(f"there is no order {order!r}; choose 'topological' or 'original'.")
    if order == "original" and graph.positions is not None:
        raise InputError(
            "the original code knows no positions; use order='topological' for a graph split by position."
        )
    slots = _edges_by_slot(graph)
    return list(_topological(graph, slots) if order == "topological" else _original(slots))


def edge_groups(graph: Graph, group: GroupName | int) -> list[tuple[int, ...]]:
    """The topological order, cut into groups of edges that follow each other.

    "target": the edges into one node, a head's v, k and q together; split by position, into that node at one position.
    "layer": the edges into a layer's MLP, into all heads of a layer, or into the logits. A number: so many edges, wherever they lead.

    Raises:
        InputError: there is no such group, or the graph has other targets than those of a component graph.
    """
    check_group(group)
    edges = [edge for trial in edge_order(graph, "topological") for edge in trial.edges]
    if isinstance(group, int):
        return [tuple(edges[start : start + group]) for start in range(0, len(edges), group)]
    targets = graph.target.tolist()
    places = {
        target: _place(graph.nodes[target]) if group == "layer" else target
        for target in set(targets)
    }
    return [tuple(part) for _, part in groupby(edges, key=lambda edge: places[targets[edge]])]


def check_group(group: GroupName | int) -> None:
    """Refuse what names no group.

    Raises:
        InputError: it is neither a name nor a number of edges.
    """
    number = isinstance(group, int) and not isinstance(group, bool)
    if group not in get_args(GroupName) and not (number and group >= 1):  # type: ignore[operator]
        raise InputError(
            f"group={group!r} is no way to group edges; choose 'target', 'layer' or a number of edges of at least 1."
        )


Target = tuple[Node, str | None]
Slots = dict[Target, tuple[int, ...]]


def _edges_by_slot(graph: Graph) -> Slots:
    """The edges into each slot of each target, from the most downstream source up."""
    slots: dict[Target, list[int]] = {}
    for index, edge in enumerate(graph.edges):
        slots.setdefault((edge.target, edge.slot), []).append(index)
    sources = graph.source.tolist()
    return {
        target: tuple(sorted(edges, key=sources.__getitem__, reverse=True))
        for target, edges in slots.items()
    }


def _topological(graph: Graph, slots: Slots) -> Iterator[Trial]:
    def rank(target: Target) -> tuple[float, ...]:
        node, slot = target
        layer, kind = _place(node)
        # Nodes stand in order of computation, a node's positions side by side: backwards, the highest head and the last position lead.
        return -layer, kind, -graph.node_index[node], "vkq".index(slot or "v")

    for target in sorted(slots, key=rank):
        yield Trial(slots[target])


def _place(node: Node) -> tuple[float, int]:
    """The layer, the logits above all, and within it 0 for what is tried first."""
    match node:
        case Logits():
            return math.inf, 0
        case MLP(layer=layer):
            return layer, 0
        case Head(layer=layer):
            return layer, 1
    raise InputError(
        f"{node} is not a target in a component graph; greedy methods try the edges of component graphs."
    )


def _original(slots: Slots) -> Iterator[Trial]:
    layers = sorted({_place(node)[0] for node, _ in slots}, reverse=True)
    for layer in layers:
        here = [(node, slot) for node, slot in slots if _place(node)[0] == layer]
        yield from (Trial(slots[target]) for target in here if not isinstance(target[0], Head))
        heads = [(node, slot) for node, slot in here if isinstance(node, Head) and slot]
        heads.sort(key=lambda target: ("vkq".index(target[1]), -target[0].head))
        yield from (Trial(slots[target], together=True) for target in heads)
        yield from (Trial(slots[target]) for target in heads)
