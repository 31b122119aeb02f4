"""The type of all transcoders: per layer (PLT), per layer with a skip, and cross-layer (CLT).

A feature of layer l reads what the MLP of layer l reads, fires by its activation function, and writes a row of its decoder into the output of
the MLP of its own layer; a cross-layer feature also into those of all later layers. What a layer's MLP writes is approximated by the sum of what
features write there, a bias and, where there is one, a linear skip from what the MLP reads.

References: Dunefsky, Chlenski and Nanda 2024 (transcoders); Paulo, Shabalin and Belrose 2025 (skip); Ameisen et al. 2025 (cross-layer).
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Literal, get_args

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from circuits.graph.identity import TranscodersIdentity
from circuits.models.identity import checksum
from circuits.system.errors import InputError
from circuits.transcoders.activations import Activation, BatchTopK, TopK

Reads = Literal["residual", "normalized", "mlp_input"]
"""What features read: the residual stream before the MLP's norm, after that norm without its weights, or what the MLP itself reads."""
Writes = Literal["residual", "mlp"]
"""Where they write: into the residual stream, or into what the MLP writes before a norm that follows it (the same where there is none)."""

# Tensors of more numbers than this are fingerprinted by some of their rows, so that a set of 100 GB need not be read.
READ_WHOLE, SAMPLED_ROWS = 1 << 26, 4096


@dataclass(frozen=True, eq=False)
class Encoder:
    """One layer's encoder: activation(weight @ x + bias)."""

    weight: Float[Tensor, "feature d_model"]
    bias: Float[Tensor, " feature"]
    activation: Activation


@dataclass(frozen=True, eq=False)
class Transcoders:
    """Transcoders of every layer of a model.

    Tensors may lie on any device and in any precision, or be mapped from a file: what is used of them is brought to the device and
    precision of the activations it meets.

    Attributes:
        encoders: by layer.
        decoders: by layer, what each feature writes where it fires with strength 1: into the output of its own layer and, in a cross-layer
            transcoder, of each later one.
        decoder_biases: by layer that is written to.
        skips: by layer, W_skip of out += W_skip @ x; None without.
        reads, writes: see `Reads` and `Writes`.
        name: for records.
        source: folder or address they came from, for records.
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
        """How many layers of the model they cover, from the first."""
        return len(self.encoders)

    @property
    def n_features(self) -> int:
        """Features in each layer."""
        return self.encoders[0].weight.shape[0]

    @property
    def d_model(self) -> int:
        """Width of the residual stream."""
        return self.encoders[0].weight.shape[1]

    @property
    def cross_layer(self) -> bool:
        """Whether features write to later layers too."""
        return any(decoder.shape[1] > 1 for decoder in self.decoders)

    @property
    def kind(self) -> str:
        """`CLT`, `PLT`, or either of them with a skip."""
        return f"{'CLT' if self.cross_layer else 'PLT'}{' with skip' if self.skips is not None else ''}"

    def __repr__(self) -> str:
        activation = self.encoders[0].activation.name
        return f"Transcoders({self.name!r}, {self.kind}, {self.n_layers} layers of {self.n_features:,} features, {activation})"

    def written_by(self, layer: int) -> range:
        """The layers whose MLP outputs features of `layer` write to."""
        return range(layer, layer + self.decoders[layer].shape[1])

    def preactivations(
        self, layer: int, inputs: Float[Tensor, "*batch d_model"]
    ) -> Float[Tensor, "*batch feature"]:
        """weight @ x + bias."""
        encoder = self.encoders[layer]
        return torch.nn.functional.linear(
            inputs, encoder.weight.to(inputs), encoder.bias.to(inputs)
        )

    def encode(
        self,
        layer: int,
        inputs: Float[Tensor, "batch pos d_model"],
        mask: Bool[Tensor, "batch pos"] | None = None,
    ) -> Float[Tensor, "batch pos feature"]:
        """The activations of a layer's features on what they read.

        Args:
            mask: real tokens, where prompts are padded: what fires in a prompt does not depend on its pads.
        """
        activation, pre = self.encoders[layer].activation, self.preactivations(layer, inputs)
        return activation(pre, mask) if isinstance(activation, BatchTopK) else activation(pre)

    def encoder_rows(
        self, layer: int, features: Int[Tensor, " n"], like: Tensor
    ) -> Float[Tensor, "n d_model"]:
        """What some features of a layer read along, on the device and in the precision of `like`."""
        return _rows(self.encoders[layer].weight, features).to(like)

    def decoder_rows(
        self, layer: int, features: Int[Tensor, " n"], written: int, like: Tensor
    ) -> Float[Tensor, "n d_model"]:
        """What some features of `layer` write into the output of layer `written`, likewise."""
        return _rows(self.decoders[layer][:, written - layer], features).to(like)

    def decode(
        self, activations: Mapping[int, Float[Tensor, "*batch feature"]], written: int
    ) -> Float[Tensor, "*batch d_model"]:
        """The sum of what features write into the output of layer `written`, without bias and skip.

        Args:
            activations: by layer; layers that do not write there are ignored.
        """
        writing = [layer for layer in sorted(activations) if written in self.written_by(layer)]
        parts = [self._decoded(layer, activations[layer], written) for layer in writing]
        return torch.stack(parts).sum(0) if len(parts) > 1 else parts[0]

    def _decoded(
        self, layer: int, activations: Float[Tensor, "*batch feature"], written: int
    ) -> Float[Tensor, "*batch d_model"]:
        """Rows of features that fire nowhere are not read: they may lie in a file."""
        firing = activations.flatten(0, -2).any(0).nonzero().flatten()
        return activations[..., firing] @ self.decoder_rows(layer, firing, written, activations)

    def skip(
        self, layer: int, inputs: Float[Tensor, "*batch d_model"]
    ) -> Float[Tensor, "*batch d_model"]:
        """The linear part that goes around the features; zero without one."""
        return (
            torch.zeros_like(inputs)
            if self.skips is None
            else inputs @ self.skips[layer].to(inputs).T
        )

    def reconstruct(
        self, inputs: Mapping[int, Float[Tensor, "batch pos d_model"]]
    ) -> dict[int, Float[Tensor, "batch pos d_model"]]:
        """What transcoders make of every layer's MLP output, from what the features of all layers read."""
        activations = {layer: self.encode(layer, inputs[layer]) for layer in range(self.n_layers)}
        return {
            layer: self.output(layer, activations, inputs[layer]) for layer in range(self.n_layers)
        }

    def output(
        self,
        layer: int,
        activations: Mapping[int, Float[Tensor, "*batch feature"]],
        inputs: Float[Tensor, "*batch d_model"],
    ) -> Float[Tensor, "*batch d_model"]:
        """The same for one layer, where the activations of the features that write there are known."""
        return (
            self.decode(activations, layer)
            + self.decoder_biases[layer].to(inputs)
            + self.skip(layer, inputs)
        )

    def to(
        self, device: str | torch.device | None = None, dtype: torch.dtype | None = None
    ) -> Transcoders:
        """The same, all tensors read from their files and brought to a device and precision."""

        def moved(tensor: Tensor) -> Tensor:
            return tensor.to(device=device or tensor.device, dtype=dtype or tensor.dtype)

        encoders = []
        for encoder in self.encoders:
            activation = encoder.activation
            threshold = getattr(activation, "threshold", None)
            if threshold is not None:
                activation = replace(activation, threshold=moved(threshold))  # type: ignore[arg-type]
            encoders.append(Encoder(moved(encoder.weight), moved(encoder.bias), activation))
        return replace(
            self,
            encoders=encoders,
            decoders=[moved(decoder) for decoder in self.decoders],
            decoder_biases=[moved(bias) for bias in self.decoder_biases],
            skips=None if self.skips is None else [moved(skip) for skip in self.skips],
        )

    @cached_property
    def identity(self) -> TranscodersIdentity:
        """Name, source and a fingerprint of every weight, equal on every device."""
        digest = hashlib.blake2b(f"{self.kind} {self.reads} {self.writes}".encode(), digest_size=16)
        for encoder, decoder, bias in zip(
            self.encoders, self.decoders, self.decoder_biases, strict=True
        ):
            digest.update(
                str(
                    encoder.activation
                    if isinstance(encoder.activation, TopK | BatchTopK)
                    else encoder.activation.name
                ).encode()
            )
            threshold = getattr(encoder.activation, "threshold", None)
            for tensor in (
                encoder.weight,
                encoder.bias,
                decoder,
                bias,
                *(() if threshold is None else (threshold,)),
            ):
                digest.update(_fingerprint(tensor))
        for skip in self.skips or ():
            digest.update(_fingerprint(skip))
        return TranscodersIdentity(self.name, self.source, digest.hexdigest())

    def check(self) -> None:
        """Refuse parts that do not fit together.

        Raises:
            InputError: with the layer, the part, the shape it should have and the one it has.
        """
        for part, name, known in (
            ("reads", self.reads, get_args(Reads)),
            ("writes", self.writes, get_args(Writes)),
        ):
            if name not in known:
                raise InputError(f"{self.name}: {part}={name!r} is none of {', '.join(known)}.")
        n, features, width = self.n_layers, self.n_features, self.d_model
        for part, given in (
            ("decoders", self.decoders),
            ("decoder_biases", self.decoder_biases),
            ("skips", self.skips),
        ):
            if given is not None and len(given) != n:
                raise InputError(
                    f"{self.name}: there are {n} encoders and {len(given)} {part}; give one for each layer."
                )
        for layer in range(n):
            writes = (self.decoders[layer].shape[1:2] or (0,))[0]
            expected = n - layer if self.cross_layer else 1
            shapes = {
                "encoder weight": (self.encoders[layer].weight, (features, width)),
                "encoder bias": (self.encoders[layer].bias, (features,)),
                "decoder": (self.decoders[layer], (features, expected, width)),
                "decoder bias": (self.decoder_biases[layer], (width,)),
            }
            if self.skips is not None:
                shapes["skip"] = (self.skips[layer], (width, width))
            threshold = getattr(self.encoders[layer].activation, "threshold", None)
            if threshold is not None:
                shapes["threshold"] = (threshold, (features,))
            for part, (tensor, shape) in shapes.items():
                if tuple(tensor.shape) != shape:
                    more = f" ({writes} layers written to)" if part == "decoder" else ""
                    raise InputError(
                        f"{self.name}, layer {layer}: the {part} has shape {tuple(tensor.shape)}{more}; it must be {shape}."
                    )


def _fingerprint(tensor: Tensor) -> bytes:
    """Shape and bits in float32 of a tensor, however it is stored; of one too large to be read whole, of rows spread over it."""
    rows = tensor.flatten(1) if tensor.dim() > 1 else tensor[:, None]
    if tensor.numel() > READ_WHOLE:
        rows = rows[torch.linspace(0, len(rows) - 1, SAMPLED_ROWS).long().to(rows.device)]
    return str(tuple(tensor.shape)).encode() + checksum(rows.float())


def _rows(matrix: Tensor, rows: Int[Tensor, " n"]) -> Tensor:
    """Some rows of a matrix, which may lie elsewhere or be mapped from a file."""
    return matrix[rows.to(matrix.device)]
