"""The local replacement model of a prompt: the model with every nonlinearity held at its value.

Attention patterns and the denominators of norms are frozen. The output of each MLP is split into

    mlp_l = sum of active features (activation x decoder row) + error_l + bias_l + skip_l(x),

where the error is what the transcoder leaves unexplained, so the sum is exact. The map from token
embeddings, features and errors to the pre-activation of any feature and to any logit is then
linear: a sum over all paths through the residual stream and frozen attention. Everything that
belongs to none of these nodes is a named constant.

Source: Ameisen et al. 2025, Circuit tracing,
https://transformer-circuits.pub/2025/attribution-graphs/methods.html
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import compress
from typing import NamedTuple

import torch
from einops import rearrange, reduce
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from circuits.attribution.tensor_table import row_numbers
from circuits.graph.nodes import PosEmbed, TokenEmbed
from circuits.models import (
    NORMS,
    Model,
    cause,
    changes,
    check_model,
    check_unchanged,
    frozen,
    mlp_output_hook,
    mlp_residual_hook,
    named,
    only_hooked,
    output_hook,
    pattern_hook,
    plain_inputs,
    received,
    run_to_logits,
    run_to_residual,
    scale_hooks,
    shape_of,
    told,
    weights_of,
)
from circuits.models.changes import Changes
from circuits.models.layers.functional import LinearNorm, Unembedding, soft_capped
from circuits.models.source_outputs import keepers
from circuits.models.tolerance import TOLERANCE, logit_gap, relative_gap
from circuits.system.errors import InputError, NotFiniteError
from circuits.transcoders.transcoder import Transcoders, check_is_transcoders

FINAL_RESIDUAL = "residual stream after the last layer"
TOKEN_EMBEDDING = output_hook(TokenEmbed())
POSITION_EMBEDDING = output_hook(PosEmbed())
EVERYWHERE = slice(None)

Activations = dict[str, Tensor]
Prompt = Int[Tensor, " _"]
TokenBatch = Int[Tensor, "batch pos"]
TokenMask = Bool[Tensor, "batch pos"]
HeadOutput = Float[Tensor, "head d_head d_model"]
Pattern = Float[Tensor, "head query key"]
ModelVector = Float[Tensor, " d_model"]
ModelVectors = Float[Tensor, "*batch d_model"]
Residual = Float[Tensor, "pos d_model"]
# What each source adds to the residual stream, and to the values of each head.
SourceResidual = Float[Tensor, "pos source d_model"]
SourceValues = Float[Tensor, "head pos source d_head"]
TargetNumbers = Int[Tensor, " target"]
# The gradient of each target with respect to the residual stream, and to the values.
Gradient = Float[Tensor, "pos target d_model"]
ValueGradient = Float[Tensor, "head pos target d_head"]


@dataclass(frozen=True, eq=False)
class FrozenLayer:
    """One layer of the local replacement model, as a linear map.

    Attributes:
        mixing: the attention pattern A_h[query, key], divided by the scales of the norms before
            attention (at the key) and after it (at the query).
        value: W_V with the linear part of the norm before it; one copy for heads that share it.
        output: W_O with the linear part of the norm after it.
        attention_constant: what attention writes when the residual stream is zero.
        reading: the map from the residual stream to the input of the features.
        writing: the map from the output of the features to the residual stream.
        skip: W_skip of the transcoder; None without one.
        feature_input: the input of the features.
        mlp_output: what the MLP adds to the residual stream.
    """

    mixing: Float[Tensor, "head key query"]
    value: Float[Tensor, "kv_head d_model d_head"]
    output: HeadOutput
    attention_constant: Residual
    reading: LinearNorm
    writing: LinearNorm
    skip: Float[Tensor, "d_out d_in"] | None
    feature_input: Residual
    mlp_output: Residual

    def values(self, residual: SourceResidual) -> SourceValues:
        """Compute every head's values from what sources add to the residual stream."""
        # V_h = LN(residual) W_V[h]; heads that share W_V get copies.
        values = torch.einsum("ksd,hde->hkse", residual, self.value)
        copies = len(self.mixing) // len(values)
        return values.repeat_interleave(copies, 0)

    def attention_output(self, values: SourceValues) -> SourceResidual:
        """Compute what attention writes."""
        # LN(sum_h A_h V_h W_O[h])
        return torch.einsum("hkq,hkse,hed->qsd", self.mixing, values, self.output)

    def skip_output(self, residual: SourceResidual) -> SourceResidual:
        """Compute what the skip writes when it reads `residual`."""
        assert self.skip is not None
        # LN_write(W_skip LN_read(residual))
        read = _per_position(self.reading).linear(residual)
        written = read @ self.skip.T
        return _per_position(self.writing).linear(written)

    def value_gradient(
        self, gradient: Gradient, position: TargetNumbers | None = None
    ) -> ValueGradient:
        """Map gradients after attention to gradients at the values of each head.

        Args:
            gradient: may end before the prompt does if it is zero at all later positions.
            position: the one position of each target where `gradient` is not zero, if that is so.
        """
        n_positions, n_targets, _ = gradient.shape
        mixing = self.mixing[:, :n_positions, :n_positions]
        # dV_h = A_h^T (G W_O[h]^T)
        if position is not None:
            vector = gradient[position, row_numbers(position)]
            projected = vector @ self.output.mT
            # Only the target's own position, a column of A_h^T, contributes to the product.
            column = mixing.index_select(2, position)
            return column[..., None] * projected[:, None]
        vectors = gradient.flatten(0, 1)
        projected = vectors[None] @ self.output.mT
        projected = rearrange(projected, "head (pos t) d -> head pos (t d)", t=n_targets)
        return rearrange(mixing @ projected, "head pos (t d) -> head pos t d", t=n_targets)

    def add_attention_gradient(self, values: ValueGradient, gradient: Gradient) -> None:
        """Add to `gradient` what reaches the residual stream through the values."""
        d_model = gradient.shape[-1]
        flat = gradient.view(-1, d_model)
        if len(values) != len(self.value):
            values = reduce(values, "(kv copy) ... -> kv ...", "sum", kv=len(self.value))
        # G += LN^T(sum_h dV_h W_V[h]^T); LN^T is part of `value` and `mixing`.
        heads = zip(self.value, values, strict=True)
        for weight, head_gradient in heads:
            flat.addmm_(head_gradient.flatten(0, 1), weight.T)

    def skip_gradient(self, gradient: Gradient, positions: slice = EVERYWHERE) -> Gradient | None:
        """Map gradients at the MLP output, at `positions`, to what the skip reads, if any."""
        if self.skip is None:
            return None
        reading = _per_position(self.reading, positions)
        writing = _per_position(self.writing, positions)
        # LN_read^T W_skip^T LN_write^T G
        written = writing.transposed(gradient)
        return reading.transposed(written @ self.skip)


@dataclass(frozen=True, eq=False)
class LocalModel:
    """The local replacement model of one prompt.

    Attributes:
        tokens: the token ids of the prompt.
        layers: the frozen layers, from the first.
        final: the last norm.
        embedding: the token embeddings.
        position_embedding: the learned position embeddings; None without them.
        residual: the residual stream after the last layer.
        unembedding, unembedding_bias: the map from the output of the last norm to logits.
        mean_unembedding: the mean of the unembedding over the vocabulary.
        soft_cap: the bound on the logits; 0 without one.
        parallel: whether the MLP reads the residual stream before attention, not after it.
        causal: whether attention is causal.
    """

    tokens: Int[Tensor, " pos"]
    layers: Sequence[FrozenLayer]
    final: LinearNorm
    embedding: Residual
    position_embedding: Residual | None
    residual: Residual
    unembedding: Float[Tensor, "d_model vocab"]
    unembedding_bias: Float[Tensor, " vocab"]
    mean_unembedding: ModelVector
    soft_cap: float
    parallel: bool
    causal: bool

    def replayed(self) -> Iterator[Residual]:
        """Yield what the layers compute: the residual stream that each MLP reads, and the last."""
        # r = embedding;  then by layer  r += LN(sum_h A_h V_h(r) W_O[h]) + constant + MLP output
        residual = self.embedding
        if self.position_embedding is not None:
            residual = residual + self.position_embedding
        for layer in self.layers:
            values = layer.values(residual[:, None])
            attention = layer.attention_output(values)[:, 0]
            written = residual + (attention + layer.attention_constant)
            yield residual if self.parallel else written
            residual = written + layer.mlp_output
        yield residual

    def logits(self, position: int | slice = -1) -> Float[Tensor, "*pos vocab"]:
        """Return the model's logits at a position, or at several."""
        # logits = LN_final(residual) W_U + b_U
        normed = apply_norm(self.final, self.residual)[position]
        products = normed.to(self.unembedding) @ self.unembedding
        logits = products.to(normed) + self.unembedding_bias
        return soft_capped(logits, self.soft_cap)


def check_transcoders(model: Model, transcoders: Transcoders) -> None:
    """Check that an attribution graph can be made of this model with these transcoders.

    Raises:
        InputError: the model has been changed, or has a part that cannot be frozen or replaced; or
            the transcoders have other layers or another width.
    """
    check_unchanged(model)
    _check_fit(model, transcoders)


def _check_fit(model: Model, transcoders: Transcoders) -> None:
    cfg = shape_of(model)
    found = _cannot_be_frozen(model)
    if found:
        raise InputError(
            f"{cfg.model_name} has {' and '.join(found)}: no attribution graph can be made of it."
        )
    check_is_transcoders(transcoders)
    transcoders.check()
    n_layers, d_model = transcoders.n_layers, transcoders.d_model
    if n_layers != cfg.n_layers or d_model != cfg.d_model:
        raise InputError(
            f"the transcoders {transcoders.name!r} are for {n_layers} layers of width {d_model}, "
            f"and {cfg.model_name} has {cfg.n_layers} of width {cfg.d_model}; "
            "load transcoders that were trained on this model."
        )


def _cannot_be_frozen(model: Model) -> list[str]:
    shape = shape_of(model)
    reasons = {
        "no MLPs": shape.attn_only,
        "clipped values, which are not linear": shape.clips,
        "norms only after attention and MLP": shape.has_norms and not shape.has_norms_before,
        "shortformer positions": shape.positions == "shortformer",
        f"layers spread over {shape.n_devices} devices": shape.n_devices > 1,
    }
    return list(compress(reasons, reasons.values()))


@torch.no_grad()
def freeze(model: Model, transcoders: Transcoders, prompts: Sequence[Prompt]) -> list[LocalModel]:
    """Make the local replacement models of some prompts from one forward pass.

    Raises:
        InputError: see `check_transcoders` and `pad_prompts`; or activations are not finite. Of
            changes of the model, those are refused that its weights do not show on these prompts.
    """
    check_model(model)
    if not only_hooked(changes(model)):
        check_unchanged(model)
    _check_fit(model, transcoders)
    # In one turn: weights are read as well, in part through attributes that other runs change.
    with frozen(model):
        return _freeze(model, transcoders, prompts)


def _freeze(model: Model, transcoders: Transcoders, prompts: Sequence[Prompt]) -> list[LocalModel]:
    tokens, mask = pad_prompts(model, prompts)
    recorded = _record(model, tokens, mask)
    dtype = compute_dtype(model)
    runs = [_unpadded(recorded, row, len(prompt), dtype) for row, prompt in enumerate(prompts)]
    # Layer by layer, because prompts share the converted weights of a layer.
    by_layer = []
    for layer in range(shape_of(model).n_layers):
        weights = _layer_weights(model, transcoders, layer)
        frozen_layers = [_frozen_layer(model, transcoders, layer, weights, run) for run in runs]
        by_layer.append(frozen_layers)
    unembedding = weights_of(model).unembedding().with_scaled_weights()
    mean_unembedding = unembedding.weight.mean(1, dtype=dtype)
    by_prompt = zip(prompts, runs, *by_layer, strict=True)
    local_models = [
        _local_model(model, prompt, layers, unembedding, mean_unembedding, run)
        for prompt, run, *layers in by_prompt
    ]
    if found := changes(model):
        with told(model, tokens):
            for local, run in zip(local_models, runs, strict=True):
                _check_explained(model, found, local, run)
    return local_models


def _check_explained(model: Model, found: Changes, local: LocalModel, run: Activations) -> None:
    """Refuse a changed model of which a local model is something else than the prompt alone gives.

    Hooks that only look, and what changes MLPs, are part of what was recorded.
    """
    layers = range(shape_of(model).n_layers)
    prompt = local.tokens[None]
    mlps = [f"blocks.{layer}.mlp" for layer in layers]
    with received(model, mlps) as given:
        mask = torch.ones_like(prompt).bool()
        [logits] = run_to_logits(model, prompt, mask)
    streams = [run[mlp_residual_hook(model, layer)] for layer in layers]
    pairs = [*zip(local.replayed(), [*streams, local.residual], strict=True)]
    for layer, stream in enumerate(streams):
        _, _, norm, _ = _norms(model, layer, run)
        mlp_input = given[mlps[layer]][0]
        pairs.append((apply_norm(norm, stream), mlp_input))
    # Position by position: those of the first token may be far larger than all others.
    gaps = [relative_gap(*vectors) for pair in pairs for vectors in zip(*pair, strict=True)]
    at_each = zip(local.logits(EVERYWHERE).split(1), logits.split(1), strict=True)
    gap = max(*gaps, *(logit_gap(*rows) for rows in at_each))
    if gap > TOLERANCE[shape_of(model).dtype]:
        raise InputError(
            f"{shape_of(model).model_name} is not what its weights say ({gap:.1%} of an activation "
            f"differs): {named(found)}. Attribution graphs are computed from weights; remove "
            "hooks with reset_hooks(including_permanent=True), or load the model anew."
        )


def compute_dtype(model: Model) -> torch.dtype:
    """Return the precision of the linear map: at least float32, whatever the model's own is."""
    return torch.promote_types(shape_of(model).dtype, torch.float32)


def pad_prompts(model: Model, prompts: Sequence[Prompt]) -> tuple[TokenBatch, TokenMask]:
    """Pad prompts on the right to one tensor on the model's device; mask what is not padding.

    Raises:
        InputError: a prompt is empty, longer than the model's context, or holds a token outside
            the model's vocabulary.
    """
    cfg = shape_of(model)
    for prompt in prompts:
        if not 1 <= len(prompt) <= cfg.n_ctx:
            problem = f"has {len(prompt)} tokens" if len(prompt) else "is empty"
            raise InputError(
                f"a prompt {problem}; {cfg.model_name} takes from 1 to {cfg.n_ctx} tokens."
            )
        lowest, highest = prompt.aminmax()
        if lowest < 0 or highest >= cfg.d_vocab:
            raise InputError(
                f"a prompt holds a token outside 0 to {cfg.d_vocab - 1}; "
                "tokenize it with this model's tokenizer."
            )
    on_device = [prompt.to(cfg.device) for prompt in prompts]
    tokens = pad_sequence(on_device, batch_first=True).long()
    real = [torch.ones_like(prompt) for prompt in on_device]
    return tokens, pad_sequence(real, batch_first=True).bool()


def read_by_features(
    transcoders: Transcoders, norm: LinearNorm, residual: ModelVectors
) -> tuple[LinearNorm, ModelVectors]:
    """Return the map from the residual stream to what features read, and what they read.

    `norm` is the norm before the MLP, and `residual` the residual stream before it.
    """
    match transcoders.reads:
        case "residual":
            norm = replace(norm, scale=None, bias=None)
        case "normalized":
            norm = replace(norm, weight=None, bias=None)
    return norm, apply_norm(norm, residual)


def apply_norm(norm: LinearNorm, x: ModelVectors) -> ModelVectors:
    """Apply a frozen norm with its bias."""
    linear = norm.linear(x)
    return linear if norm.bias is None else linear + norm.bias


def norm_at(model: Model, layer: int | None, name: str, residual: ModelVectors) -> LinearNorm:
    """Return a norm with the scale that it has at this residual stream."""
    weights = weights_of(model)
    _, scale = weights.normalized(layer, residual) or (None, None)
    return weights.linear_norm(layer, name, scale)


def norm_without_scale(model: Model, layer: int, name: str, like: Tensor) -> LinearNorm:
    """Return a norm with scale 1, or the identity where the model has no such norm."""
    has_norm = (layer, name) in scale_hooks(model)
    no_scale = like.new_ones(1, 1) if has_norm else None
    return weights_of(model).linear_norm(layer, name, no_scale)


def _record(model: Model, tokens: TokenBatch, mask: TokenMask) -> Activations:
    recorded: Activations = {}
    hooks = keepers(recorded, _recorded_hooks(model))
    with plain_inputs(model):
        residual = run_to_residual(model, tokens, mask, hooks)
    if not residual[mask].isfinite().all():
        raise NotFiniteError(f"a prompt gives values that are not finite: {cause(model)}")
    return recorded | {FINAL_RESIDUAL: residual}


def _recorded_hooks(model: Model) -> list[str]:
    cfg = shape_of(model)
    names = [TOKEN_EMBEDDING, *scale_hooks(model).values()]
    if cfg.positions == "standard":
        names.append(POSITION_EMBEDDING)
    for layer in range(cfg.n_layers):
        names.append(pattern_hook(layer))
        names.append(mlp_residual_hook(model, layer))
        names.append(mlp_output_hook(model, layer))
    return names


def _unpadded(recorded: Activations, row: int, length: int, dtype: torch.dtype) -> Activations:
    run = {}
    for name, batch in recorded.items():
        values = batch[row, ..., :length, :]
        # Patterns, [head query key], are large, so each is converted where it is used.
        is_pattern = values.dim() == 3
        run[name] = values[..., :length] if is_pattern else values.to(dtype)
    return run


def _local_model(
    model: Model,
    prompt: Prompt,
    layers: Sequence[FrozenLayer],
    unembedding: Unembedding,
    mean_unembedding: ModelVector,
    run: Activations,
) -> LocalModel:
    residual = run[FINAL_RESIDUAL]
    return LocalModel(
        tokens=prompt.long().to(residual.device),
        layers=layers,
        final=norm_at(model, None, "ln_final", residual),
        embedding=run[TOKEN_EMBEDDING],
        position_embedding=run.get(POSITION_EMBEDDING),
        residual=residual,
        unembedding=unembedding.weight.detach(),
        unembedding_bias=unembedding.bias.detach().to(residual),
        mean_unembedding=mean_unembedding,
        soft_cap=unembedding.soft_cap,
        parallel=shape_of(model).parallel_attn_mlp,
        causal=shape_of(model).causal,
    )


class _LayerWeights(NamedTuple):
    """The weights of one layer, which all prompts share.

    Attributes:
        value, output, skip: see `FrozenLayer`.
        head_constant: what each head writes at an attention weight of 1 if the residual stream is
            zero, before a norm after attention.
        output_bias: b_O.
    """

    value: Float[Tensor, "kv_head d_model d_head"]
    output: HeadOutput
    head_constant: Float[Tensor, "head d_model"]
    output_bias: ModelVector
    skip: Float[Tensor, "d_out d_in"] | None


def _layer_weights(model: Model, transcoders: Transcoders, layer: int) -> _LayerWeights:
    weights, dtype = weights_of(model), compute_dtype(model)
    output = weights.output_projection(layer).detach().to(dtype)
    # (b_V + b_LN W_V[h]) W_O[h]
    value_constant = weights.value_constant(layer).to(dtype)
    head_constant = torch.einsum("he,hed->hd", value_constant, output)
    # The scale differs between prompts and is part of `mixing`.
    norm_after = norm_without_scale(model, layer, "ln1_post", output)
    return _LayerWeights(
        weights.projection_after_norm(layer, "v").to(dtype),
        norm_after.linear(output),
        head_constant,
        weights.output_bias(layer).detach().to(dtype),
        None if transcoders.skips is None else transcoders.skips[layer].to(output),
    )


def _frozen_layer(
    model: Model, transcoders: Transcoders, layer: int, weights: _LayerWeights, run: Activations
) -> FrozenLayer:
    norm_before, norm_after, norm_read, norm_write = _norms(model, layer, run)
    pattern = run[pattern_hook(layer)].to(weights.value)
    # LN_after(sum over heads and keys of A_h[query, key] head_constant[h] + b_O)
    heads = torch.einsum("hqk,hd->qd", pattern, weights.head_constant)
    attention_constant = apply_norm(norm_after, heads + weights.output_bias)
    residual = run[mlp_residual_hook(model, layer)]
    reading, feature_input = read_by_features(transcoders, norm_read, residual)
    if transcoders.writes == "residual":
        norm_write = replace(norm_write, scale=None)
    return FrozenLayer(
        mixing=_mixing(pattern, norm_before, norm_after),
        value=weights.value,
        output=weights.output,
        attention_constant=attention_constant,
        reading=reading,
        writing=norm_write,
        skip=weights.skip,
        feature_input=feature_input,
        mlp_output=run[mlp_output_hook(model, layer)],
    )


def _norms(model: Model, layer: int, run: Activations) -> list[LinearNorm]:
    """The norms before and after attention, and before and after the MLP."""
    weights, hooks = weights_of(model), scale_hooks(model)
    norms = []
    for name in NORMS:
        hook = hooks.get((layer, name), "")
        scale = run.get(hook)
        norms.append(weights.linear_norm(layer, name, scale))
    return norms


def _mixing(
    pattern: Pattern, norm_before: LinearNorm, norm_after: LinearNorm
) -> Float[Tensor, "head key query"]:
    # A_h^T[key, query] / (scale before attention at the key * scale after it at the query)
    mixing = pattern.mT
    if norm_after.scale is not None:
        mixing = mixing / norm_after.scale.T
    if norm_before.scale is not None:
        mixing = mixing / norm_before.scale
    return mixing.contiguous()


def _per_position(norm: LinearNorm, positions: slice = EVERYWHERE) -> LinearNorm:
    # For tensors with an axis of sources or targets between position and d_model.
    if norm.scale is None:
        return norm
    scale = norm.scale[positions, None]
    return replace(norm, scale=scale)
