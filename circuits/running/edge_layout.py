"""The edges of a component graph as a dense array, shared by all executors."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from circuits.graph.edges import NO_SLOT, SLOTS
from circuits.graph.graph import Graph
from circuits.graph.nodes import MLP, Head, Logits, Node, TokenEmbed, at_position
from circuits.models import Model
from circuits.models.component_graph import component_nodes, sources_of
from circuits.system.errors import InputError

HookedTarget = tuple[Node, str | None, int]
"""The first head of a layer (or another node), the slot, and the number of target rows."""


@dataclass(frozen=True, eq=False)
class EdgeLayout:
    """Where each edge of a component graph is in a dense [span, target, source] array.

    Target rows are ordered by layer: the q, then k, then v inputs of its heads, then its MLP; the
    logits come last.

    Attributes:
        nodes: the sources, in order of computation.
        targets: the hook points at which targets read.
        shape: the numbers of spans, target rows and sources.
        span, target, source: the place of each edge of the graph.
    """

    nodes: tuple[Node, ...]
    targets: tuple[HookedTarget, ...]
    shape: tuple[int, int, int]
    span: Int[Tensor, " edge"]
    target: Int[Tensor, " edge"]
    source: Int[Tensor, " edge"]

    @staticmethod
    def of(model: Model, graph: Graph) -> EdgeLayout:
        """The layout of a graph of this model's components.

        Raises:
            InputError: the graph is not a component graph of this model.
        """
        nodes, targets = component_nodes(model, graph.splits_embedding), tuple(_targets(model))
        source_row = {node: row for row, node in enumerate(nodes)}
        target_row = _target_rows(targets)
        span_row = {position: row for row, position in enumerate(graph.positions or (None,))}
        # Looked up per node, not per edge: there are hundreds of times as many edges. What is not
        # found is -1.
        components = [at_position(node, None) for node in graph.nodes]
        positions = [node.position for node in graph.nodes]  # type: ignore[attr-defined]
        spans = [span_row.get(position, -1) for position in positions]
        slots = (*range(len(SLOTS)), NO_SLOT)  # the slot -1 indexes the last column
        rows = [[target_row.get((node, slot), -1) for slot in slots] for node in components]
        sources = [source_row.get(node, -1) for node in components]
        span = torch.tensor(spans)[graph.target]
        target = torch.tensor(rows)[graph.target, graph.slot]
        source = torch.tensor(sources)[graph.source]
        missing = (span < 0) | (target < 0) | (source < 0)
        if bool(missing.any()):
            edge = graph.edges[int(missing.nonzero()[0])]
            raise InputError(
                f"this graph is not a component graph of {model.cfg.model_name}: the model has no "
                f"edge {edge}."
            )
        shape = (len(span_row), len(target_row), len(nodes))
        return EdgeLayout(nodes, targets, shape, span, target, source)

    @property
    def splits_embedding(self) -> bool:
        """Whether token and position embedding are sources of their own."""
        return isinstance(self.nodes[0], TokenEmbed)

    def ablated(
        self, kept: Bool[Tensor, "variant edge"]
    ) -> Bool[Tensor, "variant span target source"]:
        """True where an edge of the graph is not kept.

        Edges missing in the graph are never ablated.
        """
        dense = torch.zeros(len(kept), *self.shape, dtype=torch.bool, device=kept.device)
        dense[:, self.span, self.target, self.source] = ~kept
        return dense

    def possible(self, model: Model) -> Bool[Tensor, "target source"]:
        """True where a source is upstream of a target, whether or not the graph has the edge."""
        counts = [
            sources_of(model, node, self.splits_embedding)
            for node, _, rows in self.targets
            for _ in range(rows)
        ]
        return torch.arange(self.shape[2]) < torch.tensor(counts)[:, None]


def _targets(model: Model) -> Iterator[HookedTarget]:
    for layer in range(model.cfg.n_layers):
        for slot in SLOTS:
            yield Head(layer, 0), slot, model.cfg.n_heads
        if not model.cfg.attn_only:
            yield MLP(layer), None, 1
    yield Logits(), None, 1


def _target_rows(targets: tuple[HookedTarget, ...]) -> dict[tuple[Node, int], int]:
    """The row of each target, by node and slot."""
    rows: dict[tuple[Node, int], int] = {}
    for first, slot, count in targets:
        slot_index = NO_SLOT if slot is None else SLOTS.index(slot)
        for offset in range(count):
            node = Head(first.layer, offset) if isinstance(first, Head) else first
            rows[node, slot_index] = len(rows)
    return rows
