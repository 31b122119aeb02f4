"""The incremental executor: run circuits by recomputing only what changes.

It is exact, like the reference executor in `hooked`, but its cost falls with the circuit. A base
run of some circuit M0 gives the output out0_u of every source u and the input x0_r of every target
r. To run another circuit M:

1. Edges that differ change their targets' inputs by known tensors: an ablated edge u->r adds
   c_u - out0_u to x_r, a restored edge subtracts it (`edge_changes`).
2. Walk downstream. A node is recomputed only if a changed node reaches it along a kept edge and it
   still reaches the logits (`plan`). Its input is then (`batch`)

       x_r = x0_r + sum over recomputed sources u of  M[u, r] * (out_u - out0_u)
                  + sum over changed edges u->r of    (M[u, r] - M0[u, r]) * (out0_u - c_u)

   If only some of a head's q, k and v change, the others come from the base.
3. Tokens that cannot change or do not matter are skipped, and the logits are computed at the
   scored tokens only (`tokens`).

Many circuits run as one batch. Read this module first, then `plan`, then `batch`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from circuits.graph.graph import Graph
from circuits.models import Model, frozen
from circuits.models.component_graph import check_supported
from circuits.models.functional import Multiply, multiply
from circuits.models.identity import check_fits
from circuits.models.source_outputs import TOLERANCE, embedding_outputs, source_outputs
from circuits.running.ablation import Ablation, Counterfactuals
from circuits.running.edge_layout import EdgeLayout
from circuits.running.incremental.base_state import BaseRun, EdgeMask, RunTensors, Variants
from circuits.running.incremental.batch import VariantRun, product_of_values, rounds_changes
from circuits.running.incremental.cost import Cost
from circuits.running.incremental.edge_changes import EdgeChanges
from circuits.running.incremental.plan import Indices, Plan, make_plan
from circuits.running.incremental.sublayer_run import RunContext, TaskModel, UnsupportedError
from circuits.running.incremental.tokens import Window
from circuits.running.precision import Background, Precision
from circuits.system.errors import InputError
from circuits.system.memory import memory_budget, shrinking
from circuits.tasks.metrics import check_finite
from circuits.tasks.model_fit import check_task
from circuits.tasks.task import Task
from circuits.tasks.token_spans import token_spans

CHECKED_PROMPTS = 8


@dataclass(frozen=True, eq=False)
class IncrementalExecutor:
    """Runs circuits of one graph on the prompts of one task, each from a base run.

    Attributes:
        context: what all runs share.
        whole: the base run of the whole model.
        budget: memory that one batch may take, in bytes.
        background: how to compute the products that need not be exact; None if all are exact.
        bases: base runs of other circuits: "empty" has no edges, "near" was given to `near`.
        counts: "node_evaluations" (each variant counted) and "batches" so far.
    """

    context: RunContext
    whole: BaseRun
    budget: int
    background: Background | None = None
    bases: dict[str, BaseRun] = field(default_factory=dict)
    counts: dict[str, int] = field(default_factory=lambda: {"node_evaluations": 0, "batches": 0})

    @staticmethod
    def prepare(
        model: Model,
        graph: Graph,
        task: Task,
        ablation: Ablation,
        *,
        max_memory: int | None = None,
        precision: Precision | None = None,
    ) -> IncrementalExecutor:
        """Run the clean and the counterfactual prompts, once for all circuits that follow.

        Args:
            max_memory: memory that one batch may take, in bytes; None chooses from what is free.
            precision: how exact products are; None is the model's own precision throughout.

        Raises:
            InputError: the model is not supported, or model, graph, task and precision do not fit
                together.
            UnsupportedError: the model computes something that is not implemented here.
        """
        check_supported(model)
        check_fits(model, graph)
        check_task(model, task)
        background = None if precision is None else _background(model, precision)
        product = product_of_values(background)
        device, causal = model.cfg.device, model.cfg.attention_dir == "causal"
        task, layout = task.to(device), EdgeLayout.of(model, graph)
        window = Window.of(task, causal=causal, resample=ablation.name == "resample")
        with frozen(model), torch.no_grad():
            task_model = TaskModel.of(model, task, layout, window)
            clean = _run_clean_prompts(task_model, product)
            # c_u and out_u - c_u of every source u
            replacing = _counterfactual_outputs(task_model, ablation, clean, product)
            differences = clean.outputs - replacing
        tokens, spans = window.all, token_spans(graph, task)
        if spans is not None:
            spans = spans[tokens.prompts, tokens.positions]
        scored = window.scored.select(differences).contiguous()
        by_tokens = {tokens: differences, window.scored: scored}
        possible = layout.possible(model).numpy()
        context = RunContext(task_model, replacing, by_tokens, spans, possible)
        kept = torch.ones(len(graph), dtype=torch.bool)
        whole = BaseRun.of(clean, kept, context.mask(kept))
        return IncrementalExecutor(context, whole, memory_budget(device, max_memory), background)

    def exact(self) -> IncrementalExecutor:
        """The same executor without a background; both share their base runs."""
        return replace(self, background=None)

    def logits(self, kept: Variants) -> Float[Tensor, "variant scored vocab"]:
        """Logits of every circuit at every scored token; raises what `map` raises."""
        return self.map(kept, lambda logits: logits)

    def map(self, kept: Variants, function: Callable[[Tensor], Tensor]) -> Tensor:
        """Apply a function to the logits batch by batch, so that they need not all fit in memory.

        Args:
            kept: the edges of each circuit.
            function: from the logits of a batch [variant, scored, vocab] to [variant, ...].

        Raises:
            InputError: the logits overflow, or memory runs out.
        """
        kept = kept.cpu()
        run = self._variant_run(self._nearest_base(kept), kept)
        cost = Cost.of(run.plan, self.context.model)
        # If changes are rounded, the base runs along as one more variant.
        n_fixed = int(rounds_changes(self.background))
        size = max(1, min(len(kept), self.budget // cost.bytes - n_fixed))
        results: list[Tensor] = []
        done = 0
        while done < len(kept):
            step = partial(self._apply, function, run, done)
            result, size = shrinking(step, size, "circuit")
            results.append(result)
            done += size
        return results[0] if len(results) == 1 else torch.cat(results)

    def near(self, kept: EdgeMask) -> None:
        """Compute the circuits that follow, mostly subsets of this one, from a base run of it."""
        base = self.bases.get("near")
        if base is None or not base.contains(kept):
            base = self.bases["near"] = self.whole.copy()
        if torch.equal(kept, base.kept):
            return
        run = self._variant_run(base, kept[None])
        # Changes of the base itself are never rounded: all else is computed from it.
        if rounds_changes(self.background):
            run.background = None
        shrinking(lambda _: run.commit(), 1, "circuit")
        self.counts["node_evaluations"] += run.n_evaluated

    def fixed_cost(self, edges: Sequence[int]) -> float:
        """Overhead of a batch whose circuits drop some of these edges, in units of one circuit."""
        base, model = self.bases.get("near", self.whole), self.context.model
        targets = np.unique(model.layout.target.numpy()[edges])
        return Cost.of(self._plan(base, base.kept[None], targets), model).fixed

    def _nearest_base(self, kept: Variants) -> BaseRun:
        near = self.bases.get("near")
        if near is not None and near.contains(kept):
            return near
        # Edges that the graph lacks are always kept: then no circuit is without edges.
        n_possible = int(self.context.possible.sum()) * self.context.model.layout.shape[0]
        if int(kept.sum()) * 2 > kept.numel() or kept.shape[1] < n_possible:
            return self.whole
        if "empty" not in self.bases:
            self.bases["empty"] = self._run_empty_circuit()
        return self.bases["empty"]

    def _run_empty_circuit(self) -> BaseRun:
        model, clean = self.context.model, self.whole
        replacing, product = self.context.counterfactuals, product_of_values(self.background)
        with torch.inference_mode():
            # x_r = b_r + sum over sources u of c_u
            tensors = model.run(replacing, model.window.all, clean.projected, product)
            # Embeddings read nothing: their outputs are the clean ones in every circuit.
            embeddings = slice(0, model.blocks[0].sources.start)
            tensors.outputs[embeddings] = clean.outputs[embeddings]
        kept = torch.zeros_like(clean.kept)
        return BaseRun.of(tensors, kept, self.context.mask(kept))

    def _apply(
        self, function: Callable[[Tensor], Tensor], run: VariantRun, start: int, size: int
    ) -> Tensor:
        batch = run.of_variants(slice(start, start + size))
        # A copy made outside of inference mode, since `function` may write to it.
        logits = batch.execute().clone()
        self.counts["node_evaluations"] += batch.n_evaluated
        self.counts["batches"] += 1
        check_finite(logits)
        return function(logits)

    def _variant_run(self, base: BaseRun, kept: Variants) -> VariantRun:
        edge_changes = EdgeChanges.of(self.context, base, kept)
        plan = self._plan(base, kept, edge_changes.rows)
        return VariantRun(self.context, base, kept, edge_changes, plan, self.background)

    def _plan(self, base: BaseRun, kept: Variants, targets: Indices) -> Plan:
        # What to recompute if edges into these targets change.
        model, key = self.context.model, targets.tobytes()
        # Variants are subsets of the "near" circuit: one plan for its edges serves them all.
        near = base is self.bases.get("near")
        if near and key in base.plans:
            return base.plans[key]
        mask = base.mask if near else self.context.mask(kept.any(0))
        plan = make_plan(model.blocks, model.window, np.any(mask, axis=0), targets)
        if near:
            base.plans[key] = plan
        return plan


def _background(model: Model, precision: Precision) -> Background:
    if model.cfg.dtype not in (torch.float32, torch.float64):
        raise InputError(
            f"precision={str(precision)!r} needs a model in float32, and "
            f"{model.cfg.model_name} is in {model.cfg.dtype}; "
            "load it with dtype=torch.float32, or leave out the precision."
        )
    return Background.of(precision, model.cfg.device)


def _run_clean_prompts(task_model: TaskModel, product: Multiply) -> RunTensors:
    """Run the whole model everywhere; returns the activations at the tokens that can change."""
    model, task, window = task_model.model, task_model.task, task_model.window
    # A copy with a cache of its own: the attention biases of all tokens are not used again.
    task_model = replace(task_model, biases={})
    embedded = embedding_outputs(model, task_model.layout.nodes, task.clean, task.mask)
    written = window.everywhere.gather(embedded)
    no_keys = written.new_zeros(model.cfg.n_heads, *window.readable.shape, model.cfg.d_head)
    base = dict.fromkeys(task_model.blocks, no_keys)
    clean = task_model.run(written, window.everywhere, base, multiply)
    _check_outputs(task_model, clean)
    if product is not multiply:
        clean = task_model.run(written, window.everywhere, base, product)
    return clean.at(torch.isin(window.everywhere.keys, window.all.keys))


def _check_outputs(task_model: TaskModel, clean: RunTensors) -> None:
    """Refuse a model whose own outputs on a few prompts differ from those of a clean run."""
    few, tokens = task_model.task[:CHECKED_PROMPTS], task_model.window.everywhere
    here = tokens.prompts < len(few)
    outputs = source_outputs(task_model.model, task_model.layout.nodes, few.clean, few.mask)
    expected = outputs[:, tokens.prompts[here], tokens.positions[here]]
    largest_gap = (clean.outputs[:, here] - expected).abs().max()
    gap = float(largest_gap / expected.abs().max().clamp(min=1e-30))
    if gap > TOLERANCE[expected.dtype]:
        raise UnsupportedError(
            f"its components compute something that is not known (outputs differ by {gap:.1%})"
        )


def _counterfactual_outputs(
    task_model: TaskModel, ablation: Ablation, clean: RunTensors, product: Multiply
) -> Float[Tensor, "source token d_model"]:
    model, task, nodes = task_model.model, task_model.task, task_model.layout.nodes
    tokens = task_model.window.all
    if ablation.name == "resample":
        embedded = embedding_outputs(model, nodes, task.corrupted, task.mask)
        return task_model.run(tokens.gather(embedded), tokens, clean.projected, product).outputs
    replacing = Counterfactuals.prepare(model, nodes, task, ablation).on(task)
    return tokens.gather(replacing).contiguous()
