"""The edges of a component graph as a dense array, shared by all executors."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import product

import numpy as np
import torch
from jaxtyping import Bool, Int
from torch import Tensor

from circuits.graph.edges import SLOTS
from circuits.graph.graph import Graph
from circuits.graph.nodes import MLP, Head, Logits, Node, TokenEmbed, at_position
from circuits.models import Model, check_fits, shape_of
from circuits.models.component_graph import check_supported, component_nodes, sources_of
from circuits.running.variants import KeptEdges
from circuits.system.errors import InputError
from circuits.tasks.model_fit import check_task
from circuits.tasks.task import Task

Indices = Int[np.ndarray, " _"]
AblatedEdges = Bool[Tensor, "variant span target source"]
Items = Iterable[object]
Target = tuple[Node, str | None]
HookedTarget = tuple[Node, str | None, int]
"""The first head of a layer (or another node), the slot, and the number of target rows."""


def check_runnable(model: Model, graph: Graph, task: Task) -> None:
    """Raise InputError if components of this model cannot be run on this graph and task."""
    check_supported(model)
    check_fits(model, graph)
    check_task(model, task)


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
        """The layout of a graph of this model's components; of another graph an InputError."""
        nodes = component_nodes(model, graph.splits_embedding)
        targets = _targets(model)
        all_targets = list(_each_target(targets))
        spans = graph.positions or (None,)
        # Looked up per node, not per edge: there are hundreds of times as many edges.
        components = [at_position(node, None) for node in graph.nodes]
        positions = [node.position for node in graph.nodes]  # type: ignore[attr-defined]
        slots = (*SLOTS, None)  # no slot is -1, which indexes the last column
        rows = _places(product(components, slots), all_targets)
        rows = rows.view(len(components), len(slots))
        span_of_node = _places(positions, spans)
        span = span_of_node[graph.target]
        target = rows[graph.target, graph.slot]
        source = _places(components, nodes)[graph.source]
        places = torch.stack([span, target, source])
        missing = (places < 0).any(0)
        # An edge leads from a position to the same one.
        missing |= span != span_of_node[graph.source]
        if missing.any():
            first = int(missing.nonzero()[0])
            edge = graph.edges[first]
            raise InputError(
                f"this graph is not a component graph of {shape_of(model).model_name}: the model "
                f"has no edge {edge}."
            )
        shape = (len(spans), len(all_targets), len(nodes))
        taken = torch.zeros(shape, dtype=torch.bool)
        taken[span, target, source] = True
        n_twice = len(graph) - int(taken.sum())
        if n_twice:
            raise InputError(
                f"{n_twice} edges of the graph come twice, so whether a circuit keeps them is not "
                "defined; give each edge once."
            )
        return EdgeLayout(nodes, targets, shape, span, target, source)

    @property
    def splits_embedding(self) -> bool:
        """Whether token and position embedding are sources of their own."""
        return isinstance(self.nodes[0], TokenEmbed)

    def ablated(self, kept: KeptEdges) -> AblatedEdges:
        """True where an edge of the graph is not kept; edges that the graph lacks are kept."""
        dense = kept.new_zeros(len(kept), *self.shape)
        dense[:, self.span, self.target, self.source] = ~kept
        return dense

    def places(self, edges: Indices) -> list[Indices]:
        """The spans, targets and sources of some edges."""
        axes = self.span, self.target, self.source
        return [axis.numpy()[edges] for axis in axes]

    def possible(self, model: Model) -> Bool[Tensor, "target source"]:
        """True where a source is upstream of a target, whether or not the graph has the edge."""
        # The sources of a target are the first ones, so their number describes them.
        upstream: list[int] = []
        for node, _, count in self.targets:
            upstream += [sources_of(model, node, self.splits_embedding)] * count
        n_upstream = torch.tensor(upstream)
        n_sources = self.shape[2]
        return torch.arange(n_sources) < n_upstream[:, None]


def _targets(model: Model) -> tuple[HookedTarget, ...]:
    shape = shape_of(model)
    targets: list[HookedTarget] = []
    for layer in range(shape.n_layers):
        first = Head(layer, 0)
        targets += [(first, slot, shape.n_heads) for slot in SLOTS]
        if not shape.attn_only:
            targets.append((MLP(layer), None, 1))
    return (*targets, (Logits(), None, 1))


def _places(items: Items, order: Items) -> Tensor:
    """The place [item] of each item in an order; -1 for what is not there."""
    place = {item: index for index, item in enumerate(order)}
    places = [place.get(item, -1) for item in items]
    return torch.tensor(places, dtype=torch.long)


def _each_target(targets: Iterable[HookedTarget]) -> Iterator[Target]:
    """Every target row: its node and slot."""
    for first, slot, count in targets:
        for offset in range(count):
            if isinstance(first, Head):
                yield replace(first, head=offset), slot
            else:
                yield first, slot
