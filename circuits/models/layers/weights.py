"""A read-only view of a model's weights, and its layers as functions of tensors."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping

import torch
from jaxtyping import Float
from torch import Tensor

from circuits.graph.edges import SLOTS
from circuits.models.layers.functional import (
    Attention,
    AttentionSettings,
    FeedForward,
    LinearNorm,
    NormWeights,
    Residual,
    Scale,
    Unembedding,
    WeightedMLP,
)
from circuits.models.layers.shape import ModelShape

SlotWeights = Float[Tensor, "kv_head d_model d_head"]
SlotBias = Float[Tensor, "kv_head d_head"]
OutputWeights = Float[Tensor, "head d_head d_model"]
ModelVector = Float[Tensor, " d_model"]
Embedding = Float[Tensor, "vocab d_model"]
PositionEmbedding = Float[Tensor, "ctx d_model"]
# Of an embedding, of which a copy in float64 can be large.
ROWS_AT_A_TIME = 1 << 14


class ModelWeights(ABC):
    """A model's weights, one layer at a time."""

    shape: ModelShape

    @abstractmethod
    def norm(self, layer: int | None, name: str) -> NormWeights | None:
        """Return one of `NORMS` of a layer, or "ln_final" with no layer; None if there is none."""

    @abstractmethod
    def position_embedding(self) -> PositionEmbedding | None:
        """Return the learned position embedding W_pos, if there is one."""

    @abstractmethod
    def embedding(self) -> Embedding:
        """Return the token embedding W_E."""

    @abstractmethod
    def projection(self, layer: int, slot: str) -> SlotWeights:
        """Return W_Q, W_K or W_V, each shared head once."""

    @abstractmethod
    def projection_bias(self, layer: int, slot: str) -> SlotBias:
        """Return b_Q, b_K or b_V, each shared head once."""

    @abstractmethod
    def output_projection(self, layer: int) -> OutputWeights:
        """Return W_O."""

    @abstractmethod
    def output_bias(self, layer: int) -> ModelVector:
        """Return b_O, which belongs to no node."""

    def stated_activation(self, layer: int) -> Callable[[Tensor], Tensor]:
        """Return the activation function that settings name, whatever a user has put there."""
        return self.activation(layer)

    def stated_eps(self, norm: NormWeights) -> float:
        """Return the eps of a norm that settings name, whatever a user has put there."""
        return norm.eps

    def head_output(self, layer: int) -> OutputWeights:
        """Return what `hook_z` is multiplied by to give what each head writes.

        That is W_O, with the weight of a norm after attention if there is one: z is divided by that
        norm's divisor at `hook_z`, so that what heads write still sums to what attention writes.
        """
        projection, norm = self.output_projection(layer), self.norm(layer, "ln1_post")
        if norm is None or norm.weight is None:
            return projection
        return projection * norm.weight

    @abstractmethod
    def attention_settings(self, layer: int) -> AttentionSettings | None:
        """Return what heads compute beside weights; None if positions enter in an unknown way."""

    @abstractmethod
    def feed_forward(self, layer: int) -> FeedForward:
        """Return the MLP of a layer, with the norm before it, as a function of tensors."""

    @abstractmethod
    def mlp_parameters(self, layer: int) -> Mapping[str, Tensor]:
        """Return the parameters of an MLP that is no `WeightedMLP`, such as of experts."""

    @property
    def has_experts(self) -> bool:
        """Whether an MLP is more than two linear maps and a gate, such as a mixture of experts."""
        if self.shape.attn_only:
            return False
        layers = map(self.feed_forward, range(self.shape.n_layers))
        return not all(isinstance(mlp, WeightedMLP) for mlp in layers)

    @abstractmethod
    def activation(self, layer: int) -> Callable[[Tensor], Tensor]:
        """Return the activation function of an MLP."""

    @abstractmethod
    def unembedding(self) -> Unembedding:
        """Return the final norm and the unembedding as a function of tensors."""

    def attention(self, layer: int) -> Attention | None:
        """Return the heads of a layer as functions; None if positions enter in an unknown way."""
        settings = self.attention_settings(layer)
        if settings is None:
            return None
        weights = {slot: self._repeated(slot, self.projection(layer, slot)) for slot in SLOTS}
        biases = {slot: self._repeated(slot, self.projection_bias(layer, slot)) for slot in SLOTS}
        return Attention(
            **vars(settings),
            norm=self.norm(layer, "ln1") or _identity,
            weights=weights,
            biases=biases,
            output=self.output_projection(layer),
            norm_after=self.norm(layer, "ln1_post"),
        )

    def written(self, rows: Residual) -> Residual:
        """Return what is written for rows of W_E, which some models scale or normalize."""
        return rows

    @torch.no_grad()
    def embedding_deviation(self) -> float:
        """Return the standard deviation of what the token embedding writes, over all tokens."""
        total, squares, table = 0.0, 0.0, self.embedding()
        for rows in table.split(ROWS_AT_A_TIME):
            numbers = self.written(rows).double()
            total += float(numbers.sum())
            squares += float(numbers.square().sum())
        mean = total / table.numel()
        return math.sqrt(max(0.0, squares / table.numel() - mean**2))

    def normalized(self, layer: int | None, residual: Residual) -> tuple[Residual, Scale] | None:
        """Normalize as before attention, or by the final norm, without the norm's weight and bias.

        Returns the normalized stream and the divisor, in float32 at least; None without norms.
        """
        norm = self.norm(layer, "ln_final" if layer is None else "ln1")
        if norm is None:
            return None
        wide = torch.promote_types(residual.dtype, torch.float32)
        x = norm.centred(residual.to(wide))
        scale = norm.scale(x)
        return x / scale, scale

    def linear_norm(self, layer: int | None, name: str, scale: Scale | None) -> LinearNorm:
        """Return a norm with a fixed divisor, in the divisor's precision.

        Args:
            name: one of `NORMS`; or "ln_final" with no layer.
            scale: the divisor; None where the model has no such norm.
        """
        if scale is None:
            return LinearNorm()
        norm = self.norm(layer, name)
        assert norm is not None
        weight = _like(norm.weight, scale)
        bias = _like(norm.bias, scale)
        return LinearNorm(scale, norm.centres, weight, bias)

    def projection_after_norm(self, layer: int, slot: str) -> Float[Tensor, "head d_model d_head"]:
        """Return W_Q, W_K or W_V, shared heads once, with the weights and centring of the norm."""
        weight = self.projection(layer, slot).detach()
        norm = self.norm(layer, "ln1")
        if norm is None:
            return weight
        # n W = x C diag(w) W / s   with   C = 1 - 1/d_model
        norm_weight = _like(norm.weight, weight)
        if norm_weight is not None:
            weight = weight * norm_weight[:, None]
        if norm.centres:
            weight = weight - weight.mean(1, keepdim=True)
        return weight

    def value_constant(self, layer: int) -> Float[Tensor, "head d_head"]:
        """Compute the part of every head's values that does not depend on the residual stream."""
        constant = self.projection_bias(layer, "v").detach()
        norm = self.norm(layer, "ln1")
        if norm is not None and norm.bias is not None:
            # b_V + b_norm W_V
            weight = self.projection(layer, "v").detach()
            bias = norm.bias.detach().to(weight)
            constant = constant + torch.einsum("d,hde->he", bias, weight)
        return self._repeated("v", constant)

    def mlp_input(self, layer: int, residual: Residual) -> Residual:
        """Apply the norm before the MLP."""
        norm = self.norm(layer, "ln2")
        return residual if norm is None else norm(residual)

    def _repeated(self, slot: str, per_head: Tensor) -> Tensor:
        """Repeat shared heads of k and v once per query head."""
        repeats = self.shape.repeats
        if slot == "q" or repeats == 1:
            return per_head
        return per_head.repeat_interleave(repeats, 0)


def _identity(x: Residual) -> Residual:
    return x


def _like(parameter: Tensor | None, like: Tensor) -> Tensor | None:
    return None if parameter is None else parameter.detach().to(like)
