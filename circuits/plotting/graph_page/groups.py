"""What a reader did with a graph: pinned nodes, supernodes and thresholds, kept as `groups.json` in the run folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from circuits.plotting.graph_page.data import GraphData
from circuits.system.errors import InputError
from circuits.system.files import read_json, write_json

FILE = "groups.json"
FORMAT, FORMAT_VERSION = "circuits.graph_groups", 1
LONGEST_NAME = 200
THRESHOLDS = ("node_threshold", "edge_threshold")


def load_groups(folder: Path, data: GraphData) -> dict[str, Any]:
    """What `save_groups` wrote; nothing pinned and no supernodes where there is no file. Nodes that the graph does not have are left out.

    Raises:
        InputError: the file is damaged, another kind of file or from a newer version of this package.
    """
    path = folder / FILE
    if not path.exists():
        return {"pinned": [], "supernodes": []}
    content = read_json(path, FORMAT, FORMAT_VERSION)
    try:
        _check(content)
    except InputError as error:
        raise InputError(f"{path}: {error} Mend the file or move it away.") from error
    pinned = [name for name in content["pinned"] if name in data.numbers]
    supernodes = [
        {**one, "nodes": [name for name in one["nodes"] if name in data.numbers]}
        for one in content["supernodes"]
    ]
    return {**content, "pinned": pinned, "supernodes": [one for one in supernodes if one["nodes"]]}


def save_groups(folder: Path, data: GraphData, content: Any) -> Path:
    """Write `groups.json`, atomically.

    Raises:
        InputError: the content is of another form, or names a node that the graph does not have.
    """
    _check(content)
    for name in [
        *content["pinned"],
        *(name for one in content["supernodes"] for name in one["nodes"]),
    ]:
        if name not in data.numbers:
            raise InputError(f"the graph has no node {name[:LONGEST_NAME]!r}.")
    return write_json(folder / FILE, content, FORMAT, FORMAT_VERSION)


def _check(content: Any) -> None:
    """Refuse what is not {"pinned": [name], "supernodes": [{"name": text, "nodes": [name]}], thresholds from 0 to 1 where given}."""
    if not isinstance(content, dict) or not {"pinned", "supernodes"} <= set(content) <= {
        "pinned",
        "supernodes",
        *THRESHOLDS,
    }:
        raise InputError(
            "expected an object with pinned, supernodes and, if need be, node_threshold and edge_threshold."
        )
    if not _is_names(content["pinned"]):
        raise InputError("pinned must be a list of nodes' names.")
    if not isinstance(content["supernodes"], list) or not all(
        _is_supernode(one) for one in content["supernodes"]
    ):
        raise InputError(
            f"supernodes must be a list of objects with a name of 1 to {LONGEST_NAME} characters and nodes, a list of names."
        )
    members = [name for one in content["supernodes"] for name in one["nodes"]]
    if len(members) != len(set(members)):
        raise InputError("a node is in two supernodes.")
    for threshold in THRESHOLDS:
        value = content.get(threshold, 0)
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= 1:
            raise InputError(f"{threshold} must be a number from 0 to 1.")


def _is_names(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(name, str) for name in value)


def _is_supernode(value: Any) -> bool:
    if (
        not isinstance(value, dict)
        or set(value) != {"name", "nodes"}
        or not _is_names(value["nodes"])
    ):
        return False
    return isinstance(value["name"], str) and 0 < len(value["name"].strip()) <= LONGEST_NAME
