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
from circuits.models import Model
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

    Attributes:
        rows: the rows of the targets among all target rows.
        n_sources: the first `n_sources` nodes are sources of at least one of the targets.
    """

    targets: tuple[HookedTarget, ...]
    rows: slice
    n_sources: int

    def __len__(self) -> int:
        return self.rows.stop - self.rows.start


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

    def start(self, task: Task) -> BatchProducts:
        """Zeros for a batch of prompts."""
        (spans, rows, sources), cfg = self.layout.shape, self.model.cfg
        batch, pos = task.clean.shape
        prompts = batch if self.details else 1
        part = token_spans(self.graph, task)
        if part is not None:
            part = part + spans * torch.arange(prompts, device=part.device)[:, None]
        zeros = partial(torch.zeros, dtype=cfg.dtype, device=cfg.device)
        nodes = sources if self.details else 0
        return BatchProducts(
            self,
            part,
            edges=zeros(prompts * spans, rows, sources),
            positions=zeros(nodes, batch, pos),
            neurons=zeros(nodes, cfg.d_model),
        )

    @property
    def widest(self) -> int:
        """The number of target rows in the largest group."""
        return max(len(group) for group in self.groups)


@dataclass(eq=False)
class BatchProducts:
    """The products of one batch, summed over the points at which gradients are taken.

    Attributes:
        part: the part that each token's products belong to; None if all tokens of a prompt belong
            together. A part is a span, of one prompt with details, else of all prompts.
        positions: of nodes, by prompt and position; of no nodes without details.
        neurons: of nodes, by coordinate; of no nodes without details.
        steepest: the largest entry of a gradient at the logits.
    """

    of: EdgeProducts
    part: Tensor | None
    edges: DenseEdges
    positions: Float[Tensor, "node batch pos"]
    neurons: Float[Tensor, "node d_model"]
    steepest: float = 0.0

    def add(self, changes: Changes, gradients: Sequence[Gradients]) -> None:
        """Add the products of the changes with the sum of the gradients."""
        self.steepest = max(self.steepest, *(each.steepest for each in gradients))
        _, batch, pos = self.positions.shape
        widest = (self.of.widest, batch, pos, self.of.model.cfg.d_model)
        buffers = [self.neurons.new_empty(widest) for _ in gradients[:2]]
        for rows in self._chunks(changes, gradients, buffers):
            some = changes.outputs(rows)
            if self.of.details:
                self._add_nodes(changes, some, rows, gradients)
            for group in self.of.groups:
                upstream = min(group.n_sources, rows.stop) - rows.start
                if upstream > 0:
                    at_inputs = _summed(gradients, group, buffers)
                    sources = slice(rows.start, rows.start + upstream)
                    products = self._products(some[:upstream], at_inputs)
                    self.edges[:, group.rows, sources] += products
            del some  # before the next changes are computed

    def results(self) -> list[Tensor]:
        """On the CPU: products by prompt and edge; by prompt, node and position; by node and
        coordinate in one row; and `steepest`. Without details edges have one row for all prompts.
        """
        layout = self.of.layout
        dense = self.edges.reshape(-1, *layout.shape)
        by_edge = dense[:, layout.span, layout.target, layout.source]
        products = [by_edge, self.positions.transpose(0, 1), self.neurons[None]]
        steepest = torch.tensor([self.steepest], dtype=torch.float64)
        return [*(each.float().cpu() for each in products), steepest]

    def _chunks(
        self, changes: Changes, gradients: Sequence[Gradients], buffers: Sequence[Tensor]
    ) -> Iterator[slice]:
        """All sources, as many at a time as fit into memory; those that write together stay so."""
        held = [*changes.kept.activations.values(), *buffers]
        for each in gradients:
            held += [*each.residuals, *each.at.values()]
        free = self.of.budget - sum(tensor.nbytes for tensor in held)
        # A source's changes, their products with the gradient, and given outputs.
        copies = 1 + self.of.details + (changes.given is not None)
        size = free // (copies * buffers[0][0].nbytes)
        start = stop = 0
        for _, rows in output_groups(changes.kept.nodes):
            if rows.stop - start > size and stop > start:
                yield slice(start, stop)
                start = stop
            stop = rows.stop
        yield slice(start, stop)

    def _products(self, changes: SourceChanges, gradients: TargetGradients) -> DenseEdges:
        """(c_u - out_u(clean)) . d L / d x_r of every source u and target r, summed by part."""
        if self.part is None:
            prompts = len(self.edges)
            slopes = gradients.reshape(len(gradients), prompts, -1).transpose(0, 1)
            by_prompt = changes.reshape(len(changes), prompts, -1).permute(1, 2, 0)
            return torch.bmm(slopes, by_prompt)
        slopes = gradients.flatten(1, 2).transpose(0, 1)
        by_token = torch.bmm(slopes, changes.flatten(1, 2).permute(1, 2, 0))
        by_part = by_token.new_zeros(len(self.edges), *by_token.shape[1:])
        return by_part.index_add_(0, self.part.flatten(), by_token)

    def _add_nodes(
        self, changes: Changes, some: SourceChanges, rows: slice, gradients: Sequence[Gradients]
    ) -> None:
        """All edges of a node together: its change times the gradient at its output."""
        nodes = changes.kept.nodes
        for _, group in output_groups(nodes[rows]):
            name = written_hook(nodes[rows][group.start])
            slopes = [each.at[name] for each in gradients if name in each.at]
            if slopes:
                products = some[group] * sum(slopes[1:], slopes[0])
                self.positions[rows][group] += products.sum(-1)
                self.neurons[rows][group] += products.sum((1, 2))


def target_groups(model: Model, layout: EdgeLayout) -> Iterator[TargetGroup]:
    """Cut the targets into groups; each ends with the v slot of a layer's heads."""
    targets = layout.targets
    row = [0, *accumulate(count for *_, count in targets)]
    ends = [index + 1 for index, (_, slot, _) in enumerate(targets) if slot == SLOTS[-1]]
    for start, stop in pairwise([0, *ends, len(targets)]):
        last, *_ = targets[stop - 1]
        n_sources = sources_of(model, last, layout.splits_embedding)
        yield TargetGroup(targets[start:stop], slice(row[start], row[stop]), n_sources)


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
