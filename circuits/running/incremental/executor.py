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

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import partial

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

from circuits.graph.graph import EdgeMask, Graph
from circuits.graph.nodes import Node
from circuits.models import Model, after_embedding, changes, frozen, named, shape_of, told, unembed
from circuits.models.component_graph import component_nodes
from circuits.models.layers.functional import Multiply, multiply
from circuits.models.source_outputs import (
    CHECKED_PROMPTS,
    check_honoured,
    embedding_outputs,
    run_and_record,
)
from circuits.models.tolerance import TOLERANCE, logit_gap, relative_gap
from circuits.running.ablation import Ablation, Counterfactuals
from circuits.running.edge_layout import check_runnable
from circuits.running.incremental.base_state import BaseRun, Outputs
from circuits.running.incremental.batch import Logits, VariantRun
from circuits.running.incremental.cost import Cost
from circuits.running.incremental.edge_changes import EdgeChanges, SourceDifferences
from circuits.running.incremental.plan import Indices, Plan, make_plan
from circuits.running.incremental.sublayer_run import LOGITS_SHARE, TaskModel, UnsupportedError
from circuits.running.incremental.tokens import TokenIndex, TokenSet, Window
from circuits.running.precision import EXACT, Background, Precision
from circuits.running.settings import NO_RUNS, Counts, OfLogits
from circuits.running.variants import KeptEdges, Variants
from circuits.system.errors import InputError
from circuits.system.memory import in_steps, memory_budget, shrinking
from circuits.system.tensors import joined
from circuits.tasks.metrics import check_finite
from circuits.tasks.task import Task

CHECKED_ROWS = 8

Nodes = tuple[Node, ...]
Prompts = Int[Tensor, "batch pos"]


@dataclass(frozen=True, eq=False)
class IncrementalExecutor:
    """Runs circuits of one graph on the prompts of one task, each from a base run."""

    model: TaskModel
    # c_u of every source u, and what replacing out_u by it takes away.
    source_differences: SourceDifferences
    # The base run of the whole model.
    whole: BaseRun
    # Memory that one batch may take, in bytes.
    budget: int
    background: Background
    # Base runs of other circuits: "empty" has no edges, "near" was given to `near`.
    bases: dict[str, BaseRun] = field(default_factory=dict)
    # Each variant of a node is counted.
    counts: Counts = field(default_factory=NO_RUNS.copy)

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

        Raises UnsupportedError if the model computes something that is not implemented here.
        """
        check_runnable(model, graph, task)
        background = _background(model, precision)
        task = task.to(shape_of(model).device)
        window = _window(model, task, ablation)
        product = background.product_of_values
        with frozen(model), torch.no_grad():
            _check_changes(model, component_nodes(model, graph.splits_embedding), task)
            task_model = TaskModel.of(model, graph, task, window, max_memory)
            whole = _run_clean_prompts(task_model, product)
            replacing = _counterfactuals(task_model, ablation, whole, product)
        differences = SourceDifferences.of(whole, replacing, window)
        budget = memory_budget(shape_of(model).device, max_memory)
        return IncrementalExecutor(task_model, differences, whole, budget, background)

    def exact(self) -> IncrementalExecutor:
        """The same executor without a background; both share their base runs."""
        return replace(self, background=EXACT)

    def at_tokens(self, tokens: TokenIndex) -> IncrementalExecutor:
        """The same executor, for the logits of some tokens only; both share their base runs."""
        unembedding = self.model.unembedding.at_tokens(tokens)
        model = replace(self.model, unembedding=unembedding)
        return replace(self, model=model)

    def logits(self, kept: KeptEdges) -> Logits:
        """Logits of every circuit at every scored token."""
        return self.map(Variants.of(kept), lambda logits: logits)

    def map(self, variants: Variants, function: OfLogits) -> Tensor:
        """Apply a function to the logits batch by batch, so that they need not all fit in memory.

        Args:
            function: from the logits of a batch [variant, scored, vocab] to [variant, ...].
        """
        base = self._nearest_base(variants)
        run = self._variant_run(base, variants)
        step = partial(self._apply, function, run)
        steps = in_steps(step, len(variants), self._n_fitting(run), "circuit")
        results = [result for _, result in steps]
        return joined(results)

    def _n_fitting(self, run: VariantRun) -> int:
        """How many variants of a run fit into memory together; at least one."""
        cost = Cost.of(run.plan, self.model)
        # The rest is for logits.
        room = self.budget - self.budget // LOGITS_SHARE
        n_fitting = room // cost.bytes
        # If changes are rounded, the base runs along as one more variant.
        if self.background.rounds_changes:
            n_fitting -= 1
        return max(1, n_fitting)

    def _apply(self, function: OfLogits, run: VariantRun, variants: slice) -> Tensor:
        batch = run.of_variants(variants)
        residual = batch.execute()
        self.counts["node_evaluations"] += batch.n_evaluated
        self.counts["batches"] += 1
        found = []
        # Not in inference mode, since `function` may write to the logits.
        with torch.no_grad():
            for logits in batch.logits(residual.clone()):
                check_finite(logits, self.model.model)
                found.append(function(logits))
        return joined(found)

    def near(self, kept: EdgeMask) -> None:
        """Compute the circuits that follow, mostly subsets of this one, from a base run of it."""
        base = self.bases.get("near")
        if base is None or not base.contains(kept):
            base = self.bases["near"] = self.whole.copy()
        if torch.equal(kept, base.kept):
            return
        run = self._variant_run(base, Variants.of(kept[None]))
        # Changes of the base itself are never rounded: all else is computed from it.
        if self.background.rounds_changes:
            run.background = EXACT
        shrinking(lambda _: run.commit(kept), 1, "circuit")
        self.counts["node_evaluations"] += run.n_evaluated

    def fixed_cost(self, edges: Sequence[int]) -> float:
        """Overhead of a batch whose circuits drop some of these edges, in units of one circuit."""
        base = self.bases.get("near", self.whole)
        targets = self.model.layout.target.numpy()[edges]
        plan = self._plan(base, base.kept, np.unique(targets))
        return Cost.of(plan, self.model).fixed

    def _nearest_base(self, variants: Variants) -> BaseRun:
        near = self.bases.get("near")
        if near is not None and near.contains(variants.union):
            return near
        # Edges that the graph lacks are always kept: then no circuit is without edges.
        n_edges = len(variants.common)
        complete = self.whole.mask.sum() == n_edges
        if not complete or 2 * variants.n_kept > n_edges * len(variants):
            return self.whole
        if "empty" not in self.bases:
            self.bases["empty"] = self._run_empty_circuit()
        return self.bases["empty"]

    def _run_empty_circuit(self) -> BaseRun:
        model, clean = self.model, self.whole
        tokens, embeddings = model.window.all, model.embeddings
        kept = torch.zeros_like(clean.kept)
        product = self.background.product_of_values
        with torch.inference_mode():
            # x_r = b_r + sum over sources u of c_u
            read = self.source_differences.counterfactuals
            empty = model.run(kept, read, tokens, clean.projected, product)
            # Embeddings read nothing: their outputs are the clean ones in every circuit.
            empty.outputs[embeddings] = clean.outputs[embeddings]
        return empty

    def _variant_run(self, base: BaseRun, variants: Variants) -> VariantRun:
        edge_changes = EdgeChanges.of(self.model, base, self.source_differences, variants)
        plan = self._plan(base, variants.union, edge_changes.rows)
        return VariantRun(self.model, base, edge_changes, plan, self.background)

    def _plan(self, base: BaseRun, union: EdgeMask, targets: Indices) -> Plan:
        """What to recompute if edges into these targets change, and variants keep others."""
        model, key = self.model, targets.tobytes()
        plan = partial(make_plan, model.sublayers, model.window)
        if base is not self.bases.get("near"):
            mask = model.mask(union)
            return plan(mask, model.needs(mask), targets)
        # Variants are subsets of the "near" circuit: one plan for its edges serves them all.
        if key not in base.plans:
            base.plans[key] = plan(base.mask, base.needs, targets)
        return base.plans[key]


def _check_changes(model: Model, nodes: Nodes, task: Task) -> None:
    """Refuse a model that computes something else than its weights say."""
    found = changes(model)
    if beyond := after_embedding(found):
        # A residual stream that is no sum of its nodes is refused by every executor.
        few = task[:CHECKED_PROMPTS]
        with told(model, task.clean):
            run_and_record(model, nodes, few.clean, few.mask)
        raise UnsupportedError(f"{named(beyond)}, so outputs differ from what its weights say")
    if found:
        check_honoured(model, nodes, task.masked_prompts)
        if task.alignment is not None:
            return
        # The model's own modules embed tokens, but where tokens do not differ nothing may change.
        clean, corrupted = (
            embedding_outputs(model, nodes, each, task.mask)
            for each in (task.clean, task.corrupted)
        )
        same = task.clean == task.corrupted
        unchanged = torch.equal(clean[:, same], corrupted[:, same])
        if not unchanged:
            raise UnsupportedError(f"{named(found)}, which mixes tokens, so outputs differ")


def _window(model: Model, task: Task, ablation: Ablation) -> Window:
    causal = shape_of(model).causal
    resample = ablation.name == "resample" and task.alignment is None
    return Window.of(task, causal=causal, resample=resample)


def _background(model: Model, precision: Precision | None) -> Background:
    if precision is None:
        return EXACT
    shape = shape_of(model)
    if shape.dtype not in (torch.float32, torch.float64):
        raise InputError(
            f"precision={str(precision)!r} needs a model in float32, and {shape.model_name} is "
            f"in {shape.dtype}; load it with dtype=torch.float32, or leave out the precision."
        )
    return Background.of(precision, shape.device)


def _run_clean_prompts(task_model: TaskModel, product: Multiply) -> BaseRun:
    """Run the whole model everywhere; returns the activations at the tokens that can change."""
    window, tokens = task_model.window, task_model.window.everywhere
    written = _embedded(task_model, task_model.task.clean, tokens)
    keys = task_model.no_keys(written)
    kept = torch.ones_like(task_model.layout.span, dtype=torch.bool)
    run = partial(task_model.run, kept, written, tokens, keys)
    clean = run(multiply)
    _check_outputs(task_model, clean.outputs)
    if product is not multiply:
        clean = run(product)
    # The attention biases of all tokens are not used again.
    task_model.biases.clear()
    can_change = torch.isin(tokens.keys, window.all.keys)
    return clean.at(can_change)


def _embedded(task_model: TaskModel, prompts: Prompts, tokens: TokenSet) -> Outputs:
    """The outputs of the embeddings."""
    nodes, mask = task_model.layout.nodes, task_model.task.mask
    outputs = embedding_outputs(task_model.model, nodes, prompts, mask)
    return tokens.gather(outputs)


def _check_outputs(task_model: TaskModel, found: Outputs) -> None:
    """Refuse a model whose own outputs and logits on a few prompts differ from a clean run's."""
    model, few = task_model.model, task_model.task[:CHECKED_PROMPTS]
    tokens = task_model.window.everywhere
    here = tokens.prompts < len(few)
    written, residual = run_and_record(model, task_model.layout.nodes, few.clean, few.mask)
    expected = written.outputs()[:, tokens.prompts[here], tokens.positions[here]]
    gap = relative_gap(found[:, here], expected)
    # A few rows are enough for the last step, which does the same to each of them.
    stream = residual[few.scored][:CHECKED_ROWS]
    logits = task_model.unembedding(stream, multiply)
    last_gap = logit_gap(logits, unembed(model, stream))
    if gap > TOLERANCE[expected.dtype]:
        raise UnsupportedError(
            f"its components compute something that is not known (outputs differ by {gap:.1%})"
        )
    if last_gap > TOLERANCE[expected.dtype]:
        raise UnsupportedError(
            f"its last norm or unembedding is not known (outputs differ by {last_gap:.1%})"
        )


def _counterfactuals(
    task_model: TaskModel, ablation: Ablation, clean: BaseRun, product: Multiply
) -> Outputs:
    """c_u of every source u."""
    task, tokens = task_model.task, task_model.window.all
    if ablation.name == "resample" and task.alignment is None:
        written = _embedded(task_model, task.corrupted, tokens)
        run = task_model.run(clean.kept, written, tokens, clean.projected, product)
        return run.outputs
    nodes = task_model.layout.nodes
    replacing = Counterfactuals.prepare(task_model.model, nodes, task, ablation)
    outputs = tokens.gather(replacing.on(task))
    return outputs.contiguous()
