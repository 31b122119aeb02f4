"""Coordinates of a layered drawing.

Nodes are near their neighbours, long edges are straight, and no two vertices overlap. All lengths
are in pixels.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate

import numpy as np
import pandas
from jaxtyping import Float, Int

from circuits.graph.edges import SLOTS, Edge
from circuits.graph.nodes import Node
from circuits.plotting.circuit_drawing.layered_graph import LayeredGraph, VertexFloats

N_SWEEPS = 40
NODE_HEIGHT = 24.0
NODE_GAP, WAYPOINT_GAP, COLUMN_GAP = 14.0, 4.0, 40.0
# Edges that go far sideways need room, so the gap between two rows grows with the largest shift.
MIN_ROW_GAP, MAX_ROW_GAP, ROW_GAP_PER_SHIFT = 30.0, 84.0, 0.2
# Strength of the pull between neighbours: two waypoints of one edge, and all other pairs.
STRAIGHT_PULL, BENT_PULL = 8.0, 1.0
# Edges meet a node on this share of its side.
PORT_SHARE = 0.8
# Columns are laid out this far apart, so that they do not touch, and then moved together.
FAR = 1e6

Point = tuple[float, float]


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
    routes: tuple[tuple[Point, ...], ...]
    columns: tuple[tuple[float, float], ...]
    width: float
    height: float


def lay_out(
    graph: LayeredGraph, edges: Sequence[Edge], *, min_column_widths: Sequence[float]
) -> Layout:
    """Compute the coordinates of every node and edge."""
    x, columns = _columns_side_by_side(graph, min_column_widths)
    y = _row_centres(graph, x)[graph.row]
    nodes = map(PlacedNode, graph.nodes, x.tolist(), y.tolist(), graph.width.tolist())
    return Layout(
        nodes=tuple(nodes),
        routes=_routes(graph, edges, x, y),
        columns=columns,
        width=columns[-1][1],
        height=float(y.max()) + NODE_HEIGHT / 2,
    )


def separated(
    wanted: Iterable[float], weights: Iterable[float], gaps: Iterable[float]
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
            other_mean, other_weight, other_length = blocks.pop()
            total = weight + other_weight
            mean = (mean * weight + other_mean * other_weight) / total
            weight = total
            length += other_length
        blocks.append((mean, weight, length))
    pooled = [mean for mean, _, length in blocks for _ in range(length)]
    return [mean + offset for mean, offset in zip(pooled, offsets, strict=True)]


def _columns_side_by_side(
    graph: LayeredGraph, min_widths: Sequence[float]
) -> tuple[VertexFloats, tuple[tuple[float, float], ...]]:
    x = _relaxed(graph)
    left_ends = x - graph.width / 2
    right_ends = x + graph.width / 2
    start = 0.0
    columns = []
    for column, min_width in enumerate(min_widths):
        inside = graph.column == column
        low, high = float(left_ends[inside].min()), float(right_ends[inside].max())
        end = start + max(high - low, min_width)
        x[inside] += (start + end) / 2 - (low + high) / 2
        columns.append((start, end))
        start = end + COLUMN_GAP
    return x, tuple(columns)


def _relaxed(graph: LayeredGraph) -> VertexFloats:
    """Move one row after another towards its neighbours in the same column."""
    lower, upper = graph.segments
    inside = graph.column[lower] == graph.column[upper]
    here = np.concatenate([lower[inside], upper[inside]])
    there = np.concatenate([upper[inside], lower[inside]])
    between_waypoints = np.minimum(here, there) >= len(graph.nodes)
    pull = np.where(between_waypoints, STRAIGHT_PULL, BENT_PULL)
    x = graph.column * FAR
    total_pull = np.bincount(here, weights=pull, minlength=len(x))
    weights = np.maximum(total_pull, BENT_PULL)
    rows_with_gaps = [(row, _gaps(graph, row)) for row in graph.rows]
    for _ in range(N_SWEEPS // 2):
        for row, gaps in rows_with_gaps + rows_with_gaps[::-1]:
            # wanted_i = sum_j pull_ij x_j / sum_j pull_ij over the neighbours j of vertex i
            pulled = np.bincount(here, weights=pull * x[there], minlength=len(x))
            wanted = np.where(total_pull > 0, pulled / weights, x)
            x[row] = separated(wanted[row].tolist(), weights[row].tolist(), gaps)
    return x


def _gaps(graph: LayeredGraph, row: list[int]) -> list[float]:
    """Return the least distances between the centres of adjacent vertices."""
    margin = np.where(np.array(row) < len(graph.nodes), NODE_GAP, WAYPOINT_GAP)
    half = (graph.width[row] + margin) / 2
    return (half[:-1] + half[1:]).tolist()


def _row_centres(graph: LayeredGraph, x: VertexFloats) -> Float[np.ndarray, " row"]:
    lower, upper = graph.segments
    largest_shift = np.zeros(len(graph.rows))
    np.maximum.at(largest_shift, graph.row[lower], np.abs(x[lower] - x[upper]))
    gaps = np.clip(ROW_GAP_PER_SHIFT * largest_shift[:-1], MIN_ROW_GAP, MAX_ROW_GAP)
    heights = np.concatenate([[0.0], np.cumsum(gaps + NODE_HEIGHT)])
    return heights[-1] - heights + NODE_HEIGHT / 2


def _routes(
    graph: LayeredGraph, edges: Sequence[Edge], x: VertexFloats, y: VertexFloats
) -> tuple[tuple[Point, ...], ...]:
    starts, ends = _ports(graph, edges, x)
    bottoms = (y + NODE_HEIGHT / 2).tolist()
    tops = (y - NODE_HEIGHT / 2).tolist()
    places = x.tolist()
    routes = []
    for (source, *waypoints, target), start, end in zip(graph.chains, starts, ends, strict=True):
        route = [(start, tops[source])]
        for waypoint in waypoints:
            route.append((places[waypoint], bottoms[waypoint]))
            route.append((places[waypoint], tops[waypoint]))
        routes.append((*route, (end, bottoms[target])))
    return tuple(routes)


def _ports(
    graph: LayeredGraph, edges: Sequence[Edge], x: VertexFloats
) -> tuple[list[float], list[float]]:
    """Return the x at which each edge leaves its source and enters its target.

    Edges leave in the order in which they go on, so that they do not cross there. They enter a
    head by slot, q, k and v from left to right, and within a slot in the order in which they come.
    """
    source, second = np.array([chain[:2] for chain in graph.chains]).T
    last_but_one, target = np.array([chain[-2:] for chain in graph.chains]).T
    slots = [SLOTS.index(edge.slot) if edge.slot else 0 for edge in edges]
    side = PORT_SHARE * graph.width
    starts = x[source] + side[source] * _spread(source, x[second])
    ends = x[target] + side[target] * _spread(target, slots, x[last_but_one])
    return starts.tolist(), ends.tolist()


def _spread(vertex: Int[np.ndarray, " edge"], *sort_by: object) -> Float[np.ndarray, " edge"]:
    """Spread the edges at each vertex evenly over -0.5 to 0.5."""
    frame = pandas.DataFrame({"vertex": vertex, **{str(i): key for i, key in enumerate(sort_by)}})
    at_vertex = frame.sort_values(list(frame.columns)).groupby("vertex")["vertex"]
    spread = (at_vertex.cumcount() + 0.5) / at_vertex.transform("size") - 0.5
    return spread.sort_index().to_numpy()
