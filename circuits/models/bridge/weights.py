"""The weights of a bridge, in the layout of this package."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge

from circuits.models.bridge import parts
from circuits.models.changes import turn
from circuits.models.layers.functional import (
    AttentionSettings,
    FeedForward,
    Multiply,
    Norm,
    NormWeights,
    Residual,
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

Activation = Callable[[Tensor], Tensor]
# Parts of a bridge that are no more than the linear maps of an MLP.
LINEAR_MLPS = ("MLPBridge", "BloomMLPBridge", "GatedMLPBridge", "JointGateUpMLPBridge")
# Classes of transformers that compute GELU in its tanh approximation.
GELU_TANH = ("NewGELUActivation", "FastGELUActivation", "GELUTanh", "BloomGelu")


@dataclass(frozen=True)
class BridgeWeights(ModelWeights):
    """The weights of a bridge, one layer at a time, as views of the wrapped model's."""

    model: TransformerBridge
    shape: ModelShape

    def norm(self, layer: int | None, name: str) -> NormWeights | None:
        """Return a norm, or None if there is none."""
        owner = self.model if layer is None else self._block(layer)
        found = parts.child(owner, name)
        if found is None and name == "ln2" and self.shape.parallel_attn_mlp:
            # The MLP reads what the heads read, through the same norm.
            found = parts.child(owner, "ln1")
        return None if found is None else parts.norm_weights(found)

    def embedding(self) -> Embedding:
        """Return W_E, before it is scaled or normalized."""
        return parts.original(self.model.embed).weight

    def position_embedding(self) -> PositionEmbedding | None:
        """Return W_pos, if there is one."""
        found = parts.child(self.model, "pos_embed")
        if found is None:
            return None
        module = parts.original(found)
        # OPT keeps two rows before the first position.
        return module.weight[getattr(module, "offset", 0) :]

    def embedded(self, tokens: Tensor) -> tuple[Residual, PositionEmbedding | None]:
        """Return what the token and the position embedding write."""
        table = self.embedding()
        rows = self.written(table[tokens])
        positions = self.position_embedding()
        if positions is not None:
            positions = positions[: tokens.shape[1]]
        return rows, positions

    def written(self, rows: Residual) -> Residual:
        """Return what is written for rows of W_E."""
        rows = rows * self._embedding_scale()
        component = parts.child(self.model, "embed_ln")
        if component is None:
            return rows
        norm = parts.norm_weights(component)
        return norm(rows)

    def projection(self, layer: int, slot: str) -> SlotWeights:
        """Return W_Q, W_K or W_V."""
        component = parts.child(self._attention(layer), slot)
        by_head = parts.matrix(component).unflatten(1, self._heads)
        return by_head.transpose(0, 1)

    def projection_bias(self, layer: int, slot: str) -> SlotBias:
        """Return b_Q, b_K or b_V."""
        component = parts.child(self._attention(layer), slot)
        return parts.full_bias(component).unflatten(0, self._heads)

    def output_projection(self, layer: int) -> OutputWeights:
        """Return W_O."""
        found = parts.matrix(self._attention(layer).o)
        return self._scaled(found).unflatten(0, self._heads)

    def output_bias(self, layer: int) -> ModelVector:
        """Return b_O."""
        found = parts.full_bias(self._attention(layer).o)
        return self._scaled(found)

    def attention_settings(self, layer: int) -> AttentionSettings:
        """Return what heads compute beside weights."""
        if layer not in self._settings:
            self._settings[layer] = self._read_settings(layer)
        return self._settings[layer]

    @cached_property
    def _settings(self) -> dict[int, AttentionSettings]:
        return {}

    def _read_settings(self, layer: int) -> AttentionSettings:
        attention = parts.original(self._attention(layer))
        shape, rotation = self.shape, None
        slopes = parts.slopes(self.model, shape.n_heads)
        if slopes is None:
            slopes = torch.zeros(1)
        if shape.positions == "rotary":
            rotation = parts.rotation(self.model, layer, shape.n_ctx)
        soft_cap = getattr(attention, "attn_logit_softcapping", None)
        return AttentionSettings(
            scale=_score_divisor(attention),
            soft_cap=soft_cap or 0.0,
            clip=parts.clip(self.model, layer),
            norms=self._qk_norms(layer),
            rotation=rotation,
            slopes=slopes.to(self.embedding()),
            sinks=getattr(attention, "sinks", None),
            causal=shape.causal,
            reach=window(attention, parts.config_of(self.model), layer),
        )

    def feed_forward(self, layer: int) -> FeedForward:
        """Return the MLP of a layer, with the norm before it, as a function of tensors."""
        mlp: Any = self._block(layer).mlp
        norm = self.norm(layer, "ln2") or _identity
        if type(mlp).__name__ not in LINEAR_MLPS:
            after = self.norm(layer, "ln2_post") or _identity
            return partial(_experts, norm, partial(self.experts, layer), after)
        activation = self.activation(layer)
        if type(activation).__name__ in GELU_TANH:
            activation = gelu_tanh
        linear, gate, out = (parts.child(mlp, its) for its in ("in", "gate", "out"))
        plain = WeightedMLP(
            norm,
            weight_in=parts.matrix(linear),
            bias_in=parts.full_bias(linear),
            weight_gate=None,
            weight_out=self._scaled(parts.matrix(out)),
            bias_out=self._scaled(parts.full_bias(out)),
            activation=activation,
            norm_after=self.norm(layer, "ln2_post"),
        )
        if gate is None:
            return plain
        return replace(
            plain,
            weight_gate=parts.matrix(gate),
            bias_in=torch.zeros_like(plain.bias_in),
            bias_gate=parts.bias(gate),
            bias_linear=parts.bias(linear),
        )

    def experts(self, layer: int, normed: Residual) -> Residual:
        """Compute an MLP by the wrapped model's own module, from what the norm before it gives."""
        mlp = parts.original(self._block(layer).mlp)
        with turn(self.model):
            written = mlp(normed)
        if isinstance(written, tuple):
            # The second is the choice of experts.
            written = written[0]
        return written.view(normed.shape) * self._residual_scale()

    def mlp_parameters(self, layer: int) -> Mapping[str, Tensor]:
        """Return the parameters of experts, by TransformerLens' names in a HookedTransformer."""
        found: dict[str, Tensor] = {}
        module = parts.original(self._block(layer).mlp)
        is_interleaved = type(module).__name__ == "GptOssMLP"
        for name, parameter in module.named_parameters():
            plain = name.replace("_original_component.", "")
            found |= _of_experts(plain, parameter, is_interleaved)
        return found

    def activation(self, layer: int) -> Activation:
        """Return the activation function of an MLP."""
        return parts.activation(self.model, self._block(layer).mlp)

    def unembedding(self) -> Unembedding:
        """Return the final norm and the unembedding as a function of tensors."""
        # Cohere multiplies the logits by a number, Granite divides them. MPT has a setting of
        # Cohere's name, which transformers does not read.
        factor = parts.first_of(self.model.original_model, "logit_scale")
        divisor = parts.setting(self.model, "logits_scaling")
        scale = 1.0 if factor is None else float(factor)
        return Unembedding(
            self.norm(None, "ln_final") or _identity,
            parts.matrix(self.model.unembed),
            parts.full_bias(self.model.unembed),
            soft_cap=float(parts.setting(self.model, "final_logit_softcapping") or 0),
            scale=scale / float(divisor or 1),
        )

    @property
    def _heads(self) -> tuple[int, int]:
        """The axes of heads, for one axis of all of them."""
        return -1, self.shape.d_head

    def _block(self, layer: int) -> Any:
        return self.model.blocks[layer]

    def _attention(self, layer: int) -> Any:
        return self._block(layer).attn

    def _qk_norms(self, layer: int) -> dict[str, Norm]:
        attention = self._block(layer).attn
        found: dict[str, Norm] = {}
        for slot in "qk":
            norm = parts.child(attention, f"{slot}_norm")
            if norm is not None:
                found[slot] = parts.norm_weights(norm)
        return found

    def _embedding_scale(self) -> float | Tensor:
        module = parts.original(self.model.embed)
        # Granite; Gemma 3 has the scale in the module, Gemma 1 and 2 in the model.
        scale = parts.setting(self.model, "embedding_multiplier")
        scale = parts.first_of(module, "embed_scale") if scale is None else scale
        if isinstance(scale, Tensor):
            return scale.to(module.weight)
        if scale is not None:
            return float(scale)
        if parts.setting(self.model, "model_type") in ("gemma", "gemma2"):
            root = self.shape.d_model**0.5
            return torch.tensor(root, dtype=module.weight.dtype)
        return 1.0

    def _residual_scale(self) -> float:
        """What outputs are multiplied by before they are added to the residual stream (Granite)."""
        scale = parts.setting(self.model, "residual_multiplier")
        return 1.0 if scale is None else float(scale)

    def _scaled(self, weight: Tensor) -> Tensor:
        scale = self._residual_scale()
        return weight if scale == 1 else weight * scale


def window(attention: Any, config: Any, layer: int) -> float:
    """Return to how many last positions a layer attends; infinity if to all."""
    # GPT-Neo
    kinds = getattr(config, "attention_layers", None)
    if kinds:
        return config.window_size if kinds[layer] == "local" else math.inf
    kinds = getattr(config, "layer_types", None)
    if kinds and layer < len(kinds) and "sliding" not in kinds[layer]:
        return math.inf
    owner = attention if hasattr(attention, "sliding_window") else config
    size = getattr(owner, "sliding_window", None)
    if size is None or getattr(config, "use_sliding_window", None) is False:
        return math.inf
    return float(size)


def _score_divisor(attention: Any) -> float:
    """What attention scores are divided by."""
    factor = parts.first_of(attention, "scaling", "inv_norm_factor", "softmax_scale")
    if factor is not None:
        return 1 / float(factor)
    # GPT-J and TransformerLens' own class; GPT-Neo does not divide.
    divisor = parts.first_of(attention, "scale_attn", "scale")
    return 1.0 if divisor is None else float(divisor)


def _of_experts(name: str, parameter: Tensor, is_interleaved: bool) -> dict[str, Tensor]:
    """Take apart a parameter that holds several of what TransformerLens keeps apart."""
    kind = "bias" if name.endswith("bias") else "weight"
    if name.startswith(("gate.", "router.")):
        return {f"W_gate.{kind}": parameter}
    # [expert, d_out, d_in]; in gpt-oss [expert, d_in, d_out], gate and linear map in turns.
    if is_interleaved and kind == "weight":
        parameter = parameter.mT
    if name.startswith("experts.gate_up_proj"):
        if is_interleaved:
            maps = {"W_gate": parameter[:, ::2], "W_in": parameter[:, 1::2]}
        else:
            gate, linear = parameter.chunk(2, 1)
            maps = {"W_gate": gate, "W_in": linear}
    elif name.startswith("experts.down_proj"):
        maps = {"W_out": parameter}
    else:
        return {name: parameter}
    return {
        f"experts.{expert}.{of}.{kind}": weight
        for of, weights in maps.items()
        for expert, weight in enumerate(weights)
    }


def _identity(x: Residual) -> Residual:
    return x


def _experts(norm: Norm, mlp: Norm, after: Norm, residual: Residual, product: Multiply) -> Residual:
    normed = norm(residual).flatten(0, -2)
    written = after(mlp(normed[None]))
    return written.view(residual.shape)
