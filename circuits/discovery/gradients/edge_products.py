"""Changes times gradients: what every edge of a batch of prompts adds to its score.

Changes stand source by source, [source, batch * pos * d_model], gradients target by target, so that all edges into a layer are one matrix
product. Both are large, and made from what is smaller (z, and the gradients of q, k and v) for one layer of targets and for as many sources
at a time as fit into memory.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from circuits.discovery.gradients.gradient_pass import Gradients, HookedTarget, written_hook
from circuits.graph.edges import SLOTS
from circuits.graph.graph import Graph
from circuits.models import Model
from circuits.models.component_graph import sources_of
from circuits.models.source_outputs import output_groups
from circuits.running.ablation import Changes
from circuits.running.edge_layout import EdgeLayout
from circuits.tasks.task import Task
from circuits.tasks.token_spans import token_spans


@dataclass(frozen=True)
class TargetGroup:
    """Targets multiplied together: the heads of one layer and the MLP below, or the last MLP and the logits.

    An MLP is thereby also multiplied with its own output, for which there is no edge.

    Attributes:
        rows: where they stand among all targets.
        sources: so many, the first ones, are sources of one of them.
    """

    targets: tuple[HookedTarget, ...]
    rows: slice
    sources: int


@dataclass(frozen=True)
class Needed:
    """Bytes of a batch: what it takes however small it is, and what each prompt adds."""

    fixed: int
    per_prompt: int

    def __or__(self, other: Needed) -> Needed:
        """Enough for either."""
        return Needed(max(self.fixed, other.fixed), max(self.per_prompt, other.per_prompt))

    def of(self, prompts: int) -> int:
        """What so many prompts take."""
        return self.fixed + prompts * self.per_prompt

    def prompts(self, budget: int) -> int:
        """How many prompts fit, but at least one."""
        return max(1, (budget - self.fixed) // self.per_prompt)


@dataclass(frozen=True, eq=False)
class EdgeProducts:
    """What multiplying needs to know of model and graph.

    Attributes:
        details: products are kept apart by prompt, and those of nodes by position and by coordinate.
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
        """For this model's components.

        Raises:
            InputError: the graph is not a component graph of this model.
        """
        layout = EdgeLayout.of(model, graph)
        return EdgeProducts(model, graph, layout, tuple(_groups(model, layout)), details, budget)

    def start(self, task: Task) -> BatchProducts:
        """Zeros for a batch of prompts."""
        spans, rows, sources = self.layout.shape
        index = token_spans(self.graph, task)
        batch, pos = task.clean.shape
        if index is not None and self.details:
            index = index + spans * torch.arange(batch, device=index.device)[:, None]
        parts = batch if self.details else 1
        empty = torch.zeros(0, dtype=self.model.cfg.dtype, device=self.model.cfg.device)
        shapes = (
            ((sources, batch, pos), (sources, self.model.cfg.d_model))
            if self.details
            else ((0, 0, 0), (0, 0))
        )
        return BatchProducts(
            self,
            index,
            empty.new_zeros(parts * spans, rows, sources),
            *(empty.new_zeros(shape) for shape in shapes),
        )

    def least_bytes(self, pos: int, points: int) -> Needed:
        """What multiplying takes when the sources come layer by layer.

        Args:
            pos: tokens of a prompt.
            points: gradients that are multiplied together.
        """
        cfg = self.model.cfg
        heads, mlp = cfg.n_heads * cfg.d_head, 0 if cfg.attn_only else cfg.d_model
        kept = 2 * (2 * cfg.d_model + cfg.n_layers * (heads + mlp))
        kept += points * (
            cfg.d_model
            + cfg.n_layers * (3 * heads + mlp + cfg.d_model * (3 if self.details else 1))
        )
        changes = cfg.n_heads * self._bytes_per_row(1, 1, given=True) // cfg.dtype.itemsize
        token = kept + changes + heads + cfg.d_model * (self._widest * min(points, 2) + 4)
        spans, rows, sources = self.layout.shape
        token += 0 if self.graph.positions is None else self._widest * sources
        dense = spans * rows * sources * cfg.dtype.itemsize
        per_prompt = token * pos * cfg.dtype.itemsize + (2 * dense if self.details else 0)
        return Needed(
            2 * heads * cfg.d_model * cfg.dtype.itemsize + (0 if self.details else dense),
            per_prompt,
        )

    @property
    def _widest(self) -> int:
        return max(group.rows.stop - group.rows.start for group in self.groups)

    def _bytes_per_row(self, batch: int, pos: int, given: bool) -> int:
        """Of a source's changes, of those times the gradient, and of outputs that were given."""
        return (
            batch
            * pos
            * self.model.cfg.d_model
            * self.model.cfg.dtype.itemsize
            * (1 + self.details + given)
        )


@dataclass(frozen=True, eq=False)
class BatchProducts:
    """The products of one batch, added up over the points at which gradients are taken.

    Attributes:
        tokens: the part (prompt and span) that each token's products belong to; None where a prompt's belong together.
        edges: [part target source], a part being a span of one prompt with details, else of all of them.
        positions: of nodes, by prompt and position; empty without details.
        neurons: of nodes, by coordinate; empty without details.
    """

    of: EdgeProducts
    tokens: Tensor | None
    edges: Float[Tensor, "part target source"]
    positions: Float[Tensor, "node batch pos"]
    neurons: Float[Tensor, "node d_model"]

    def add(self, changes: Changes, gradients: Sequence[Gradients]) -> None:
        """Multiply the changes with the sum of the gradients."""
        batch, pos = next(iter(changes.kept.activations.values())).shape[:2]
        buffers = [
            self.neurons.new_empty(self.of._widest, batch, pos, self.of.model.cfg.d_model)
            for _ in gradients[:2]
        ]
        held = _bytes(
            [
                *changes.kept.activations.values(),
                *buffers,
                *(tensor for part in gradients for tensor in part.tensors),
            ]
        )
        row = self.of._bytes_per_row(batch, pos, changes.given is not None)
        for rows in _chunks(changes, max(1, (self.of.budget - held) // row)):
            some = changes.outputs(rows)
            if self.of.details:
                self._add_nodes(changes, some, rows.start, gradients)
            for group in self.of.groups:
                sources = min(group.sources, rows.stop) - rows.start
                if sources > 0:
                    products = _product(
                        some[:sources],
                        _summed(gradients, group, buffers),
                        self.tokens,
                        len(self.edges),
                        self.of.details,
                    )
                    self.edges[:, group.rows, rows.start : rows.start + sources] += products
            # Freed before the next are made.
            del some

    def by_edge(self) -> Float[Tensor, "prompt edge"]:
        """The products of each edge, on the CPU; one row for all prompts without details."""
        layout = self.of.layout
        dense = self.edges.reshape(-1, *layout.shape)
        return dense[:, layout.span, layout.target, layout.source].float().cpu()

    def _add_nodes(
        self, changes: Changes, some: Tensor, start: int, gradients: Sequence[Gradients]
    ) -> None:
        """All edges of a node together: its change times the gradient at what it writes."""
        for name, rows in _groups_within(changes, start, start + len(some)):
            slopes = [part.written[name] for part in gradients if name in part.written]
            if slopes:
                products = some[rows.start - start : rows.stop - start] * sum(slopes[1:], slopes[0])
                self.positions[rows] += products.sum(-1)
                self.neurons[rows] += products.sum((1, 2))


def _groups(model: Model, layout: EdgeLayout) -> Iterator[TargetGroup]:
    split, start = layout.splits_embedding, 0
    waiting: list[HookedTarget] = []
    for index, target in enumerate(layout.targets):
        waiting.append(target)
        if target[1] == SLOTS[-1] or index + 1 == len(layout.targets):
            stop = start + sum(count for *_, count in waiting)
            sources = max(sources_of(model, node, split) for node, *_ in waiting)
            yield TargetGroup(tuple(waiting), slice(start, stop), sources)
            waiting, start = [], stop


def _groups_within(changes: Changes, start: int, stop: int) -> Iterator[tuple[str, slice]]:
    """The sources that write together, by where the gradient at what they write is kept."""
    nodes = changes.kept.nodes
    for _, rows in output_groups(nodes):
        if start <= rows.start and rows.stop <= stop:
            yield written_hook(nodes[rows.start]), rows


def _chunks(changes: Changes, size: int) -> Iterator[slice]:
    """All sources in runs of at most `size`, but never less than those that write together."""
    start = stop = 0
    for _, rows in output_groups(changes.kept.nodes):
        if rows.stop - start > size and stop > start:
            yield slice(start, stop)
            start = stop
        stop = rows.stop
    yield slice(start, stop)


def _summed(
    gradients: Sequence[Gradients], group: TargetGroup, buffers: Sequence[Tensor]
) -> Float[Tensor, "target batch pos d_model"]:
    """The sum of the gradients at a group's targets."""
    total, other = (
        buffer[: group.rows.stop - group.rows.start] for buffer in (buffers[0], buffers[-1])
    )
    gradients[0].at_inputs(group.targets, total)
    for part in gradients[1:]:
        part.at_inputs(group.targets, other)
        total += other
    return total


def _product(
    changes: Float[Tensor, "source batch pos d_model"],
    gradients: Float[Tensor, "target batch pos d_model"],
    tokens: Tensor | None,
    parts: int,
    details: bool,
) -> Float[Tensor, "part target source"]:
    """Inner products over the tokens of each part."""
    if tokens is None and not details:
        return (gradients.flatten(1) @ changes.flatten(1).T)[None]
    if tokens is None:
        return torch.bmm(gradients.flatten(2).transpose(0, 1), changes.flatten(2).permute(1, 2, 0))
    by_token = torch.bmm(
        gradients.flatten(1, 2).transpose(0, 1), changes.flatten(1, 2).permute(1, 2, 0)
    )
    return by_token.new_zeros(parts, *by_token.shape[1:]).index_add_(0, tokens.flatten(), by_token)


def _bytes(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)
