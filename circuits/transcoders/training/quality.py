"""What transcoders have to approximate on some text, and how well they do."""

from __future__ import annotations

from typing import Any

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from circuits import models
from circuits.models import shape_of
from circuits.models.source_outputs import keepers
from circuits.system.arguments import checked_arguments
from circuits.system.errors import InputError
from circuits.system.numbers import WholeNumber, whole
from circuits.system.tensors import as_tensor
from circuits.tasks.model_fit import check_task
from circuits.tasks.task import Task
from circuits.transcoders.transcoder import Reads, Transcoders, Writes, check_is_transcoders

LayerVectors = Float[Tensor, "layer token d_model"]
Residual = Float[Tensor, "batch pos d_model"]


@checked_arguments
@torch.no_grad()
def quality(
    model: models.Model,
    transcoders: Transcoders,
    tokens: Any,
    mask: Any,
    *,
    prompts_at_once: WholeNumber = 64,
) -> pd.DataFrame:
    """Measure how well transcoders approximate the MLPs on some text.

    All real tokens count but for the first of each prompt.

    Args:
        tokens: [batch, pos].
        mask: True, or 1, for real tokens; padding may be on either side.

    Returns:
        A row for each layer, with the columns `explained_variance` (1 - squared error / squared
        deviation from the mean), `l0` (mean number of features that fire at a token) and `dead`
        (share of features that never fire).
    """
    models.check_unchanged(model)
    check_is_transcoders(transcoders)
    transcoders.check()
    size = whole(prompts_at_once, "prompts_at_once", least=1)
    text = _text(model, tokens, mask)
    starts = range(0, len(text), size)
    batches = (text[start : start + size] for start in starts)
    sums = [_sums(model, transcoders, batch) for batch in batches]
    columns = zip(*sums, strict=True)
    totals: Any = map(sum, columns)
    n_tokens, fired, y, y_squared, errors = totals
    # sum (y - mean)^2 = sum y^2 - (sum y)^2 / n
    deviation = y_squared - y.square() / n_tokens
    unexplained = errors.sum(1) / deviation.sum(1)
    never_fires = (fired == 0).double()
    measures = {
        "explained_variance": (1 - unexplained).cpu(),
        "l0": (fired.sum(1) / n_tokens).cpu(),
        "dead": never_fires.mean(1).cpu(),
    }
    return pd.DataFrame(measures).rename_axis("layer")


def _sums(model: models.Model, transcoders: Transcoders, text: Task) -> tuple[Any, ...]:
    # The number of tokens; by layer, sums over them: how often each feature fires, the outputs y,
    # y^2, and squared errors.
    reads, writes = transcoders.reads, transcoders.writes
    inputs, outputs = record(model, reads, writes, text.clean, text.mask)
    activations, made = {}, []
    # All tokens are taken as one prompt.
    for layer, prompt in enumerate(inputs[:, None]):
        activations[layer] = transcoders.encode(layer, prompt)
        made.append(transcoders.output(layer, activations, prompt))
    fires = torch.cat([*activations.values()]) != 0
    errors = outputs - torch.cat(made)
    y = outputs.double()
    squared_errors = errors.double().square()
    by_token = (fires.double(), y, y.square(), squared_errors)
    return inputs.shape[1], *[each.sum(1) for each in by_token]


def _text(model: models.Model, tokens: Any, mask: Any) -> Task:
    """The prompts of some text that have real tokens, with their padding on the right."""
    tokens = as_tensor(tokens, "tokens")
    mask = as_tensor(mask, "the mask")
    if tokens.dim() != 2 or mask.shape != tokens.shape:
        raise InputError(
            f"the mask has shape {tuple(mask.shape)} and the tokens {tuple(tokens.shape)}; both "
            "must be [prompt, position], and the mask True for real tokens."
        )
    some = mask.any(1)
    if not some.any():
        raise InputError("the text has no real tokens; the mask must be True where tokens are.")
    text = Task.from_tokens(tokens[some], attention_mask=mask[some])
    check_task(model, text)
    return text.to(shape_of(model).device)


@checked_arguments
@torch.no_grad()
def record(
    model: models.Model, reads: Reads, writes: Writes, tokens: Any, mask: Any
) -> tuple[LayerVectors, LayerVectors]:
    """Run the model and record what features read and what MLPs write, in every layer.

    All real tokens are recorded but the first of each prompt, as in `quality`.
    """
    text = _text(model, tokens, mask)
    tokens, mask = text.clean, text.mask
    counted = mask.clone()
    counted[:, 0] = False
    if not counted.any():
        raise InputError("the text has no token after the first of a prompt; give longer prompts.")
    layers = range(shape_of(model).n_layers)
    before_norm = writes == "mlp"
    read = [models.mlp_residual_hook(model, layer) for layer in layers]
    written = [models.mlp_output_hook(model, layer, before_norm=before_norm) for layer in layers]
    recorded: dict[str, Tensor] = {}
    hooks = keepers(recorded, [*read, *written])
    with models.frozen(model), models.plain_inputs(model):
        models.run_to_residual(model, tokens, mask, hooks)
    weights = models.weights_of(model)
    inputs = []
    for layer, name in enumerate(read):
        vectors = _read_by_features(weights, layer, reads, recorded[name])
        inputs.append(vectors[counted])
    outputs = [recorded[name][counted] for name in written]
    return torch.stack(inputs), torch.stack(outputs)


def _read_by_features(
    weights: models.ModelWeights, layer: int, reads: Reads, residual: Residual
) -> Residual:
    if reads == "mlp_input":
        return weights.mlp_input(layer, residual)
    normalized = reads == "normalized" and weights.normalized(layer, residual)
    return normalized[0].to(residual) if normalized else residual
