"""Places of nodes and edges in a layered drawing, after Sugiyama et al. (1981).

Layers are rows, sources below targets, and positions are columns. An edge that passes rows gets an
invisible waypoint in each, so that it runs between the nodes. Lengths are in pixels.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from operator import itemgetter
from typing import NamedTuple

import numpy as np

from circuits.graph.edges import Edge
from circuits.graph.nodes import Node, Position
from circuits.plotting.circuit_drawing.relaxation import Places, Room, relaxed
from circuits.plotting.circuit_drawing.rows import NODE_HEIGHT, Fold, row_key, stacked

# Edges that leave the same node can run closer together than others, as a ribbon.
NODE_GAP, WAYPOINT_GAP, RIBBON_GAP, COLUMN_GAP = 14.0, 3.0, 1.2, 40.0
# Edges meet a node on this share of its side, those into a head by slot from left to right.
PORT_SHARE = 0.8
SLOT_ORDER = {None: 0.0, "q": 0.0, "k": 1.0, "v": 2.0}

Point = tuple[float, float]
Routes = dict[Edge, list[Point]]
# Where each edge meets a node.
Ports = dict[Edge, float]
# An edge at a node, after two numbers to sort it by.
End = tuple[float, float, Edge]


class Vertex(NamedTuple):
    """A node, or a waypoint of an edge."""

    row: int  # 0 at the top
    column: int
    width: float
    gap: float  # half of it on each side
    ribbon: int  # the number of the node itself, or of the edge's source


Vertices = list[Vertex]
# For each edge, the numbers of its source, of its waypoints and of its target.
Chains = dict[Edge, list[int]]
# For each edge, the x at which it leaves its source, passes rows, and enters its target.
Ways = dict[Edge, list[float]]


@dataclass(frozen=True)
class Box:
    """A node, with its centre x."""

    x: float
    top: float
    width: float

    @property
    def left(self) -> float:
        """The left side."""
        return self.x - self.width / 2


@dataclass(frozen=True)
class Layout:
    """A drawing with coordinates from the top left corner, and the middle of each column.

    A route starts on the source and ends on the target. Between them is the middle of each row that
    the edge passes; near a node, its bottom and its top, so that the edge keeps clear of it.
    """

    nodes: dict[Node, Box]
    routes: Routes
    columns: dict[Position, float]
    folds: list[Fold]
    width: float
    height: float


def lay_out(
    node_widths: Mapping[Node, float],
    edge_widths: Mapping[Edge, float],
    column_widths: Mapping[Position, float],
    n_layers: int,
) -> Layout:
    """Place nodes and edges. Columns come in the given order and have at least the given widths.

    Args:
        n_layers: how many layers there are, with and without nodes.
    """
    keys = sorted(set(map(row_key, node_widths)), reverse=True)
    columns = list(column_widths)
    vertices: Vertices = []
    numbers = {}
    for number, (node, width) in enumerate(node_widths.items()):
        row = keys.index(row_key(node))
        column = columns.index(position_of(node))
        vertices.append(Vertex(row, column, width, NODE_GAP, number))
        numbers[node] = number
    chains = {}
    for edge, width in edge_widths.items():
        chains[edge] = _chain(vertices, numbers[edge.source], numbers[edge.target], width)
    x = _relaxed(vertices, chains)
    middles, whole_width = _side_by_side(x, vertices, column_widths)
    ways = _ways(vertices, chains, x.tolist())
    (*tops, height), folds = stacked(keys, _moves(vertices, chains, ways), n_layers)
    boxes = {}
    for node, number in numbers.items():
        row, _, width, *_ = vertices[number]
        boxes[node] = Box(float(x[number]), tops[row], width)
    rooms = _rooms_beside_nodes(x, vertices, len(numbers))
    routes = {}
    for edge, chain in chains.items():
        passed = [(tops[vertices[number].row], rooms[number]) for number in chain]
        routes[edge] = _route(ways[edge], passed)
    return Layout(boxes, routes, middles, folds, whole_width, height)


def position_of(node: Node) -> Position:
    """Return the position of a node, or None."""
    position: Position = getattr(node, "position", None)
    return position


def _chain(vertices: Vertices, source: int, target: int, width: float) -> list[int]:
    """Connect two nodes by waypoints in the column of the source."""
    first = len(vertices)
    row, column, *_ = vertices[source]
    for passed in range(row - 1, vertices[target].row, -1):
        vertices.append(Vertex(passed, column, width, WAYPOINT_GAP, source))
    return [source, *range(first, len(vertices)), target]


def _relaxed(vertices: Vertices, chains: Chains) -> Places:
    row, column, width, gap, ribbon = map(np.array, zip(*vertices, strict=True))
    links = [pair for chain in chains.values() for pair in pairwise(chain)]
    lower, upper = np.array(links).T
    # Columns are laid out one by one, so what is in another one cannot pull.
    same = column[lower] == column[upper]
    # The rows of each column, one column after another.
    rows = column * (row.max() + 1) + row
    return relaxed(rows, Room(width, gap, ribbon, RIBBON_GAP), (lower[same], upper[same]))


def _side_by_side(
    x: Places, vertices: Vertices, min_widths: Mapping[Position, float]
) -> tuple[dict[Position, float], float]:
    """Move the columns beside each other; return their middles and the width of all."""
    _, column, width, *_ = map(np.array, zip(*vertices, strict=True))
    middles = {}
    start = 0.0
    for number, (position, min_width) in enumerate(min_widths.items()):
        inside = column == number
        low = (x - width / 2)[inside].min()
        high = (x + width / 2)[inside].max()
        middles[position] = start + max(high - low, min_width) / 2
        x[inside] += middles[position] - (low + high) / 2
        start += max(high - low, min_width) + COLUMN_GAP
    return middles, start - COLUMN_GAP


def _ways(vertices: Vertices, chains: Chains, places: Sequence[float]) -> Ways:
    starts, ends = _ports(vertices, chains, places)
    ways = {}
    for edge, (_, *waypoints, _) in chains.items():
        passed = [places[waypoint] for waypoint in waypoints]
        ways[edge] = [starts[edge], *passed, ends[edge]]
    return ways


def _ports(vertices: Vertices, chains: Chains, places: Sequence[float]) -> list[Ports]:
    """Return the x at which each edge leaves its source, and at which it enters its target."""
    # At a node, edges are in the order of where they go next, so that they do not cross.
    leaving = defaultdict(list)
    entering = defaultdict(list)
    for edge, chain in chains.items():
        source, after_source, *_ = chain
        *_, before_target, target = chain
        slot = SLOT_ORDER[edge.slot]
        leaves = (places[after_source], slot, edge)
        leaving[source].append(leaves)
        enters = (slot, places[before_target], edge)
        entering[target].append(enters)
    return [_spread(leaving, vertices, places), _spread(entering, vertices, places)]


def _spread(ends_at: Mapping[int, list[End]], vertices: Vertices, places: Sequence[float]) -> Ports:
    """Spread the edges at each node evenly along its side, in the order of their numbers."""
    ports = {}
    for node, ends in ends_at.items():
        ends.sort(key=itemgetter(0, 1))
        side = PORT_SHARE * vertices[node].width
        left, step = places[node] - side / 2, side / len(ends)
        for number, (*_, edge) in enumerate(ends):
            ports[edge] = left + step * (number + 0.5)
    return ports


def _moves(vertices: Vertices, chains: Chains, ways: Ways) -> list[float]:
    """Return, for each space between rows, how far edges move to the side there."""
    moves = defaultdict(list)
    for edge, way in ways.items():
        *lower, _ = chains[edge]
        for number, (start, end) in zip(lower, pairwise(way), strict=True):
            moves[vertices[number].row].append(abs(end - start))
    last = max(vertex.row for vertex in vertices)
    # Of the edges, a fifth may be steeper.
    return [float(np.quantile(moves[row] or [0.0], 0.8)) for row in range(1, last + 1)]


def _rooms_beside_nodes(x: Places, vertices: Vertices, n_nodes: int) -> list[float]:
    """Return how far each vertex is from the nearest node in its row; infinity without one."""
    row, _, width, *_ = map(np.array, zip(*vertices, strict=True))
    rooms = np.full(len(vertices), np.inf)
    for node in range(n_nodes):
        beside = np.flatnonzero(row == row[node])
        distances = np.abs(x[beside] - x[node]) - (width[beside] + width[node]) / 2
        rooms[beside] = np.minimum(rooms[beside], distances)
    return rooms.tolist()


def _route(way: Sequence[float], passed: Sequence[tuple[float, float]]) -> list[Point]:
    (start, *_, end), ((source_top, _), *inner, (target_top, _)) = way, passed
    route = [(start, source_top)]
    for (before, x, after), (top, room) in zip(
        zip(way, way[1:], way[2:], strict=False), inner, strict=True
    ):
        # Within the row, an edge moves by less than half of its move to the next row.
        if max(abs(x - before), abs(after - x)) < 2 * room:
            route.append((x, top + NODE_HEIGHT / 2))
        else:
            route += [(x, top + NODE_HEIGHT), (x, top)]
    return [*route, (end, target_top + NODE_HEIGHT)]
