"""What transcoders have to approximate on some text, and how well they do."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import replace
from typing import Any

import pandas as pd
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from circuits import models
from circuits.models.source_outputs import keeper
from circuits.system.errors import InputError
from circuits.transcoders.transcoder import Reads, Transcoders, Writes

Tokens = Int[Tensor, "batch pos"]
Mask = Bool[Tensor, "batch pos"]
LayerVectors = Float[Tensor, "layer token d_model"]


@torch.no_grad()
def quality(
    model: models.Model,
    transcoders: Transcoders,
    tokens: Tokens,
    mask: Mask,
    *,
    prompts_at_once: int = 64,
) -> pd.DataFrame:
    """Measure how well transcoders approximate the MLPs on some text.

    All real tokens count but for the first of each prompt. The mask is True for real tokens.

    Returns:
        A row for each layer, with the columns `explained_variance` (1 - squared error / squared
        deviation from the mean), `l0` (mean number of features that fire at a token) and `dead`
        (share of features that never fire).
    """
    reads, writes = transcoders.reads, transcoders.writes
    totals: dict[str, Any] = defaultdict(int)
    for batch in zip(tokens.split(prompts_at_once), mask.split(prompts_at_once), strict=True):
        inputs, outputs = record(model, reads, writes, *batch)
        for name, value in _sums(transcoders, inputs, outputs).items():
            totals[name] += value
    n_tokens, fired = totals["tokens"], totals["fired"]
    # sum (y - mean)^2 = sum y^2 - (sum y)^2 / n
    deviation = totals["y^2"] - totals["y"].square() / n_tokens
    columns = {
        "explained_variance": 1 - totals["error^2"].sum(1) / deviation.sum(1),
        "l0": fired.sum(1) / n_tokens,
        "dead": (fired == 0).double().mean(1),
    }
    table = pd.DataFrame({name: column.cpu().numpy() for name, column in columns.items()})
    return table.rename_axis("layer")


def _sums(transcoders: Transcoders, inputs: LayerVectors, outputs: LayerVectors) -> dict[str, Any]:
    # Sums over tokens, by layer: of squared errors, of outputs y, and of features that fire.
    layers = range(transcoders.n_layers)
    # All tokens are taken as one prompt.
    prompts = inputs[:, None]
    activations = {layer: transcoders.encode(layer, prompts[layer]) for layer in layers}
    made = [transcoders.output(layer, activations, prompts[layer]) for layer in layers]
    error = outputs - torch.cat(made)
    fires = torch.cat([activations[layer] != 0 for layer in layers])
    return {
        "tokens": inputs.shape[1],
        "error^2": error.double().square().sum(1),
        "y^2": outputs.double().square().sum(1),
        "y": outputs.double().sum(1),
        "fired": fires.double().sum(1),
    }


@torch.no_grad()
def record(
    model: models.Model, reads: Reads, writes: Writes, tokens: Tokens, mask: Mask
) -> tuple[LayerVectors, LayerVectors]:
    """Run the model and record what features read and what MLPs write, in every layer.

    All real tokens are recorded but the first of each prompt.
    """
    tokens, mask = tokens.to(model.cfg.device), mask.to(model.cfg.device)
    counted = mask.clone()
    counted[:, 0] = False
    if not counted.any():
        raise InputError("the text has no token after the first of a prompt; give longer prompts.")
    layers = range(model.cfg.n_layers)
    residuals = [models.mlp_residual_hook(model, layer) for layer in layers]
    outputs = [
        models.mlp_output_hook(model, layer, before_norm=writes == "mlp") for layer in layers
    ]
    scales = models.scale_hooks(model) if reads == "normalized" else {}
    recorded: dict[str, Tensor] = {}
    names = {*residuals, *outputs, *scales.values()}
    hooks = [(name, keeper(recorded, name)) for name in names]
    with models.frozen(model), models.plain_inputs(model):
        models.run_to_residual(model, tokens, mask, hooks)
    inputs = []
    for layer, name in enumerate(residuals):
        scale = recorded.get(scales.get((layer, "ln2"), ""))
        vectors = _read_by_features(model, layer, reads, recorded[name], scale)
        inputs.append(vectors[counted])
    return torch.stack(inputs), torch.stack([recorded[name][counted] for name in outputs])


def _read_by_features(
    model: models.Model, layer: int, reads: Reads, residual: Tensor, scale: Tensor | None
) -> Float[Tensor, "batch pos d_model"]:
    # What features read, from the residual stream before the MLP and the scale of its norm.
    weights = models.ModelWeights(model)
    if reads == "mlp_input":
        return weights.mlp_input(layer, residual)
    if scale is None:
        return residual
    # Only centred, where the norm does that, and divided by its scale.
    norm = weights.linear_norm(layer, "ln2", scale.to(residual))
    return replace(norm, weight=None, bias=None).linear(residual)
