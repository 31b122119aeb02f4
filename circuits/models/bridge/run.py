"""The forward pass of a bridge, written out, from weights of the wrapped model.

A bridge's own pass would not do: in it some activations are copies that nothing reads, heads share
their inputs, and some attention is computed inside Hugging Face's modules, where no hook reaches.
Here every activation passes the hooks of its name. That both give the same is checked
(`agreement`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from circuits.models.bridge.weights import BridgeWeights
from circuits.models.layers.functional import (
    AttentionSettings,
    NormWeights,
    WeightedMLP,
    soft_capped,
)
from circuits.models.layers.shape import ModelShape

Point = Callable[[str, Tensor], Tensor]
Tokens = Int[Tensor, "batch pos"]
Stream = Float[Tensor, "batch pos d_model"]
Logits = Float[Tensor, "batch pos vocab"]
Inputs = Float[Tensor, "batch pos *head d_model"]
Heads = Float[Tensor, "batch pos head d_head"]


@dataclass(frozen=True)
class Pass:
    """One forward pass.

    Attributes:
        at: applies the hooks of a name to an activation.
        is_hooked: whether an activation of this name has hooks.
    """

    weights: BridgeWeights
    at: Point
    is_hooked: Callable[[str], bool]

    @property
    def shape(self) -> ModelShape:
        """The model's."""
        return self.weights.shape

    def to_residual(self, tokens: Tokens, layers: int) -> Stream:
        """Run to the residual stream after some layers."""
        rows, positions = self.weights.embedded(tokens)
        stream = self.at("hook_embed", rows)
        if positions is not None:
            written = positions.expand_as(stream)
            stream = stream + self.at("hook_pos_embed", written)
        stream = self.at("blocks.0.hook_resid_pre", stream)
        for layer in range(layers):
            stream = self._block(layer, stream)
            if layer + 1 < self.shape.n_layers:
                stream = self.at(f"blocks.{layer + 1}.hook_resid_pre", stream)
        return stream

    def to_logits(self, stream: Stream) -> Logits:
        """Run from the final residual stream to logits."""
        unembedding = self.weights.unembedding()
        final = self.weights.norm(None, "ln_final")
        normed = self._normed("ln_final", final, stream)
        logits = normed @ unembedding.weight + unembedding.bias
        logits = self.at("unembed.hook_out", logits)
        if unembedding.scale != 1:
            logits = logits * unembedding.scale
        return soft_capped(logits, unembedding.soft_cap)

    def _block(self, layer: int, stream: Stream) -> Stream:
        # mid = x + attention(x),   out = mid + MLP(mid), or with parallel blocks MLP(x)
        name = f"blocks.{layer}"
        middle = stream + self._attention(layer, stream)
        after = middle
        if not self.shape.attn_only:
            read = stream
            if not self.shape.parallel_attn_mlp:
                read = self.at(f"{name}.hook_resid_mid", middle)
            # A view of its own, so that a gradient there is the MLP's, not the stream's.
            read = self.at(f"{name}.hook_mlp_in", read.view_as(read))
            after = middle + self._mlp(layer, read)
        return self.at(f"{name}.hook_resid_post", after)

    def _attention(self, layer: int, stream: Stream) -> Stream:
        """What a layer's attention writes."""
        name = f"blocks.{layer}"
        settings = self.weights.attention_settings(layer)
        projected = partial(self._projected, layer, settings, stream)
        q, k, v = map(projected, "qkv")
        # S = cap(q k^T / scale) + bias,  A = softmax(S),  z = A v
        products = torch.einsum("bqhe,bkhe->bhqk", q, k)
        scores = soft_capped(products / settings.scale, settings.soft_cap)
        scores = scores + _bias(settings, scores)
        scores = self.at(f"{name}.attn.hook_attn_scores", scores)
        pattern = _pattern(settings, scores).to(v.dtype)
        pattern = self.at(f"{name}.attn.hook_pattern", pattern)
        z = torch.einsum("bhqk,bkhe->bqhe", pattern, v)
        z = self.at(f"{name}.attn.o.hook_in", z)
        if self.shape.has_norms_after:
            z = self._shared(layer, z)
        z = self.at(f"{name}.attn.hook_z", z)
        # sum over heads of z_h W_O[h], and b_O
        written = _summed(z, self.weights.head_output(layer))
        written = written + self.weights.output_bias(layer)
        return self.at(f"{name}.hook_attn_out", written)

    def _shared(self, layer: int, z: Heads) -> Heads:
        """Divide z by the divisor of the norm after attention, which all heads share."""
        # s = sqrt(mean(y^2) + eps)   with   y = sum over heads of z_h W_O[h]
        norm = self.weights.norm(layer, "ln1_post")
        assert norm is not None
        summed = _summed(z, self.weights.output_projection(layer))
        name = f"blocks.{layer}.ln1_post.hook_scale"
        scale = self.at(name, norm.scale(summed))
        return z / scale[..., None]

    def _projected(
        self, layer: int, settings: AttentionSettings, stream: Stream, slot: str
    ) -> Heads:
        """The q, k or v of a layer's heads."""
        name = f"blocks.{layer}"
        inputs: Inputs = stream
        if self.is_hooked(f"{name}.hook_{slot}_input"):
            # One copy for each query head.
            copies = stream[:, :, None].expand(-1, -1, self.shape.n_heads, -1)
            inputs = self.at(f"{name}.hook_{slot}_input", copies)
        norm = self.weights.norm(layer, "ln1")
        normed = self._normed(f"{name}.ln1", norm, inputs)
        weight = self.weights.projection(layer, slot)
        bias = self.weights.projection_bias(layer, slot)
        if normed.dim() == 4:
            repeats = self.shape.n_heads // len(weight)
            repeated = weight.repeat_interleave(repeats, 0)
            found = torch.einsum("bphd,hde->bphe", normed, repeated)
            found = found + bias.repeat_interleave(repeats, 0)
        else:
            matrix = weight.transpose(0, 1).flatten(1)
            product = normed @ matrix
            found = product.unflatten(-1, bias.shape) + bias
        found = self.at(f"{name}.attn.hook_{slot}", found)
        # Norm per head, clipping and rotation, then shared heads once for each query head.
        found = _turned(settings, slot, found)
        repeats = self.shape.n_heads // found.shape[2]
        return found if repeats == 1 else found.repeat_interleave(repeats, 2)

    def _mlp(self, layer: int, read: Stream) -> Stream:
        """What a layer's MLP writes."""
        name = f"blocks.{layer}"
        mlp = self.weights.feed_forward(layer)
        before, after = (self.weights.norm(layer, its) for its in ("ln2", "ln2_post"))
        normed = self._normed(f"{name}.ln2", before, read)
        normed = self.at(f"{name}.mlp.hook_in", normed)
        if isinstance(mlp, WeightedMLP):
            written = self._weighted_mlp(layer, mlp, normed)
        else:
            written = self.weights.experts(layer, normed)
        written = self.at(f"{name}.mlp", written)
        written = self._normed(f"{name}.ln2_post", after, written)
        return self.at(f"{name}.hook_mlp_out", written)

    def _weighted_mlp(self, layer: int, mlp: WeightedMLP, normed: Stream) -> Stream:
        name = f"blocks.{layer}"
        # As it is in the model; that of `mlp` may be a faster one without gradients.
        activation = self.weights.activation(layer)
        if mlp.weight_gate is None:
            pre = _linear(normed, mlp.weight_in, mlp.bias_in)
            pre = self.at(f"{name}.mlp.hook_pre", pre)
            hidden = activation(pre)
        else:
            pre = _linear(normed, mlp.weight_gate, mlp.bias_gate)
            pre = self.at(f"{name}.mlp.hook_pre", pre)
            linear = _linear(normed, mlp.weight_in, mlp.bias_linear)
            linear = self.at(f"{name}.mlp.hook_pre_linear", linear)
            hidden = activation(pre) * linear + mlp.bias_in
        hidden = self.at(f"{name}.mlp.hook_post", hidden)
        return hidden @ mlp.weight_out + mlp.bias_out

    def _normed(self, name: str, norm: NormWeights | None, x: Tensor) -> Tensor:
        if norm is None:
            return x
        if not self.is_hooked(f"{name}.hook_scale") or not norm.is_plain:
            return norm(x)
        # y = w (x - mean(x)) / s + b
        centred = norm.centred(x)
        scale = self.at(f"{name}.hook_scale", norm.scale(centred))
        normed = centred / scale
        weighted = normed if norm.weight is None else normed * norm.weight
        return weighted if norm.bias is None else weighted + norm.bias


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    product = x @ weight
    return product if bias is None else product + bias


def _summed(z: Heads, output: Float[Tensor, "head d_head d_model"]) -> Stream:
    """The sum over heads of z_h W_O[h]."""
    return z.flatten(2) @ output.flatten(0, 1)


def _turned(settings: AttentionSettings, slot: str, found: Heads) -> Heads:
    if slot in settings.norms:
        found = settings.norms[slot](found)
    if settings.clip is not None:
        found = found.clamp(-settings.clip, settings.clip)
    if settings.rotation is not None and slot != "v":
        # Its positions are the second last axis.
        positions = torch.arange(found.shape[1], device=found.device)
        turned: Any = settings.rotation(found.transpose(1, 2), positions)
        found = turned.transpose(1, 2)
    return found


def _bias(settings: AttentionSettings, scores: Tensor) -> Tensor:
    """What positions add to the scores, [#head, query, key]."""
    n_queries, n_keys = scores.shape[-2:]
    queries = torch.arange(n_queries, device=scores.device)
    keys = torch.arange(n_keys, device=scores.device)
    distance = keys - queries[:, None]
    is_seen = (distance <= 0) & (distance > -settings.reach)
    slopes = settings.slopes.view(-1, 1, 1)
    linear = slopes * distance.clamp(max=0)
    return linear.to(scores).masked_fill(~is_seen, -torch.inf)


def _pattern(settings: AttentionSettings, scores: Tensor) -> Tensor:
    # A = softmax(S); sinks take a share of the attention and contribute no value.
    wide = scores.to(torch.promote_types(scores.dtype, torch.float32))
    if settings.sinks is None:
        return wide.softmax(-1)
    sinks = settings.sinks.to(wide).view(-1, 1, 1)
    column = sinks.expand_as(wide[..., :1])
    pattern = torch.cat([wide, column], -1).softmax(-1)
    return pattern[..., :-1]
