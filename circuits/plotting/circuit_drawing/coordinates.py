"""Coordinates for a layered drawing: nodes near their neighbours, long edges straight, nothing on top of anything."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from circuits.graph.edges import Edge
from circuits.graph.nodes import Head, Node
from circuits.plotting.circuit_drawing.rows import Skeleton

SWEEPS = 40
BOX_HEIGHT = 24.0
NODE_GAP, WAYPOINT_GAP, COLUMN_GAP = 14.0, 4.0, 40.0
ROW_GAP_LEAST, ROW_GAP_MOST, ROW_GAP_PER_SHIFT = 30.0, 84.0, 0.2
STRAIGHT, BENT = (
    8.0,
    1.0,
)  # how strongly neighbours pull: along a passing edge, and where an edge meets a node
PORT_SHARE = 0.8  # of a box's side that edges may meet

Point = tuple[float, float]


@dataclass(frozen=True)
class Box:
    """A placed node: its centre, and its width (every box is `BOX_HEIGHT` high)."""

    node: Node
    x: float
    y: float
    width: float


@dataclass(frozen=True)
class Placement:
    """A drawing with coordinates; y grows downwards, as in SVG, and the picture's corner is (0, 0).

    Attributes:
        boxes: the nodes, in the order given.
        routes: for each edge its points, source first: the first and last lie on boxes, between them come pairs, the bottom and the
            top of a passed row.
        columns: left and right end of each column.
    """

    boxes: tuple[Box, ...]
    routes: tuple[tuple[Point, ...], ...]
    columns: tuple[tuple[float, float], ...]
    width: float
    height: float


def place(drawing: Skeleton, edges: Sequence[Edge], *, column_widths: Sequence[float]) -> Placement:
    """Coordinates for every node and edge; each column is at least as wide as asked."""
    x, columns = _columns_side_by_side(drawing, column_widths)
    y = _row_centres(drawing, x)
    boxes = tuple(
        Box(stop.node, x[i], y[stop.row], stop.width)
        for i, stop in enumerate(drawing.stops)
        if stop.node is not None
    )
    return Placement(
        boxes, _routes(drawing, edges, x, y), columns, columns[-1][1], max(y) + BOX_HEIGHT / 2
    )


def separated(
    wanted: Sequence[float], weights: Sequence[float], gaps: Sequence[float]
) -> list[float]:
    """The places nearest to the wanted ones (weighted least squares) that keep the order and at least `gaps[i]` between i and i + 1.

    With the gaps subtracted this is isotonic regression; blocks that would overlap are pooled at their mean.
    """
    blocks: list[tuple[float, float, int]] = []  # mean, weight, length
    offsets = [0.0]
    for gap in gaps:
        offsets.append(offsets[-1] + gap)
    for target, weight, offset in zip(wanted, weights, offsets, strict=False):
        mean, total, length = target - offset, weight, 1
        while blocks and blocks[-1][0] > mean:
            other, other_total, other_length = blocks.pop()
            mean = (mean * total + other * other_total) / (total + other_total)
            total, length = total + other_total, length + other_length
        blocks.append((mean, total, length))
    pooled = [mean for mean, _, length in blocks for _ in range(length)]
    return [mean + offset for mean, offset in zip(pooled, offsets, strict=False)]


def _columns_side_by_side(
    drawing: Skeleton, column_widths: Sequence[float]
) -> tuple[list[float], tuple[tuple[float, float], ...]]:
    x = [0.0] * len(drawing.stops)
    left, bounds = 0.0, []
    for column, least in enumerate(column_widths):
        rows = [
            [stop for stop in row if drawing.stops[stop].column == column] for row in drawing.rows
        ]
        local = _column(drawing, rows)
        low = min(place - drawing.stops[stop].width / 2 for stop, place in local.items())
        high = max(place + drawing.stops[stop].width / 2 for stop, place in local.items())
        width = max(high - low, least)
        for stop, place in local.items():
            x[stop] = left + place - low + (width - (high - low)) / 2
        bounds.append((left, left + width))
        left += width + COLUMN_GAP
    return x, tuple(bounds)


def _column(drawing: Skeleton, rows: list[list[int]]) -> dict[int, float]:
    """Horizontal places of one column's stops, by repeatedly moving every row towards its neighbours."""
    gaps = [[_gap(drawing, a, b) for a, b in pairwise(row)] for row in rows]
    x: dict[int, float] = {}
    for row, distances in zip(rows, gaps, strict=True):
        spread = separated([0.0] * len(row), [1.0] * len(row), distances)
        x |= dict(zip(row, spread, strict=True))
    for sweep in range(SWEEPS):
        order = range(len(rows)) if sweep % 2 == 0 else reversed(range(len(rows)))
        for index in order:
            pulls = [_pull(drawing, stop, x) for stop in rows[index]]
            moved = separated([pull[0] for pull in pulls], [pull[1] for pull in pulls], gaps[index])
            x |= dict(zip(rows[index], moved, strict=True))
    return x


def _gap(drawing: Skeleton, left: int, right: int) -> float:
    a, b = drawing.stops[left], drawing.stops[right]
    between_nodes = a.node is not None and b.node is not None
    return (a.width + b.width) / 2 + (
        NODE_GAP
        if between_nodes
        else WAYPOINT_GAP
        if a.node is b.node
        else (NODE_GAP + WAYPOINT_GAP) / 2
    )


def _pull(drawing: Skeleton, stop: int, x: dict[int, float]) -> tuple[float, float]:
    """Where a stop's neighbours in its column want it, and how strongly."""
    here, total, weight = drawing.stops[stop], 0.0, 0.0
    for other in drawing.below[stop] + drawing.above[stop]:
        if other in x:
            pull = STRAIGHT if here.node is None and drawing.stops[other].node is None else BENT
            total, weight = total + pull * x[other], weight + pull
    return (total / weight, weight) if weight else (x[stop], BENT)


def _row_centres(drawing: Skeleton, x: list[float]) -> list[float]:
    """Rows further apart where edges between them go far sideways."""
    heights = [0.0]
    for row in drawing.rows[:-1]:
        shift = max(
            (abs(x[stop] - x[other]) for stop in row for other in drawing.above[stop]), default=0.0
        )
        heights.append(
            heights[-1]
            + BOX_HEIGHT
            + min(max(ROW_GAP_PER_SHIFT * shift, ROW_GAP_LEAST), ROW_GAP_MOST)
        )
    return [heights[-1] - height + BOX_HEIGHT / 2 for height in heights]


def _routes(
    drawing: Skeleton, edges: Sequence[Edge], x: list[float], y: list[float]
) -> tuple[tuple[Point, ...], ...]:
    starts, ends = _ports_out(drawing, x), _ports_in(drawing, edges, x)
    half = BOX_HEIGHT / 2
    routes = []
    for index, chain in enumerate(drawing.chains):
        centres = [y[drawing.stops[stop].row] for stop in chain]
        passed: list[Point] = []
        for stop, centre in zip(chain[1:-1], centres[1:-1], strict=True):
            passed += [(x[stop], centre + half), (x[stop], centre - half)]
        routes.append(
            ((starts[index], centres[0] - half), *passed, (ends[index], centres[-1] + half))
        )
    return tuple(routes)


def _ports_out(drawing: Skeleton, x: list[float]) -> dict[int, float]:
    """Where on its source's upper side each edge starts: from left to right as the edges go on."""
    leaving: dict[int, list[int]] = {}
    for index, chain in enumerate(drawing.chains):
        leaving.setdefault(chain[0], []).append(index)
    ports: dict[int, float] = {}
    for node, group in leaving.items():
        group.sort(key=lambda index: x[drawing.chains[index][1]])
        ports |= _spread(group, x[node], PORT_SHARE * drawing.stops[node].width)
    return ports


def _ports_in(drawing: Skeleton, edges: Sequence[Edge], x: list[float]) -> dict[int, float]:
    """Where on its target's lower side each edge ends: q, k and v of a head in three places, as they are read."""
    arriving: dict[tuple[int, str | None], list[int]] = {}
    for index, (chain, edge) in enumerate(zip(drawing.chains, edges, strict=True)):
        arriving.setdefault((chain[-1], edge.slot), []).append(index)
    ports: dict[int, float] = {}
    for (node, slot), group in arriving.items():
        group.sort(key=lambda index: x[drawing.chains[index][-2]])
        box = drawing.stops[node]
        third = PORT_SHARE * box.width / 3
        shift = (
            third * "qkv".index(slot) - third
            if slot in ("q", "k", "v") and isinstance(box.node, Head)
            else 0.0
        )
        ports |= _spread(group, x[node] + shift, 0.6 * third if slot else PORT_SHARE * box.width)
    return ports


def _spread(group: list[int], centre: float, width: float) -> dict[int, float]:
    return {
        index: centre + width * ((place + 0.5) / len(group) - 0.5)
        for place, index in enumerate(group)
    }
