"""Graphs: which edges can exist in a model's computation.

A graph stores its edges as columns of integers into its nodes, so that two million edges are three
small tensors; `Edge` values are made when asked for. Graph order is the order of computation:
targets from the first layer to the logits (a head's q, k and v in turn), and for each target its
sources in the same order.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, ClassVar

import numpy as np
import pandas as pd
import torch
from jaxtyping import Bool
from torch import Tensor

from circuits.graph.components import FACTS, Components
from circuits.graph.edges import NO_SLOT, SLOTS, Edge, EdgesOrTexts, parse_edge
from circuits.graph.identity import ModelIdentity, TranscodersIdentity
from circuits.graph.nodes import Head, Logits, Node, PosEmbed, TokenEmbed, at_position, parse_node
from circuits.graph.paths import EdgeIndex, EdgeMask, EdgeNumbers, Paths, Positions
from circuits.system.errors import InputError
from circuits.system.kinds import expect
from circuits.system.numbers import items, ordered_items, shown, truth
from circuits.system.tensors import as_tensor

ChosenEdges = EdgesOrTexts | EdgeMask | Bool[np.ndarray, " edge"]
NodeMask = Bool[Tensor, " node"]
NodesOrTexts = Sequence[Node | str]
Names = tuple[str, ...]
# The fields of a graph that are tensors.
COLUMNS = ("source", "target", "slot")


@dataclass(frozen=True, eq=False)
class Graph:
    """Edges between the components of a model, as columns of integers into `nodes`.

    Edges of the model that a graph lacks are always kept: no circuit over it ablates them, and
    paths lead along them. `only` cuts a graph.

    Attributes:
        nodes: every node, in order of computation.
        source, target: indices into `nodes`, one per edge.
        slot: 0, 1, 2 for q, k, v; -1 where the target has no slots.
        positions: the spans that edges are split by (names or numbers), or None.
        causal: whether a head's output depends only on earlier positions.
        model: the model the graph was made from. Without it the graph can be run, but the edges
            that it lacks are unknown, so paths in it cannot be followed.

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
    positions: Positions = None
    causal: bool = True
    model: ModelIdentity | None = None

    def __post_init__(self) -> None:
        nodes, columns = tuple(ordered_items(self.nodes, "nodes")), self._given_columns
        unknown = [node for node in nodes if not isinstance(node, Node)]
        if unknown:
            raise InputError(f"nodes: {shown(unknown[0])} is none; write circuits.MLP(0) or such.")
        ends, slot = torch.cat(columns[:2]), columns[2]
        is_wrong = ((ends < 0) | (ends >= len(nodes))).any()
        if is_wrong or not torch.isin(slot, torch.arange(-1, len(SLOTS))).all():
            raise self._wrong_columns
        positions = self.positions
        if positions is not None:
            positions = tuple(ordered_items(positions, "positions"))
        truth(self.causal, "causal")
        expect(self.model, ModelIdentity | None, "a ModelIdentity", "take another graph's .model")
        values = (nodes, *columns, positions)
        for name, value in zip(("nodes", *COLUMNS, "positions"), values, strict=True):
            object.__setattr__(self, name, value)

    @staticmethod
    def empty(model: ModelIdentity | None = None) -> Graph:
        """A graph without edges, for methods that make their own graph."""
        none = torch.zeros(0, dtype=torch.long)
        return Graph((), none, none, none, model=model)

    @staticmethod
    def complete(components: Components, positions: Positions, *, causal: bool) -> Graph:
        """The graph of all edges between components."""
        spans = positions or (None,)
        parts = (*components.sources, Logits())
        nodes = tuple(at_position(node, span) for node in parts for span in spans)
        source, target, slot = components.edges(len(spans))
        return Graph(nodes, source, target, slot, positions, causal)

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

    def mask(self, edges: ChosenEdges) -> EdgeMask:
        """True for the given edges; a mask over the graph's edges is returned as it is.

        Raises:
            InputError: the graph lacks one of them, or the mask does not fit.
        """
        holds_numbers = isinstance(edges, np.ndarray) and edges.dtype.kind not in "OU"
        if isinstance(edges, Tensor) or holds_numbers:
            return self._checked_mask(edges)
        listed = [edges] if isinstance(edges, str | Edge) else items(edges, "edges")
        numbers = list(map(self.index, listed))
        kept = torch.zeros_like(self.source, dtype=torch.bool)
        kept[numbers] = True
        return kept

    def node_mask(self, nodes: NodesOrTexts) -> NodeMask:
        """True for the given nodes; a node without a position stands for it at every position.

        Raises:
            InputError: the graph lacks one of them.
        """
        found = torch.zeros(len(self.nodes), dtype=torch.bool)
        for given in [nodes] if isinstance(nodes, Node | str) else items(nodes, "nodes"):
            node = parse_node(given) if isinstance(given, str) else given
            numbers = self._numbers_of.get(node) if isinstance(node, Node) else None
            if numbers is None:
                raise InputError(f"the graph has no node {node}; {self._some_nodes}.")
            found[numbers] = True
        return found

    def only(self, edges: ChosenEdges) -> Graph:
        """The graph of only these edges: all others of the model are then always kept.

        Raises:
            InputError: the graph lacks one of them, or the mask does not fit.

        >>> import circuits
        >>> graph = circuits.component_graph(circuits.load_model("toy-world"))
        >>> graph.only([edge for edge in graph.edges if isinstance(edge.source, circuits.Head)])
        Graph(22 nodes, 344 edges)
        """
        rows = self.mask(edges)
        source, target, slot = (column[rows] for column in self._columns)
        return replace(self, source=source, target=target, slot=slot)

    def reaching_logits(self, kept: EdgeMask) -> EdgeMask:
        """The kept edges from which a path leads to the logits.

        Paths lead along kept edges, and along edges of the model that the graph lacks.

        Raises:
            InputError: the graph names no model, so that it is unknown which edges it lacks.
        """
        return self.paths.reaching_logits(self._checked_mask(kept))

    def reached_from_inputs(self, kept: EdgeMask) -> EdgeMask:
        """The kept edges to which a path leads from an embedding; see `reaching_logits`."""
        return self.paths.reached_from_inputs(self._checked_mask(kept))

    @cached_property
    def paths(self) -> Paths:
        """Where paths can lead.

        Raises:
            InputError: the graph names no model, so that it is unknown which edges it lacks.
        """
        shape = {} if self.model is None else self.model.shape
        if not FACTS <= shape.keys():
            raise InputError(
                "this graph does not name its model, so it is unknown which of the model's edges "
                "it lacks, and paths may lead along those; cut it from component_graph(model) with "
                "graph.only(edges), or give Graph(...) that graph's model."
            )
        return self.paths_in(Components.of(shape, self.splits_embedding))

    def paths_in(self, components: Components) -> Paths:
        """Where paths can lead in a model of these components.

        Raises:
            InputError: the graph has an edge that such a model lacks.
        """
        whole = Graph.complete(components, self.positions, causal=self.causal)
        own = self._numbers_in(whole)
        # The edges that this graph lacks are always kept.
        paths = whole._own_paths
        if components.coupled_heads:
            paths = paths.with_coupled_heads()
        return paths.of_edges(own)

    @property
    def _columns(self) -> tuple[EdgeIndex, EdgeIndex, EdgeIndex]:
        return self.source, self.target, self.slot

    @property
    def _given_columns(self) -> list[Tensor]:
        columns = [as_tensor(getattr(self, name), name) for name in COLUMNS]
        # Whole numbers are those that fit in with int64; an empty list has no type.
        are_whole = all(
            torch.promote_types(column.dtype, torch.long) == torch.long or not len(column)
            for column in columns
            if column.dim() == 1
        )
        if {tuple(column.shape) for column in columns} != {(columns[0].numel(),)} or not are_whole:
            raise self._wrong_columns
        return [column.long() for column in columns]

    @property
    def _wrong_columns(self) -> InputError:
        shapes = [tuple(as_tensor(column, "").shape) for column in self._columns]
        return InputError(
            f"source, target and slot must have one entry per edge (shapes {shapes}): numbers of "
            f"two of {len(self.nodes)} nodes, and 0, 1, 2 or -1; cut one with graph.only(edges)."
        )

    @property
    def _own_paths(self) -> Paths:
        """Paths along the edges of the graph alone."""
        return Paths.along(self.nodes, *self._columns, positions=self.positions, causal=self.causal)

    @cached_property
    def _edge_index(self) -> dict[Edge, int]:
        return {edge: index for index, edge in enumerate(self.edges)}

    @cached_property
    def _numbers_of(self) -> dict[Node, list[int]]:
        """The indices of each node; without a position, those at all positions."""
        numbers = defaultdict(list)
        for number, node in enumerate(self.nodes):
            for named in {node, at_position(node, None)}:
                numbers[named].append(number)
        return dict(numbers)

    def _numbers_in(self, whole: Graph) -> EdgeNumbers:
        """The index of each edge in the graph of all edges."""
        numbers = [whole.node_index.get(node, -1) for node in self.nodes]
        place, n_nodes = torch.tensor(numbers, dtype=torch.long), len(whole.nodes)

        def keys(source: EdgeIndex, target: EdgeIndex, slot: EdgeIndex) -> EdgeNumbers:
            # One integer per edge. No source is the last node, so that -1 makes no key of an edge.
            slots = target * (len(SLOTS) + 1) + slot + 1
            return (slots * n_nodes + source).numpy()

        own = keys(place[self.source], place[self.target], self.slot)
        known = keys(*whole._columns)
        order = known.argsort()
        near = known.searchsorted(own, sorter=order)
        found = order[near.clip(max=len(order) - 1)]
        wrong = np.flatnonzero(known[found] != own)
        if len(wrong):
            name = self.model.name if self.model else "this model"
            raise InputError(
                f"this graph is not a component graph of {name}: the model has no edge "
                f"{self.edges[wrong[0]]}."
            )
        return found

    def _checked_mask(self, mask: Any) -> EdgeMask:
        mask = as_tensor(by_edge(self, mask, "a mask"), "a mask")
        if mask.dtype != torch.bool or mask.shape != (len(self),):
            raise InputError(
                f"a mask of {mask.dtype} and shape {tuple(mask.shape)} cannot choose among the "
                f"graph's edges; it must be boolean, of shape ({len(self)},)."
            )
        return mask.cpu()

    @property
    def _some_nodes(self) -> str:
        if not self.nodes:
            return "it has none"
        first = ", ".join(map(str, self.nodes[:3]))
        return f"it has {first}, ... {self.nodes[-1]} ({len(self.nodes)} nodes)"

    def _why_not(self, edge: Edge) -> str:
        for node in (edge.source, edge.target):
            if node not in self.node_index:
                return f"it has no node {node}; {self._some_nodes}."
        if isinstance(edge.target, Head) and edge.slot is None:
            return "a head is read in a slot; give 'q', 'k' or 'v'."
        return (
            f"{edge.source} does not write where {edge.target} reads, or the graph was made "
            "without this edge."
        )


@dataclass(frozen=True, eq=False, repr=False)
class PooledFeatureGraph(Graph):
    """Edges between transcoder features, pooled over the prompts of a task.

    Attributes:
        transcoders: the transcoders whose features are the nodes.
    """

    executors: ClassVar[Names] = ("features",)

    transcoders: TranscodersIdentity = field(kw_only=True)

    @cached_property
    def paths(self) -> Paths:
        """Where paths can lead: along edges only, since nothing passes between other features."""
        return self._own_paths


def check_is_graph(graph: object) -> None:
    """Refuse what is no graph, such as a circuit, which has one."""
    remedy = "make one with circuits.component_graph, or take a circuit's .graph"
    expect(graph, Graph, "a Graph", remedy)


def by_edge(graph: Graph, given: Any, name: str) -> Any:
    """What pandas labels by edge, in graph order: a series, or a frame with a column for each edge.

    Others are returned as they are.

    Raises:
        InputError: the labels are not those of all edges, once; or numbers in another order.
    """
    if not isinstance(given, pd.Series | pd.DataFrame):
        return given
    axis = given.ndim - 1
    labels = given.axes[axis]
    edges = [label for label in labels if "->" in str(label)]
    if not edges:
        # Numbers in another order are those of rows that were sorted or chosen by other values.
        is_number = labels.inferred_type in ("integer", "floating")
        if labels.nlevels > 1 or (is_number and not labels.is_monotonic_increasing):
            raise InputError(
                f"{name} has the labels {shown(list(labels[:3]))}, so that its order may not be "
                "the graph's; label it by edges (.set_index('edge')), or give a list (.tolist())."
            )
        return given
    numbers = np.array(list(map(graph.index, edges)))
    order, everything = numbers.argsort(), np.arange(len(graph))
    has_all = np.array_equal(numbers[order], everything)
    if len(labels) > len(edges) or not has_all:
        raise InputError(
            f"{name} has {len(labels)} labels, which name {len(set(numbers))} of the graph's "
            f"{len(graph)} edges; give an entry for every edge, once."
        )
    return given.take(order, axis=axis)
