"""Where the nodes and edges of a drawn circuit go: a layered drawing, sources below targets.

The usual four steps: rows from the layers; invisible waypoints where an edge passes a row, so that edges run between nodes and
not behind them; an order within rows with few crossings (barycentre sweeps); coordinates (placement.py). Positions are columns,
ordered and placed each by itself.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

import numpy as np

from circuits.graph.edges import Edge
from circuits.graph.nodes import (
    MLP,
    Embed,
    Error,
    Feature,
    Head,
    Logits,
    Node,
    PosEmbed,
    Position,
    TokenEmbed,
)

SWEEPS = 16
LOGITS_ROW = 1_000_000


@dataclass(frozen=True)
class Stop:
    """Something that takes room in a row: a node, or the waypoint of an edge that passes the row (`node` is None)."""

    row: int
    column: int
    width: float
    node: Node | None = None


@dataclass
class Skeleton:
    """A drawing before it has coordinates.

    Attributes:
        stops: nodes first, in the order given, then waypoints.
        chains: for each edge the stops it visits, source first, target last.
        rows: for each row, bottom first, its stops from left to right.
    """

    stops: list[Stop]
    chains: list[list[int]]
    rows: list[list[int]]
    below: dict[int, list[int]] = field(default_factory=dict)
    above: dict[int, list[int]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.below = {stop: [] for stop in range(len(self.stops))}
        self.above = {stop: [] for stop in range(len(self.stops))}
        for chain in self.chains:
            for lower, upper in pairwise(chain):
                self.above[lower].append(upper)
                self.below[upper].append(lower)


def row_of(node: Node) -> int:
    """The row a node belongs in: embeddings, then for each layer its heads and above them its MLP, then the logits."""
    match node:
        case TokenEmbed() | PosEmbed() | Embed():
            return 0
        case Head(layer=layer):
            return 2 * layer + 1
        case MLP(layer=layer) | Feature(layer=layer) | Error(layer=layer):
            return 2 * layer + 2
        case Logits():
            return LOGITS_ROW
    raise TypeError(
        f"{node} has no place in a drawing; give its type a row in circuits/viewer/layout.py."
    )


def position_of(node: Node) -> Position:
    """The span or position a node stands at, or None."""
    position: Position = getattr(node, "position", None)
    return position


def skeleton(
    nodes: Sequence[Node],
    edges: Sequence[Edge],
    *,
    box_widths: Mapping[Node, float],
    edge_widths: Sequence[float],
    columns: Sequence[Position],
) -> Skeleton:
    """Rows, waypoints and an order within rows that crosses few edges."""
    used_rows = sorted({row_of(node) for node in nodes})
    row_index = {row: index for index, row in enumerate(used_rows)}
    column_index = {position: index for index, position in enumerate(columns)}
    stops = [
        Stop(row_index[row_of(node)], column_index[position_of(node)], box_widths[node], node)
        for node in nodes
    ]
    place = {node: index for index, node in enumerate(nodes)}
    chains: list[list[int]] = []
    for edge, width in zip(edges, edge_widths, strict=True):
        source, target = place[edge.source], place[edge.target]
        passed = range(stops[source].row + 1, stops[target].row)
        first = len(stops)
        stops += [Stop(row, stops[source].column, width) for row in passed]
        chains.append([source, *range(first, len(stops)), target])
    rows: list[list[int]] = [[] for _ in used_rows]
    for index, stop in enumerate(stops):
        rows[stop.row].append(index)
    return _ordered(Skeleton(stops, chains, rows))


def _ordered(drawing: Skeleton) -> Skeleton:
    """The same drawing with the best order that barycentre sweeps, upwards and downwards in turn, came across."""
    rows = [sorted(row, key=lambda stop: drawing.stops[stop].column) for row in drawing.rows]
    best, fewest = rows, crossings(drawing, rows)
    for sweep in range(SWEEPS):
        rows = _swept(drawing, rows, upwards=sweep % 2 == 0)
        count = crossings(drawing, rows)
        if count < fewest:
            best, fewest = rows, count
    return Skeleton(drawing.stops, drawing.chains, best)


def _swept(drawing: Skeleton, rows: list[list[int]], *, upwards: bool) -> list[list[int]]:
    place = _places(rows)
    neighbours = drawing.below if upwards else drawing.above
    result = list(rows)
    for index in range(len(rows)) if upwards else reversed(range(len(rows))):
        centre = {
            stop: _mean([place[other] for other in neighbours[stop]], place[stop])
            for stop in rows[index]
        }
        result[index] = sorted(
            rows[index], key=lambda stop: (drawing.stops[stop].column, centre[stop])
        )
        place |= _places([result[index]])
    return result


def crossings(drawing: Skeleton, rows: list[list[int]]) -> int:
    """How many pairs of edges cross between neighbouring rows."""
    place = _places(rows)
    total = 0
    for row in rows:
        ends = np.array(
            [(place[stop], place[other]) for stop in row for other in drawing.above[stop]]
        ).reshape(-1, 2)
        lower, upper = ends[:, 0], ends[:, 1]
        total += int(((lower[:, None] < lower[None]) & (upper[:, None] > upper[None])).sum())
    return total


def _places(rows: list[list[int]]) -> dict[int, float]:
    """Where each stop stands in its row, between 0 and 1, so that rows of different lengths compare."""
    return {stop: (index + 0.5) / len(row) for row in rows for index, stop in enumerate(row)}


def _mean(values: list[float], default: float) -> float:
    return sum(values) / len(values) if values else default
