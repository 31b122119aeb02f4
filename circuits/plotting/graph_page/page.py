"""The interactive page of an attribution graph: one HTML file that works offline, or the page that `circuits view` serves.

Template, style and scripts are files beside this one. Both pages run the same scripts; the served one asks the server where the other looks
into what it holds.
"""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Mapping
from html import escape
from importlib import resources
from string import Template
from typing import Any

from circuits.attribution.feature_graph import FeatureGraph
from circuits.plotting.graph_page.data import GraphData
from circuits.system.errors import InputError

MAX_NODES, MAX_EDGES = 1500, 20_000
STYLES = ("style.css", "graph.css")
SCRIPTS = (
    "graph_data.js",
    "graph_layout.js",
    "graph_marks.js",
    "graph_subgraph.js",
    "graph_panel.js",
    "graph_export.js",
    "graph_picture.js",
    "graph_search.js",
    "graph_input.js",
    "graph.js",
)
THRESHOLDS = {"node_threshold": 0.8, "edge_threshold": 0.98}
"""Where the sliders stand at first, unless the graph's settings say otherwise."""
SERVED_SCRIPT = "graph_served.js"
"""What asks the server. A page that is opened from a file does not have it."""


def graph_page(
    graph: FeatureGraph,
    *,
    title: str,
    details: Mapping[str, str] | None = None,
    max_nodes: int = MAX_NODES,
    max_edges: int = MAX_EDGES,
) -> str:
    """A self-contained HTML page: the graph drawn, explored by pointing, searching and two thresholds, grouped into supernodes, exported.

    Of a larger graph the page holds the most influential nodes, with all tokens and targets, and the most influential edges, and says so.

    Args:
        details: settings and results to show under the title, as text.
        max_nodes: the page holds at most so many nodes, tokens and targets in any case,
        max_edges: and at most so many edges.

    Raises:
        InputError: `max_nodes` or `max_edges` is negative.
    """
    for name, value in (("max_nodes", max_nodes), ("max_edges", max_edges)):
        if value < 0:
            raise InputError(
                f"{name}={value} is negative; give how many the page may hold, for example {MAX_NODES}."
            )
    data = GraphData.of(graph)
    held = data.held(max_nodes, max_edges)
    page, _ = _page(data, title, details or {}, held, _what_is_left_out(data, held), SCRIPTS)
    return page


def served_page(
    data: GraphData, *, title: str, details: Mapping[str, str] | None = None
) -> tuple[str, str]:
    """The page that asks its server for nodes and edges, and the content security policy to send with it."""
    return _page(data, title, details or {}, None, "", (SERVED_SCRIPT, *SCRIPTS))


def _page(
    data: GraphData,
    title: str,
    details: Mapping[str, str],
    held: Mapping[str, Any] | None,
    note: str,
    scripts: tuple[str, ...],
) -> tuple[str, str]:
    style, script = ("\n".join(_file(name) for name in names) for names in (STYLES, scripts))
    policy = _policy(style, script, served=held is None)
    page = Template(_file("graph.html")).substitute(
        title=escape(title),
        policy=policy,
        details="".join(
            f"<div><dt>{escape(name)}</dt><dd>{escape(text)}</dd></div>"
            for name, text in details.items()
        ),
        note=escape(note),
        **{
            name: str(float(data.graph.settings.get(name, default)))
            for name, default in THRESHOLDS.items()
        },
        about=_json({**data.about(), "title": title}),
        held=_json(held),
        style=style,
        script=script,
    )
    return page, policy


def _what_is_left_out(data: GraphData, held: Mapping[str, Any]) -> str:
    here, there = (
        (len(held["nodes"]["id"]), len(held["edges"]["source"])),
        (len(data.graph.nodes), len(data.graph)),
    )
    if here == there:
        return ""
    nodes = (
        f"the {here[0]:,} most influential of {there[0]:,} nodes"
        if here[0] < there[0]
        else f"all {there[0]:,} nodes"
    )
    return f"This page holds {nodes} and, between them, the {here[1]:,} most influential of {there[1]:,} edges; circuits view has all."


def _policy(style: str, script: str, *, served: bool) -> str:
    """Only this script and this style run, whatever text might slip into the page; and nothing is loaded but from the page's own server."""
    sources = [
        f"script-src {_hash(script)}",
        f"style-src {_hash(style)}",
        "img-src data: blob:",
        "base-uri 'none'",
        "form-action 'none'",
    ]
    return "; ".join(["default-src 'none'", *sources, *(["connect-src 'self'"] if served else [])])


def _hash(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


def _json(content: Any) -> str:
    """JSON for a script element, which ends at the first </script and starts a comment at <!--, wherever these stand."""
    text = json.dumps(content, allow_nan=False, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _file(name: str) -> str:
    return resources.files("circuits.plotting").joinpath("static", name).read_text(encoding="utf-8")
