"""Places of nodes and edges in a layered drawing.

Layers are rows, sources below targets, and positions are columns. Lengths are in pixels.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from operator import itemgetter

import numpy as np

from circuits.graph.edges import Edge
from circuits.graph.nodes import Node, Position
from circuits.plotting.circuit_drawing.relaxation import Places
from circuits.plotting.circuit_drawing.rows import NODE_HEIGHT, Fold, row_key, stacked
from circuits.plotting.circuit_drawing.web import Web

COLUMN_GAP = 40.0
# Edges meet a node on this share of its side, those into a head by slot from left to right.
PORT_SHARE = 0.8
SLOT_ORDER = {None: 0.0, "q": 0.0, "k": 1.0, "v": 2.0}

Floats = Sequence[float]
Point = tuple[float, float]
Route = list[Point]
# Where each edge meets a node.
Ports = dict[Edge, float]
# The x at which each edge leaves its source, passes rows, and enters its target.
Ways = dict[Edge, list[float]]
# An edge at a node, after two numbers to sort it by.
End = tuple[float, float, Edge]
Ends = Mapping[int, list[End]]
Columns = Mapping[Position, float]


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
    routes: dict[Edge, Route]
    columns: Columns
    folds: list[Fold]
    width: float
    height: float


def lay_out(
    node_widths: Mapping[Node, float],
    edge_widths: Mapping[Edge, float],
    column_widths: Columns,
    n_layers: int,
) -> Layout:
    """Place nodes and edges. Columns come in the given order and have at least the given widths.

    Args:
        n_layers: how many layers there are, with and without nodes.
    """
    different = set(map(row_key, node_widths))
    keys = sorted(different, reverse=True)
    columns = list(column_widths)
    web = Web()
    numbers = {}
    for node, width in node_widths.items():
        row = keys.index(row_key(node))
        column = columns.index(position_of(node))
        numbers[node] = web.add_node(row, column, width)
    for edge, width in edge_widths.items():
        source = numbers[edge.source]
        target = numbers[edge.target]
        web.connect(edge, source, target, width)
    x = web.places()
    middles, whole_width = _side_by_side(x, web, column_widths)
    ways = _ways(web, x)
    moves = _moves(web, ways)
    stack = stacked(keys, moves, n_layers)
    top = [stack.tops[row] for row in web.rows]
    boxes = {}
    for node, number in numbers.items():
        place = float(x[number])
        boxes[node] = Box(place, top[number], web.widths[number])
    clear = web.clearances(x).tolist()
    routes = _routes(web, ways, top, clear)
    return Layout(boxes, routes, middles, stack.folds, whole_width, stack.height)


def position_of(node: Node) -> Position:
    """Return the position of a node, or None."""
    position: Position = getattr(node, "position", None)
    return position


def _side_by_side(
    x: Places,
    web: Web,
    min_widths: Columns,
) -> tuple[Columns, float]:
    """Move the columns beside each other; return their middles and the width of all."""
    half = np.array(web.widths) / 2
    middles = {}
    start = 0.0
    for number, position in enumerate(min_widths):
        inside = np.array(web.columns) == number
        low = (x - half)[inside].min()
        high = (x + half)[inside].max()
        width = max(high - low, min_widths[position])
        middle = middles[position] = start + width / 2
        x[inside] += middle - (low + high) / 2
        start += width + COLUMN_GAP
    return middles, start - COLUMN_GAP


def _ways(web: Web, x: Places) -> Ways:
    starts, ends = _ports(web, x)
    ways = {}
    for edge, chain in web.chains.items():
        way = x[chain].tolist()
        way[0] = starts[edge]
        way[-1] = ends[edge]
        ways[edge] = way
    return ways


def _ports(web: Web, x: Places) -> list[Ports]:
    """Return the x at which each edge leaves its source, and at which it enters its target."""
    # At a node, edges are in the order of where they go next, so that they do not cross.
    leaving = defaultdict(list)
    entering = defaultdict(list)
    for edge, chain in web.chains.items():
        source, after_source, *_ = chain
        *_, before_target, target = chain
        slot = SLOT_ORDER[edge.slot]
        leaves = (x[after_source], slot, edge)
        leaving[source].append(leaves)
        enters = (slot, x[before_target], edge)
        entering[target].append(enters)
    ends = (leaving, entering)
    return [_spread(each, web, x) for each in ends]


def _spread(ends_at: Ends, web: Web, x: Places) -> Ports:
    """Spread the edges at each node evenly along its side, in the order of their numbers."""
    ports = {}
    for node, ends in ends_at.items():
        ends.sort(key=itemgetter(0, 1))
        side = PORT_SHARE * web.widths[node]
        left = float(x[node]) - side / 2
        step = side / len(ends)
        for number, (*_, edge) in enumerate(ends):
            ports[edge] = left + step * (number + 0.5)
    return ports


def _moves(web: Web, ways: Ways) -> list[float]:
    """Return, for each space between rows, how far edges move to the side there."""
    lower, _ = web.links()
    row_below = np.array(web.rows)[lower]
    steps = list(map(np.diff, ways.values()))
    moves = np.abs(np.concatenate(steps))
    last = max(web.rows)
    found = []
    for row in range(1, last + 1):
        # No edge may pass here.
        here = np.append(0.0, moves[row_below == row])
        # A fifth of the edges may be steeper.
        most = np.quantile(here, 0.8)
        found.append(float(most))
    return found


def _routes(
    web: Web,
    ways: Ways,
    top: Floats,
    clear: Floats,
) -> dict[Edge, Route]:
    """Return the points of each edge, from the tops of vertices and how clear of nodes they are."""
    routes = {}
    for edge, chain in web.chains.items():
        source, *waypoints, target = chain
        start, *places, end = ways[edge]
        steps = np.diff(ways[edge])
        largest = map(max, pairwise(abs(steps)))
        route = [(start, top[source])]
        passed = zip(waypoints, places, largest, strict=True)
        for waypoint, x, move in passed:
            bottom = top[waypoint] + NODE_HEIGHT
            # Within a row, an edge moves by less than half of its move to the next row.
            if move < 2 * clear[waypoint]:
                route.append((x, bottom - NODE_HEIGHT / 2))
            else:
                route.append((x, bottom))
                route.append((x, top[waypoint]))
        route.append((end, top[target] + NODE_HEIGHT))
        routes[edge] = route
    return routes
