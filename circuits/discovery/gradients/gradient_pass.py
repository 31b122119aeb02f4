"""One forward and one backward pass: the gradient of the damage at all that targets read.

TransformerLens' per-head flags would make such a pass about nine times slower, and are not needed.
Gradients are kept where the model holds them, at q, k and v; the gradient at a head's own input is
computed when asked for, layer by layer, back through the projection and the norm. What a user has
changed on a model, such as a hook on a norm, is not in its weights: then the flags are set.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from itertools import starmap

import torch
from jaxtyping import Float, Int
from torch import Tensor

from circuits.discovery.gradients.slopes import Logits, OfLogits
from circuits.graph.nodes import Embed, Head, Node, PosEmbed, TokenEmbed
from circuits.models import (
    Hook,
    Model,
    attention_output_hook,
    changes,
    copies_per_head,
    hooked,
    input_hook,
    named,
    output_hook,
    projection_hook,
    residual_hook,
    run_to_residual,
    scored_logits,
    separate_gradients,
    separate_inputs,
    shape_of,
    weights_of,
)
from circuits.models.propagation import PropagationRules
from circuits.models.source_outputs import (
    MaskedPrompts,
    SourceOutputs,
    check_honoured,
    output_groups,
)
from circuits.running.edge_layout import HookedTarget
from circuits.system.errors import InputError
from circuits.tasks.metrics import check_finite
from circuits.tasks.task import Task

# Rows of gradients go back through a norm in pieces of about this size.
PIECE_BYTES, PIECE_BYTES_GPU = 1 << 19, 1 << 26
Activations = Mapping[str, Tensor]
Norms = tuple[tuple[Tensor, Tensor] | None, ...]
Override = Mapping[str, Tensor | None]
Tokens = Int[Tensor, "batch pos"]
Residual = Float[Tensor, "batch pos d_model"]
HeadGradients = Float[Tensor, "batch pos head d_head"]
TargetGradients = Float[Tensor, "target batch pos d_model"]


@dataclass(frozen=True, eq=False)
class Gradients:
    """The gradients of one pass, summed over scored rows; none is kept where nothing flows back."""

    model: Model
    rules: PropagationRules
    # By layer, the normalized input of attention and what it was divided by; None without norms
    norms: Norms
    # By hook point, the gradient at q, k and v [batch pos head d_head], and at what MLPs and logits
    # read and sources write [batch pos d_model]; heads of a layer write together
    at: Activations
    # Whether gradients are kept at the separate inputs of heads [batch pos head d_model] instead
    separate: bool
    # The largest entry of the gradient at the logits
    steepest: float

    @property
    def nbytes(self) -> int:
        """The bytes of everything that is kept."""
        kept = list(self.at.values())
        for norm in self.norms:
            kept += norm or ()
        return sum(tensor.nbytes for tensor in kept)

    def at_inputs(self, targets: Sequence[HookedTarget], into: TargetGradients) -> None:
        """Write the gradient at what each target reads into `into`."""
        start = 0
        for node, slot, count in targets:
            rows = into[start : start + count]
            start += count
            hook = read_hook(self.model, node, slot, self.separate)
            gradient = self.at.get(hook)
            if gradient is None:
                rows.zero_()
            elif self.separate and isinstance(node, Head):
                rows.copy_(gradient.movedim(2, 0))
            elif isinstance(node, Head) and slot:
                self._at_heads(node.layer, slot, gradient, rows)
            else:
                rows.copy_(gradient[None])

    def _at_heads(
        self, layer: int, slot: str, gradient: HeadGradients, rows: TargetGradients
    ) -> None:
        projection = weights_of(self.model).projection_after_norm(layer, slot)
        norm = self.norms[layer]
        if norm is None:
            _back_through_projection(projection, gradient, rows)
            return
        normalized, scale = norm
        # Divided by the scale here, where the gradient is smallest.
        scale = scale.to(gradient.dtype)
        scaled = gradient / scale[:, :, None]
        _back_through_projection(projection, scaled, rows)
        if self.rules.norms == "derivative":
            _back_through_scale(normalized.to(rows.dtype), rows)


def _back_through_projection(
    projection: Float[Tensor, "shared d_model d_head"],
    gradient: HeadGradients,
    rows: TargetGradients,
) -> None:
    """Back through W_Q, W_K or W_V, which heads may share, and the linear part of the norm."""
    number, d_model, d_head = projection.shape
    tokens = gradient.flatten(0, 1)
    by_head = tokens.transpose(0, 1)
    by_projection = by_head.reshape(number, -1, d_head)
    result = rows.view(number, -1, d_model)
    # dL/dx_h = dL/dq_h W_Q[h]^T, and the same for k and v
    transposed = projection.transpose(1, 2)
    torch.bmm(by_projection, transposed, out=result)


def _back_through_scale(normalized: Residual, rows: TargetGradients) -> None:
    """Back through what a norm divides by, in place."""
    # A few rows at a time stay in a CPU's caches and take little memory; a batched product is five
    # times slower.
    piece_bytes = PIECE_BYTES if rows.device.type == "cpu" else PIECE_BYTES_GPU
    size = max(1, piece_bytes // rows[0].nbytes)
    d_model = rows.shape[-1]
    for piece in rows.split(size):
        # With n the normalized input: v <- v - n (n . v) / d_model
        along = (piece * normalized).sum(-1, keepdim=True)
        piece.addcmul_(normalized, along, value=-1 / d_model)


@dataclass(frozen=True, eq=False)
class PassResult:
    """What one pass leaves."""

    gradients: Gradients
    # What the sources wrote
    outputs: SourceOutputs
    logits: Logits


@dataclass(frozen=True, eq=False)
class GradientPass:
    """Runs prompts and goes back from the damage. Parameters must be frozen."""

    model: Model
    nodes: tuple[Node, ...]
    targets: Sequence[HookedTarget]
    rules: PropagationRules
    # Also keep the gradients at what sources write
    at_outputs: bool
    # Give heads separate inputs, for a model with changes
    separate: bool = False

    def check_honoured(self, prompts: Sequence[MaskedPrompts]) -> None:
        """Refuse changes of the model that would not act on `prompts` as in the model itself."""
        if self.separate:
            check_honoured(self.model, self.nodes, prompts, gradients=True)

    def run(self, task: Task, tokens: Tokens, override: Override, slopes: OfLogits) -> PassResult:
        """Run `tokens`, and go back from the logits of the rows that `task` scores.

        Args:
            override: by hook point, what to put there; None keeps what is there. The gradient is
                cut either way. The embeddings must be among them: gradients start there, because
                the weights have none.
            slopes: from these logits, the gradient of the damage at them.
        """
        seen: dict[str, Tensor] = {}
        with torch.enable_grad(), self._inputs(self.model):
            final, logits = self._forward(task, tokens, override, seen)
            found = logits.detach()
            gradients = self._gradients(slopes(found), seen, final, logits)
        names = dict(output_groups(self.nodes))
        written = {name: seen[name].detach() for name in names}
        outputs = SourceOutputs(self.model, self.nodes, written)
        overridden = any(value is not None for value in override.values())
        if not overridden:
            outputs.check(final, task.mask)
        return PassResult(gradients, outputs, found)

    @property
    def _inputs(self) -> Callable[[Model], AbstractContextManager[None]]:
        return separate_inputs if self.separate else separate_gradients

    def logits(self, task: Task, override: Override) -> Logits:
        """The logits of the clean prompts with `override`, as `run` computes them."""
        with self._inputs(self.model):
            _, logits = self._forward(task, task.clean, override, {})
        return logits

    def _forward(
        self, task: Task, tokens: Tokens, override: Override, seen: dict[str, Tensor]
    ) -> tuple[Residual, Logits]:
        """Run `tokens`, keep activations in `seen`, and return what the logits read, and them."""
        model = self.model
        hooks: list[tuple[str, Hook]] = []
        for name, value in override.items():
            hooks.append((name, partial(_put, value)))
        hooks += self._keeping_hooks(seen)
        with hooked(model, self.rules.hooks(model)):
            final = run_to_residual(model, tokens, task.mask, hooks)
            logits = scored_logits(model, final, task.scored)
        check_finite(logits, model)
        return final, logits

    def _gradients(
        self, slopes: Logits, seen: dict[str, Tensor], final: Residual, logits: Logits
    ) -> Gradients:
        *before, last = self._hooks_with_gradient
        live = {name: seen[name] for name in before if seen[name].requires_grad}
        live[last] = final
        found = self._differentiated(logits, slopes, live.values())
        pairs = zip(live, found, strict=True)
        # Nothing flows back past an activation that was overridden.
        reached = {name: gradient for name, gradient in pairs if gradient is not None}
        steepest = float(slopes.abs().max())
        norms = self._norms(seen)
        return Gradients(self.model, self.rules, norms, reached, self.separate, steepest)

    def _differentiated(
        self, logits: Logits, slopes: Logits, wanted: Iterable[Tensor]
    ) -> Sequence[Tensor | None]:
        try:
            return torch.autograd.grad(logits, tuple(wanted), slopes, allow_unused=True)
        except RuntimeError as error:
            if "inplace operation" not in str(error):
                raise
            raise InputError(
                "a hook writes in place over an activation that gradients need "
                f"({named(changes(self.model))}); let it return a new tensor."
            ) from error

    def _norms(self, seen: Activations) -> Norms:
        if self.separate:
            return ()
        weights = weights_of(self.model)
        streams = (seen[name].detach() for name in self._residual_hooks)
        return tuple(starmap(weights.normalized, enumerate(streams)))

    @property
    def _residual_hooks(self) -> list[str]:
        layers = range(shape_of(self.model).n_layers)
        return list(map(residual_hook, layers))

    @property
    def _hooks_with_gradient(self) -> list[str]:
        """Where gradients are kept; what the logits read comes last."""
        written = map(written_hook, self.nodes) if self.at_outputs else ()
        model, separate = self.model, self.separate
        read = [read_hook(model, node, slot, separate) for node, slot, _ in self.targets]
        return list(dict.fromkeys([*written, *read]))

    def _keeping_hooks(self, seen: dict[str, Tensor]) -> list[tuple[str, Hook]]:
        """Hooks that put activations into `seen`, with one copy of shared heads for each head."""
        names = list(dict(output_groups(self.nodes)))
        names += self._residual_hooks + self._hooks_with_gradient[:-1]
        copies = dict.fromkeys(names, 1)
        for node, slot, _ in self.targets:
            if isinstance(node, Head) and slot and not self.separate:
                name = projection_hook(node.layer, slot)
                copies[name] = copies_per_head(self.model, slot)
        return [(name, partial(_keep, seen, name, number)) for name, number in copies.items()]


def read_hook(model: Model, node: Node, slot: str | None, separate: bool) -> str:
    """Where the gradient at what a target reads is kept: for heads mostly at their q, k or v."""
    if isinstance(node, Head) and slot and not separate:
        return projection_hook(node.layer, slot)
    return input_hook(model, node, slot)


def written_hook(node: Node) -> str:
    """Where the gradient at what a source writes is kept: a layer's heads share one."""
    if isinstance(node, Head):
        return attention_output_hook(node.layer)
    return output_hook(node)


def is_embedding(node: Node) -> bool:
    """Whether the node writes before the first layer."""
    return isinstance(node, Embed | TokenEmbed | PosEmbed)


def _keep(seen: dict[str, Tensor], name: str, copies: int, activation: Tensor) -> Tensor:
    """Keep an activation with its history; shared heads are first copied for each query head."""
    if copies > 1:
        activation = activation.repeat_interleave(copies, dim=2)
    seen[name] = activation
    return activation


def _put(value: Tensor | None, activation: Tensor) -> Tensor:
    given = activation if value is None else value
    return given.detach().requires_grad_()
