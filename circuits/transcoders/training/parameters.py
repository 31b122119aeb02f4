"""The parameters that are trained, and their conversion to `Transcoders`.

Training sees normalized vectors: in each layer, MLP inputs and outputs have mean 0 and a total
variance of 1, summed over d_model. The finished transcoders read and write vectors of the model.
Their decoder rows have length 1 (a cross-layer feature's rows all together), so that an activation
is the length of what the feature writes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from circuits.system.randomness import random_generator
from circuits.transcoders.activations import Activation, JumpReLU, ReLU
from circuits.transcoders.transcoder import Encoder, Transcoders

TranscoderKind = Literal["plt", "skip-plt", "clt"]

Vectors = Float[Tensor, "layer token d_model"]
FeatureValues = Float[Tensor, "layer token feature"]
Decoder = Float[Tensor, "feature _ d_model"]
Decoders = Sequence[Decoder]

# Lower bound of lengths that are divided by.
TINY = 1e-12


@dataclass(frozen=True, eq=False)
class Normalization:
    """Mean of each layer's vectors, and the root of their total variance."""

    mean: Float[Tensor, "layer 1 d_model"]
    scale: Float[Tensor, "layer 1 1"]

    @staticmethod
    def of(vectors: Vectors) -> Normalization:
        """Measure some vectors."""
        mean = vectors.mean(1, keepdim=True)
        squares = (vectors - mean).square()
        lengths = squares.sum(2, keepdim=True)
        scale = lengths.mean(1, keepdim=True).sqrt()
        return Normalization(mean, scale.clamp(min=TINY))

    def apply(self, vectors: Vectors) -> Vectors:
        """Normalize some vectors."""
        return (vectors - self.mean) / self.scale


@dataclass(frozen=True, eq=False)
class TranscoderParameters:
    """Transcoders of all layers, for normalized inputs and outputs.

    Attributes:
        decoders: as in `Transcoders`.
        skip: W_skip of each layer; None without.
    """

    encoder: Float[Tensor, "layer feature d_model"]
    encoder_bias: Float[Tensor, "layer 1 feature"]
    decoders: Decoders
    decoder_bias: Float[Tensor, "layer 1 d_model"]
    skip: Float[Tensor, "layer d_out d_in"] | None

    @staticmethod
    def initial(
        kind: TranscoderKind, n_features: int, inputs: Vectors, seed: int
    ) -> TranscoderParameters:
        """Draw encoder rows of length about 1, shorter decoder rows, and zeros for all else.

        The inputs give the number of layers, d_model, device and dtype.
        """
        n_layers, _, d_model = inputs.shape
        generator = random_generator(seed)

        def rows(*shape: int, length: float) -> Tensor:
            # Drawn on the CPU, so that a seed means the same on all devices.
            numbers = torch.randn(shape, generator=generator, dtype=inputs.dtype)
            return (numbers * length).to(inputs.device)

        encoder = rows(n_layers, n_features, d_model, length=d_model**-0.5)
        decoders = []
        for layer in range(n_layers):
            n_written = n_layers - layer if kind == "clt" else 1
            length = 0.3 * (n_written * d_model) ** -0.5
            decoders.append(rows(n_features, n_written, d_model, length=length))
        encoder_bias = inputs.new_zeros(n_layers, 1, n_features)
        decoder_bias = inputs.new_zeros(n_layers, 1, d_model)
        skip = inputs.new_zeros(n_layers, d_model, d_model) if kind == "skip-plt" else None
        parameters = TranscoderParameters(encoder, encoder_bias, decoders, decoder_bias, skip)
        for tensor in parameters.tensors():
            tensor.requires_grad_()
        return parameters

    def tensors(self) -> list[Tensor]:
        """Return all parameters in a fixed order."""
        tensors = [self.encoder, self.encoder_bias, *self.decoders, self.decoder_bias, self.skip]
        return [tensor for tensor in tensors if tensor is not None]

    def decoder_lengths(self) -> Float[Tensor, "layer 1 feature"]:
        """Return the length of what each feature writes at activation 1."""
        return _lengths(self.decoders)[:, None]

    def preactivations(self, inputs: Vectors) -> FeatureValues:
        """Return the pre-activations of all features."""
        return torch.baddbmm(self.encoder_bias, inputs, self.encoder.mT)

    def decode(self, activations: FeatureValues) -> Vectors:
        """Return what features write, without bias and skip."""
        by_layer = activations.unbind()
        written = []
        for target in range(len(by_layer)):
            # sum_s a_s W_dec_{s->target}
            parts = [
                by_layer[source] @ decoder[:, target - source]
                for source, decoder in enumerate(self.decoders[: target + 1])
                if target - source < decoder.shape[1]
            ]
            written.append(torch.stack(parts).sum(0))
        return torch.stack(written)

    def reconstruct(self, inputs: Vectors, activations: FeatureValues) -> Vectors:
        """Return the approximation of the MLP outputs."""
        outputs = self.decode(activations) + self.decoder_bias
        return outputs if self.skip is None else outputs + inputs @ self.skip.mT

    @torch.no_grad()
    def to_transcoders(
        self,
        inputs: Normalization,
        outputs: Normalization,
        thresholds: Float[Tensor, " layer"] | None,
    ) -> Transcoders:
        """Convert to transcoders for vectors of the model.

        Below, primes denote normalized units: x = mean_in + s_in x', y = mean_out + s_out y'.

        Args:
            inputs: normalization of the MLP inputs in training.
            outputs: normalization of the MLP outputs in training.
            thresholds: normalized length above which the features of each layer fire. None: ReLU.
        """
        # W_dec = s_out W_dec' / length, with s_out of the layers written to
        scales = outputs.scale[:, 0]
        decoders = []
        for layer, decoder in enumerate(self.decoders):
            written = slice(layer, layer + decoder.shape[1])
            decoders.append(decoder * scales[written])
        lengths = _lengths(decoders)
        by_feature = lengths[..., None]
        by_row = by_feature[..., None]
        decoders = list(map(torch.div, decoders, by_row))
        # W_enc = length W_enc' / s_in,   b_enc = length b_enc' - W_enc mean_in
        weights = self.encoder * (by_feature / inputs.scale)
        mean = inputs.mean[:, 0]
        encoder_biases = self.encoder_bias[:, 0] * lengths - _products(weights, mean)
        # b_dec = mean_out + s_out b_dec' - W_skip mean_in,   W_skip = s_out W_skip' / s_in
        biases = outputs.mean[:, 0] + self.decoder_bias[:, 0] * scales
        skips = None
        if self.skip is not None:
            skip = self.skip * outputs.scale / inputs.scale
            biases -= _products(skip, mean)
            skips = list(skip)
        activations: list[Activation] = [ReLU()] * len(decoders)
        if thresholds is not None:
            # a' writes the length a' length', and length / length' takes it to the model's units.
            in_model = thresholds[:, None] * lengths / _lengths(self.decoders)
            activations = list(map(JumpReLU, in_model))
        encoders = list(map(Encoder, weights, encoder_biases, activations))
        return Transcoders(encoders, decoders, list(biases), skips)


def _lengths(decoders: Decoders) -> Float[Tensor, "layer feature"]:
    # A cross-layer feature's rows together, for all layers it writes to.
    lengths = [decoder.flatten(1).norm(dim=1) for decoder in decoders]
    return torch.stack(lengths).clamp(min=TINY)


def _products(
    matrices: Float[Tensor, "layer n d_model"], vectors: Float[Tensor, "layer d_model"]
) -> Float[Tensor, "layer n"]:
    products = map(torch.mv, matrices, vectors)
    return torch.stack(list(products))
