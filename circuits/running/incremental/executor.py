"""The incremental executor: run circuits by recomputing only what changes. Exact, like the reference in `patching`.

It keeps a base run: what every node writes and reads in one circuit. In another circuit a target reads

    x_r = base x_r + sum over changed sources u of  M[u, r] * (out_u - base out_u)
                   + sum over edges that changed of  (M[u, r] - base M[u, r]) * (base out_u - c_u)

and only nodes whose input changed and which still reach the logits are computed again (`propagation`), at tokens that can change and matter
(`window`), the heads of a layer together, many circuits at a time. The smaller the circuit, the less there is to do.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from circuits.graph.graph import Graph
from circuits.models import Model, frozen
from circuits.models.component_graph import check_supported
from circuits.models.functional import multiply
from circuits.models.identity import check_fits
from circuits.models.source_outputs import TOLERANCE, embedding_outputs, source_outputs
from circuits.running.ablation import Ablation, Counterfactuals
from circuits.running.edge_layout import EdgeLayout
from circuits.running.incremental.base_state import State
from circuits.running.incremental.batch import Run
from circuits.running.incremental.cost import Cost
from circuits.running.incremental.edge_changes import Flips
from circuits.running.incremental.plan import Needs, Plan, plan
from circuits.running.incremental.sublayer_run import Known, Parts, UnsupportedError
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
    """Runs circuits of one graph on the prompts of one task, each from the nearest one known.

    Attributes:
        known: what all runs share.
        whole: the state of the whole model.
        budget: bytes that one step may take.
        background: how products are computed that need not be exact.
        bases: the states of other circuits: "empty" and, after `near`, "near".
        counts: node evaluations so far (one node in one variant), and batches.
    """

    known: Known
    whole: State
    budget: int
    background: Background | None = None
    bases: dict[str, State] = field(default_factory=dict)
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
        """Run the clean and the counterfactual prompts once, for every circuit that follows.

        Raises:
            InputError: the model is not supported, or the graph does not belong to it.
            UnsupportedError: the model computes something that this executor does not know.
        """
        check_supported(model)
        check_fits(model, graph)
        check_task(model, task)
        if precision is not None and model.cfg.dtype not in (torch.float32, torch.float64):
            raise InputError(
                f"precision={str(precision)!r} needs a model in float32, and {model.cfg.model_name} is in {model.cfg.dtype}; "
                "load it with dtype=torch.float32, or leave out the precision."
            )
        task = task.to(model.cfg.device)
        background = None if precision is None else Background.of(precision, model.cfg.device)
        product = background.product if background is not None and background.whole else multiply
        layout = EdgeLayout.of(model, graph)
        causal, resample = model.cfg.attention_dir == "causal", ablation.name == "resample"
        window = Window.of(task, causal=causal, from_first_difference=resample)
        everywhere = Window.of(task, causal=causal, from_first_difference=False)
        possible, kept = layout.possible(model).numpy(), torch.ones(len(graph), dtype=torch.bool)
        mask = ~layout.ablated(kept[None])[0].numpy() & possible
        with frozen(model), torch.no_grad():
            all_parts = Parts.of(model, layout, everywhere)
            embedded = everywhere.cut(embedding_outputs(model, layout.nodes, task.clean, task.mask))
            clean = all_parts.run(embedded, all_parts.no_keys())
            _check(model, layout, task, everywhere, clean.outputs)
            if product is not multiply:
                clean = all_parts.run(embedded, all_parts.no_keys(), product)
            parts = Parts.of(model, layout, window)
            whole = clean.at(window.within(everywhere)).state(kept, mask, parts.places)
            if resample:
                corrupted = window.cut(
                    embedding_outputs(model, layout.nodes, task.corrupted, task.mask)
                )
                counterfactuals = parts.run(corrupted, whole.projected, product).outputs
            else:
                counterfactuals = window.cut(
                    Counterfactuals.prepare(model, layout.nodes, task, ablation).on(task)
                ).contiguous()
            removed = whole.outputs - counterfactuals
        spans = token_spans(graph, task)
        if spans is not None:
            spans = spans[window.prompt, window.position]
        known = Known(
            parts, counterfactuals, (window.narrow(removed).contiguous(), removed), spans, possible
        )
        return IncrementalExecutor(
            known, whole, memory_budget(model.cfg.device, max_memory), background
        )

    def exact(self) -> IncrementalExecutor:
        """The same executor without a background; both keep the same base."""
        return replace(self, background=None)

    def logits(self, kept: Bool[Tensor, "variant edge"]) -> Float[Tensor, "variant scored vocab"]:
        """Logits of every circuit at every scored row.

        Raises:
            InputError: the logits overflow.
        """
        return self.map(kept, lambda logits: logits)

    def map(
        self, kept: Bool[Tensor, "variant edge"], function: Callable[[Tensor], Tensor]
    ) -> Tensor:
        """`function` of the logits of some circuits at a time, one after the other, so that not all logits need be held.

        Raises:
            InputError: the logits overflow.
        """
        kept = kept.cpu()
        run = self._run(self._base(kept), kept)
        base = int(self._rounds_changes)  # which is run along
        size = max(1, min(len(kept), self.budget // run.cost.bytes - base))
        results: list[Tensor] = []
        done = 0
        while done < len(kept):
            result, size = shrinking(partial(self._apply, function, run, done), size, "circuit")
            results.append(result)
            done += size
        return results[0] if len(results) == 1 else torch.cat(results)

    def near(self, kept: Bool[Tensor, " edge"]) -> None:
        """Circuits that follow are mostly subsets of this one: compute them from here.

        Raises:
            InputError: memory runs out.
        """
        state = self.bases.get("near")
        if state is None or not state.holds(kept):
            state = self.bases["near"] = self.whole.copy()
        if not torch.equal(kept, state.kept):
            with torch.inference_mode():
                run = self._run(state, kept[None])
                # What others are computed from is exact, unless everything is in the background's type.
                run.background = None if self._rounds_changes else run.background
                shrinking(lambda _: run.commit(), 1, "circuit")
            self.counts["node_evaluations"] += run.evaluated
            mask = self.known.mask(kept)
            state.become(
                kept,
                mask,
                Needs.of(self.known.parts.places, np.any(mask, axis=0)),
                run.plan.changed,
            )

    def fixed_cost(self, edges: Sequence[int]) -> float:
        """About what a batch costs on top of what each circuit in it does, in circuits, where they differ from the base in such edges."""
        base = self.bases.get("near", self.whole)
        rows = np.unique(self.known.parts.layout.target.numpy()[edges])
        return Cost.of(self._plan(base, base.kept[None], rows), self.known.parts).fixed

    @property
    def _rounds_changes(self) -> bool:
        return self.background is not None and not self.background.whole

    def _base(self, kept: Bool[Tensor, "variant edge"]) -> State:
        near = self.bases.get("near")
        if near is not None and near.holds(kept):
            return near
        none = torch.zeros(kept.shape[1], dtype=torch.bool)
        # Where the graph lacks edges, which are then always kept, nodes read a mixture even in the empty circuit.
        if (
            int(kept.sum()) * 2 > kept.numel()
            or len(none) < int(self.known.possible.sum()) * self.known.parts.layout.shape[0]
        ):
            return self.whole
        if "empty" not in self.bases:
            parts = self.known.parts
            product = (
                self.background.product
                if self.background is not None and self.background.whole
                else multiply
            )
            with torch.inference_mode():
                found = parts.run(self.known.counterfactuals, self.whole.projected, product)
                found.outputs[: parts.embeddings] = self.whole.outputs[: parts.embeddings]
            self.bases["empty"] = found.state(none, self.known.mask(none), parts.places)
        return self.bases["empty"]

    def _apply(
        self, function: Callable[[Tensor], Tensor], run: Run, start: int, size: int
    ) -> Tensor:
        some = run.only(slice(start, start + size))
        with torch.inference_mode():
            found = some.execute()
        logits = found.clone()  # which, made out here, whoever gets it may write to
        self.counts["node_evaluations"] += some.evaluated
        self.counts["batches"] += 1
        check_finite(logits)
        return function(logits)

    def _run(self, base: State, kept: Bool[Tensor, "variant edge"]) -> Run:
        flips = Flips.of(self.known, base, kept)
        return Run(
            self.known, base, kept, flips, self._plan(base, kept, flips.rows), self.background
        )

    def _plan(
        self, base: State, kept: Bool[Tensor, "variant edge"], rows: Int[np.ndarray, " row"]
    ) -> Plan:
        """What to compute when edges into some rows change; near a base once for all variants that follow."""
        places, key = self.known.parts.places, rows.tobytes()
        near = base is self.bases.get("near")
        if near and key in base.plans:
            return base.plans[key]
        mask = np.any(base.mask if near else self.known.mask(kept.any(0)), axis=0)
        flipped = np.zeros(len(mask), dtype=bool)
        flipped[rows] = True
        made = plan(places, mask, base.needs if near else Needs.of(places, mask), flipped)
        if near:
            base.plans[key] = made
        return made


def _check(
    model: Model,
    layout: EdgeLayout,
    task: Task,
    window: Window,
    found: Float[Tensor, "source token d_model"],
) -> None:
    """Refuse models whose nodes compute something else than `sublayers` does: their own run of a few prompts tells.

    Raises:
        InputError: the outputs do not sum to the residual stream.
        UnsupportedError: the outputs differ by more than rounding.
    """
    few = task[:CHECKED_PROMPTS]
    here = window.prompt < len(few)
    expected = source_outputs(model, layout.nodes, few.clean, few.mask)[
        :, window.prompt[here], window.position[here]
    ]
    gap = float((found[:, here] - expected).abs().max() / expected.abs().max().clamp(min=1e-30))
    if gap > TOLERANCE[found.dtype]:
        raise UnsupportedError(
            f"its components compute something that is not known (outputs differ by {gap:.1%})"
        )
