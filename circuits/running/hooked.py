"""The reference executor: run a model with edges ablated, by hook points.

The input of target r in circuit M is

    x_r = b_r + sum over its sources u of  M[u, r] * out_u(M) + (1 - M[u, r]) * c_u

with out_u(M) the output of u in the same run and c_u its counterfactual output. In a running model
x_r is already the sum of all out_u(M), so a hook at the input adds

    sum over sources u of  (1 - M[u, r]) * (c_u - out_u(M)).

Hooks at the sources record out_u(M); one hook per layer and slot adds this sum. It is simple enough
to be checked by reading, and the oracle for everything faster.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial

import torch
from jaxtyping import Float, Int
from torch import Tensor

from circuits.graph.graph import EdgeMask, Graph
from circuits.models import (
    Hook,
    Model,
    frozen,
    input_hook,
    run_to_residual,
    scored_logits,
    separate_inputs,
    shape_of,
)
from circuits.models.component_graph import sources_of
from circuits.models.source_outputs import check_honoured, recording_hooks
from circuits.running.ablation import Ablation, Counterfactuals
from circuits.running.edge_layout import AblatedEdges, EdgeLayout, check_runnable
from circuits.running.settings import NO_RUNS, Counts, OfLogits, VariantLogits
from circuits.running.variants import KeptEdges, Variants
from circuits.system.memory import in_steps, memory_budget
from circuits.tasks.metrics import check_finite
from circuits.tasks.task import Task
from circuits.tasks.token_spans import token_spans

# On a CPU, circuits run together as long as the outputs of all their sources fit about into the
# caches; steps of 256 MB took three times as long.
CACHED_BYTES = 1 << 24

SpanIndices = Int[Tensor, "batch pos"]
Counterfactual = Float[Tensor, "source batch pos d_model"]
VariantOutputs = Float[Tensor, "source variant batch pos d_model"]
VariantResidual = Float[Tensor, "variant batch pos d_model"]
Hooks = Sequence[tuple[str, Hook]]


@dataclass(frozen=True, eq=False)
class HookedExecutor:
    """Runs circuits of one graph on the prompts of one task, see `executor.Executor`.

    Attributes:
        spans: the span of each token; None if edges are not split by position.
        counterfactuals: c_u, what the output of each source u is replaced by.
    """

    model: Model
    layout: EdgeLayout
    task: Task
    spans: SpanIndices | None
    counterfactuals: Counterfactual
    max_memory: int | None = None
    counts: Counts = field(default_factory=NO_RUNS.copy)

    @staticmethod
    def prepare(
        model: Model, graph: Graph, task: Task, ablation: Ablation, *, max_memory: int | None = None
    ) -> HookedExecutor:
        """Compute the replacement output of every source once, for all circuits to come."""
        check_runnable(model, graph, task)
        layout = EdgeLayout.of(model, graph)
        task = task.to(shape_of(model).device)
        spans = token_spans(graph, task)
        with frozen(model), torch.no_grad():
            check_honoured(model, layout.nodes, task.masked_prompts)
            counterfactuals = Counterfactuals.prepare(model, layout.nodes, task, ablation)
            replaced = counterfactuals.on(task)
        return HookedExecutor(model, layout, task, spans, replaced, max_memory)

    def logits(self, kept: KeptEdges) -> VariantLogits:
        """Logits of every circuit at every scored row."""
        on_device = kept.to(self.counterfactuals.device)
        ablated = self.layout.ablated(on_device)
        with frozen(self.model), torch.no_grad(), separate_inputs(self.model):
            parts = [self._part_logits(prompts, ablated) for prompts in self.parts()]
        logits = torch.cat(parts, dim=1)
        check_finite(logits, self.model)
        n_nodes = len(self.layout.nodes)
        self.counts["node_evaluations"] += n_nodes * len(kept)
        self.counts["batches"] += 1
        return logits

    def map(self, variants: Variants, function: OfLogits) -> Tensor:
        """`function` of the logits."""
        return function(self.logits(variants.dense()))

    def near(self, kept: EdgeMask) -> None:
        """Ignored: nothing is reused from circuit to circuit."""

    def fixed_cost(self, edges: Sequence[int]) -> float:
        """Little: every circuit is a whole run."""
        return 0.1

    def parts(self) -> list[slice]:
        """The prompts in parts for which the outputs of all sources fit into memory."""
        budget = memory_budget(self.counterfactuals.device, self.max_memory)
        prompt_bytes = self.counterfactuals[:, 0].nbytes
        size = max(1, budget // prompt_bytes)
        starts = range(0, len(self.task), size)
        return [slice(start, start + size) for start in starts]

    def _part_logits(self, prompts: slice, ablated: AblatedEdges) -> VariantLogits:
        """Logits on some prompts, of as many circuits at a time as fit into memory."""
        budget = memory_budget(shape_of(self.model).device, self.max_memory, cpu_bytes=CACHED_BYTES)
        circuit_bytes = self.counterfactuals[:, prompts].nbytes
        size = max(1, budget // circuit_bytes)
        step = partial(self._run, prompts, ablated)
        parts = in_steps(step, len(ablated), size, "circuit")
        return torch.cat([logits for _, logits in parts])

    def _run(self, prompts: slice, ablated: AblatedEdges, circuits: slice) -> Tensor:
        """Logits [circuit, scored, vocab] of some circuits, from one forward pass."""
        _, residual = self.run(prompts, ablated[circuits])
        n_circuits = len(residual)
        scored = self.task[prompts].scored
        scored = scored.repeat(n_circuits, 1)
        rows = residual.flatten(0, 1)
        logits = scored_logits(self.model, rows, scored)
        return logits.unflatten(0, (n_circuits, -1))

    def run(
        self, prompts: slice, ablated: AblatedEdges, observers: Hooks = ()
    ) -> tuple[VariantOutputs, VariantResidual]:
        """Run circuits: the outputs of all sources, and the residual stream after the last layer.

        Args:
            observers: hooks that see activations as edges are ablated, on the prompts of one
                circuit after the other.
        """
        model, task = self.model, self.task[prompts]
        n_circuits = len(ablated)
        # out_u(M) of every source u, filled in as the pass goes on
        n_sources, *shape = self.counterfactuals[:, prompts].shape
        outputs = self.counterfactuals.new_empty(n_sources, n_circuits, *shape)
        # A source writes before its targets read, so its row is filled when they need it.
        recording = recording_hooks(model, self.layout.nodes, outputs)
        ablating = self._ablating_hooks(prompts, ablated, outputs)
        hooks: Hooks = [*recording, *ablating, *observers]
        # Every circuit runs on a copy of the prompts.
        tokens = task.clean.repeat(n_circuits, 1)
        mask = task.mask.repeat(n_circuits, 1)
        residual = run_to_residual(model, tokens, mask, hooks)
        return outputs, residual.unflatten(0, (n_circuits, -1))

    def _ablating_hooks(
        self, prompts: slice, ablated: AblatedEdges, outputs: VariantOutputs
    ) -> Iterator[tuple[str, partial[Tensor]]]:
        """Hooks that change the inputs of targets into which edges are ablated."""
        counterfactuals = self.counterfactuals[:, prompts]
        spans = None if self.spans is None else self.spans[prompts]
        model, layout = self.model, self.layout
        row = 0
        for node, slot, count in layout.targets:
            n = sources_of(model, node, layout.splits_embedding)
            edges = ablated[:, :, row : row + count, :n]
            row += count
            if edges.any():
                upstream = counterfactuals[:n], outputs[:n]
                hook = partial(_ablate, edges, spans, *upstream)
                yield input_hook(model, node, slot), hook


def _ablate(
    ablated: AblatedEdges,
    spans: SpanIndices | None,
    counterfactuals: Counterfactual,
    outputs: VariantOutputs,
    activation: Tensor,
) -> Tensor:
    """What targets read when edges from some sources to them are ablated."""
    # c_u - out_u(M)
    difference = counterfactuals[:, None] - outputs
    weights = ablated.to(difference.dtype)
    # sum over sources u of (1 - M[u, r]) * (c_u - out_u(M))
    if spans is None:
        change = torch.einsum("vru,uvbpd->vbprd", weights[:, 0], difference)
    else:
        by_token = weights[:, spans]
        change = torch.einsum("vbpru,uvbpd->vbprd", by_token, difference)
    return activation + change.reshape(activation.shape)
