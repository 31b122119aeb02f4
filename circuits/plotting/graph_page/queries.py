"""The queries of the served page: their addresses and parameters."""

from __future__ import annotations

import re
from collections.abc import Collection
from typing import Any
from urllib.parse import parse_qsl

from circuits.plotting.graph_page.data import GraphData, JsonObject
from circuits.plotting.graph_page.page import THRESHOLDS
from circuits.system.errors import InputError

# More than this would take browsers too long to draw.
MAX_NODES, MAX_EDGES, MAX_LISTED = 10_000, 20_000, 1000
VIEW = {**THRESHOLDS, "max_nodes": MAX_NODES, "max_edges": MAX_EDGES}
Defaults = dict[str, Any]
NODE = {"node": ""}
# For each address the method of `GraphData` that answers, and the defaults of its parameters. The
# default of a count is also its largest value.
QUERIES: dict[str, tuple[str, Defaults]] = {
    "/api/nodes": ("cached_view", VIEW),
    "/api/edges": ("around", {**NODE, "most": MAX_LISTED}),
    "/api/between": ("between", {**NODE, "most": MAX_EDGES}),
    "/api/search": ("search", {"text": "", "most": MAX_LISTED}),
}
SHOWN_CHARACTERS = 50  # of a wrong value, in error messages


def answer(data: GraphData, address: str, query: str) -> JsonObject:
    """Answer a query string at one of the addresses of `QUERIES`.

    Raises:
        InputError: a parameter is unknown, given twice, or has a value that cannot be used.
    """
    method, defaults = QUERIES[address]
    given = _parameters(query, defaults.keys())
    values = dict(defaults)
    for name, text in given.items():
        default = defaults[name]
        values[name] = _value(name, text, default)
    if "node" in values:
        values["node"] = _node_numbers(data, values["node"])
    query_method = getattr(data, method)
    result: JsonObject = query_method(*values.values())
    return result


def _parameters(query: str, names: Collection[str]) -> dict[str, str]:
    """Parse a query string that may hold each of these parameters once."""
    try:
        parameters = parse_qsl(
            query,
            keep_blank_values=True,
            strict_parsing=bool(query),
            errors="strict",
            max_num_fields=len(names),
        )
    except ValueError as error:
        raise InputError(f"the query is not name=value&...: {error}.") from error
    given: dict[str, str] = {}
    for name, text in parameters:
        if name not in names or name in given:
            raise InputError(
                f"{name[:SHOWN_CHARACTERS]!r} cannot be given here, or not twice; "
                f"the parameters are {', '.join(names)}."
            )
        given[name] = text
    return given


def _value(name: str, text: str, default: Any) -> Any:
    """Parse a text, a count or a share, whichever its default is."""
    if isinstance(default, str):
        return text
    if isinstance(default, int) and _is_count(text):
        return min(int(text), default)
    if isinstance(default, float) and _is_share(text):
        return float(text)
    wanted = f"up to {default}" if isinstance(default, int) else "from 0 to 1"
    raise InputError(f"{name}={text[:SHOWN_CHARACTERS]!r}: give a number {wanted}.")


def _is_count(text: str) -> bool:
    return re.fullmatch("[0-9]{1,9}", text) is not None


def _is_share(text: str) -> bool:
    try:
        return 0 <= float(text) <= 1
    except ValueError:
        return False


def _node_numbers(data: GraphData, texts: str) -> list[int]:
    """Return the numbers of nodes given by number or name, separated by commas."""
    numbers = []
    for text in texts.split(","):
        number = data.numbers.get(text, -1)
        if _is_count(text):
            number = int(text)
        if not 0 <= number < len(data.names):
            raise InputError(
                f"node={text[:SHOWN_CHARACTERS]!r}: the graph has no such node; give numbers or "
                "names such as f2.1204@5, separated by commas."
            )
        numbers.append(number)
    return numbers
