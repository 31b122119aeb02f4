"""What the served page may ask for: addresses, and the values that may be given with each."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any
from urllib.parse import parse_qs

from circuits.plotting.graph_page.data import GraphData
from circuits.system.errors import InputError

MOST_NODES, MOST_EDGES, MOST_LISTED = 10_000, 20_000, 1000


def _view(data: GraphData, query: str) -> dict[str, Any]:
    given = _given(query, "node_threshold", "edge_threshold", "max_nodes", "max_edges")
    thresholds = _share(given, "node_threshold", 0.8), _share(given, "edge_threshold", 0.98)
    return data.remembered_view(
        *thresholds, _count(given, "max_nodes", MOST_NODES), _count(given, "max_edges", MOST_EDGES)
    )


def _edges(data: GraphData, query: str) -> dict[str, Any]:
    given = _given(query, "node", "most")
    return data.around(_nodes(data, given), _count(given, "most", MOST_LISTED))


def _between(data: GraphData, query: str) -> dict[str, Any]:
    given = _given(query, "node", "most")
    return data.between(_nodes(data, given), _count(given, "most", MOST_EDGES))


def _search(data: GraphData, query: str) -> dict[str, Any]:
    given = _given(query, "text", "most")
    return data.search(given.get("text", ""), _count(given, "most", MOST_LISTED))


QUERIES: Mapping[str, Callable[[GraphData, str], dict[str, Any]]] = {
    "/api/nodes": _view,
    "/api/edges": _edges,
    "/api/between": _between,
    "/api/search": _search,
}
"""By address. All raise InputError for values that cannot be used."""


def _given(query: str, *names: str) -> dict[str, str]:
    try:
        values = parse_qs(
            query,
            keep_blank_values=True,
            strict_parsing=bool(query),
            errors="strict",
            max_num_fields=len(names),
        )
    except ValueError as error:
        raise InputError(f"the query is not name=value&...: {error}.") from error
    if wrong := [name for name, given in values.items() if name not in names or len(given) > 1]:
        raise InputError(
            f"{wrong[0][:50]!r} cannot be given here, or not twice; there are {', '.join(names)}."
        )
    return {name: given[0] for name, given in values.items()}


def _share(given: Mapping[str, str], name: str, default: float) -> float:
    try:
        value = float(given.get(name, default))
    except ValueError:
        value = math.nan
    if not 0 <= value <= 1:
        raise InputError(f"{name}={given[name][:50]!r}: give a number from 0 to 1.")
    return value


def _count(given: Mapping[str, str], name: str, most: int) -> int:
    text = given.get(name, str(most))
    if not (text.isascii() and text.isdecimal() and len(text) < 10):
        raise InputError(f"{name}={text[:50]!r}: give a number up to {most}.")
    return min(int(text), most)


def _nodes(data: GraphData, given: Mapping[str, str]) -> list[int]:
    """Numbers of nodes, or their names, separated by commas."""
    numbers = []
    for text in given.get("node", "").split(","):
        number = (
            int(text)
            if text.isascii() and text.isdecimal() and len(text) < 10
            else data.numbers.get(text, -1)
        )
        if not 0 <= number < len(data.names):
            raise InputError(
                f"node={text[:50]!r}: the graph has no such node; give numbers or names such as f2.1204@5, with commas between."
            )
        numbers.append(number)
    return numbers
