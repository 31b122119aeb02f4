"""The local replacement model of a prompt: everything that is not linear held at what it was, so that what is left is a linear map.

Attention patterns and the divisors of norms are frozen. Each MLP is replaced by the transcoder features that fire there and an error, so that
their sum, with the transcoder's bias and skip, is exactly what the MLP wrote. From embeddings, features and errors to the pre-activation of any
feature and to any logit leads then a linear map, the sum over all paths through residual stream and attention (Ameisen et al. 2025,
https://transformer-circuits.pub/2025/attribution-graphs/methods.html). What is in none of these nodes is a named constant.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float, Int
from torch import Tensor

from circuits.graph.nodes import PosEmbed, TokenEmbed
from circuits.models import (
    NORMS,
    Model,
    ModelWeights,
    frozen,
    mlp_output_hook,
    mlp_residual_hook,
    output_hook,
    pattern_hook,
    plain_inputs,
    run_to_residual,
    scale_hooks,
)
from circuits.models.functional import LinearNorm
from circuits.models.source_outputs import keeper
from circuits.system.errors import InputError
from circuits.transcoders.transcoder import Transcoders

POST_NORM_ONLY = ("Olmo2ForCausalLM", "Olmo3ForCausalLM")


@dataclass(frozen=True, eq=False)
class FrozenLayer:
    """One layer of one prompt, as a linear map.

    Attributes:
        mixing: how much of each key's value reaches each query, with what the norms before and after attention divide by.
        value: W_V, with the linear part of the norm before it; heads that share it have one copy.
        output: W_O, with the linear part of a norm after it.
        attention_constant: what attention writes whatever the residual stream is.
        before_mlp: the norm before the MLP.
        reading: from the residual stream to what features read: that norm, a part of it, or nothing.
        writing: from what features write to the residual stream: a norm, or nothing.
        skip: W_skip.
        feature_input: what features read.
        mlp_output: what the MLP adds to the residual stream.
    """

    mixing: Float[Tensor, "head key query"]
    value: Float[Tensor, "kv_head d_model d_head"]
    output: Float[Tensor, "head d_head d_model"]
    attention_constant: Float[Tensor, "pos d_model"]
    reading: LinearNorm
    writing: LinearNorm
    skip: Float[Tensor, "d_out d_in"] | None
    feature_input: Float[Tensor, "pos d_model"]
    mlp_output: Float[Tensor, "pos d_model"]

    def values_transposed(
        self, gradient: Float[Tensor, "pos target d_model"]
    ) -> Float[Tensor, "head pos target d_head"]:
        """From directions in the residual stream after attention to the same ones in each head's values. Later positions may be left out."""
        positions, targets, width = gradient.shape
        z = torch.matmul(gradient.view(1, -1, width), self.output.transpose(1, 2))
        mixed = torch.bmm(self.mixing[:, :positions, :positions], z.view(len(z), positions, -1))
        return mixed.view(len(z), positions, targets, -1)

    def values_transposed_from(
        self, gradient: Float[Tensor, "pos target d_model"], positions: Int[Tensor, " target"]
    ) -> Float[Tensor, "head pos target d_head"]:
        """The same where each target's direction stands at one position only."""
        vectors = gradient[positions, torch.arange(len(positions), device=positions.device)]
        z = torch.matmul(vectors[None], self.output.transpose(1, 2))
        return self.mixing[:, : len(gradient)].index_select(2, positions)[..., None] * z[:, None]

    def add_through_values(
        self,
        values: Float[Tensor, "head pos target d_head"],
        gradient: Float[Tensor, "pos target d_model"],
    ) -> None:
        """From directions in the values on to the residual stream before attention, added to `gradient`."""
        flat, shared, width = (
            gradient.view(-1, gradient.shape[-1]),
            len(self.value),
            values.shape[-1],
        )
        if len(values) != shared:
            values = values.view(shared, -1, *values.shape[1:]).sum(1)
        for head in range(shared):
            flat.addmm_(values[head].view(-1, width), self.value[head].T)

    def values(
        self, residual: Float[Tensor, "pos source d_model"]
    ) -> Float[Tensor, "head pos source d_head"]:
        """Every head's values for changes of the residual stream, without its constants."""
        found = torch.einsum("ksd,hde->hkse", residual, self.value)
        return found.repeat_interleave(len(self.mixing) // len(found), 0)

    def attention(
        self, values: Float[Tensor, "head pos source d_head"]
    ) -> Float[Tensor, "pos source d_model"]:
        """What frozen attention makes of values."""
        return torch.einsum("hkq,hkse,hed->qsd", self.mixing, values, self.output)

    def skipped(
        self, residual: Float[Tensor, "pos source d_model"]
    ) -> Float[Tensor, "pos source d_model"]:
        """What the skip adds for changes of the residual stream that it reads."""
        assert self.skip is not None
        return _by_position(self.writing).linear(
            _by_position(self.reading).linear(residual) @ self.skip.T
        )

    def skip_transposed(
        self, gradient: Float[Tensor, "some target d_model"], positions: slice = slice(None)
    ) -> Float[Tensor, "some target d_model"]:
        """From directions in the MLP's output at some positions to the same ones in the residual stream that the skip reads."""
        assert self.skip is not None
        reading, writing = (_by_position(norm[positions]) for norm in (self.reading, self.writing))
        return reading.transposed(writing.transposed(gradient) @ self.skip)


@dataclass(frozen=True, eq=False)
class LocalModel:
    """One prompt's linear map, and the parts it does not hold.

    Attributes:
        tokens: of the prompt.
        layers: from the first.
        final: the last norm.
        embedding: what the token embedding writes.
        position_embedding: what a learned position embedding writes; None without one.
        residual: after the last layer.
        unembedding, unembedding_bias: from the last norm's output to logits.
        mean_unembedding: the mean of the unembedding over the vocabulary.
        soft_cap: bounds the logits where it is positive.
        parallel: the MLP reads what attention reads, not what it writes.
        causal: no position reads later ones.
    """

    tokens: Int[Tensor, " pos"]
    layers: Sequence[FrozenLayer]
    final: LinearNorm
    embedding: Float[Tensor, "pos d_model"]
    position_embedding: Float[Tensor, "pos d_model"] | None
    residual: Float[Tensor, "pos d_model"]
    unembedding: Float[Tensor, "d_model vocab"]
    unembedding_bias: Float[Tensor, " vocab"]
    mean_unembedding: Float[Tensor, " d_model"]
    soft_cap: float
    parallel: bool
    causal: bool

    def logits(self, position: int = -1) -> Float[Tensor, " vocab"]:
        """What the model says at a position."""
        here = slice(position % len(self.tokens), position % len(self.tokens) + 1)
        normed = self.final[here].linear(self.residual[here]) + (
            0.0 if self.final.bias is None else self.final.bias
        )
        logits = (normed.to(self.unembedding) @ self.unembedding)[0].to(
            self.residual
        ) + self.unembedding_bias
        return self.soft_cap * torch.tanh(logits / self.soft_cap) if self.soft_cap > 0 else logits


def check_transcoders(model: Model, transcoders: Transcoders) -> None:
    """Refuse models without the parts that are replaced or frozen here, and transcoders of another shape.

    Raises:
        InputError: with what does not fit.
    """
    if not isinstance(model, Model):
        raise InputError(
            f"expected a HookedTransformer, got {type(model).__name__}; load it with circuits.load_model."
        )
    cfg = model.cfg
    reasons = {
        "no MLPs": cfg.attn_only,
        "values that are clipped, which no linear map describes": cfg.clip_qkv is not None,
        f"norms only after attention and MLP ({cfg.original_architecture})": cfg.original_architecture
        in POST_NORM_ONLY,
        "shortformer positions": cfg.positional_embedding_type == "shortformer",
        f"layers spread over {cfg.n_devices} devices": cfg.n_devices > 1,
    }
    if found := [reason for reason, holds in reasons.items() if holds]:
        raise InputError(
            f"{cfg.model_name} has {' and '.join(found)}: no attribution graph can be made of it."
        )
    if not isinstance(transcoders, Transcoders):
        raise InputError(
            f"expected transcoders, got {transcoders!r}; load them with circuits.load_transcoders."
        )
    transcoders.check()
    if (transcoders.n_layers, transcoders.d_model) != (cfg.n_layers, cfg.d_model):
        raise InputError(
            f"the transcoders {transcoders.name!r} are for {transcoders.n_layers} layers of width {transcoders.d_model}, and "
            f"{cfg.model_name} has {cfg.n_layers} of width {cfg.d_model}; load those that were trained on this model."
        )


@torch.no_grad()
def freeze(
    model: Model, transcoders: Transcoders, prompts: Sequence[Int[Tensor, " _"]]
) -> list[LocalModel]:
    """The local replacement models of some prompts, from one run of them all.

    Raises:
        InputError: the transcoders do not fit the model, or a prompt is empty, too long, or gives values that are not finite.
    """
    check_transcoders(model, transcoders)
    tokens, mask = padded(model, prompts)
    recorded: dict[str, Tensor] = {}
    names = [*_recorded_hooks(model), *scale_hooks(model).values()]
    with frozen(model), plain_inputs(model):
        residual = run_to_residual(
            model, tokens, mask, [(name, keeper(recorded, name)) for name in names]
        )
    if not torch.isfinite(residual[mask]).all():
        raise InputError(
            "a prompt gives values that are not finite; load the model in float32, or check its weights."
        )
    weights = [_Weights.of(model, transcoders, layer) for layer in range(model.cfg.n_layers)]
    mean = ModelWeights(model).unembedding().weight.detach().mean(1, dtype=wide(model))
    models = []
    for row, length in enumerate(mask.sum(1).tolist()):
        seen = {name: value[row] for name, value in recorded.items()}
        models.append(
            _local_model(
                model,
                transcoders,
                weights,
                mean,
                _Seen(seen, residual[row], tokens[row], length, wide(model)),
            )
        )
    return models


def wide(model: Model) -> torch.dtype:
    """What everything here is computed in: float32, whatever rounding the model's own run has, or float64 where the model is."""
    return torch.promote_types(model.cfg.dtype, torch.float32)


def padded(
    model: Model, prompts: Sequence[Int[Tensor, " _"]]
) -> tuple[Int[Tensor, "batch pos"], Tensor]:
    """Prompts of different lengths as one tensor on the model's device, and where they are real.

    Raises:
        InputError: a prompt is empty or longer than the model's context, or holds a token the model does not have.
    """
    if not prompts:
        raise InputError("there are no prompts; give at least one.")
    for prompt in prompts:
        if not 1 <= len(prompt) <= model.cfg.n_ctx:
            what = "is empty" if not len(prompt) else f"has {len(prompt)} tokens"
            raise InputError(
                f"a prompt {what}; {model.cfg.model_name} takes from 1 to {model.cfg.n_ctx} tokens."
            )
        if not 0 <= int(prompt.min()) <= int(prompt.max()) < model.cfg.d_vocab:
            raise InputError(
                f"a prompt holds a token outside 0 to {model.cfg.d_vocab - 1}; tokenize it with this model's tokenizer."
            )
    tokens = torch.nn.utils.rnn.pad_sequence(
        [prompt.long().cpu() for prompt in prompts], batch_first=True
    )
    mask = (
        torch.arange(tokens.shape[1]) < torch.tensor([len(prompt) for prompt in prompts])[:, None]
    )
    return tokens.to(model.cfg.device), mask.to(model.cfg.device)


def _recorded_hooks(model: Model) -> list[str]:
    names = [output_hook(TokenEmbed())]
    if model.cfg.positional_embedding_type == "standard":
        names.append(output_hook(PosEmbed()))
    for layer in range(model.cfg.n_layers):
        names += [
            pattern_hook(layer),
            mlp_residual_hook(model, layer),
            mlp_output_hook(model, layer),
        ]
    return names


@dataclass(frozen=True, eq=False)
class _Seen:
    """What the run of one prompt has left; pads are cut off."""

    recorded: Mapping[str, Tensor]
    residual: Float[Tensor, "padded d_model"]
    tokens: Int[Tensor, " padded"]
    length: int
    dtype: torch.dtype

    def __getitem__(self, name: str) -> Tensor:
        return self.recorded[name][: self.length].to(self.dtype)

    def pattern(self, layer: int) -> Float[Tensor, "head query key"]:
        return self.recorded[pattern_hook(layer)][:, : self.length, : self.length].to(self.dtype)


@dataclass(frozen=True, eq=False)
class _Weights:
    """What all prompts share of a layer's attention and skip."""

    value: Float[Tensor, "kv_head d_model d_head"]
    value_constant: Float[Tensor, "head d_head"]
    output: Float[Tensor, "head d_head d_model"]
    output_after_norm: Float[Tensor, "head d_head d_model"]
    output_bias: Float[Tensor, " d_model"]
    skip: Float[Tensor, "d_out d_in"] | None

    @staticmethod
    def of(model: Model, transcoders: Transcoders, layer: int) -> _Weights:
        parts, like = (
            ModelWeights(model),
            torch.zeros((), dtype=wide(model), device=model.cfg.device),
        )
        output = parts.output_projection(layer).detach().to(like)
        after = parts.linear_norm(
            layer,
            "ln1_post",
            like.new_ones(1, 1) if (layer, "ln1_post") in scale_hooks(model) else None,
        )
        return _Weights(
            value=parts.projection_after_norm(layer, "v").to(like),
            value_constant=parts.value_constant(layer).to(like),
            output=output,
            output_after_norm=after.linear(output),
            output_bias=parts.output_bias(layer).detach().to(like),
            skip=None if transcoders.skips is None else transcoders.skips[layer].to(like),
        )


def _local_model(
    model: Model,
    transcoders: Transcoders,
    weights: Sequence[_Weights],
    mean: Float[Tensor, " d_model"],
    seen: _Seen,
) -> LocalModel:
    parts, residual, positions = (
        ModelWeights(model),
        seen.residual[: seen.length].to(seen.dtype),
        output_hook(PosEmbed()),
    )
    unembedding = parts.unembedding()
    return LocalModel(
        tokens=seen.tokens[: seen.length],
        layers=[
            _frozen_layer(model, transcoders, weights[layer], layer, seen)
            for layer in range(model.cfg.n_layers)
        ],
        final=parts.linear_norm(None, "ln_final", parts.final_scale(residual)),
        embedding=seen[output_hook(TokenEmbed())],
        position_embedding=seen[positions] if positions in seen.recorded else None,
        residual=residual,
        unembedding=unembedding.weight.detach(),
        unembedding_bias=unembedding.bias.detach().to(seen.dtype),
        mean_unembedding=mean,
        soft_cap=unembedding.soft_cap,
        parallel=model.cfg.parallel_attn_mlp,
        causal=model.cfg.attention_dir == "causal",
    )


def _frozen_layer(
    model: Model, transcoders: Transcoders, weights: _Weights, layer: int, seen: _Seen
) -> FrozenLayer:
    parts, scales = ModelWeights(model), scale_hooks(model)
    norms = {
        name: parts.linear_norm(
            layer, name, seen[scales[layer, name]] if (layer, name) in scales else None
        )
        for name in NORMS
    }
    pattern, before, after = seen.pattern(layer), norms["ln1"], norms["ln1_post"]
    # What attention writes where the residual stream is zero: the constants of its values, W_O, b_O, and a norm after it.
    written = (
        torch.einsum("hqk,he,hed->qd", pattern, weights.value_constant, weights.output)
        + weights.output_bias
    )
    mixing = pattern.transpose(1, 2)
    if after.scale is not None:
        written = after.linear(written) + (0.0 if after.bias is None else after.bias)
        mixing = mixing / after.scale[:, 0]
    if before.scale is not None:
        mixing = mixing / before.scale
    reading, feature_input = read_by_features(
        transcoders, norms["ln2"], seen[mlp_residual_hook(model, layer)]
    )
    return FrozenLayer(
        mixing=mixing.contiguous(),
        value=weights.value,
        output=weights.output_after_norm,
        attention_constant=written,
        reading=reading,
        writing=norms["ln2_post"]
        if transcoders.writes == "mlp"
        else replace(norms["ln2_post"], scale=None),
        skip=weights.skip,
        feature_input=feature_input,
        mlp_output=seen[mlp_output_hook(model, layer)],
    )


def read_by_features(
    transcoders: Transcoders, norm: LinearNorm, residual: Float[Tensor, "*batch d_model"]
) -> tuple[LinearNorm, Float[Tensor, "*batch d_model"]]:
    """From the residual stream to what features read, as a linear map, and what they read."""
    match transcoders.reads:
        case "residual":
            return replace(norm, scale=None, bias=None), residual
        case "normalized":
            bare = replace(norm, weight=None, bias=None)
            return bare, bare.linear(residual)
    return norm, norm.linear(residual) + (0.0 if norm.bias is None else norm.bias)


def _by_position(norm: LinearNorm) -> LinearNorm:
    """The norm, for tensors whose axis of targets stands between position and width."""
    return norm if norm.scale is None else replace(norm, scale=norm.scale[:, None])
