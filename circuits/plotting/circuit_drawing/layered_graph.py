"""Rows and the order within them: the first steps of a layered drawing (Sugiyama et al. 1981).

1. The layers of the model give the rows, sources below targets.
2. An edge that passes rows gets an invisible waypoint in each, so that it runs between nodes and
   not behind them.
3. Barycentre sweeps find an order within the rows in which few edges cross.

`layout.py` computes the coordinates. Positions are columns: no vertex leaves its column.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import pairwise

import numpy as np
from jaxtyping import Float, Int

from circuits.graph.edges import Edge
from circuits.graph.nodes import MLP, Error, Feature, Head, Logits, Node, Position

N_SWEEPS = 16
# Relative to the pull of one neighbour: it decides only for vertices without neighbours, and ties.
INERTIA = 1e-6

# Row, column and width of a vertex.
Vertex = tuple[int, int, float]
# The vertices of each row from left to right, bottom row first.
Rows = list[list[int]]
VertexNumbers = Int[np.ndarray, " vertex"]
VertexFloats = Float[np.ndarray, " vertex"]
SegmentEnds = Int[np.ndarray, " segment"]


@dataclass(frozen=True, eq=False)
class LayeredGraph:
    """A drawing without coordinates.

    Attributes:
        nodes: the drawn nodes. Vertex i is `nodes[i]`; all further vertices are waypoints.
        edges: the drawn edges.
        chains: for each edge the vertices it visits: source, waypoints, target.
        row: the row of each vertex, 0 at the bottom.
        column: the column of each vertex, 0 at the left.
        width: the width of each vertex in pixels.
        rows: the order of the vertices within each row.
    """

    nodes: tuple[Node, ...]
    edges: tuple[Edge, ...]
    chains: list[list[int]]
    row: VertexNumbers
    column: VertexNumbers
    width: VertexFloats
    rows: Rows

    @cached_property
    def segments(self) -> tuple[SegmentEnds, SegmentEnds]:
        """Lower and upper ends of the segments, the pieces of edges between adjacent rows."""
        segments = [segment for chain in self.chains for segment in pairwise(chain)]
        lower, upper = np.array(segments).T
        return lower, upper


def row_key(node: Node) -> tuple[float, int]:
    """Return the layer of a node and its place in the layer; sorting by it gives the rows.

    Embeddings are in layer -1, the logits in layer infinity.
    """
    match node:
        case Head(layer=layer):
            return layer, 0
        case MLP(layer=layer) | Feature(layer=layer) | Error(layer=layer):
            return layer, 1
        case Logits():
            return math.inf, 0
    return -1, 0


def position_of(node: Node) -> Position:
    """Return the position of a node, or None."""
    position: Position = getattr(node, "position", None)
    return position


def layered_graph(
    edges: Sequence[Edge],
    *,
    node_widths: Mapping[Node, float],
    edge_widths: Sequence[float],
    columns: Sequence[Position],
) -> LayeredGraph:
    """Assign nodes and waypoints to rows and columns, and order each row with few crossings.

    Args:
        edges: the drawn edges.
        node_widths: the drawn nodes with their widths in pixels.
        edge_widths: the width of each edge, which its waypoints take up.
        columns: the positions of the nodes from left to right.
    """
    keys = sorted(set(map(row_key, node_widths)))
    vertices: list[Vertex] = [
        (keys.index(row_key(node)), columns.index(position_of(node)), width)
        for node, width in node_widths.items()
    ]
    nodes = tuple(node_widths)
    chains = _add_waypoints(vertices, nodes, edges, edge_widths)
    row, column, width = map(np.array, zip(*vertices, strict=True))
    rows = [np.flatnonzero(row == index).tolist() for index in range(len(keys))]
    graph = LayeredGraph(nodes, tuple(edges), chains, row, column, width, rows)
    return _with_few_crossings(graph)


def _add_waypoints(
    vertices: list[Vertex],
    nodes: Sequence[Node],
    edges: Sequence[Edge],
    edge_widths: Sequence[float],
) -> list[list[int]]:
    """Append the waypoints of each edge to the vertices; return the chain of each edge."""
    vertex_of = {node: vertex for vertex, node in enumerate(nodes)}
    chains = []
    for edge, width in zip(edges, edge_widths, strict=True):
        source, target = vertex_of[edge.source], vertex_of[edge.target]
        source_row, column, _ = vertices[source]
        first = len(vertices)
        for row in range(source_row + 1, vertices[target][0]):
            vertices.append((row, column, width))
        chains.append([source, *range(first, len(vertices)), target])
    return chains


def n_crossings(graph: LayeredGraph, rows: Rows) -> int:
    """Count the pairs of segments that cross when the rows are ordered like this."""
    place = _places(graph, rows)
    lower, upper = graph.segments
    total = 0
    for row in range(len(rows)):
        here = graph.row[lower] == row
        start, end = place[lower[here]], place[upper[here]]
        # Two segments cross if their upper ends are not in the order of their lower ends.
        crosses = (start[:, None] < start) & (end[:, None] > end)
        total += int(crosses.sum())
    return total


def _with_few_crossings(graph: LayeredGraph) -> LayeredGraph:
    """Sweep up and down in turn, and keep the best order found."""
    rows = graph.rows
    found = []
    for sweep in range(N_SWEEPS):
        rows = _sweep(graph, rows, upwards=sweep % 2 == 0)
        found.append(rows)
    best = min(found, key=lambda rows: n_crossings(graph, rows))
    return replace(graph, rows=best)


def _sweep(graph: LayeredGraph, rows: Rows, *, upwards: bool) -> Rows:
    """Sort each row by the mean place of its vertices' neighbours in the row before it."""
    rows = list(rows)
    lower, upper = graph.segments
    here, before = (upper, lower) if upwards else (lower, upper)
    n_vertices = len(graph.row)
    n_neighbours = np.bincount(here, minlength=n_vertices)
    indices = range(len(rows))
    for index in indices if upwards else reversed(indices):
        place = _places(graph, rows)
        # centre_i = (sum_j place_j + inertia place_i) / (number of j + inertia)
        total = np.bincount(here, place[before], n_vertices)
        centre = (total + INERTIA * place) / (n_neighbours + INERTIA)
        row = np.array(rows[index])
        order = np.lexsort((centre[row], graph.column[row]))
        rows[index] = row[order].tolist()
    return rows


def _places(graph: LayeredGraph, rows: Rows) -> VertexFloats:
    """Return the place of each vertex in its row, from 0 to 1 so that all rows compare."""
    place = np.empty(len(graph.row))
    for row in rows:
        place[row] = (np.arange(len(row)) + 0.5) / len(row)
    return place
