"""Graphs: which edges can exist in a model's computation.

A graph stores its edges as columns of integers into its nodes, so that two million edges are three
small tensors; `Edge` values are made when asked for. Graph order is the order of computation:
targets from the first layer to the logits (a head's q, k and v in turn), and for each target its
sources in the same order.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import product
from typing import ClassVar

import numpy as np
import torch
from jaxtyping import Bool, Int
from torch import Tensor

from circuits.graph.edges import NO_SLOT, SLOTS, Edge, parse_edge
from circuits.graph.identity import ModelIdentity, TranscodersIdentity
from circuits.graph.nodes import Embed, Head, Logits, Node, PosEmbed, TokenEmbed
from circuits.system.errors import InputError

EdgeIndex = Int[Tensor, " edge"]
EdgeMask = Bool[Tensor, " edge"]
NodeMask = Bool[Tensor, " node"]


@dataclass(frozen=True, eq=False)
class Graph:
    """Edges between the components of a model, as columns of integers into `nodes`.

    Attributes:
        nodes: every node, in order of computation.
        source, target: indices into `nodes`, one per edge.
        slot: 0, 1, 2 for q, k, v; -1 where the target has no slots.
        positions: the spans that edges are split by (names or numbers), or None.
        causal: whether a head's output depends only on earlier positions.
        model: the model the graph was made from, if any.

    >>> import circuits
    >>> graph = circuits.component_graph(circuits.load_model("toy-world"))
    >>> len(graph), str(graph.edges[0]), graph.index("m3->logits")
    (479, 'embed->a0.h0.q', 478)
    """

    # Executors that can run this kind of graph, the preferred one first.
    executors: ClassVar[tuple[str, ...]] = ("incremental", "hooks")

    nodes: tuple[Node, ...]
    source: EdgeIndex
    target: EdgeIndex
    slot: EdgeIndex
    positions: tuple[str | int, ...] | None = None
    causal: bool = True
    model: ModelIdentity | None = field(default=None)

    @staticmethod
    def empty(model: ModelIdentity | None = None) -> Graph:
        """A graph without edges, for methods that make their own graph."""
        none = torch.zeros(0, dtype=torch.long)
        return Graph((), none, none, none, model=model)

    def __len__(self) -> int:
        return len(self.source)

    def __eq__(self, other: object) -> bool:
        """Equal if the same edges come in the same order, whichever model they are from."""
        if self is other:
            return True
        if not isinstance(other, Graph):
            return NotImplemented
        if self.positions != other.positions or len(self) != len(other):
            return False
        columns = zip(self._columns, other._columns, strict=True)
        return self.nodes == other.nodes and all(torch.equal(a, b) for a, b in columns)

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        split = "" if self.positions is None else f", split by {len(self.positions)} positions"
        return f"{type(self).__name__}({len(self.nodes)} nodes, {len(self):,} edges{split})"

    def _repr_html_(self) -> str:
        first, last = (self.nodes[0], self.nodes[-1]) if self.nodes else ("", "")
        return f"<p><b>{self!r}</b></p><p>from <code>{first}</code> to <code>{last}</code></p>"

    @cached_property
    def edges(self) -> tuple[Edge, ...]:
        """Every edge, in graph order."""
        slots = {index: name for index, name in enumerate(SLOTS)} | {NO_SLOT: None}
        rows = zip(*(column.tolist() for column in self._columns), strict=True)
        return tuple(Edge(self.nodes[u], self.nodes[r], slots[slot]) for u, r, slot in rows)

    @cached_property
    def node_index(self) -> dict[Node, int]:
        """The index of each node in `nodes`."""
        return {node: index for index, node in enumerate(self.nodes)}

    @cached_property
    def splits_embedding(self) -> bool:
        """Whether token and position embedding are nodes of their own."""
        return any(isinstance(node, TokenEmbed | PosEmbed) for node in self.nodes)

    def __contains__(self, edge: Edge | str) -> bool:
        edge = parse_edge(edge) if isinstance(edge, str) else edge
        return edge in self._edge_index

    def index(self, edge: Edge | str) -> int:
        """The position of `edge` in graph order.

        Raises:
            InputError: the graph has no such edge.
        """
        edge = parse_edge(edge) if isinstance(edge, str) else edge
        if edge not in self._edge_index:
            raise InputError(f"the graph has no edge {edge}: {self._why_not(edge)}")
        return self._edge_index[edge]

    def mask(self, edges: Sequence[Edge | str]) -> EdgeMask:
        """True for the given edges.

        Raises:
            InputError: the graph lacks one of them.
        """
        kept = torch.zeros(len(self), dtype=torch.bool)
        kept[[self.index(edge) for edge in edges]] = True
        return kept

    def reaching_logits(self, kept: EdgeMask) -> EdgeMask:
        """The kept edges from which a path of kept edges leads to the logits."""
        # numpy, whose operations on this few numbers take a fraction of torch's time.
        kept_edges, source, target = kept.numpy(), self.source.numpy(), self.target.numpy()
        matters = np.array([isinstance(node, Logits) for node in self.nodes])
        crossed = np.zeros_like(kept_edges)
        while True:
            read = matters[target]
            if self.positions is not None:
                # What a head reads through k or v matters if its output at a later position does.
                carried = self._any_later(torch.from_numpy(matters)).numpy()
                read = np.where(self._moves_positions.numpy(), carried[target], read)
            read = read & kept_edges
            if np.array_equal(read, crossed):
                return torch.from_numpy(crossed)
            crossed = read
            matters[source[crossed]] = True

    def reached_from_inputs(self, kept: EdgeMask) -> EdgeMask:
        """The kept edges to which a path of kept edges leads from an embedding."""
        inputs = Embed | TokenEmbed | PosEmbed
        reached = torch.tensor([isinstance(node, inputs) for node in self.nodes])
        crossed = torch.zeros_like(kept)
        while True:
            now = kept & reached[self.source]
            if torch.equal(now, crossed):
                return crossed
            crossed = now
            reached[self.target[crossed & ~self._moves_positions]] = True
            moved = torch.zeros_like(reached)
            moved[self.target[crossed & self._moves_positions]] = True
            reached |= self._spread_later(moved)

    @property
    def _columns(self) -> tuple[EdgeIndex, EdgeIndex, EdgeIndex]:
        return self.source, self.target, self.slot

    @cached_property
    def _edge_index(self) -> dict[Edge, int]:
        return {edge: index for index, edge in enumerate(self.edges)}

    def _why_not(self, edge: Edge) -> str:
        for node in (edge.source, edge.target):
            if node not in self.node_index:
                first = ", ".join(map(str, self.nodes[:3]))
                count = len(self.nodes)
                return (
                    f"it has no node {node}; it has {first}, ... {self.nodes[-1]} ({count} nodes)."
                )
        return (
            f"{edge.source} does not write where {edge.target} reads; sources come before targets."
        )

    @cached_property
    def _moves_positions(self) -> EdgeMask:
        """Edges read through k or v: attention carries what they bring to other positions."""
        return self.slot > 0

    @cached_property
    def _attention_steps(self) -> tuple[Int[Tensor, " step"], Int[Tensor, " step"]]:
        """Pairs (a node where it reads, the same node where attention writes).

        Named spans have no order that holds for every prompt, so attention may carry information
        between any two of them.
        """
        by_component: dict[str, list[int]] = {}
        for index, node in enumerate(self.nodes):
            by_component.setdefault(node.label, []).append(index)
        pairs = [pair for same in by_component.values() for pair in product(same, repeat=2)]
        steps = [(read, write) for read, write in pairs if self._attends(write, read)]
        read, write = torch.tensor(steps, dtype=torch.long).reshape(-1, 2).T
        return read, write

    def _attends(self, query_node: int, key_node: int) -> bool:
        if query_node == key_node:
            return True
        if not isinstance(self.nodes[query_node], Head):
            return False
        ends = (self.nodes[query_node], self.nodes[key_node])
        query, key = (node.position for node in ends)  # type: ignore[attr-defined]
        ordered = self.causal and isinstance(query, int) and isinstance(key, int)
        return not ordered or key <= query

    def _any_later(self, written: NodeMask) -> NodeMask:
        read, write = self._attention_steps
        return torch.zeros_like(written).index_fill_(0, read[written[write]], True)

    def _spread_later(self, read_at: NodeMask) -> NodeMask:
        read, write = self._attention_steps
        return torch.zeros_like(read_at).index_fill_(0, write[read_at[read]], True)


@dataclass(frozen=True, eq=False, repr=False)
class PooledFeatureGraph(Graph):
    """Edges between transcoder features, pooled over the prompts of a task.

    Attributes:
        transcoders: the transcoders whose features are the nodes.
    """

    executors: ClassVar[tuple[str, ...]] = ("features",)

    transcoders: TranscodersIdentity = field(kw_only=True)
