"""What must be recomputed when edges change: which nodes, in which order, and at which tokens.

A node is recomputed only if

1. an edge into it changes, or a kept edge leads to it from a node that is recomputed; and
2. it still reaches the logits along kept edges.

It is recomputed at all tokens only if attention carries its output to other tokens: keys and
values are read at all tokens, any other input only where its own node is computed. Otherwise the
scored tokens are enough.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import compress, groupby
from operator import attrgetter

import numpy as np
import torch
from jaxtyping import Bool, Int
from torch import Tensor

from circuits.graph.nodes import MLP, Head, Logits
from circuits.models.layers.functional import HeadSelection
from circuits.running.edge_layout import EdgeLayout
from circuits.running.incremental.tokens import TokenSet, Window

Indices = Int[np.ndarray, " _"]
SourceMask = Bool[np.ndarray, " source"]
TargetMask = Bool[np.ndarray, " target"]
Edges = Bool[np.ndarray, "target source"]
SplitEdges = Bool[np.ndarray, "span target source"]


@dataclass(frozen=True, eq=False)
class TargetBlock:
    """Targets computed together: the q, k or v inputs of a layer's heads, its MLP, or the logits.

    Rows and sources are the numbers of the targets, and of the nodes that read them, in the edge
    layout. The logits are numbered as if they came after the last source.
    """

    layer: int  # -1 for the logits
    slot: str  # "q", "k", "v", "mlp" or "logits"
    n_nodes: int
    rows: slice
    sources: slice
    # Whether what each of its nodes writes depends on what all of them read.
    coupled: bool = False


Blocks = tuple[TargetBlock, ...]
KEYS = ("k", "v")


def target_blocks(layout: EdgeLayout, coupled: bool = False) -> Blocks:
    """All blocks of targets, in order of computation; the logits are the last.

    Args:
        coupled: whether the heads of a layer share a norm after attention.
    """
    nodes = (*layout.nodes, Logits())
    blocks: list[TargetBlock] = []
    row = 0
    for node, slot, n_nodes in layout.targets:
        layer, kind = -1, "logits"
        if isinstance(node, Head | MLP):
            layer, kind = node.layer, slot or "mlp"
        source = nodes.index(node)
        rows = slice(row, row + n_nodes)
        sources = slice(source, source + n_nodes)
        together = coupled and isinstance(node, Head)
        blocks.append(TargetBlock(layer, kind, n_nodes, rows, sources, together))
        row += n_nodes
    return tuple(blocks)


def sublayers(blocks: Blocks) -> Iterator[Blocks]:
    """The q, k and v blocks of each layer together; every other block alone."""
    for _, group in groupby(blocks, attrgetter("sources.start")):
        yield tuple(group)


def row_selection(rows: Indices, device: torch.device) -> HeadSelection:
    """Index rows of a tensor: with a slice, which copies nothing, if they are consecutive."""
    if len(rows):
        start = int(rows[0])
        stop = int(rows[-1]) + 1
        if stop - start == len(rows):
            return slice(start, stop)
    return torch.from_numpy(rows).to(device)


@dataclass(frozen=True, eq=False)
class Needs:
    """Which sources a circuit needs; the last entry stands for the logits."""

    # The sources that reach the logits.
    live: SourceMask
    # Those that reach the logits through a key or value: needed at all tokens.
    everywhere: SourceMask

    @staticmethod
    def of(blocks: Blocks, kept: Edges) -> Needs:
        """Follow the kept edges upstream from the logits."""
        n_sources = kept.shape[1]
        # The rows are `live` and `everywhere`.
        shape = (2, n_sources + 1)
        needed = np.zeros(shape, dtype=bool)
        needed[0, -1] = True
        for block in reversed(blocks):
            readers = needed[:, block.sources]
            if block.coupled:
                readers[:] = readers.any(1, keepdims=True)
            # The sources of live keys and values are needed everywhere, as all upstream of these.
            if block.slot in KEYS:
                readers = readers[:1]
            # A Boolean matrix product: the sources from which an edge leads to some reader.
            needed[:, :-1] |= readers @ kept[block.rows]
        live, everywhere = needed
        return Needs(live, everywhere)


@dataclass(frozen=True, eq=False)
class Place:
    """Some nodes of a block, numbered from its first, at some tokens."""

    block: TargetBlock
    nodes: HeadSelection
    tokens: TokenSet


@dataclass(frozen=True, eq=False)
class InputUpdate(Place):
    """New inputs for some nodes in one slot; `rows` are the targets in the edge layout."""

    rows: Indices
    # How many of `Plan.changed[tokens]` are recomputed before.
    n_changed: int
    # Whether edges into these nodes change, and not only outputs upstream of them.
    edges_change: bool


@dataclass(frozen=True, eq=False)
class Step(Place):
    """Recompute an MLP, the logits, or the heads of a layer for which the same slots change."""

    # The targets of these nodes; for heads, those of q, k and v.
    blocks: Blocks
    # The nodes as an array.
    numbers: Indices
    # The inputs that change.
    inputs: list[InputUpdate]

    @property
    def sources(self) -> list[int]:
        """The nodes as the edge layout numbers sources; the logits are none."""
        if self.block.slot == "logits":
            return []
        sources = self.block.sources.start + self.numbers
        return sources.tolist()


@dataclass(frozen=True, eq=False)
class Plan:
    """What to recompute, in order; the last step is the logits, if a change reaches them."""

    steps: list[Step]
    # The recomputed sources in order, by the tokens at which their change is known.
    changed: Mapping[TokenSet, list[int]]
    # Cache of the edges along which changes reach each input.
    weights: dict[InputUpdate, Tensor] = field(default_factory=dict)

    @property
    def into_logits(self) -> list[InputUpdate]:
        """The new input of the logits; none if no change reaches them."""
        if not self.steps or self.steps[-1].block.slot != "logits":
            return []
        return self.steps[-1].inputs


def make_plan(
    groups: Sequence[Blocks], window: Window, mask: SplitEdges, needs: Needs, targets: Indices
) -> Plan:
    """Plan a run of variants that keep edges of `mask`, and change edges into `targets`.

    Args:
        groups: the `sublayers` of the model.
    """
    kept = np.any(mask, axis=0)
    scored = window.scored
    plan = Plan([], {scored: [], window.all: []})
    edges_change = np.zeros(len(kept), dtype=bool)
    edges_change[targets] = True
    affected = edges_change.copy()
    changes = np.zeros_like(kept[0])
    first_target = min(targets, default=0)
    for group in groups:
        first, last = group[0].rows, group[-1].rows
        rows = slice(first.start, last.stop)
        # What is upstream of all targets stays as it is.
        if rows.stop <= first_target:
            continue
        # A kept edge from a changed source affects its target.
        from_changed = kept[rows] & changes
        affected[rows] |= from_changed.any(1)
        if not affected[rows].any():
            continue
        # Heads of a layer do not read each other: `changed` grows after all steps of the layer.
        steps = _sublayer_steps(plan, group, window, needs, affected[rows], edges_change)
        for step in list(steps):
            plan.steps.append(step)
            changes[step.sources] = True
            for tokens in {step.tokens, scored}:
                plan.changed[tokens] += step.sources
    return plan


def _sublayer_steps(
    plan: Plan,
    group: Blocks,
    window: Window,
    needs: Needs,
    affected: TargetMask,
    edges_change: Bool[np.ndarray, " every_target"],
) -> Iterator[Step]:
    """One step for all live nodes that have the same slots affected and need the same tokens."""
    sources = group[0].sources
    by_slot = affected.reshape(len(group), -1)
    if group[0].coupled:
        # All heads of the layer are computed anew, and read in the same slots.
        by_slot = np.broadcast_to(by_slot.any(1, keepdims=True), by_slot.shape)
    slots = by_slot & needs.live[sources]
    # The kind of a node as a number: a bit for each slot, and the lowest one for "everywhere".
    everywhere = needs.everywhere[sources] & slots.any(0)
    slot_bits = 2 << np.arange(len(group))
    kinds = slot_bits @ slots + everywhere
    for kind in sorted(set(kinds.tolist())):
        # No slot of these nodes is affected, or nothing needs them.
        if kind == 0:
            continue
        numbers = np.flatnonzero(kinds == kind)
        nodes = row_selection(numbers, window.readable.device)
        tokens = window.all if kind & 1 else window.scored
        inputs = []
        slots_of_kind = slots[:, numbers[0]]
        for block in compress(group, slots_of_kind):
            read_at = window.all if block.slot in KEYS else tokens
            rows = block.rows.start + numbers
            n_changed = len(plan.changed[read_at])
            into_rows = bool(edges_change[rows].any())
            inputs.append(InputUpdate(block, nodes, read_at, rows, n_changed, into_rows))
        yield Step(group[0], nodes, tokens, group, numbers, inputs)
