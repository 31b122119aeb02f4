"""A circuit as a standalone SVG: a picture for a README, and the drawing inside the pages.

Edges and nodes carry `data-rank`, `data-node`, `data-source` and `data-target`, which the script
of the pages reads.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from itertools import pairwise

from torch import Tensor

from circuits.graph.circuit import Circuit, check_is_circuit
from circuits.graph.edges import Edge
from circuits.graph.graph import PooledFeatureGraph
from circuits.graph.nodes import MLP, Error, Feature, Head, Logits, Node, Position
from circuits.plotting.circuit_drawing.layout import (
    NODE_HEIGHT,
    Layout,
    Point,
    lay_out,
    position_of,
    row_key,
)
from circuits.plotting.style import BAND, BLUE, GREEN, INK, MONO, PAPER, QUIET, SANS, VERMILION
from circuits.system.errors import InputError
from circuits.system.numbers import WholeNumber, whole

DEFAULT_MAX_EDGES = 200
# Features are side by side in one row, so fewer of their edges fit on a page.
DEFAULT_MAX_FEATURE_EDGES = 50
MIN_STROKE_WIDTH, MAX_STROKE_WIDTH = 1.2, 6.5
MIN_OPACITY, MAX_OPACITY = 0.55, 0.95
SLOT_COLOURS = {"q": BLUE, "k": VERMILION, "v": GREEN, None: "#6d6875"}
TWO_COLUMNS_NOTE = "A head in two columns can read at one position and write at the other."
MAX_TOOLTIP_EDGES = 10  # into a node, and out of it
# Fill, text colour and corner radius.
Style = tuple[str, str, int]
INPUT_STYLE: Style = ("#dfe4ec", INK, 4)
NODE_STYLES: dict[type[Node], Style] = {
    Head: (PAPER, INK, 4),
    MLP: ("#fdf1d3", INK, 12),
    Feature: ("#fdf1d3", INK, 12),
    Error: ("#e7e8eb", INK, 0),
    Logits: (INK, PAPER, 4),
}

OUTER_LAYERS = {-1: "inputs", math.inf: "output"}

# Lengths are in pixels. Text cannot be measured here, so widths come from average characters.
LABEL_CHARACTER, TITLE_CHARACTER = 7.3, 10.0
MIN_NODE_WIDTH, MAX_NODE_WIDTH, NODE_PADDING, PORT_WIDTH = 40.0, 360.0, 14.0, 4.0
MARGIN, LAYER_NAMES_WIDTH, BAND_PADDING = 20.0, 84.0, 11.0
MIN_WIDTH, LINE_HEIGHT = 660.0, 22.0


@dataclass(frozen=True)
class RankedEdge:
    """A kept edge of a circuit, and how strong its stroke is, from 0 to 1."""

    edge: Edge
    score: float
    rank: int
    strength: float

    @property
    def score_text(self) -> str:
        """The score for readers."""
        return "not scored" if math.isnan(self.score) else f"{self.score:+.4g}"

    @property
    def text(self) -> str:
        """The edge and its score, for tooltips."""
        return f"{self.edge}  {self.score_text}"

    @property
    def width(self) -> float:
        """Width of the stroke in pixels."""
        return MIN_STROKE_WIDTH + (MAX_STROKE_WIDTH - MIN_STROKE_WIDTH) * self.strength

    @property
    def opacity(self) -> float:
        """Opacity of the stroke."""
        return MIN_OPACITY + (MAX_OPACITY - MIN_OPACITY) * self.strength


Edges = Sequence[RankedEdge]
Marks = list[str]
EdgesByNode = defaultdict[Node, list[RankedEdge]]


def draw(circuit: Circuit, *, title: str | None, max_edges: WholeNumber | None) -> str:
    """Draw a circuit as SVG; `circuits.draw_circuit` explains the arguments."""
    edges = ranked_edges(circuit, edge_limit(circuit, max_edges))
    counts = _counts(circuit, len(edges))
    lines = [_text(counts, f'font-size="13" fill="{QUIET}"')]
    if title is not None:
        lines.insert(0, _text(title, f'font-size="17" font-weight="600" fill="{INK}"'))
    if not edges:
        lines.append(_text("No edges kept: there is nothing to draw.", f'fill="{INK}"'))
        return _document(title, lines, None, [])
    layout = _layout(circuit, edges)
    lines.append(_legend(layout, edges))
    if _is_head_in_two_columns(layout):
        lines.append(_text(TWO_COLUMNS_NOTE, f'fill="{QUIET}"'))
    return _document(title, lines, layout, edges)


def edge_limit(circuit: Circuit, max_edges: WholeNumber | None) -> int:
    """Return the largest number of edges to draw, which has a default for each kind of graph.

    Raises:
        InputError: `max_edges` is negative.
    """
    check_is_circuit(circuit)
    if max_edges is None:
        has_features = isinstance(circuit.graph, PooledFeatureGraph)
        return DEFAULT_MAX_FEATURE_EDGES if has_features else DEFAULT_MAX_EDGES
    max_edges = whole(max_edges, "max_edges")
    if max_edges < 0:
        raise InputError(
            f"max_edges={max_edges} is negative; give the largest number of edges to draw, "
            f"for example {DEFAULT_MAX_EDGES}."
        )
    return max_edges


def ranked_edges(circuit: Circuit, limit: int) -> Edges:
    """Return the strongest kept edges, strongest first; edges without a score come last."""
    edges = circuit.edges
    scores = circuit.scores[circuit.kept].double()
    sizes = scores.abs()
    strengths = _strengths(sizes).tolist()
    sortable = sizes.nan_to_num(nan=-1, posinf=math.inf)
    # Ties are in graph order.
    strongest = sortable.argsort(descending=True, stable=True)
    ranked = []
    for rank, index in enumerate(strongest[:limit].tolist(), 1):
        edge, score = edges[index], float(scores[index])
        ranked.append(RankedEdge(edge, score, rank, strengths[index]))
    return ranked


def _strengths(sizes: Tensor) -> Tensor:
    # strength = sqrt(|score| / max |score|). Scores span orders of magnitude; the root keeps weak
    # edges visible without changing the order.
    finite = sizes[sizes.isfinite()].tolist()
    largest = max(finite, default=0.0) or 1
    share = sizes.nan_to_num() / largest
    return share.clamp(max=1).sqrt()


def _counts(circuit: Circuit, n_drawn: int) -> str:
    n_kept, n_possible = len(circuit), len(circuit.graph)
    if n_drawn == n_kept:
        return f"{n_kept:,} of {n_possible:,} edges kept"
    scores = circuit.scores[circuit.kept]
    which = "first" if scores.isnan().all() else "strongest"
    return f"drawn: the {n_drawn:,} {which} of {n_kept:,} edges kept ({n_possible:,} in the graph)"


def _layout(circuit: Circuit, edges: Edges) -> Layout:
    """Lay out the nodes that have edges, in graph order."""
    leaving, entering = _edges_by_end(edges)
    all_nodes = circuit.graph.nodes
    node_widths = {}
    for node in all_nodes:
        n_ports = max(len(leaving[node]), len(entering[node]))
        if n_ports:
            node_widths[node] = _node_width(node, n_ports)
    edge_widths = {one.edge: one.width for one in edges}
    used = set(map(position_of, node_widths))
    column_widths = {}
    # Of all nodes, because those with edges may not be in the order of the positions: numbers in
    # order, then names as in the graph.
    positions = map(position_of, all_nodes)
    for position in sorted(positions, key=lambda at: at if isinstance(at, int) else math.inf):
        if position in used:
            name = _position_text(position)
            column_widths[position] = LABEL_CHARACTER * len(name)
    return lay_out(node_widths, edge_widths, column_widths)


def _edges_by_end(edges: Edges) -> tuple[EdgesByNode, EdgesByNode]:
    """Group the edges by their sources and by their targets, each group strongest first."""
    leaving = defaultdict(list)
    entering = defaultdict(list)
    for one in edges:
        leaving[one.edge.source].append(one)
        entering[one.edge.target].append(one)
    return leaving, entering


def _node_width(node: Node, n_ports: int) -> float:
    """Return a width that has room for the label and for the edges on one side."""
    ports_width = min(PORT_WIDTH * n_ports, MAX_NODE_WIDTH)
    label_width = LABEL_CHARACTER * len(node.label) + NODE_PADDING
    return max(label_width, ports_width, MIN_NODE_WIDTH)


def _position_text(position: Position) -> str:
    return "" if position is None else f"@{position}"


# Parts of the picture


def _document(title: str | None, lines: Marks, layout: Layout | None, edges: Edges) -> str:
    """Write the SVG: lines of text, and below them the layers."""
    title_width = TITLE_CHARACTER * len(title or "")
    width = max(MIN_WIDTH, title_width + 2 * MARGIN)
    content = []
    for number, line in enumerate(lines, start=1):
        y = number * LINE_HEIGHT
        content.append(_moved(MARGIN, y, [line]))
    height = (len(lines) + 1) * LINE_HEIGHT
    if layout is not None:
        width = max(width, layout.width + LAYER_NAMES_WIDTH + 2 * MARGIN)
        # A narrow drawing is in the middle of the space right of the layer names.
        left = (width + LAYER_NAMES_WIDTH - layout.width) / 2
        top = height + LINE_HEIGHT
        bands = _layer_bands(layout, width)
        content.append(_moved(0, top, bands))
        marks = _position_marks(layout)
        marks += _edge_marks(layout, edges)
        marks += _node_marks(layout, edges)
        content.append(_moved(left, top, marks))
        height = top + layout.height + MARGIN + BAND_PADDING
    # The paper makes the picture readable on light and dark pages.
    return f"""\
<svg xmlns="http://www.w3.org/2000/svg" width="{width:.1f}" height="{height:.1f}" \
viewBox="0 0 {width:.1f} {height:.1f}" role="img" aria-label="{escape(title or "circuit")}" \
font-family="{SANS}" font-size="12">
<rect width="100%" height="100%" rx="8" fill="{PAPER}"/>
{"".join(content)}
</svg>
"""


def _moved(x: float, y: float, marks: Marks) -> str:
    markup = "\n".join(marks)
    return f'<g transform="translate({x:.1f} {y:.1f})">{markup}</g>'


def _text(text: str, attributes: str) -> str:
    return f"<text {attributes}>{escape(text)}</text>"


def _legend(layout: Layout, edges: Edges) -> str:
    """Explain the colours, dashes and widths that are in the drawing."""
    slots = {one.edge.slot for one in edges}
    has_features = any(isinstance(node, Feature | Error) for node in layout.nodes)
    without_slot = "into features or logits" if has_features else "into MLPs or logits"
    entries = []
    for slot, colour in SLOT_COLOURS.items():
        if slot in slots:
            name = slot or without_slot
            entries.append(f'<tspan fill="{colour}">\u25ac {name}</tspan>')
    scores = [one.score for one in edges]
    if any(score < 0 for score in scores):
        entries.append("\u254d score below 0")
    finite = filter(math.isfinite, scores)
    sizes = list(map(abs, finite))
    widths = "edges without scores"
    if sizes:
        widths = f"width: |score|, {min(sizes):.3g} to {max(sizes):.3g}"
    explained = "\u2003".join([*entries, widths])
    return f'<text fill="{QUIET}">{explained}</text>'


def _is_head_in_two_columns(layout: Layout) -> bool:
    labels = [node.label for node in layout.nodes if isinstance(node, Head)]
    return len(set(labels)) < len(labels)


def _layer_bands(layout: Layout, width: float) -> Marks:
    """Draw a quiet band behind each layer, with the layer's name at its left end."""
    tops = defaultdict(list)
    for node, vertex in layout.nodes.items():
        layer, _ = row_key(node)
        tops[layer].append(vertex.top)
    marks = []
    for layer, inside in tops.items():
        top = min(inside) - BAND_PADDING
        height = max(inside) - top + NODE_HEIGHT + BAND_PADDING
        size = f'width="{width - MARGIN:.1f}" height="{height:.1f}" rx="6"'
        marks.append(f'<rect x="{MARGIN / 2}" y="{top:.1f}" {size} fill="{BAND}"/>')
        name = OUTER_LAYERS.get(layer, f"layer {layer}")
        place = f'x="{MARGIN}" y="{top + height / 2 + 4:.1f}"'
        marks.append(_text(name, f'{place} fill="{QUIET}"'))
    return marks


def _position_marks(layout: Layout) -> Marks:
    """Write the positions over their columns."""
    marks = []
    for position, middle in layout.columns.items():
        place = f'x="{middle:.1f}" y="{-BAND_PADDING - 8}" text-anchor="middle"'
        style = f'{place} font-weight="600" fill="{INK}"'
        marks.append(_text(_position_text(position), style))
    return marks


def _edge_marks(layout: Layout, edges: Edges) -> Marks:
    number = {node: index for index, node in enumerate(layout.nodes)}
    marks = []
    # Strong edges come last and are therefore on top.
    for one in reversed(edges):
        edge = one.edge
        tooltip = escape(one.text)
        dashes = f'stroke-dasharray="{one.width + 4:.1f} {one.width + 1:.1f}"'
        marks.append(f"""\
<g class="edge" data-rank="{one.rank}" data-source="{number[edge.source]}" \
data-target="{number[edge.target]}"><title>{tooltip}</title>\
<path d="{_smooth_path(layout.routes[edge])}" fill="none" stroke="{SLOT_COLOURS[edge.slot]}" \
stroke-width="{one.width:.3f}" stroke-opacity="{one.opacity:.2f}" \
{dashes if one.score < 0 else ""}/></g>""")
    return marks


def _smooth_path(route: Sequence[Point]) -> str:
    """Connect the points by curves that start and end vertically, and by vertical lines."""
    x, y = route[0]
    commands = [f"M{x:.1f} {y:.1f}"]
    for start, (next_x, next_y) in pairwise(route):
        x, y = start
        middle = (y + next_y) / 2
        curve = f"C{x:.1f} {middle:.1f} {next_x:.1f} {middle:.1f} {next_x:.1f} {next_y:.1f}"
        is_vertical = abs(next_x - x) < 0.05
        commands.append(f"V{next_y:.1f}" if is_vertical else curve)
    return "".join(commands)


def _node_marks(layout: Layout, edges: Edges) -> Marks:
    leaving, entering = _edges_by_end(edges)
    marks = []
    for number, (node, vertex) in enumerate(layout.nodes.items()):
        fill, ink, radius = NODE_STYLES.get(type(node), INPUT_STYLE)
        left, top = vertex.left, vertex.top
        place = f'x="{vertex.x:.1f}" y="{top + 16.2:.1f}" text-anchor="middle"'
        label = _text(node.label, f'{place} font-family="{MONO}" fill="{ink}"')
        lines = [str(node)]
        lines += _listed("in", entering[node])
        lines += _listed("out", leaving[node])
        tooltip = escape("\n".join(lines))
        marks.append(f"""\
<g class="node" data-node="{number}"><title>{tooltip}</title>\
<rect x="{left:.1f}" y="{top:.1f}" width="{vertex.width:.1f}" height="{NODE_HEIGHT}" \
rx="{radius}" fill="{fill}" stroke="{INK}" stroke-width="1.1"/>{label}</g>""")
    return marks


def _listed(direction: str, edges: Edges) -> list[str]:
    """List the strongest of the edges into or out of a node, for its tooltip."""
    lines = [f"edges drawn {direction}: {len(edges)}"]
    lines += [f"  {one.text}" for one in edges[:MAX_TOOLTIP_EDGES]]
    n_more = len(edges) - MAX_TOOLTIP_EDGES
    if n_more > 0:
        lines.append(f"  and {n_more} more")
    return lines
