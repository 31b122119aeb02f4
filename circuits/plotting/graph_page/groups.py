"""Pinned nodes, supernodes and thresholds that a reader chose, kept in `groups.json`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from circuits.plotting.graph_page.data import GraphData
from circuits.system.errors import InputError
from circuits.system.files import read_json, write_json

FILE = "groups.json"
FORMAT, FORMAT_VERSION = "circuits.graph_groups", 1
MAX_NAME_LENGTH = 200
REQUIRED = {"pinned", "supernodes"}
THRESHOLDS = ("node_threshold", "edge_threshold")


def load_groups(folder: Path, data: GraphData) -> dict[str, Any]:
    """Read what `save_groups` wrote, without the nodes that the graph does not have.

    Returns:
        `pinned`, a list of names; `supernodes`, a list of objects with `name` and `nodes`; and
        the thresholds if the reader changed them. Nothing is pinned or grouped without a file.

    Raises:
        InputError: the file is damaged, of another kind, or from a newer version.
    """
    path = folder / FILE
    if not path.exists():
        return {"pinned": [], "supernodes": []}
    groups = read_json(path, FORMAT, FORMAT_VERSION)
    try:
        _check(groups)
    except InputError as error:
        raise InputError(f"{path}: {error} Correct the file or move it away.") from error
    groups["pinned"] = _known(groups["pinned"], data)
    for supernode in groups["supernodes"]:
        supernode["nodes"] = _known(supernode["nodes"], data)
    groups["supernodes"] = [one for one in groups["supernodes"] if one["nodes"]]
    return groups


def save_groups(folder: Path, data: GraphData, groups: Any) -> Path:
    """Check the groups that a page sent and write `groups.json` atomically; return its path.

    Raises:
        InputError: `groups` does not have the form that `load_groups` returns, or names a node
            that the graph does not have.
    """
    _check(groups)
    # A name that is too long for a node would fill the error message.
    for name in grouped_names(groups):
        if name not in data.numbers:
            raise InputError(f"the graph has no node {name[:MAX_NAME_LENGTH]!r}.")
    return write_json(folder / FILE, groups, FORMAT, FORMAT_VERSION)


def grouped_names(groups: dict[str, Any]) -> list[str]:
    """Return the names of all pinned and grouped nodes."""
    return [*groups["pinned"], *_members(groups)]


def _known(names: list[str], data: GraphData) -> list[str]:
    return [name for name in names if name in data.numbers]


def _members(groups: dict[str, Any]) -> list[str]:
    return [name for supernode in groups["supernodes"] for name in supernode["nodes"]]


def _check(groups: Any) -> None:
    """Raise an InputError unless this has the form that `load_groups` returns."""
    keys = set(groups) if isinstance(groups, dict) else set()
    if not REQUIRED <= keys <= REQUIRED.union(THRESHOLDS):
        raise InputError(
            "expected an object with pinned, supernodes and optionally node_threshold and "
            "edge_threshold."
        )
    if not _are_names(groups["pinned"]):
        raise InputError("pinned must be a list of nodes' names.")
    supernodes = groups["supernodes"]
    if not isinstance(supernodes, list) or not all(map(_is_supernode, supernodes)):
        raise InputError(
            f"supernodes must be a list of objects with a name of 1 to {MAX_NAME_LENGTH} "
            "characters and nodes, a list of names."
        )
    members = _members(groups)
    if len(members) != len(set(members)):
        raise InputError("a node is in two supernodes.")
    for threshold in THRESHOLDS:
        if not _is_share(groups.get(threshold, 0)):
            raise InputError(f"{threshold} must be a number from 0 to 1.")


def _are_names(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(name, str) for name in value)


def _is_share(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value <= 1


def _is_supernode(value: Any) -> bool:
    match value:
        case {"name": str(name), "nodes": nodes, **others}:
            has_length = 0 < len(name.strip()) <= len(name) <= MAX_NAME_LENGTH
            return has_length and _are_names(nodes) and not others
    return False
