"""Heads into which edges change and nothing else: computed once for each different input, not for each variant.

Variants of one search differ at a few heads, and share what was decided before: most heads read the same in most variants.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor

from circuits.graph.edges import SLOTS
from circuits.models.functional import HeadSelection, Multiply
from circuits.running.incremental.base_state import State
from circuits.running.incremental.edge_changes import Flips
from circuits.running.incremental.plan import Read, Step
from circuits.running.incremental.sublayer_run import Known

# The share of different inputs up to which they are computed alone: those of several heads each need weights and keys of their own, copied.
WORTHWHILE, WORTHWHILE_OF_SEVERAL = 0.75, 0.25


@dataclass(frozen=True, eq=False)
class Different:
    """Which of some inputs are different from each other and from the base.

    Attributes:
        node: whose input each different one is.
        variant: one in which it is read.
        number: the different one that each input is; one that is as in the base has the number of its node, counted on from the last.
    """

    node: Int[np.ndarray, " different"]
    variant: Int[np.ndarray, " different"]
    number: Int[np.ndarray, " input"]

    @staticmethod
    def of(
        node: Int[np.ndarray, " input"],
        variant: Int[np.ndarray, " input"],
        flipped: UInt8[np.ndarray, "input byte"],
    ) -> Different:
        """Of one node those inputs are the same into which the same edges change."""
        changed = np.flatnonzero(flipped.any(axis=1))
        labelled = np.concatenate(
            [node[changed, None].astype(">u4").view(np.uint8), flipped[changed]], axis=1
        )
        whole = np.ascontiguousarray(labelled).view(np.dtype((np.void, labelled.shape[1])))[:, 0]
        _, first, inverse = np.unique(whole, return_index=True, return_inverse=True)
        number = len(first) + node
        number[changed] = inverse
        return Different(node[changed][first], variant[changed][first], number)


@dataclass(frozen=True, eq=False)
class Cases:
    """The different cases of some heads: a head with what it reads in q, k and v.

    Attributes:
        heads: of all of them, and of none else, edges into the slots at hand change.
        whole: the cases; `number` goes through the variants of each head.
        slots: by slot, the different inputs among those of the cases.
    """

    heads: Int[np.ndarray, " node"]
    whole: Different
    slots: tuple[Different, ...]

    def __len__(self) -> int:
        """How many there are."""
        return len(self.whole.node)

    def worthwhile(self, variants: int) -> bool:
        """Whether computing them is less work than computing every head in every variant."""
        if len(self.heads) == 1:
            # All by the same weights: what counts is how many different inputs a slot has.
            return (
                sum(len(slot.node) for slot in self.slots)
                <= WORTHWHILE * len(self.slots) * variants
            )
        return len(self) <= WORTHWHILE_OF_SEVERAL * len(self.heads) * variants

    @staticmethod
    def of(flips: Flips, step: Step) -> Cases:
        """The cases of a step before which nothing changed."""
        first = step.reads[0].place
        assert first.source is not None
        node, variant = (
            part.flatten() for part in np.indices((len(step.sources), len(flips.signs)))
        )
        flipped = []
        for read in step.reads:
            bits = np.packbits(flips.signs_into(read.rows) != 0, axis=-1)
            flipped.append(bits.transpose(2, 0, 1, 3).reshape(len(node), -1))
        whole = Different.of(node, variant, np.concatenate(flipped, axis=1))
        inputs = whole.node * len(flips.signs) + whole.variant
        slots = (
            [Different.of(whole.node, whole.variant, part[inputs]) for part in flipped]
            if len(flipped) > 1
            else [whole]
        )
        return Cases(step.sources - first.source, whole, tuple(slots))

    def changes(
        self,
        known: Known,
        base: State,
        flips: Flips,
        step: Step,
        multiply: Multiply,
        old: Float[Tensor, "node token d_model"],
        into: Float[Tensor, "node variant token d_model"],
    ) -> None:
        """Find what the heads write in each variant, less what they write in the base.

        Args:
            multiply: how to compute products.
            old: what the heads write in the base.
            into: where it is written.
        """
        if not len(self):
            into.zero_()
            return
        parts, layer, rows = known.parts, step.layer, self._rows(self.whole, old.device)
        held = {slot: base.projected[layer, slot] for slot in SLOTS}
        if not step.wide:
            held["q"] = parts.window.narrow(held["q"])
        projected: dict[str, Tensor] = {}
        for read, different in zip(step.reads, self.slots, strict=True):
            if not len(different.node):
                continue
            slot = str(read.place.slot)
            projected[slot] = self._projected(known, base, flips, read, different, multiply)
            # One for all variants of one head is left as it is.
            if different is not self.whole and (len(self.heads) > 1 or different.number.any()):
                unchanged = held[slot][torch.from_numpy(self.heads).to(old.device)]
                table = torch.cat([projected[slot].flatten(0, 1), unchanged])
                projected[slot] = self._arranged(
                    table[torch.from_numpy(different.number).to(old.device)]
                )
        projected |= {slot: held[slot][rows][:, None] for slot in SLOTS if slot not in projected}
        written = parts.heads(layer, rows, projected, multiply, wide=step.wide).flatten(0, 1)
        change = old.new_empty(len(written) + len(old), *old.shape[1:])
        torch.sub(
            written,
            old[torch.from_numpy(self.whole.node).to(old.device)],
            out=change[: len(written)],
        )
        change[len(written) :] = 0
        torch.index_select(
            change,
            0,
            torch.from_numpy(self.whole.number).to(old.device),
            out=into.view(-1, *change.shape[1:]),
        )

    def _projected(
        self,
        known: Known,
        base: State,
        flips: Flips,
        read: Read,
        different: Different,
        multiply: Multiply,
    ) -> Float[Tensor, "_ _ ... d_head"]:
        """q, k or v of different inputs."""
        parts, place = known.parts, read.place
        assert place.slot is not None
        attention, device = parts.attention[place.layer], base.outputs.device
        stored = base.inputs[place.layer, place.slot]
        stored = stored if read.wide else parts.window.narrow(stored)
        residual = (
            stored
            if len(stored) == 1
            else stored[torch.from_numpy(self.heads[different.node]).to(device)]
        )
        signs = flips.signs[
            different.variant, :, np.searchsorted(flips.rows, read.rows)[different.node]
        ]
        weights = torch.from_numpy(signs).to(residual).transpose(0, 1)[None]
        residual = (
            residual + known.summed(weights, flips.ablated(read.wide)[:, None], read.wide)[:, 0]
        )
        rows = self._rows(different, device)
        normed = attention.norm(self._arranged(residual))
        found = attention.project(place.slot, rows, normed, parts.window.at(read.wide), multiply)
        return (
            found
            if place.slot == "q"
            else parts.window.into_keys(base.projected[place.layer, place.slot][rows], found)
        )

    def _rows(self, different: Different, device: torch.device) -> HeadSelection:
        """The heads of different inputs, as functions of a layer take them: one head for all, or one for each."""
        if len(self.heads) == 1:
            return slice(int(self.heads[0]), int(self.heads[0]) + 1)
        return torch.from_numpy(self.heads[different.node]).to(device)

    def _arranged(self, rows: Float[Tensor, " different *rest"]) -> Float[Tensor, "_ _ *rest"]:
        """By head and variant: one head in many variants, or each head in one."""
        return rows[None] if len(self.heads) == 1 else rows[:, None]
