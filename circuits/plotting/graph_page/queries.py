"""The queries of the served page: their addresses and parameters."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any
from urllib.parse import parse_qs

from circuits.plotting.graph_page.data import GraphData
from circuits.system.errors import InputError

MAX_NODES, MAX_EDGES, MAX_LISTED = 10_000, 20_000, 1000
SHOWN_CHARACTERS = 50  # of a wrong value, in error messages
MAX_DIGITS = 9


def _view(data: GraphData, query: str) -> dict[str, Any]:
    names = ("node_threshold", "edge_threshold", "max_nodes", "max_edges")
    parameters = _parameters(query, *names)
    return data.cached_view(
        _share(parameters, "node_threshold", 0.8),
        _share(parameters, "edge_threshold", 0.98),
        _count(parameters, "max_nodes", MAX_NODES),
        _count(parameters, "max_edges", MAX_EDGES),
    )


def _edges(data: GraphData, query: str) -> dict[str, Any]:
    parameters = _parameters(query, "node", "most")
    return data.around(_nodes(data, parameters), _count(parameters, "most", MAX_LISTED))


def _between(data: GraphData, query: str) -> dict[str, Any]:
    parameters = _parameters(query, "node", "most")
    return data.between(_nodes(data, parameters), _count(parameters, "most", MAX_EDGES))


def _search(data: GraphData, query: str) -> dict[str, Any]:
    parameters = _parameters(query, "text", "most")
    return data.search(parameters.get("text", ""), _count(parameters, "most", MAX_LISTED))


QUERIES: Mapping[str, Callable[[GraphData, str], dict[str, Any]]] = {
    "/api/nodes": _view,
    "/api/edges": _edges,
    "/api/between": _between,
    "/api/search": _search,
}
"""Queries by address. They raise InputError for values that cannot be used."""


def _parameters(query: str, *names: str) -> dict[str, str]:
    """Parse a query string that may hold each of these parameters once."""
    try:
        parameters = parse_qs(
            query,
            keep_blank_values=True,
            strict_parsing=bool(query),
            errors="strict",
            max_num_fields=len(names),
        )
    except ValueError as error:
        raise InputError(f"the query is not name=value&...: {error}.") from error
    for name, values in parameters.items():
        if name not in names or len(values) > 1:
            raise InputError(
                f"{name[:SHOWN_CHARACTERS]!r} cannot be given here, or not twice; "
                f"the parameters are {', '.join(names)}."
            )
    return {name: values[0] for name, values in parameters.items()}


def _share(parameters: Mapping[str, str], name: str, default: float) -> float:
    text = parameters.get(name, str(default))
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 <= value <= 1:
        raise InputError(f"{name}={text[:SHOWN_CHARACTERS]!r}: give a number from 0 to 1.")
    return value


def _count(parameters: Mapping[str, str], name: str, largest: int) -> int:
    text = parameters.get(name, str(largest))
    if not _is_count(text):
        raise InputError(f"{name}={text[:SHOWN_CHARACTERS]!r}: give a number up to {largest}.")
    return min(int(text), largest)


def _is_count(text: str) -> bool:
    return text.isascii() and text.isdecimal() and len(text) <= MAX_DIGITS


def _nodes(data: GraphData, parameters: Mapping[str, str]) -> list[int]:
    """Return the numbers of nodes given by number or name, separated by commas."""
    numbers = []
    for text in parameters.get("node", "").split(","):
        number = int(text) if _is_count(text) else data.numbers.get(text, -1)
        if not 0 <= number < len(data.names):
            raise InputError(
                f"node={text[:SHOWN_CHARACTERS]!r}: the graph has no such node; give numbers or "
                "names such as f2.1204@5, separated by commas."
            )
        numbers.append(number)
    return numbers
