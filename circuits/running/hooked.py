"""The reference executor: run a model with edges ablated, by hook points.

A node's input in circuit M is  x_r = b_r + sum over its sources u of  M[u, r] * out_u(M) + (1 - M[u, r]) * c_u,  with out_u(M) computed in
the same run and c_u the counterfactual output. In a running model x_r holds the sum of the out_u(M) already, so a hook at the input adds
(1 - M[u, r]) * (c_u - out_u(M)).  One hook per source records c_u - out_u(M); one hook per layer and slot adds what is ablated there.
It is simple enough to be believed by reading, and the oracle for everything faster.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial

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

# Circuits run together on a CPU while what all their sources write stays about in its caches; in steps of 256 MB each took three times as long.
CACHED_BYTES = 1 << 24


@dataclass(frozen=True, eq=False)
class HookedExecutor:
    """Runs circuits of one graph on the prompts of one task.

    Attributes:
        batches: the task in pieces, each with its counterfactual outputs and the span of each token (None without positions).
    """

    model: Model
    layout: EdgeLayout
    task: Task
    batches: tuple[
        tuple[Task, Float[Tensor, "source batch pos d_model"], Int[Tensor, "batch pos"] | None], ...
    ]
    max_memory: int | None = None
    counts: dict[str, int] = field(default_factory=lambda: {"node_evaluations": 0, "batches": 0})

    @staticmethod
    def prepare(
        model: Model, graph: Graph, task: Task, ablation: Ablation, *, max_memory: int | None = None
    ) -> HookedExecutor:
        """Run the counterfactual prompts once, for every circuit that follows.

        Raises:
            InputError: the model is not supported, or the graph does not belong to it.
        """
        check_supported(model)
        check_fits(model, graph)
        check_task(model, task)
        task = task.to(model.cfg.device)
        layout = EdgeLayout.of(model, graph)
        with frozen(model), torch.no_grad():
            counterfactuals = Counterfactuals.prepare(model, layout.nodes, task, ablation)
            spans = token_spans(graph, task)
            per_prompt = (
                len(layout.nodes)
                * task.clean.shape[1]
                * model.cfg.d_model
                * model.cfg.dtype.itemsize
            )
            size = max(1, memory_budget(model.cfg.device, max_memory) // per_prompt)
            pieces = [slice(start, start + size) for start in range(0, len(task), size)]
            batches = [
                (
                    task[piece],
                    counterfactuals.on(task[piece], piece),
                    None if spans is None else spans[piece],
                )
                for piece in pieces
            ]
        return HookedExecutor(model, layout, task, tuple(batches), max_memory)

    def logits(self, kept: Bool[Tensor, "variant edge"]) -> Float[Tensor, "variant scored vocab"]:
        """Logits of every circuit at every scored row.

        Raises:
            InputError: the logits overflow.
        """
        with frozen(self.model), torch.no_grad(), separate_inputs(self.model):
            parts = [self._batch_logits(kept, *batch) for batch in self.batches]
        logits = torch.cat(parts, dim=1)
        check_finite(logits)
        self.counts["node_evaluations"] += len(kept) * len(self.layout.nodes)
        self.counts["batches"] += 1
        return logits

    def map(
        self, kept: Bool[Tensor, "variant edge"], function: Callable[[Tensor], Tensor]
    ) -> Tensor:
        """`function` of the logits.

        Raises:
            InputError: the logits overflow.
        """
        return function(self.logits(kept))

    def near(self, kept: Bool[Tensor, " edge"]) -> None:
        """Nothing is kept from circuit to circuit."""

    def fixed_cost(self, edges: Sequence[int]) -> float:
        """Every circuit is a whole run; there is little on top."""
        return 0.1

    def _batch_logits(
        self,
        kept: Bool[Tensor, "variant edge"],
        task: Task,
        counterfactuals: Float[Tensor, "source batch pos d_model"],
        spans: Int[Tensor, "batch pos"] | None,
    ) -> Float[Tensor, "variant scored vocab"]:
        budget = memory_budget(self.model.cfg.device, self.max_memory, cpu_bytes=CACHED_BYTES)
        size = max(1, budget // max(1, counterfactuals.numel() * counterfactuals.element_size()))
        ablated = self.layout.ablated(kept.to(task.clean.device))

        def run(start: int, count: int) -> Tensor:
            return _run(
                self.model,
                self.layout,
                ablated[start : start + count],
                task,
                counterfactuals,
                spans,
            )

        parts: list[Tensor] = []
        done = 0
        while done < len(kept):
            part, size = shrinking(partial(run, done), size, "circuit")
            parts.append(part)
            done += size
        return torch.cat(parts)


def _run(
    model: Model,
    layout: EdgeLayout,
    ablated: Bool[Tensor, "variant span target source"],
    task: Task,
    counterfactuals: Float[Tensor, "source batch pos d_model"],
    spans: Int[Tensor, "batch pos"] | None,
) -> Float[Tensor, "variant scored vocab"]:
    variants = len(ablated)
    outputs = torch.empty(
        len(layout.nodes),
        variants,
        *counterfactuals.shape[1:],
        dtype=counterfactuals.dtype,
        device=counterfactuals.device,
    )
    hooks = [
        *recording_hooks(model, layout.nodes, outputs),
        *_ablating_hooks(model, layout, ablated, counterfactuals, outputs, spans),
    ]
    tokens, mask = (
        repeat(tensor, "batch pos -> (variant batch) pos", variant=variants)
        for tensor in (task.clean, task.mask)
    )
    residual = rearrange(
        run_to_residual(model, tokens, mask, hooks),
        "(variant batch) pos d_model -> variant batch pos d_model",
        variant=variants,
    )
    return unembed(model, residual[:, task.scored])


def _ablating_hooks(
    model: Model,
    layout: EdgeLayout,
    ablated: Bool[Tensor, "variant span target source"],
    counterfactuals: Float[Tensor, "source batch pos d_model"],
    outputs: Float[Tensor, "source variant batch pos d_model"],
    spans: Int[Tensor, "batch pos"] | None,
) -> list[tuple[str, Hook]]:
    hooks, row = [], 0
    for node, slot, count in layout.targets:
        sources = sources_of(model, node, layout.splits_embedding)
        mask = ablated[:, :, row : row + count, :sources]
        if bool(mask.any()):
            hooks.append(
                (
                    input_hook(model, node, slot),
                    _ablator(
                        mask,
                        counterfactuals[:sources],
                        outputs[:sources],
                        spans,
                        isinstance(node, Head),
                    ),
                )
            )
        row += count
    return hooks


def _ablator(
    mask: Bool[Tensor, "variant span target source"],
    counterfactuals: Float[Tensor, "source batch pos d_model"],
    outputs: Float[Tensor, "source variant batch pos d_model"],
    spans: Int[Tensor, "batch pos"] | None,
    has_heads: bool,
) -> Hook:
    def ablate(activation: Tensor) -> Tensor:
        difference = counterfactuals[:, None] - outputs
        weights = mask.to(difference.dtype)
        if spans is None:
            change = torch.einsum("vru,uvbpd->vbprd", weights[:, 0], difference)
        else:
            change = torch.einsum("vbpru,uvbpd->vbprd", weights[:, spans], difference)
        change = change if has_heads else change.squeeze(-2)
        return activation + change.reshape(activation.shape)

    return ablate
