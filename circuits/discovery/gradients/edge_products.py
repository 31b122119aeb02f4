"""Changes times gradients: the contribution of a batch of prompts to every edge's score.

Changes are stored by source, [source, batch * pos * d_model], and gradients by target, so that all
edges into a layer are one matrix product. Both are large, and are computed from smaller tensors (z,
and the gradients of q, k and v) for one layer of targets and for as many sources at a time as fit
into memory.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from circuits.discovery.gradients.gradient_pass import Gradients, written_hook
from circuits.graph.edges import SLOTS
from circuits.graph.graph import Graph
from circuits.models import Model
from circuits.models.component_graph import sources_of
from circuits.models.source_outputs import output_groups
from circuits.running.ablation import Changes
from circuits.running.edge_layout import EdgeLayout, HookedTarget
from circuits.tasks.task import Task
from circuits.tasks.token_spans import token_spans

SourceChanges = Float[Tensor, "source batch pos d_model"]
TargetGradients = Float[Tensor, "target batch pos d_model"]


@dataclass(frozen=True)
class TargetGroup:
    """Targets multiplied together: a layer's heads and the MLP below, or the last MLP and logits.

    An MLP is thereby also multiplied with its own output, for which there is no edge.

    Attributes:
        rows: the rows of the targets among all target rows.
        n_sources: the first `n_sources` nodes are sources of at least one of the targets.
    """

    targets: tuple[HookedTarget, ...]
    rows: slice
    n_sources: int

    def __len__(self) -> int:
        return self.rows.stop - self.rows.start


@dataclass(frozen=True)
class Needed:
    """Bytes that a batch needs: a fixed number, and a number for each prompt."""

    fixed: int
    per_prompt: int

    def __or__(self, other: Needed) -> Needed:
        """Enough for either."""
        return Needed(max(self.fixed, other.fixed), max(self.per_prompt, other.per_prompt))

    def of(self, prompts: int) -> int:
        """Bytes for a number of prompts."""
        return self.fixed + prompts * self.per_prompt

    def prompts(self, budget: int) -> int:
        """How many prompts fit, but at least one."""
        return max(1, (budget - self.fixed) // self.per_prompt)


@dataclass(frozen=True, eq=False)
class EdgeProducts:
    """What the products depend on besides the prompts.

    Attributes:
        details: keep products apart by prompt, and those of nodes by position and by coordinate.
        budget: bytes that a batch may take.
    """

    model: Model
    graph: Graph
    layout: EdgeLayout
    groups: tuple[TargetGroup, ...]
    details: bool
    budget: int

    @staticmethod
    def of(model: Model, graph: Graph, *, details: bool, budget: int) -> EdgeProducts:
        """The products for a graph of this model's components.

        Raises:
            InputError: the graph is not a component graph of this model.
        """
        layout = EdgeLayout.of(model, graph)
        return EdgeProducts(model, graph, layout, tuple(_groups(model, layout)), details, budget)

    def start(self, task: Task) -> BatchProducts:
        """Zeros for a batch of prompts."""
        spans, rows, sources = self.layout.shape
        part = token_spans(self.graph, task)
        batch, pos = task.clean.shape
        d_model = self.model.cfg.d_model
        if part is not None and self.details:
            part = part + spans * torch.arange(batch, device=part.device)[:, None]

        def zeros(*shape: int) -> Tensor:
            return torch.zeros(shape, dtype=self.model.cfg.dtype, device=self.model.cfg.device)

        if not self.details:
            return BatchProducts(
                self, part, zeros(spans, rows, sources), zeros(0, 0, 0), zeros(0, 0)
            )
        edges = zeros(batch * spans, rows, sources)
        return BatchProducts(self, part, edges, zeros(sources, batch, pos), zeros(sources, d_model))

    def least_bytes(self, pos: int, points: int) -> Needed:
        """Bytes that the products need if the sources come layer by layer.

        Args:
            pos: tokens of a prompt.
            points: the number of gradients that are multiplied together.
        """
        cfg, size = self.model.cfg, self.model.cfg.dtype.itemsize
        spans, rows, sources = self.layout.shape
        heads, mlp = cfg.n_heads * cfg.d_head, 0 if cfg.attn_only else cfg.d_model
        # Numbers per token: outputs and changes of all sources, and gradients at every point
        at_outputs = 3 if self.details else 1
        numbers = 2 * (2 * cfg.d_model + cfg.n_layers * (heads + mlp))
        gradients = cfg.d_model + cfg.n_layers * (3 * heads + mlp + cfg.d_model * at_outputs)
        numbers += points * gradients
        # the changes of one layer's heads, and gradients at the inputs of the widest group
        numbers += cfg.n_heads * self.bytes_per_source(1, 1, given=True) // size + heads
        numbers += cfg.d_model * (self.widest * min(points, 2) + 4)
        if self.graph.positions is not None:
            numbers += self.widest * sources
        dense = spans * rows * sources * size
        projections = 2 * heads * cfg.d_model * size
        if self.details:
            return Needed(projections, numbers * pos * size + 2 * dense)
        return Needed(projections + dense, numbers * pos * size)

    @property
    def widest(self) -> int:
        """The number of target rows in the largest group."""
        return max(len(group) for group in self.groups)

    def bytes_per_source(self, batch: int, pos: int, *, given: bool) -> int:
        """Bytes for a source's changes, their products with the gradient, and given outputs."""
        cfg = self.model.cfg
        return batch * pos * cfg.d_model * cfg.dtype.itemsize * (1 + self.details + given)


@dataclass(frozen=True, eq=False)
class BatchProducts:
    """The products of one batch, summed over the points at which gradients are taken.

    Attributes:
        part: the part that each token's products belong to; None if all tokens of a prompt belong
            together. A part is a span, of one prompt with details, else of all prompts.
        positions: of nodes, by prompt and position; empty without details.
        neurons: of nodes, by coordinate; empty without details.
    """

    of: EdgeProducts
    part: Tensor | None
    edges: Float[Tensor, "part target source"]
    positions: Float[Tensor, "node batch pos"]
    neurons: Float[Tensor, "node d_model"]

    def add(self, changes: Changes, gradients: Sequence[Gradients]) -> None:
        """Add the products of the changes with the sum of the gradients."""
        batch, pos = next(iter(changes.kept.activations.values())).shape[:2]
        shape = (self.of.widest, batch, pos, self.of.model.cfg.d_model)
        buffers = [self.neurons.new_empty(shape) for _ in gradients[:2]]
        kept = [*changes.kept.activations.values(), *buffers]
        kept += [tensor for each in gradients for tensor in each.tensors]
        source_bytes = self.of.bytes_per_source(batch, pos, given=changes.given is not None)
        n_sources = max(1, (self.of.budget - _bytes(kept)) // source_bytes)
        for rows in _chunks(changes, n_sources):
            some = changes.outputs(rows)
            if self.of.details:
                self._add_nodes(changes, some, rows, gradients)
            for group in self.of.groups:
                upstream = min(group.n_sources, rows.stop) - rows.start
                if upstream > 0:
                    at_inputs = _summed(gradients, group, buffers)
                    products = self._products(some[:upstream], at_inputs)
                    self.edges[:, group.rows, rows.start : rows.start + upstream] += products
            del some  # before the next changes are computed

    def by_edge(self) -> Float[Tensor, "prompt edge"]:
        """The products of each edge, on the CPU; without details one row for all prompts."""
        layout = self.of.layout
        dense = self.edges.reshape(-1, *layout.shape)
        return dense[:, layout.span, layout.target, layout.source].float().cpu()

    def _products(
        self, changes: SourceChanges, gradients: TargetGradients
    ) -> Float[Tensor, "part target source"]:
        """(c_u - out_u(clean)) . d L / d x_r of every source u and target r, summed by part."""
        if self.part is None and not self.of.details:
            return (gradients.flatten(1) @ changes.flatten(1).T)[None]
        if self.part is None:
            by_prompt = gradients.flatten(2).transpose(0, 1)
            return torch.bmm(by_prompt, changes.flatten(2).permute(1, 2, 0))
        at_tokens = gradients.flatten(1, 2).transpose(0, 1)
        by_token = torch.bmm(at_tokens, changes.flatten(1, 2).permute(1, 2, 0))
        by_part = by_token.new_zeros(len(self.edges), *by_token.shape[1:])
        return by_part.index_add_(0, self.part.flatten(), by_token)

    def _add_nodes(
        self, changes: Changes, some: SourceChanges, rows: slice, gradients: Sequence[Gradients]
    ) -> None:
        """All edges of a node together: its change times the gradient at its output."""
        nodes = changes.kept.nodes
        for _, group in output_groups(nodes):
            if group.start < rows.start or rows.stop < group.stop:
                continue
            name = written_hook(nodes[group.start])
            slopes = [each.written[name] for each in gradients if name in each.written]
            if slopes:
                own = some[group.start - rows.start : group.stop - rows.start]
                products = own * sum(slopes[1:], slopes[0])
                self.positions[group] += products.sum(-1)
                self.neurons[group] += products.sum((1, 2))


def _groups(model: Model, layout: EdgeLayout) -> Iterator[TargetGroup]:
    start, group = 0, list[HookedTarget]()
    for index, target in enumerate(layout.targets):
        group.append(target)
        is_last = index + 1 == len(layout.targets)
        if target[1] == SLOTS[-1] or is_last:
            stop = start + sum(count for *_, count in group)
            sources = [sources_of(model, node, layout.splits_embedding) for node, *_ in group]
            yield TargetGroup(tuple(group), slice(start, stop), max(sources))
            group, start = [], stop


def _chunks(changes: Changes, size: int) -> Iterator[slice]:
    """All sources in chunks of at most `size`; sources that write together are not separated."""
    start = stop = 0
    for _, rows in output_groups(changes.kept.nodes):
        if rows.stop - start > size and stop > start:
            yield slice(start, stop)
            start = stop
        stop = rows.stop
    yield slice(start, stop)


def _summed(
    gradients: Sequence[Gradients], group: TargetGroup, buffers: Sequence[Tensor]
) -> TargetGradients:
    """The sum over points of the gradients at a group's targets."""
    total, other = buffers[0][: len(group)], buffers[-1][: len(group)]
    gradients[0].at_inputs(group.targets, total)
    for each in gradients[1:]:
        each.at_inputs(group.targets, other)
        total += other
    return total


def _bytes(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)
