"""Graphs: which edges can exist in a model's computation.

A graph stores its edges as columns of integers into its nodes, so that two million edges are three
small tensors; `Edge` values are made when asked for. Graph order is the order of computation:
targets from the first layer to the logits (a head's q, k and v in turn), and for each target its
sources in the same order.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field
from functools import cached_property
from itertools import product
from types import UnionType
from typing import ClassVar

import numpy as np
import torch
from jaxtyping import Bool, Int
from torch import Tensor

from circuits.graph.edges import NO_SLOT, SLOTS, Edge, EdgesOrTexts, parse_edge
from circuits.graph.identity import ModelIdentity, TranscodersIdentity
from circuits.graph.nodes import Embed, Head, Logits, Node, PosEmbed, TokenEmbed
from circuits.system.errors import InputError
from circuits.system.kinds import expect
from circuits.system.numbers import items

EdgeIndex = Int[Tensor, " edge"]
EdgeMask = Bool[Tensor, " edge"]
NodeNumbers = Int[Tensor, " _"]
Steps = Int[np.ndarray, " step"]
Names = tuple[str, ...]


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
    executors: ClassVar[Names] = ("incremental", "hooks")

    nodes: tuple[Node, ...]
    source: EdgeIndex
    target: EdgeIndex
    slot: EdgeIndex
    positions: tuple[str | int, ...] | None = None
    causal: bool = True
    model: ModelIdentity | None = None

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
        return (
            self.positions == other.positions
            # Columns are compared before nodes because that is faster.
            and all(map(torch.equal, self._columns, other._columns))
            and self.nodes == other.nodes
        )

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        split = "" if self.positions is None else f", split by {len(self.positions)} positions"
        return f"{type(self).__name__}({len(self.nodes)} nodes, {len(self):,} edges{split})"

    def _repr_html_(self) -> str:
        title = f"<p><b>{self!r}</b></p>"
        if not self.nodes:
            return title
        nodes = self.nodes
        first, last = nodes[0], nodes[-1]
        return f"{title}<p>from <code>{first}</code> to <code>{last}</code></p>"

    @cached_property
    def edges(self) -> tuple[Edge, ...]:
        """Every edge, in graph order."""
        nodes, slots = self.nodes, {**dict(enumerate(SLOTS)), NO_SLOT: None}
        rows = zip(*map(Tensor.tolist, self._columns), strict=True)
        return tuple(Edge(nodes[start], nodes[end], slots[slot]) for start, end, slot in rows)

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
        return isinstance(edge, Edge) and edge in self._edge_index

    def index(self, edge: Edge | str) -> int:
        """The position of `edge` in graph order.

        Raises:
            InputError: the graph has no such edge.
        """
        edge = parse_edge(edge) if isinstance(edge, str) else edge
        expect(edge, Edge, "an edge or its text", "write it like a5.h5->a9.h9.q")
        if edge not in self._edge_index:
            raise InputError(f"the graph has no edge {edge}: {self._why_not(edge)}")
        return self._edge_index[edge]

    def mask(self, edges: EdgesOrTexts) -> EdgeMask:
        """True for the given edges.

        Raises:
            InputError: the graph lacks one of them.
        """
        listed = [edges] if isinstance(edges, str | Edge) else items(edges, "edges")
        numbers = list(map(self.index, listed))
        kept = torch.zeros_like(self.source, dtype=torch.bool)
        kept[numbers] = True
        return kept

    def reaching_logits(self, kept: EdgeMask) -> EdgeMask:
        """The kept edges from which a path of kept edges leads to the logits."""
        sources, readers = self._steps
        return self._crossed(kept, readers, sources, Logits)

    def reached_from_inputs(self, kept: EdgeMask) -> EdgeMask:
        """The kept edges to which a path of kept edges leads from an embedding."""
        sources, readers = self._steps
        return self._crossed(kept, sources, readers, Embed | TokenEmbed | PosEmbed)

    def _crossed(
        self, kept: EdgeMask, begin: Steps, end: Steps, kind: type[Node] | UnionType
    ) -> EdgeMask:
        """The kept edges on paths of steps from `begin` to `end` that leave nodes of a kind."""
        allowed = np.ones(len(begin), dtype=bool)
        allowed[: len(kept)] = kept.numpy()
        is_first = [isinstance(node, kind) for node in self.nodes]
        # No path begins at keys and values.
        not_first = np.zeros_like(is_first)
        reached = np.concatenate([is_first, not_first])
        crossed = np.zeros_like(allowed)
        while True:
            # Follow one more step of every path, until no further step is crossed.
            crossing = allowed & reached[begin]
            if np.array_equal(crossing, crossed):
                return torch.from_numpy(crossed[: len(kept)])
            crossed = crossing
            reached[end[crossed]] = True

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
                last = f"{self.nodes[-1]} ({len(self.nodes)} nodes)"
                return f"it has no node {node}; it has {first}, ... {last}."
        return (
            f"{edge.source} does not write where {edge.target} reads; sources come before targets."
        )

    @cached_property
    def _steps(self) -> tuple[Steps, Steps]:
        """The two ends of each step of a path: first along the edges, then through attention."""
        # They are numbers of nodes; the keys and values of head n are len(nodes) + n.
        source, reader = self.source, self.target
        if self.positions is not None:
            # Attention carries what a head reads through k or v to other positions.
            key, query = self._attention_steps()
            n_nodes = len(self.nodes)
            source = torch.cat([source, key + n_nodes])
            carried = n_nodes * (self.slot > 0)
            reader = torch.cat([reader + carried, query])
        # numpy, whose operations on this few numbers take a fraction of torch's time.
        return source.numpy(), reader.numpy()

    def _attention_steps(self) -> tuple[NodeNumbers, NodeNumbers]:
        """Pairs (a head at the position of a key, the same head where a query may attend to it)."""
        by_head = defaultdict(list)
        for number, node in enumerate(self.nodes):
            if isinstance(node, Head):
                by_head[node.label].append(number)
        pairs: list[tuple[int, int]] = []
        for same in by_head.values():
            pairs += product(same, same)
        steps = torch.tensor(pairs, dtype=torch.long)
        key, query = steps.reshape(-1, 2).T
        if not self._positions_in_order:
            return key, query
        attends = key <= query
        return key[attends], query[attends]

    @property
    def _positions_in_order(self) -> bool:
        """Whether attention carries information from earlier positions to later ones only."""
        # Named spans have no order that holds for every prompt, so attention may carry information
        # between any two of them. Numbered positions are in order.
        named = [name for name in self.positions or () if isinstance(name, str)]
        return self.causal and not named


@dataclass(frozen=True, eq=False, repr=False)
class PooledFeatureGraph(Graph):
    """Edges between transcoder features, pooled over the prompts of a task.

    Attributes:
        transcoders: the transcoders whose features are the nodes.
    """

    executors: ClassVar[Names] = ("features",)

    transcoders: TranscodersIdentity = field(kw_only=True)


def check_is_graph(graph: object) -> None:
    """Refuse what is no graph, such as a circuit, which has one."""
    remedy = "make one with circuits.component_graph, or take a circuit's .graph"
    expect(graph, Graph, "a Graph", remedy)
