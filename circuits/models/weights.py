"""The parts of a model's blocks, as a small read-only view."""

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
    Norm,
    Rotation,
    Unembedding,
    gelu_tanh,
)
from circuits.models.hooked_run import copies_per_head
from circuits.models.loading import Model


@dataclass(frozen=True)
class ModelWeights:
    """A small read-only view of a model's parts, one layer at a time."""

    model: Model

    def normalized(
        self, layer: int, residual: Float[Tensor, "*batch d_model"]
    ) -> tuple[Tensor, Tensor] | None:
        """The residual stream after the norm before attention (its weights apart), and what the norm divided by; None without norms.

        Both in float32 at least: [*batch, d_model] and [*batch, 1].
        """
        if self.model.cfg.normalization_type is None:
            return None
        return self._divided(residual, self._centres)

    def final_scale(
        self, residual: Float[Tensor, "*batch d_model"]
    ) -> Float[Tensor, "*batch 1"] | None:
        """What the last norm divides by, in float32 at least; None without one."""
        return (
            None
            if self.model.cfg.normalization_type is None
            else self._divided(residual, self._final_centres)[1]
        )

    def _divided(
        self, residual: Float[Tensor, "*batch d_model"], centres: bool
    ) -> tuple[Tensor, Tensor]:
        wide = residual.to(torch.promote_types(residual.dtype, torch.float32))
        wide = wide - wide.mean(-1, keepdim=True) if centres else wide
        scale = (wide.square().mean(-1, keepdim=True) + float(self.model.cfg.eps)).sqrt()
        return wide / scale, scale

    def projection_after_norm(self, layer: int, slot: str) -> Float[Tensor, "head d_model d_head"]:
        """W_Q, W_K or W_V with the linear part of the norm before it: its centring and its weights. Shared heads are not repeated."""
        attention, shared = self.model.blocks[layer].attn, copies_per_head(self.model, slot) > 1
        norm_weight: Tensor | None = getattr(self.model.blocks[layer].ln1, "w", None)
        weight: Tensor = getattr(attention, f"{'_' if shared else ''}W_{slot.upper()}").detach()
        if norm_weight is not None:
            weight = weight * norm_weight.detach()[:, None]
        return weight - weight.mean(1, keepdim=True) if self._centres else weight

    def linear_norm(
        self, layer: int | None, name: str, scale: Float[Tensor, "*batch 1"] | None
    ) -> LinearNorm:
        """One of the `NORMS` of a layer, or with None and "ln_final" the last one, its divisor held at `scale` and in its precision; None where it is
        absent."""
        module = self.model if layer is None else self.model.blocks[layer]
        parts = getattr(module, name, None) if scale is not None else None
        weight, bias = (
            None
            if parts is None or not hasattr(parts, kind)
            else getattr(parts, kind).detach().to(scale)
            for kind in ("w", "b")
        )
        return LinearNorm(
            scale, self._final_centres if layer is None else self._centres, weight, bias
        )

    def value_constant(self, layer: int) -> Float[Tensor, "head d_head"]:
        """What every head's values hold whatever the residual stream is: b_V, and the norm's bias through W_V."""
        attention, norm_bias = (
            self.model.blocks[layer].attn,
            getattr(self.model.blocks[layer].ln1, "b", None),
        )
        constant = attention.b_V.detach()
        return (
            constant
            if norm_bias is None
            else constant + torch.einsum("d,hde->he", norm_bias.detach(), attention.W_V.detach())
        )

    def mlp_input(
        self, layer: int, residual: Float[Tensor, "batch pos d_model"]
    ) -> Float[Tensor, "batch pos d_model"]:
        """The residual stream after the norm before the MLP."""
        return _norm(self.model.blocks[layer].ln2)(residual)

    @property
    def _final_centres(self) -> bool:
        """The last norm may be of another kind than the others."""
        return type(getattr(self.model, "ln_final", None)).__name__ in ("LayerNorm", "LayerNormPre")

    @property
    def _centres(self) -> bool:
        return self.model.cfg.normalization_type in ("LN", "LNPre")

    def output_projection(self, layer: int) -> Float[Tensor, "head d_head d_model"]:
        """W_O."""
        return self.model.blocks[layer].attn.W_O

    def output_bias(self, layer: int) -> Float[Tensor, " d_model"]:
        """b_O, which belongs to no node."""
        return self.model.blocks[layer].attn.b_O

    def attention(self, layer: int) -> Attention | None:
        """The heads of a layer as functions of tensors; None where they depend on the length of the prompt in other ways than these know."""
        cfg, block = self.model.cfg, self.model.blocks[layer]
        kind = cfg.positional_embedding_type
        if (
            kind not in ("standard", "rotary", "alibi")
            or cfg.use_logn_attn
            or cfg.use_dynamic_ntk_rope
        ):
            return None
        module = cast(Any, block.attn)
        return Attention(
            norm=_norm(block.ln1),
            weights={slot: getattr(module, f"W_{slot.upper()}") for slot in SLOTS},
            biases={slot: getattr(module, f"b_{slot.upper()}") for slot in SLOTS},
            output=module.W_O,
            scale=float(module.attn_scale),
            soft_cap=float(cfg.attn_scores_soft_cap or 0),
            clip=cfg.clip_qkv,
            norms={"q": _norm(module.q_norm), "k": _norm(module.k_norm)} if cfg.use_qk_norm else {},
            rotation=Rotation(module.rotary_cos, module.rotary_sin, cfg.rotary_adjacent_pairs)
            if kind == "rotary"
            else None,
            slopes=module.create_alibi_multipliers(cfg.n_heads, cfg.device)
            if kind == "alibi"
            else None,
            sinks=module.sinks if cfg.use_attention_sinks else None,
            causal=cfg.attention_dir == "causal",
            reach=cfg.window_size if module.attn_type == "local" else None,
        )

    def feed_forward(self, layer: int) -> FeedForward:
        """The MLP of a layer, with the norm before it, as a function of tensors."""
        block = self.model.blocks[layer]
        norm, mlp = _norm(block.ln2), cast(Any, block.mlp)
        plain = (
            type(mlp).__name__ in ("MLP", "GatedMLP")
            and not self.model.cfg.is_layer_norm_activation()
        )
        if not plain:
            return FeedForward(norm, None, None, None, None, None, None, whole=mlp)
        gate = mlp.W_gate if type(mlp).__name__ == "GatedMLP" else None
        # TransformerLens' own version of this activation takes eight passes over memory.
        activation = (
            gelu_tanh
            if self.model.cfg.act_fn in ("gelu_new", "gelu_fast", "gelu_pytorch_tanh")
            else mlp.act_fn
        )
        return FeedForward(norm, mlp.W_in, mlp.b_in, gate, mlp.W_out, mlp.b_out, activation)

    def unembedding(self) -> Unembedding:
        """The final norm and the unembedding as a function of tensors."""
        cfg, module = self.model.cfg, self.model.unembed
        norm: Norm = (lambda x: x) if cfg.normalization_type is None else _norm(self.model.ln_final)
        return Unembedding(norm, module.W_U, module.b_U, float(cfg.output_logits_soft_cap or 0))


def _norm(module: torch.nn.Module) -> Norm:
    """A norm as one fused operation where torch has it; otherwise the module itself."""
    kind, width = type(module).__name__, getattr(module, "length", None)
    weight, bias, eps = (
        getattr(module, "w", None),
        getattr(module, "b", None),
        getattr(module, "eps", 0.0),
    )
    if kind in ("LayerNorm", "LayerNormPre"):
        return lambda x: functional.layer_norm(x, (width or x.shape[-1],), weight, bias, eps)
    if kind in ("RMSNorm", "RMSNormPre"):
        return lambda x: functional.rms_norm(x, (width or x.shape[-1],), weight, eps)
    return module
