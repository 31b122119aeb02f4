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

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from einops import rearrange, repeat
from jaxtyping import Bool, Float, Int
from torch import Tensor

from circuits.graph.graph import Graph
from circuits.graph.nodes import Head
from circuits.models import (
    Hook,
    Model,
    frozen,
    input_hook,
    run_to_residual,
    separate_inputs,
    unembed,
)
from circuits.models.component_graph import check_supported, sources_of
from circuits.models.identity import check_fits
from circuits.models.source_outputs import recording_hooks
from circuits.running.ablation import Ablation, Counterfactuals
from circuits.running.edge_layout import EdgeLayout
from circuits.system.memory import memory_budget, shrinking
from circuits.tasks.metrics import check_finite
from circuits.tasks.model_fit import check_task
from circuits.tasks.task import Task
from circuits.tasks.token_spans import token_spans

# On a CPU, circuits run together as long as the outputs of all their sources fit about into the
# caches; steps of 256 MB took three times as long.
CACHED_BYTES = 1 << 24

KeptEdges = Bool[Tensor, "variant edge"]
AblatedEdges = Bool[Tensor, "variant span target source"]
VariantLogits = Float[Tensor, "variant scored vocab"]


@dataclass(frozen=True, eq=False)
class PromptBatch:
    """Some prompts of a task.

    Attributes:
        counterfactuals: what each source's output is replaced by.
        spans: the span of each token; None if edges are not split by position.
    """

    task: Task
    counterfactuals: Float[Tensor, "source batch pos d_model"]
    spans: Int[Tensor, "batch pos"] | None


@dataclass(frozen=True, eq=False)
class HookedExecutor:
    """Runs circuits of one graph on the prompts of one task, see `executor.Executor`."""

    model: Model
    layout: EdgeLayout
    batches: tuple[PromptBatch, ...]
    max_memory: int | None = None
    counts: dict[str, int] = field(default_factory=lambda: {"node_evaluations": 0, "batches": 0})

    @staticmethod
    def prepare(
        model: Model,
        graph: Graph,
        task: Task,
        ablation: Ablation,
        *,
        max_memory: int | None = None,
    ) -> HookedExecutor:
        """Run the counterfactual prompts once, for all circuits to come.

        Raises:
            InputError: the model is not supported, or the graph does not belong to it.
        """
        check_supported(model)
        check_fits(model, graph)
        check_task(model, task)
        task, layout = task.to(model.cfg.device), EdgeLayout.of(model, graph)
        spans = token_spans(graph, task)
        pos, cfg = task.clean.shape[1], model.cfg
        prompt_bytes = len(layout.nodes) * pos * cfg.d_model * cfg.dtype.itemsize
        size = max(1, memory_budget(cfg.device, max_memory) // prompt_bytes)
        batches = []
        with frozen(model), torch.no_grad():
            counterfactuals = Counterfactuals.prepare(model, layout.nodes, task, ablation)
            for start in range(0, len(task), size):
                prompts = slice(start, start + size)
                replaced = counterfactuals.on(task[prompts], prompts)
                part = None if spans is None else spans[prompts]
                batches.append(PromptBatch(task[prompts], replaced, part))
        return HookedExecutor(model, layout, tuple(batches), max_memory)

    def logits(self, kept: KeptEdges) -> VariantLogits:
        """Logits of every circuit at every scored row.

        Raises:
            InputError: the logits overflow.
        """
        with frozen(self.model), torch.no_grad(), separate_inputs(self.model):
            parts = [self._batch_logits(kept, batch) for batch in self.batches]
        logits = torch.cat(parts, dim=1)
        check_finite(logits)
        self.counts["node_evaluations"] += len(kept) * len(self.layout.nodes)
        self.counts["batches"] += 1
        return logits

    def map(self, kept: KeptEdges, function: Callable[[Tensor], Tensor]) -> Tensor:
        """`function` of the logits.

        Raises:
            InputError: the logits overflow.
        """
        return function(self.logits(kept))

    def near(self, kept: Bool[Tensor, " edge"]) -> None:
        """Ignored: nothing is reused from circuit to circuit."""

    def fixed_cost(self, edges: Sequence[int]) -> float:
        """Little: every circuit is a whole run."""
        return 0.1

    def _batch_logits(self, kept: KeptEdges, batch: PromptBatch) -> VariantLogits:
        """As many circuits at a time as fit into memory."""
        counterfactuals = batch.counterfactuals
        circuit_bytes = max(1, counterfactuals.numel() * counterfactuals.element_size())
        budget = memory_budget(self.model.cfg.device, self.max_memory, cpu_bytes=CACHED_BYTES)
        ablated = self.layout.ablated(kept.to(counterfactuals.device))
        size, parts, done = max(1, budget // circuit_bytes), list[Tensor](), 0
        while done < len(kept):

            def run(circuits: int, start: int = done) -> VariantLogits:
                return self._run(ablated[start : start + circuits], batch)

            part, size = shrinking(run, min(size, len(kept) - done), "circuit")
            parts.append(part)
            done += size
        return torch.cat(parts)

    def _run(self, ablated: AblatedEdges, batch: PromptBatch) -> VariantLogits:
        """One forward pass; every variant is a copy of the prompts."""
        variants, counterfactuals, task = len(ablated), batch.counterfactuals, batch.task
        shape = (len(self.layout.nodes), variants, *counterfactuals.shape[1:])
        # out_u(M) of every source u, filled in as the pass goes on
        outputs = counterfactuals.new_empty(shape)
        hooks = [
            *recording_hooks(self.model, self.layout.nodes, outputs),
            *self._ablating_hooks(ablated, batch, outputs),
        ]
        tokens, mask = (
            repeat(tensor, "batch pos -> (variant batch) pos", variant=variants)
            for tensor in (task.clean, task.mask)
        )
        residual = rearrange(
            run_to_residual(self.model, tokens, mask, hooks),
            "(variant batch) pos d_model -> variant batch pos d_model",
            variant=variants,
        )
        return unembed(self.model, residual[:, task.scored])

    def _ablating_hooks(
        self,
        ablated: AblatedEdges,
        batch: PromptBatch,
        outputs: Float[Tensor, "source variant batch pos d_model"],
    ) -> list[tuple[str, Hook]]:
        """A hook for every layer and slot that some variant ablates edges into."""
        hooks, row = [], 0
        for node, slot, count in self.layout.targets:
            sources = sources_of(self.model, node, self.layout.splits_embedding)
            mask = ablated[:, :, row : row + count, :sources]
            row += count
            if bool(mask.any()):
                has_heads = isinstance(node, Head)
                hook = _ablating_hook(mask, batch, outputs[:sources], has_heads)
                hooks.append((input_hook(self.model, node, slot), hook))
        return hooks


def _ablating_hook(
    ablated: AblatedEdges,
    batch: PromptBatch,
    outputs: Float[Tensor, "source variant batch pos d_model"],
    has_heads: bool,
) -> Hook:
    def ablate(activation: Tensor) -> Tensor:
        counterfactuals = batch.counterfactuals[: len(outputs), None]
        # c_u - out_u(M)
        difference = counterfactuals - outputs
        weights = ablated.to(difference.dtype)
        # sum over sources u of (1 - M[u, r]) * (c_u - out_u(M))
        if batch.spans is None:
            change = torch.einsum("vru,uvbpd->vbprd", weights[:, 0], difference)
        else:
            by_token = weights[:, batch.spans]
            change = torch.einsum("vbpru,uvbpd->vbprd", by_token, difference)
        change = change if has_heads else change.squeeze(-2)
        return activation + change.reshape(activation.shape)

    return ablate
