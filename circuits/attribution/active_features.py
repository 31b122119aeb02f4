"""The active features of a prompt, and what features, errors and constants write.

These are the sources of an attribution graph's edges.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate, pairwise

import torch
from jaxtyping import Float, Int
from torch import Tensor

from circuits.attribution.local_model import (
    FrozenLayer,
    LocalModel,
    ModelVector,
    Residual,
    apply_norm,
)
from circuits.attribution.tensor_table import join_rows, row_numbers, select_rows, true_rows
from circuits.system.errors import InputError
from circuits.transcoders.transcoder import Transcoders

FeatureNumbers = Int[Tensor, " feature"]
RowNumbers = Int[Tensor, " row"]
OutputRows = Float[Tensor, "row d_model"]
ResidualByLayer = Float[Tensor, "layer pos d_model"]


@dataclass(frozen=True, eq=False)
class ActiveFeatures:
    """The features that are active on one prompt, sorted by layer, position and index."""

    layer: FeatureNumbers
    position: FeatureNumbers
    index: FeatureNumbers
    activation: Float[Tensor, " feature"]

    def __len__(self) -> int:
        return len(self.layer)


def active_features(
    models: Sequence[LocalModel], transcoders: Transcoders, *, leading: int = 1
) -> list[ActiveFeatures]:
    """Find the active features of several prompts, applying each encoder to all of them at once.

    Args:
        leading: the number of first positions without features, such as that of a
            beginning-of-sequence token.

    Raises:
        InputError: pre-activations are not finite.
    """
    lengths = [len(model.tokens) for model in models]
    by_prompt: list[list[ActiveFeatures]] = [[] for _ in models]
    finite = []
    for layer in range(transcoders.n_layers):
        inputs = torch.cat([model.layers[layer].feature_input for model in models])
        preactivations = transcoders.preactivations(layer, inputs)
        # Activations would hide a NaN: it exceeds no threshold, so the feature seems inactive.
        finite.append(preactivations.isfinite().all())
        split = preactivations.split(lengths)
        for found, of_prompt in zip(by_prompt, split, strict=True):
            found.append(_active_in_layer(transcoders, layer, of_prompt, leading))
    if not torch.stack(finite).all():
        raise InputError(
            f"features of {transcoders.name!r} have pre-activations that are not finite; "
            "load model and transcoders in float32."
        )
    return [join_rows(layers) for layers in by_prompt]


def _active_in_layer(
    transcoders: Transcoders, layer: int, preactivations: Tensor, leading: int
) -> ActiveFeatures:
    activation = transcoders.encoders[layer].activation
    # An activation function may choose the largest of a prompt, so it takes a batch of prompts.
    activations = activation(preactivations[None])[0]
    activations[:leading] = 0
    position, index = activations.nonzero(as_tuple=True)
    layers = torch.full_like(position, layer)
    return ActiveFeatures(layers, position, index, activations[position, index])


@dataclass(frozen=True, eq=False)
class FeatureOutputs:
    """What the active features write into the MLP output of one layer.

    Attributes:
        rows: activation x decoder row of each writing feature, in the order of `Sources.order`.
        columns: the place of each row's feature in `Sources.order`.
        position: of each row.
        column_slices: by position, the columns of its rows, which are consecutive.
    """

    rows: OutputRows
    columns: RowNumbers
    position: RowNumbers
    column_slices: Sequence[slice]

    @cached_property
    def starts(self) -> Sequence[int]:
        """The first row of each position, and the number of all rows."""
        sizes = [columns.stop - columns.start for columns in self.column_slices]
        return [0, *accumulate(sizes)]

    @cached_property
    def n_slots(self) -> int:
        """The largest number of rows at one position."""
        return max(stop - start for start, stop in pairwise(self.starts))

    @cached_property
    def slot(self) -> RowNumbers:
        """The place of each row if the rows of every position are padded to `n_slots`."""
        starts = self.position.new_tensor(self.starts)
        place = row_numbers(self.position) - starts[self.position]
        return self.position * self.n_slots + place


@dataclass(frozen=True, eq=False)
class Sources:
    """Everything that an edge of one prompt's graph can start from.

    Attributes:
        features: the active features.
        order: their numbers sorted by position, then layer and index.
        outputs: what features write, by the layer of the MLP output.
        errors: the part of each MLP output that its transcoder leaves unexplained; zero at the
            leading positions.
        mlp_constants: the part of each MLP output that depends on no source: bias and the skip's
            constant; at the leading positions everything but the skip.
    """

    features: ActiveFeatures
    order: FeatureNumbers
    outputs: Sequence[FeatureOutputs]
    errors: ResidualByLayer
    mlp_constants: ResidualByLayer

    @cached_property
    def column(self) -> FeatureNumbers:
        """The place of each feature in `order`."""
        return torch.argsort(self.order)


@torch.no_grad()
def gather_sources(
    model: LocalModel, transcoders: Transcoders, features: ActiveFeatures, *, leading: int = 1
) -> Sources:
    """Compute what the active features write, and split the rest of each MLP output.

    Args:
        leading: see `active_features`.
    """
    # A stable sort keeps features of one position in the order of layer and index.
    order = torch.sort(features.position, stable=True).indices
    by_position = select_rows(features, order)
    # The features of layer l at position p are the columns starts[p, l] to starts[p, l + 1].
    n_positions, n_layers = len(model.tokens), len(model.layers)
    place = by_position.position * n_layers + by_position.layer
    counts = torch.bincount(place, minlength=n_positions * n_layers)
    starts = [0, *counts.cumsum(0).tolist()]
    outputs, errors, constants = [], [], []
    for layer, frozen in enumerate(model.layers):
        written = _feature_outputs(model, transcoders, by_position, starts, layer)
        bias = transcoders.decoder_biases[layer]
        error, constant = _error_and_constant(frozen, written, bias, leading)
        outputs.append(written)
        errors.append(error)
        constants.append(constant)
    return Sources(features, order, outputs, torch.stack(errors), torch.stack(constants))


def _feature_outputs(
    model: LocalModel,
    transcoders: Transcoders,
    features: ActiveFeatures,
    starts: Sequence[int],
    layer: int,
) -> FeatureOutputs:
    writing = [other for other in range(layer + 1) if layer in transcoders.written_by(other)]
    # These layers are consecutive, and so are the columns of their features at one position.
    columns = true_rows((features.layer >= writing[0]) & (features.layer <= layer))
    firsts = starts[writing[0] : -1 : len(model.layers)]
    ends = starts[layer + 1 :: len(model.layers)]
    writers = select_rows(features, columns)
    rows = model.embedding.new_empty(len(writers), transcoders.d_model)
    for other in writing:
        mine = true_rows(writers.layer == other)
        rows[mine] = transcoders.decoder_rows(other, writers.index[mine], layer, rows)
    # out_n = LN(activation x decoder row)
    rows *= writers.activation[:, None]
    rows = model.layers[layer].writing[writers.position].linear(rows)
    return FeatureOutputs(rows, columns, writers.position, list(map(slice, firsts, ends)))


def _error_and_constant(
    frozen: FrozenLayer, outputs: FeatureOutputs, bias: ModelVector, leading: int
) -> tuple[Residual, Residual]:
    """Split what the MLP output holds besides features: the error, and what no source explains."""
    output = frozen.mlp_output
    features = torch.zeros_like(output).index_add_(0, outputs.position, outputs.rows)
    bias = bias.to(output)
    skip = torch.zeros_like(output)
    if frozen.skip is not None:
        # W_skip x = W_skip LN(residual) + W_skip b_LN, of which the second part is constant.
        skip = frozen.feature_input @ frozen.skip.T
        if frozen.reading.bias is not None:
            bias_skip = frozen.skip @ frozen.reading.bias
            bias, skip = bias + bias_skip, skip - bias_skip
        skip = frozen.writing.linear(skip)
    # error = mlp - sum_n out_n - constant - skip
    constant = apply_norm(frozen.writing, bias.expand_as(output)).clone()
    error = output - features - constant - skip
    # Leading positions have neither features nor errors.
    constant[:leading] = (output - skip)[:leading]
    error[:leading] = 0
    return error, constant
