"""Transcoders: per layer (PLT), per layer with a skip connection, and cross-layer (CLT).

A transcoder approximates what an MLP writes, from its input x_l, by a sum of sparse features a_l:

    a_l = activation_l(W_enc_l x_l + b_enc_l)
    mlp_l(x_l) ~ sum_{s <= l} W_dec_{s->l}^T a_s + b_dec_l + W_skip_l x_l

A per-layer transcoder has only the term s = l; most transcoders have no W_skip.

References: Dunefsky, Chlenski and Nanda 2024 (transcoders); Paulo, Shabalin and Belrose 2025
(skip transcoders); Ameisen et al. 2025 (cross-layer transcoders).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from hashlib import blake2b
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional

from circuits.graph.identity import TranscodersIdentity
from circuits.models.identity import checksum
from circuits.system.arguments import checked_arguments
from circuits.system.code_digest import stand_in
from circuits.system.errors import InputError, OutOfRangeError
from circuits.system.fields import CheckedFields
from circuits.system.kinds import expect
from circuits.system.numbers import WholeNumber, shown, whole
from circuits.system.tensors import as_tensor
from circuits.transcoders.activations import Activation, BatchTopK, JumpReLU, Mask, TopK

Reads = Literal["residual", "normalized", "mlp_input"]
"""What features read: the residual stream before the norm of the MLP ("residual"), after that norm
without its weight and bias ("normalized"), or with them, as the MLP itself does ("mlp_input")."""

Writes = Literal["residual", "mlp"]
"""Where features write: to the residual stream, or to the MLP's output before a norm that follows
it. The two are equal in models without such a norm."""

# Larger tensors are fingerprinted by a sample of their rows: a set can have 100 GB.
MAX_HASHED_ELEMENTS = 1 << 26
SAMPLED_ROWS = 4096

Vectors = Float[Tensor, "*batch d_model"]
FeatureValues = Float[Tensor, "*batch feature"]
LayerValues = Mapping[int, FeatureValues]
FeatureVectors = Float[Tensor, "n d_model"]
Indices = Int[Tensor, " n"]
HiddenStates = Float[Tensor, "batch pos d_model"]
Device = str | torch.device | None
Dtype = torch.dtype | None


@dataclass(frozen=True, eq=False)
class Encoder:
    """The encoder of one layer: activation(weight @ x + bias)."""

    weight: Float[Tensor, "feature d_model"]
    bias: Float[Tensor, " feature"]
    activation: Activation

    @checked_arguments
    def to(self, device: Device = None, dtype: Dtype = None) -> Encoder:
        """Return a copy on a device and in a precision; None leaves each tensor as it is."""
        activation = self.activation
        if isinstance(activation, JumpReLU):
            threshold = activation.threshold.to(device, dtype)
            activation = JumpReLU(threshold)
        weight = self.weight.to(device, dtype)
        bias = self.bias.to(device, dtype)
        return Encoder(weight, bias, activation)


@dataclass(frozen=True, eq=False)
class Transcoders(CheckedFields):
    """Transcoders for all layers of a model.

    The tensors may be on any device, in any precision, or mapped from a file. Methods move what
    they use of them to the device and precision of the activations they are given.

    Attributes:
        encoders: one for each layer.
        decoders: one for each layer. `decoders[l][f, i]` is what feature f of layer l, at
            activation 1, adds to the MLP output of layer l + i. Per-layer transcoders have i = 0.
        decoder_biases: one for each layer, added to its MLP output.
        skips: W_skip for each layer, where the skip adds W_skip @ x; None without skips.
        reads, writes: see `Reads` and `Writes`.
        name: name of the set, for records.
        source: the folder or address they were loaded from, for records.

    >>> import circuits, torch
    >>> transcoders = circuits.load_transcoders("toy-world-clt")
    >>> transcoders
    Transcoders('toy-world-clt', CLT, 4 layers of 512 features, jump_relu)
    >>> transcoders.encode(0, torch.randn(1, 6, transcoders.d_model)).shape
    torch.Size([1, 6, 512])
    """

    encoders: Sequence[Encoder]
    decoders: Sequence[Float[Tensor, "feature _ d_model"]]
    decoder_biases: Sequence[Float[Tensor, " d_model"]]
    skips: Sequence[Float[Tensor, "d_out d_in"]] | None = None
    reads: Reads = "residual"
    writes: Writes = "residual"
    name: str = "transcoders"
    source: str = ""

    @property
    def n_layers(self) -> int:
        """Number of layers."""
        return len(self.encoders)

    @property
    def n_features(self) -> int:
        """Number of features in each layer."""
        return self.encoders[0].weight.shape[0]

    @property
    def d_model(self) -> int:
        """Width of the residual stream."""
        return self.encoders[0].weight.shape[1]

    @property
    def cross_layer(self) -> bool:
        """Whether features write to later layers too."""
        return self.decoders[0].shape[1] > 1

    @property
    def kind(self) -> str:
        """`CLT` or `PLT`, followed by ` with skip` where there are skips."""
        kind = "CLT" if self.cross_layer else "PLT"
        return kind if self.skips is None else f"{kind} with skip"

    def __repr__(self) -> str:
        layers = f"{self.n_layers} layers of {self.n_features:,} features"
        activation = self.encoders[0].activation.name
        return f"Transcoders({self.name!r}, {self.kind}, {layers}, {activation})"

    def _of_layer(self, parts: Sequence[Any], layer: WholeNumber) -> Any:
        """The part of a layer, which Python's own indexing would count from the end if negative."""
        number = whole(layer, "layer")
        if number not in range(self.n_layers):
            raise OutOfRangeError(
                f"there is no layer {number}: {self.name!r} has 0 to {self.n_layers - 1}."
            )
        return parts[number]

    def _check_width(self, vectors: Tensor, width: int) -> None:
        if vectors.shape[-1:] != (width,):
            raise InputError(
                f"{self.name}: vectors of shape {tuple(vectors.shape)} were given; their last axis "
                f"must be {width} wide."
            )

    def written_by(self, layer: WholeNumber) -> range:
        """Return the layers whose MLP outputs the features of `layer` write to."""
        n_written = self._of_layer(self.decoders, layer).shape[1]
        return range(int(layer), int(layer) + n_written)

    @checked_arguments
    def preactivations(self, layer: WholeNumber, inputs: Vectors) -> FeatureValues:
        """Return weight @ x + bias for each x of `inputs`."""
        encoder = self._of_layer(self.encoders, layer)
        self._check_width(inputs, self.d_model)
        weight = encoder.weight.to(inputs)
        bias = encoder.bias.to(inputs)
        # W_enc x + b_enc
        return functional.linear(inputs, weight, bias)

    @checked_arguments
    def encode(
        self, layer: WholeNumber, inputs: HiddenStates, mask: Mask = None
    ) -> Float[Tensor, "batch pos feature"]:
        """Return the activations of a layer's features on what they read.

        Only `BatchTopK` depends on the mask, which is True for real tokens, False for padding.
        """
        activation = self._of_layer(self.encoders, layer).activation
        pre = self.preactivations(layer, inputs)
        if isinstance(activation, BatchTopK):
            return activation(pre, mask)
        return activation(pre)

    @checked_arguments
    def encoder_rows(self, layer: WholeNumber, features: Indices, like: Tensor) -> FeatureVectors:
        """Return the encoder weights of some features, on the device and in the dtype of `like`."""
        weight = self._of_layer(self.encoders, layer).weight
        return _rows(weight, features).to(like)

    @checked_arguments
    def decoder_rows(
        self, layer: WholeNumber, features: Indices, target_layer: WholeNumber, like: Tensor
    ) -> FeatureVectors:
        """Return what some features of `layer` write to the MLP output of `target_layer`."""
        written = self.written_by(layer)
        if target_layer not in written:
            raise OutOfRangeError(
                f"features of layer {layer} do not write to layer {target_layer}; they write to "
                f"{list(written)}."
            )
        decoder = self._of_layer(self.decoders, layer)[:, int(target_layer) - int(layer)]
        return _rows(decoder, features).to(like)

    @checked_arguments
    def decode(self, activations: LayerValues, target_layer: WholeNumber) -> Vectors:
        """Sum what features write to the MLP output of `target_layer`, without bias and skip.

        Of the activations, by layer, those of layers that do not write there are ignored.

        Raises:
            InputError: no layer writes there, or activations are not of all features of a layer.
        """
        remedy = "give a dictionary from layers to tensors"
        expect(activations, Mapping, "activations by layer", remedy)
        # sum_s W_dec_{s->target}^T a_s
        parts = []
        for layer in sorted(activations):
            values = as_tensor(activations[layer], "activations")
            self._check_width(values, self.n_features)
            if target_layer in self.written_by(layer):
                # The decoder may be mapped from a file: read only rows of features that fire.
                fires = values.flatten(0, -2).any(0)
                firing = fires.nonzero().flatten()
                rows = self.decoder_rows(layer, firing, target_layer, values)
                parts.append(values[..., firing] @ rows)
        if not parts:
            raise InputError(
                f"no layer of {sorted(activations)} writes to layer {target_layer} of "
                f"{self.name!r}; give activations of layer {target_layer}."
            )
        return torch.stack(parts).sum(0)

    @checked_arguments
    def skip(self, layer: WholeNumber, inputs: Vectors) -> Vectors:
        """Return W_skip @ x for each x of `inputs`, or zeros where there are no skips."""
        self._check_width(inputs, self.d_model)
        if self.skips is None:
            return torch.zeros_like(inputs)
        weight = self._of_layer(self.skips, layer).to(inputs)
        return inputs @ weight.T

    @checked_arguments
    def reconstruct(self, inputs: Mapping[int, HiddenStates]) -> dict[int, HiddenStates]:
        """Approximate the MLP outputs of all layers from what the features of all layers read.

        Raises:
            InputError: a layer is missing, or what it reads has another width.
        """
        activations, outputs = {}, {}
        # No feature writes to an earlier layer.
        expect(inputs, Mapping, "inputs by layer", "give a dictionary from layers to tensors")
        missing = set(range(self.n_layers)) - set(inputs)
        if missing:
            raise InputError(f"inputs lacks the layers {sorted(missing)}; give all layers' inputs.")
        for layer in range(self.n_layers):
            x = inputs[layer]
            activations[layer] = self.encode(layer, x)
            outputs[layer] = self.output(layer, activations, x)
        return outputs

    @checked_arguments
    def output(self, layer: WholeNumber, activations: LayerValues, inputs: Vectors) -> Vectors:
        """Approximate the MLP output of one layer.

        `inputs` are what the features of `layer` read, which the skip reads too; `activations` are
        by layer, of all features that write to `layer`.
        """
        features = self.decode(activations, layer)
        bias = self._of_layer(self.decoder_biases, layer).to(inputs)
        # sum_s W_dec_{s->layer}^T a_s + b_dec + W_skip x
        return features + bias + self.skip(layer, inputs)

    @checked_arguments
    def to(self, device: Device = None, dtype: Dtype = None) -> Transcoders:
        """Return a copy on a device and in a precision; None leaves each tensor as it is.

        Tensors mapped from a file are read whole.
        """

        def moved(parts: Any) -> list[Any]:
            return [part.to(device, dtype) for part in parts]

        return replace(
            self,
            encoders=moved(self.encoders),
            decoders=moved(self.decoders),
            decoder_biases=moved(self.decoder_biases),
            skips=self.skips and moved(self.skips),
        )

    @cached_property
    def identity(self) -> TranscodersIdentity:
        """Name, source and a fingerprint of the weights, which is the same on every device.

        Raises:
            InputError: see `check`.
        """
        self.check()
        digest = blake2b(f"{self.kind} {self.reads} {self.writes}".encode(), digest_size=16)
        for layer, encoder in enumerate(self.encoders):
            activation = encoder.activation
            has_k = isinstance(activation, TopK | BatchTopK)
            # Such as "TopK(k=32)" or "relu".
            text = repr(activation) if has_k else activation.name
            digest.update(text.encode())
            for tensor in self._layer_tensors(layer).values():
                digest.update(_fingerprint(tensor))
        for skip in self.skips or ():
            digest.update(_fingerprint(skip))
        return TranscodersIdentity(self.name, self.source, digest.hexdigest())

    def check(self) -> None:
        """Raise an `InputError` if parts do not fit together."""
        for field in ("encoders", "decoders", "decoder_biases", "skips"):
            given = getattr(self, field)
            if given is None and field == "skips":
                continue
            kind = Encoder if field == "encoders" else Tensor
            is_list = isinstance(given, Sequence) and all(isinstance(one, kind) for one in given)
            if not is_list or not len(given):
                raise InputError(
                    f"{self.name}: {field}={shown(given)}; give a list with one {kind.__name__} "
                    "for each layer."
                )
            if len(given) != self.n_layers:
                raise InputError(
                    f"{self.name}: there are {self.n_layers} encoders and {len(given)} {field}; "
                    "give one for each layer."
                )
        for part, tensor, n_axes in (
            ("encoder weight", self.encoders[0].weight, 2),
            ("decoder", self.decoders[0], 3),
        ):
            if not isinstance(tensor, Tensor) or tensor.ndim != n_axes:
                raise InputError(f"{self.name}: the {part} must be a tensor of {n_axes} axes.")
        for layer, encoder in enumerate(self.encoders):
            expect(encoder.activation, Activation, "an activation", "give ReLU() or another one")
            self._check_layer(layer)

    def _check_layer(self, layer: int) -> None:
        features, d_model = self.n_features, self.d_model
        # Features of a cross-layer transcoder write to their own and all later layers.
        n_written = self.n_layers - layer if self.cross_layer else 1
        shapes = {
            "encoder weight": (features, d_model),
            "encoder bias": (features,),
            "decoder": (features, n_written, d_model),
            "decoder bias": (d_model,),
            "threshold": (features,),
            "skip": (d_model, d_model),
        }
        tensors = self._layer_tensors(layer)
        if self.skips:
            tensors["skip"] = self.skips[layer]
        for part, tensor in tensors.items():
            shape = tuple(getattr(tensor, "shape", ()))
            if shape != shapes[part] or not tensor.is_floating_point():
                raise InputError(
                    f"{self.name}, layer {layer}: the {part} has shape {shape}; "
                    f"it must be {shapes[part]}, of floating-point numbers."
                )

    def _layer_tensors(self, layer: int) -> dict[str, Tensor]:
        """The tensors of a layer but for the skip."""
        encoder = self.encoders[layer]
        tensors = {
            "encoder weight": encoder.weight,
            "encoder bias": encoder.bias,
            "decoder": self.decoders[layer],
            "decoder bias": self.decoder_biases[layer],
        }
        if isinstance(encoder.activation, JumpReLU):
            tensors["threshold"] = encoder.activation.threshold
        return tensors


@stand_in.register(Transcoders)
def _weights_of(transcoders: Transcoders) -> str:
    return transcoders.identity.weights


def check_is_transcoders(transcoders: object) -> None:
    """Refuse what are no transcoders, such as their name."""
    remedy = "load them with circuits.load_transcoders"
    expect(transcoders, Transcoders, "transcoders", remedy)


def _fingerprint(tensor: Tensor) -> bytes:
    # Shape and float32 checksum of a tensor, or of rows spread evenly over a large one.
    shape = str(tuple(tensor.shape))
    rows = tensor[..., None].flatten(1)
    if tensor.numel() > MAX_HASHED_ELEMENTS:
        sample = torch.linspace(0, len(rows) - 1, SAMPLED_ROWS)
        rows = _rows(rows, sample.long())
    return shape.encode() + checksum(rows.float())


def _rows(matrix: Tensor, rows: Indices) -> Tensor:
    # Some rows of a matrix, which may be on another device than the row numbers.
    rows = rows.to(matrix.device)
    if len(rows) and (rows.min() < 0 or rows.max() >= len(matrix)):
        raise OutOfRangeError(
            f"there are no features {shown(rows.tolist())}: a layer has 0 to {len(matrix) - 1}."
        )
    return matrix[rows]
