"""Compute a batch of circuits from a base run: recompute what a plan says, and nothing else.

M is the circuit of a variant, out_u and x_r are its outputs and inputs; M0, out0_u and x0_r are
those of the base. A run stores the change out_u - out0_u of every source u that it recomputes.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from circuits.models.functional import HeadSelection, Multiply, multiply
from circuits.running.incremental.base_state import Activation, BaseRun, Variants, row_selection
from circuits.running.incremental.edge_changes import EdgeChanges
from circuits.running.incremental.plan import Indices, InputUpdate, Plan, Step, TargetBlock
from circuits.running.incremental.shared_inputs import DistinctHeads
from circuits.running.incremental.sublayer_run import BySlot, EdgeWeights, Projected, RunContext
from circuits.running.incremental.tokens import TokenSet
from circuits.running.precision import Background

Logits = Float[Tensor, "variant scored vocab"]
Residual = Float[Tensor, "variant scored d_model"]
Outputs = Float[Tensor, "node variant token d_model"]
Inputs = Float[Tensor, "#target _ token d_model"]
PendingWrite = tuple[Activation, TargetBlock, HeadSelection, Tensor, TokenSet]
# What an input that all heads share is made of: the base's input, the tokens, and the edges.
InputKey = tuple[int, TokenSet, bytes]


def rounds_changes(background: Background | None) -> bool:
    """Whether a background rounds changes from a base, and nothing else."""
    return background is not None and not background.whole


def product_of_values(background: Background | None) -> Multiply:
    """How to multiply by weights where it is not known how the operand differs from the base."""
    return background.product if background is not None and background.whole else multiply


@dataclass(eq=False)
class VariantRun:
    """A run of several variants of a base.

    Attributes:
        kept: the edges of each variant.
        background: how products that need not be exact are computed. If it rounds changes, these
            are measured from the first variant, which `of_variants` makes the base itself.
        n_evaluated: how many nodes have been computed, each variant counted.
    """

    context: RunContext
    base: BaseRun
    kept: Variants
    edge_changes: EdgeChanges
    plan: Plan
    background: Background | None = None
    n_evaluated: int = 0
    _changes: dict[TokenSet, Tensor] = field(init=False, default_factory=dict)
    _n_filled: dict[TokenSet, int] = field(init=False, default_factory=dict)
    _normed: dict[InputKey | None, Tensor] = field(init=False, default_factory=dict)
    _writes: list[PendingWrite] | None = field(init=False, default=None)

    def of_variants(self, variants: slice) -> VariantRun:
        """A new run of some of the variants."""
        kept, signs = self.kept[variants], self.edge_changes.signs[variants]
        if rounds_changes(self.background):
            kept = torch.cat([self.base.kept[None], kept])
            signs = np.concatenate([np.zeros_like(signs[:1]), signs])
        return replace(self, kept=kept, edge_changes=replace(self.edge_changes, signs=signs))

    @torch.inference_mode()
    def execute(self) -> Logits:
        """Run, and return the logits of every variant."""
        residual, product = self._final_residual()
        logits = self.context.model.unembedding(residual, product)
        return logits[1:] if rounds_changes(self.background) else logits

    def commit(self) -> None:
        """Run, and turn the base into a base run of the first variant."""
        base, kept, self._writes = self.base, self.kept[0].clone(), []
        with torch.inference_mode():
            self._final_residual()
            # At the end, since later steps of the run read the base as it was.
            for name, block, nodes, values, tokens in self._writes:
                base.write(name, block, nodes, values[:, 0], tokens)
        base.kept, base.mask = kept, self.context.mask(kept)
        base.changed[self.plan.changed[self.context.model.window.scored]] = True
        base.plans.clear()

    def _final_residual(self) -> tuple[Residual, Multiply]:
        """Take all steps; returns the input of the logits, and how to multiply it."""
        model, outputs, n_variants = self.context.model, self.base.outputs, len(self.kept)
        for tokens, sources in self.plan.changed.items():
            shape = (len(sources), n_variants, len(tokens), outputs.shape[-1])
            self._changes[tokens], self._n_filled[tokens] = outputs.new_empty(shape), 0
        scored = model.window.scored
        for step in self.plan.steps:
            nodes = row_selection(step.nodes, outputs.device)
            if step.block.source is None:
                residual, _ = self._input(step.inputs[0], nodes)
                return residual[0], self._product(step, step.tokens)
            changes = self._next_changes(step, step.tokens)
            self._recompute(step, nodes, changes)
            if step.tokens is not scored:
                self._next_changes(step, scored).copy_(scored.select(changes))
        # No change reaches the logits.
        residual = scored.select(self.base.inputs[model.blocks[-1]])
        return residual.expand(n_variants, -1, -1), product_of_values(self.background)

    def _next_changes(self, step: Step, tokens: TokenSet) -> Outputs:
        # Where the changes of a step's nodes go: after those of earlier steps.
        start = self._n_filled[tokens]
        self._n_filled[tokens] += len(step.nodes)
        return self._changes[tokens][start : self._n_filled[tokens]]

    def _recompute(self, step: Step, nodes: HeadSelection, changes: Outputs) -> None:
        block, product = step.block, self._product(step, step.tokens)
        old = step.tokens.select(self.base.outputs[block.sources])[nodes]
        distinct = self._distinct_heads(step)
        if distinct is not None:
            self.n_evaluated += len(distinct.cases.node)
            distinct.write_changes(product, old, changes)
            return
        self.n_evaluated += len(step.nodes) * len(self.kept)
        if block.slot is not None:
            new = self._head_outputs(step, nodes)
        else:
            residual, _ = self._input(step.inputs[0], nodes)
            new = self.context.model.mlps[block.layer](residual, product)
        self._record("outputs", block, nodes, new, step.tokens)
        # out_u - out0_u
        torch.sub(new.expand_as(changes), old[:, None], out=changes)

    def _distinct_heads(self, step: Step) -> DistinctHeads | None:
        """The distinct cases of a step, if computing these instead of all heads saves work."""
        # If edges change into one target only, few variants are equal there.
        one_input = len(self.kept) == 1 or len(self.edge_changes.rows) == 1
        if one_input or step.block.slot is None or step.inputs[0].n_changed:
            return None
        distinct = DistinctHeads.of(self.edge_changes, step)
        return distinct if distinct.worthwhile(len(self.kept)) else None

    def _head_outputs(self, step: Step, heads: HeadSelection) -> Outputs:
        qkv: BySlot = {}
        for update in step.inputs:
            qkv[update.block.slot] = self._projected(step, update, heads)
        # If only some of q, k and v change, the others come from the base.
        for block in step.blocks:
            if block.slot not in qkv:
                qkv[block.slot] = self.base.projection(block, heads, step.tokens)
        product, layer = self._product(step, step.tokens), step.block.layer
        return self.context.model.head_outputs(layer, heads, qkv, step.tokens, product)

    def _projected(self, step: Step, update: InputUpdate, heads: HeadSelection) -> Projected:
        model, block, tokens = self.context.model, update.block, update.tokens
        residual, key = self._input(update, heads)
        normed = self._normed.get(key)
        if normed is None:
            normed = model.attention[block.layer].norm(residual)
            if key is not None:
                # q, k and v of a layer often read the same: keep the last such input, normed.
                self._normed = {key: normed}
        product = self._product(step, tokens)
        found = model.project(block, heads, normed, tokens, self.base.projected, product)
        self._record("projected", block, heads, found, tokens)
        return found

    def _input(self, update: InputUpdate, nodes: HeadSelection) -> tuple[Inputs, InputKey | None]:
        """New inputs of some nodes; if all nodes read the same, one row and a key for it."""
        block, tokens = update.block, update.tokens
        stored = self.base.inputs[block]
        shared = stored.shape[0] == 1
        residual = tokens.select(stored if shared else stored[nodes])[:, None]
        # x_r = x0_r + sum over recomputed sources u of M[u, r] * (out_u - out0_u)
        #            + sum over changed edges u->r of (M[u, r] - M0[u, r]) * (out0_u - c_u)
        # where an ablated edge adds c_u - out0_u: M - M0 is -1.
        edges_change = self._edges_change(update)
        change, edges = self._change_of_sources(update, edges_change)
        if change is not None:
            residual = residual + change
        key = (id(stored), tokens, edges) if shared and residual.shape[0] == 1 else None
        if edges_change:
            residual, key = self._with_edge_changes(update, residual), None
        self._record("inputs", block, nodes, residual, tokens)
        return residual, key

    def _change_of_sources(
        self, update: InputUpdate, edges_change: bool
    ) -> tuple[Inputs | None, bytes]:
        # sum over recomputed sources u of M[u, r] * (out_u - out0_u), and M as a key
        tokens, rows = update.tokens, update.rows
        sources = self.plan.changed[tokens][: update.n_changed]
        if not len(sources):
            return None, b""
        changes = self._changes[tokens][: update.n_changed]
        between = np.ix_(rows, sources)
        if edges_change and self.edge_changes.edges[between].any():
            # Some of these edges change themselves: M differs between the variants.
            ablated = self.context.model.layout.ablated(self.kept)[:, :, rows][..., sources]
            kept = torch.from_numpy(self.context.possible[between]) & ~ablated
            return self.context.weighted_sum(kept.to(changes), changes, tokens), b""
        if update not in self.plan.weights:
            self.plan.weights[update] = self._base_weights(rows, sources)
        weights, edges = self.plan.weights[update]
        if weights is None:
            return None, edges
        return self.context.weighted_sum(weights, changes, tokens), edges

    def _base_weights(self, rows: Indices, sources: Indices) -> tuple[EdgeWeights | None, bytes]:
        # M0[u, r], with one row if it is the same for all targets; None if it is 0.
        mask = self.base.mask[:, rows][..., sources]
        if not mask.any():
            return None, b""
        if (mask == mask[:, :1]).all():
            mask = mask[:, :1]
        return torch.from_numpy(mask).to(self.base.outputs)[None], mask.tobytes()

    def _with_edge_changes(self, update: InputUpdate, residual: Inputs) -> Inputs:
        # x_r + sum over changed edges u->r of (M[u, r] - M0[u, r]) * (out0_u - c_u)
        context, n_rows = self.context, len(update.rows)
        hit = np.flatnonzero(self.edge_changes.targets[update.rows])
        signs = self.edge_changes.signs_into(update.rows[hit])
        weights = torch.from_numpy(signs).to(residual)
        differences = self.edge_changes.differences(update.tokens)
        if context.spans is None and n_rows == 1 and residual.shape[1] == 1:
            # One target, with the same x_r in all variants: a single fused product.
            start, flat = residual.reshape(1, -1), differences.flatten(1)
            total = torch.addmm(start, weights[:, 0, 0], flat)
            return total.view(1, len(weights), *residual.shape[2:])
        change = context.weighted_sum(weights, differences[:, None], update.tokens)
        if len(hit) == n_rows:
            return residual + change
        result = residual.expand(n_rows, change.shape[1], -1, -1).clone()
        result[row_selection(hit, residual.device)] += change
        return result

    def _product(self, step: Step, tokens: TokenSet) -> Multiply:
        if self.background is None or self.background.whole:
            return product_of_values(self.background)
        # Nodes into which edges change are under investigation: they are exact.
        if any(map(self._edges_change, step.inputs)):
            return multiply
        return self.background.increments(len(tokens))

    def _edges_change(self, update: InputUpdate) -> bool:
        return bool(self.edge_changes.targets[update.rows].any())

    def _record(self, *write: Any) -> None:
        # In `commit`, remember what to write into the base.
        if self._writes is not None:
            self._writes.append(write)
