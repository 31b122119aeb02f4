"""Graphs: which edges can exist in a model's computation.

An edge goes from a source (a node that writes) to a target (a node that reads; a head reads in three slots, q, k, v).
A graph holds its edges as columns of integers into its nodes, so that two million edges are three small tensors; `Edge`
values are made on demand. Graph order is the order of computation: targets from the first layer to the logits (a head's q, k, v in turn),
for each its sources in the same order.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import torch
from jaxtyping import Bool, Int
from torch import Tensor

from circuits.graph.edges import NO_SLOT, SLOTS, Edge, parse_edge
from circuits.graph.identity import ModelIdentity, TranscodersIdentity
from circuits.graph.nodes import Embed, Head, Logits, Node, PosEmbed, TokenEmbed
from circuits.system.errors import InputError


@dataclass(frozen=True, eq=False)
class Graph:
    """Edges as columns of integers into `nodes`.

    Attributes:
        nodes: every node, in order of computation.
        source, target: indices into `nodes`, one per edge.
        slot: 0, 1, 2 for q, k, v; -1 where the target has no slots.
        positions: the spans that edges are split by (names, or numbers), in order; None when they are not split.
        causal: whether a head's output at a position depends on what it reads at earlier ones only.
        model: the model the graph was made from, if it was made from one.
        transcoders: whose features are nodes, in a graph of features.
    """

    nodes: tuple[Node, ...]
    source: Int[Tensor, " edge"]
    target: Int[Tensor, " edge"]
    slot: Int[Tensor, " edge"]
    positions: tuple[str | int, ...] | None = None
    causal: bool = True
    model: ModelIdentity | None = field(default=None)
    transcoders: TranscodersIdentity | None = None

    @staticmethod
    def empty(model: ModelIdentity | None = None) -> Graph:
        """A graph of nothing, for methods that make their own."""
        nothing = torch.zeros(0, dtype=torch.long)
        return Graph((), nothing, nothing, nothing, model=model)

    def __len__(self) -> int:
        return len(self.source)

    def __eq__(self, other: object) -> bool:
        """Equal when the same edges stand in the same order; the model they came from does not matter."""
        if not isinstance(other, Graph):
            return NotImplemented
        same_nodes = self is other or (
            self.nodes == other.nodes
            and self.positions == other.positions
            and len(self) == len(other)
        )
        return same_nodes and all(
            torch.equal(a, b) for a, b in zip(self._columns, other._columns, strict=True)
        )

    __hash__ = None  # type: ignore[assignment]

    @cached_property
    def edges(self) -> tuple[Edge, ...]:
        """Every edge, in graph order."""
        columns = zip(self.source.tolist(), self.target.tolist(), self.slot.tolist(), strict=True)
        return tuple(
            Edge(self.nodes[u], self.nodes[r], None if s == NO_SLOT else SLOTS[s])
            for u, r, s in columns
        )

    @cached_property
    def node_index(self) -> dict[Node, int]:
        """Where each node stands in `nodes`."""
        return {node: index for index, node in enumerate(self.nodes)}

    def index(self, edge: Edge | str) -> int:
        """Where `edge` stands in graph order.

        Raises:
            InputError: the graph has no such edge.
        """
        edge = parse_edge(edge) if isinstance(edge, str) else edge
        if edge not in self._edge_index:
            raise InputError(f"the graph has no edge {edge}: {self._why_not(edge)}")
        return self._edge_index[edge]

    def mask(self, edges: Sequence[Edge | str]) -> Bool[Tensor, " edge"]:
        """True for the given edges.

        Raises:
            InputError: the graph lacks one of them.
        """
        kept = torch.zeros(len(self), dtype=torch.bool)
        kept[[self.index(edge) for edge in edges]] = True
        return kept

    def reaching_logits(self, kept: Bool[Tensor, " edge"]) -> Bool[Tensor, " edge"]:
        """The kept edges from which a path of kept edges leads to the logits."""
        # In numpy, whose operations on so few numbers take a fraction of the time.
        standing, source, target = kept.numpy(), self.source.numpy(), self.target.numpy()
        matters = np.array([isinstance(node, Logits) for node in self.nodes])
        crossed = np.zeros_like(standing)
        while True:
            reads = matters[target]
            if self.positions is not None:
                reads = np.where(
                    self._moves.numpy(),
                    self._earlier(torch.from_numpy(matters)).numpy()[target],
                    reads,
                )
            if np.array_equal(reads := reads & standing, crossed):
                return torch.from_numpy(crossed)
            crossed = reads
            matters[source[crossed]] = True

    def reached_from_inputs(self, kept: Bool[Tensor, " edge"]) -> Bool[Tensor, " edge"]:
        """The kept edges to which a path of kept edges leads from an embedding."""
        written = torch.tensor(
            [isinstance(node, Embed | TokenEmbed | PosEmbed) for node in self.nodes]
        )
        crossed = torch.zeros_like(kept)
        while True:
            if torch.equal(kept & written[self.source], crossed):
                return crossed
            crossed = kept & written[self.source]
            moved = torch.zeros_like(written)
            moved[self.target[crossed & self._moves]] = True
            written[self.target[crossed & ~self._moves]] = True
            written |= self._later(moved)

    @property
    def _columns(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.source, self.target, self.slot

    @cached_property
    def _edge_index(self) -> dict[Edge, int]:
        return {edge: index for index, edge in enumerate(self.edges)}

    def _why_not(self, edge: Edge) -> str:
        for node in (edge.source, edge.target):
            if node not in self.node_index:
                some = ", ".join(str(known) for known in self.nodes[:3])
                return f"it has no node {node}; it has {some}, ... {self.nodes[-1]} ({len(self.nodes)} nodes)."
        return f"{edge.source} does not write where {edge.target} reads; sources stand before their targets."

    @cached_property
    def _moves(self) -> Bool[Tensor, " edge"]:
        """Edges read through k or v: attention carries what they bring to other positions."""
        return self.slot > 0

    @cached_property
    def _steps(self) -> tuple[Int[Tensor, " step"], Int[Tensor, " step"]]:
        """Where attention may carry information: from a node that reads to the same node writing at a later position.

        Spans have no order that holds for every prompt, so between named spans every step is allowed.
        """
        copies: dict[str, list[tuple[int, Node]]] = {}
        for index, node in enumerate(self.nodes):
            copies.setdefault(node.label, []).append((index, node))
        steps = [
            (i, j)
            for group in copies.values()
            for i, a in group
            for j, b in group
            if i == j or (isinstance(a, Head) and self._attends(b, a))
        ]
        read, written = torch.tensor(steps, dtype=torch.long).reshape(-1, 2).T
        return read, written

    def _attends(self, query: Node, key: Node) -> bool:
        q, k = query.position, key.position  # type: ignore[attr-defined]
        return not (self.causal and isinstance(q, int) and isinstance(k, int)) or k <= q

    def _earlier(self, written: Bool[Tensor, " node"]) -> Bool[Tensor, " node"]:
        read, write = self._steps
        return torch.zeros_like(written).index_fill_(0, read[written[write]], True)

    def _later(self, moved: Bool[Tensor, " node"]) -> Bool[Tensor, " node"]:
        read, write = self._steps
        return torch.zeros_like(moved).index_fill_(0, write[moved[read]], True)


def graph_from_triples(
    nodes: Sequence[Node],
    edges: Sequence[tuple[int, int, int]],
    *,
    positions: tuple[str | int, ...] | None = None,
    causal: bool = True,
    model: ModelIdentity | None = None,
) -> Graph:
    """A graph from (source index, target index, slot or -1) triples."""
    columns = torch.tensor(edges, dtype=torch.long).reshape(-1, 3)
    source, target, slot = columns.T.contiguous().unbind(0)
    return Graph(tuple(nodes), source, target, slot, positions, causal, model)
