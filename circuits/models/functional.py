"""What one layer computes, as plain functions of tensors: attention with its heads apart, and the MLP.

A model's own modules compute all heads of a layer from one input and all tokens of a prompt at once. These take any heads, each with an
input of its own, many variants of it, and only those tokens that matter. `models.Components` fills them from a model.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional

Norm = Callable[[Tensor], Tensor]
HeadSelection = slice | Tensor
"""Some rows of a tensor: a slice of them, or their numbers."""

# On a CPU an MLP's hidden layer is computed in pieces of so many numbers, which stay in its caches.
CACHED_NUMBERS = 1 << 18

Multiply = Callable[..., Tensor]
"""(x [head n d_in] or [n d_in], weight [head d_in d_out] or [d_in d_out], bias or None, heads or None) -> x @ weight + bias, of these heads."""


def multiply(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, heads: HeadSelection | None = None
) -> Tensor:
    """The plain product, in the weights' precision."""
    if heads is None:
        return x @ weight if bias is None else torch.addmm(bias, x, weight)
    product = x @ weight[heads]
    return product if bias is None else product.add_(bias[heads][:, None])


PLAIN = multiply


def gelu_tanh(x: Float[Tensor, "*batch d_mlp"]) -> Float[Tensor, "*batch d_mlp"]:
    """GELU in its tanh approximation, as GPT-2 has it: x sigmoid(2 u), u = sqrt(2 / pi) (x + 0.044715 x^3).

    On a CPU torch's own version spends most of its time in tanh; this takes a third of it, and differs in the last bit.
    """
    if x.device.type != "cpu":
        return functional.gelu(x, approximate="tanh")
    return (
        torch.addcmul(x, x * x, x, value=0.044715)
        .mul_(2 * math.sqrt(2 / math.pi))
        .sigmoid_()
        .mul_(x)
    )


@dataclass(frozen=True, eq=False)
class Rotation:
    """Rotary position embeddings.

    Attributes:
        cos, sin: by position.
        adjacent: pairs are neighbours, as in GPT-J, instead of half the rotated width apart.
    """

    cos: Float[Tensor, "ctx rotated"]
    sin: Float[Tensor, "ctx rotated"]
    adjacent: bool

    def __call__(
        self, x: Float[Tensor, "head variant token d_head"], positions: Int[Tensor, " token"]
    ) -> Float[Tensor, "head variant token d_head"]:
        """Rotate queries or keys that stand at `positions`."""
        width = self.cos.shape[-1]
        turned, rest = x[..., :width], x[..., width:]
        if self.adjacent:
            flipped = torch.stack([-turned[..., 1::2], turned[..., ::2]], dim=-1).flatten(-2)
        else:
            flipped = torch.cat([-turned[..., width // 2 :], turned[..., : width // 2]], dim=-1)
        return torch.cat(
            [turned * self.cos[positions] + flipped * self.sin[positions], rest], dim=-1
        )


@dataclass(frozen=True, eq=False)
class Attention:
    """The heads of one layer.

    Attributes:
        norm: of the residual stream, before the projections.
        weights, biases: of the projections, by slot; key-value heads that are shared are repeated.
        output: W_O.
        scale: what scores are divided by.
        soft_cap: bounds the scores where it is positive.
        clip: bounds q, k and v.
        norms: of q and k, each head's on its own.
        slopes: ALiBi's, per head.
        sinks: a score per head that takes a share of the attention and brings nothing.
        causal: tokens look at earlier ones only; with `reach`, at the last few.
    """

    norm: Norm
    weights: Mapping[str, Float[Tensor, "head d_model d_head"]]
    biases: Mapping[str, Float[Tensor, "head d_head"]]
    output: Float[Tensor, "head d_head d_model"]
    scale: float
    soft_cap: float
    clip: float | None
    norms: Mapping[str, Norm]
    rotation: Rotation | None
    slopes: Float[Tensor, " head"] | None
    sinks: Float[Tensor, " head"] | None
    causal: bool
    reach: int | None

    def project(
        self,
        slot: str,
        heads: HeadSelection,
        normed: Float[Tensor, "#head variant token d_model"],
        positions: Int[Tensor, " token"],
        multiply: Multiply = multiply,
    ) -> Float[Tensor, "head variant token d_head"]:
        """q, k or v of some heads, ready for use: normed, clipped and rotated. Heads may share one input."""
        flat = multiply(normed.flatten(1, -2), self.weights[slot], self.biases[slot], heads)
        projected = flat.view(-1, *normed.shape[1:-1], flat.shape[-1])
        if slot in self.norms:
            projected = self.norms[slot](projected)
        if self.clip is not None:
            projected = projected.clamp(-self.clip, self.clip)
        return (
            projected
            if self.rotation is None or slot == "v"
            else self.rotation(projected, positions)
        )

    def bias(
        self,
        queries: Int[Tensor, "batch query"],
        keys: Int[Tensor, "batch key"],
        readable: Bool[Tensor, "batch key"],
    ) -> Float[Tensor, "#head batch query key"]:
        """What is added to the scores: ALiBi, and minus infinity where a query may not look."""
        distance = keys[:, None, :] - queries[:, :, None]
        seen = readable[:, None, :].expand(distance.shape)
        if self.causal:
            seen = seen & (distance <= 0)
            if self.reach is not None:
                seen = seen & (distance > -self.reach)
        slopes = (
            self.output.new_zeros(1) if self.slopes is None else self.slopes.to(self.output.dtype)
        )
        return (slopes[:, None, None, None] * distance.clamp(max=0)).masked_fill(~seen, -torch.inf)

    def attend(
        self,
        heads: HeadSelection,
        queries: Float[Tensor, "head _ batch query d_head"],
        keys: Float[Tensor, "head _ batch key d_head"],
        values: Float[Tensor, "head _ batch key d_head"],
        bias: Float[Tensor, "#all_heads batch query key"],
    ) -> Float[Tensor, "head variant batch query d_head"]:
        """z of some heads. Queries, keys and values may each have one variant for all."""
        scores = _each_with_all(queries, keys.transpose(-1, -2)).div_(self.scale)
        if self.soft_cap > 0:
            scores = self.soft_cap * torch.tanh(scores / self.soft_cap)
        scores += (bias[heads] if bias.shape[0] > 1 else bias)[:, None]
        if self.sinks is not None:
            sink = (
                self.sinks[heads]
                .to(scores.dtype)[:, None, None, None, None]
                .expand(*scores.shape[:-1], 1)
            )
            pattern = torch.cat([scores, sink], dim=-1).softmax(-1)[..., :-1]
        else:
            pattern = scores.softmax(-1)
        return _each_with_all(pattern, values)


def _each_with_all(
    a: Float[Tensor, "head variant_a batch rows inner"],
    b: Float[Tensor, "head variant_b batch inner columns"],
) -> Float[Tensor, "head variant batch rows columns"]:
    """a @ b, where either may have one variant for all; what is shared is not copied."""
    if a.shape[1] > 1 and b.shape[1] == 1:
        head, variant, batch, rows, inner = a.shape
        together = a.transpose(1, 2).reshape(head, batch, variant * rows, inner) @ b[:, 0]
        return together.view(head, batch, variant, rows, -1).transpose(1, 2)
    return a @ b


@dataclass(frozen=True, eq=False)
class LinearNorm:
    """A norm whose divisor is held fixed, which makes it a linear map and a constant.

    Attributes:
        scale: what it divides by; None where there is no norm.
        centres: it subtracts the mean first, as LayerNorm does.
        weight, bias: None where there are none.
    """

    scale: Float[Tensor, "*batch 1"] | None
    centres: bool
    weight: Float[Tensor, " d_model"] | None
    bias: Float[Tensor, " d_model"] | None

    def __getitem__(self, positions: HeadSelection) -> LinearNorm:
        """The norm at some positions, the last axis of `scale` but one."""
        return self if self.scale is None else replace(self, scale=self.scale[..., positions, :])

    def linear(self, x: Float[Tensor, "*batch d_model"]) -> Float[Tensor, "*batch d_model"]:
        """The linear part: what is divided by the scale and multiplied by the weight."""
        if self.scale is None:
            return x
        return self._weighted((x - x.mean(-1, keepdim=True) if self.centres else x) / self.scale)

    def transposed(
        self, gradient: Float[Tensor, "*batch d_model"]
    ) -> Float[Tensor, "*batch d_model"]:
        """The transpose of `linear`: from a direction in its output to the same one in its input."""
        if self.scale is None:
            return gradient
        gradient = self._weighted(gradient) / self.scale
        return gradient - gradient.mean(-1, keepdim=True) if self.centres else gradient

    def _weighted(self, x: Tensor) -> Tensor:
        return x if self.weight is None else x * self.weight


@dataclass(frozen=True, eq=False)
class FeedForward:
    """The MLP of one layer, the norm before it included.

    Attributes:
        weight_gate: where the MLP is gated.
        activation: between the two products.
        whole: computes an MLP of another kind, such as a mixture of experts; then there are no weights.
    """

    norm: Norm
    weight_in: Float[Tensor, "d_model d_mlp"] | None
    bias_in: Float[Tensor, " d_mlp"] | None
    weight_gate: Float[Tensor, "d_model d_mlp"] | None
    weight_out: Float[Tensor, "d_mlp d_model"] | None
    bias_out: Float[Tensor, " d_model"] | None
    activation: Callable[[Tensor], Tensor] | None
    whole: Callable[[Tensor], Tensor] | None = None

    def __call__(
        self, residual: Float[Tensor, "*batch d_model"], multiply: Multiply = multiply
    ) -> Float[Tensor, "*batch d_model"]:
        """What the MLP writes when it reads `residual`."""
        rows = residual.reshape(-1, residual.shape[-1])
        if self.whole is not None:
            return self.whole(self.norm(rows)[None]).view(residual.shape)
        assert self.weight_in is not None
        size = max(256, CACHED_NUMBERS // self.weight_in.shape[1])
        if len(rows) <= size or rows.device.type != "cpu" or multiply is not PLAIN:
            return self._rows(rows, multiply).view(residual.shape)
        return torch.cat([self._rows(some, multiply) for some in rows.split(size)]).view(
            residual.shape
        )

    def _rows(
        self, rows: Float[Tensor, "row d_model"], multiply: Multiply
    ) -> Float[Tensor, "row d_model"]:
        assert (
            self.weight_in is not None
            and self.bias_in is not None
            and self.weight_out is not None
            and self.activation is not None
        )
        normed = self.norm(rows)
        if self.weight_gate is None:
            hidden = self.activation(multiply(normed, self.weight_in, self.bias_in))
        else:
            hidden = (
                self.activation(multiply(normed, self.weight_gate))
                .mul_(multiply(normed, self.weight_in))
                .add_(self.bias_in)
            )
        return multiply(hidden, self.weight_out, self.bias_out)


@dataclass(frozen=True, eq=False)
class Unembedding:
    """From the final residual stream to logits."""

    norm: Norm
    weight: Float[Tensor, "d_model vocab"]
    bias: Float[Tensor, " vocab"]
    soft_cap: float

    def __call__(
        self, residual: Float[Tensor, "*batch d_model"], multiply: Multiply = multiply
    ) -> Float[Tensor, "*batch vocab"]:
        """The logits at each row."""
        logits = multiply(
            self.norm(residual).reshape(-1, residual.shape[-1]), self.weight, self.bias
        )
        if self.soft_cap > 0:
            logits = self.soft_cap * torch.tanh(logits / self.soft_cap)
        return logits.view(*residual.shape[:-1], -1)
