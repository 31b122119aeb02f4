"""Heads computed once for each distinct input instead of once for each variant.

The variants of a search differ in few edges, so most heads read the same in most of them. If edges
into some heads of a layer change and nothing upstream of the layer does, a head reads the same in
two variants if the same edges into it change.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor

from circuits.models.functional import HeadSelection, Multiply
from circuits.running.incremental.edge_changes import EdgeChanges
from circuits.running.incremental.plan import Indices, InputUpdate, Step
from circuits.running.incremental.sublayer_run import BySlot, HeadOutputs, Projected

# Computing distinct inputs pays off up to this share of all inputs. It is lower for several heads:
# there each distinct input needs a copy of its head's weights and keys.
WORTHWHILE, WORTHWHILE_OF_SEVERAL = 0.75, 0.25

PerInput = Int[np.ndarray, " input"]
PerDistinct = Int[np.ndarray, " distinct"]
Bits = UInt8[np.ndarray, "input byte"]
BaseOutputs = Float[Tensor, "head token d_model"]


@dataclass(frozen=True, eq=False)
class DistinctInputs:
    """The distinct ones among the inputs of some heads, without those equal to the base's.

    Attributes:
        node: the head that each distinct input belongs to.
        variant: a variant in which the head has it.
        number: for each input, its number among the distinct ones; for one equal to the base's,
            the count of the distinct ones plus the number of its head.
    """

    node: PerDistinct
    variant: PerDistinct
    number: PerInput

    @staticmethod
    def of(node: PerInput, variant: PerInput, changes: Bits) -> DistinctInputs:
        """Find them, given the edges that change into each input, one bit per edge."""
        changed = np.flatnonzero(changes.any(axis=1))
        node_bytes = node[changed, None].astype(">u4").view(np.uint8)
        labels = np.concatenate([node_bytes, changes[changed]], axis=1)
        # One opaque value per row, which `np.unique` sorts much faster than rows of bytes.
        values = labels.view(np.dtype((np.void, labels.shape[1])))[:, 0]
        _, first, inverse = np.unique(values, return_index=True, return_inverse=True)
        number = len(first) + node
        number[changed] = inverse
        return DistinctInputs(node[changed][first], variant[changed][first], number)


@dataclass(frozen=True, eq=False)
class DistinctHeads:
    """The distinct cases in a step: a case is a head together with its q, k and v inputs.

    Attributes:
        step: recomputes heads of a layer upstream of which nothing changes.
        cases: the distinct cases; inputs are the variants of the first head, of the second, ...
        by_slot: for each input of the step, the distinct ones among those of the cases.
    """

    edge_changes: EdgeChanges
    step: Step
    cases: DistinctInputs
    by_slot: tuple[DistinctInputs, ...]

    @staticmethod
    def of(edge_changes: EdgeChanges, step: Step) -> DistinctHeads:
        """Find the distinct cases of a step."""
        # Every head in every variant, with the bits of the edges that change into each slot.
        shape = (len(step.nodes), len(edge_changes.signs))
        node, variant = (axis.flatten() for axis in np.indices(shape))
        changes = []
        for update in step.inputs:
            bits = np.packbits(edge_changes.signs_into(update.rows) != 0, axis=-1)
            changes.append(bits.transpose(2, 0, 1, 3).reshape(len(node), -1))
        cases = DistinctInputs.of(node, variant, np.concatenate(changes, axis=1))
        by_slot = [cases]
        if len(changes) > 1:
            first = cases.node * shape[1] + cases.variant
            parts = [bits[first] for bits in changes]
            by_slot = [DistinctInputs.of(cases.node, cases.variant, part) for part in parts]
        return DistinctHeads(edge_changes, step, cases, tuple(by_slot))

    @property
    def of_one_head(self) -> bool:
        """Whether all cases are of the same head, so that they share its weights."""
        return len(self.step.nodes) == 1

    def worthwhile(self, n_variants: int) -> bool:
        """Whether computing the cases is less work than computing every head in every variant."""
        if self.of_one_head:
            n_projected = sum(len(inputs.node) for inputs in self.by_slot)
            return n_projected <= WORTHWHILE * len(self.by_slot) * n_variants
        return len(self.cases.node) <= WORTHWHILE_OF_SEVERAL * len(self.step.nodes) * n_variants

    def write_changes(self, multiply: Multiply, old: BaseOutputs, into: HeadOutputs) -> None:
        """Write into `into` how the outputs of the heads change from `old`, those in the base."""
        n_cases = len(self.cases.node)
        if not n_cases:
            into.zero_()
            return
        outputs = self._outputs(multiply).flatten(0, 1)
        # One row per case, out_u - out0_u, then one per head for variants in which it is zero.
        changes = old.new_empty(n_cases + len(old), *old.shape[1:])
        torch.sub(outputs, old[self._index(self.cases.node)], out=changes[:n_cases])
        changes[n_cases:] = 0
        number = self._index(self.cases.number)
        torch.index_select(changes, 0, number, out=into.view(-1, *old.shape[1:]))

    def _outputs(self, multiply: Multiply) -> Float[Tensor, "_ _ token d_model"]:
        step, base = self.step, self.edge_changes.base
        qkv: BySlot = {}
        for update, inputs in zip(step.inputs, self.by_slot, strict=True):
            if len(inputs.node):
                found = self._projected(update, inputs, multiply)
                qkv[update.block.slot] = self._of_cases(update, inputs, found)
        heads = self._heads(self.cases)
        for block in step.blocks:
            if block.slot not in qkv:
                qkv[block.slot] = base.projection(block, heads, step.tokens)
        model = self.edge_changes.context.model
        return model.head_outputs(step.block.layer, heads, qkv, step.tokens, multiply)

    def _projected(
        self, update: InputUpdate, inputs: DistinctInputs, multiply: Multiply
    ) -> Projected:
        changes, block, tokens = self.edge_changes, update.block, update.tokens
        context, base = changes.context, changes.base
        residual = tokens.select(base.inputs[block])
        if len(residual) > 1:
            residual = residual[self._index(self.step.nodes[inputs.node])]
        # x_r = x0_r + sum over changed edges u->r of (M[u, r] - M0[u, r]) * (out0_u - c_u)
        rows = np.searchsorted(changes.rows, update.rows)[inputs.node]
        signs = torch.from_numpy(changes.signs[inputs.variant, :, rows]).to(residual)
        weights, differences = signs.transpose(0, 1)[None], changes.differences(tokens)[:, None]
        residual = residual + context.weighted_sum(weights, differences, tokens)[:, 0]
        normed = context.model.attention[block.layer].norm(self._by_head(residual))
        heads = self._heads(inputs)
        return context.model.project(block, heads, normed, tokens, base.projected, multiply)

    def _of_cases(self, update: InputUpdate, inputs: DistinctInputs, found: Projected) -> Projected:
        # q, k or v of all cases, from those of the distinct inputs and of the base.
        same_in_all = self.of_one_head and not inputs.number.any()
        if inputs is self.cases or same_in_all:
            return found
        heads = self._index(self.step.nodes)
        unchanged = self.edge_changes.base.projection(update.block, heads, update.tokens)
        table = torch.cat([found.flatten(0, 1), unchanged[:, 0]])
        return self._by_head(table[self._index(inputs.number)])

    def _heads(self, inputs: DistinctInputs) -> HeadSelection:
        # The heads whose weights are used: the only one for all inputs, or one per input.
        if self.of_one_head:
            head = int(self.step.nodes[0])
            return slice(head, head + 1)
        return self._index(self.step.nodes[inputs.node])

    def _by_head(self, rows: Float[Tensor, " distinct *rest"]) -> Float[Tensor, "_ _ *rest"]:
        # Add an axis: one head with many variants, or a head per row with one variant each.
        return rows[None] if self.of_one_head else rows[:, None]

    def _index(self, numbers: Indices) -> Int[Tensor, " _"]:
        return torch.from_numpy(numbers).to(self.edge_changes.base.outputs.device)
