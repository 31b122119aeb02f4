"""One forward and one backward pass: the gradient of the damage at all that targets read.

TransformerLens' per-head flags would make such a pass about nine times slower, and are not needed.
Gradients are kept where the model holds them, at q, k and v; the gradient at a head's own input is
computed when asked for, layer by layer, back through the projection and the norm.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

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
    hooked,
    input_hook,
    output_hook,
    projection_hook,
    residual_hook,
    run_to_residual,
    separate_gradients,
    unembed,
)
from circuits.models.propagation import PropagationRules
from circuits.models.source_outputs import SourceOutputs, keeper, output_groups
from circuits.running.edge_layout import HookedTarget
from circuits.system.errors import InputError
from circuits.tasks.metrics import Metric
from circuits.tasks.task import Task

# Rows of gradients go back through a norm in pieces of about this size.
PIECE_BYTES, PIECE_BYTES_GPU = 1 << 19, 1 << 26


TargetGradients = Float[Tensor, "target batch pos d_model"]


@dataclass(frozen=True, eq=False)
class Gradients:
    """The gradients of one pass, summed over scored rows. Where nothing flows back, none is kept.

    Attributes:
        rules: the rules of the backward pass.
        residuals: the residual stream at the input of each layer.
        read: by hook point, the gradient at q, k and v [batch pos head d_head] and at what MLPs and
            logits read [batch pos d_model].
        written: by hook point, the gradient at what sources write; heads of a layer share one.
        steepest: the largest entry of the gradient at the logits.
    """

    model: Model
    rules: PropagationRules
    residuals: tuple[Float[Tensor, "batch pos d_model"], ...]
    read: Mapping[str, Tensor]
    written: Mapping[str, Float[Tensor, "batch pos d_model"]]
    steepest: float

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """Everything that is kept."""
        return (*self.residuals, *self.read.values(), *self.written.values())

    def at_inputs(self, targets: Sequence[HookedTarget], into: TargetGradients) -> None:
        """Write the gradient at what each target reads into `into`.

        Args:
            targets: all heads among them are of one layer.
        """
        layers = [node.layer for node, _, _ in targets if isinstance(node, Head)]
        norm = self._norm_before_attention(layers[0]) if layers else None
        start = 0
        for node, slot, count in targets:
            rows = into[start : start + count]
            gradient = self.read.get(read_hook(self.model, node, slot))
            start += count
            if gradient is None:
                rows.zero_()
            elif not isinstance(node, Head) or slot is None:
                rows.copy_(gradient[None])
            elif norm is None:
                _back_through_projection(self.model, node.layer, slot, gradient, rows)
            else:
                normalized, scale = norm
                # Divided by the scale here, where the gradient is smallest.
                scaled = gradient / scale.to(gradient.dtype)[:, :, None]
                _back_through_projection(self.model, node.layer, slot, scaled, rows)
                if self.rules.norms == "derivative":
                    _back_through_scale(normalized.to(rows.dtype), rows)

    def _norm_before_attention(self, layer: int) -> tuple[Tensor, Tensor] | None:
        return ModelWeights(self.model).normalized(layer, self.residuals[layer])


def _back_through_scale(
    normalized: Float[Tensor, "batch pos d_model"], rows: TargetGradients
) -> None:
    """Back through what a norm divides by, in place."""
    # A few rows at a time stay in a CPU's caches and take little memory; a batched product is five
    # times slower.
    on_cpu = rows.device.type == "cpu"
    row_bytes = rows[0].numel() * rows.element_size()
    size = max(1, (PIECE_BYTES if on_cpu else PIECE_BYTES_GPU) // row_bytes)
    for piece in rows.split(size):
        # With n the normalized input: v <- v - n (n . v) / d_model
        along = (piece * normalized).sum(-1, keepdim=True)
        piece.addcmul_(normalized, along, value=-1 / rows.shape[-1])


def _back_through_projection(
    model: Model,
    layer: int,
    slot: str,
    gradient: Float[Tensor, "batch pos head d_head"],
    rows: Float[Tensor, "head batch pos d_model"],
) -> None:
    """Back through W_Q, W_K or W_V and the linear part of the norm.

    Heads that share a projection are multiplied by it together.
    """
    weight = ModelWeights(model).projection_after_norm(layer, slot)
    by_head = gradient.flatten(0, 1).transpose(0, 1).reshape(len(weight), -1, gradient.shape[-1])
    torch.bmm(by_head, weight.transpose(1, 2), out=rows.view(len(weight), -1, rows.shape[-1]))


@dataclass(frozen=True, eq=False)
class PassResult:
    """What one pass leaves.

    Attributes:
        outputs: what the sources wrote.
    """

    gradients: Gradients
    outputs: SourceOutputs
    logits: Float[Tensor, "scored vocab"]


@dataclass(frozen=True, eq=False)
class GradientPass:
    """Runs prompts and goes back from the damage. Parameters must be frozen.

    Attributes:
        at_outputs: also keep the gradients at what sources write.
    """

    model: Model
    nodes: tuple[Node, ...]
    targets: Sequence[HookedTarget]
    metric: Metric
    rules: PropagationRules
    at_outputs: bool

    def run(
        self,
        task: Task,
        tokens: Int[Tensor, "batch pos"],
        override: Mapping[str, Tensor | None],
        clean_logits: Float[Tensor, "scored vocab"] | None,
    ) -> PassResult:
        """Run `tokens`, and go back from the damage on the rows that `task` scores.

        Args:
            override: by hook point, what to put there; None keeps what is there. The gradient is
                cut either way. The embeddings must be among them: gradients start there, because
                the weights have none.
            clean_logits: of the whole model on the clean prompts; None if this is that run.

        Raises:
            InputError: the metric has no gradient; or, where nothing was put in, outputs and biases
                do not sum to the residual stream.
        """
        live: dict[str, Tensor] = {}
        kept: dict[str, Tensor] = {}
        with torch.enable_grad(), separate_gradients(self.model):
            hooks = self._hooks(live, kept, override)
            with hooked(self.model, self.rules.hooks(self.model)):
                final = run_to_residual(self.model, tokens, task.mask, hooks)
                logits = unembed(self.model, final[task.scored])
            against = logits.detach() if clean_logits is None else clean_logits
            damage = self.metric.damage(logits, against, task).sum()
            if not damage.requires_grad:
                raise InputError(
                    f"metric {self.metric.name!r} has no gradient; choose a differentiable one, "
                    "such as logit_difference."
                )
            names = dict.fromkeys([*self._read_hooks, *self._written_hooks])
            wanted = [name for name in names if live[name].requires_grad]
            inputs = [*(live[name] for name in wanted), final, logits]
            found = torch.autograd.grad(damage, inputs, allow_unused=True)
        outputs = SourceOutputs(
            self.model, self.nodes, {name: kept[name] for name, _ in output_groups(self.nodes)}
        )
        if all(value is None for value in override.values()):
            outputs.check(final, task.mask)
        gradients = self._gradients(dict(zip(wanted, found, strict=False)), kept, *found[-2:])
        return PassResult(gradients, outputs, logits.detach())

    def _gradients(
        self,
        found: Mapping[str, Tensor | None],
        kept: Mapping[str, Tensor],
        at_final: Tensor,
        at_logits: Tensor,
    ) -> Gradients:
        # Nothing flows back past an activation that was overridden.
        reached = {name: value for name, value in found.items() if value is not None}
        read = {name: reached[name] for name in self._read_hooks if name in reached}
        read[read_hook(self.model, self.targets[-1][0], None)] = at_final
        written = {name: reached[name] for name in self._written_hooks if name in reached}
        layers = range(self.model.cfg.n_layers)
        residuals = tuple(kept[residual_hook(layer)] for layer in layers)
        steepest = float(at_logits.abs().max())
        return Gradients(self.model, self.rules, residuals, read, written, steepest)

    @cached_property
    def _read_hooks(self) -> list[str]:
        """Hook points of all targets but the last, the logits."""
        return [read_hook(self.model, node, slot) for node, slot, _ in self.targets[:-1]]

    @cached_property
    def _written_hooks(self) -> list[str]:
        if not self.at_outputs:
            return []
        return list(dict.fromkeys(written_hook(node) for node in self.nodes))

    def _hooks(
        self,
        live: dict[str, Tensor],
        kept: dict[str, Tensor],
        override: Mapping[str, Tensor | None],
    ) -> list[tuple[str, Hook]]:
        """Hooks that override, that keep values, and that keep values with their history (live)."""
        layers = range(self.model.cfg.n_layers)
        outputs = [name for name, _ in output_groups(self.nodes)]
        to_keep = dict.fromkeys([*outputs, *(residual_hook(layer) for layer in layers)])
        hooks = [(name, _put(value)) for name, value in override.items()]
        hooks += [(name, keeper(kept, name)) for name in to_keep]
        for (node, slot, _), name in zip(self.targets, self._read_hooks, strict=False):
            head_slot = slot if isinstance(node, Head) else None
            copies = copies_per_head(self.model, head_slot) if head_slot else 1
            hooks.append((name, _keep_live(live, name, copies)))
        hooks += [(name, _keep_live(live, name, 1)) for name in self._written_hooks]
        return hooks


def read_hook(model: Model, node: Node, slot: str | None) -> str:
    """Where the gradient at what a target reads is kept: for heads at their q, k or v."""
    if isinstance(node, Head) and slot:
        return projection_hook(node.layer, slot)
    return input_hook(model, node, slot)


def written_hook(node: Node) -> str:
    """Where the gradient at what a source writes is kept: a layer's heads share one."""
    return attention_output_hook(node.layer) if isinstance(node, Head) else output_hook(node)


def is_embedding(node: Node) -> bool:
    """Whether the node writes before the first layer."""
    return isinstance(node, Embed | TokenEmbed | PosEmbed)


def _keep_live(live: dict[str, Tensor], name: str, copies: int) -> Hook:
    """Keep an activation with its history; shared heads are first copied for each query head."""

    def keep(activation: Tensor) -> Tensor:
        live[name] = activation.repeat_interleave(copies, dim=2) if copies > 1 else activation
        return live[name]

    return keep


def _put(value: Tensor | None) -> Hook:
    return lambda activation: (activation if value is None else value).detach().requires_grad_()
