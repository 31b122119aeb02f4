"""The base run: all activations of one circuit, from which other circuits are computed."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Literal

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from circuits.models.functional import HeadSelection
from circuits.running.incremental.plan import Indices, Plan, SourceMask, TargetBlock
from circuits.running.incremental.tokens import TokenSet

EdgeMask = Bool[Tensor, " edge"]
Variants = Bool[Tensor, "variant edge"]
SplitEdges = Bool[np.ndarray, "span target source"]
ByBlock = dict[TargetBlock, Tensor]
Activation = Literal["outputs", "inputs", "projected"]


@dataclass(eq=False)
class RunTensors:
    """The activations of one run.

    Attributes:
        outputs: what each source writes to the residual stream.
        inputs: what the targets of a block read [node or 1, token, d_model]; one row while all
            heads read the same.
        projected: q of each head [head, token, d_head]; its k and v at all positions of the
            prompts [head, batch, key, d_head].
    """

    outputs: Float[Tensor, "source token d_model"]
    inputs: ByBlock
    projected: ByBlock

    def at(self, tokens: Bool[Tensor, " token"]) -> RunTensors:
        """A copy at some of the tokens; keys and values stay whole."""
        inputs = {block: read[:, tokens] for block, read in self.inputs.items()}
        projected = dict(self.projected)
        queries = [block for block in projected if block.slot == "q"]
        for block in queries:
            projected[block] = projected[block][:, tokens]
        return RunTensors(self.outputs[:, tokens], inputs, projected)


@dataclass(eq=False)
class BaseRun(RunTensors):
    """The activations of a circuit and its edges.

    Only what the circuit needs is up to date: only its subsets can be computed from this run.

    Attributes:
        kept: the edges of the circuit.
        mask: M0[u, r] by span: the same edges as the layout arranges them.
        changed: the sources whose outputs may differ from those in the whole model.
        plans: plans made for this circuit, by the targets into which edges change.
    """

    kept: EdgeMask
    mask: SplitEdges
    changed: SourceMask
    plans: dict[bytes, Plan] = field(default_factory=dict)
    _private: set[int] = field(default_factory=set)

    @staticmethod
    def of(tensors: RunTensors, kept: EdgeMask, mask: SplitEdges) -> BaseRun:
        """The base run of the circuit `kept`, whose activations are given."""
        changed = np.full(len(tensors.outputs), not bool(kept.all()))
        return BaseRun(**vars(tensors), kept=kept, mask=mask, changed=changed)

    def contains(self, kept: Bool[Tensor, "*variants edge"]) -> bool:
        """Whether every variant keeps a subset of this circuit's edges."""
        return not bool((kept.numpy() > self.kept.numpy()).any())

    def copy(self) -> BaseRun:
        """A base run that can be changed without changing this one."""
        copied = RunTensors(self.outputs.clone(), dict(self.inputs), dict(self.projected))
        changed = self.changed.copy()
        return replace(self, **vars(copied), changed=changed, plans={}, _private=set())

    def projection(
        self, block: TargetBlock, heads: HeadSelection, tokens: TokenSet
    ) -> Float[Tensor, "head 1 ... d_head"]:
        """q of some heads at some tokens, or their k or v at all positions, as one variant."""
        held = self.projected[block]
        if block.slot == "q":
            held = tokens.select(held)
        return held[heads][:, None]

    def write(
        self, name: Activation, block: TargetBlock, nodes: HeadSelection, new: Tensor, at: TokenSet
    ) -> None:
        """Overwrite activations of some nodes at some tokens; k and v at all positions."""
        if name == "outputs":
            held = self.outputs[block.sources]
        else:
            held = self._own(self.inputs if name == "inputs" else self.projected, block)
        if name != "projected" or block.slot == "q":
            held = at.select(held)
        held[nodes] = new

    def _own(self, tensors: ByBlock, block: TargetBlock) -> Tensor:
        # The tensor of a block with a row per node, copied if anything else may hold it.
        held = tensors[block]
        if id(held) not in self._private:
            held = tensors[block] = held.expand(block.n_nodes, *held.shape[1:]).clone()
            self._private.add(id(held))
        return held


def row_selection(rows: Indices, device: torch.device) -> HeadSelection:
    """Index rows of a tensor: with a slice, which copies nothing, if they are consecutive."""
    if len(rows) and rows[-1] - rows[0] == len(rows) - 1:
        return slice(int(rows[0]), int(rows[-1]) + 1)
    return torch.from_numpy(rows).to(device)
