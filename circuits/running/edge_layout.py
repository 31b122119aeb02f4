"""Where the edges of a component graph stand in a dense array, for every executor."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from circuits.graph.edges import NO_SLOT, SLOTS
from circuits.graph.graph import Graph
from circuits.graph.nodes import MLP, Head, Logits, Node, TokenEmbed, at_position
from circuits.models import (
    Model,
)
from circuits.models.component_graph import component_nodes, sources_of
from circuits.system.errors import InputError


@dataclass(frozen=True, eq=False)
class EdgeLayout:
    """Where each edge of a component graph stands in a dense [span, target, source] array.

    Targets are numbered by layer: the q, then k, then v inputs of its heads, then its MLP; the logits come last.
    """

    nodes: tuple[Node, ...]
    targets: tuple[
        tuple[Node, str | None, int], ...
    ]  # the first head (or node), the slot, the number of rows: one hook each
    shape: tuple[int, int, int]
    span: Int[Tensor, " edge"]
    target: Int[Tensor, " edge"]
    source: Int[Tensor, " edge"]

    @staticmethod
    def of(model: Model, graph: Graph) -> EdgeLayout:
        """The layout for this model's components.

        Raises:
            InputError: the graph is not a component graph of this model.
        """
        nodes = component_nodes(model, graph.splits_embedding)
        targets = tuple(_targets(model))
        row_of: dict[tuple[Node, int], int] = {}
        for first, slot, count in targets:
            for offset in range(count):
                node = Head(first.layer, offset) if isinstance(first, Head) else first
                row_of[node, NO_SLOT if slot is None else SLOTS.index(slot)] = len(row_of)
        source_of = {node: index for index, node in enumerate(nodes)}
        spans = {position: index for index, position in enumerate(graph.positions or (None,))}
        # Looked up once for each node, not for each edge: there are hundreds of times as many edges.
        components = [at_position(node, None) for node in graph.nodes]
        span_of_node = torch.tensor([spans.get(node.position, -1) for node in graph.nodes])  # type: ignore[attr-defined]
        source_of_node = torch.tensor([source_of.get(node, -1) for node in components])
        row_of_node = torch.tensor(
            [
                [row_of.get((node, slot), -1) for slot in (*range(len(SLOTS)), NO_SLOT)]
                for node in components
            ]
        )
        span, target, source = (
            span_of_node[graph.target],
            row_of_node[graph.target, graph.slot],
            source_of_node[graph.source],
        )
        if bool(((span < 0) | (target < 0) | (source < 0)).any()):
            edge = graph.edges[int(((span < 0) | (target < 0) | (source < 0)).nonzero()[0])]
            raise InputError(
                f"this graph is not a component graph of {model.cfg.model_name}: the model has no edge {edge}."
            )
        return EdgeLayout(
            nodes, targets, (len(spans), len(row_of), len(nodes)), span, target, source
        )

    def ablated(
        self, kept: Bool[Tensor, "variant edge"]
    ) -> Bool[Tensor, "variant span target source"]:
        """True where an edge of the graph is not kept; what the graph does not hold is never ablated."""
        dense = torch.zeros(len(kept), *self.shape, dtype=torch.bool, device=kept.device)
        dense[:, self.span, self.target, self.source] = ~kept
        return dense

    @property
    def splits_embedding(self) -> bool:
        """Whether token and position embedding are sources of their own."""
        return isinstance(self.nodes[0], TokenEmbed)

    def possible(self, model: Model) -> Bool[Tensor, "target source"]:
        """True where a source stands upstream of a target, whether or not the graph holds the edge."""
        counts = torch.tensor(
            [
                sources_of(model, node, self.splits_embedding)
                for node, _, rows in self.targets
                for _ in range(rows)
            ]
        )
        return torch.arange(self.shape[2]) < counts[:, None]


def _targets(model: Model) -> Iterator[tuple[Node, str | None, int]]:
    for layer in range(model.cfg.n_layers):
        yield from ((Head(layer, 0), slot, model.cfg.n_heads) for slot in SLOTS)
        if not model.cfg.attn_only:
            yield MLP(layer), None, 1
    yield Logits(), None, 1
