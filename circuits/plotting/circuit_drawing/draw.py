"""A circuit as a standalone SVG: a picture for a README, and the drawing inside the pages."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from itertools import pairwise

from circuits.graph.circuit import Circuit
from circuits.graph.edges import Edge
from circuits.graph.nodes import MLP, Error, Feature, Head, Logits, Node, Position
from circuits.plotting.circuit_drawing.coordinates import BOX_HEIGHT, Box, Placement, Point, place
from circuits.plotting.circuit_drawing.rows import LOGITS_ROW, position_of, row_of, skeleton
from circuits.plotting.circuit_drawing.svg_marks import (
    BAND,
    INK,
    LINE,
    MONO,
    QUIET,
    document,
    number,
    rect,
    words,
)

# Okabe and Ito's colours, which stay apart for colour-blind readers, on a background of the picture's own.
SLOT_COLOURS: Mapping[str | None, str] = {
    "q": "#0072b2",
    "k": "#d55e00",
    "v": "#009e73",
    None: "#6d6875",
}
THINNEST, THICKEST = 1.0, 6.5
FAINTEST = 0.55
UNSCORED_SHARE = (
    0.15  # of the way from thinnest to thickest, where no edge of a circuit has a score
)
CHARACTER, LEGEND_CHARACTER, TITLE_CHARACTER = (
    7.3,
    6.4,
    10.0,
)  # widths of one, as node names, legend and title are written
MARGIN, SIDE, BAND_PADDING = 20.0, 84.0, 11.0
LEAST_WIDTH, LINE_HEIGHT = 560.0, 22.0
LISTED_EDGES = 10  # in the tooltip of a node


@dataclass(frozen=True)
class Stroke:
    """A drawn edge: `rank` 1 is the strongest; a score that is NaN was never measured."""

    edge: Edge
    score: float
    rank: int
    width: float
    opacity: float

    @property
    def text(self) -> str:
        """The edge's name and score, for the tooltip."""
        return f"{self.edge}  {score_text(self.score)}"


def draw(circuit: Circuit, *, title: str | None, max_edges: int) -> str:
    """The SVG that `circuits.draw_circuit` returns."""
    drawn = circuit.top(max_edges) if len(circuit) > max_edges else circuit
    count = _count(circuit, len(drawn))
    if not len(drawn):
        return _nothing_kept(title, count)
    strokes = _strokes(drawn.edges, drawn.scores[drawn.kept].tolist())
    placement, columns = _placed(circuit, strokes)
    legend, legend_width = _legend(strokes)
    head = [*_headline(title, count), legend]
    top = len(head) * LINE_HEIGHT + 30 + (LINE_HEIGHT if columns else 0)
    width = max(
        placement.width + SIDE + 2 * MARGIN, legend_width + MARGIN, _title_width(title), LEAST_WIDTH
    )
    # A narrow drawing stands in the middle of the room that the legend needs.
    left = SIDE + (width - SIDE - placement.width) / 2
    body = [
        *_bands(placement, MARGIN / 2 - left, width - left - MARGIN / 2),
        *_column_labels(placement, columns),
        *_edges(placement, strokes),
        *_nodes(placement.boxes, strokes),
    ]
    moved = f'<g transform="translate({number(left)} {number(top)})">' + "\n".join(body) + "</g>"
    return document(
        width,
        top + placement.height + MARGIN + BAND_PADDING,
        title or "circuit",
        [*_lines(head), moved],
    )


def score_text(score: float) -> str:
    """A score as people read it."""
    return "not scored" if math.isnan(score) else f"{score:+.4g}"


def strongest_first(scores: Sequence[float]) -> list[int]:
    """Indices by falling |score|, unscored ones last; of equal ones the first first."""
    return sorted(
        range(len(scores)),
        key=lambda index: -abs(scores[index]) if not math.isnan(scores[index]) else math.inf,
    )


def _count(circuit: Circuit, drawn: int) -> str:
    kept, possible = len(circuit), len(circuit.graph)
    if drawn == kept:
        return f"{kept:,} of {possible:,} edges kept"
    which = "first" if circuit.scores[circuit.kept].isnan().all() else "strongest"
    return f"drawn: the {drawn:,} {which} of {kept:,} edges kept ({possible:,} in the graph)"


def _strokes(edges: Sequence[Edge], scores: Sequence[float]) -> list[Stroke]:
    order = strongest_first(scores)
    ranks = {index: rank for rank, index in enumerate(order, start=1)}
    largest = max((abs(score) for score in scores if math.isfinite(score)), default=0.0) or 1.0
    unscored = UNSCORED_SHARE if all(math.isnan(score) for score in scores) else 0.0
    strokes = []
    for index, (edge, score) in enumerate(zip(edges, scores, strict=True)):
        # Scores span orders of magnitude: the root keeps weak edges visible and the order of widths.
        share = unscored if math.isnan(score) else math.sqrt(min(abs(score) / largest, 1.0))
        strokes.append(
            Stroke(
                edge,
                score,
                ranks[index],
                THINNEST + (THICKEST - THINNEST) * share,
                FAINTEST + (0.95 - FAINTEST) * share,
            )
        )
    return strokes


def _placed(circuit: Circuit, strokes: list[Stroke]) -> tuple[Placement, list[Position]]:
    """The layout of the nodes that have edges, and the columns' positions (none when the graph is not split by position)."""
    edges = [stroke.edge for stroke in strokes]
    ends = {node for edge in edges for node in (edge.source, edge.target)}
    nodes = [node for node in circuit.graph.nodes if node in ends]
    columns = sorted(
        {position_of(node) for node in nodes}, key=_position_order(circuit.graph.nodes).__getitem__
    )
    out, into = Counter(edge.source for edge in edges), Counter(edge.target for edge in edges)
    boxes = {node: _box_width(node, max(out[node], into[node])) for node in nodes}
    drawing = skeleton(
        nodes,
        edges,
        box_widths=boxes,
        edge_widths=[stroke.width for stroke in strokes],
        columns=columns,
    )
    placement = place(
        drawing,
        edges,
        column_widths=[len(_position_text(position)) * CHARACTER for position in columns],
    )
    return placement, [] if columns == [None] else columns


def _position_order(nodes: Iterable[Node]) -> Mapping[Position, tuple[int, int]]:
    """Numbers in order, names as the graph has them, nodes without a position last."""
    seen = dict.fromkeys(position_of(node) for node in nodes)
    order = {
        position: (0, position) if isinstance(position, int) else (1, index)
        for index, position in enumerate(seen)
    }
    return order | {None: (2, 0)}


def _box_width(node: Node, edges: int) -> float:
    room = 2.6 * edges if isinstance(node, Head) else 4.0 * edges
    return max(len(node.label) * CHARACTER + 14, min(room, 360.0), 40.0)


def _position_text(position: Position) -> str:
    return "any position" if position is None else f"@{position}"


# Parts of the picture


def _headline(title: str | None, count: str) -> list[str]:
    return [
        *([words(MARGIN, 0, title, 17, INK, weight=600)] if title else []),
        words(MARGIN, 0, count, 13, QUIET),
    ]


def _title_width(title: str | None) -> float:
    return 2 * MARGIN + TITLE_CHARACTER * len(title or "")


def _lines(parts: list[str]) -> list[str]:
    return [
        f'<g transform="translate(0 {28 + LINE_HEIGHT * index})">{part}</g>'
        for index, part in enumerate(parts)
    ]


def _legend(strokes: list[Stroke]) -> tuple[str, float]:
    """What the marks mean, of those that occur: slots' colours, dashes for negative scores, widths. And how wide that is."""
    slots = {stroke.edge.slot for stroke in strokes}
    without = (
        "into features or logits"
        if any(isinstance(stroke.edge.target, Feature) for stroke in strokes)
        else "into MLP or logits"
    )
    entries = [
        (colour, "", slot or without) for slot, colour in SLOT_COLOURS.items() if slot in slots
    ]
    if any(stroke.score < 0 for stroke in strokes):
        entries.append((QUIET, ' stroke-dasharray="6 4"', "score below 0"))
    items, x = [], MARGIN
    for colour, dash, name in entries:
        items.append(
            f'<path d="M{number(x)} -4h20" stroke="{colour}" stroke-width="3.5"{dash}/>'
            + words(x + 26, 0, name, 12, QUIET)
        )
        x += 26 + len(name) * LEGEND_CHARACTER + 16
    meaning = _widths_in_words(strokes) + _columns_in_words(strokes)
    return "".join([*items, words(x, 0, meaning, 12, QUIET)]), x + len(meaning) * LEGEND_CHARACTER


def _widths_in_words(strokes: list[Stroke]) -> str:
    sizes = [abs(stroke.score) for stroke in strokes if math.isfinite(stroke.score)]
    return (
        f"width: |score|, {min(sizes):.3g} to {max(sizes):.3g}" if sizes else "edges without scores"
    )


def _columns_in_words(strokes: list[Stroke]) -> str:
    heads = {
        node
        for stroke in strokes
        for node in (stroke.edge.source, stroke.edge.target)
        if isinstance(node, Head)
    }
    moves = len({head.label for head in heads}) < len(heads)
    return " · a head in two columns reads at one position and writes at the other" if moves else ""


def _bands(placement: Placement, left: float, right: float) -> list[str]:
    """A quiet band behind every layer, with its name at the left."""
    spans: dict[str, list[float]] = {}
    for box in placement.boxes:
        spans.setdefault(_layer_name(box.node), []).append(box.y)
    parts = []
    for name, centres in spans.items():
        middle, height = (
            (min(centres) + max(centres)) / 2,
            max(centres) - min(centres) + BOX_HEIGHT + 2 * BAND_PADDING,
        )
        parts.append(rect(left, middle - height / 2, right - left, height, radius=6, fill=BAND))
        parts.append(words(left + 10, middle + 4, name, 12, QUIET))
    return parts


def _layer_name(node: Node) -> str:
    row = row_of(node)
    return "inputs" if row == 0 else "output" if row == LOGITS_ROW else f"layer {(row - 1) // 2}"


def _column_labels(placement: Placement, columns: list[Position]) -> list[str]:
    """The positions' names over their columns, and dotted rules between columns."""
    bounds = placement.columns if columns else ()
    parts = []
    for (left, right), position in zip(bounds, columns, strict=True):
        name = _position_text(position)
        parts.append(
            words((left + right) / 2, -BAND_PADDING - 10, name, 12.5, INK, weight=600, middle=True)
        )
    top, bottom = number(-BAND_PADDING), number(placement.height + BAND_PADDING)
    for (_, right), (left, _) in pairwise(bounds):
        parts.append(
            f'<path d="M{number((left + right) / 2)} {top}V{bottom}" stroke="{LINE}" stroke-dasharray="2 5"/>'
        )
    return parts


def _edges(placement: Placement, strokes: list[Stroke]) -> list[str]:
    """Strong edges last, on top."""
    index = {box.node: place for place, box in enumerate(placement.boxes)}
    drawn = sorted(zip(strokes, placement.routes, strict=True), key=lambda pair: -pair[0].rank)
    return [
        _edge(stroke, route, index[stroke.edge.source], index[stroke.edge.target])
        for stroke, route in drawn
    ]


def _edge(stroke: Stroke, route: Sequence[Point], source: int, target: int) -> str:
    dash = (
        f' stroke-dasharray="{number(stroke.width + 4)} {number(stroke.width + 1)}"'
        if stroke.score < 0
        else ""
    )
    return (
        f'<g class="edge" data-rank="{stroke.rank}" data-source="{source}" data-target="{target}"><title>{escape(stroke.text)}</title>'
        f'<path d="{_path(route)}" fill="none" stroke="{SLOT_COLOURS.get(stroke.edge.slot, SLOT_COLOURS[None])}" '
        f'stroke-width="{stroke.width:.3f}" stroke-opacity="{stroke.opacity:.2f}"{dash}/></g>'
    )


def _path(route: Sequence[Point]) -> str:
    """Smooth curves between rows, straight lines past them; every curve leaves and arrives vertically."""
    (x, y), text = route[0], [f"M{number(route[0][0])} {number(route[0][1])}"]
    for next_x, next_y in route[1:]:
        if abs(next_x - x) < 0.05:
            text.append(f"V{number(next_y)}")
        else:
            middle = number((y + next_y) / 2)
            text.append(
                f"C{number(x)} {middle} {number(next_x)} {middle} {number(next_x)} {number(next_y)}"
            )
        x, y = next_x, next_y
    return "".join(text)


def _nodes(boxes: Sequence[Box], strokes: list[Stroke]) -> list[str]:
    by_strength = sorted(strokes, key=lambda stroke: stroke.rank)
    return [
        _node(
            index,
            box,
            [s for s in by_strength if s.edge.target == box.node],
            [s for s in by_strength if s.edge.source == box.node],
        )
        for index, box in enumerate(boxes)
    ]


def _node(index: int, box: Box, into: list[Stroke], out: list[Stroke]) -> str:
    fill, ink, radius = _look(box.node)
    tip = "\n".join([str(box.node), *_listed("in", into), *_listed("out", out)])
    shape = rect(
        box.x - box.width / 2,
        box.y - BOX_HEIGHT / 2,
        box.width,
        BOX_HEIGHT,
        radius=radius,
        fill=fill,
        stroke=INK,
    )
    name = words(box.x, box.y + 4.2, box.node.label, 12, ink, middle=True, font=MONO)
    return f'<g class="node" data-node="{index}"><title>{escape(tip)}</title>{shape}{name}</g>'


def _look(node: Node) -> tuple[str, str, int]:
    """Fill, text colour and corner radius: heads plain, MLPs tinted and round, both ends of the model distinct."""
    match node:
        case Head():
            return "#ffffff", INK, 4
        case MLP() | Feature():
            return "#fdf1d3", INK, 12
        case Error():
            return "#e7e8eb", INK, 0
        case Logits():
            return INK, "#ffffff", 4
    return "#dfe4ec", INK, 4


def _listed(name: str, strokes: list[Stroke]) -> list[str]:
    more = [f"  and {len(strokes) - LISTED_EDGES} more"] if len(strokes) > LISTED_EDGES else []
    return (
        [
            f"{name}: {len(strokes)}",
            *(f"  {stroke.text}" for stroke in strokes[:LISTED_EDGES]),
            *more,
        ]
        if strokes
        else []
    )


def _nothing_kept(title: str | None, count: str) -> str:
    lines = [
        *_headline(title, count),
        words(MARGIN, 0, "No edges kept: there is nothing to draw.", 14, INK),
    ]
    return document(
        max(LEAST_WIDTH, _title_width(title)),
        LINE_HEIGHT * len(lines) + 30,
        title or "circuit",
        _lines(lines),
    )
