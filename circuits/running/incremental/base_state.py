"""A run of one circuit, kept whole: what every node reads and writes, from which other circuits are computed."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from circuits.models.functional import HeadSelection
from circuits.running.incremental.plan import Needs, Place, Plan
from circuits.running.incremental.tokens import Window

Slot = tuple[int, str | None]
"""A layer and q, k, v, or None for its MLP; the layer after the last has the logits."""


@dataclass(eq=False)
class State:
    """Everything about one circuit's run from which others are computed.

    Attributes:
        kept: its edges.
        mask: the same by span, target and source, False where there can be no edge.
        outputs: what each source writes.
        inputs: what each target reads: a row per head, or one while all heads read the same.
        projected: q of each head, by token; k and v, by position of every prompt.
        changed: sources that write something else than in the whole model.
        needs: what matters in this circuit; the rest may be out of date, so that only subsets can be computed from it.
        plans: made before, by the rows into which edges change.
    """

    kept: Bool[Tensor, " edge"]
    mask: Bool[np.ndarray, "span target source"]
    outputs: Float[Tensor, "source token d_model"]
    inputs: dict[Slot, Tensor]
    projected: dict[Slot, Tensor]
    changed: Bool[np.ndarray, " source"]
    needs: Needs
    plans: dict[bytes, Plan] = field(default_factory=dict)
    _own: set[tuple[int, Slot]] = field(default_factory=set)

    def holds(self, kept: Bool[Tensor, "*variants edge"]) -> bool:
        """Whether every variant keeps a subset of this circuit's edges."""
        return not bool((kept.numpy() > self.kept.numpy()).any())

    def copy(self) -> State:
        """A state that can be changed without changing this one."""
        return State(
            self.kept,
            self.mask,
            self.outputs.clone(),
            dict(self.inputs),
            dict(self.projected),
            self.changed.copy(),
            self.needs,
        )

    def become(
        self,
        kept: Bool[Tensor, " edge"],
        mask: Bool[np.ndarray, "span target source"],
        needs: Needs,
        changed: Int[np.ndarray, " changed"],
    ) -> None:
        """Be the state of another circuit, whose tensors have been written; `changed` are the sources among them."""
        self.changed[changed] = True
        self.kept, self.mask, self.needs = kept.clone(), mask, needs
        self.plans.clear()

    def put(
        self,
        held: dict[Slot, Tensor],
        place: Place,
        window: Window,
        rows: HeadSelection,
        values: Tensor,
        wide: bool,
    ) -> None:
        """Write some heads' rows of `inputs` or `projected`, at all tokens or at the scored ones."""
        slot = (place.layer, place.slot)
        if (id(held), slot) not in self._own:
            held[slot] = held[slot].expand(place.rows, *held[slot].shape[1:]).clone()
            self._own.add((id(held), slot))
        if held is self.projected and place.slot != "q":
            held[slot][rows] = values
        else:
            window.put(held[slot], rows, values, wide)


def contiguous(rows: Int[np.ndarray, " row"], device: torch.device) -> HeadSelection:
    """Some rows of a tensor; a slice, which copies nothing, where they stand side by side."""
    if len(rows) and rows[-1] - rows[0] == len(rows) - 1:
        return slice(int(rows[0]), int(rows[-1]) + 1)
    return torch.from_numpy(rows).to(device)
