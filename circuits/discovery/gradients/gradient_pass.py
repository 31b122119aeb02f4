"""One forward and one backward pass: the gradient of the damage at everything that sources are read by.

No per-head flags of TransformerLens are needed, which make such a pass about nine times slower. Gradients are kept where the model holds
them, at q, k and v; that at a head's own input is made when it is asked for, layer by layer, back through the projection and the norm.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from circuits.graph.nodes import Embed, Head, Node, PosEmbed, TokenEmbed
from circuits.models import (
    Hook,
    Model,
    ModelWeights,
    attention_output_hook,
    copies_per_head,
    input_hook,
    output_hook,
    projection_hook,
    residual_hook,
    run_to_residual,
    separate_gradients,
    unembed,
)
from circuits.models.source_outputs import SourceOutputs, keeper, output_groups
from circuits.system.errors import InputError
from circuits.tasks.metrics import Metric
from circuits.tasks.task import Task

# Rows of gradients are taken back through a norm in pieces of about this size.
PIECE_BYTES, PIECE_BYTES_GPU = 1 << 19, 1 << 26

Target = tuple[Node, str | None, int]
"""The first head of a layer (or another node), the slot, and how many rows: see `EdgeLayout.targets`."""


@dataclass(frozen=True, eq=False)
class Gradients:
    """The gradients of one pass, summed over scored rows. What nothing flows back to is missing.

    Attributes:
        residuals: the residual stream as it enters each layer.
        read: by hook point, at q, k and v [batch pos head d_head] and at what MLPs and logits read [batch pos d_model].
        written: by the hook point at which they are read, at what sources write: of a layer's heads at their sum.
        steepest: the largest entry at the logits.
    """

    model: Model
    residuals: tuple[Float[Tensor, "batch pos d_model"], ...]
    read: Mapping[str, Tensor]
    written: Mapping[str, Float[Tensor, "batch pos d_model"]]
    steepest: float

    def tensors(self) -> Iterator[Tensor]:
        """All that is kept."""
        yield from (*self.residuals, *self.read.values(), *self.written.values())

    def at_inputs(
        self, targets: Sequence[Target], into: Float[Tensor, "target batch pos d_model"]
    ) -> None:
        """Write the gradient at what each target reads, all of the heads among them being of one layer, into `into`."""
        start, layers = 0, [node.layer for node, _, _ in targets if isinstance(node, Head)]
        norm = (
            ModelWeights(self.model).normalized(layers[0], self.residuals[layers[0]])
            if layers
            else None
        )
        for node, slot, count in targets:
            rows = into[start : start + count]
            gradient = self.read.get(read_hook(self.model, node, slot))
            if gradient is None:
                rows.zero_()
            elif isinstance(node, Head) and slot:
                # What the norm divides by is applied here, where the gradient is smallest.
                scaled = (
                    gradient if norm is None else gradient / norm[1].to(gradient.dtype)[:, :, None]
                )
                _back_through_projection(self.model, node.layer, slot, scaled, rows)
                if norm is not None:
                    _remove_along(norm[0].to(rows.dtype), rows)
            else:
                rows.copy_(gradient[None])
            start += count


def _remove_along(
    direction: Float[Tensor, "batch pos d_model"], rows: Float[Tensor, "target batch pos d_model"]
) -> None:
    """Back through a norm, in place: with n the normalized input, v becomes v - n (n . v) / d_model."""
    # A few rows at a time stay in the caches of a CPU, and take little memory; a batched product is five times slower.
    bytes_per_piece = PIECE_BYTES if rows.device.type == "cpu" else PIECE_BYTES_GPU
    for piece in rows.split(max(1, bytes_per_piece // (rows[0].numel() * rows.element_size()))):
        piece.addcmul_(
            direction, (piece * direction).sum(-1, keepdim=True), value=-1 / rows.shape[-1]
        )


def _back_through_projection(
    model: Model,
    layer: int,
    slot: str,
    gradient: Float[Tensor, "batch pos head d_head"],
    rows: Float[Tensor, "head batch pos d_model"],
) -> None:
    """Through W_Q, W_K or W_V and the linear part of the norm. Heads that share a projection are multiplied by it together."""
    weight = ModelWeights(model).projection_after_norm(layer, slot)
    by_head = gradient.flatten(0, 1).transpose(0, 1).reshape(len(weight), -1, gradient.shape[-1])
    torch.bmm(by_head, weight.transpose(1, 2), out=rows.view(len(weight), -1, rows.shape[-1]))


def gradient_pass(
    model: Model,
    nodes: tuple[Node, ...],
    targets: Sequence[Target],
    task: Task,
    tokens: Int[Tensor, "batch pos"],
    override: Mapping[str, Tensor | None],
    metric: Metric,
    clean_logits: Float[Tensor, "scored vocab"] | None,
    at_outputs: bool,
) -> tuple[Gradients, SourceOutputs, Float[Tensor, "scored vocab"]]:
    """Run `tokens`, and back from the damage on the rows that `task` scores. Parameters must be frozen.

    Args:
        override: by hook point, what is put there; None keeps what is there. Either way the gradient is cut. The embeddings must be
            among them: gradients start there, the weights having none.
        clean_logits: the whole model's on the clean prompts; None: this is that run.
        at_outputs: also keep the gradients at what sources write.

    Returns:
        The gradients, what the sources wrote, and the logits.

    Raises:
        InputError: the metric has no gradient; or, where nothing was put in, outputs and biases do not sum to the residual stream.
    """
    read: dict[str, Tensor] = {}
    kept: dict[str, Tensor] = {}
    names = [read_hook(model, node, slot) for node, slot, _ in targets[:-1]]
    outputs = list(_summed_outputs(nodes)) if at_outputs else []
    hooks = [
        *((name, _put(value)) for name, value in override.items()),
        *((name, keeper(kept, name)) for name in _to_keep(model, nodes)),
        *_tapping_hooks(model, read, targets[:-1]),
        *((name, _tap(read, name, 1)) for name in outputs),
    ]
    with torch.enable_grad(), separate_gradients(model):
        final = run_to_residual(model, tokens, task.mask, hooks)
        logits = unembed(model, final[task.scored])
        damage = metric.damage(
            logits, logits.detach() if clean_logits is None else clean_logits, task
        ).sum()
        if not damage.requires_grad:
            raise InputError(
                f"metric {metric.name!r} has no gradient; choose a differentiable one, such as logit_difference."
            )
        wanted = [name for name in dict.fromkeys([*names, *outputs]) if read[name].requires_grad]
        *found, at_final, at_logits = torch.autograd.grad(
            damage, [*(read[name] for name in wanted), final, logits], allow_unused=True
        )
    record = SourceOutputs(model, nodes, {name: kept[name] for name, _ in output_groups(nodes)})
    if all(value is None for value in override.values()):
        record.check(final, task.mask)
    # Nothing flows back past an activation that is fixed.
    reached = {
        name: gradient for name, gradient in zip(wanted, found, strict=True) if gradient is not None
    }
    residuals = tuple(kept[residual_hook(layer)] for layer in range(model.cfg.n_layers))
    at_reads = {name: reached[name] for name in names if name in reached} | {
        read_hook(model, targets[-1][0], None): at_final
    }
    at_writes = {name: reached[name] for name in outputs if name in reached}
    return (
        Gradients(model, residuals, at_reads, at_writes, float(at_logits.abs().max())),
        record,
        logits.detach(),
    )


def read_hook(model: Model, node: Node, slot: str | None) -> str:
    """Where the gradient at what a target reads is kept: of heads at their q, k or v."""
    return (
        projection_hook(node.layer, slot)
        if isinstance(node, Head) and slot
        else input_hook(model, node, slot)
    )


def written_hook(node: Node) -> str:
    """Where the gradient at what a source writes is kept: a layer's heads share one."""
    return attention_output_hook(node.layer) if isinstance(node, Head) else output_hook(node)


def is_embedding(node: Node) -> bool:
    """Whether the node writes before the first layer."""
    return isinstance(node, Embed | TokenEmbed | PosEmbed)


def _summed_outputs(nodes: Sequence[Node]) -> Iterator[str]:
    yield from dict.fromkeys(written_hook(node) for node in nodes)


def _to_keep(model: Model, nodes: Sequence[Node]) -> dict[str, None]:
    return dict.fromkeys(
        [
            *(name for name, _ in output_groups(nodes)),
            *(residual_hook(layer) for layer in range(model.cfg.n_layers)),
        ]
    )


def _tapping_hooks(
    model: Model, read: dict[str, Tensor], targets: Sequence[Target]
) -> Iterator[tuple[str, Hook]]:
    for node, slot, _ in targets:
        name = read_hook(model, node, slot)
        yield (
            name,
            _tap(
                read, name, copies_per_head(model, slot) if isinstance(node, Head) and slot else 1
            ),
        )


def _tap(read: dict[str, Tensor], name: str, copies: int) -> Hook:
    """Keep an activation with its history; of shared heads first make a copy per query head."""

    def tap(activation: Tensor) -> Tensor:
        read[name] = activation.repeat_interleave(copies, dim=2) if copies > 1 else activation
        return read[name]

    return tap


def _put(value: Tensor | None) -> Hook:
    return lambda activation: (activation if value is None else value).detach().requires_grad_()
