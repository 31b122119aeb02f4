"""What every source writes to the residual stream on given prompts: one plain forward pass, no per-head flags."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from circuits.errors import InputError
from circuits.models import Components, Hook, Model, output_hook, run_to_residual
from circuits.nodes import Embed, Head, Node, PosEmbed, TokenEmbed

# Rounding may part the sum of the outputs from the residual stream by this much of its size; a missing term parts them by far more.
TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-3, torch.float16: 0.05, torch.bfloat16: 0.2}


def source_outputs(
    model: Model, nodes: Sequence[Node], tokens: Int[Tensor, "batch pos"], mask: Bool[Tensor, "batch pos"]
) -> Float[Tensor, "source batch pos d_model"]:
    """What each of `nodes` (all that write, see `component_nodes`) adds to the residual stream.

    Raises:
        InputError: the outputs and biases do not sum to the residual stream, so that the model is not what a component graph describes.
    """
    outputs = torch.empty(len(nodes), *tokens.shape, model.cfg.d_model, dtype=model.cfg.dtype, device=tokens.device)
    with torch.no_grad():
        residual = run_to_residual(model, tokens, mask, recording_hooks(model, nodes, outputs))
        biases = sum(Components(model).output_bias(layer) for layer in range(model.cfg.n_layers))
        written = outputs.sum(0, dtype=torch.promote_types(outputs.dtype, torch.float32)) + biases
        gap = float((written - residual)[mask].abs().max() / residual[mask].abs().max().clamp(min=1e-30))
    # Written so that NaN, which an overflowing model leaves here, is reported where the logits are checked.
    if gap > TOLERANCE[model.cfg.dtype]:
        raise InputError(
            f"in {model.cfg.model_name} the components' outputs do not sum to the residual stream (they miss {gap:.1%} of it), "
            "so no component graph describes this model."
        )
    return outputs


def embedding_outputs(
    model: Model, nodes: Sequence[Node], tokens: Int[Tensor, "batch pos"], mask: Bool[Tensor, "batch pos"]
) -> Float[Tensor, "embedding batch pos d_model"]:
    """What the embeddings among `nodes` write; the layers are not run."""
    embeddings = [node for node in nodes if isinstance(node, Embed | TokenEmbed | PosEmbed)]
    outputs = torch.empty(len(embeddings), *tokens.shape, model.cfg.d_model, dtype=model.cfg.dtype, device=tokens.device)
    with torch.no_grad():
        residual = run_to_residual(
            model, tokens, mask, recording_hooks(model, [node for node in embeddings if not isinstance(node, Embed)], outputs), layers=0
        )
    return outputs if len(embeddings) > 1 else residual[None]


def recording_hooks(model: Model, nodes: Sequence[Node], outputs: Float[Tensor, "source *batch pos d_model"]) -> list[tuple[str, Hook]]:
    """Hooks that write what each node adds to the residual stream into `outputs`, a row per node."""
    by_hook: dict[str, list[int]] = {}
    for index, node in enumerate(nodes):
        by_hook.setdefault(output_hook(node), []).append(index)
    return [(name, _recorder(model, nodes[rows[0]], outputs[rows[0] : rows[-1] + 1])) for name, rows in by_hook.items()]


def head_outputs(
    z: Float[Tensor, "*batch pos head d_head"], projection: Float[Tensor, "head d_head d_model"]
) -> Float[Tensor, "head *batch pos d_model"]:
    """What each head of a layer writes: z @ W_O."""
    return torch.einsum("...he,hed->h...d", z, projection)


def _recorder(model: Model, node: Node, rows: Float[Tensor, "source *batch pos d_model"]) -> Hook:
    def record(activation: Tensor) -> None:
        if isinstance(node, Head):
            activation = head_outputs(activation, Components(model).output_projection(node.layer))
        rows.copy_(activation.reshape(rows.shape))

    return record
