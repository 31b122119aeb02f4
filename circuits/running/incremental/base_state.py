"""The base run: all activations of one circuit, from which other circuits are computed."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Literal

import numpy as np
from jaxtyping import Bool, Float
from torch import Tensor

from circuits.graph.graph import EdgeMask
from circuits.models.layers.functional import HeadSelection
from circuits.running.incremental.plan import Needs, Place, Plan, SplitEdges, Step, TargetBlock

TokenMask = Bool[Tensor, " token"]
Outputs = Float[Tensor, "source token d_model"]
Inputs = Float[Tensor, "#node 1 token d_model"]
Projected = Float[Tensor, "_ _ ... d_head"]
ByBlock = dict[TargetBlock, Tensor]
BySlot = dict[str, Projected]
Activation = Literal["outputs", "inputs", "projected"]


@dataclass(eq=False)
class BaseRun:
    """The activations of a circuit.

    Only what the circuit needs is up to date: only its subsets can be computed from this run.
    """

    kept: EdgeMask
    # M0[u, r] by span: the same edges as the layout arranges them.
    mask: SplitEdges
    # Which sources the circuit needs.
    needs: Needs
    # What each source writes to the residual stream.
    outputs: Outputs
    # What targets read [node or 1, token, d_model]; one row while all heads read the same.
    inputs: ByBlock
    # q of each head [head, token, d_head]; its k and v at all positions [head, batch, key, d_head].
    projected: ByBlock
    # Which sources may write something else than in the whole model.
    changed: Bool[np.ndarray, " source"]
    # Plans made for this circuit, by the targets into which edges change.
    plans: dict[bytes, Plan] = field(init=False, default_factory=dict)
    _private: set[int] = field(init=False, default_factory=set)

    def contains(self, kept: EdgeMask) -> bool:
        """Whether these edges are among this circuit's."""
        added = kept.numpy() > self.kept.numpy()
        return not added.any()

    def at(self, tokens: TokenMask) -> BaseRun:
        """A copy at some of the tokens; keys and values stay whole."""
        inputs, projected = {}, dict(self.projected)
        for block, read in self.inputs.items():
            inputs[block] = read[:, tokens]
            if block.slot == "q":
                projected[block] = projected[block][:, tokens]
        outputs = self.outputs[:, tokens]
        return replace(self, outputs=outputs, inputs=inputs, projected=projected)

    def copy(self) -> BaseRun:
        """A base run that can be changed without changing this one."""
        inputs = dict(self.inputs)
        projected = dict(self.projected)
        outputs = self.outputs.clone()
        changed = self.changed.copy()
        return replace(self, outputs=outputs, inputs=inputs, projected=projected, changed=changed)

    def written(self, place: Place) -> Outputs:
        """out0_u of some nodes."""
        outputs = self.outputs[place.block.sources]
        return place.tokens.select(outputs)[place.nodes]

    def read(self, place: Place) -> Inputs:
        """x0_r as one variant; in one row while all nodes read the same."""
        held = self.inputs[place.block]
        if held.shape[0] > 1:
            held = held[place.nodes]
        return place.tokens.select(held)[:, None]

    def projection(self, place: Place) -> Projected:
        """q at some tokens, or k or v at all positions, as one variant."""
        held = self.projected[place.block]
        if place.block.slot == "q":
            held = place.tokens.select(held)
        return held[place.nodes][:, None]

    def complete(self, qkv: BySlot, step: Step, heads: HeadSelection) -> None:
        """Add the slots that do not change."""
        for block in step.blocks:
            if block.slot not in qkv:
                place = Place(block, heads, step.tokens)
                qkv[block.slot] = self.projection(place)

    def write(self, name: Activation, place: Place, new: Tensor) -> None:
        """Overwrite activations of some nodes at some tokens; k and v at all positions."""
        block = place.block
        if name == "outputs":
            held = self.outputs[block.sources]
            self.changed[block.sources] = True
        else:
            held = self._own(getattr(self, name), block)
        if name != "projected" or block.slot == "q":
            held = place.tokens.select(held)
        held[place.nodes] = new

    def _own(self, tensors: ByBlock, block: TargetBlock) -> Tensor:
        """The tensor of a block with a row per node, copied if anything else may hold it."""
        held = tensors[block]
        if id(held) not in self._private:
            token_shape = held.shape[1:]
            by_node = held.expand(block.n_nodes, *token_shape)
            tensors[block] = by_node.clone()
            self._private.add(id(tensors[block]))
        return tensors[block]
