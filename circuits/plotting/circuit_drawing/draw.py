"""A circuit as a standalone SVG: a picture for a README, and the drawing inside the pages.

Edges and nodes carry `data-rank`, `data-node`, `data-source` and `data-target`, which the script
of the pages reads. What is of class `stay` stays in view there when a wide drawing is scrolled.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from html import escape
from itertools import pairwise, starmap

from circuits.graph.circuit import Circuit
from circuits.graph.nodes import MLP, Error, Feature, Head, Logits, Node, Position
from circuits.plotting.circuit_drawing.layout import (
    Layout,
    Point,
    lay_out,
    position_of,
)
from circuits.plotting.circuit_drawing.legend import (
    LABEL_CHARACTER,
    SLOT_COLOURS,
    edge_legend,
    label_width,
    type_legend,
)
from circuits.plotting.circuit_drawing.node_types import NodeType, TypeNames, node_types
from circuits.plotting.circuit_drawing.ranking import Edges, RankedEdge, edge_limit, ranked_edges
from circuits.plotting.circuit_drawing.rows import (
    BAND_PADDING,
    INPUTS,
    NODE_HEIGHT,
    OUTPUT,
    row_key,
)
from circuits.plotting.style import BAND, INK, MONO, PAPER, QUIET, SANS
from circuits.system.numbers import WholeNumber

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

OUTER_LAYERS = {INPUTS: "inputs", OUTPUT: "output"}

# A control point is this share of a curve's height away from its end.
CONTROL_SHARE = 0.4

# Lengths are in pixels. Text cannot be measured here, so widths come from average characters.
TITLE_CHARACTER = 10.0
MIN_NODE_WIDTH, MAX_NODE_WIDTH, PORT_WIDTH = 40.0, 360.0, 4.0
MARGIN, LAYER_NAMES_WIDTH = 20.0, 96.0
MIN_CONTENT_WIDTH, MAX_LEGEND_WIDTH, LINE_HEIGHT = 620.0, 1060.0, 22.0

Marks = list[str]
Types = Mapping[Node, NodeType]
EdgesByNode = defaultdict[Node, list[RankedEdge]]


def draw(
    circuit: Circuit,
    *,
    title: str | None,
    max_edges: WholeNumber | None,
    types: TypeNames = None,
) -> str:
    """Draw a circuit as SVG; `circuits.draw_circuit` explains the arguments."""
    edges = ranked_edges(circuit, edge_limit(circuit, max_edges))
    known = node_types(circuit, types)
    counts = _counts(circuit, len(edges))
    lines = [_text(counts, f'font-size="13" fill="{QUIET}"')]
    if title is not None:
        lines.insert(0, _text(title, f'font-size="17" font-weight="600" fill="{INK}"'))
    if not edges:
        lines.append(_text("No edges kept: there is nothing to draw.", f'fill="{INK}"'))
        return _document(title, lines, None, [], {})
    layout = _layout(circuit, edges, known)
    lines.append(edge_legend(layout.nodes, edges))
    if _is_head_in_two_columns(layout):
        lines.append(_text(TWO_COLUMNS_NOTE, f'fill="{QUIET}"'))
    inside = filter(layout.nodes.__contains__, known)
    drawn = {node: known[node] for node in inside}
    return _document(title, lines, layout, edges, drawn)


def _counts(circuit: Circuit, n_drawn: int) -> str:
    n_kept, n_possible = len(circuit), len(circuit.graph)
    if n_drawn == n_kept:
        return f"{n_kept:,} of {n_possible:,} edges kept"
    scores = circuit.scores[circuit.kept]
    which = "first" if scores.isnan().all() else "strongest"
    return f"drawn: the {n_drawn:,} {which} of {n_kept:,} edges kept ({n_possible:,} in the graph)"


def _layout(circuit: Circuit, edges: Edges, types: Types) -> Layout:
    """Lay out the nodes that have edges, in graph order."""
    leaving, entering = _edges_by_end(edges)
    all_nodes = circuit.graph.nodes
    node_widths = {}
    for node in all_nodes:
        n_ports = max(len(leaving[node]), len(entering[node]))
        if n_ports:
            node_widths[node] = _node_width(_label(node, types), n_ports)
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
    return lay_out(node_widths, edge_widths, column_widths, _n_layers(circuit))


def _n_layers(circuit: Circuit) -> int:
    """Return the number of layers in the circuit's graph."""
    layers = (getattr(node, "layer", INPUTS) for node in circuit.graph.nodes)
    return 1 + max(layers)


def _edges_by_end(edges: Edges) -> tuple[EdgesByNode, EdgesByNode]:
    """Group the edges by their sources and by their targets, each group strongest first."""
    leaving = defaultdict(list)
    entering = defaultdict(list)
    for one in edges:
        leaving[one.edge.source].append(one)
        entering[one.edge.target].append(one)
    return leaving, entering


def _node_width(label: str, n_ports: int) -> float:
    """Return a width that has room for the label and for the edges on one side."""
    ports_width = min(PORT_WIDTH * n_ports, MAX_NODE_WIDTH)
    return max(label_width(label), ports_width, MIN_NODE_WIDTH)


def _label(node: Node, types: Types) -> str:
    return types[node].label(node.label) if node in types else node.label


def _position_text(position: Position) -> str:
    return "" if position is None else f"@{position}"


# Parts of the picture


def _document(
    title: str | None,
    lines: Marks,
    layout: Layout | None,
    edges: Edges,
    types: Types,
) -> str:
    """Write the SVG: lines of text, and below them the layers."""
    shown = list(dict.fromkeys(types.values()))
    title_width = TITLE_CHARACTER * len(title or "")
    widths = [MIN_CONTENT_WIDTH, title_width]
    if layout is not None:
        widths.append(layout.width + LAYER_NAMES_WIDTH)
    widths += [label_width(one.legend) for one in shown]
    width = max(widths) + 2 * MARGIN
    lines = lines + type_legend(shown, min(max(widths), MAX_LEGEND_WIDTH))
    content = []
    for number, line in enumerate(lines, start=1):
        y = number * LINE_HEIGHT
        content.append(_moved(MARGIN, y, [f'<g class="stay">{line}</g>']))
    height = (len(lines) + 1) * LINE_HEIGHT
    if layout is not None:
        # A narrow drawing is in the middle of the space right of the layer names.
        left = (width + LAYER_NAMES_WIDTH - layout.width) / 2
        top = height + LINE_HEIGHT
        bands, names = _layer_marks(layout, width)
        content.append(_moved(0, top, bands))
        marks = _position_marks(layout)
        marks += _edge_marks(layout, edges)
        marks += _node_marks(layout, edges, types)
        content.append(_moved(left, top, marks))
        content.append(_moved(MARGIN, top, names))
        height = top + layout.height
    about = title or "circuit"
    if shown:
        names = [one.name for one in shown]
        about += "; node types: " + ", ".join(names)
    # The paper makes the picture readable on light and dark pages.
    return f"""\
<svg xmlns="http://www.w3.org/2000/svg" width="{width:.1f}" height="{height:.1f}" \
viewBox="0 0 {width:.1f} {height:.1f}" role="img" aria-label="{escape(about)}" \
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


def _is_head_in_two_columns(layout: Layout) -> bool:
    labels = [node.label for node in layout.nodes if isinstance(node, Head)]
    return len(set(labels)) < len(labels)


def _layer_marks(layout: Layout, width: float) -> tuple[Marks, Marks]:
    """Draw a quiet band behind each layer and a line for layers left out, and write their names."""
    tops = defaultdict(list)
    for node, box in layout.nodes.items():
        layer, _ = row_key(node)
        tops[layer].append(box.top)
    marks, names = [], []
    for layer, inside in tops.items():
        top = min(inside) - BAND_PADDING
        height = max(inside) - top + NODE_HEIGHT + BAND_PADDING
        size = f'width="{width - MARGIN:.1f}" height="{height:.1f}" rx="6"'
        marks.append(f'<rect x="{MARGIN / 2}" y="{top:.1f}" {size} fill="{BAND}"/>')
        name = OUTER_LAYERS.get(layer, f"layer {layer}")
        names.append(_layer_name(name, top + height / 2))
    for fold in layout.folds:
        ends = f'x1="{MARGIN + LAYER_NAMES_WIDTH}" x2="{width - MARGIN:.1f}"'
        line = f'<line {ends} stroke="{QUIET}" stroke-dasharray="1 4"/>'
        moved = _moved(0, fold.middle, [line])
        marks.append(moved)
        names.append(_layer_name(fold.text, fold.middle))
    return marks, names


def _layer_name(name: str, middle: float) -> str:
    # Its border keeps it readable where edges pass below it.
    border = f'stroke="{BAND}" stroke-width="5" paint-order="stroke"'
    return _text(name, f'class="stay" y="{middle + 4:.1f}" fill="{QUIET}" {border}')


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
    """Connect the points by curves that start and end vertically and never swing back."""
    x, y = route[0]
    slopes = starmap(_slope, pairwise(route))
    inner = starmap(_slope_between, pairwise(slopes))
    tangents = [0.0, *inner, 0.0]
    commands = map(_curve, pairwise(route), pairwise(tangents))
    return f"M{x:.1f} {y:.1f}" + "".join(commands)


def _slope(start: Point, end: Point) -> float:
    """Return how far a line moves to the side while it goes up."""
    (x, y), (next_x, next_y) = start, end
    return (next_x - x) / (next_y - y)


def _slope_between(before: float, after: float) -> float:
    # The harmonic mean keeps the curve from swinging back; it is vertical where it turns
    # (Fritsch and Butland 1984).
    if before * after <= 0:
        return 0.0
    return 2 * before * after / (before + after)


def _curve(ends: tuple[Point, Point], slopes: tuple[float, float]) -> str:
    """Write a cubic Bezier curve from one point to the other, or a vertical line."""
    (x, y), (next_x, next_y) = ends
    if abs(next_x - x) < 0.05:
        return f"V{next_y:.1f}"
    slope, next_slope = slopes
    rise = CONTROL_SHARE * (next_y - y)
    first = f"{x + slope * rise:.1f} {y + rise:.1f}"
    second = f"{next_x - next_slope * rise:.1f} {next_y - rise:.1f}"
    return f"C{first} {second} {next_x:.1f} {next_y:.1f}"


def _node_marks(layout: Layout, edges: Edges, types: Types) -> Marks:
    leaving, entering = _edges_by_end(edges)
    marks = []
    for number, (node, vertex) in enumerate(layout.nodes.items()):
        fill, ink, radius = NODE_STYLES.get(type(node), INPUT_STYLE)
        left, top = vertex.left, vertex.top
        place = f'x="{vertex.x:.1f}" y="{top + 15.2:.1f}" text-anchor="middle"'
        lines = [str(node)]
        if node in types:
            fill, ink = types[node].fill, INK
            lines.append(types[node].name)
        label = _text(_label(node, types), f'{place} font-family="{MONO}" fill="{ink}"')
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
