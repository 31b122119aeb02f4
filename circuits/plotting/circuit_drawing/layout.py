"""Coordinates of a layered drawing.

Nodes are near their neighbours, long edges are straight, and no two vertices overlap. All lengths
are in pixels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import numpy as np
from jaxtyping import Float, Int

from circuits.graph.nodes import Node
from circuits.plotting.circuit_drawing.layered_graph import (
    INERTIA,
    LayeredGraph,
    SegmentEnds,
    VertexFloats,
)

N_SWEEPS = 40
NODE_HEIGHT = 24.0
NODE_GAP, WAYPOINT_GAP, COLUMN_GAP, ROW_GAP = 14.0, 4.0, 40.0, 44.0
# Strength of the pull between neighbours: two waypoints of one edge, and all other pairs.
STRAIGHT_PULL, BENT_PULL = 8.0, 1.0
# Edges meet a node on this share of its side, those into a head by slot from left to right.
PORT_SHARE = 0.8
SLOT_ORDER = {None: 0, "q": 0, "k": 1, "v": 2}
# Columns are laid out this far apart, so that they do not touch, and then moved together.
FAR = 1e6

Point = tuple[float, float]
Route = tuple[Point, ...]
Interval = tuple[float, float]
EdgeFloats = Float[np.ndarray, " edge"]


@dataclass(frozen=True)
class PlacedNode:
    """A node with its centre and width; every node is `NODE_HEIGHT` high."""

    node: Node
    x: float
    y: float
    width: float


@dataclass(frozen=True)
class Layout:
    """A drawing with coordinates. As in SVG, y grows downwards; the top left corner is (0, 0).

    Attributes:
        nodes: the placed nodes, in the order of `LayeredGraph.nodes`.
        routes: the points of each edge. The first is on the source, the last on the target;
            between them are the bottom and the top of each row that the edge passes.
        columns: left and right end of each column.
        width, height: size of the drawing.
    """

    nodes: tuple[PlacedNode, ...]
    routes: tuple[Route, ...]
    columns: tuple[Interval, ...]
    width: float
    height: float


def lay_out(graph: LayeredGraph, *, min_column_widths: Sequence[float]) -> Layout:
    """Compute the coordinates of every node and edge."""
    x, columns = _columns_side_by_side(graph, min_column_widths)
    rows_above = len(graph.rows) - 1 - graph.row
    y = rows_above * (NODE_HEIGHT + ROW_GAP) + NODE_HEIGHT / 2
    places = np.stack([x, y, graph.width], axis=1).tolist()
    # Waypoints, which follow the nodes, are not drawn.
    placed = zip(graph.nodes, places, strict=False)
    return Layout(
        nodes=tuple(PlacedNode(node, *place) for node, place in placed),
        routes=_routes(graph, x, y),
        columns=columns,
        width=columns[-1][1],
        height=float(y.max()) + NODE_HEIGHT / 2,
    )


def separated(
    wanted: Sequence[float], weights: Sequence[float], gaps: Sequence[float]
) -> list[float]:
    """Find the places nearest to the wanted ones that keep the order and the gaps.

    Minimizes sum_i weights[i] * (place[i] - wanted[i])^2 subject to
    place[i + 1] - place[i] >= gaps[i]. With the gaps subtracted this is isotonic regression,
    solved by pooling adjacent blocks that violate the order.
    """
    offsets = list(accumulate(gaps, initial=0.0))
    blocks: list[tuple[float, float, int]] = []  # mean, weight, length
    for place, offset, weight in zip(wanted, offsets, weights, strict=True):
        mean, length = place - offset, 1
        while blocks and blocks[-1][0] > mean:
            left_mean, left_weight, left_length = blocks.pop()
            total = left_weight + weight
            mean = (left_mean * left_weight + mean * weight) / total
            weight = total
            length += left_length
        blocks.append((mean, weight, length))
    pooled = [mean for mean, _, length in blocks for _ in range(length)]
    return [mean + offset for mean, offset in zip(pooled, offsets, strict=True)]


def _columns_side_by_side(
    graph: LayeredGraph, min_widths: Sequence[float]
) -> tuple[VertexFloats, tuple[Interval, ...]]:
    x = _relaxed(graph)
    half = graph.width / 2
    start = 0.0
    columns = []
    for column, min_width in enumerate(min_widths):
        inside = graph.column == column
        low = float((x - half)[inside].min())
        high = float((x + half)[inside].max())
        end = start + max(high - low, min_width)
        x[inside] += (start + end) / 2 - (low + high) / 2
        columns.append((start, end))
        start = end + COLUMN_GAP
    return x, tuple(columns)


def _relaxed(graph: LayeredGraph) -> VertexFloats:
    """Move one row after another towards its neighbours in the same column."""
    here, neighbour, pull = _pulls(graph)
    x = graph.column * FAR
    weight = np.bincount(here, pull, len(x)) + INERTIA
    rows = [(row, _gaps(graph, row)) for row in graph.rows]
    for _ in range(N_SWEEPS // 2):
        for row, gaps in rows + rows[::-1]:
            # wanted_i = (sum_j pull_ij x_j + inertia x_i) / (sum_j pull_ij + inertia)
            pulled = np.bincount(here, pull * x[neighbour], len(x))
            wanted = (pulled + INERTIA * x) / weight
            x[row] = separated(wanted[row].tolist(), weight[row].tolist(), gaps)
    return x


def _pulls(graph: LayeredGraph) -> tuple[SegmentEnds, SegmentEnds, Float[np.ndarray, " segment"]]:
    """Return both ends of each segment inside a column, in both directions, and its strength."""
    lower, upper = graph.segments
    inside = graph.column[lower] == graph.column[upper]
    lower, upper = lower[inside], upper[inside]
    here, neighbour = np.r_[lower, upper], np.r_[upper, lower]
    between_waypoints = np.minimum(here, neighbour) >= len(graph.nodes)
    return here, neighbour, np.where(between_waypoints, STRAIGHT_PULL, BENT_PULL)


def _gaps(graph: LayeredGraph, row: list[int]) -> list[float]:
    """Return the least distances between the centres of adjacent vertices."""
    is_node = np.array(row) < len(graph.nodes)
    margin = np.where(is_node, NODE_GAP, WAYPOINT_GAP)
    half = (graph.width[row] + margin) / 2
    gaps: list[float] = (half[:-1] + half[1:]).tolist()
    return gaps


def _routes(graph: LayeredGraph, x: VertexFloats, y: VertexFloats) -> tuple[Route, ...]:
    routes = []
    for chain, start, end in zip(graph.chains, *_ports(graph, x), strict=True):
        xs = [start, *x[chain[1:-1]], end]
        route = []
        for vertex, place in zip(chain, xs, strict=True):
            centre = float(y[vertex])
            route.append((float(place), centre + NODE_HEIGHT / 2))
            route.append((float(place), centre - NODE_HEIGHT / 2))
        # From the top of the source to the bottom of the target.
        routes.append(tuple(route[1:-1]))
    return tuple(routes)


def _ports(graph: LayeredGraph, x: VertexFloats) -> tuple[list[float], list[float]]:
    """Return the x at which each edge leaves its source and enters its target.

    Edges are in the order of the vertices they lead to or come from, so that they do not cross.
    """
    ends = [(*chain[:2], *chain[-2:]) for chain in graph.chains]
    source, after_source, before_target, target = np.array(ends).T
    slot = np.array([SLOT_ORDER[edge.slot] for edge in graph.edges])
    side = PORT_SHARE * graph.width
    leaving = _spread(source, x[after_source])
    entering = _spread(target, slot * FAR + x[before_target])
    start_x = x[source] + side[source] * leaving
    end_x = x[target] + side[target] * entering
    return start_x.tolist(), end_x.tolist()


def _spread(vertex: Int[np.ndarray, " edge"], sort_key: EdgeFloats) -> EdgeFloats:
    """Spread the edges at each vertex evenly over -1/2 to 1/2, sorted by their keys."""
    order = np.lexsort((sort_key, vertex))
    size = np.bincount(vertex)
    first = np.cumsum(size) - size
    # spread = (place among the edges of the vertex + 1/2) / (number of its edges) - 1/2
    place = np.empty(len(order))
    place[order] = np.arange(len(order)) - first[vertex[order]]
    return (place + 0.5) / size[vertex] - 0.5
