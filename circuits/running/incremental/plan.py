"""What changes in a model when edges do: the nodes downstream that must be computed again, and at which tokens.

A node is computed again only if a changed node reaches it along kept edges and it still reaches the logits. It is computed at every token
of the window (`wide`) only if something reads it there: keys and values are read at all tokens, queries and MLPs where their own output is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from jaxtyping import Bool, Int
from torch import Tensor

from circuits.graph.edges import SLOTS
from circuits.graph.nodes import MLP, Head
from circuits.running.edge_layout import EdgeLayout


@dataclass(frozen=True)
class Place:
    """Where a target of a layer stands among the rows and the sources of a layout.

    Attributes:
        layer: its layer; the number of layers for the logits.
        slot: q, k or v; None for MLP and logits.
        row: its first row, one per head.
        rows: how many.
        source: where what it writes stands among the sources; None for the logits.
    """

    layer: int
    slot: str | None
    row: int
    rows: int
    source: int | None

    @property
    def own(self) -> slice:
        """The sources that it writes."""
        assert self.source is not None
        return slice(self.source, self.source + self.rows)


def places(layout: EdgeLayout) -> tuple[Place, ...]:
    """Every group of targets, in order of computation."""
    result, row, layer = [], 0, 0
    for node, slot, count in layout.targets:
        if isinstance(node, Head | MLP):
            layer = node.layer
            result.append(Place(layer, slot, row, count, layout.nodes.index(node)))
        else:
            result.append(Place(layer + 1, None, row, count, None))
        row += count
    return tuple(result)


@dataclass(frozen=True, eq=False)
class Needs:
    """Which sources reach the logits, and which of them are read at every token."""

    live: Bool[np.ndarray, " source"]
    wide: Bool[np.ndarray, " source"]

    @staticmethod
    def of(layout_places: tuple[Place, ...], kept: Bool[np.ndarray, "target source"]) -> Needs:
        """From the edges that are kept, walking up from the logits."""
        # A set of sources is a number with a bit for each: a graph has many short rows, on which numpy's operations are mostly overhead.
        packed = np.packbits(kept, axis=1, bitorder="little").tobytes()
        width = len(packed) // len(kept)
        reads = [
            int.from_bytes(packed[start : start + width], "little")
            for start in range(0, len(packed), width)
        ]
        live = wide = 0
        for place in reversed(layout_places):
            if place.source is None:
                live |= reads[place.row]
                continue
            live_here, wide_here = live >> place.source, wide >> place.source
            for offset in range(place.rows):
                if live_here >> offset & 1:
                    read = reads[place.row + offset]
                    live |= read
                    if place.slot in ("k", "v") or wide_here >> offset & 1:
                        wide |= read
        return Needs(*(_members(bits, kept.shape[1]) for bits in (live, wide)))


def _members(bits: int, size: int) -> Bool[np.ndarray, " source"]:
    packed = np.frombuffer(bits.to_bytes(-(-size // 8), "little"), dtype=np.uint8)
    return np.unpackbits(packed, count=size, bitorder="little").astype(bool)


@dataclass(frozen=True, eq=False)
class Read:
    """New inputs of some rows of one place.

    Attributes:
        place: the place.
        rows: of the layout.
        wide: at every token, or at the scored ones.
        changed: how many changed sources there are so far: all of them, or those that are wide.
    """

    place: Place
    rows: Int[np.ndarray, " row"]
    wide: bool
    changed: int


@dataclass(frozen=True, eq=False)
class Step:
    """Some heads of a layer whose same slots changed, an MLP, or the logits.

    Attributes:
        reads: the inputs that changed; for heads one or more of q, k, v.
        sources: what is computed, among the sources; empty for the logits.
        wide: at which tokens.
    """

    reads: tuple[Read, ...]
    sources: Int[np.ndarray, " source"]
    wide: bool

    @property
    def layer(self) -> int:
        """Where it is; the number of layers for the logits."""
        return self.reads[0].place.layer


@dataclass(frozen=True, eq=False)
class Plan:
    """What to compute, in order.

    Attributes:
        steps: the last one is the logits', unless nothing reaches them.
        changed: the sources that change, in the order in which they are computed.
        wide: those of them that are read at every token.
        weights: which changed sources each read sums, kept from run to run.
    """

    steps: tuple[Step, ...]
    changed: Int[np.ndarray, " changed"]
    wide: Int[np.ndarray, " wide"]
    weights: dict[Read, Tensor] = field(default_factory=dict)


def plan(
    layout_places: tuple[Place, ...],
    kept: Bool[np.ndarray, "target source"],
    needs: Needs,
    flipped: Bool[np.ndarray, " target"],
) -> Plan:
    """What to compute when edges into some rows change.

    Args:
        kept: edges kept in any variant [target, source].
        flipped: rows into which edges change [target].
    """
    steps: list[Step] = []
    changed: list[int] = []
    wide: list[int] = []
    touched = flipped.copy()
    if not touched.any():
        return Plan((), np.array([], dtype=int), np.array([], dtype=int))

    def reads(place: Place, rows: Any, at_all: bool) -> Read:
        return Read(place, rows, at_all, len(wide if at_all else changed))

    # Whole layers of heads at a time, from the first with a flipped row.
    first = int(touched.argmax())
    index = next(
        i
        for i, place in enumerate(layout_places)
        if place.row + (3 if place.slot == "q" else 1) * place.rows > first
    )
    while index < len(layout_places):
        group = layout_places[index : index + (len(SLOTS) if layout_places[index].slot else 1)]
        index += len(group)
        here = slice(group[0].row, group[-1].row + group[-1].rows)
        if changed:
            touched[here] |= kept[here][:, changed].any(1)
        if not touched[here].any():
            continue
        found = list(_steps(group, touched, needs, reads))
        steps += found
        for step in found:
            changed += step.sources.tolist()
            wide += step.sources.tolist() if step.wide else []
    return Plan(tuple(steps), np.array(changed, dtype=int), np.array(wide, dtype=int))


def _steps(
    group: tuple[Place, ...],
    touched: Bool[np.ndarray, " target"],
    needs: Needs,
    reads: Callable[[Place, Any, bool], Read],
) -> Iterator[Step]:
    """The heads of a layer sorted by which of their slots changed and where they are needed; or the MLP; or the logits."""
    first = group[0]
    if first.source is None:
        yield Step((reads(first, np.array([first.row]), False),), np.array([], dtype=int), False)
        return
    heads = np.arange(first.rows)
    own = first.own
    slots = np.stack([touched[place.row : place.row + place.rows] for place in group])
    kinds = slots.T.astype(int) @ (1 << np.arange(len(group))) * 2 + needs.wide[own]
    kinds[~needs.live[own] | ~slots.any(0)] = 0
    for kind in sorted({kind for kind in kinds.tolist() if kind > 1}):
        chosen, at_all = heads[kinds == kind], bool(kind % 2)
        made = tuple(
            reads(place, place.row + chosen, at_all or place.slot in ("k", "v"))
            for bit, place in enumerate(group)
            if (kind // 2) >> bit & 1
        )
        yield Step(made, first.source + chosen, at_all)
