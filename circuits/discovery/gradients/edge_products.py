"""Changes times gradients: the contribution of a batch of prompts to every edge's score.

Changes are stored by source, [source, batch * pos * d_model], and gradients by target, so that all
edges into a layer are one matrix product. Both are large, and are computed from smaller tensors (z,
and the gradients of q, k and v) for one layer of targets and for as many sources at a time as fit
into memory.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import accumulate, pairwise

import torch
from jaxtyping import Float
from torch import Tensor

from circuits.discovery.gradients.gradient_pass import Gradients, TargetGradients, written_hook
from circuits.graph.edges import SLOTS
from circuits.graph.graph import Graph
from circuits.graph.nodes import Node
from circuits.models import Model, shape_of
from circuits.models.component_graph import sources_of
from circuits.models.source_outputs import output_groups
from circuits.running.ablation import Changes
from circuits.running.edge_layout import EdgeLayout, HookedTarget
from circuits.tasks.task import Task
from circuits.tasks.token_spans import token_spans

SourceChanges = Float[Tensor, "source batch pos d_model"]
DenseEdges = Float[Tensor, "part target source"]


@dataclass(frozen=True)
class TargetGroup:
    """Targets multiplied together: a layer's heads and the MLP below, or the last MLP and logits.

    An MLP is thereby also multiplied with its own output, for which there is no edge.
    """

    targets: tuple[HookedTarget, ...]
    # The rows of the targets among all target rows
    rows: slice
    # The first `n_sources` nodes are sources of at least one of the targets
    n_sources: int

    def __len__(self) -> int:
        return self.rows.stop - self.rows.start


@dataclass(frozen=True, eq=False)
class EdgeProducts:
    """What the products depend on besides the prompts."""

    model: Model
    graph: Graph
    layout: EdgeLayout
    groups: tuple[TargetGroup, ...]
    # Keep products apart by prompt, and those of nodes by position and by coordinate
    details: bool
    # Bytes that a batch may take
    budget: int

    def start(self, task: Task) -> BatchProducts:
        """Zeros for a batch of prompts."""
        cfg = shape_of(self.model)
        batch, pos = task.clean.shape
        spans, rows, sources = self.layout.shape
        prompts, nodes = (batch, sources) if self.details else (1, 0)
        part = self._part(task, prompts)
        zeros = partial(torch.zeros, dtype=cfg.dtype, device=cfg.device)
        return BatchProducts(
            self,
            part,
            edges=zeros(prompts * spans, rows, sources),
            positions=zeros(nodes, batch, pos),
            neurons=zeros(nodes, cfg.d_model),
        )

    def _part(self, task: Task, prompts: int) -> Tensor | None:
        """The part of each token, with the spans of `prompts` prompts kept apart."""
        span = token_spans(self.graph, task)
        if span is None:
            return None
        spans = self.layout.shape[0]
        prompt = torch.arange(prompts, device=span.device)
        return span + spans * prompt[:, None]

    @property
    def widest(self) -> int:
        """The number of target rows in the largest group."""
        return max(len(group) for group in self.groups)


@dataclass(eq=False)
class BatchProducts:
    """The products of one batch, summed over the points at which gradients are taken."""

    of: EdgeProducts
    # The part that each token's products belong to; None if all tokens of a prompt belong together.
    # A part is a span, of one prompt with details, else of all prompts
    part: Tensor | None
    edges: DenseEdges
    # Products of nodes by prompt and position; without details, of no nodes
    positions: Float[Tensor, "node batch pos"]
    # Products of nodes by coordinate; without details, of no nodes
    neurons: Float[Tensor, "node d_model"]
    # The largest entry of a gradient at the logits
    steepest: float = 0.0

    def add(self, changes: Changes, gradients: Sequence[Gradients]) -> None:
        """Add the products of the changes with the sum of the gradients."""
        for each in gradients:
            self.steepest = max(self.steepest, each.steepest)
        buffers = self._buffers(len(gradients))
        for rows in self._chunks(changes, gradients, buffers):
            some = changes.outputs(rows)
            if self.of.details:
                nodes = changes.kept.nodes[rows]
                self._add_nodes(nodes, some, rows, gradients)
            self._add_edges(some, rows, gradients, buffers)
            del some  # before the next changes are computed

    def _buffers(self, points: int) -> list[Tensor]:
        """Memory for the gradients of the largest group at one point, and for their sum."""
        _, batch, pos = self.positions.shape
        d_model = self.neurons.shape[1]
        widest = (self.of.widest, batch, pos, d_model)
        return [self.neurons.new_empty(widest) for _ in range(min(points, 2))]

    def results(self) -> list[Tensor]:
        """Products by prompt and edge, by prompt, node and position, and by node and coordinate."""
        # They are on the CPU, each with a leading axis to join batches along, and last `steepest`.
        layout = self.of.layout
        by_span = (-1, layout.shape[0])
        dense = self.edges.unflatten(0, by_span)
        by_edge = dense[:, layout.span, layout.target, layout.source]
        positions = self.positions.transpose(0, 1)
        steepest = torch.tensor([self.steepest])
        results = by_edge, positions, self.neurons[None], steepest
        return [each.float().cpu() for each in results]

    def _chunks(
        self, changes: Changes, gradients: Sequence[Gradients], buffers: Sequence[Tensor]
    ) -> Iterator[slice]:
        """All sources, as many at a time as fit into memory; those that write together stay so."""
        kept = changes.kept
        held: list[Tensor | Gradients] = [*kept.activations.values(), *buffers, *gradients]
        held_bytes = sum(each.nbytes for each in held)
        free = self.of.budget - held_bytes
        # A source's changes, their products with the gradient, and given outputs.
        given = changes.given is not None
        copies = 1 + self.of.details + given
        source_bytes = copies * buffers[0][0].nbytes
        start = stop = 0
        for _, rows in output_groups(kept.nodes):
            if stop > start and (rows.stop - start) * source_bytes > free:
                yield slice(start, stop)
                start = stop
            stop = rows.stop
        yield slice(start, stop)

    def _add_edges(
        self,
        changes: SourceChanges,
        rows: slice,
        gradients: Sequence[Gradients],
        buffers: Sequence[Tensor],
    ) -> None:
        for group in self.of.groups:
            stop = min(group.n_sources, rows.stop)
            if stop > rows.start:
                upstream = changes[: stop - rows.start]
                slopes = _summed(gradients, group, buffers)
                products = self._products(upstream, slopes)
                edges = self.edges[:, group.rows]
                edges[..., rows.start : stop] += products

    def _products(self, changes: SourceChanges, gradients: TargetGradients) -> DenseEdges:
        """(c_u - out_u(clean)) . d L / d x_r of every source u and target r, summed by part."""
        part = self.part
        prompts = len(self.edges) if part is None else part.numel()
        by_target = gradients.reshape(len(gradients), prompts, -1).transpose(0, 1)
        by_source = changes.reshape(len(changes), prompts, -1).permute(1, 2, 0)
        # products[part, r, u] = sum over tokens of the part and d_model of gradient[r] * change[u]
        products = torch.bmm(by_target, by_source)
        if part is None:
            return products
        # Products by token so far.
        by_part = products.new_zeros(len(self.edges), *products.shape[1:])
        return by_part.index_add_(0, part.flatten(), products)

    def _add_nodes(
        self,
        nodes: Sequence[Node],
        changes: SourceChanges,
        rows: slice,
        gradients: Sequence[Gradients],
    ) -> None:
        """All edges of a node together: its change times the gradient at its output."""
        positions = self.positions[rows]
        neurons = self.neurons[rows]
        for _, group in output_groups(nodes):
            name = written_hook(nodes[group.start])
            slopes = [each.at[name] for each in gradients if name in each.at]
            if slopes:
                slope = sum(slopes[1:], slopes[0])
                products = changes[group] * slope
                positions[group] += products.sum(-1)
                neurons[group] += products.sum((1, 2))


def target_groups(model: Model, layout: EdgeLayout) -> Iterator[TargetGroup]:
    """Cut the targets into groups; each ends with the v slot of a layer's heads."""
    targets = layout.targets
    row = [0, *accumulate(count for _, _, count in targets)]
    ends = [index for index, (_, slot, _) in enumerate(targets, 1) if slot == SLOTS[-1]]
    for start, stop in pairwise([0, *ends, len(targets)]):
        last, *_ = targets[stop - 1]
        n_sources = sources_of(model, last, layout.splits_embedding)
        rows = slice(row[start], row[stop])
        yield TargetGroup(targets[start:stop], rows, n_sources)


def _summed(
    gradients: Sequence[Gradients], group: TargetGroup, buffers: Sequence[Tensor]
) -> TargetGradients:
    """The sum over points of the gradients at a group's targets."""
    total = buffers[0][: len(group)]
    gradients[0].at_inputs(group.targets, total)
    for each in gradients[1:]:
        other = buffers[1][: len(group)]
        each.at_inputs(group.targets, other)
        total += other
    return total
