"""What the colours, dashes, widths and symbols of a drawing mean."""

from __future__ import annotations

import math
from collections.abc import Iterable
from html import escape

from circuits.graph.nodes import Error, Feature, Node
from circuits.plotting.circuit_drawing.node_types import NodeType
from circuits.plotting.circuit_drawing.ranking import Edges
from circuits.plotting.style import BLUE, GREEN, INK, MONO, QUIET, VERMILION

SLOT_COLOURS = {"q": BLUE, "k": VERMILION, "v": GREEN, None: "#6d6875"}
LABEL_CHARACTER, NODE_PADDING = 7.3, 14.0
# A type is shown as a node.
CHIP_GAP, CHIP_TOP, CHIP_HEIGHT = 8.0, -13.0, 18


def edge_legend(nodes: Iterable[Node], edges: Edges) -> str:
    """Explain the colours, dashes and widths that are in the drawing."""
    slots = {one.edge.slot for one in edges}
    has_features = any(isinstance(node, Feature | Error) for node in nodes)
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


def type_legend(types: Iterable[NodeType], width: float) -> list[str]:
    """Show each type once, in lines of this width."""
    lines: list[list[str]] = []
    left = math.inf
    for one in dict.fromkeys(types):
        chip_width = label_width(one.legend)
        if left + chip_width > width:
            lines.append([])
            left = 0.0
        size = f'width="{chip_width:.1f}" height="{CHIP_HEIGHT}" rx="4"'
        lines[-1].append(
            f'<g class="type"><rect x="{left:.1f}" y="{CHIP_TOP}" {size} fill="{one.fill}" '
            f'stroke="{INK}"/><text x="{left + chip_width / 2:.1f}" text-anchor="middle" '
            f'font-family="{MONO}" fill="{INK}">{escape(one.legend)}</text></g>'
        )
        left += chip_width + CHIP_GAP
    return list(map("".join, lines))


def label_width(label: str) -> float:
    """Return the width of a node that has room for its label."""
    return LABEL_CHARACTER * len(label) + NODE_PADDING
