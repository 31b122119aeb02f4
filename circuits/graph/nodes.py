"""Nodes: the parts of a computation that write to, or read from, the residual stream.

Frozen values with a text form that round-trips: `parse_node(str(node)) == node`.

    embed  tok_embed  pos_embed  a9.h6  m3  logits        components
    f2.1204@5  e2@5  logits:1534@11                       transcoder features, errors, one logit
    a9.h6@END  m3@14                                      any of them at a named span or a position
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import ClassVar, TypeVar

from circuits.system.errors import InputError

Position = str | int | None
"""A named span of each prompt, a position counted from 0, or None: all positions."""


@dataclass(frozen=True)
class Node:
    """What every node has in common: a text form and, optionally, a position."""

    pattern: ClassVar[str]

    def __str__(self) -> str:
        position: Position = getattr(self, "position", None)
        return self.label if position is None else f"{self.label}@{position}"

    @property
    def label(self) -> str:
        """The node's text without its position."""
        return type(self).pattern


@dataclass(frozen=True)
class TokenEmbed(Node):
    """The token embedding alone, in a graph that splits the embedding."""

    pattern: ClassVar[str] = "tok_embed"
    position: Position = None


@dataclass(frozen=True)
class PosEmbed(Node):
    """The learned position embedding alone, in a graph that splits the embedding."""

    pattern: ClassVar[str] = "pos_embed"
    position: Position = None


@dataclass(frozen=True)
class Embed(Node):
    """What enters the first layer: token plus position embedding."""

    pattern: ClassVar[str] = "embed"
    position: Position = None


@dataclass(frozen=True)
class Head(Node):
    """An attention head: writes its result, reads in the slots q, k and v."""

    pattern: ClassVar[str] = r"a(?P<layer>\d+)\.h(?P<head>\d+)"
    layer: int
    head: int
    position: Position = None

    @property
    def label(self) -> str:
        return f"a{self.layer}.h{self.head}"


@dataclass(frozen=True)
class MLP(Node):
    """An MLP: writes its output with its bias, reads the residual stream before its norm."""

    pattern: ClassVar[str] = r"m(?P<layer>\d+)"
    layer: int
    position: Position = None

    @property
    def label(self) -> str:
        return f"m{self.layer}"


@dataclass(frozen=True)
class Feature(Node):
    """A transcoder feature."""

    pattern: ClassVar[str] = r"f(?P<layer>\d+)\.(?P<index>\d+)"
    layer: int
    index: int
    position: Position = None

    @property
    def label(self) -> str:
        return f"f{self.layer}.{self.index}"


@dataclass(frozen=True)
class Error(Node):
    """What a layer's transcoder leaves unexplained of the MLP's output."""

    pattern: ClassVar[str] = r"e(?P<layer>\d+)"
    layer: int
    position: Position = None

    @property
    def label(self) -> str:
        return f"e{self.layer}"


@dataclass(frozen=True)
class Logits(Node):
    """The input of the final norm; with a `token` (an id or a word such as `answer`) one direction of the logits."""

    pattern: ClassVar[str] = r"logits(?::(?P<token>[^@]+))?"
    token: str | int | None = None
    position: Position = None

    @property
    def label(self) -> str:
        return "logits" if self.token is None else f"logits:{self.token}"


NODE_TYPES: tuple[type[Node], ...] = (
    TokenEmbed,
    PosEmbed,
    Embed,
    Head,
    MLP,
    Feature,
    Error,
    Logits,
)

AnyNode = TypeVar("AnyNode", bound=Node)


def parse_node(text: str) -> Node:
    """The node that `text` names.

    Raises:
        InputError: the text names no node.
    """
    label, at, position = text.strip().partition("@")
    for kind in NODE_TYPES:
        match = re.fullmatch(kind.pattern, label)
        if match and bool(at) == bool(position):
            fields = {
                name: _integer_if_it_is_one(value)
                for name, value in match.groupdict().items()
                if value is not None
            }
            return kind(**fields, position=_integer_if_it_is_one(position) if at else None)  # type: ignore[call-arg]
    raise InputError(
        f"{text!r} names no node; nodes are written like embed, tok_embed, pos_embed, a9.h6, m3, logits, f2.1204@5 or a9.h6@END."
    )


def at_position(node: AnyNode, position: Position) -> AnyNode:
    """The same node at another position (None: at all of them)."""
    return replace(node, position=position)  # type: ignore[call-arg]


def check_position_name(name: str) -> None:
    """Refuse a span name that would not survive the text form of nodes and edges.

    Raises:
        InputError: the name is empty, a number, or holds one of the characters of the edge syntax.
    """
    if not name or name.isdecimal() or re.search(r"[@<>\s.]|->", name):
        raise InputError(
            f"span name {name!r} cannot be used: it must not be empty, a number, or contain @ < > . or spaces; rename it."
        )


def _integer_if_it_is_one(text: str) -> str | int:
    return int(text) if text.isdecimal() else text
