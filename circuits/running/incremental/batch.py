"""One batch of circuits, computed from a base by recomputing only what changes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from circuits.graph.edges import SLOTS
from circuits.models.functional import HeadSelection, Multiply, multiply
from circuits.running.incremental.base_state import State, contiguous
from circuits.running.incremental.cost import Cost
from circuits.running.incremental.edge_changes import Flips
from circuits.running.incremental.plan import Plan, Read, Step
from circuits.running.incremental.shared_inputs import Cases
from circuits.running.incremental.sublayer_run import Known
from circuits.running.precision import Background

Key = tuple[int, bool, bytes]


@dataclass(eq=False)
class Run:
    """One batch of variants of a base.

    Attributes:
        known: what all runs on the task share.
        flips: how the variants differ from the base.
        plan: what is computed.
        background: how products are computed that need not be exact; then the first variant must be the base itself, unless it computes
            whole values.
        evaluated: how many times some node was computed.
    """

    known: Known
    base: State
    kept: Bool[Tensor, "variant edge"]
    flips: Flips
    plan: Plan
    background: Background | None = None
    wide: Tensor = field(init=False)
    narrow: Tensor = field(init=False)
    normed: dict[Key | None, Tensor] = field(default_factory=dict)
    cases: dict[Step, Cases | None] = field(default_factory=dict)
    writes: list[Callable[[], None]] | None = None
    evaluated: int = 0

    @property
    def cost(self) -> Cost:
        """What one more variant takes."""
        return Cost.of(self.plan, self.known.parts)

    def only(self, variants: slice) -> Run:
        """The run of some of the variants; nothing that it makes is kept by this one."""
        return Run(
            self.known,
            self.base,
            self.kept[variants],
            self.flips.only(variants),
            self.plan,
            self.background,
        )

    def commit(self) -> None:
        """Make the base the state of the first variant, but for what `State.become` sets."""
        self.writes = []
        self._walk()
        # Only now: what is computed last still reads the base as it was.
        for write in self.writes:
            write()

    def execute(self) -> Float[Tensor, "variant scored vocab"]:
        """Walk down the model."""
        if self.background is None or self.background.whole:
            return self._logits()
        kept = torch.cat([self.base.kept[None], self.kept])
        run = Run(self.known, self.base, kept, self.flips.after_base(), self.plan, self.background)
        logits = run._logits()[1:]
        self.evaluated = run.evaluated
        return logits

    def _cases(self, step: Step) -> Cases | None:
        """The different inputs of a step's heads, where that saves computing."""
        if step not in self.cases:
            found = None
            # Where edges change into one row alone, it is what the variants differ in.
            if (
                len(self.kept) > 1
                and len(self.flips.rows) > 1
                and step.reads[0].place.slot
                and not step.reads[0].changed
            ):
                found = Cases.of(self.flips, step)
            self.cases[step] = (
                found if found is not None and found.worthwhile(len(self.kept)) else None
            )
        return self.cases[step]

    def _computed(self, step: Step) -> int:
        """How many times some node is computed in a step."""
        cases = self._cases(step)
        return len(step.sources) * len(self.kept) if cases is None else len(cases)

    def _logits(self) -> Float[Tensor, "variant scored vocab"]:
        residual, product = self._walk()
        return self.known.parts.unembedding(residual, product)

    def _walk(self) -> tuple[Float[Tensor, "variant scored d_model"], Multiply]:
        """The residual stream after the last layer, and how to multiply it."""
        window, variants, d_model = (
            self.known.parts.window,
            len(self.kept),
            self.base.outputs.shape[-1],
        )
        self.wide = self.base.outputs.new_empty(len(self.plan.wide), variants, len(window), d_model)
        self.narrow = self.base.outputs.new_empty(
            len(self.plan.changed), variants, window.scored, d_model
        )
        done = wide = 0
        for step in self.plan.steps:
            if not len(step.sources):
                return self._input(step.reads[0])[0][0], self._multiply(step, wide=False)
            count = len(step.sources)
            here = self.narrow[done : done + count]
            if step.wide:
                self._change(step, into=self.wide[wide : wide + count])
                here.copy_(window.narrow(self.wide[wide : wide + count]))
                wide += count
            else:
                self._change(step, into=here)
            done += count
            self.evaluated += self._computed(step)
        residual = window.narrow(self.base.inputs[self.known.parts.model.cfg.n_layers, None])
        product = (
            multiply
            if self.background is None or not self.background.whole
            else self.background.product
        )
        return residual.expand(variants, -1, -1), product

    def _multiply(self, step: Step, *, wide: bool) -> Multiply:
        """How a step multiplies: nodes into which edges change are under investigation, and stay as exact as the rest is without a background."""
        if self.background is None:
            return multiply
        if self.background.whole:
            return self.background.product
        if any(self.flips.targets[read.rows].any() for read in step.reads):
            return multiply
        return self.background.increments(len(self.known.parts.window.at(wide)))

    def _change(self, step: Step, into: Float[Tensor, "source variant token d_model"]) -> None:
        """Find what a step's nodes write, less what they write in the base."""
        index = self._index(step.sources)
        old = (
            self.base.outputs[index]
            if step.wide
            else self.known.parts.window.narrow(self.base.outputs[index])
        )
        if (cases := self._cases(step)) is not None:
            cases.changes(
                self.known,
                self.base,
                self.flips,
                step,
                self._multiply(step, wide=step.wide),
                old,
                into,
            )
            return
        written = self._written(step)
        self._note(self.known.parts.window.put, self.base.outputs, index, written, step.wide)
        torch.sub(written.expand_as(into), old[:, None], out=into)

    def _written(self, step: Step) -> Float[Tensor, "source variant token d_model"]:
        parts, layer = self.known.parts, step.layer
        first = step.reads[0].place
        if first.slot is None:
            return parts.feed_forward[layer](
                self._input(step.reads[0])[0], self._multiply(step, wide=step.wide)
            )
        heads = self._index(step.sources - first.source)
        projected: dict[str, Tensor] = {
            str(read.place.slot): self._projected(step, read, heads) for read in step.reads
        }
        for slot in SLOTS:
            if slot not in projected:
                held = self.base.projected[layer, slot][heads][:, None]
                projected[slot] = (
                    parts.window.narrow(held) if slot == "q" and not step.wide else held
                )
        return parts.heads(
            layer, heads, projected, self._multiply(step, wide=step.wide), wide=step.wide
        )

    def _projected(
        self, step: Step, read: Read, heads: HeadSelection
    ) -> Float[Tensor, "head variant ... d_head"]:
        """New q, k or v of some heads."""
        parts, place = self.known.parts, read.place
        assert place.slot is not None
        part = parts.attention[place.layer]
        residual, key = self._input(read)
        normed = self.normed[key] if key in self.normed else part.norm(residual)
        if key is not None:
            self.normed = {key: normed}
        result = part.project(
            place.slot,
            heads,
            normed,
            parts.window.at(read.wide),
            self._multiply(step, wide=read.wide),
        )
        if place.slot != "q":
            result = parts.window.into_keys(
                self.base.projected[place.layer, place.slot][heads], result
            )
        self._note(
            self.base.put, self.base.projected, place, parts.window, heads, result, read.wide
        )
        return result

    def _input(self, read: Read) -> tuple[Float[Tensor, "_ variant token d_model"], Key | None]:
        """What some targets read in some variants; or one row where all read the same, with a key that equal inputs share."""
        window, place = self.known.parts.window, read.place
        slot = (place.layer, place.slot)
        stored = self.base.inputs[slot]
        rows = self._index(read.rows - place.row)
        base = stored if stored.shape[0] == 1 else stored[rows]
        residual = (base if read.wide else window.narrow(base))[:, None]
        flipped = bool(self.flips.targets[read.rows].any())
        change, weights = self._propagated(read, flipped)
        residual = residual if change is None else residual + change
        key = (
            (id(stored), read.wide, weights)
            if residual.shape[0] == stored.shape[0] == 1 and not flipped
            else None
        )
        if flipped:
            residual = self._flipped(read, residual)
        self._note(self.base.put, self.base.inputs, place, window, rows, residual, read.wide)
        return residual, key

    def _propagated(
        self, read: Read, flipped: bool
    ) -> tuple[Float[Tensor, "#target variant token d_model"] | None, bytes]:
        """What changed sources bring along kept edges, and the weights with which they do; `flipped`: edges into these rows change."""
        columns = (self.plan.wide if read.wide else self.plan.changed)[: read.changed]
        if not len(columns):
            return None, b""
        changes = (self.wide if read.wide else self.narrow)[: read.changed]
        # `flipped` follows from the rest, and saves asking for most reads.
        if flipped and self.flips.edges[np.ix_(read.rows, columns)].any():
            dense = ~self.known.parts.layout.ablated(self.kept)[:, :, read.rows][..., columns]
            dense &= torch.from_numpy(self.known.possible[np.ix_(read.rows, columns)])
            return self.known.summed(dense.to(changes), changes, read.wide), b""
        weights = self.base.mask[:, read.rows][..., columns]
        if not weights.any():
            return None, b""
        if (weights == weights[:, :1]).all():
            weights = weights[:, :1]
        if read not in self.plan.weights:
            self.plan.weights[read] = torch.from_numpy(weights).to(changes)
        return self.known.summed(
            self.plan.weights[read][None], changes, read.wide
        ), weights.tobytes()

    def _flipped(
        self, read: Read, residual: Float[Tensor, "#target _ token d_model"]
    ) -> Float[Tensor, "target variant token d_model"]:
        """Inputs with what edges that changed bring: their sources' base outputs instead of the counterfactual ones, or the reverse."""
        flips = self.flips
        hit = np.flatnonzero(flips.targets[read.rows])
        weights = torch.from_numpy(flips.signs_into(read.rows[hit])).to(residual)
        ablated = flips.ablated(read.wide)
        if self.known.spans is None and len(read.rows) == 1 and residual.shape[1] == 1:
            summed = torch.addmm(residual.reshape(1, -1), weights[:, 0, 0], ablated.flatten(1))
            return summed.view(1, len(weights), *residual.shape[2:])
        change = self.known.summed(weights, ablated[:, None], read.wide)
        if len(hit) == len(read.rows):
            return residual + change
        result = residual.expand(len(read.rows), change.shape[1], *change.shape[2:]).clone()
        result[self._index(hit)] += change
        return result

    def _note(self, write: Callable[..., None], *arguments: Any) -> None:
        """A write to the base, of the first variant of the tensor before the last argument."""
        if self.writes is not None:
            *where, values, wide = arguments
            self.writes.append(partial(write, *where, values[:, 0], wide))

    def _index(self, rows: Int[np.ndarray, " row"]) -> HeadSelection:
        return contiguous(rows, self.base.outputs.device)
