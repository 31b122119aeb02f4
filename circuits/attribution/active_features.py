"""The active features of a prompt, and what features, errors and constants write.

These are the sources of an attribution graph's edges.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional

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
FeatureValues = Float[Tensor, "pos feature"]
RowNumbers = Int[Tensor, " row"]
OutputRows = Float[Tensor, "row d_model"]
ResidualByLayer = Float[Tensor, "layer pos d_model"]
LocalModels = Sequence[LocalModel]


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
    models: LocalModels, transcoders: Transcoders, *, leading: int = 1
) -> list[ActiveFeatures]:
    """Find the active features of several prompts, applying each encoder to all of them at once.

    Args:
        leading: the number of first positions without features, such as that of a
            beginning-of-sequence token.

    Raises:
        InputError: pre-activations are not finite.
    """
    layers = range(transcoders.n_layers)
    by_layer = [_active_in_layer(models, transcoders, layer, leading) for layer in layers]
    by_prompt = zip(*by_layer, strict=True)
    return list(map(join_rows, by_prompt))


def _active_in_layer(
    models: LocalModels, transcoders: Transcoders, layer: int, leading: int
) -> list[ActiveFeatures]:
    inputs = [model.layers[layer].feature_input for model in models]
    preactivations = transcoders.preactivations(layer, torch.cat(inputs))
    # Activations would hide a NaN: it exceeds no threshold, so the feature seems inactive.
    if not preactivations.isfinite().all():
        raise InputError(
            f"features of {transcoders.name!r} have pre-activations that are not finite; "
            "load model and transcoders in float32."
        )
    activation = transcoders.encoders[layer].activation
    lengths = list(map(len, inputs))
    found = []
    for of_prompt in preactivations.split(lengths):
        # An activation function may choose the largest of a prompt, so it takes a batch of prompts.
        activations = activation(of_prompt[None])[0]
        activations[:leading] = 0
        found.append(_nonzero(activations, layer))
    return found


def _nonzero(activations: FeatureValues, layer: int) -> ActiveFeatures:
    position, index = activations.nonzero(as_tuple=True)
    layers = torch.full_like(index, layer)
    active = activations[position, index]
    return ActiveFeatures(layers, position, index, active)


@dataclass(frozen=True, eq=False)
class FeatureOutputs:
    """What the active features write into the MLP output of one layer.

    Attributes:
        rows: activation x decoder row of each writing feature, in the order of `Sources.order`.
        columns: the place of each row's feature in `Sources.order`.
        position: of each row.
        counts: the number of rows at each position.
        first_columns: by position, the column of its first row. Others follow without gaps.
    """

    rows: OutputRows
    columns: RowNumbers
    position: RowNumbers
    counts: Sequence[int]
    first_columns: Sequence[int]

    @cached_property
    def starts(self) -> Sequence[int]:
        """The first row of each position, and the number of all rows."""
        return [0, *accumulate(self.counts)]

    @cached_property
    def slot(self) -> RowNumbers:
        """The place of each row if the rows of every position are padded to equal numbers."""
        starts = self.position.new_tensor(self.starts)
        place = row_numbers(self.position) - starts[self.position]
        return self.position * max(self.counts) + place


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

    For `leading`, see `active_features`.
    """
    # A stable sort keeps features of one position in the order of layer and index.
    order = features.position.argsort(stable=True)
    by_position = select_rows(features, order)
    outputs, errors, constants = [], [], []
    for layer, frozen in enumerate(model.layers):
        written = _feature_outputs(frozen, transcoders, by_position, layer)
        bias = transcoders.decoder_biases[layer]
        error, constant = _error_and_constant(frozen, written, bias, leading)
        outputs.append(written)
        errors.append(error)
        constants.append(constant)
    stacked = map(torch.stack, (errors, constants))
    return Sources(features, order, outputs, *stacked)


def _feature_outputs(
    frozen: FrozenLayer, transcoders: Transcoders, features: ActiveFeatures, layer: int
) -> FeatureOutputs:
    """What features, sorted by position, write into the MLP output of `layer`."""
    # The layers that write are consecutive, and so are the columns of their features at a position.
    writing = [other for other in range(layer + 1) if layer in transcoders.written_by(other)]
    written_from = features.layer >= writing[0]
    is_writing = written_from & (features.layer <= layer)
    columns = true_rows(is_writing)
    writers = select_rows(features, columns)
    shape = (len(writers), transcoders.d_model)
    rows = frozen.mlp_output.new_empty(shape)
    for other in writing:
        mine = true_rows(writers.layer == other)
        index = writers.index[mine]
        written = transcoders.decoder_rows(other, index, layer, rows)
        rows[mine] = written
    # out_n = LN(activation x decoder row)
    rows *= writers.activation[:, None]
    rows = frozen.writing[writers.position].linear(rows)
    n_positions = len(frozen.mlp_output)
    counts = torch.bincount(writers.position, minlength=n_positions)
    starts = counts.cumsum(0) - counts
    # A position without rows may start after the last one.
    padded = functional.pad(columns, (0, 1))
    first_columns = padded[starts].tolist()
    n_rows = counts.tolist()
    return FeatureOutputs(rows, columns, writers.position, n_rows, first_columns)


def _error_and_constant(
    frozen: FrozenLayer, outputs: FeatureOutputs, bias: ModelVector, leading: int
) -> tuple[Residual, Residual]:
    """Split what the MLP output holds besides features: the error, and what no source explains."""
    output = frozen.mlp_output
    features = torch.zeros_like(output)
    features.index_add_(0, outputs.position, outputs.rows)
    skip, bias = _skip_and_bias(frozen, bias.to(output))
    biases = bias.expand_as(output)
    constant = apply_norm(frozen.writing, biases).clone()
    # error = mlp - sum_n out_n - constant - skip
    error = output - features - constant - skip
    # Leading positions have neither features nor errors.
    constant[:leading] = (output - skip)[:leading]
    error[:leading] = 0
    return error, constant


def _skip_and_bias(frozen: FrozenLayer, bias: ModelVector) -> tuple[Residual, ModelVector]:
    """What the skip writes without its constant, and the bias with that constant."""
    if frozen.skip is None:
        return torch.zeros_like(frozen.mlp_output), bias
    # W_skip x = W_skip LN(residual) + W_skip b_LN, of which the second part is constant.
    skip = frozen.feature_input @ frozen.skip.T
    if frozen.reading.bias is not None:
        skip_constant = frozen.skip @ frozen.reading.bias
        bias, skip = bias + skip_constant, skip - skip_constant
    return frozen.writing.linear(skip), bias
