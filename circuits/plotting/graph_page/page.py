"""The interactive page of an attribution graph: one HTML file that works offline, or served.

Both run the same scripts; the served one asks its server, the other searches the data it holds.
"""

from __future__ import annotations

import base64
import hashlib
import json
from html import escape
from typing import Any

from circuits.attribution.feature_graph import FeatureGraph
from circuits.plotting.graph_page.data import GraphData, JsonObject
from circuits.plotting.markup import Details, details_list, fill_template, static_file
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
# The script that asks the server; only the served page has it.
SERVED_SCRIPT = "graph_served.js"
Held = JsonObject | None
JSON_ESCAPES = str.maketrans({"<": "\\u003c", ">": "\\u003e", "&": "\\u0026"})
# Initial values of the sliders, unless the graph's settings give others.
THRESHOLDS = {"node_threshold": 0.8, "edge_threshold": 0.98}


def graph_page(
    graph: FeatureGraph,
    *,
    title: str,
    details: Details = None,
    max_nodes: int = MAX_NODES,
    max_edges: int = MAX_EDGES,
) -> str:
    """Write the self-contained page of an attribution graph; see `circuits.attribution_page`.

    It holds the most influential nodes and edges, and all tokens and targets in any case.

    Raises:
        InputError: `max_nodes` or `max_edges` is negative.
    """
    limits = {"max_nodes": max_nodes, "max_edges": max_edges}
    for name, value in limits.items():
        if value < 0:
            raise InputError(
                f"{name}={value} is negative; give how many the page may hold, for example "
                f"{MAX_NODES}."
            )
    data = GraphData.of(graph)
    held = data.held(max_nodes, max_edges)
    page, _ = _page(data, title, details, held)
    return page


def served_page(data: GraphData, title: str, details: Details = None) -> tuple[str, str]:
    """Write the page that asks its server; also return the security policy to send with it."""
    return _page(data, title, details, None)


def _page(data: GraphData, title: str, details: Details, held: Held) -> tuple[str, str]:
    """Write the page around the data that it holds (None: it asks its server)."""
    scripts = SCRIPTS if held is not None else (SERVED_SCRIPT, *SCRIPTS)
    style = "\n".join(map(static_file, STYLES))
    script = "\n".join(map(static_file, scripts))
    policy = _policy(style, script, served=held is None)
    settings = {**THRESHOLDS, **data.graph.settings}
    page = fill_template(
        "graph.html",
        title=escape(title),
        policy=policy,
        details=details_list(details),
        note=_what_is_left_out(data, held),
        about=_script_json({**data.about(), "title": title}),
        held=_script_json(held),
        style=style,
        script=script,
        **{name: str(float(settings[name])) for name in THRESHOLDS},
    )
    return page, policy


def _what_is_left_out(data: GraphData, held: Held) -> str:
    """Say how much of the graph the page holds, if it does not hold all."""
    if held is None:
        return ""
    n_nodes, n_edges = len(data.nodes), len(data.edges)
    held_nodes = len(held["nodes"]["id"])
    held_edges = len(held["edges"]["source"])
    if (held_nodes, held_edges) == (n_nodes, n_edges):
        return ""
    nodes = f"all {n_nodes:,} nodes"
    if held_nodes < n_nodes:
        nodes = f"the {held_nodes:,} most influential of {n_nodes:,} nodes"
    return (
        f"This page holds {nodes} and, between them, the {held_edges:,} most influential of "
        f"{n_edges:,} edges; circuits view has all."
    )


def _policy(style: str, script: str, *, served: bool) -> str:
    # Text that slips into the page as markup can neither run nor load anything: only this script
    # and style are allowed, and requests go to the page's own server only.
    rules = [
        "default-src 'none'",
        f"script-src {_hash(script)}",
        f"style-src {_hash(style)}",
        "img-src data: blob:",
        "base-uri 'none'",
        "form-action 'none'",
    ]
    if served:
        rules.append("connect-src 'self'")
    return "; ".join(rules)


def _hash(text: str) -> str:
    digest = hashlib.sha256(text.encode())
    return f"'sha256-{base64.b64encode(digest.digest()).decode()}'"


def compact_json(content: Any) -> str:
    """Write JSON without spaces, and refuse NaN, which is none."""
    return json.dumps(content, allow_nan=False, separators=(",", ":"))


def _script_json(content: Any) -> str:
    # A script element ends at the first </script and starts a comment at <!--.
    return compact_json(content).translate(JSON_ESCAPES)
