"""What transcoders have to approximate on some text, and how well they do."""

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

Tokens = Int[Tensor, "batch pos"]
Mask = Bool[Tensor, "batch pos"]
LayerVectors = Float[Tensor, "layer token d_model"]


@torch.no_grad()
def quality(
    model: Model,
    transcoders: Transcoders,
    tokens: Tokens,
    mask: Mask,
    *,
    prompts_at_once: int = 64,
) -> pd.DataFrame:
    """Measure how well transcoders approximate the MLPs on some text.

    All real tokens count but for the first of each prompt.

    Args:
        tokens: the text.
        mask: True for real tokens, False for padding.
        prompts_at_once: number of prompts in a batch.

    Returns:
        A row for each layer, with the columns `explained_variance` (1 - squared error / squared
        deviation from the mean), `l0` (mean number of features that fire at a token) and `dead`
        (share of features that never fire).

    Raises:
        InputError: a batch has no tokens that count.
    """
    n_layers, device = transcoders.n_layers, model.cfg.device
    by_dimension = torch.zeros(3, n_layers, transcoders.d_model, dtype=torch.float64, device=device)
    squared_error, squares, sums = by_dimension
    fired = torch.zeros(n_layers, transcoders.n_features, dtype=torch.float64, device=device)
    n_tokens = 0
    batches = zip(tokens.split(prompts_at_once), mask.split(prompts_at_once), strict=True)
    for batch in batches:
        inputs, outputs = record(model, transcoders.reads, transcoders.writes, *batch)
        n_tokens += inputs.shape[1]
        # All tokens are taken as one prompt.
        inputs = inputs[:, None]
        activations = {layer: transcoders.encode(layer, inputs[layer]) for layer in range(n_layers)}
        for layer in range(n_layers):
            (approximation,) = transcoders.output(layer, activations, inputs[layer])
            squared_error[layer] += (outputs[layer] - approximation).double().square().sum(0)
            fired[layer] += (activations[layer][0] != 0).double().sum(0)
        squares += outputs.double().square().sum(1)
        sums += outputs.double().sum(1)
    # sum (y - mean)^2 = sum y^2 - (sum y)^2 / n
    deviation = (squares - sums.square() / n_tokens).sum(1)
    columns = {
        "explained_variance": 1 - squared_error.sum(1) / deviation,
        "l0": fired.sum(1) / n_tokens,
        "dead": (fired == 0).double().mean(1),
    }
    return pd.DataFrame(
        {name: column.cpu().numpy() for name, column in columns.items()},
        index=pd.RangeIndex(n_layers, name="layer"),
    )


@torch.no_grad()
def record(
    model: Model,
    reads: Reads,
    writes: Writes,
    tokens: Tokens,
    mask: Mask,
) -> tuple[LayerVectors, LayerVectors]:
    """Run the model and record what features read and what MLPs write, in every layer.

    Returns:
        Inputs and outputs at all real tokens but the first of each prompt.

    Raises:
        InputError: there are no such tokens.
    """
    tokens, mask = tokens.to(model.cfg.device), mask.to(model.cfg.device)
    layers = range(model.cfg.n_layers)
    residual_names = [mlp_residual_hook(model, layer) for layer in layers]
    output_names = [mlp_output_hook(model, layer, before_norm=writes == "mlp") for layer in layers]
    scale_names = scale_hooks(model) if reads == "normalized" else {}
    recorded: dict[str, Tensor] = {}
    names = {*residual_names, *output_names, *scale_names.values()}
    hooks = [(name, keeper(recorded, name)) for name in names]
    with frozen(model), plain_inputs(model):
        run_to_residual(model, tokens, mask, hooks)
    counted = mask.clone()
    counted[:, 0] = False
    if not counted.any():
        raise InputError(
            "the text has no token after the first of a prompt; give prompts of at least two "
            "tokens."
        )
    weights, inputs = ModelWeights(model), []
    for layer, name in enumerate(residual_names):
        vectors = recorded[name]
        if reads == "mlp_input":
            vectors = weights.mlp_input(layer, vectors)
        elif (layer, "ln2") in scale_names:
            scale = recorded[scale_names[layer, "ln2"]].to(vectors)
            norm = weights.linear_norm(layer, "ln2", scale)
            vectors = replace(norm, weight=None, bias=None).linear(vectors)
        inputs.append(vectors[counted])
    outputs = [recorded[name][counted] for name in output_names]
    return torch.stack(inputs), torch.stack(outputs)
