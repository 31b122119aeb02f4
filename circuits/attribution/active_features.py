"""Which features fire on a prompt, and what they, the errors and the constants write: the sources of an attribution graph's edges."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Float, Int
from torch import Tensor

from circuits.attribution.local_model import FrozenLayer, LocalModel
from circuits.system.errors import InputError
from circuits.transcoders.transcoder import Transcoders


@dataclass(frozen=True, eq=False)
class ActiveFeatures:
    """The features that fire on one prompt, ordered by layer, position and index."""

    layer: Int[Tensor, " feature"]
    position: Int[Tensor, " feature"]
    index: Int[Tensor, " feature"]
    activation: Float[Tensor, " feature"]

    def __len__(self) -> int:
        return len(self.layer)


def active_features(
    models: Sequence[LocalModel], transcoders: Transcoders, *, leading: int = 1
) -> list[ActiveFeatures]:
    """The active features of some prompts, each layer's encoder applied to all of them at once.

    Args:
        leading: at so many first positions there are no features (the position of a beginning-of-sequence token).

    Raises:
        InputError: activations are not finite.
    """
    lengths = [len(model.tokens) for model in models]
    found: list[list[tuple[Tensor, Tensor]]] = [[] for _ in models]
    finite: list[Tensor] = []
    for layer in range(transcoders.n_layers):
        pre = transcoders.preactivations(
            layer, torch.cat([model.layers[layer].feature_input for model in models])
        )
        # Of pre-activations: one that is not a number fires nowhere, and would be missed without a word.
        finite.append(torch.isfinite(pre).all())
        for row, one in enumerate(pre.split(lengths)):
            activations = transcoders.encoders[layer].activation(one[None])[0]
            activations[:leading] = 0
            places = activations.nonzero()
            found[row].append((places, activations[places[:, 0], places[:, 1]]))
    if not torch.stack(finite).all():
        raise InputError(
            f"features of {transcoders.name!r} have pre-activations that are not finite; load model and transcoders in float32."
        )
    result = []
    for parts in found:
        values = torch.cat([values for _, values in parts])
        places = torch.cat([places for places, _ in parts])
        counts = torch.tensor([len(values) for _, values in parts], device=places.device)
        layers = torch.arange(len(parts), device=places.device).repeat_interleave(counts)
        result.append(
            ActiveFeatures(layers, places[:, 0].contiguous(), places[:, 1].contiguous(), values)
        )
    return result


@dataclass(frozen=True, eq=False)
class Written:
    """What the features that write into one layer's MLP output add to the residual stream.

    Attributes:
        rows: activation times decoder, by position, then as `Sources.order` has them.
        bounds: `rows[bounds[p] : bounds[p + 1]]` are those at position p.
        places: where each row stands in `Sources.order`; those at one position stand together.
    """

    rows: Float[Tensor, "row d_model"]
    bounds: Sequence[int]
    places: Int[Tensor, " row"]

    def at(self, position: int) -> tuple[Float[Tensor, "row d_model"], slice]:
        """What is written at a position, and where those that write it stand in `Sources.order`."""
        start, stop = self.bounds[position], self.bounds[position + 1]
        column = self._columns[position]
        return self.rows[start:stop], slice(column, column + stop - start)

    @cached_property
    def _columns(self) -> Sequence[int]:
        """Where the first row of each position stands in `Sources.order`; any number where a position has none."""
        first = torch.tensor(self.bounds[:-1], device=self.places.device)
        return torch.cat([self.places, self.places.new_zeros(1)])[first].tolist()

    @cached_property
    def slots(self) -> Int[Tensor, "pos slot"]:
        """The rows at each position, with as many slots for all as the fullest needs; what is in a slot too many is no row of that position."""
        bounds = torch.tensor(self.bounds, device=self.rows.device)
        return bounds[:-1, None] + torch.arange(int(bounds.diff().max()), device=bounds.device)

    @cached_property
    def filled(self) -> Int[Tensor, " row"]:
        """The slot of each row, all positions' slots in one line."""
        bounds = torch.tensor(self.bounds, device=self.rows.device)
        return (self.slots < bounds[1:, None]).flatten().nonzero().flatten()

    def together(self, positions: slice) -> Float[Tensor, "pos slot d_model"]:
        """The rows at some positions, in their slots; anything in slots too many."""
        slots = self.slots[positions]
        return self.rows.index_select(0, slots.clamp(max=len(self.rows) - 1).flatten()).unflatten(
            0, slots.shape
        )


@dataclass(frozen=True, eq=False)
class Sources:
    """Everything an edge can start from, of one prompt.

    Attributes:
        features: the active ones.
        order: numbers of the features ordered by position, then layer and index, so that what writes at one place stands together.
        written: by layer that is written to.
        errors: what each MLP wrote beyond its features, bias and skip; zero at the leading positions.
        mlp_constants: what each MLP output holds besides features and errors: bias, the skip's constant, at leading positions all of it.
    """

    features: ActiveFeatures
    order: Int[Tensor, " feature"]
    written: Sequence[Written]
    errors: Float[Tensor, "layer pos d_model"]
    mlp_constants: Float[Tensor, "layer pos d_model"]

    @cached_property
    def places(self) -> Int[Tensor, " feature"]:
        """Where each feature stands in `order`."""
        return torch.argsort(self.order)


@torch.no_grad()
def gather_sources(
    model: LocalModel, transcoders: Transcoders, features: ActiveFeatures, *, leading: int = 1
) -> Sources:
    """The decoder rows of the active features, times their activations, and what is left of each MLP's output."""
    # Layer and index stay in order within a position, because the sort is stable.
    order = torch.sort(features.position, stable=True).indices
    written = [
        _written(model, transcoders, features, order, layer)
        for layer in range(transcoders.n_layers)
    ]
    parts = [
        _rest(model.layers[layer], transcoders, layer, written[layer], leading)
        for layer in range(transcoders.n_layers)
    ]
    errors, constants = (torch.stack(part) for part in zip(*parts, strict=True))
    return Sources(features, order, written, errors, constants)


def _written(
    model: LocalModel,
    transcoders: Transcoders,
    features: ActiveFeatures,
    order: Int[Tensor, " feature"],
    layer: int,
) -> Written:
    layers, positions = features.layer[order], features.position[order]
    writing = [source for source in range(layer + 1) if layer in transcoders.written_by(source)]
    chosen = ((layers >= writing[0]) & (layers <= layer)).nonzero().flatten()
    frozen, like = model.layers[layer], model.embedding
    rows = like.new_empty(len(chosen), like.shape[1])
    of_chosen, numbers = layers[chosen], features.index[order[chosen]]
    for source in writing:
        mine = (of_chosen == source).nonzero().flatten()
        rows[mine] = transcoders.decoder_rows(source, numbers[mine], layer, like)
    rows *= features.activation[order[chosen], None]
    rows = frozen.writing[positions[chosen]].linear(rows)
    ends = torch.bincount(positions[chosen], minlength=len(model.tokens)).cumsum(0)
    # A layer's writers at a position stand together in `order`: they are the layers from writing[0] to this one, whole.
    return Written(rows, [0, *ends.tolist()], chosen)


def _rest(
    frozen: FrozenLayer, transcoders: Transcoders, layer: int, written: Written, leading: int
) -> tuple[Float[Tensor, "pos d_model"], Float[Tensor, "pos d_model"]]:
    """What the MLP's output holds besides its features: the error, and the constants."""
    output = frozen.mlp_output
    positions = torch.arange(len(output), device=output.device).repeat_interleave(
        torch.tensor(written.bounds, device=output.device).diff()
    )
    features = torch.zeros_like(output).index_add_(0, positions, written.rows)
    constant = transcoders.decoder_biases[layer].to(output).expand_as(output)
    skipped = torch.zeros_like(output)
    if frozen.skip is not None:
        through_bias = 0.0 if frozen.reading.bias is None else frozen.skip @ frozen.reading.bias
        constant = constant + through_bias
        skipped = frozen.writing.linear(frozen.feature_input @ frozen.skip.T - through_bias)
    constant = frozen.writing.linear(constant) + (
        0.0 if frozen.writing.bias is None else frozen.writing.bias
    )
    error = output - features - constant - skipped
    constant = constant.clone()
    constant[:leading] = (output - skipped)[:leading]
    error[:leading] = 0
    return error, constant
