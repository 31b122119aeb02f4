"""A model as functions of tensors, layer by layer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from circuits.graph.edges import SLOTS
from circuits.models import Model, ModelWeights
from circuits.models.functional import (
    Attention,
    FeedForward,
    HeadSelection,
    Multiply,
    Unembedding,
    multiply,
)
from circuits.running.edge_layout import EdgeLayout
from circuits.running.incremental.base_state import Slot, State
from circuits.running.incremental.plan import Needs, Place, places
from circuits.running.incremental.tokens import Window


class UnsupportedError(Exception):
    """This model cannot be run incrementally; the reference executor can."""


@dataclass(frozen=True, eq=False)
class Parts:
    """A model as functions of tensors, and what is the same in all of its runs on a task.

    Attributes:
        layout, places: where edges and targets stand.
        window: the tokens that are computed.
        biases: of attention, by layer and by whether queries are at every token.
    """

    model: Model
    layout: EdgeLayout
    places: tuple[Place, ...]
    window: Window
    attention: Sequence[Attention]
    feed_forward: Sequence[FeedForward]
    unembedding: Unembedding
    biases: Mapping[tuple[int, bool], Float[Tensor, "#head batch query key"]]

    @staticmethod
    def of(model: Model, layout: EdgeLayout, window: Window) -> Parts:
        """The parts of a model.

        Raises:
            UnsupportedError: a layer computes something that is not known here.
        """
        components, layers = ModelWeights(model), range(model.cfg.n_layers)
        attention = [part for part in map(components.attention, layers) if part is not None]
        if len(attention) < len(layers):
            raise UnsupportedError("positions enter its attention in a way that is not known")
        keys = torch.arange(window.readable.shape[1], device=window.readable.device).expand(
            window.readable.shape
        )
        biases = {
            (layer, wide): part.bias(window.layouts[wide].positions, keys, window.readable)
            for layer, part in enumerate(attention)
            for wide in (True, False)
        }
        feed_forward = (
            [] if model.cfg.attn_only else [components.feed_forward(layer) for layer in layers]
        )
        return Parts(
            model,
            layout,
            places(layout),
            window,
            attention,
            feed_forward,
            components.unembedding(),
            biases,
        )

    def run(
        self,
        written: Float[Tensor, "some_sources token d_model"],
        known: Mapping[Slot, Tensor],
        multiply: Multiply = multiply,
    ) -> Tensors:
        """Every node's input and output with nothing ablated; or, where `written` has all sources, with everything replaced by it.

        Args:
            written: what is read of each source; where there are only embeddings, the rest is computed.
            known: keys and values of tokens outside of the window.
            multiply: how to compute products.
        """
        outputs = written.new_empty(len(self.layout.nodes), *written.shape[1:])
        outputs[: len(written)] = written
        read = outputs if len(written) < len(outputs) else written
        result = Tensors(outputs, {}, {})
        stream = written[: self.embeddings].sum(0, keepdim=True)
        for place in self.places:
            result.inputs[place.layer, place.slot] = stream
            if place.slot == "q":
                below = stream
                self._all_heads(place, stream, known, result, multiply)
                stream = (
                    stream
                    + read[place.own].sum(0)
                    + ModelWeights(self.model).output_bias(place.layer)
                )
            elif place.slot is not None:
                result.inputs[place.layer, place.slot] = below
            elif place.source is not None:
                if self.model.cfg.parallel_attn_mlp:
                    result.inputs[place.layer, None] = below
                outputs[place.own] = self.feed_forward[place.layer](
                    result.inputs[place.layer, None], multiply
                )
                stream = stream + read[place.own]
        return result

    @property
    def embeddings(self) -> int:
        """How many sources are embeddings, which read nothing."""
        return min(place.source for place in self.places if place.source is not None)

    def _all_heads(
        self,
        place: Place,
        stream: Float[Tensor, "1 token d_model"],
        known: Mapping[Slot, Tensor],
        result: Tensors,
        multiply: Multiply,
    ) -> None:
        part, everyone = self.attention[place.layer], slice(0, place.rows)
        normed = part.norm(stream[:, None])
        projected = {}
        for slot in SLOTS:
            found = part.project(slot, everyone, normed, self.window.position, multiply)
            projected[slot] = (
                found if slot == "q" else self.window.into_keys(known[place.layer, slot], found)
            )
            result.projected[place.layer, slot] = projected[slot][:, 0]
        result.outputs[place.own] = self.heads(
            place.layer, everyone, projected, multiply, wide=True
        )[:, 0]

    def heads(
        self,
        layer: int,
        heads: HeadSelection,
        projected: Mapping[str, Float[Tensor, "head _ ..."]],
        multiply: Multiply = multiply,
        *,
        wide: bool,
    ) -> Float[Tensor, "head variant token d_model"]:
        """What some heads write, given their q at every token or at the scored ones, and k and v at every position of the prompts."""
        part, layout = self.attention[layer], self.window.layouts[wide]
        z = part.attend(
            heads,
            layout.to_prompts(projected["q"]),
            projected["k"],
            projected["v"],
            self.biases[layer, wide],
        )
        z = layout.to_tokens(z)
        return multiply(z.flatten(1, -2), part.output, None, heads).view(*z.shape[:-1], -1)

    def no_keys(self) -> dict[Slot, Float[Tensor, "head batch key d_head"]]:
        """Keys and values where none are known yet."""
        cfg = self.model.cfg
        nothing = self.attention[0].output.new_zeros(
            cfg.n_heads, *self.window.readable.shape, cfg.d_head
        )
        return {(layer, slot): nothing for layer in range(cfg.n_layers) for slot in ("k", "v")}


@dataclass(frozen=True, eq=False)
class Tensors:
    """What a run leaves: outputs of sources, inputs of targets, and q, k and v, as a `State` holds them."""

    outputs: Float[Tensor, "source token d_model"]
    inputs: dict[Slot, Tensor]
    projected: dict[Slot, Tensor]

    def at(self, tokens: Int[Tensor, " token"]) -> Tensors:
        """At some of the tokens only; keys and values stay whole."""
        inputs = {slot: read[:, tokens] for slot, read in self.inputs.items()}
        projected = {
            slot: part[:, tokens] if slot[1] == "q" else part
            for slot, part in self.projected.items()
        }
        return Tensors(self.outputs[:, tokens], inputs, projected)

    def state(
        self,
        kept: Bool[Tensor, " edge"],
        mask: Bool[np.ndarray, "span target source"],
        layout_places: tuple[Place, ...],
    ) -> State:
        """The state of a circuit whose run this is."""
        changed = np.full(len(self.outputs), not bool(kept.all()))
        return State(
            kept,
            mask,
            self.outputs,
            self.inputs,
            self.projected,
            changed,
            Needs.of(layout_places, np.any(mask, axis=0)),
        )


@dataclass(frozen=True, eq=False)
class Known:
    """What all runs on a task share.

    Attributes:
        parts: the model as functions of tensors.
        counterfactuals: what replaces each source's output, in the window.
        removed: what each source of the whole model writes, minus its counterfactual: at the scored tokens, and at all of the window.
        spans: the span of each token, where edges are split by spans.
        possible: where there can be edges, by target and source.
    """

    parts: Parts
    counterfactuals: Float[Tensor, "source token d_model"]
    removed: tuple[Float[Tensor, "source scored d_model"], Float[Tensor, "source token d_model"]]
    spans: Int[Tensor, " token"] | None
    possible: Bool[np.ndarray, "target source"]

    def summed(
        self,
        weights: Float[Tensor, "#variant span target source"],
        values: Float[Tensor, "source _ token d_model"],
        wide: bool,
    ) -> Float[Tensor, "target variant token d_model"]:
        """Sums over sources, each token by the weights of its span."""
        if self.spans is not None:
            here = self.spans if wide else self.spans[-self.parts.window.scored :]
            shape = (max(len(weights), values.shape[1]), *values.shape[2:])
            return torch.einsum(
                "vtru,uvtd->rvtd",
                weights[:, here].expand(shape[0], -1, -1, -1),
                values.expand(-1, *shape),
            )
        matrix, flat = weights[:, 0], values.flatten(2)
        if matrix.shape[0] == 1:
            return (matrix[0] @ flat.flatten(1)).view(-1, *values.shape[1:])
        if values.shape[1] == 1:
            summed = matrix.transpose(0, 1).flatten(0, 1) @ flat[:, 0]
        else:
            summed = torch.bmm(matrix, flat.transpose(0, 1)).transpose(0, 1)
        return summed.reshape(matrix.shape[1], len(matrix), *values.shape[2:])

    def mask(self, kept: Bool[Tensor, " edge"]) -> Bool[np.ndarray, "span target source"]:
        """Edges kept, by span, target and source."""
        return ~self.parts.layout.ablated(kept[None])[0].numpy() & self.possible
