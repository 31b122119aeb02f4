"""Whether a model computes what its source does, in every layer and in the logits."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from circuits.models.backend import Model, shape_of, weights_of
from circuits.models.bridge.weights import window
from circuits.models.hook_points import residual_hook
from circuits.models.loading.source import Source
from circuits.models.overflow import check_weights
from circuits.models.running import frozen, run_to_residual, unembed
from circuits.models.source_outputs import keepers
from circuits.models.tolerance import (
    PAST_WINDOW,
    ROW_TOLERANCE,
    TOLERANCE,
    compared_rows,
    logit_gap,
    relative_gap,
    row_gap,
)

N_TOKENS = 16
# A window of attention shows in prompts that are longer than it, up to this length.
LONGEST = 160
TEXT = (
    "When Mary and John went to the store, John gave a drink to Mary. The capital of France is "
    "Paris, and in 1999 the war had lasted from 1914 to 1918."
)
# Settings that conversions have got wrong, by what they are when they change nothing.
TELLING = {
    "rope_parameters": None, "rope_scaling": None, "sliding_window": None,
    "use_sliding_window": False, "attention_bias": False, "mlp_bias": False,
    "partial_rotary_factor": 1.0, "scale_attn_by_inverse_layer_idx": False, "clip_qkv": None,
    "use_parallel_residual": None, "logit_scale": None, "logits_scaling": None,
    "residual_multiplier": None, "embedding_multiplier": None, "do_layer_norm_before": True,
    "new_decoder_architecture": False, "alibi": False, "use_qk_norm": False,
}  # fmt: skip


@dataclass(frozen=True)
class SourceRun:
    """What the source computes on a few tokens.

    Attributes:
        streams: the residual stream before each layer.
    """

    tokens: Int[Tensor, "batch pos"]
    streams: Sequence[Float[Tensor, "batch pos d_model"]]
    logits: Float[Tensor, "batch pos vocab"]


@torch.no_grad()
def computed_by(source: Source) -> SourceRun:
    """Run the source on random tokens, and on text if it has a tokenizer."""
    model = source.model
    device = next(model.parameters()).device
    tokens = _tokens(source).to(device)
    found = model(input_ids=tokens, output_hidden_states=True, use_cache=False)
    return SourceRun(tokens, found.hidden_states[:-1], found.logits)


@torch.no_grad()
def disagreement(
    model: Model, expected: SourceRun, settings: Any, *, is_converted: bool
) -> str | None:
    """Say how a model differs from its source, if it does by more than rounding.

    Args:
        is_converted: it computes in the same order as the source, so that less is rounding.
    """
    # What is not finite agrees with nothing, and is named.
    check_weights(model)
    shape = shape_of(model)
    tolerance = TOLERANCE[shape.dtype]
    row_tolerance = ROW_TOLERANCE[shape.dtype] if is_converted else tolerance
    tokens = expected.tokens.to(shape.device)
    mask = torch.ones_like(tokens).bool()
    weights = weights_of(model)
    names = [residual_hook(layer) for layer in range(shape.n_layers)]
    streams: dict[str, Tensor] = {}
    with frozen(model):
        last = run_to_residual(model, tokens, mask, keepers(streams, names))
        logits = unembed(model, last)
    if len(expected.streams) != len(names):
        return f"it has {len(names)} layers, and its source {len(expected.streams)}"
    for layer, (name, theirs) in enumerate(zip(names, expected.streams, strict=True)):
        compared = compared_rows(weights, streams[name], theirs)
        gap, mean_gap = relative_gap(*compared), row_gap(*compared)
        if not (gap <= tolerance and mean_gap <= row_tolerance):
            where = "the embedding" if layer == 0 else f"the output of layer {layer - 1}"
            gap = max(gap, mean_gap)
            return f"{where} differs by {gap:.1%}{likely(settings)}"
    if logits.shape != expected.logits.shape:
        return f"it has {logits.shape[-1]} logits, and its source {expected.logits.shape[-1]}"
    compared = compared_rows(weights, logits, expected.logits)
    gap, mean_gap = logit_gap(*compared), row_gap(*compared)
    if not (gap <= tolerance and mean_gap <= row_tolerance):
        gap = max(gap, mean_gap)
        return f"the logits differ by {gap:.1%}{likely(settings)}"
    return None


def other_window(model: Model, settings: Any) -> str | None:
    """Say where attention reaches another number of tokens than the configuration says.

    Windows are often longer than the prompts on which models are compared.
    """
    shape, weights = shape_of(model), weights_of(model)
    for layer in range(shape.n_layers):
        found = weights.attention_settings(layer)
        stated = min(window(None, settings, layer), shape.n_ctx)
        if found is not None and min(found.reach, shape.n_ctx) != stated:
            return f"layer {layer} attends to {found.reach:g} tokens, and its source to {stated:g}"
    return None


def likely(settings: Any) -> str:
    """Name the settings that are likely not to be known, as the end of a message."""
    found = []
    for name, plain in TELLING.items():
        value = getattr(settings, name, plain)
        if isinstance(value, Mapping):
            value = dict(value)
            kind = value.get("rope_type", "default")
            value = None if kind == "default" and "partial_rotary_factor" not in value else value
        if value not in (plain, None):
            found.append(f"{name}={value}")
    return f"; likely because of {' or '.join(found[:2])}" if found else ""


def _tokens(source: Source) -> Int[Tensor, "batch pos"]:
    settings = source.model.config
    windows = (getattr(settings, name, None) for name in ("sliding_window", "window_size"))
    window = next(filter(None, windows), None)
    length = N_TOKENS
    if isinstance(window, int) and window + PAST_WINDOW <= LONGEST:
        length = max(length, window + PAST_WINDOW)
    longest = getattr(settings, "max_position_embeddings", None) or length
    length = min(length, longest)
    vocabulary = source.model.get_input_embeddings().weight.shape[0]
    generator = torch.Generator().manual_seed(0)
    rows = [torch.randint(vocabulary, (length,), generator=generator)]
    if source.tokenizer is not None:
        encoded = source.tokenizer(TEXT, add_special_tokens=True)
        ids = encoded["input_ids"][:length]
        if len(ids) == length and max(ids) < vocabulary:
            rows.append(torch.tensor(ids))
    return torch.stack(rows)
