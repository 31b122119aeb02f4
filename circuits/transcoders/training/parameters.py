"""What is learned when transcoders are trained: weights in units of their own, which are brought back to the model's in the end.

In these units what is read and written has mean 0 and variance 1, summed over directions. In the model's, decoder rows have length 1 (a
cross-layer feature's over all layers it writes to together), so that an activation says how much a feature writes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from circuits.transcoders.activations import JumpReLU, ReLU
from circuits.transcoders.transcoder import Encoder, Reads, Transcoders, Writes


@dataclass(frozen=True, eq=False)
class Units:
    """By layer, the mean of what is read and written and the size of its deviations."""

    means: tuple[Float[Tensor, "layer 1 d_model"], Float[Tensor, "layer 1 d_model"]]
    sizes: tuple[Float[Tensor, "layer 1 1"], Float[Tensor, "layer 1 1"]]

    @staticmethod
    def of(*recorded: Float[Tensor, "layer token d_model"]) -> Units:
        """From what is read and what is written in some text."""
        means = recorded[0].mean(1, keepdim=True), recorded[1].mean(1, keepdim=True)
        sizes = [
            (value - mean).square().sum(2, keepdim=True).mean(1, keepdim=True)
            for value, mean in zip(recorded, means, strict=True)
        ]
        return Units(means, (sizes[0].sqrt().clamp(min=1e-12), sizes[1].sqrt().clamp(min=1e-12)))

    def normalized(self, *recorded: Float[Tensor, "layer token d_model"]) -> tuple[Tensor, Tensor]:
        """The same in these units."""
        inputs, outputs = (
            (value - mean) / size
            for value, mean, size in zip(recorded, self.means, self.sizes, strict=True)
        )
        return inputs, outputs


@dataclass(frozen=True, eq=False)
class Weights:
    """Transcoders of all layers in these units."""

    encoder: Float[Tensor, "layer feature d_model"]
    encoder_bias: Float[Tensor, "layer 1 feature"]
    decoders: Sequence[Float[Tensor, "feature _ d_model"]]
    decoder_bias: Float[Tensor, "layer 1 d_model"]
    skip: Float[Tensor, "layer d_out d_in"] | None

    @staticmethod
    def first(
        layers: int,
        features: int,
        width: int,
        *,
        across: bool,
        skip: bool,
        seed: int,
        dtype: torch.dtype,
        device: torch.device | str | None,
    ) -> Weights:
        """Encoder rows of length about 1 in any direction, decoder rows shorter, the rest zero."""
        generator = torch.Generator().manual_seed(seed)

        def drawn(*shape: int, length: float) -> Tensor:
            return (
                (torch.randn(*shape, generator=generator, dtype=dtype) * length)
                .to(device)
                .requires_grad_()
            )

        def zeros(*shape: int) -> Tensor:
            return torch.zeros(*shape, dtype=dtype, device=device, requires_grad=True)

        written = [layers - layer if across else 1 for layer in range(layers)]
        return Weights(
            encoder=drawn(layers, features, width, length=width**-0.5),
            encoder_bias=zeros(layers, 1, features),
            decoders=[drawn(features, n, width, length=0.3 * (n * width) ** -0.5) for n in written],
            decoder_bias=zeros(layers, 1, width),
            skip=zeros(layers, width, width) if skip else None,
        )

    def tensors(self) -> list[Tensor]:
        """All of them, in a fixed order."""
        return [
            self.encoder,
            self.encoder_bias,
            *self.decoders,
            self.decoder_bias,
            *(() if self.skip is None else (self.skip,)),
        ]

    def lengths(self) -> Float[Tensor, "layer 1 feature"]:
        """Of decoder rows: how much a feature writes that fires with strength 1."""
        return torch.stack([decoder.flatten(1).norm(dim=1) for decoder in self.decoders])[:, None]

    def preactivations(
        self, inputs: Float[Tensor, "layer token d_model"]
    ) -> Float[Tensor, "layer token feature"]:
        """Of all features of all layers."""
        return torch.baddbmm(self.encoder_bias, inputs, self.encoder.transpose(1, 2))

    def decode(
        self, activations: Float[Tensor, "layer token feature"]
    ) -> Float[Tensor, "layer token d_model"]:
        """What features write, without bias and skip."""
        made, by_layer, across = [], activations.unbind(), self.decoders[0].shape[1] > 1
        for layer in range(len(by_layer)):
            sources = range(layer + 1) if across else (layer,)
            made.append(
                torch.stack(
                    [
                        by_layer[source] @ self.decoders[source][:, layer - source]
                        for source in sources
                    ]
                ).sum(0)
            )
        return torch.stack(made)

    def reconstruct(
        self,
        inputs: Float[Tensor, "layer token d_model"],
        activations: Float[Tensor, "layer token feature"],
    ) -> Float[Tensor, "layer token d_model"]:
        """What is made of the MLPs' outputs."""
        made = self.decode(activations) + self.decoder_bias
        return made if self.skip is None else made + inputs @ self.skip.transpose(1, 2)

    @torch.no_grad()
    def transcoders(
        self,
        units: Units,
        least: Float[Tensor, " layer"] | None,
        reads: Reads,
        writes: Writes,
        name: str,
    ) -> Transcoders:
        """The same in the model's units.

        Args:
            least: by layer, how much a feature must write to fire; None: anything.
        """
        layers = range(len(self.decoders))
        decoders = [
            decoder * units.sizes[1][layer : layer + decoder.shape[1], 0]
            for layer, decoder in enumerate(self.decoders)
        ]
        lengths = [decoder.flatten(1).norm(dim=1).clamp(min=1e-12) for decoder in decoders]
        (read_mean, written_mean), (read_size, written_size) = units.means, units.sizes
        encoders, biases, skips = [], [], []
        for layer in layers:
            length = lengths[layer]
            weight = self.encoder[layer] * (length[:, None] / read_size[layer])
            bias = self.encoder_bias[layer, 0] * length - weight @ read_mean[layer, 0]
            # What a feature writes is activation times row length, in these units as in the model's.
            own = self.lengths()[layer, 0].clamp(min=1e-12)
            encoders.append(
                Encoder(
                    weight, bias, ReLU() if least is None else JumpReLU(least[layer] * length / own)
                )
            )
            biases.append(
                written_mean[layer, 0] + self.decoder_bias[layer, 0] * written_size[layer, 0]
            )
            if self.skip is not None:
                skips.append(self.skip[layer] * written_size[layer] / read_size[layer])
                biases[layer] = biases[layer] - skips[layer] @ read_mean[layer, 0]
        rows = [
            decoder / length[:, None, None]
            for decoder, length in zip(decoders, lengths, strict=True)
        ]
        return Transcoders(encoders, rows, biases, skips or None, reads, writes, name)
