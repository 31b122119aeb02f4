"""The incremental executor: run circuits by recomputing only what changes. Exact, like the reference in `patching`.

It keeps a base run: what every node writes and reads in one circuit. In another circuit a target reads

    x_r = base x_r + sum over changed sources u of  M[u, r] * (out_u - base out_u)
                   + sum over edges that changed of  (M[u, r] - base M[u, r]) * (base out_u - c_u)

and only nodes whose input changed and which still reach the logits are computed again (`propagation`), at tokens that can change and matter
(`window`), the heads of a layer together, many circuits at a time. The smaller the circuit, the less there is to do.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cache, partial
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from circuits.ablation import Ablation, Counterfactuals
from circuits.base_run import Parts, State, UnsupportedError
from circuits.components import check_fits, check_supported
from circuits.graph import SLOTS, Graph
from circuits.memory import memory_budget, shrinking
from circuits.metrics import check_finite
from circuits.models import Model, frozen
from circuits.outputs import TOLERANCE, embedding_outputs, source_outputs
from circuits.patching import EdgeLayout, check_task
from circuits.propagation import Needs, Plan, Read, Step, plan
from circuits.spans import token_spans
from circuits.sublayers import Rows
from circuits.tasks.base import Task
from circuits.window import Window

CHECKED_PROMPTS = 8
# What could be multiplied and added in the time that a step costs however little it computes, on a CPU and on a GPU.
OVERHEAD = (1e7, 1e9)


@dataclass(frozen=True, eq=False)
class IncrementalExecutor:
    """Runs circuits of one graph on the prompts of one task, each from the nearest one known.

    Attributes:
        parts: the model as functions of tensors.
        counterfactuals: what replaces each source's output, in the window.
        removed: what each source of the whole model writes, minus its counterfactual: at the scored tokens, and at all of the window.
        possible: where there can be edges, by target and source.
        whole: the state of the whole model.
        bases: the states of other circuits: "empty" and, after `near`, "near".
        budget: bytes that one step may take.
        counts: node evaluations so far (one node in one variant), and batches.
    """

    parts: Parts
    counterfactuals: Float[Tensor, "source token d_model"]
    removed: tuple[Float[Tensor, "source scored d_model"], Float[Tensor, "source token d_model"]]
    spans: Int[Tensor, "token"] | None
    possible: Bool[np.ndarray, "target source"]
    whole: State
    budget: int
    bases: dict[str, State] = field(default_factory=dict)
    counts: dict[str, int] = field(default_factory=lambda: {"node_evaluations": 0, "batches": 0})

    @staticmethod
    def prepare(model: Model, graph: Graph, task: Task, ablation: Ablation, *, max_memory: int | None = None) -> IncrementalExecutor:
        """Run the clean and the counterfactual prompts once, for every circuit that follows.

        Raises:
            InputError: the model is not supported, or the graph does not belong to it.
            UnsupportedError: the model computes something that this executor does not know.
        """
        check_supported(model)
        check_fits(model, graph)
        check_task(model, task)
        task = task.to(model.cfg.device)
        layout = EdgeLayout.of(model, graph)
        causal, resample = model.cfg.attention_dir == "causal", ablation.name == "resample"
        window = Window.of(task, causal=causal, from_first_difference=resample)
        everywhere = Window.of(task, causal=causal, from_first_difference=False)
        possible, kept = layout.possible(model).numpy(), torch.ones(len(graph), dtype=torch.bool)
        mask = ~layout.ablated(kept[None])[0].numpy() & possible
        with frozen(model), torch.no_grad():
            all_parts = Parts.of(model, layout, everywhere)
            clean = all_parts.run(everywhere.cut(embedding_outputs(model, layout.nodes, task.clean, task.mask)), all_parts.no_keys())
            _check(model, layout, task, everywhere, clean.outputs)
            parts = Parts.of(model, layout, window)
            whole = clean.at(window.within(everywhere)).state(kept, mask, parts.places)
            if resample:
                corrupted = window.cut(embedding_outputs(model, layout.nodes, task.corrupted, task.mask))
                counterfactuals = parts.run(corrupted, whole.projected).outputs
            else:
                counterfactuals = window.cut(Counterfactuals.prepare(model, layout.nodes, task, ablation).on(task)).contiguous()
            removed = whole.outputs - counterfactuals
        spans = token_spans(graph, task)
        if spans is not None:
            spans = spans[window.prompt, window.position]
        removals = (window.narrow(removed).contiguous(), removed)
        return IncrementalExecutor(parts, counterfactuals, removals, spans, possible, whole, memory_budget(model.cfg.device, max_memory))

    def logits(self, kept: Bool[Tensor, "variant edge"]) -> Float[Tensor, "variant scored vocab"]:
        """Logits of every circuit at every scored row.

        Raises:
            InputError: the logits overflow.
        """
        return self.map(kept, lambda logits: logits)

    def map(self, kept: Bool[Tensor, "variant edge"], function: Callable[[Tensor], Tensor]) -> Tensor:
        """`function` of the logits of some circuits at a time, one after the other, so that not all logits need be held.

        Raises:
            InputError: the logits overflow.
        """
        kept = kept.cpu()
        run = self._run(self._base(kept), kept)
        size = max(1, min(len(kept), self.budget // run.bytes_per_variant()))
        results: list[Tensor] = []
        done = 0
        while done < len(kept):
            result, size = shrinking(partial(self._apply, function, run, done), size, "circuit")
            results.append(result)
            done += size
        return results[0] if len(results) == 1 else torch.cat(results)

    def near(self, kept: Bool[Tensor, "edge"]) -> None:
        """Circuits that follow are mostly subsets of this one: compute them from here."""
        state = self.bases.get("near")
        if state is None or bool((kept & ~state.kept).any()):
            state = self.bases["near"] = self.whole.copy()
        if not torch.equal(kept, state.kept):
            with torch.no_grad():
                run = self._run(state, kept[None])
                run.commit()
            mask = self._mask(kept)
            state.become(kept, mask, Needs.of(self.parts.places, np.any(mask, axis=0)), run.plan.changed)

    def fixed_cost(self, kept: Bool[Tensor, "variant edge"]) -> float:
        """About what a batch of such circuits costs on top of what each of them does, in circuits."""
        run = self._run(self._base(kept), kept)
        return OVERHEAD[self.counterfactuals.device.type == "cuda"] * (1 + len(run.plan.steps)) / run.products_per_variant()

    def _base(self, kept: Bool[Tensor, "variant edge"]) -> State:
        near = self.bases.get("near")
        if near is not None and not bool((kept & ~near.kept).any()):
            return near
        none = torch.zeros(kept.shape[1], dtype=torch.bool)
        # Where the graph lacks edges, which are then always kept, nodes read a mixture even in the empty circuit.
        if int(kept.sum()) * 2 > kept.numel() or len(none) < int(self.possible.sum()) * self.parts.layout.shape[0]:
            return self.whole
        if "empty" not in self.bases:
            with torch.no_grad():
                found = self.parts.run(self.counterfactuals, self.whole.projected)
            found.outputs[: self.parts.embeddings] = self.whole.outputs[: self.parts.embeddings]
            self.bases["empty"] = found.state(none, self._mask(none), self.parts.places)
        return self.bases["empty"]

    def _mask(self, kept: Bool[Tensor, "edge"]) -> Bool[np.ndarray, "span target source"]:
        """Edges kept, by span, target and source."""
        return ~self.parts.layout.ablated(kept[None])[0].numpy() & self.possible

    def _apply(self, function: Callable[[Tensor], Tensor], run: _Run, start: int, size: int) -> Tensor:
        with torch.no_grad():
            logits = run.only(slice(start, start + size)).execute()
        self.counts["batches"] += 1
        check_finite(logits)
        return function(logits)

    def _run(self, base: State, kept: Bool[Tensor, "variant edge"]) -> _Run:
        flips = Flips.of(self, base, kept)
        if base is not self.bases.get("near"):
            mask = np.any(self._mask(kept.any(0)), axis=0)
            return _Run(self, base, kept, flips, plan(self.parts.places, mask, Needs.of(self.parts.places, mask), flips.targets))
        key = flips.rows.tobytes()
        if key not in base.plans:
            base.plans[key] = plan(self.parts.places, np.any(base.mask, axis=0), base.needs, flips.targets)
        return _Run(self, base, kept, flips, base.plans[key])


@dataclass(frozen=True, eq=False)
class Flips:
    """Edges that differ from a base in some variant.

    Attributes:
        targets: whether edges into a target do.
        edges: whether one between a target and a source does.
        rows, columns: the targets and sources they connect.
        signs: kept minus kept in the base, by variant, span, row and column.
        ablated: what the sources write in the base, minus their counterfactuals: at the scored tokens, and at all of them where needed.
    """

    targets: Bool[np.ndarray, "target"]
    edges: Bool[np.ndarray, "target source"]
    rows: Int[np.ndarray, "row"]
    columns: Int[np.ndarray, "column"]
    signs: Float[np.ndarray, "variant span row column"]
    ablated: Callable[[bool], Float[Tensor, "column token d_model"]]

    @staticmethod
    def of(executor: IncrementalExecutor, base: State, kept: Bool[Tensor, "variant edge"]) -> Flips:
        """How the variants differ from the base."""
        layout, counterfactuals = executor.parts.layout, executor.counterfactuals
        wanted, held = kept.numpy(), base.kept.numpy()
        changed = np.flatnonzero((wanted != held).any(axis=0))
        target, source = layout.target.numpy()[changed], layout.source.numpy()[changed]
        edges = np.zeros_like(executor.possible)
        edges[target, source] = True
        rows, row = np.unique(target, return_inverse=True)
        columns = np.unique(source)
        if len(columns) and columns[-1] - columns[0] < 2 * len(columns):
            columns = np.arange(columns[0], columns[-1] + 1)  # side by side, so that they need not be copied
        signs = np.zeros((len(kept), layout.shape[0], len(rows), len(columns)), dtype=np.float32)
        values = wanted[:, changed].astype(np.float32) - held[changed]
        signs[:, layout.span.numpy()[changed], row, np.searchsorted(columns, source)] = values

        def ablated(wide: bool) -> Tensor:
            index = contiguous(columns, counterfactuals.device)
            if not base.changed[columns].any():
                return executor.removed[wide][index]
            window = executor.parts.window
            written, replaced = (part if wide else window.narrow(part) for part in (base.outputs, counterfactuals))
            return written[index] - replaced[index]

        return Flips(np.any(edges, axis=1), edges, rows, columns, signs, cache(ablated))


def contiguous(rows: Int[np.ndarray, "row"], device: torch.device) -> Rows:
    """Some rows of a tensor; a slice, which copies nothing, where they stand side by side."""
    if len(rows) and rows[-1] - rows[0] == len(rows) - 1:
        return slice(int(rows[0]), int(rows[-1]) + 1)
    return torch.from_numpy(rows).to(device)


@dataclass(eq=False)
class _Run:
    """One batch of variants, computed from a base."""

    executor: IncrementalExecutor
    base: State
    kept: Bool[Tensor, "variant edge"]
    flips: Flips
    plan: Plan
    wide: Tensor = field(init=False)
    narrow: Tensor = field(init=False)
    normed: dict[Key | None, Tensor] = field(default_factory=dict)
    writes: list[Callable[[], None]] | None = None

    def only(self, variants: slice) -> _Run:
        """The run of some of the variants."""
        if len(self.kept[variants]) == len(self.kept):
            return self
        flips = replace(self.flips, signs=self.flips.signs[variants])
        return _Run(self.executor, self.base, self.kept[variants], flips, self.plan)

    def commit(self) -> None:
        """Make the base the state of the first variant, but for what `State.become` sets."""
        self.writes = []
        self.execute()
        # Only now: what is computed last still reads the base as it was.
        for write in self.writes:
            write()

    def execute(self) -> Float[Tensor, "variant scored vocab"]:
        """Walk down the model."""
        window, variants, d_model = self.executor.parts.window, len(self.kept), self.base.outputs.shape[-1]
        self.wide = self.base.outputs.new_empty(len(self.plan.wide), variants, len(window), d_model)
        self.narrow = self.base.outputs.new_empty(len(self.plan.changed), variants, window.scored, d_model)
        done = wide = 0
        for step in self.plan.steps:
            if not len(step.sources):
                return self._unembed(step)
            written = self._written(step)
            index = self._index(step.sources)
            old = self.base.outputs[index]
            change = written - (old if step.wide else window.narrow(old))[:, None]
            self._note(window.put, self.base.outputs, index, written, step.wide)
            if step.wide:
                self.wide[wide : wide + len(change)] = change
                wide += len(change)
            self.narrow[done : done + len(change)] = window.narrow(change) if step.wide else change
            done += len(change)
            self.executor.counts["node_evaluations"] += len(change) * len(self.kept)
        residual = window.narrow(self.base.inputs[self.executor.parts.model.cfg.n_layers, None])
        return self._to_logits(residual).expand(len(self.kept), -1, -1)

    def bytes_per_variant(self) -> int:
        """About how much memory one more variant takes."""
        parts, window, outputs = self.executor.parts, self.executor.parts.window, self.base.outputs
        cfg = parts.model.cfg
        tokens = {True: len(window), False: window.scored}
        held = (len(self.plan.wide) * tokens[True] + len(self.plan.changed) * tokens[False]) * cfg.d_model
        peak = 0
        for step in self.plan.steps:
            size = sum(len(read.rows) * tokens[read.wide] * (4 * cfg.d_model + 3 * cfg.d_head) for read in step.reads)
            if not len(step.sources):
                size += 5 * window.scored * cfg.d_vocab_out
            elif step.reads[0].place.slot is None:
                size += tokens[step.wide] * 3 * (cfg.d_mlp or 0)
            else:
                size += len(step.sources) * tokens[step.wide] * (3 * window.readable.shape[1] + 2 * cfg.d_model)
            peak = max(peak, size)
        return max(1, (held + peak) * outputs.element_size())

    def products_per_variant(self) -> int:
        """About how many multiplications one more variant takes."""
        parts, cfg = self.executor.parts, self.executor.parts.model.cfg
        tokens = {True: len(parts.window), False: parts.window.scored}
        total = 0
        for step in self.plan.steps:
            total += sum(len(read.rows) * tokens[read.wide] * (cfg.d_head * cfg.d_model if read.place.slot else 0) for read in step.reads)
            if not len(step.sources):
                total += tokens[False] * cfg.d_model * cfg.d_vocab_out
            elif step.reads[0].place.slot is None:
                total += tokens[step.wide] * cfg.d_model * (2 + cfg.gated_mlp) * (cfg.d_mlp or 0)
            else:
                total += len(step.sources) * tokens[step.wide] * cfg.d_head * cfg.d_model
        return max(1, total)

    def _written(self, step: Step) -> Float[Tensor, "source variant token d_model"]:
        parts, layer = self.executor.parts, step.layer
        first = step.reads[0].place
        if first.slot is None:
            return parts.feed_forward[layer](self._input(step.reads[0])[0])
        heads = self._index(step.sources - first.source)
        projected: dict[str, Tensor] = {str(read.place.slot): self._projected(read, heads) for read in step.reads}
        for slot in SLOTS:
            if slot not in projected:
                held = self.base.projected[layer, slot][heads][:, None]
                projected[slot] = parts.window.narrow(held) if slot == "q" and not step.wide else held
        return parts.heads(layer, heads, projected, wide=step.wide)

    def _projected(self, read: Read, heads: Rows) -> Float[Tensor, "head variant ... d_head"]:
        """New q, k or v of some heads."""
        parts, place = self.executor.parts, read.place
        assert place.slot is not None
        part = parts.attention[place.layer]
        variants, which = self._variants(read)
        residual, key = self._input(read, variants)
        normed = self.normed[key] if key in self.normed else part.norm(residual)
        if key is not None:
            self.normed = {key: normed}
        result = part.project(place.slot, heads, normed, parts.window.at(read.wide))
        if place.slot != "q":
            result = parts.window.into_keys(self.base.projected[place.layer, place.slot][heads], result)
        self._note(self.base.put, self.base.projected, place, parts.window, heads, result, read.wide)
        return result if which is None else result[:, which]

    def _variants(self, read: Read) -> tuple[Int[np.ndarray, "different"], Tensor | None]:
        """Variants that differ in what some targets read, and which of them each variant is like (None: all differ).

        Where nothing upstream changed, variants of one search share what was decided before.
        """
        everyone = np.arange(len(self.kept))
        if read.changed or len(everyone) == 1:
            return everyone, None
        signs = self.flips.signs[:, :, np.isin(self.flips.rows, read.rows)]
        seen: dict[bytes, int] = {}
        which = [seen.setdefault(each.tobytes(), len(seen)) for each in signs]
        if len(seen) == len(everyone):
            return everyone, None
        return np.unique(which, return_index=True)[1], torch.tensor(which, device=self.base.outputs.device)

    def _input(
        self, read: Read, variants: Int[np.ndarray, "different"] | None = None
    ) -> tuple[Float[Tensor, "_ variant token d_model"], Key | None]:
        """What some targets read in some variants; or one row where all read the same, with a key that equal inputs share."""
        window, place = self.executor.parts.window, read.place
        slot = (place.layer, place.slot)
        stored = self.base.inputs[slot]
        rows = self._index(read.rows - place.row)
        base = stored if len(stored) == 1 else stored[rows]
        residual = (base if read.wide else window.narrow(base))[:, None]
        change, weights = self._propagated(read)
        residual = residual if change is None else residual + change
        flipped = self.flips.targets[read.rows].any()
        key = (id(stored), read.wide, weights) if len(residual) == len(stored) == 1 and not flipped else None
        if flipped:
            residual = self._flipped(read, residual, variants)
        self._note(self.base.put, self.base.inputs, place, window, rows, residual, read.wide)
        return residual, key

    def _propagated(self, read: Read) -> tuple[Float[Tensor, "#target variant token d_model"] | None, bytes]:
        """What changed sources bring along kept edges, and the weights with which they do."""
        columns = (self.plan.wide if read.wide else self.plan.changed)[: read.changed]
        if not len(columns):
            return None, b""
        changes = (self.wide if read.wide else self.narrow)[: read.changed]
        if self.flips.edges[np.ix_(read.rows, columns)].any():
            dense = ~self.executor.parts.layout.ablated(self.kept)[:, :, read.rows][..., columns]
            dense &= torch.from_numpy(self.executor.possible[np.ix_(read.rows, columns)])
            return self._sum(dense.to(changes), changes, read.wide), b""
        weights = self.base.mask[:, read.rows][..., columns]
        if not weights.any():
            return None, b""
        if (weights == weights[:, :1]).all():
            weights = weights[:, :1]
        if read not in self.plan.weights:
            self.plan.weights[read] = torch.from_numpy(weights).to(changes)
        return self._sum(self.plan.weights[read][None], changes, read.wide), weights.tobytes()

    def _flipped(
        self, read: Read, residual: Float[Tensor, "#target _ token d_model"], variants: Int[np.ndarray, "different"] | None
    ) -> Float[Tensor, "target variant token d_model"]:
        """Inputs with what edges that changed bring: their sources' base outputs instead of the counterfactual ones, or the reverse."""
        flips = self.flips
        hit = np.flatnonzero(flips.targets[read.rows])
        signs = flips.signs if variants is None else flips.signs[variants]
        weights = torch.from_numpy(signs[:, :, np.searchsorted(flips.rows, read.rows[hit])]).to(residual)
        ablated = flips.ablated(read.wide)
        if self.executor.spans is None and len(read.rows) == 1 and residual.shape[1] == 1:
            summed = torch.addmm(residual.reshape(1, -1), weights[:, 0, 0], ablated.flatten(1))
            return summed.view(1, len(weights), *residual.shape[2:])
        change = self._sum(weights, ablated[:, None], read.wide)
        if len(hit) == len(read.rows):
            return residual + change
        result = residual.expand(len(read.rows), change.shape[1], *change.shape[2:]).clone()
        result[self._index(hit)] += change
        return result

    def _sum(
        self,
        weights: Float[Tensor, "#variant span target source"],
        values: Float[Tensor, "source _ token d_model"],
        wide: bool,
    ) -> Float[Tensor, "target variant token d_model"]:
        """Weighted sums over sources, each token by the weights of its span."""
        window, spans = self.executor.parts.window, self.executor.spans
        if spans is not None:
            here = spans if wide else spans[-window.scored :]
            shape = (max(len(weights), values.shape[1]), *values.shape[2:])
            return torch.einsum("vtru,uvtd->rvtd", weights[:, here].expand(shape[0], -1, -1, -1), values.expand(-1, *shape))
        matrix, flat = weights[:, 0], values.flatten(2)
        if len(matrix) == 1:
            return (matrix[0] @ flat.flatten(1)).view(-1, *values.shape[1:])
        if values.shape[1] == 1:
            summed = matrix.transpose(0, 1).flatten(0, 1) @ flat[:, 0]
        else:
            summed = torch.bmm(matrix, flat.transpose(0, 1)).transpose(0, 1)
        return summed.reshape(matrix.shape[1], len(matrix), *values.shape[2:])

    def _unembed(self, step: Step) -> Float[Tensor, "variant scored vocab"]:
        return self._to_logits(self._input(step.reads[0])[0][0])

    def _to_logits(self, residual: Float[Tensor, "variant token d_model"]) -> Float[Tensor, "variant scored vocab"]:
        return self.executor.parts.unembedding(residual)

    def _note(self, write: Callable[..., None], *arguments: Any) -> None:
        """A write to the base, of the first variant of the tensor before the last argument."""
        if self.writes is not None:
            *where, values, wide = arguments
            self.writes.append(partial(write, *where, values[:, 0], wide))

    def _index(self, rows: Int[np.ndarray, "row"]) -> Rows:
        return contiguous(rows, self.base.outputs.device)


Key = tuple[int, bool, bytes]


def _check(model: Model, layout: EdgeLayout, task: Task, window: Window, found: Float[Tensor, "source token d_model"]) -> None:
    """Refuse models whose nodes compute something else than `sublayers` does: their own run of a few prompts tells.

    Raises:
        InputError: the outputs do not sum to the residual stream.
        UnsupportedError: the outputs differ by more than rounding.
    """
    few = task[:CHECKED_PROMPTS]
    here = window.prompt < len(few)
    expected = source_outputs(model, layout.nodes, few.clean, few.mask)[:, window.prompt[here], window.position[here]]
    gap = float((found[:, here] - expected).abs().max() / expected.abs().max().clamp(min=1e-30))
    if gap > TOLERANCE[found.dtype]:
        raise UnsupportedError(f"its components compute something that is not known (outputs differ by {gap:.1%})")
