"""Compute a batch of circuits from a base run: recompute what a plan says, and nothing else.

M is the circuit of a variant, out_u and x_r are its outputs and inputs; M0, out0_u and x0_r are
those of the base. A run stores the change out_u - out0_u of every source u that it recomputes.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from jaxtyping import Float
from torch import Tensor

from circuits.graph.graph import EdgeMask
from circuits.models.layers.functional import Multiply
from circuits.running.incremental.base_state import Activation, BaseRun, BySlot
from circuits.running.incremental.edge_changes import Differences, EdgeChanges
from circuits.running.incremental.plan import Indices, InputUpdate, Place, Plan, Step
from circuits.running.incremental.shared_inputs import DistinctHeads
from circuits.running.incremental.sublayer_run import EdgeWeights, TaskModel
from circuits.running.incremental.tokens import TokenSet
from circuits.running.precision import EXACT, Background

Logits = Float[Tensor, "variant scored vocab"]
Residual = Float[Tensor, "variant scored d_model"]
Outputs = Float[Tensor, "node variant token d_model"]
Inputs = Float[Tensor, "#node _ token d_model"]
Write = tuple[Activation, Place, Tensor]


@dataclass(eq=False)
class VariantRun:
    """A run of several variants of a base."""

    model: TaskModel
    base: BaseRun
    edge_changes: EdgeChanges
    plan: Plan
    # If it rounds changes, these are measured from the first variant, which `of_variants` makes the
    # base itself.
    background: Background = EXACT
    # How many nodes have been computed, each variant counted.
    n_evaluated: int = 0
    # out_u - out0_u of the recomputed sources, by the tokens at which it is known.
    _changes: dict[TokenSet, Tensor] = field(init=False, default_factory=dict)
    _n_filled: dict[TokenSet, int] = field(init=False, default_factory=dict)
    _writes: list[Write] | None = None

    @property
    def n_variants(self) -> int:
        """The number of variants, with the base if that is one of them."""
        return len(self.edge_changes.signs)

    def of_variants(self, variants: slice) -> VariantRun:
        """A new run of some of the variants."""
        rounds = self.background.rounds_changes
        edge_changes = self.edge_changes.of_variants(variants, base_first=rounds)
        return VariantRun(self.model, self.base, edge_changes, self.plan, self.background)

    @torch.inference_mode()
    def execute(self) -> Residual:
        """Run, and return the final residual stream of every variant."""
        return self._final_residual()

    def logits(self, residual: Residual) -> Iterator[Logits]:
        """The logits of every variant, a few variants at a time."""
        model, inputs = self.model, self.plan.into_logits
        n_bases = int(self.background.rounds_changes)
        base, variants = residual[:n_bases], residual[n_bases:]
        for few in variants.split(model.unembedded_together):
            rows = torch.cat([base, few])
            product = self._product(inputs, len(rows))
            yield model.unembed(rows, product)[n_bases:]

    def commit(self, kept: EdgeMask) -> None:
        """Run, and turn the base into a base run of the first variant, whose edges are `kept`."""
        base, self._writes = self.base, []
        with torch.inference_mode():
            self._final_residual()
            # At the end, since later steps of the run read the base as it was.
            for name, place, values in self._writes:
                base.write(name, place, values[:, 0])
        base.kept = kept.clone()
        base.mask = self.model.mask(kept)
        base.needs = self.model.needs(base.mask)
        base.plans.clear()

    def _final_residual(self) -> Residual:
        """Take all steps; returns the input of the logits."""
        self._make_room()
        logits = self.model.blocks[-1]
        for step in self.plan.steps:
            if step.block is not logits:
                self._recompute(step)
        into_logits = self.plan.into_logits
        if into_logits:
            residual = self._input(into_logits[0])
        else:
            scored = self.model.window.scored
            place = Place(logits, slice(None), scored)
            residual = self.base.read(place)
        return residual[0].expand(self.n_variants, -1, -1)

    def _make_room(self) -> None:
        """Allocate the changes of all recomputed sources."""
        outputs, n_variants = self.base.outputs, self.n_variants
        d_model = outputs.shape[-1]
        for tokens, sources in self.plan.changed.items():
            shape = (len(sources), n_variants, len(tokens), d_model)
            self._changes[tokens] = outputs.new_empty(shape)
            self._n_filled[tokens] = 0

    def _recompute(self, step: Step) -> None:
        """Compute the nodes of a step, and store how they change."""
        scored = self.model.window.scored
        changes = self._next_changes(step, step.tokens)
        self._write_changes(step, changes)
        if step.tokens is not scored:
            at_scored = self._next_changes(step, scored)
            at_scored.copy_(scored.select(changes))

    def _write_changes(self, step: Step, into: Outputs) -> None:
        """Write out_u - out0_u of the nodes of a step."""
        product = self._product(step.inputs, self.n_variants)
        old = self.base.written(step)
        distinct = self._distinct_heads(step)
        if distinct is not None:
            self.n_evaluated += len(distinct.cases)
            distinct.write_changes(product, old, into)
            return
        self.n_evaluated += len(step.numbers) * self.n_variants
        new = self._outputs(step, product)
        self._record("outputs", step, new)
        torch.sub(new, old[:, None], out=into)

    def _next_changes(self, step: Step, tokens: TokenSet) -> Outputs:
        """Where the changes of a step's nodes go: after those of earlier steps."""
        start = self._n_filled[tokens]
        stop = start + len(step.numbers)
        self._n_filled[tokens] = stop
        return self._changes[tokens][start:stop]

    def _distinct_heads(self, step: Step) -> DistinctHeads | None:
        """The distinct cases of a step, if computing these instead of all heads saves work."""
        if step.block.slot == "mlp" or step.block.coupled or step.inputs[0].n_changed:
            return None
        # If edges change into one target only, few variants are equal there.
        n_targets = len(self.edge_changes.rows)
        if n_targets == 1 or self.n_variants == 1:
            return None
        distinct = DistinctHeads.of(self.edge_changes, step)
        return distinct if distinct.worthwhile(self.n_variants) else None

    def _outputs(self, step: Step, product: Multiply) -> Outputs:
        """out_u of the nodes of a step."""
        if step.block.slot == "mlp":
            residual = self._input(step.inputs[0])
            mlp = self.model.mlps[step.block.layer]
            return mlp(residual, product)
        qkv: BySlot = {}
        for update in step.inputs:
            qkv[update.block.slot] = self._projected(update, product)
        self.base.complete(qkv, step, step.nodes)
        return self.model.head_outputs(step, qkv, product)

    def _projected(self, update: InputUpdate, product: Multiply) -> Tensor:
        """q, k or v of some heads, from their new inputs."""
        residual = self._input(update)
        found = self.model.project(update, residual, self.base.projected, product)
        self._record("projected", update, found)
        return found

    def _input(self, update: InputUpdate) -> Inputs:
        """New inputs of some nodes, in one row if all nodes read the same."""
        tokens, n_changed = update.tokens, update.n_changed
        residual = self.base.read(update)
        # x_r = x0_r + sum over recomputed sources u of M[u, r] * (out_u - out0_u)
        #            + sum over changed edges u->r of (M[u, r] - M0[u, r]) * (out0_u - c_u)
        # where an ablated edge adds c_u - out0_u: M - M0 is -1.
        if n_changed:
            changes = self._changes[tokens][:n_changed]
            weights = self._weights(update)
            change = self.model.weighted_sum(weights, changes, tokens)
            residual = residual + change
        if update.edges_change:
            residual = self._with_edge_changes(update, residual)
        self._record("inputs", update, residual)
        return residual

    def _with_edge_changes(self, update: InputUpdate, residual: Inputs) -> Inputs:
        """Add the sum over changed edges u->r of (M[u, r] - M0[u, r]) * (out0_u - c_u)."""
        signs = self.edge_changes.into(update.rows)
        weights = torch.from_numpy(signs).to(residual)
        differences = self.edge_changes.differences(update.tokens)
        one_target = len(update.rows) == 1 and self.model.spans is None
        # The same x_r in all variants: a single fused product.
        if one_target and residual.shape[1] == 1:
            return _sum_into_one_target(residual, weights, differences)
        change = self.model.weighted_sum(weights, differences, update.tokens)
        return residual + change

    def _weights(self, update: InputUpdate) -> EdgeWeights:
        """M[u, r] of the recomputed sources, in one row if it is the same for all targets."""
        rows, cache = update.rows, self.plan.weights
        changed = self.plan.changed[update.tokens]
        sources = changed[: update.n_changed]
        if update not in cache:
            cache[update] = self._base_weights(rows, sources)
        weights = cache[update]
        if update.edges_change:
            signs = self.edge_changes.between(rows, sources)
            # M = M0 + (M - M0)
            if signs.any():
                return weights + torch.from_numpy(signs).to(weights)
        return weights

    def _base_weights(self, rows: Indices, sources: list[int]) -> EdgeWeights:
        """M0[u, r], in one row if it is the same for all targets."""
        into_rows = self.base.mask[:, rows]
        mask = into_rows[..., sources]
        first = mask[:, :1]
        if (mask == first).all():
            mask = first
        weights = torch.from_numpy(mask[None])
        return weights.to(self.base.outputs)

    def _product(self, inputs: list[InputUpdate], n_variants: int) -> Multiply:
        """How to multiply variants in a step in which these inputs change."""
        # Nodes into which edges change are under investigation: their changes are not rounded.
        if any(update.edges_change for update in inputs):
            return self.background.product_of_values
        return self.background.product_of_changes(n_variants)

    def _record(self, name: Activation, place: Place, values: Tensor) -> None:
        """In `commit`, remember what to write into the base."""
        if self._writes is not None:
            self._writes.append((name, place, values))


def _sum_into_one_target(
    residual: Inputs, weights: EdgeWeights, differences: Differences
) -> Inputs:
    """The residual, which is the same in all variants, plus a weighted sum of the differences."""
    start = residual.reshape(1, -1)
    of_target = weights[:, 0, 0]
    of_sources = differences.flatten(1)
    total = torch.addmm(start, of_target, of_sources)
    return total.unflatten(1, residual.shape[2:])[None]
