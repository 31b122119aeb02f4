"""A run of one circuit, kept whole: what every node reads and writes, from which other circuits are computed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from circuits.graph import SLOTS
from circuits.models import Components, Model
from circuits.patching import EdgeLayout
from circuits.propagation import Needs, Place, Plan, places
from circuits.sublayers import Attention, FeedForward, Rows, Unembedding, multiply
from circuits.window import Window

Slot = tuple[int, str | None]
"""A layer and q, k, v, or None for its MLP; the layer after the last has the logits."""


class UnsupportedError(Exception):
    """This model cannot be run incrementally; the reference executor can."""


@dataclass(eq=False)
class State:
    """Everything about one circuit's run from which others are computed.

    Attributes:
        kept: its edges.
        mask: the same by span, target and source, False where there can be no edge.
        outputs: what each source writes.
        inputs: what each target reads: a row per head, or one while all heads read the same.
        projected: q of each head in the window, and k and v of everything it attends to.
        changed: sources that write something else than in the whole model.
        needs: what matters in this circuit; the rest may be out of date, so that only subsets can be computed from it.
        plans: made before, by the rows into which edges change.
    """

    kept: Bool[Tensor, "edge"]
    mask: np.ndarray
    outputs: Float[Tensor, "source batch window d_model"]
    inputs: dict[Slot, Tensor]
    projected: dict[Slot, Tensor]
    changed: np.ndarray
    needs: Needs
    plans: dict[bytes, Plan] = field(default_factory=dict)
    _own: set[tuple[int, Slot]] = field(default_factory=set)

    def copy(self) -> State:
        """A state that can be changed without changing this one."""
        return State(self.kept, self.mask, self.outputs.clone(), dict(self.inputs), dict(self.projected), self.changed.copy(), self.needs)

    def become(self, kept: Bool[Tensor, "edge"], mask: np.ndarray, needs: Needs, changed: np.ndarray) -> None:
        """Be the state of another circuit, whose tensors have been written; `changed` are the sources among them."""
        self.changed[changed] = True
        self.kept, self.mask, self.needs = kept.clone(), mask, needs
        self.plans.clear()

    def put(self, held: dict[Slot, Tensor], place: Place, window: Window, rows: Rows, values: Tensor, wide: bool) -> None:
        """Write some heads' rows of `inputs` or `projected`, at all tokens or at the scored ones."""
        slot = (place.layer, place.slot)
        if (id(held), slot) not in self._own:
            held[slot] = held[slot].expand(place.rows, *held[slot].shape[1:]).clone()
            self._own.add((id(held), slot))
        tokens = held[slot].shape[2] - window.positions.shape[1]  # keys and values begin before the window
        window.put(held[slot][:, :, tokens:], rows, values, wide)


@dataclass(frozen=True, eq=False)
class Parts:
    """A model as functions of tensors, and what is the same in all of its runs on a task.

    Attributes:
        layout, places: where edges and targets stand.
        before: keys and values of the tokens before the window.
        biases: of attention, by layer and by whether queries are at every token.
    """

    model: Model
    layout: EdgeLayout
    places: tuple[Place, ...]
    window: Window
    attention: Sequence[Attention]
    feed_forward: Sequence[FeedForward]
    unembedding: Unembedding
    before: Mapping[Slot, Float[Tensor, "head batch before d_head"]]
    biases: Mapping[tuple[int, bool], Float[Tensor, "#head batch query key"]]

    @staticmethod
    def of(model: Model, layout: EdgeLayout, window: Window, clean: Float[Tensor, "source batch pos d_model"]) -> Parts:
        """The parts of a model, with `clean` what its sources write on the clean prompts.

        Raises:
            UnsupportedError: a layer computes something that is not known here.
        """
        components, layers = Components(model), range(model.cfg.n_layers)
        attention = [part for part in map(components.attention, layers) if part is not None]
        if len(attention) < len(layers):
            raise UnsupportedError("positions enter its attention in a way that is not known")
        everyone = slice(0, model.cfg.n_heads)
        earlier = window.keys[:, : window.before]
        before: dict[Slot, Tensor] = {}
        inputs = running_inputs(model, places(layout), clean[:, :, : window.before])
        for layer, part in enumerate(attention):
            normed = part.norm(inputs[layer, "k"][:, None])
            for slot in ("k", "v"):
                before[layer, slot] = part.project(slot, everyone, normed, earlier)[:, 0]
        biases = {
            (layer, wide): part.bias(window.at(wide), window.keys, window.readable)
            for layer, part in enumerate(attention)
            for wide in (True, False)
        }
        feed_forward = [] if model.cfg.attn_only else [components.feed_forward(layer) for layer in layers]
        return Parts(model, layout, places(layout), window, attention, feed_forward, components.unembedding(), before, biases)

    def state(
        self,
        kept: Bool[Tensor, "edge"],
        mask: np.ndarray,
        clean: Float[Tensor, "source batch window d_model"],
        written: Float[Tensor, "source batch window d_model"],
    ) -> State:
        """The state of a circuit in which every target reads the sum of `written`: nothing is ablated, or everything."""
        everyone = slice(0, self.model.cfg.n_heads)
        inputs = running_inputs(self.model, self.places, written)
        projected: dict[Slot, Tensor] = {}
        # Embeddings read nothing. The others are computed here, so that they round as in every run that follows.
        outputs = clean.clone()
        for layer, part in enumerate(self.attention):
            normed = part.norm(inputs[layer, "q"][:, None])
            for slot in SLOTS:
                found = part.project(slot, everyone, normed, self.window.positions)
                projected[layer, slot] = (found if slot == "q" else self.from_start(layer, slot, everyone, found))[:, 0]
        for place in self.places:
            if place.slot == "q":
                everything = {slot: projected[place.layer, slot][:, None] for slot in SLOTS}
                outputs[place.own] = self.heads(place.layer, everyone, everything, wide=True)[:, 0]
            elif place.slot is None and place.source is not None:
                outputs[place.own] = self.feed_forward[place.layer](inputs[place.layer, None])
        return State(
            kept,
            mask,
            outputs,
            inputs,
            projected,
            ~kept.all().numpy() & np.ones(len(written), dtype=bool),
            Needs.of(self.places, np.any(mask, axis=0)),
        )

    def heads(
        self, layer: int, heads: Rows, projected: Mapping[str, Float[Tensor, "head _ batch _ d_head"]], *, wide: bool
    ) -> Float[Tensor, "head variant batch query d_model"]:
        """What some heads write, given their q at every token of the window or at the scored ones, and k and v from the start."""
        part = self.attention[layer]
        z = part.attend(heads, projected["q"], projected["k"], projected["v"], self.biases[layer, wide])
        return multiply(z.reshape(len(z), -1, z.shape[-1]), part.output, heads).view(*z.shape[:-1], -1)

    def from_start(
        self, layer: int, slot: str, heads: Rows, found: Float[Tensor, "head variant batch window d_head"]
    ) -> Float[Tensor, "head variant batch key d_head"]:
        """Keys or values in the window, with those of the tokens before it."""
        before = self.before[layer, slot][heads][:, None].expand(-1, found.shape[1], -1, -1, -1)
        return torch.cat([before, found], dim=-2) if self.window.before else found


def running_inputs(
    model: Model, layout_places: Sequence[Place], written: Float[Tensor, "source batch pos d_model"]
) -> dict[Slot, Float[Tensor, "1 batch pos d_model"]]:
    """What each layer's targets read when sources write `written`: the residual stream, one row for all heads of a layer."""
    result: dict[Slot, Tensor] = {}
    first = min(place.source for place in layout_places if place.source is not None)
    stream = written[:first].sum(0, keepdim=True)
    for place in layout_places:
        if place.slot is not None:
            result[place.layer, place.slot] = stream
            if place.slot == "v":
                below, stream = stream, stream + written[place.own].sum(0) + Components(model).output_bias(place.layer)
        elif place.source is not None:
            result[place.layer, None] = below if model.cfg.parallel_attn_mlp else stream
            stream = stream + written[place.own]
        else:
            result[place.layer, None] = stream
    return result
