"""The weights of a HookedTransformer."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformer_lens import HookedTransformer
from transformer_lens.utilities.activation_functions import SUPPORTED_ACTIVATIONS

from circuits.models.changes import turn
from circuits.models.hooked_transformer.changes import part_of
from circuits.models.layers.functional import (
    AttentionSettings,
    FeedForward,
    Multiply,
    Norm,
    NormWeights,
    Residual,
    Rotation,
    Unembedding,
    WeightedMLP,
    gelu_tanh,
)
from circuits.models.layers.shape import ModelShape
from circuits.models.layers.weights import (
    Embedding,
    ModelVector,
    ModelWeights,
    OutputWeights,
    PositionEmbedding,
    SlotBias,
    SlotWeights,
)

LAYER_NORMS = ("LayerNorm", "LayerNormPre")
RMS_NORMS = ("RMSNorm", "RMSNormPre")
# TransformerLens' version of this activation takes eight passes over memory.
GELU_TANH = tuple(
    SUPPORTED_ACTIVATIONS[name] for name in ("gelu_new", "gelu_fast", "gelu_pytorch_tanh")
)


@dataclass(frozen=True)
class HookedTransformerWeights(ModelWeights):
    """The weights of a HookedTransformer, one layer at a time."""

    model: HookedTransformer
    shape: ModelShape

    def norm(self, layer: int | None, name: str) -> NormWeights | None:
        """Return a norm, or None if there is none."""
        if not self.shape.has_norms:
            return None
        module: Any = self.model if layer is None else self.model.blocks[layer]
        found = getattr(module, name, None)
        return None if found is None else norm_weights(found)

    def position_embedding(self) -> PositionEmbedding | None:
        """Return W_pos, if there is one."""
        if self.shape.positions != "standard":
            return None
        return part_of(self.model, "pos_embed.W_pos")

    def embedding(self) -> Embedding:
        """Return W_E."""
        return part_of(self.model, "embed.W_E")

    def written(self, rows: Residual) -> Residual:
        """Return what is written for rows of W_E."""
        if not self.model.cfg.post_embedding_ln:
            return rows
        module: Any = self.model.embed
        norm = norm_weights(module.ln)
        return norm(rows)

    def projection(self, layer: int, slot: str) -> SlotWeights:
        """Return W_Q, W_K or W_V."""
        return self._unrepeated(layer, f"W_{slot.upper()}", slot)

    def projection_bias(self, layer: int, slot: str) -> SlotBias:
        """Return b_Q, b_K or b_V."""
        return self._unrepeated(layer, f"b_{slot.upper()}", slot)

    def output_projection(self, layer: int) -> OutputWeights:
        """Return W_O."""
        return part_of(self.model, f"blocks.{layer}.attn.W_O")

    def output_bias(self, layer: int) -> ModelVector:
        """Return b_O."""
        return part_of(self.model, f"blocks.{layer}.attn.b_O")

    def attention_settings(self, layer: int) -> AttentionSettings | None:
        """Return what heads compute; None if positions enter in an unknown way."""
        cfg = self.model.cfg
        positions = cfg.positional_embedding_type
        module = cast(Any, self.model.blocks[layer].attn)
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
        qk_norms: dict[str, Norm] = {}
        if cfg.use_qk_norm:
            qk_norms = {"q": norm_weights(module.q_norm), "k": norm_weights(module.k_norm)}
        return AttentionSettings(
            scale=float(module.attn_scale),
            soft_cap=max(0.0, float(cfg.attn_scores_soft_cap or 0)),
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
        norm = norm_weights(block.ln2)
        mlp = cast(Any, block.mlp)
        kind = type(mlp).__name__
        # Any other kind, such as a mixture of experts, is left to the model's own module.
        if kind not in ("MLP", "GatedMLP") or cfg.is_layer_norm_activation():
            return partial(_mlp_by_module, self.model, norm, mlp)
        gate = mlp.W_gate if kind == "GatedMLP" else None
        activation = gelu_tanh if mlp.act_fn in GELU_TANH else mlp.act_fn
        return WeightedMLP(norm, mlp.W_in, mlp.b_in, gate, mlp.W_out, mlp.b_out, activation)

    def mlp_parameters(self, layer: int) -> Mapping[str, Tensor]:
        """Return the parameters of an MLP."""
        return dict(self.model.blocks[layer].mlp.named_parameters())

    def activation(self, layer: int) -> Callable[[Tensor], Tensor]:
        """Return the activation function of an MLP."""
        return part_of(self.model, f"blocks.{layer}.mlp.act_fn")

    def stated_activation(self, layer: int) -> Callable[[Tensor], Tensor]:
        """Return the activation function of the configuration."""
        known = SUPPORTED_ACTIVATIONS.get(str(self.model.cfg.act_fn))
        return self.activation(layer) if known is None else known

    def stated_eps(self, norm: NormWeights) -> float:
        """Return the eps of the configuration."""
        return float(self.model.cfg.eps)

    def unembedding(self) -> Unembedding:
        """Return the final norm and the unembedding as a function of tensors."""
        module = self.model.unembed
        final = getattr(self.model, "ln_final", nn.Identity())
        soft_cap = max(0.0, float(self.model.cfg.output_logits_soft_cap or 0))
        return Unembedding(norm_weights(final), module.W_U, module.b_U, soft_cap)

    def _unrepeated(self, layer: int, name: str, slot: str) -> Tensor:
        # Under this name TransformerLens keeps the weights of shared heads without repeats.
        shared = slot != "q" and self.shape.repeats > 1
        prefix = "_" if shared else ""
        return part_of(self.model, f"blocks.{layer}.attn.{prefix}{name}")


def norm_weights(module: nn.Module) -> NormWeights:
    """Return a norm of TransformerLens; another module is called as it is."""
    kind = type(module).__name__
    return NormWeights(
        module,
        centres=kind in LAYER_NORMS,
        weight=getattr(module, "w", None),
        bias=getattr(module, "b", None),
        eps=getattr(module, "eps", 0.0),
        is_plain=kind in LAYER_NORMS + RMS_NORMS,
    )


def _mlp_by_module(
    model: HookedTransformer, norm: Norm, mlp: Norm, residual: Residual, product: Multiply
) -> Residual:
    normed = norm(residual).flatten(0, -2)
    with turn(model):
        return mlp(normed[None]).view(residual.shape)
