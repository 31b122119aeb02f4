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

from circuits.transcoders.activations import JumpReLU, ReLU
from circuits.transcoders.transcoder import Encoder, Transcoders

TranscoderKind = Literal["plt", "skip-plt", "clt"]

Vectors = Float[Tensor, "layer token d_model"]
FeatureValues = Float[Tensor, "layer token feature"]
Decoder = Float[Tensor, "feature _ d_model"]
Lengths = Float[Tensor, " feature"]

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
        squares = (vectors - mean).square().sum(2, keepdim=True)
        scale = squares.mean(1, keepdim=True).sqrt()
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
    decoders: Sequence[Decoder]
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
        generator = torch.Generator().manual_seed(seed)

        def random(*shape: int, length: float) -> Tensor:
            # Drawn on the CPU, so that a seed means the same on all devices.
            numbers = torch.randn(*shape, generator=generator, dtype=inputs.dtype)
            return (numbers * length).to(inputs.device).requires_grad_()

        def zeros(*shape: int) -> Tensor:
            return inputs.new_zeros(shape, requires_grad=True)

        encoder = random(n_layers, n_features, d_model, length=d_model**-0.5)
        decoders = []
        for layer in range(n_layers):
            n_written = n_layers - layer if kind == "clt" else 1
            length = 0.3 * (n_written * d_model) ** -0.5
            decoders.append(random(n_features, n_written, d_model, length=length))
        return TranscoderParameters(
            encoder=encoder,
            encoder_bias=zeros(n_layers, 1, n_features),
            decoders=decoders,
            decoder_bias=zeros(n_layers, 1, d_model),
            skip=zeros(n_layers, d_model, d_model) if kind == "skip-plt" else None,
        )

    def tensors(self) -> list[Tensor]:
        """Return all parameters in a fixed order."""
        skip = [] if self.skip is None else [self.skip]
        return [self.encoder, self.encoder_bias, *self.decoders, self.decoder_bias, *skip]

    def decoder_lengths(self) -> Float[Tensor, "layer 1 feature"]:
        """Return the length of what each feature writes at activation 1."""
        lengths = [_lengths(decoder) for decoder in self.decoders]
        return torch.stack(lengths)[:, None]

    def preactivations(self, inputs: Vectors) -> FeatureValues:
        """Return the pre-activations of all features."""
        return torch.baddbmm(self.encoder_bias, inputs, self.encoder.transpose(1, 2))

    def decode(self, activations: FeatureValues) -> Vectors:
        """Return what features write, without bias and skip."""
        by_layer = activations.unbind()
        cross_layer = self.decoders[0].shape[1] > 1
        written = []
        for target in range(len(by_layer)):
            sources = range(target + 1) if cross_layer else (target,)
            # sum_s a_s W_dec_{s->target}
            parts = [by_layer[s] @ self.decoders[s][:, target - s] for s in sources]
            written.append(torch.stack(parts).sum(0))
        return torch.stack(written)

    def reconstruct(self, inputs: Vectors, activations: FeatureValues) -> Vectors:
        """Return the approximation of the MLP outputs."""
        outputs = self.decode(activations) + self.decoder_bias
        if self.skip is None:
            return outputs
        return outputs + inputs @ self.skip.transpose(1, 2)

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
            thresholds: for each layer, the length that a feature must write to fire, in normalized
                units. None: features are ReLU.
        """
        encoders, decoders, biases, skips = [], [], [], []
        for layer, decoder in enumerate(self.decoders):
            # W_dec = s_out W_dec' / length, with s_out of the layers written to
            layers_written = slice(layer, layer + decoder.shape[1])
            decoder = decoder * outputs.scale[layers_written, 0]
            length = _lengths(decoder)
            decoders.append(decoder / length[:, None, None])
            threshold = None if thresholds is None else thresholds[layer]
            encoders.append(self._to_encoder(layer, inputs, length, threshold))
            # b_dec = mean_out + s_out b_dec' - W_skip mean_in,   W_skip = s_out W_skip' / s_in
            scale = outputs.scale[layer, 0]
            bias = outputs.mean[layer, 0] + self.decoder_bias[layer, 0] * scale
            if self.skip is not None:
                skip = self.skip[layer] * scale / inputs.scale[layer]
                bias = bias - skip @ inputs.mean[layer, 0]
                skips.append(skip)
            biases.append(bias)
        return Transcoders(encoders, decoders, biases, skips or None)

    def _to_encoder(
        self, layer: int, inputs: Normalization, length: Lengths, threshold: Tensor | None
    ) -> Encoder:
        # W_enc = length W_enc' / s_in,   b_enc = length b_enc' - W_enc mean_in
        weight = self.encoder[layer] * (length[:, None] / inputs.scale[layer])
        bias = self.encoder_bias[layer, 0] * length
        bias = bias - weight @ inputs.mean[layer, 0]
        if threshold is None:
            return Encoder(weight, bias, ReLU())
        # An activation a' writes the length a' length', and length / length' takes it to the
        # units of the model.
        thresholds = threshold * length / _lengths(self.decoders[layer])
        return Encoder(weight, bias, JumpReLU(thresholds))


def _lengths(decoder: Decoder) -> Lengths:
    # A cross-layer feature's rows together, for all layers it writes to.
    return decoder.flatten(1).norm(dim=1).clamp(min=TINY)
