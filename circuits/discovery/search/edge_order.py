"""The order in which sequential searches try edges, which is part of their result.

Every order goes from the logits up, so that all that is upstream of the edge tried is still whole.
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

TargetSlot = tuple[Node, str | None]
EdgesBySlot = dict[TargetSlot, tuple[int, ...]]
SLOT_ORDER = "vkq"  # v is tried first


@dataclass(frozen=True)
class Trial:
    """Edges into one slot of one target: tried one by one, or removed all at once (`together`)."""

    edges: tuple[int, ...]
    together: bool = False


def edge_order(graph: Graph, order: OrderName) -> list[Trial]:
    """Every edge of a component graph, in the order in which to try them.

    "topological": the logits; then, layer by layer from the top, the MLP and the heads from the
    highest, each v, k, q. Sources come from the most downstream up, `pos_embed` before `tok_embed`;
    with positions, the last position comes first.

    "original": the order of the original code
    (github.com/ArthurConmy/Automatic-Circuit-Discovery). In each layer the MLP; then, as group
    tests, v of all heads from the highest, k of all heads, q of all heads; then the edges of these
    slots one by one, in the same order.

    Raises:
        InputError: there is no such order, or it does not fit the graph.
    """
    if order not in get_args(OrderName):
        raise InputError(f"there is no order {order!r}; choose 'topological' or 'original'.")
    if order == "original" and graph.positions is not None:
        raise InputError(
            "the original code knows no positions; use order='topological' for a graph split by "
            "position."
        )
    slots = _edges_by_slot(graph)
    return list(_topological(graph, slots) if order == "topological" else _original(slots))


def chains(graph: Graph, order: OrderName) -> list[list[Trial]]:
    """The trials of an order, in groups: those into one target, or the group tests of one layer."""

    def chain_of(trial: Trial) -> tuple[bool, object]:
        target = int(graph.target[trial.edges[0]])
        node = graph.nodes[target]
        by_layer = trial.together and isinstance(node, Head)
        return trial.together, node.layer if by_layer else target  # type: ignore[attr-defined]

    return [list(chain) for _, chain in groupby(edge_order(graph, order), key=chain_of)]


def edge_groups(graph: Graph, group: GroupName | int) -> list[tuple[int, ...]]:
    """The topological order, cut into groups of consecutive edges.

    Args:
        group: "target" groups the edges into one node (a head's v, k and q together), at one
            position if the graph is split by position; "layer" groups the edges into a layer's
            MLP, into all heads of a layer, or into the logits; a number groups that many edges.

    Raises:
        InputError: there is no such group, or the graph is not a component graph.
    """
    check_group(group)
    edges = [edge for trial in edge_order(graph, "topological") for edge in trial.edges]
    if isinstance(group, int):
        return [tuple(edges[start : start + group]) for start in range(0, len(edges), group)]
    targets = graph.target.tolist()
    group_of: dict[int, object] = {target: target for target in targets}
    if group == "layer":
        group_of = {target: _layer_and_rank(graph.nodes[target]) for target in group_of}
    return [tuple(part) for _, part in groupby(edges, key=lambda edge: group_of[targets[edge]])]


def check_group(group: GroupName | int) -> None:
    """Refuse what is neither the name of a group nor a positive number of edges.

    Raises:
        InputError: with the value given.
    """
    if isinstance(group, int) and not isinstance(group, bool) and group >= 1:
        return
    if group not in get_args(GroupName):
        raise InputError(
            f"group={group!r} is no way to group edges; choose 'target', 'layer' or a number of "
            "edges of at least 1."
        )


def _edges_by_slot(graph: Graph) -> EdgesBySlot:
    """The edges into each slot of each target, from the most downstream source up."""
    slots: dict[TargetSlot, list[int]] = {}
    for index, edge in enumerate(graph.edges):
        slots.setdefault((edge.target, edge.slot), []).append(index)
    source = graph.source.tolist()
    return {
        target: tuple(sorted(edges, key=source.__getitem__, reverse=True))
        for target, edges in slots.items()
    }


def _topological(graph: Graph, slots: EdgesBySlot) -> Iterator[Trial]:
    def rank(target: TargetSlot) -> tuple[float, ...]:
        node, slot = target
        layer, kind = _layer_and_rank(node)
        # The positions of a node follow each other in `nodes`; in descending order the highest
        # head and the last position come first.
        return -layer, kind, -graph.node_index[node], SLOT_ORDER.index(slot or "v")

    for target in sorted(slots, key=rank):
        yield Trial(slots[target])


def _original(slots: EdgesBySlot) -> Iterator[Trial]:
    layers = sorted({_layer_and_rank(node)[0] for node, _ in slots}, reverse=True)
    for layer in layers:
        here = [(node, slot) for node, slot in slots if _layer_and_rank(node)[0] == layer]
        yield from (Trial(slots[target]) for target in here if not isinstance(target[0], Head))
        heads = [(node, slot) for node, slot in here if isinstance(node, Head) and slot]
        heads.sort(key=lambda target: (SLOT_ORDER.index(target[1]), -target[0].head))
        yield from (Trial(slots[target], together=True) for target in heads)
        yield from (Trial(slots[target]) for target in heads)


def _layer_and_rank(node: Node) -> tuple[float, int]:
    """The layer (the logits above all), and 0 for what is tried first within a layer."""
    match node:
        case Logits():
            return math.inf, 0
        case MLP(layer=layer):
            return layer, 0
        case Head(layer=layer):
            return layer, 1
    raise InputError(
        f"{node} is not a target in a component graph; searches over edges need a component graph."
    )
