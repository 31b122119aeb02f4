"""What a transcoder's encoder does with its pre-activations: which features fire, and how strongly."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from circuits.system.errors import InputError


@dataclass(frozen=True)
class ReLU:
    """A feature fires where its pre-activation is positive."""

    name = "relu"

    def __call__(
        self, pre: Float[Tensor, "batch pos feature"]
    ) -> Float[Tensor, "batch pos feature"]:
        """The activations."""
        return pre.relu()


@dataclass(frozen=True, eq=False)
class JumpReLU:
    """A feature fires, with its whole pre-activation, where that lies strictly above its threshold (Rajamanoharan et al. 2024).

    Attributes:
        threshold: of each feature.
    """

    threshold: Float[Tensor, " feature"]
    name = "jump_relu"

    def __call__(
        self, pre: Float[Tensor, "batch pos feature"]
    ) -> Float[Tensor, "batch pos feature"]:
        """The activations."""
        return torch.where(pre > self.threshold.to(pre), pre, pre.new_zeros(()))


@dataclass(frozen=True)
class TopK:
    """At each position the `k` largest pre-activations fire, where they are positive (Gao et al. 2024)."""

    k: int
    name = "topk"

    def __post_init__(self) -> None:
        _check_k(self.k)

    def __call__(
        self, pre: Float[Tensor, "batch pos feature"]
    ) -> Float[Tensor, "batch pos feature"]:
        """The activations."""
        return _largest(pre.relu(), self.k)


@dataclass(frozen=True)
class BatchTopK:
    """Of each prompt the `k` times its positions largest pre-activations fire, where they are positive (Bussmann et al. 2024).

    In training the batch is all tokens at once; here it is one prompt, so that what fires in it does not depend on others.
    Trained sets are better converted to `JumpReLU`, which their authors do.
    """

    k: int
    name = "batch_topk"

    def __post_init__(self) -> None:
        _check_k(self.k)

    def __call__(
        self, pre: Float[Tensor, "batch pos feature"], mask: Bool[Tensor, "batch pos"] | None = None
    ) -> Float[Tensor, "batch pos feature"]:
        """The activations.

        Args:
            mask: real tokens, where prompts are padded.
        """
        if mask is None or bool(mask.all()):
            return _largest(pre.relu().flatten(1), self.k * pre.shape[1]).view(pre.shape)
        result = torch.zeros_like(pre)
        for row, real in enumerate(mask):
            result[row, real] = self(pre[row, real][None])[0]
        return result


Activation = ReLU | JumpReLU | TopK | BatchTopK


def _largest(positive: Float[Tensor, "*batch n"], k: int) -> Float[Tensor, "*batch n"]:
    """The `k` largest of each row, the others zero."""
    if k >= positive.shape[-1]:
        return positive
    values, indices = positive.topk(k, dim=-1)
    return torch.zeros_like(positive).scatter_(-1, indices, values)


def _check_k(k: int) -> None:
    if k < 1:
        raise InputError(f"k={k}: at least one feature must be allowed to fire; give a positive k.")
