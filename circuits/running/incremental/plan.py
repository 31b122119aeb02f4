"""What must be recomputed when edges change: which nodes, in which order, and at which tokens.

A node is recomputed only if

1. an edge into it changes, or a kept edge leads to it from a node that is recomputed; and
2. it still reaches the logits along kept edges.

It is recomputed at all tokens only if attention carries its output to other tokens: keys and
values are read at all tokens, any other input only where its own node is computed. Otherwise the
scored tokens are enough.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from itertools import compress, groupby

import numpy as np
from jaxtyping import Bool, Int
from torch import Tensor

from circuits.graph.nodes import MLP, Head
from circuits.running.edge_layout import EdgeLayout
from circuits.running.incremental.tokens import TokenSet, Window

Indices = Int[np.ndarray, " _"]
SourceMask = Bool[np.ndarray, " source"]
TargetMask = Bool[np.ndarray, " target"]
Edges = Bool[np.ndarray, "target source"]
ChangedSources = Mapping[TokenSet, list[int]]


@dataclass(frozen=True)
class TargetBlock:
    """Targets computed together: the q, k or v inputs of a layer's heads, its MLP, or the logits.

    Attributes:
        layer: the layer; for the logits, the number of layers.
        slot: "q", "k" or "v"; None for an MLP and for the logits.
        row: the first of the targets, as the edge layout numbers them.
        n_nodes: the number of targets: one per head, otherwise one.
        source: the first of the nodes, as the layout numbers sources; None for the logits.
    """

    layer: int
    slot: str | None
    row: int
    n_nodes: int
    source: int | None

    @property
    def rows(self) -> slice:
        """The targets, in the edge layout."""
        return slice(self.row, self.row + self.n_nodes)

    @property
    def sources(self) -> slice:
        """The nodes that read these inputs, as sources in the edge layout."""
        assert self.source is not None
        return slice(self.source, self.source + self.n_nodes)


Blocks = tuple[TargetBlock, ...]


def target_blocks(layout: EdgeLayout) -> Blocks:
    """All blocks of targets, in order of computation."""
    blocks: list[TargetBlock] = []
    row = layer = 0
    for node, slot, n_nodes in layout.targets:
        source = None
        layer += 1
        if isinstance(node, Head | MLP):
            layer, source = node.layer, layout.nodes.index(node)
        blocks.append(TargetBlock(layer, slot, row, n_nodes, source))
        row += n_nodes
    return tuple(blocks)


def sublayers(blocks: Blocks) -> Iterator[Blocks]:
    """The q, k and v blocks of each layer together; every other block alone."""
    for _, group in groupby(blocks, lambda block: (block.layer, block.slot is None)):
        yield tuple(group)


@dataclass(frozen=True, eq=False)
class Needs:
    """Which sources a circuit needs.

    Attributes:
        live: the sources that reach the logits.
        everywhere: those that reach the logits through a key or value: needed at all tokens.
    """

    live: SourceMask
    everywhere: SourceMask

    @staticmethod
    def of(blocks: Blocks, kept: Edges) -> Needs:
        """Follow the kept edges upstream from the logits."""
        # Needed everywhere are the sources of live keys and values, and all upstream of these.
        live = np.zeros(kept.shape[1], dtype=bool)
        everywhere = live.copy()
        for block in reversed(blocks):
            edges = kept[block.rows]
            if block.source is None:
                live |= edges[0]
                continue
            readers = live[block.sources]
            # Boolean matrix products: the sources from which an edge leads to some reader.
            live |= readers @ edges
            if block.slot not in ("k", "v"):
                readers = everywhere[block.sources]
            everywhere |= readers @ edges
        return Needs(live, everywhere)


@dataclass(frozen=True, eq=False)
class InputUpdate:
    """New inputs for some nodes in one slot.

    Attributes:
        rows: the targets that change, as the edge layout numbers them.
        tokens: where the inputs are needed.
        n_changed: how many of `Plan.changed[tokens]` are recomputed before.
    """

    block: TargetBlock
    rows: Indices
    tokens: TokenSet
    n_changed: int


@dataclass(frozen=True, eq=False)
class Step:
    """Recompute an MLP, the logits, or the heads of a layer for which the same slots change.

    Attributes:
        blocks: the targets of these nodes; for heads, those of q, k and v.
        nodes: the nodes to recompute, numbered from the first of a block.
        tokens: where their outputs are needed.
        inputs: the inputs that change.
    """

    blocks: Blocks
    nodes: Indices
    tokens: TokenSet
    inputs: tuple[InputUpdate, ...]

    @property
    def block(self) -> TargetBlock:
        """The first block of targets."""
        return self.blocks[0]

    @property
    def sources(self) -> list[int]:
        """The nodes as the edge layout numbers sources; the logits are none."""
        first = self.block.source
        return [] if first is None else (first + self.nodes).tolist()


@dataclass(frozen=True, eq=False)
class Plan:
    """What to recompute.

    Attributes:
        steps: in order; the last one is the logits, if a change reaches them.
        changed: the recomputed sources in order, by the tokens at which their change is known.
        weights: cache of the edges along which changes reach each input.
    """

    steps: tuple[Step, ...]
    changed: Mapping[TokenSet, Indices]
    weights: dict[InputUpdate, tuple[Tensor | None, bytes]] = field(default_factory=dict)


def make_plan(blocks: Blocks, window: Window, kept: Edges, targets: Indices) -> Plan:
    """Plan a run of variants that keep edges among `kept`, and change edges into `targets`."""
    steps: list[Step] = []
    changed: dict[TokenSet, list[int]] = {window.scored: [], window.all: []}
    needs = Needs.of(blocks, kept)
    affected = np.zeros(len(kept), dtype=bool)
    affected[targets] = True
    # Nothing changes upstream of the first of the targets.
    first = targets[0] if len(targets) else len(kept)
    for group in sublayers(blocks):
        rows = slice(group[0].rows.start, group[-1].rows.stop)
        if rows.stop <= first:
            continue
        # A kept edge from a changed source affects its target.
        if changed[window.scored]:
            affected[rows] |= kept[rows][:, changed[window.scored]].any(1)
        # Heads of a layer do not read each other: `changed` grows after all steps of the layer.
        new_steps = list(_sublayer_steps(group, window, needs, affected, changed))
        for step in new_steps:
            for tokens in {step.tokens, window.scored}:
                changed[tokens] += step.sources
        steps += new_steps
    sources = {tokens: np.array(found, dtype=int) for tokens, found in changed.items()}
    return Plan(tuple(steps), sources)


def _sublayer_steps(
    group: Blocks, window: Window, needs: Needs, affected: TargetMask, changed: ChangedSources
) -> Iterator[Step]:
    """One step for all live nodes that have the same slots affected and need the same tokens."""
    block = group[0]
    live, everywhere = np.array([True]), np.array([False])
    if block.source is not None:
        live, everywhere = needs.live[block.sources], needs.everywhere[block.sources]
    slots = np.stack([affected[block.rows] for block in group]) & live
    # The kind of a node as a number: a bit for each slot, and the lowest one for "everywhere".
    kinds = (2 << np.arange(len(group))) @ slots + everywhere * slots.any(0)
    for kind in sorted(set(kinds.tolist()) - {0}):
        nodes = np.flatnonzero(kinds == kind)
        tokens = window.all if kind & 1 else window.scored
        inputs = []
        for block in compress(group, slots[:, nodes[0]]):
            read_at = window.all if block.slot in ("k", "v") else tokens
            n_changed = len(changed[read_at])
            inputs.append(InputUpdate(block, block.row + nodes, read_at, n_changed))
        yield Step(group, nodes, tokens, tuple(inputs))
