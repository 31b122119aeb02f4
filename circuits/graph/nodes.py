"""Nodes: the parts of a computation that write to, or read from, the residual stream.

Nodes are frozen values with a text form that round-trips: `parse_node(str(node)) == node`.

    embed  tok_embed  pos_embed  a9.h6  m3  logits        components
    f2.1204@5  e2@5  logits:1534@11                       transcoder features, errors, one logit
    a9.h6@END  m3@14                                      a node at a named span or at a position
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import ClassVar, TypeVar

from typing_extensions import override

from circuits.system.errors import InputError
from circuits.system.kinds import expect
from circuits.system.numbers import MOST_DIGITS, python_number, shown, whole

Position = str | int | None
"""A named span of each prompt, a position counted from 0, or None for all positions."""


@dataclass(frozen=True)
class Node:
    """Base class: a node has a text form and, optionally, a position."""

    pattern: ClassVar[str]

    def __post_init__(self) -> None:
        # Numbers of numpy and torch become Python's, so that equal nodes are equal. Most are that.
        for name, value in vars(self).items():
            may_be_text = name in ("position", "token")
            if type(value) is int or (may_be_text and isinstance(value, str | None)):
                continue
            if may_be_text and python_number(value) is None:
                raise InputError(f"{name}={shown(value)}: give a text or a whole number.")
            object.__setattr__(self, name, whole(value, name))

    def __str__(self) -> str:
        position: Position = getattr(self, "position", None)
        return self.label if position is None else f"{self.label}@{position}"

    @property
    def label(self) -> str:
        """The node's text without its position."""
        return type(self).pattern


@dataclass(frozen=True)
class TokenEmbed(Node):
    """The token embedding, in a graph that splits the embedding.

    >>> str(TokenEmbed())
    'tok_embed'
    """

    pattern: ClassVar[str] = "tok_embed"
    position: Position = None


@dataclass(frozen=True)
class PosEmbed(Node):
    """The learned position embedding, in a graph that splits the embedding.

    >>> str(PosEmbed(position=3))
    'pos_embed@3'
    """

    pattern: ClassVar[str] = "pos_embed"
    position: Position = None


@dataclass(frozen=True)
class Embed(Node):
    """The input of the first layer: token embedding plus position embedding.

    >>> str(Embed())
    'embed'
    """

    pattern: ClassVar[str] = "embed"
    position: Position = None


@dataclass(frozen=True)
class Head(Node):
    """An attention head: it writes its result and reads in three slots, q, k and v.

    >>> str(Head(layer=9, head=6, position="END"))
    'a9.h6@END'
    """

    pattern: ClassVar[str] = r"a(?P<layer>\d+)\.h(?P<head>\d+)"
    layer: int
    head: int
    position: Position = None

    @property
    @override
    def label(self) -> str:
        return f"a{self.layer}.h{self.head}"


@dataclass(frozen=True)
class MLP(Node):
    """An MLP: it writes its output, bias included, and reads the residual stream before its norm.

    >>> str(MLP(layer=3))
    'm3'
    """

    pattern: ClassVar[str] = r"m(?P<layer>\d+)"
    layer: int
    position: Position = None

    @property
    @override
    def label(self) -> str:
        return f"m{self.layer}"


@dataclass(frozen=True)
class Feature(Node):
    """A transcoder feature.

    >>> str(Feature(layer=2, index=1204, position=5))
    'f2.1204@5'
    """

    pattern: ClassVar[str] = r"f(?P<layer>\d+)\.(?P<index>\d+)"
    layer: int
    index: int
    position: Position = None

    @property
    @override
    def label(self) -> str:
        return f"f{self.layer}.{self.index}"


@dataclass(frozen=True)
class Error(Node):
    """The part of an MLP's output that the layer's transcoder does not explain.

    >>> str(Error(layer=2, position=5))
    'e2@5'
    """

    pattern: ClassVar[str] = r"e(?P<layer>\d+)"
    layer: int
    position: Position = None

    @property
    @override
    def label(self) -> str:
        return f"e{self.layer}"


@dataclass(frozen=True)
class Logits(Node):
    """The input of the final norm; with a `token`, one direction of the logits.

    Attributes:
        token: a token id, or a word such as `answer`.

    >>> str(Logits()), str(Logits(token=1534, position=11))
    ('logits', 'logits:1534@11')
    """

    pattern: ClassVar[str] = r"logits(?::(?P<token>[^@]+))?"
    token: str | int | None = None
    position: Position = None

    @property
    @override
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

    >>> parse_node("a9.h6@END")
    Head(layer=9, head=6, position='END')
    """
    expect(text, str, "a node's text", "write it like a9.h6")
    label, at, position = text.strip().partition("@")
    # "a9.h6@" has no position after the @.
    if bool(at) == bool(position):
        where = _number_or_text(position) if at else None
        # No label fits the patterns of two kinds.
        for kind in NODE_TYPES:
            match = re.fullmatch(kind.pattern, label)
            if match:
                values = {}
                for name, value in match.groupdict().items():
                    if value:
                        values[name] = _number_or_text(value)
                return kind(**values, position=where)  # type: ignore[call-arg]
    raise InputError(
        f"{text!r} names no node; nodes are written like embed, tok_embed, pos_embed, a9.h6, m3, "
        "logits, f2.1204@5 or a9.h6@END."
    )


def at_position(node: AnyNode, position: Position) -> AnyNode:
    """The same node at another position (None: at all positions)."""
    return replace(node, position=position)  # type: ignore[call-arg]


def check_position_name(name: str) -> None:
    """Refuse a span name that would not survive the text form of nodes and edges.

    Raises:
        InputError: the name is no text, empty, a number, or contains a character of the text form.
    """
    expect(name, str, "a span's name", "give a text such as 'S1'")
    if not name or name.isdecimal() or re.search(r"[@<>\s.\ud800-\udfff]|->", name):
        raise InputError(
            f"span name {name!r} cannot be used: it must not be empty, a number, or contain "
            "@ < > . spaces or half of a character; rename it."
        )


def _number_or_text(text: str) -> str | int:
    if not text.isdecimal():
        return text
    if len(text) > MOST_DIGITS:
        raise InputError(f"the number {text} names no node; give at most {MOST_DIGITS} digits.")
    return int(text)
