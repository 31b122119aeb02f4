"""The queries of the served page: their addresses and parameters."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any
from urllib.parse import parse_qs

from circuits.plotting.graph_page.data import GraphData, JsonObject
from circuits.plotting.graph_page.page import THRESHOLDS
from circuits.system.errors import InputError

MAX_NODES, MAX_EDGES, MAX_LISTED = 10_000, 20_000, 1000
VIEW = {**THRESHOLDS, "max_nodes": MAX_NODES, "max_edges": MAX_EDGES}
# For each address the method of `GraphData` that answers, and the defaults of its parameters. The
# default of a count is also its largest value.
QUERIES: dict[str, tuple[str, dict[str, Any]]] = {
    "/api/nodes": ("cached_view", VIEW),
    "/api/edges": ("around", {"node": "", "most": MAX_LISTED}),
    "/api/between": ("between", {"node": "", "most": MAX_EDGES}),
    "/api/search": ("search", {"text": "", "most": MAX_LISTED}),
}
SHOWN_CHARACTERS = 50  # of a wrong value, in error messages
MAX_DIGITS = 9


def answer(data: GraphData, address: str, query: str) -> JsonObject:
    """Answer a query string at one of the addresses of `QUERIES`.

    Raises:
        InputError: a parameter is unknown, given twice, or has a value that cannot be used.
    """
    method, defaults = QUERIES[address]
    given = _parameters(query, defaults)
    values: list[Any] = []
    for name, default in defaults.items():
        text = given.get(name, str(default))
        if name == "node":
            values.append(_node_numbers(data, text))
        elif isinstance(default, str):
            values.append(text)
        elif isinstance(default, int):
            values.append(_count(name, text, default))
        else:
            values.append(_share(name, text))
    result: JsonObject = getattr(data, method)(*values)
    return result


def _parameters(query: str, names: Iterable[str]) -> dict[str, str]:
    """Parse a query string that may hold each of these parameters once."""
    known = list(names)
    try:
        parameters = parse_qs(
            query,
            keep_blank_values=True,
            strict_parsing=bool(query),
            errors="strict",
            max_num_fields=len(known),
        )
    except ValueError as error:
        raise InputError(f"the query is not name=value&...: {error}.") from error
    for name, values in parameters.items():
        if name not in known or len(values) > 1:
            raise InputError(
                f"{name[:SHOWN_CHARACTERS]!r} cannot be given here, or not twice; "
                f"the parameters are {', '.join(known)}."
            )
    return {name: values[0] for name, values in parameters.items()}


def _share(name: str, text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 <= value <= 1:
        raise InputError(f"{name}={text[:SHOWN_CHARACTERS]!r}: give a number from 0 to 1.")
    return value


def _count(name: str, text: str, largest: int) -> int:
    if not _is_count(text):
        raise InputError(f"{name}={text[:SHOWN_CHARACTERS]!r}: give a number up to {largest}.")
    return min(int(text), largest)


def _is_count(text: str) -> bool:
    return text.isascii() and text.isdecimal() and len(text) <= MAX_DIGITS


def _node_numbers(data: GraphData, texts: str) -> list[int]:
    """Return the numbers of nodes given by number or name, separated by commas."""
    numbers = []
    for text in texts.split(","):
        number = int(text) if _is_count(text) else data.numbers.get(text, -1)
        if not 0 <= number < len(data.names):
            raise InputError(
                f"node={text[:SHOWN_CHARACTERS]!r}: the graph has no such node; give numbers or "
                "names such as f2.1204@5, separated by commas."
            )
        numbers.append(number)
    return numbers
