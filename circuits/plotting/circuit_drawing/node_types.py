"""Types of nodes, such as name movers, each with a colour and a symbol."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import cycle

from circuits.graph.circuit import Circuit
from circuits.graph.nodes import Node
from circuits.system.kinds import expect, text

# Type names by node, or by its text.
TypeNames = Mapping[Node | str, str] | None
# Paul Tol's light scheme: colour-blind readers can tell them apart, and dark text is readable on
# them. Types also differ in their symbols, for print without colour.
FILLS = (
    "#77aadd",
    "#ee8866",
    "#44bb99",
    "#ffaabb",
    "#bbcc33",
    "#99ddff",
    "#eedd88",
    "#aaaa00",
)
SYMBOLS = "\u25cf\u25c6\u25a0\u25b2\u25bc\u2605\u271a"


@dataclass(frozen=True)
class NodeType:
    """A type as it is drawn."""

    name: str
    fill: str
    symbol: str

    def label(self, text: str) -> str:
        """Write the symbol before a text."""
        return f"{self.symbol} {text}"

    @property
    def legend(self) -> str:
        """The symbol and the name."""
        return self.label(self.name)


def node_types(circuit: Circuit, types: TypeNames) -> dict[Node, NodeType]:
    """Return the type of each node that has one; None means those of a published circuit.

    Raises:
        InputError: `types` is no mapping to texts, or the circuit's graph lacks one of the nodes.
    """
    expect(types, Mapping | None, "types by node", "give {'a9.h9': 'name mover'}")
    if types is None:
        types = _published_types(circuit)
    # There are 8 colours and 7 symbols, so that 56 types look different.
    styles = zip(cycle(FILLS), cycle(SYMBOLS), strict=False)
    graph = circuit.graph
    known: dict[str, NodeType] = {}
    found = {}
    for given, name in types.items():
        if text(name, f"types[{given}]") not in known:
            known[name] = NodeType(name, *next(styles))
        chosen = graph.node_mask([given]).nonzero()
        for number in chosen.flatten().tolist():
            found[graph.nodes[number]] = known[name]
    return found


def _published_types(circuit: Circuit) -> dict[Node | str, str]:
    """Return the groups of a published circuit, by node."""
    record = circuit.record
    if record.get("method") != "published":
        return {}
    groups = record.get("groups", {})
    return {node: name for name in groups for node in groups[name]}
