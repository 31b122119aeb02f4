"""Edges and their text form."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

from circuits.graph.nodes import Head, Node, parse_node
from circuits.system.errors import InputError
from circuits.system.kinds import expect, one_of
from circuits.system.numbers import shown

SLOTS = ("q", "k", "v")
NO_SLOT = -1
EDGE_PATTERN = re.compile(
    r"(?P<source>.+?)->(?P<target>[^@]+?)(?:\.(?P<slot>[qkv]))?(?P<position>@.+)?"
)


@dataclass(frozen=True)
class Edge:
    """An edge from a source, which writes, to a target, which reads.

    Attributes:
        slot: "q", "k" or "v" where the target is a head, else None.

    >>> str(Edge(Head(5, 5), Head(9, 9), "q"))
    'a5.h5->a9.h9.q'
    """

    source: Node
    target: Node
    slot: str | None = None

    def __post_init__(self) -> None:
        if not (isinstance(self.source, Node) and isinstance(self.target, Node)):
            given = f"{shown(self.source)} and {shown(self.target)}"
            raise InputError(
                f"an edge between {given}: give two nodes, such as circuits.MLP(0), or write "
                "circuits.parse_edge('m0->logits')."
            )
        if self.slot is not None:
            one_of(self.slot, "slot", SLOTS)

    def __str__(self) -> str:
        if self.slot is None:
            return f"{self.source}->{self.target}"
        target = str(self.target)
        label, at, position = target.partition("@")
        return f"{self.source}->{label}.{self.slot}{at}{position}"


EdgesOrTexts = Iterable[Edge | str]


def parse_edge(text: str) -> Edge:
    """The edge that `text` names. A slot may also be written as in EAP-IG: `a5.h5->a9.h9<q>`.

    Raises:
        InputError: the text names no edge.

    >>> parse_edge("a5.h5@S2->a9.h9.q@END").slot
    'q'
    """
    expect(text, str, "an edge's text", "write it like a5.h5->a9.h9.q")
    # a9.h9<q> becomes a9.h9.q; a position follows the slot, as in a9.h9.q@END.
    match = EDGE_PATTERN.fullmatch(re.sub(r"<([qkv])>$", r".\1", text.strip()))
    if match is None:
        raise InputError(
            f"{text!r} names no edge; edges are written like a5.h5->a9.h9.q, m0->logits or "
            "a5.h5@S2->a9.h9.q@END."
        )
    source = parse_node(match["source"])
    position, slot = match["position"] or "", match["slot"]
    target = parse_node(match["target"] + position)
    if isinstance(target, Head) != (slot is not None):
        raise InputError(
            f"{text!r} names no edge: a head is read in a slot, .q, .k or .v, and nothing else is; "
            "write for example a5.h5->a9.h9.q."
        )
    return Edge(source, target, slot)
