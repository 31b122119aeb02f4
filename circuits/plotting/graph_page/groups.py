"""Pinned nodes, supernodes and thresholds that a reader chose, kept in `groups.json`."""

from __future__ import annotations

from itertools import chain
from pathlib import Path
from typing import Annotated, Any, NotRequired

from pydantic import ConfigDict, Field, TypeAdapter, ValidationError, with_config
from typing_extensions import TypedDict

from circuits.plotting.graph_page.data import GraphData
from circuits.system.errors import InputError
from circuits.system.files import read_json, write_json

FILE = "groups.json"
FORMAT, FORMAT_VERSION = "circuits.graph_groups", 1
MAX_NAME_LENGTH = 200
STRICT = ConfigDict(extra="forbid", strict=True)
Share = Annotated[float, Field(ge=0, le=1)]


@with_config(STRICT)
class Supernode(TypedDict):
    """A named group of nodes."""

    name: Annotated[str, Field(pattern=r"\S", max_length=MAX_NAME_LENGTH)]
    nodes: list[str]


@with_config(STRICT)
class Groups(TypedDict):
    """What a reader chose; a threshold is missing if it was not changed."""

    pinned: list[str]
    supernodes: list[Supernode]
    node_threshold: NotRequired[Share]
    edge_threshold: NotRequired[Share]


SCHEMA = TypeAdapter(Groups)
FORM = (
    "expected an object with pinned, supernodes and optionally node_threshold and edge_threshold."
)
PROBLEMS = {
    "pinned": "pinned must be a list of nodes' names.",
    "supernodes": "supernodes must be a list of objects with a name of 1 to "
    f"{MAX_NAME_LENGTH} characters and nodes, a list of names.",
    "node_threshold": "node_threshold must be a number from 0 to 1.",
    "edge_threshold": "edge_threshold must be a number from 0 to 1.",
}


def load_groups(folder: Path, data: GraphData) -> Groups:
    """Read what `save_groups` wrote, without the nodes that the graph does not have.

    Raises:
        InputError: the file is damaged, of another kind, or from a newer version.
    """
    path = folder / FILE
    if not path.exists():
        return {"pinned": [], "supernodes": []}
    content = read_json(path, FORMAT, FORMAT_VERSION)
    try:
        groups = _checked(content)
    except InputError as error:
        raise InputError(f"{path}: {error} Correct the file or move it away.") from error
    is_known = data.numbers.__contains__
    groups["pinned"] = list(filter(is_known, groups["pinned"]))
    for supernode in groups["supernodes"]:
        supernode["nodes"] = list(filter(is_known, supernode["nodes"]))
    groups["supernodes"] = [one for one in groups["supernodes"] if one["nodes"]]
    return groups


def save_groups(folder: Path, data: GraphData, content: Any) -> Path:
    """Check the groups that a page sent and write `groups.json` atomically; return its path.

    Raises:
        InputError: `content` does not have the form of `Groups`, or names a node that the graph
            does not have.
    """
    groups = _checked(content)
    # A name that is too long for a node would fill the error message.
    for name in grouped_names(groups):
        if name not in data.numbers:
            raise InputError(f"the graph has no node {name[:MAX_NAME_LENGTH]!r}.")
    return write_json(folder / FILE, groups, FORMAT, FORMAT_VERSION)


def grouped_names(groups: Groups) -> list[str]:
    """Return the names of all pinned and grouped nodes."""
    return [*groups["pinned"], *_members(groups)]


def _members(groups: Groups) -> list[str]:
    members = [supernode["nodes"] for supernode in groups["supernodes"]]
    return list(chain(*members))


def _checked(content: Any) -> Groups:
    try:
        groups = SCHEMA.validate_python(content)
    except ValidationError as error:
        problem = error.errors()[0]
        field, *inside = problem["loc"] or [None]
        is_absent = problem["type"] == "missing" and not inside
        reason = FORM if is_absent else PROBLEMS.get(str(field), FORM)
        raise InputError(reason) from error
    members = _members(groups)
    if len(members) != len(set(members)):
        raise InputError("a node is in two supernodes.")
    return groups
