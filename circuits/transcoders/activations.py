"""Activation functions of transcoders: which features fire at a token, and how strongly."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from circuits.system.errors import InputError
from circuits.system.fields import CheckedFields

# Pre-activations or activations of the features of one layer.
FeatureValues = Float[Tensor, "batch pos feature"]
Mask = Bool[Tensor, "batch pos"] | None


@dataclass(frozen=True)
class ReLU:
    """A feature fires where its pre-activation is positive."""

    name: ClassVar[str] = "relu"

    def __call__(self, pre: FeatureValues) -> FeatureValues:
        """Return the activations."""
        return pre.relu()


@dataclass(frozen=True, eq=False)
class JumpReLU:
    """A feature fires where its pre-activation exceeds its threshold (Rajamanoharan et al. 2024).

    The activation is the whole pre-activation, not the part above the threshold.

    Attributes:
        threshold: one for each feature.
    """

    threshold: Float[Tensor, " feature"]
    name: ClassVar[str] = "jump_relu"

    def __repr__(self) -> str:
        return "JumpReLU()"

    def __call__(self, pre: FeatureValues) -> FeatureValues:
        """Return the activations."""
        # a = z if z > threshold else 0, with z the pre-activation
        fires = pre > self.threshold.to(pre)
        return torch.where(fires, pre, 0.0)


@dataclass(frozen=True)
class _Largest(CheckedFields):
    k: int

    def __post_init__(self) -> None:
        if self.k < 1:
            raise InputError(
                f"k={self.k}: at least one feature must be allowed to fire; give a positive k."
            )


@dataclass(frozen=True)
class TopK(_Largest):
    """At each token, the `k` largest positive pre-activations fire (Gao et al. 2024)."""

    name: ClassVar[str] = "topk"

    def __call__(self, pre: FeatureValues) -> FeatureValues:
        """Return the activations."""
        return _keep_largest(pre.relu(), self.k)


@dataclass(frozen=True)
class BatchTopK(_Largest):
    """In each prompt of n tokens, the `k * n` largest positive pre-activations fire.

    In training (Bussmann et al. 2024) they are chosen among all tokens of a batch. Here they are
    chosen in each prompt, so that no prompt depends on the others. The authors convert trained
    transcoders to `JumpReLU`, which is preferable.
    """

    name: ClassVar[str] = "batch_topk"

    def __call__(self, pre: FeatureValues, mask: Mask = None) -> FeatureValues:
        """Return the activations; where the mask is False, for padding, nothing fires."""
        if mask is None or mask.all():
            # All prompts are equally long, so each is a row of pos * feature numbers.
            prompts = pre.relu().flatten(1)
            n_firing = self.k * pre.shape[1]
            return _keep_largest(prompts, n_firing).view(pre.shape)
        # Prompts differ in length and so in the number of features that may fire.
        activations = torch.zeros_like(pre)
        for prompt, real in enumerate(mask):
            values = pre[prompt, real]
            activations[prompt, real] = self(values[None])[0]
        return activations


Activation = ReLU | JumpReLU | TopK | BatchTopK


def _keep_largest(values: Float[Tensor, "*batch n"], k: int) -> Float[Tensor, "*batch n"]:
    """Set all but the `k` largest of each row to zero."""
    if k >= values.shape[-1]:
        return values
    largest, indices = values.topk(k, dim=-1)
    zeros = torch.zeros_like(values)
    return zeros.scatter_(-1, indices, largest)
