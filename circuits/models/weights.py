"""A read-only view of a model's weights, and its layers as functions of tensors."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional

from circuits.graph.edges import SLOTS
from circuits.models.functional import (
    Attention,
    FeedForward,
    LinearNorm,
    ModuleMLP,
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
GELU_TANH_NAMES = ("gelu_new", "gelu_fast", "gelu_pytorch_tanh")


@dataclass(frozen=True)
class ModelWeights:
    """A model's weights, one layer at a time."""

    model: Model

    def normalized(self, layer: int, residual: Residual) -> tuple[Tensor, Tensor] | None:
        """Normalize the residual stream as before attention, without the norm's weights.

        Returns:
            The normalized stream [*batch, d_model] and the divisor [*batch, 1], in float32 at
            least; None in a model without norms.
        """
        if self.model.cfg.normalization_type is None:
            return None
        return self._normalized(residual, self._centres)

    def final_scale(self, residual: Residual) -> Float[Tensor, "*batch 1"] | None:
        """Compute the divisor of the final norm, in float32 at least; None without norms."""
        if self.model.cfg.normalization_type is None:
            return None
        return self._normalized(residual, self._final_centres)[1]

    def _normalized(self, residual: Residual, centres: bool) -> tuple[Tensor, Tensor]:
        x = residual.to(torch.promote_types(residual.dtype, torch.float32))
        # n = (x - mean(x)) / s   with   s = sqrt(mean((x - mean(x))^2) + eps)
        if centres:
            x = x - x.mean(-1, keepdim=True)
        variance = x.square().mean(-1, keepdim=True)
        scale = (variance + float(self.model.cfg.eps)).sqrt()
        return x / scale, scale

    def projection_after_norm(self, layer: int, slot: str) -> Float[Tensor, "head d_model d_head"]:
        """Return W_Q, W_K or W_V with the weights and the centring of the norm before it.

        Shared key and value heads are not repeated.
        """
        block = self.model.blocks[layer]
        # Under this name TransformerLens keeps the weights of shared heads without repeats.
        prefix = "_" if copies_per_head(self.model, slot) > 1 else ""
        weight: Tensor = getattr(block.attn, f"{prefix}W_{slot.upper()}").detach()
        norm_weight = _parameter(block.ln1, "w")
        # n W = x C diag(w) W / s   with   C = 1 - 1/d_model
        if norm_weight is not None:
            weight = weight * norm_weight[:, None]
        return weight - weight.mean(1, keepdim=True) if self._centres else weight

    def linear_norm(
        self, layer: int | None, name: str, scale: Float[Tensor, "*batch 1"] | None
    ) -> LinearNorm:
        """Return a norm with a fixed divisor, in the divisor's precision.

        Args:
            layer: None for the final norm.
            name: one of `NORMS`, or "ln_final".
            scale: the divisor; None where the model has no such norm.
        """
        centres = self._final_centres if layer is None else self._centres
        if scale is None:
            return LinearNorm(None, centres, None, None)
        owner = self.model if layer is None else self.model.blocks[layer]
        norm = getattr(owner, name, None)
        weight, bias = _parameter(norm, "w", scale), _parameter(norm, "b", scale)
        return LinearNorm(scale, centres, weight, bias)

    def value_constant(self, layer: int) -> Float[Tensor, "head d_head"]:
        """Compute the part of every head's values that does not depend on the residual stream."""
        block = self.model.blocks[layer]
        constant = block.attn.b_V.detach()
        norm_bias = _parameter(block.ln1, "b")
        if norm_bias is None:
            return constant
        # b_V + b_norm W_V
        return constant + torch.einsum("d,hde->he", norm_bias, block.attn.W_V.detach())

    def mlp_input(self, layer: int, residual: Residual) -> Residual:
        """Apply the norm before the MLP."""
        return _norm(self.model.blocks[layer].ln2)(residual)

    @property
    def _final_centres(self) -> bool:
        # The final norm may be of another kind than the norms of the blocks.
        return type(getattr(self.model, "ln_final", None)).__name__ in LAYER_NORMS

    @property
    def _centres(self) -> bool:
        return self.model.cfg.normalization_type in ("LN", "LNPre")

    def output_projection(self, layer: int) -> Float[Tensor, "head d_head d_model"]:
        """Return W_O."""
        return self.model.blocks[layer].attn.W_O

    def output_bias(self, layer: int) -> Float[Tensor, " d_model"]:
        """Return b_O, which belongs to no node."""
        return self.model.blocks[layer].attn.b_O

    def attention(self, layer: int) -> Attention | None:
        """Return the heads of a layer as functions of tensors.

        None where `Attention` does not know how the positions enter.
        """
        cfg, block = self.model.cfg, self.model.blocks[layer]
        if cfg.use_logn_attn or cfg.use_dynamic_ntk_rope:
            return None
        module = cast(Any, block.attn)
        rotation, slopes = None, None
        match cfg.positional_embedding_type:
            case "standard":
                pass
            case "rotary":
                rotation = Rotation(module.rotary_cos, module.rotary_sin, cfg.rotary_adjacent_pairs)
            case "alibi":
                slopes = module.create_alibi_multipliers(cfg.n_heads, cfg.device)
            case _:
                return None
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
            slopes=slopes,
            sinks=module.sinks if cfg.use_attention_sinks else None,
            causal=cfg.attention_dir == "causal",
            reach=cfg.window_size if module.attn_type == "local" else None,
        )

    def feed_forward(self, layer: int) -> FeedForward:
        """Return the MLP of a layer, with the norm before it, as a function of tensors."""
        cfg, block = self.model.cfg, self.model.blocks[layer]
        norm, mlp = _norm(block.ln2), cast(Any, block.mlp)
        kind = type(mlp).__name__
        if kind not in ("MLP", "GatedMLP") or cfg.is_layer_norm_activation():
            return ModuleMLP(norm, mlp)
        gate = mlp.W_gate if kind == "GatedMLP" else None
        activation = gelu_tanh if cfg.act_fn in GELU_TANH_NAMES else mlp.act_fn
        return WeightedMLP(norm, mlp.W_in, mlp.b_in, gate, mlp.W_out, mlp.b_out, activation)

    def unembedding(self) -> Unembedding:
        """Return the final norm and the unembedding as a function of tensors."""
        cfg, module = self.model.cfg, self.model.unembed
        has_norm = cfg.normalization_type is not None
        norm = _norm(self.model.ln_final) if has_norm else torch.nn.Identity()
        soft_cap = float(cfg.output_logits_soft_cap or 0)
        return Unembedding(norm, module.W_U, module.b_U, soft_cap)


def _parameter(module: object, name: str, like: Tensor | None = None) -> Tensor | None:
    """Return a parameter of a module, with the dtype of `like`; None where it has none."""
    parameter: Tensor | None = getattr(module, name, None)
    if parameter is None:
        return None
    return parameter.detach() if like is None else parameter.detach().to(like)


def _norm(module: torch.nn.Module) -> Norm:
    """Return a norm as one fused operation where torch has one, and else the module itself."""
    kind = type(module).__name__
    weight, bias = getattr(module, "w", None), getattr(module, "b", None)
    eps = getattr(module, "eps", 0.0)
    if kind in LAYER_NORMS:
        return lambda x: functional.layer_norm(x, x.shape[-1:], weight, bias, eps)
    if kind in RMS_NORMS:
        return lambda x: functional.rms_norm(x, x.shape[-1:], weight, eps)
    return module
