"""A circuit as a standalone SVG: a picture for a README, and the drawing inside the pages.

Edges and nodes carry `data-rank`, `data-node`, `data-source` and `data-target`, which the script
of the pages reads.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape
from itertools import pairwise

from circuits.graph.circuit import Circuit
from circuits.graph.edges import Edge
from circuits.graph.graph import PooledFeatureGraph
from circuits.graph.nodes import MLP, Error, Feature, Head, Logits, Node, Position
from circuits.plotting.circuit_drawing.layered_graph import layered_graph, position_of, row_key
from circuits.plotting.circuit_drawing.layout import (
    NODE_HEIGHT,
    Layout,
    PlacedNode,
    Point,
    lay_out,
)
from circuits.plotting.style import BAND, BLUE, GREEN, INK, MONO, PAPER, QUIET, SANS, VERMILION
from circuits.system.errors import InputError

DEFAULT_MAX_EDGES = 200
# Features are side by side in one row, so fewer of their edges fit on a page.
DEFAULT_MAX_FEATURE_EDGES = 50
MIN_STROKE_WIDTH, MAX_STROKE_WIDTH = 1.2, 6.5
SLOT_COLOURS = {"q": BLUE, "k": VERMILION, "v": GREEN, None: "#6d6875"}
LEGEND = "\u2003".join(
    f'<tspan fill="{colour}">\u25ac {slot or "into MLPs, features and logits"}</tspan>'
    for slot, colour in SLOT_COLOURS.items()
)

# Lengths are in pixels. Text cannot be measured here, so widths come from average characters.
LABEL_CHARACTER, TITLE_CHARACTER = 7.3, 10.0
MIN_NODE_WIDTH, MAX_NODE_WIDTH, NODE_PADDING, PORT_WIDTH = 40.0, 360.0, 14.0, 4.0
MARGIN, LAYER_NAMES_WIDTH, BAND_PADDING = 20.0, 84.0, 11.0
MIN_WIDTH, LINE_HEIGHT = 660.0, 22.0


@dataclass(frozen=True)
class DrawnEdge:
    """An edge with its marks in the drawing.

    Attributes:
        edge: the edge.
        score: its score; NaN if it was never measured.
        rank: 1 for the strongest edge.
        width: width of the stroke in pixels.
    """

    edge: Edge
    score: float
    rank: int
    width: float

    @property
    def description(self) -> str:
        """The edge's name and score, for tooltips."""
        return f"{self.edge}  {score_text(self.score)}"


def draw(circuit: Circuit, *, title: str | None, max_edges: int | None) -> str:
    """Draw a circuit as SVG; `circuits.draw_circuit` explains the arguments."""
    limit = edge_limit(circuit, max_edges)
    drawn = circuit.top(min(limit, len(circuit)))
    lines = [_text(_counts(circuit, len(drawn)), f'font-size="13" fill="{QUIET}"')]
    if title is not None:
        lines.insert(0, _text(title, f'font-size="17" font-weight="600" fill="{INK}"'))
    edges = _drawn_edges(drawn)
    if not edges:
        lines.append(_text("No edges kept: there is nothing to draw.", f'fill="{INK}"'))
        return _document(title, lines, None)
    lines.append(_legend(edges))
    layout, positions = _layout(circuit, edges)
    marks = [
        *_position_marks(layout, positions),
        *_edge_marks(layout, edges),
        *_node_marks(layout, edges),
    ]
    return _document(title, lines, layout, marks)


def edge_limit(circuit: Circuit, max_edges: int | None) -> int:
    """Return the largest number of edges to draw, which has a default for each kind of graph.

    Raises:
        InputError: `max_edges` is negative.
    """
    if max_edges is None:
        has_features = isinstance(circuit.graph, PooledFeatureGraph)
        return DEFAULT_MAX_FEATURE_EDGES if has_features else DEFAULT_MAX_EDGES
    if max_edges < 0:
        raise InputError(
            f"max_edges={max_edges} is negative; give the largest number of edges to draw, "
            f"for example {DEFAULT_MAX_EDGES}."
        )
    return max_edges


def score_text(score: float) -> str:
    """Format a score for readers."""
    return "not scored" if math.isnan(score) else f"{score:+.4g}"


def strongest_first(scores: Sequence[float]) -> list[int]:
    """Sort the indices by falling |score|, ties in the given order, unscored edges last."""
    sizes = [-1.0 if math.isnan(score) else abs(score) for score in scores]
    return sorted(range(len(sizes)), key=sizes.__getitem__, reverse=True)


def _counts(circuit: Circuit, n_drawn: int) -> str:
    n_kept, n_possible = len(circuit), len(circuit.graph)
    if n_drawn == n_kept:
        return f"{n_kept:,} of {n_possible:,} edges kept"
    unscored = circuit.scores[circuit.kept].isnan().all()
    which = "first" if unscored else "strongest"
    return f"drawn: the {n_drawn:,} {which} of {n_kept:,} edges kept ({n_possible:,} in the graph)"


def _drawn_edges(circuit: Circuit) -> list[DrawnEdge]:
    """Return the kept edges, strongest first."""
    edges = circuit.edges
    scores = circuit.scores[circuit.kept].tolist()
    sizes = [abs(score) for score in scores if math.isfinite(score)]
    largest = max(sizes, default=0.0) or 1.0
    drawn = []
    for rank, index in enumerate(strongest_first(scores), start=1):
        score = scores[index]
        share = 0.0 if math.isnan(score) else min(abs(score) / largest, 1.0)
        # width = min + (max - min) * sqrt(|score| / max |score|). Scores span orders of
        # magnitude; the root keeps weak edges visible without changing the order of the widths.
        width = MIN_STROKE_WIDTH + (MAX_STROKE_WIDTH - MIN_STROKE_WIDTH) * math.sqrt(share)
        drawn.append(DrawnEdge(edges[index], score, rank, width))
    return drawn


def _layout(circuit: Circuit, drawn: list[DrawnEdge]) -> tuple[Layout, list[Position]]:
    """Lay out the nodes that have edges; also return the positions of the columns.

    There are no positions if the graph is not split by position.
    """
    edges = [one.edge for one in drawn]
    outgoing = Counter(edge.source for edge in edges)
    incoming = Counter(edge.target for edge in edges)
    n_ports = outgoing | incoming  # the larger of the two counts
    nodes = [node for node in circuit.graph.nodes if node in n_ports]
    columns = _sorted_positions(nodes)
    graph = layered_graph(
        edges,
        node_widths={node: _node_width(node, n_ports[node]) for node in nodes},
        edge_widths=[one.width for one in drawn],
        columns=columns,
    )
    name_widths = [LABEL_CHARACTER * len(_position_text(position)) for position in columns]
    layout = lay_out(graph, min_column_widths=name_widths)
    return layout, [] if columns == [None] else columns


def _sorted_positions(nodes: Iterable[Node]) -> list[Position]:
    """Sort positions: numbers in order, then names as in the graph, then None."""
    positions = list(dict.fromkeys(map(position_of, nodes)))
    numbers = [position for position in positions if isinstance(position, int)]
    names = [position for position in positions if isinstance(position, str)]
    nowhere = [position for position in positions if position is None]
    return [*sorted(numbers), *names, *nowhere]


def _node_width(node: Node, n_ports: int) -> float:
    """Return a width that has room for the label and for the edges on one side."""
    ports_width = min(PORT_WIDTH * n_ports, MAX_NODE_WIDTH)
    label_width = LABEL_CHARACTER * len(node.label) + NODE_PADDING
    return max(label_width, ports_width, MIN_NODE_WIDTH)


def _position_text(position: Position) -> str:
    return "any position" if position is None else f"@{position}"


# Parts of the picture


def _document(
    title: str | None, lines: list[str], layout: Layout | None, marks: Iterable[str] = ()
) -> str:
    """Write the SVG: lines of text, below them the layers, and the marks on the layers."""
    width = max(MIN_WIDTH, TITLE_CHARACTER * len(title or "") + 2 * MARGIN)
    height = LINE_HEIGHT * (len(lines) + 1)
    content = [
        _moved(MARGIN, LINE_HEIGHT * (number + 1), line) for number, line in enumerate(lines)
    ]
    if layout is not None:
        width = max(width, layout.width + LAYER_NAMES_WIDTH + 2 * MARGIN)
        # A narrow drawing is in the middle of the space right of the layer names.
        left = LAYER_NAMES_WIDTH + (width - LAYER_NAMES_WIDTH - layout.width) / 2
        top = height + LINE_HEIGHT
        bands = _moved(0, top, *_layer_bands(layout, width))
        content += [bands, _moved(left, top, *marks)]
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


def _moved(x: float, y: float, *content: str) -> str:
    markup = "\n".join(content)
    return f'<g transform="translate({x:.1f} {y:.1f})">{markup}</g>'


def _text(text: str, attributes: str) -> str:
    return f"<text {attributes}>{escape(text)}</text>"


def _legend(drawn: list[DrawnEdge]) -> str:
    """Explain colours, dashes and widths."""
    sizes = [abs(one.score) for one in drawn if math.isfinite(one.score)]
    widths = "edges without scores"
    if sizes:
        widths = f"width: |score|, {min(sizes):.3g} to {max(sizes):.3g}"
    return f'<text fill="{QUIET}">{LEGEND}\u2003\u254d score below 0\u2003{widths}</text>'


def _layer_bands(layout: Layout, width: float) -> list[str]:
    """Draw a quiet band behind each layer, with the layer's name at its left end."""
    centres: dict[float, list[float]] = {}
    for placed in layout.nodes:
        layer, _ = row_key(placed.node)
        centres.setdefault(layer, []).append(placed.y)
    marks = []
    for layer, ys in centres.items():
        top = min(ys) - NODE_HEIGHT / 2 - BAND_PADDING
        height = max(ys) - min(ys) + NODE_HEIGHT + 2 * BAND_PADDING
        size = f'width="{width - MARGIN:.1f}" height="{height:.1f}" rx="6"'
        marks.append(f'<rect x="{MARGIN / 2}" y="{top:.1f}" {size} fill="{BAND}"/>')
        name = {-1: "inputs", math.inf: "output"}.get(layer, f"layer {layer}")
        place = f'x="{MARGIN}" y="{top + height / 2 + 4:.1f}"'
        marks.append(_text(name, f'{place} fill="{QUIET}"'))
    return marks


def _position_marks(layout: Layout, positions: list[Position]) -> list[str]:
    """Write the positions over their columns."""
    marks = []
    for position, (left, right) in zip(positions, layout.columns, strict=False):
        place = f'x="{(left + right) / 2:.1f}" y="{-BAND_PADDING - 8}" text-anchor="middle"'
        marks.append(_text(_position_text(position), f'{place} font-weight="600" fill="{INK}"'))
    return marks


def _edge_marks(layout: Layout, drawn: list[DrawnEdge]) -> list[str]:
    number = {placed.node: index for index, placed in enumerate(layout.nodes)}
    marks = []
    # Strong edges come last and are therefore on top.
    for one, route in zip(reversed(drawn), reversed(layout.routes), strict=True):
        edge = one.edge
        dashes = f'stroke-dasharray="{one.width + 4:.1f} {one.width + 1:.1f}"'
        marks.append(f"""\
<g class="edge" data-rank="{one.rank}" data-source="{number[edge.source]}" \
data-target="{number[edge.target]}"><title>{escape(one.description)}</title>\
<path d="{_smooth_path(route)}" fill="none" stroke="{SLOT_COLOURS[edge.slot]}" \
stroke-width="{one.width:.3f}" stroke-opacity="0.8" {dashes if one.score < 0 else ""}/></g>""")
    return marks


def _smooth_path(route: Sequence[Point]) -> str:
    """Connect the points by curves that start and end vertically, and by vertical lines."""
    x, y = route[0]
    commands = [f"M{x:.1f} {y:.1f}"]
    for (x, y), (next_x, next_y) in pairwise(route):
        if abs(next_x - x) < 0.05:
            commands.append(f"V{next_y:.1f}")
            continue
        middle = (y + next_y) / 2
        controls = f"{x:.1f} {middle:.1f} {next_x:.1f} {middle:.1f}"
        commands.append(f"C{controls} {next_x:.1f} {next_y:.1f}")
    return "".join(commands)


def _node_marks(layout: Layout, drawn: list[DrawnEdge]) -> list[str]:
    marks = []
    for number, placed in enumerate(layout.nodes):
        node = placed.node
        n_in = sum(one.edge.target == node for one in drawn)
        n_out = sum(one.edge.source == node for one in drawn)
        tooltip = f"<title>{escape(str(node))}\nedges in: {n_in}, edges out: {n_out}</title>"
        marks.append(f'<g class="node" data-node="{number}">{tooltip}{_node_shape(placed)}</g>')
    return marks


def _node_shape(placed: PlacedNode) -> str:
    fill, ink, radius = _node_style(placed.node)
    left, top = placed.x - placed.width / 2, placed.y - NODE_HEIGHT / 2
    place = f'x="{placed.x:.1f}" y="{placed.y + 4.2:.1f}" text-anchor="middle"'
    label = _text(placed.node.label, f'{place} font-family="{MONO}" fill="{ink}"')
    return f"""\
<rect x="{left:.1f}" y="{top:.1f}" width="{placed.width:.1f}" height="{NODE_HEIGHT}" \
rx="{radius}" fill="{fill}" stroke="{INK}" stroke-width="1.1"/>{label}"""


def _node_style(node: Node) -> tuple[str, str, int]:
    """Return fill, text colour and corner radius."""
    match node:
        case Head():
            return PAPER, INK, 4
        case MLP() | Feature():
            return "#fdf1d3", INK, 12
        case Error():
            return "#e7e8eb", INK, 0
        case Logits():
            return INK, PAPER, 4
    return "#dfe4ec", INK, 4
