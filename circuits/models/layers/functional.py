"""What one layer computes, as plain functions of tensors: attention head by head, and the MLP.

A model's own modules compute all heads of a layer from one input, at every token of a prompt. The
functions here take any selection of heads, each head with its own input, in many variants, and
only the tokens that matter. `ModelWeights` makes them from a model.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional

Norm = Callable[[Tensor], Tensor]
HeadSelection = slice | Tensor
"""A selection of heads, or of other rows of a tensor: a slice, or a tensor of indices."""

Multiply = Callable[..., Tensor]
"""A way of multiplying matrices, with the signature of `multiply`, which is the plain way."""

Residual = Float[Tensor, "*batch d_model"]
Scale = Float[Tensor, "*batch 1"]
FeedForward = Callable[[Residual, Multiply], Residual]
"""What an MLP writes when it reads the residual stream, and how to multiply."""

Projected = Float[Tensor, "head variant token d_head"]
Scores = Float[Tensor, "head variant batch query key"]
Positions = Int[Tensor, " token"]
VocabLogits = Float[Tensor, "*batch vocab"]

# On a CPU an MLP's hidden layer is computed in pieces of this many numbers, which fit the caches.
CACHED_NUMBERS = 1 << 18


def multiply(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, heads: HeadSelection | None = None
) -> Tensor:
    """Compute x @ weight + bias, with x of shape [n d_in] and weight of shape [d_in d_out].

    Args:
        heads: select these of [every_head d_in d_out], for x of shape [head n d_in]; one input may
            be shared by all heads.
    """
    if heads is not None:
        product = x @ weight[heads]
        if bias is not None:
            product += bias[heads, None]
        return product
    if bias is None:
        return x @ weight
    return torch.addmm(bias, x, weight)


def soft_capped(x: Tensor, cap: float) -> Tensor:
    """Bound scores or logits smoothly to (-cap, cap), where the cap is positive."""
    # cap * tanh(x / cap)
    if cap <= 0:
        return x
    return cap * torch.tanh(x / cap)


def gelu_tanh(x: Tensor) -> Tensor:
    """Compute GELU in its tanh approximation, the activation of GPT-2."""
    # On a CPU torch's version spends most of its time in tanh. The form below takes a third of the
    # time, and differs from it in the last bit.
    if x.device.type != "cpu":
        return functional.gelu(x, approximate="tanh")
    # x (1 + tanh u) / 2 = x sigmoid(2 u)   with   u = sqrt(2 / pi) (x + 0.044715 x^3)
    cubic = torch.addcmul(x, x * x, x, value=0.044715)
    factor = math.sqrt(8 / math.pi)
    twice_u = cubic.mul_(factor)
    return twice_u.sigmoid_().mul_(x)


@dataclass(frozen=True, eq=False)
class NormWeights:
    """A norm: y = w * (x - mean(x)) / s + b with s = sqrt(mean((x - mean(x))^2) + eps).

    Attributes:
        module: what computes it.
        centres: whether the mean is subtracted, as in LayerNorm, unlike in RMSNorm.
        weight, bias: w and b; None where the norm has none.
        is_plain: whether the equation above is all that it computes.
    """

    module: nn.Module
    centres: bool
    weight: Tensor | None
    bias: Tensor | None
    eps: float
    is_plain: bool = True

    def __call__(self, x: Residual) -> Residual:
        """Normalize, in one fused operation where torch has one."""
        if not self.is_plain:
            return self.module(x)
        size = x.shape[-1:]
        # Weights of norms may be kept in float32 where all else is smaller.
        weight, bias = _in_type_of(x, self.weight), _in_type_of(x, self.bias)
        if self.centres:
            return functional.layer_norm(x, size, weight, bias, self.eps)
        return functional.rms_norm(x, size, weight, self.eps)

    def centred(self, x: Residual) -> Residual:
        """What is divided by `scale`."""
        return x - x.mean(-1, keepdim=True) if self.centres else x

    def scale(self, centred: Residual) -> Scale:
        """The divisor s."""
        variance = centred.square().mean(-1, keepdim=True)
        squared = variance + self.eps
        return squared.sqrt()


@dataclass(frozen=True, eq=False)
class Rotation:
    """Rotary position embeddings (RoFormer, Su et al. 2021, section 3.2).

    Attributes:
        cos, sin: of the angle of each position and dimension.
        adjacent: whether a pair of dimensions is (2i, 2i + 1), as in GPT-J; otherwise it is
            (i, i + rotated / 2).
    """

    cos: Float[Tensor, "ctx rotated"]
    sin: Float[Tensor, "ctx rotated"]
    adjacent: bool

    def __call__(self, x: Projected, positions: Positions) -> Projected:
        """Rotate queries or keys by the angles of their positions."""
        cos = self.cos[positions]
        sin = self.sin[positions]
        width = cos.shape[-1]
        pairs, rest = x.tensor_split([width], -1)
        # (a, b) -> (a cos t - b sin t, b cos t + a sin t) = (a, b) cos t + (-b, a) sin t
        rotated = pairs * cos + self._quarter_turn(pairs) * sin
        return torch.cat([rotated, rest], -1)

    def _quarter_turn(self, pairs: Tensor) -> Tensor:
        # (a, b) -> (-b, a)
        if self.adjacent:
            a, b = pairs[..., ::2], pairs[..., 1::2]
            turned = torch.stack([-b, a], -1)
            return turned.flatten(-2)
        a, b = pairs.chunk(2, -1)
        return torch.cat([-b, a], -1)


@dataclass(frozen=True, eq=False, kw_only=True)
class AttentionSettings:
    """What a layer's heads compute beside their weights.

    Attributes:
        scale: divides the attention scores.
        soft_cap: bounds the attention scores; 0 for none.
        clip: bounds the entries of q, k and v.
        norms: of q and k, per head, by slot.
        slopes: of ALiBi, per head; a single 0 without it.
        sinks: per head, a score that takes a share of the attention and contributes no value.
        causal: queries attend to earlier positions only.
        reach: causal queries attend to this many last positions only.
    """

    scale: float
    soft_cap: float = 0.0
    clip: float | None = None
    norms: Mapping[str, Norm] = field(default_factory=dict)
    rotation: Rotation | None = None
    slopes: Float[Tensor, " #head"] = field(default_factory=lambda: torch.zeros(1))
    sinks: Float[Tensor, " head"] | None = None
    causal: bool = True
    reach: float = math.inf


@dataclass(frozen=True, eq=False, kw_only=True)
class Attention(AttentionSettings):
    """The heads of one layer.

        q, k, v = norm(x) W + b            per slot, then clipped, normalized and rotated
        A = softmax(q k^T / scale + bias)  bias: ALiBi, and -inf where a query may not look
        z = A v                            the head writes z W_O

    Attributes:
        norm: of the residual stream, before the projections.
        weights, biases: W and b by slot; shared key and value heads are repeated.
        output: W_O.
        norm_after: of the sum of what heads write, whose divisor and weight heads then share.
    """

    norm: Norm
    weights: Mapping[str, Float[Tensor, "head d_model d_head"]]
    biases: Mapping[str, Float[Tensor, "head d_head"]]
    output: Float[Tensor, "head d_head d_model"]
    norm_after: NormWeights | None = None

    def project(
        self,
        slot: str,
        heads: HeadSelection,
        normed: Float[Tensor, "#head variant token d_model"],
        positions: Positions,
        product: Multiply,
    ) -> Projected:
        """Compute q, k or v of some heads from their normalized input, which they may share."""
        # norm(x) W + b
        weight = self.weights[slot]
        bias = self.biases[slot]
        rows = normed.flatten(1, -2)
        flat = product(rows, weight, bias, heads)
        projected = flat.unflatten(1, normed.shape[1:-1])
        # Norm per head (Qwen 3), clipping (OLMo), rotation of queries and keys.
        if slot in self.norms:
            projected = self.norms[slot](projected)
        if self.clip is not None:
            projected = projected.clamp(-self.clip, self.clip)
        if self.rotation is not None and slot != "v":
            projected = self.rotation(projected, positions)
        return projected

    def bias(
        self,
        queries: Int[Tensor, "batch query"],
        keys: Int[Tensor, "batch key"],
        readable: Bool[Tensor, "batch key"],
    ) -> Float[Tensor, "#head batch query key"]:
        """Compute what is added to the scores, from positions; keys of padding are not readable."""
        distance = keys[:, None] - queries[..., None]
        seen = readable[:, None].expand(distance.shape)
        # A causal query sees keys at distances in (-reach, 0].
        if self.causal:
            seen = seen & (distance <= 0)
            seen = seen & (distance > -self.reach)
        # ALiBi: slope_h * (position of the key - position of the query)
        slopes = self.slopes.view(-1, 1, 1, 1)
        linear = slopes * distance.clamp(max=0)
        return linear.masked_fill(~seen, -torch.inf)

    def attend(
        self,
        heads: HeadSelection,
        queries: Float[Tensor, "head _ batch query d_head"],
        keys: Float[Tensor, "head _ batch key d_head"],
        values: Float[Tensor, "head _ batch key d_head"],
        bias: Float[Tensor, "#all_heads batch query key"],
    ) -> Float[Tensor, "head variant batch query d_head"]:
        """Compute z of some heads; any of q, k and v may have one variant for all."""
        # S = cap(q k^T / scale) + bias
        scores = _product_of_variants(queries, keys.mT)
        scaled = scores.div_(self.scale)
        scores = soft_capped(scaled, self.soft_cap)
        own_bias = bias[heads] if len(bias) > 1 else bias
        scores += own_bias[:, None]
        # A = softmax(S),  z = A v
        pattern = self._pattern(heads, scores)
        return _product_of_variants(pattern, values)

    def shared(self, written: Float[Tensor, "head *axes d_model"]) -> Tensor:
        """Share a norm after attention among all heads of the layer, of which these are outputs.

        share_h = w * out_h / s   with s = sqrt(mean(y^2) + eps) and y the sum of out_h
        """
        if self.norm_after is None:
            return written
        scale = self.norm_after.scale(written.sum(0))
        shares = written / scale
        weight = self.norm_after.weight
        return shares if weight is None else shares * weight

    def _pattern(self, heads: HeadSelection, scores: Scores) -> Scores:
        if self.sinks is None:
            return scores.softmax(-1)
        # A = softmax([S, sink]) without the column of the sink
        sinks = self.sinks[heads].to(scores)
        column = sinks.view(-1, 1, 1, 1, 1).expand_as(scores[..., :1])
        with_sink = torch.cat([scores, column], -1)
        return with_sink.softmax(-1)[..., :-1]


def _product_of_variants(
    a: Float[Tensor, "head variant_a batch rows inner"],
    b: Float[Tensor, "head variant_b batch inner columns"],
) -> Float[Tensor, "head variant batch rows columns"]:
    """Compute a @ b, where either may have one variant for all."""
    if a.shape[1] == 1 or b.shape[1] > 1:
        return a @ b
    # Broadcasting would copy b for every variant, so multiply the rows of all variants together.
    by_prompt = a.transpose(1, 2)
    rows = by_prompt.flatten(2, 3)
    flat = rows @ b[:, 0]
    product = flat.unflatten(2, by_prompt.shape[2:4])
    return product.transpose(1, 2)


def _in_type_of(x: Residual, parameter: Tensor | None) -> Tensor | None:
    return None if parameter is None else parameter.to(x)


@dataclass(frozen=True, eq=False)
class LinearNorm:
    """A norm whose divisor is held fixed, which makes it an affine map: linear(x) + bias.

        linear(x) = weight * (x - mean(x)) / scale       without the mean in an RMS norm

    Attributes:
        scale: the divisor; None where there is no norm, which makes the map the identity.
        centres: whether the mean is subtracted, as in LayerNorm.
    """

    scale: Float[Tensor, "*batch 1"] | None = None
    centres: bool = False
    weight: Float[Tensor, " d_model"] | None = None
    bias: Float[Tensor, " d_model"] | None = None

    def __getitem__(self, positions: HeadSelection) -> LinearNorm:
        """Return the norm at some positions, the second last axis of `scale`."""
        if self.scale is None:
            return self
        scale = self.scale[..., positions, :]
        return replace(self, scale=scale)

    def linear(self, x: Residual) -> Residual:
        """Apply the linear part."""
        if self.scale is None:
            return x
        # y = w * (C x) / s   where C subtracts the mean
        normed = self._centred(x) / self.scale
        return self._weighted(normed)

    def transposed(self, gradient: Residual) -> Residual:
        """Apply the transpose of `linear`, which takes a gradient from the output to the input."""
        if self.scale is None:
            return gradient
        # C is symmetric, so the transpose is C (w * g) / s.
        scaled = self._weighted(gradient) / self.scale
        return self._centred(scaled)

    def _centred(self, x: Tensor) -> Tensor:
        if not self.centres:
            return x
        return x - x.mean(-1, keepdim=True)

    def _weighted(self, x: Tensor) -> Tensor:
        return x if self.weight is None else x * self.weight


@dataclass(frozen=True, eq=False)
class WeightedMLP:
    """The MLP of one layer, with the norm before it.

    MLP(x) = act(n W_in + b_in) W_out + b_out                with n = norm(x)
    MLP(x) = (act(n W_gate) * (n W_in) + b_in) W_out + b_out  gated

    In a gated MLP both products may have biases of their own, which are added before `act` and `*`.
    """

    norm: Norm
    weight_in: Float[Tensor, "d_model d_mlp"]
    bias_in: Float[Tensor, " d_mlp"]
    weight_gate: Float[Tensor, "d_model d_mlp"] | None
    weight_out: Float[Tensor, "d_mlp d_model"]
    bias_out: Float[Tensor, " d_model"]
    activation: Callable[[Tensor], Tensor]
    bias_gate: Float[Tensor, " d_mlp"] | None = None
    bias_linear: Float[Tensor, " d_mlp"] | None = None
    norm_after: Norm | None = None

    def __call__(self, residual: Residual, product: Multiply) -> Residual:
        """Compute what the MLP writes when it reads `residual`."""
        tokens = residual.flatten(0, -2)
        size = max(1, len(tokens))
        # Another way of multiplying, such as in low precision, may need all rows together.
        if tokens.device.type == "cpu" and product is multiply:
            d_mlp = self.weight_in.shape[1]
            size = max(256, CACHED_NUMBERS // d_mlp)
        pieces = tokens.split(size)
        written = torch.cat([self._at_tokens(piece, product) for piece in pieces])
        if self.norm_after is not None:
            written = self.norm_after(written)
        return written.view(residual.shape)

    def _at_tokens(self, tokens: Residual, product: Multiply) -> Residual:
        # h W_out + b_out   with n = norm(x) and the hidden layer h
        normed = self.norm(tokens)
        if self.weight_gate is None:
            # h = act(n W_in + b_in)
            before = product(normed, self.weight_in, self.bias_in)
            hidden = self.activation(before)
        else:
            # h = act(n W_gate) * (n W_in) + b_in
            gate = self.activation(product(normed, self.weight_gate, self.bias_gate))
            linear = product(normed, self.weight_in, self.bias_linear)
            hidden = gate.mul_(linear).add_(self.bias_in)
        return product(hidden, self.weight_out, self.bias_out)


@dataclass(frozen=True, eq=False)
class Unembedding:
    """From the final residual stream to logits: cap(scale * (norm(x) W_U + b_U))."""

    norm: Norm
    weight: Float[Tensor, "d_model vocab"]
    bias: Float[Tensor, " vocab"]
    soft_cap: float
    scale: float = 1.0

    def with_scaled_weights(self) -> Unembedding:
        """Return the same function without a scale of its own."""
        if self.scale == 1:
            return self
        weight, bias = (each * self.scale for each in (self.weight, self.bias))
        return replace(self, weight=weight, bias=bias, scale=1.0)

    def at_tokens(self, tokens: Int[Tensor, " token"]) -> Unembedding:
        """Return the function that gives the logits of some tokens only."""
        columns = self.weight.detach().T[tokens]
        bias = self.bias.detach()[tokens]
        # In float64 sums hardly depend on how many rows there are: nothing changed is exactly 0.
        return replace(self, weight=columns.T.double(), bias=bias.double())

    def __call__(self, residual: Residual, product: Multiply) -> VocabLogits:
        """Compute the logits at each token."""
        # cap(scale (n W_U + b_U))   with   n = norm(x)
        normed = self.norm(residual)
        rows = normed.flatten(0, -2).to(self.weight)
        logits = product(rows, self.weight, self.bias).to(residual)
        if self.scale != 1:
            logits = logits * self.scale
        capped = soft_capped(logits, self.soft_cap)
        batch = residual.shape[:-1]
        return capped.unflatten(0, batch)
