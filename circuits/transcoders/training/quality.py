"""What transcoders have to explain in some text, and how well they do."""

from __future__ import annotations

from dataclasses import replace

import pandas as pd
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from circuits.models import (
    Model,
    ModelWeights,
    frozen,
    mlp_output_hook,
    mlp_residual_hook,
    plain_inputs,
    run_to_residual,
    scale_hooks,
)
from circuits.models.source_outputs import keeper
from circuits.system.errors import InputError
from circuits.transcoders.transcoder import Reads, Transcoders, Writes


@torch.no_grad()
def quality(
    model: Model,
    transcoders: Transcoders,
    tokens: Int[Tensor, "batch pos"],
    mask: Bool[Tensor, "batch pos"],
    *,
    prompts_at_once: int = 64,
) -> pd.DataFrame:
    """How well transcoders do on some text, by layer, over all real tokens but the first of each prompt.

    Returns:
        `explained_variance`: 1 - squared errors over squared deviations from the mean; `l0`: features that fire at a token, on average;
        `dead`: share of the features that fire nowhere here.
    """
    layers = range(transcoders.n_layers)
    error, squares, sums = (
        torch.zeros(len(layers), transcoders.d_model, dtype=torch.float64) for _ in range(3)
    )
    fired, n = torch.zeros(len(layers), transcoders.n_features, dtype=torch.float64), 0
    for start in range(0, len(tokens), prompts_at_once):
        part = slice(start, start + prompts_at_once)
        inputs, outputs = record(
            model, transcoders.reads, transcoders.writes, tokens[part], mask[part]
        )
        activations = {layer: transcoders.encode(layer, inputs[layer][None]) for layer in layers}
        n += inputs.shape[1]
        for layer in layers:
            made = transcoders.output(layer, activations, inputs[layer][None])[0]
            error[layer] += (outputs[layer] - made).double().square().sum(0).cpu()
            squares[layer] += outputs[layer].double().square().sum(0).cpu()
            sums[layer] += outputs[layer].double().sum(0).cpu()
            fired[layer] += (activations[layer][0] != 0).double().sum(0).cpu()
    deviations = (squares - sums.square() / n).sum(1)
    columns = {
        "explained_variance": 1 - error.sum(1) / deviations,
        "l0": fired.sum(1) / n,
        "dead": (fired == 0).double().mean(1),
    }
    return pd.DataFrame(
        {name: column.numpy() for name, column in columns.items()},
        index=pd.RangeIndex(len(layers), name="layer"),
    )


@torch.no_grad()
def record(
    model: Model,
    reads: Reads,
    writes: Writes,
    tokens: Int[Tensor, "batch pos"],
    mask: Bool[Tensor, "batch pos"],
) -> tuple[Float[Tensor, "layer token d_model"], Float[Tensor, "layer token d_model"]]:
    """What features read and what MLPs write in every layer, at all real tokens but the first of each prompt.

    Raises:
        InputError: there are none.
    """
    tokens, mask = tokens.to(model.cfg.device), mask.to(model.cfg.device)
    layers, scales = range(model.cfg.n_layers), scale_hooks(model) if reads == "normalized" else {}
    residuals = [mlp_residual_hook(model, layer) for layer in layers]
    outputs = [mlp_output_hook(model, layer, before_norm=writes == "mlp") for layer in layers]
    found: dict[str, Tensor] = {}
    with frozen(model), plain_inputs(model):
        run_to_residual(
            model,
            tokens,
            mask,
            [(name, keeper(found, name)) for name in {*residuals, *outputs, *scales.values()}],
        )
    kept = mask.clone()
    kept[:, 0] = False
    if not kept.any():
        raise InputError(
            "the text has no token after the first of a prompt; give prompts of at least two tokens."
        )
    parts, read = ModelWeights(model), []
    for layer in layers:
        residual = found[residuals[layer]]
        if reads == "mlp_input":
            residual = parts.mlp_input(layer, residual)
        elif (layer, "ln2") in scales:
            norm = parts.linear_norm(layer, "ln2", found[scales[layer, "ln2"]].to(residual))
            residual = replace(norm, weight=None, bias=None).linear(residual)
        read.append(residual[kept])
    return torch.stack(read), torch.stack([found[name][kept] for name in outputs])
