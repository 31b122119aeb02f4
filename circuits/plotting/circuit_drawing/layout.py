"""Places of nodes and edges in a layered drawing, after Sugiyama et al. (1981).

Layers are rows, sources below targets, and positions are columns. An edge that passes rows gets an
invisible waypoint in each, so that it runs between the nodes. Lengths are in pixels.
"""

from __future__ import annotations

import itertools
import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby, pairwise
from operator import attrgetter, itemgetter
from statistics import fmean

import numpy as np

from circuits.graph.edges import Edge
from circuits.graph.nodes import MLP, Error, Feature, Logits, Node, Position

N_SWEEPS = 10
NODE_HEIGHT, ROW_GAP = 24.0, 44.0
ROW_PITCH = NODE_HEIGHT + ROW_GAP
NODE_GAP, WAYPOINT_GAP, COLUMN_GAP = 14.0, 4.0, 40.0
# Edges meet a node on this share of its side, those into a head by slot from left to right.
PORT_SHARE = 0.8
SLOT_ORDER = {None: 0.0, "q": 0.0, "k": 1.0, "v": 2.0}

Point = tuple[float, float]
Routes = dict[Edge, list[Point]]
# Where each edge meets a node.
Ports = dict[Edge, float]
Floats = Sequence[float]


@dataclass(eq=False)
class Vertex:
    """A node, or a waypoint of an edge, with its centre x and its neighbours in its column."""

    row: int  # 0 at the top
    column: Position
    width: float
    gap: float
    x: float = 0.0
    below: list[Vertex] = field(default_factory=list)
    above: list[Vertex] = field(default_factory=list)

    @property
    def left(self) -> float:
        """The left side."""
        return self.x - self.width / 2

    @property
    def right(self) -> float:
        """The right side."""
        return self.x + self.width / 2

    @property
    def top(self) -> float:
        """The upper side; as in SVG, y grows downwards."""
        return self.row * ROW_PITCH

    @property
    def bottom(self) -> float:
        """The lower side."""
        return self.top + NODE_HEIGHT


# The source of an edge, its waypoints and its target.
Chain = list[Vertex]
Chains = dict[Edge, Chain]
# An edge at a vertex, after two numbers to sort it by.
End = tuple[float, float, Edge]


@dataclass(frozen=True)
class Layout:
    """A drawing with coordinates from the top left corner, and the middle of each column.

    A route starts on the source and ends on the target; between them are the bottom and the top of
    each row that the edge passes.
    """

    nodes: dict[Node, Vertex]
    routes: Routes
    columns: dict[Position, float]
    width: float
    height: float


def lay_out(
    node_widths: Mapping[Node, float],
    edge_widths: Mapping[Edge, float],
    column_widths: Mapping[Position, float],
) -> Layout:
    """Place nodes and edges. Columns come in the given order and have at least the given widths."""
    nodes = _nodes(node_widths)
    chains = {}
    for edge, width in edge_widths.items():
        source = nodes[edge.source]
        target = nodes[edge.target]
        chains[edge] = _connected(source, target, width)
    joined = itertools.chain(*chains.values())
    vertices = dict.fromkeys(joined)
    middles = {}
    left = 0.0
    for position, min_width in column_widths.items():
        column = [vertex for vertex in vertices if vertex.column == position]
        _relax(column)
        width = _move_to(left, column, min_width)
        middles[position] = left + width / 2
        left += width + COLUMN_GAP
    return Layout(
        nodes=nodes,
        routes=_routes(chains),
        columns=middles,
        width=left - COLUMN_GAP,
        height=max(node.bottom for node in nodes.values()),
    )


def row_key(node: Node) -> tuple[float, bool]:
    """Return the layer of a node and whether it follows attention; sorting by it gives the rows."""
    # Embeddings are in layer -1, the logits in layer infinity.
    outside = math.inf if isinstance(node, Logits) else -1
    layer: float = getattr(node, "layer", outside)
    return layer, isinstance(node, MLP | Feature | Error)


def position_of(node: Node) -> Position:
    """Return the position of a node, or None."""
    position: Position = getattr(node, "position", None)
    return position


def separated(wanted: Floats, widths: Floats) -> Floats:
    """Move places so that these widths fit side by side in this order.

    The largest move is as small as it can be.
    """
    # With half of each width and all widths left of it subtracted, places may touch but not swap.
    # This is isotonic regression. In the maximum norm its solution is the mean of the largest
    # value up to each place and the smallest one from there on.
    halves = np.array(widths) / 2
    offsets = np.cumsum(widths) - halves
    free = wanted - offsets
    largest = np.maximum.accumulate(free)
    from_end = free[::-1]
    smallest = np.minimum.accumulate(from_end)[::-1]
    places = (largest + smallest) / 2 + offsets
    return places.tolist()


def _nodes(widths: Mapping[Node, float]) -> dict[Node, Vertex]:
    different = set(map(row_key, widths))
    row_keys = sorted(different, reverse=True)
    nodes = {}
    for node, width in widths.items():
        row = row_keys.index(row_key(node))
        column = position_of(node)
        nodes[node] = Vertex(row, column, width, NODE_GAP)
    return nodes


def _connected(source: Vertex, target: Vertex, width: float) -> Chain:
    """Connect two nodes by waypoints in the column of the source."""
    visited = [source]
    for row in reversed(range(target.row + 1, source.row)):
        waypoint = Vertex(row, source.column, width, WAYPOINT_GAP)
        visited.append(waypoint)
    visited.append(target)
    for lower, upper in pairwise(visited):
        # Columns are laid out one by one, so what is in another one cannot pull.
        if lower.column == upper.column:
            lower.above.append(upper)
            upper.below.append(lower)
    return visited


def _relax(column: list[Vertex]) -> None:
    """Move the rows of a column to their neighbours, one after another."""
    # groupby needs the vertices of a row next to each other.
    column.sort(key=attrgetter("row"))
    rows = groupby(column, attrgetter("row"))
    downwards = [list(row) for _, row in rows]
    upwards = downwards[::-1]
    # Following the row before untangles the edges.
    for _ in range(N_SWEEPS):
        for row in upwards:
            _place(row, [vertex.below for vertex in row])
        for row in downwards:
            _place(row, [vertex.above for vertex in row])
    # Following both rows straightens them.
    for _ in range(N_SWEEPS):
        for row in upwards + downwards:
            both = [vertex.below + vertex.above for vertex in row]
            _place(row, both)


def _place(row: list[Vertex], neighbours: list[list[Vertex]]) -> None:
    """Move each vertex to the mean place of its neighbours, as far as there is room."""
    for vertex, pulling in zip(row, neighbours, strict=True):
        if pulling:
            vertex.x = fmean(neighbour.x for neighbour in pulling)
    row.sort(key=attrgetter("x"))
    wanted = [vertex.x for vertex in row]
    widths = [vertex.width + vertex.gap for vertex in row]
    places = separated(wanted, widths)
    for vertex, x in zip(row, places, strict=True):
        vertex.x = x


def _move_to(left: float, column: list[Vertex], min_width: float) -> float:
    """Move a column so that it starts here; return its width."""
    low = min(vertex.left for vertex in column)
    high = max(vertex.right for vertex in column)
    width = max(high - low, min_width)
    move = left + width / 2 - (low + high) / 2
    for vertex in column:
        vertex.x += move
    return width


def _routes(chains: Chains) -> Routes:
    starts, ends = _ports(chains)
    routes = {}
    for edge, chain in chains.items():
        source, *waypoints, target = chain
        route = [(starts[edge], source.top)]
        for waypoint in waypoints:
            route.append((waypoint.x, waypoint.bottom))
            route.append((waypoint.x, waypoint.top))
        route.append((ends[edge], target.bottom))
        routes[edge] = route
    return routes


def _ports(chains: Chains) -> list[Ports]:
    """Return the x at which each edge leaves its source, and at which it enters its target."""
    # At a node, edges are in the order of where they go next, so that they do not cross.
    leaving = defaultdict(list)
    entering = defaultdict(list)
    for edge, chain in chains.items():
        source, after_source, *_ = chain
        *_, before_target, target = chain
        slot = SLOT_ORDER[edge.slot]
        leaves = (after_source.x, slot, edge)
        leaving[source].append(leaves)
        enters = (slot, before_target.x, edge)
        entering[target].append(enters)
    return [_spread(leaving), _spread(entering)]


def _spread(ends: Mapping[Vertex, list[End]]) -> Ports:
    """Spread the edges at each vertex evenly along its side, in the order of their numbers."""
    places = {}
    for vertex, edges in ends.items():
        edges.sort(key=itemgetter(0, 1))
        left = vertex.x - PORT_SHARE * vertex.width / 2
        step = PORT_SHARE * vertex.width / len(edges)
        for number, (*_, edge) in enumerate(edges):
            places[edge] = left + step * (number + 0.5)
    return places
