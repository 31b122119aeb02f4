"""Heads computed once for each distinct input instead of once for each variant.

The variants of a search differ in few edges, so most heads read the same in most of them. If edges
into some heads of a layer change and nothing upstream of the layer does, a head reads the same in
two variants if the same edges into it change.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from circuits.models.layers.functional import HeadSelection, Multiply
from circuits.running.incremental.base_state import BySlot, Projected
from circuits.running.incremental.edge_changes import EdgeChanges
from circuits.running.incremental.plan import Indices, InputUpdate, Place, Step
from circuits.running.incremental.sublayer_run import HeadOutputs

# Computing distinct inputs pays off up to this share of all inputs. It is lower for several heads:
# there each distinct input needs a copy of its head's weights and keys.
WORTHWHILE, WORTHWHILE_OF_SEVERAL = 0.75, 0.25

PerInput = Int[np.ndarray, " input"]
PerDistinct = Int[np.ndarray, " distinct"]
ChangedEdges = Bool[np.ndarray, "input edge"]
Label = tuple[int, bytes]
BaseOutputs = Float[Tensor, "head token d_model"]


@dataclass(frozen=True, eq=False)
class DistinctInputs:
    """The distinct ones among the inputs of some heads, without those equal to the base's."""

    # The head that each distinct input belongs to, and a variant in which the head has it.
    node: PerDistinct
    variant: PerDistinct
    # The number of each input among the distinct ones; for one equal to the base's, the count of
    # the distinct ones plus the number of its head.
    number: PerInput

    def __len__(self) -> int:
        """How many inputs are distinct."""
        return len(self.node)

    @staticmethod
    def of(node: PerInput, variant: PerInput, changes: ChangedEdges) -> DistinctInputs:
        """Find them, given which edges change into each input."""
        # An input equal to the base's has the label of a head and no edges.
        edges_of = map(bytes, changes)
        labels = [*zip(node.tolist(), edges_of, strict=True)]
        first: dict[Label, int] = {}
        for index, label in enumerate(labels):
            first.setdefault(label, index)
        distinct = [index for (_, edges), index in first.items() if any(edges)]
        numbers = {labels[index]: number for number, index in enumerate(distinct)}
        number = node + len(distinct)
        for index, label in enumerate(labels):
            if label in numbers:
                number[index] = numbers[label]
        return DistinctInputs(node[distinct], variant[distinct], number)


@dataclass(frozen=True, eq=False)
class DistinctHeads:
    """The distinct cases in a step: a case is a head together with its q, k and v inputs."""

    edge_changes: EdgeChanges
    # Recomputes heads of a layer upstream of which nothing changes.
    step: Step
    # Their inputs are the variants of the first head, of the second, and so on.
    cases: DistinctInputs
    # For each input of the step, the distinct ones among those of the cases.
    by_slot: list[DistinctInputs]

    @staticmethod
    def of(edge_changes: EdgeChanges, step: Step) -> DistinctHeads:
        """Find the distinct cases of a step."""
        # Every head in every variant, with the edges that change into each slot.
        n_variants = len(edge_changes.signs)
        shape = (len(step.numbers), n_variants)
        indices = np.indices(shape)
        node, variant = indices.reshape(2, -1)
        changes = [_changed_edges(edge_changes, update) for update in step.inputs]
        into_all_slots = np.hstack(changes)
        cases = DistinctInputs.of(node, variant, into_all_slots)
        node, variant = cases.node, cases.variant
        first = node * n_variants + variant
        by_slot = [DistinctInputs.of(node, variant, part[first]) for part in changes]
        return DistinctHeads(edge_changes, step, cases, by_slot)

    @property
    def of_one_head(self) -> bool:
        """Whether all cases are of the same head, so that they share its weights."""
        return len(self.step.numbers) == 1

    def worthwhile(self, n_variants: int) -> bool:
        """Whether computing the cases is less work than computing every head in every variant."""
        if self.of_one_head:
            n_projected = sum(map(len, self.by_slot))
            n_inputs = len(self.by_slot) * n_variants
            return n_projected <= WORTHWHILE * n_inputs
        n_heads = len(self.step.numbers)
        return len(self.cases) <= WORTHWHILE_OF_SEVERAL * n_heads * n_variants

    def write_changes(self, multiply: Multiply, old: BaseOutputs, into: HeadOutputs) -> None:
        """Write into `into` how the outputs of the heads change from `old`, those in the base."""
        n_cases = len(self.cases)
        if not n_cases:
            into.zero_()
            return
        node = self._index(self.cases.node)
        number = self._index(self.cases.number)
        outputs = self._outputs(multiply).flatten(0, 1)
        # One row per case, out_u - out0_u, then one per head for variants in which it is zero.
        changes = old.new_zeros(n_cases + len(old), *old.shape[1:])
        torch.sub(outputs, old[node], out=changes[:n_cases])
        rows = into.view(-1, *old.shape[1:])
        torch.index_select(changes, 0, number, out=rows)

    def _outputs(self, multiply: Multiply) -> HeadOutputs:
        step, changes = self.step, self.edge_changes
        qkv: BySlot = {}
        for update, inputs in zip(step.inputs, self.by_slot, strict=True):
            if len(inputs):
                found = self._projected(update, inputs, multiply)
                qkv[update.block.slot] = found
        heads = self._heads(self.cases)
        changes.base.complete(qkv, step, heads)
        place = Place(step.block, heads, step.tokens)
        return changes.model.head_outputs(place, qkv, multiply)

    def _projected(
        self, update: InputUpdate, inputs: DistinctInputs, multiply: Multiply
    ) -> Projected:
        """q, k or v of all cases, from those of the distinct inputs and of the base."""
        base, model = self.edge_changes.base, self.edge_changes.model
        place = replace(update, nodes=self._heads(inputs))
        changes = self._input_changes(update, inputs)
        residual = base.read(place) + changes
        found = model.project(place, residual, base.projected, multiply)
        # Where each case has an input of its own, inputs are in the order of the cases.
        if len(inputs) == len(self.cases):
            return found
        unchanged = base.projection(update)
        return self._of_cases(found, unchanged, inputs.number)

    def _of_cases(self, found: Projected, unchanged: Projected, number: PerInput) -> Projected:
        """The row of each case, by the number of its input."""
        rows = [each.flatten(0, 1) for each in (found, unchanged)]
        table = torch.cat(rows)
        of_cases = table[self._index(number)]
        return of_cases[None] if self.of_one_head else of_cases[:, None]

    def _input_changes(self, update: InputUpdate, inputs: DistinctInputs) -> HeadOutputs:
        """One head with many variants, or a head per row with one variant each."""
        changes = self.edge_changes
        rows = changes.row_of[update.rows[inputs.node]]
        signs = changes.signs[inputs.variant, :, rows, :-1]
        by_node = signs[:, :, None] if self.of_one_head else signs.swapaxes(0, 1)[None]
        # sum over changed edges u->r of (M[u, r] - M0[u, r]) * (out0_u - c_u)
        differences = changes.differences(update.tokens)
        weights = torch.from_numpy(by_node).to(differences)
        return changes.model.weighted_sum(weights, differences, update.tokens)

    def _heads(self, inputs: DistinctInputs) -> HeadSelection:
        """The heads whose weights are used: the only one for all inputs, or one per input."""
        if self.of_one_head:
            return self.step.nodes
        numbers = self.step.numbers[inputs.node]
        return self._index(numbers)

    def _index(self, numbers: Indices) -> Int[Tensor, " _"]:
        device = self.edge_changes.base.outputs.device
        return torch.from_numpy(numbers).to(device)


def _changed_edges(edge_changes: EdgeChanges, update: InputUpdate) -> ChangedEdges:
    """Which edges change into each input; the variants of the first head, of the second, ..."""
    signs = edge_changes.into(update.rows)
    by_node = np.moveaxis(signs != 0, 2, 0)
    n_inputs = len(update.rows) * len(signs)
    return by_node.reshape(n_inputs, -1)
