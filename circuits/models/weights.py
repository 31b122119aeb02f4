"""A read-only view of a model's weights, and its layers as functions of tensors."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional
from transformer_lens.utilities.activation_functions import SUPPORTED_ACTIVATIONS

from circuits.graph.edges import SLOTS
from circuits.models.changes import part_of, turn
from circuits.models.functional import (
    Attention,
    FeedForward,
    LinearNorm,
    Multiply,
    Norm,
    Residual,
    Rotation,
    Unembedding,
    WeightedMLP,
    gelu_tanh,
)
from circuits.models.hooked_run import copies_per_head
from circuits.models.loading import Model

LAYER_NORMS = ("LayerNorm", "LayerNormPre")
RMS_NORMS = ("RMSNorm", "RMSNormPre")
# TransformerLens' version of this activation takes eight passes over memory.
GELU_TANH = tuple(
    SUPPORTED_ACTIVATIONS[name] for name in ("gelu_new", "gelu_fast", "gelu_pytorch_tanh")
)

Scale = Float[Tensor, "*batch 1"]


@dataclass(frozen=True)
class ModelWeights:
    """A model's weights, one layer at a time."""

    model: Model

    def embedding_deviation(self) -> float:
        """Return the standard deviation of all entries of the token embedding W_E."""
        embedding = part_of(self.model, "embed.W_E").detach()
        return float(embedding.float().std())

    def normalized(self, layer: int | None, residual: Residual) -> tuple[Residual, Scale] | None:
        """Normalize as before attention, or by the final norm, without the norm's weight and bias.

        Returns the normalized stream and the divisor, in float32 at least; None without norms.
        """
        if self.model.cfg.normalization_type is None:
            return None
        wide = torch.promote_types(residual.dtype, torch.float32)
        x = residual.to(wide)
        norm = self._norm_module(layer, "ln_final" if layer is None else "ln1")
        # n = (x - mean(x)) / s   with   s = sqrt(mean((x - mean(x))^2) + eps)
        if _centres(norm):
            x = x - x.mean(-1, keepdim=True)
        variance = x.square().mean(-1, keepdim=True)
        squared_scale = variance + cast(float, norm.eps)
        scale = squared_scale.sqrt()
        return x / scale, scale

    def linear_norm(self, layer: int | None, name: str, scale: Scale | None) -> LinearNorm:
        """Return a norm with a fixed divisor, in the divisor's precision.

        Args:
            name: one of `NORMS`; or "ln_final" with no layer.
            scale: the divisor; None where the model has no such norm.
        """
        if scale is None:
            return LinearNorm()
        norm = self._norm_module(layer, name)
        weight = _parameter(norm, "w", scale)
        bias = _parameter(norm, "b", scale)
        return LinearNorm(scale, _centres(norm), weight, bias)

    def projection_after_norm(self, layer: int, slot: str) -> Float[Tensor, "head d_model d_head"]:
        """Return W_Q, W_K or W_V, shared heads once, with the weights and centring of the norm."""
        block = self.model.blocks[layer]
        # Under this name TransformerLens keeps the weights of shared heads without repeats.
        shared = copies_per_head(self.model, slot) > 1
        prefix = "_" if shared else ""
        weight: Tensor = getattr(block.attn, f"{prefix}W_{slot.upper()}").detach()
        # n W = x C diag(w) W / s   with   C = 1 - 1/d_model
        norm_weight = _parameter(block.ln1, "w", weight)
        if norm_weight is not None:
            weight = weight * norm_weight[:, None]
        if _centres(block.ln1):
            weight = weight - weight.mean(1, keepdim=True)
        return weight

    def value_constant(self, layer: int) -> Float[Tensor, "head d_head"]:
        """Compute the part of every head's values that does not depend on the residual stream."""
        block = self.model.blocks[layer]
        constant = block.attn.b_V.detach()
        weight = block.attn.W_V.detach()
        norm_bias = _parameter(block.ln1, "b", constant)
        if norm_bias is None:
            return constant
        # b_V + b_norm W_V
        return constant + torch.einsum("d,hde->he", norm_bias, weight)

    def mlp_input(self, layer: int, residual: Residual) -> Residual:
        """Apply the norm before the MLP."""
        norm = _norm(self.model.blocks[layer].ln2)
        return norm(residual)

    def output_projection(self, layer: int) -> Float[Tensor, "head d_head d_model"]:
        """Return W_O."""
        return part_of(self.model, f"blocks.{layer}.attn.W_O")

    def output_bias(self, layer: int) -> Float[Tensor, " d_model"]:
        """Return b_O, which belongs to no node."""
        return part_of(self.model, f"blocks.{layer}.attn.b_O")

    def attention(self, layer: int) -> Attention | None:
        """Return the heads of a layer as functions; None if positions enter in an unknown way."""
        cfg = self.model.cfg
        block = self.model.blocks[layer]
        positions = cfg.positional_embedding_type
        module = cast(Any, block.attn)
        # Learned positions ("standard") are part of the residual stream already.
        is_known = positions in ("standard", "rotary", "alibi")
        if not is_known or cfg.use_logn_attn or cfg.use_dynamic_ntk_rope:
            return None
        rotation, slopes = None, torch.zeros(1)
        if positions == "rotary":
            rotation = Rotation(module.rotary_cos, module.rotary_sin, cfg.rotary_adjacent_pairs)
        if positions == "alibi":
            slopes = module.create_alibi_multipliers(cfg.n_heads, cfg.device)
        is_local = module.attn_type == "local"
        qk_norms = {}
        if cfg.use_qk_norm:
            qk_norms = {"q": _norm(module.q_norm), "k": _norm(module.k_norm)}
        return Attention(
            norm=_norm(block.ln1),
            weights={slot: getattr(module, f"W_{slot.upper()}") for slot in SLOTS},
            biases={slot: getattr(module, f"b_{slot.upper()}") for slot in SLOTS},
            output=module.W_O,
            scale=float(module.attn_scale),
            soft_cap=float(cfg.attn_scores_soft_cap or 0),
            clip=cfg.clip_qkv,
            norms=qk_norms,
            rotation=rotation,
            slopes=slopes.to(module.W_O),
            sinks=module.sinks if cfg.use_attention_sinks else None,
            causal=cfg.attention_dir == "causal",
            reach=cast(int, cfg.window_size) if is_local else torch.inf,
        )

    def feed_forward(self, layer: int) -> FeedForward:
        """Return the MLP of a layer, with the norm before it, as a function of tensors."""
        cfg = self.model.cfg
        block = self.model.blocks[layer]
        norm = _norm(block.ln2)
        mlp = cast(Any, block.mlp)
        kind = type(mlp).__name__
        # Any other kind, such as a mixture of experts, is left to the model's own module.
        if kind not in ("MLP", "GatedMLP") or cfg.is_layer_norm_activation():
            return partial(_mlp_by_module, self.model, norm, mlp)
        gate = mlp.W_gate if kind == "GatedMLP" else None
        activation = gelu_tanh if mlp.act_fn in GELU_TANH else mlp.act_fn
        return WeightedMLP(norm, mlp.W_in, mlp.b_in, gate, mlp.W_out, mlp.b_out, activation)

    def unembedding(self) -> Unembedding:
        """Return the final norm and the unembedding as a function of tensors."""
        module = self.model.unembed
        final = getattr(self.model, "ln_final", nn.Identity())
        norm = _norm(final)
        soft_cap = float(self.model.cfg.output_logits_soft_cap or 0)
        return Unembedding(norm, module.W_U, module.b_U, soft_cap)

    def _norm_module(self, layer: int | None, name: str) -> nn.Module:
        if layer is not None:
            name = f"blocks.{layer}.{name}"
        return self.model.get_submodule(name)


def _mlp_by_module(
    model: Model, norm: Norm, mlp: Norm, residual: Residual, product: Multiply
) -> Residual:
    normed = norm(residual).flatten(0, -2)
    with turn(model):
        return mlp(normed[None]).view(residual.shape)


def _parameter(module: nn.Module, name: str, like: Tensor) -> Tensor | None:
    parameter: Tensor | None = getattr(module, name, None)
    if parameter is None:
        return None
    return parameter.detach().to(like)


def _centres(norm: nn.Module) -> bool:
    """Whether a norm subtracts the mean."""
    return type(norm).__name__ in LAYER_NORMS


def _norm(module: nn.Module) -> Norm:
    """Return a norm as one fused operation where torch has one, and else the module itself."""
    weight = getattr(module, "w", None)
    bias = getattr(module, "b", None)
    eps: float = getattr(module, "eps", 0.0)

    def layer_norm(x: Tensor) -> Tensor:
        return functional.layer_norm(x, x.shape[-1:], weight, bias, eps)

    def rms_norm(x: Tensor) -> Tensor:
        return functional.rms_norm(x, x.shape[-1:], weight, eps)

    if _centres(module):
        return layer_norm
    return rms_norm if type(module).__name__ in RMS_NORMS else module
