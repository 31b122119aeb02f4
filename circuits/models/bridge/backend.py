"""How a TransformerBridge is read and run: by a pass of this package over the wrapped weights."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property, partial
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformer_lens.hook_points import HookPoint
from transformer_lens.model_bridge import TransformerBridge

from circuits.models.backend import Backend, Changes, Hook, Hooks, Inputs
from circuits.models.bridge import parts
from circuits.models.bridge.changes import (
    INNER,
    all_modules,
    hook_points,
    hooked,
    is_known,
    note_known,
    problems,
    through,
)
from circuits.models.bridge.run import Pass
from circuits.models.bridge.shape import bridge_shape, unreadable, unsupported
from circuits.models.bridge.weights import BridgeWeights
from circuits.models.changes import A_HOOK, Own, hooks_by_kind
from circuits.models.layers.shape import ModelShape
from circuits.models.running import Expected, check_were_run, frozen
from circuits.models.tolerance import TOLERANCE, compared_rows, logit_gap
from circuits.system.errors import InputError
from circuits.system.memory import is_out_of_memory

Context = Iterator[None]


N_TOKENS = 16


class _Named:
    """A hook of this package on the activation of a name."""

    def __init__(self, name: str, function: Hook, expected: Expected) -> None:
        self.name, self.function, self.expected = name, function, expected
        self.was_run = False

    def __call__(self, activation: Tensor) -> Tensor:
        self.was_run = True
        whole = self.expected.whole(self.name, activation)
        result = self.function(whole)
        return whole if result is None else result


# The hooks of contexts that runs are in, in the order in which they came.
_ACTIVE: WeakKeyDictionary[TransformerBridge, list[_Named]] = WeakKeyDictionary()


class BridgeBackend(Backend, of=TransformerBridge):
    """How a TransformerBridge is read and run."""

    model: TransformerBridge

    @cached_property
    def points(self) -> dict[str, HookPoint]:
        """The hook points that a run calls, by the names of activations."""
        return hook_points(self.model)

    def read_shape(self) -> ModelShape:
        """Return sizes and kinds, from the modules as far as they tell."""
        try:
            return bridge_shape(self.model)
        # Of architectures that are not known, parts may be missing, and raise anything.
        except Exception as error:
            for part in unreadable(self.model):
                raise InputError(f"this model has {part}; take another model.") from error
            raise

    def read_weights(self) -> BridgeWeights:
        """Return a view of the weights."""
        return BridgeWeights(self.model, self.shape)

    def modules(self) -> Iterator[nn.Module]:
        """Return all modules, those of the wrapped model as well."""
        return (module for _, module in all_modules(self.model))

    def parameters(self) -> Mapping[str, Tensor]:
        """Return all parameters of the wrapped model by name."""
        parameters = self.model.original_model.named_parameters()
        found: dict[str, Tensor] = {name.replace(INNER, ""): each for name, each in parameters}
        # TransformerLens keeps this one among the buffers.
        bias = parts.bias(self.model.unembed)
        if bias is not None and not isinstance(bias, nn.Parameter):
            found["unembed.b_U"] = bias
        return found

    def hook_names(self) -> tuple[str, ...]:
        """Return the names of all activations, from a run of one token."""
        seen: dict[str, None] = {}

        def at(name: str, activation: Tensor) -> Tensor:
            if ".hook_" in name or name.startswith("hook_"):
                seen[name] = None
            return activation

        shape = self.shape
        token = torch.zeros(1, 1, dtype=torch.long, device=shape.device)
        noting = Pass(self.read_weights(), at, lambda name: True)
        with torch.no_grad():
            noting.to_logits(noting.to_residual(token, shape.n_layers))
        return tuple(seen)

    def run(self, tokens: Tensor, mask: Tensor, layers: int | None) -> Tensor:
        """Run by the pass of this package; to the logits, by the model's own if nobody listens."""
        if layers is None and not _ACTIVE.get(self.model):
            return self.model(tokens, attention_mask=torch.ones_like(tokens))
        for hook in self.model._forward_pre_hooks.values():
            # Those that count the passes.
            if isinstance(hook, Own):
                hook(self.model, (tokens,))
        last = self.shape.n_layers if layers is None else layers
        residual = self._pass(tokens.shape).to_residual(tokens, last)
        return self.last_step(residual) if layers is None else residual

    def last_step(self, residual: Tensor) -> Tensor:
        """Compute logits from the final residual stream."""
        return self._pass(None).to_logits(residual)

    @contextlib.contextmanager
    def hooked(self, hooks: Hooks, shape: Sequence[int] | None) -> Context:
        """Apply hooks in the runs inside."""
        expected = Expected(self.model, shape)
        added = [_Named(name, function, expected) for name, function in hooks]
        active = _ACTIVE.setdefault(self.model, [])
        before = len(active)
        active.extend(added)
        try:
            yield
        finally:
            del active[before:]
        lost = (hook.name for hook in added if not hook.was_run)
        check_were_run(self.model, lost)

    @contextlib.contextmanager
    def received(self, names: Sequence[str]) -> Iterator[dict[str, Tensor]]:
        """Record what modules are given."""
        seen: dict[str, Tensor] = {}
        notes = {name: partial(seen.__setitem__, name) for name in names}
        hooks = [(f"{name}.hook_in", note) for name, note in notes.items()]
        with self.hooked(hooks, None):
            yield seen

    def inputs(self, kind: Inputs) -> contextlib.AbstractContextManager[None]:
        """Do nothing: a run gives separate inputs to those that are hooked."""
        return contextlib.nullcontext()

    def changes(self) -> Changes:
        """Describe the hooks of a user that a run honours."""
        return dict.fromkeys(hooked(self.points), A_HOOK)

    def problems(self) -> Iterator[str]:
        """Say why the model cannot be run as it is."""
        for part in unreadable(self.model):
            yield f"it has {part}; circuits are not found in such models"
            return
        found = list(problems(self.model))
        yield from found
        if not found and not self.changes():
            yield from self._disagreement()

    def computed(self) -> dict[str, Any]:
        """Return the hooks of a user."""
        points = hooked(self.points)
        return {name: hooks_by_kind(point) for name, point in points.items()}

    def first_fingerprint(self) -> None:
        """Return nothing: the first version knew no bridges."""

    def last_step_changed(self) -> bool:
        """Whether the unembedding has a hook."""
        return "unembed.hook_out" in hooked(self.points)

    def unsupported(self) -> Iterator[str]:
        """Say why the residual stream is not the sum of the model's components."""
        return unsupported(self.model)

    def _disagreement(self) -> Iterator[str]:
        """Compare the pass of this package with the model's own, if anything is new in it."""
        if is_known(self.model):
            return
        generator = torch.Generator().manual_seed(0)
        shape = self.shape
        size = (1, min(N_TOKENS, shape.n_ctx))
        tokens = torch.randint(shape.d_vocab, size, generator=generator)
        tokens = tokens.to(shape.device)
        try:
            with frozen(self.model), torch.no_grad():
                # Not by calls, which are counted.
                residual = self._pass(tokens.shape).to_residual(tokens, shape.n_layers)
                here = self.last_step(residual)
                mask = torch.ones_like(tokens)
                there = self.model.forward(tokens, attention_mask=mask)
        # Of architectures that are not known.
        except Exception as error:
            if is_out_of_memory(error):
                raise
            yield f"it cannot be run ({type(error).__name__}: {str(error)[:80]!r})"
            return
        compared = compared_rows(self.weights, here, there)
        gap = logit_gap(*compared)
        if math.isnan(gap):
            # Of weights that are not finite or too large, which runs will name.
            return
        if gap > TOLERANCE[shape.dtype]:
            yield (
                f"its weights, run layer by layer, give other logits (by {gap:.1%}) than the model "
                "does; undo what was changed in it, or load it anew with circuits.load_model"
            )
        else:
            note_known(self.model)

    def _pass(self, shape: Sequence[int] | None) -> Pass:
        expected = Expected(self.model, shape)
        points = hooked(self.points)
        ours: dict[str, list[_Named]] = {}
        for hook in _ACTIVE.get(self.model, ()):
            ours.setdefault(hook.name, []).append(hook)

        weights = self.weights
        assert isinstance(weights, BridgeWeights)
        at = partial(_at, expected, points, ours)
        names = {*points, *ours}
        return Pass(weights, at, is_hooked=names.__contains__)


def _at(
    expected: Expected,
    points: Mapping[str, HookPoint],
    ours: Mapping[str, Sequence[_Named]],
    name: str,
    activation: Tensor,
) -> Tensor:
    """Apply the hooks of a name, a user's and then ours."""
    if name in points:
        changed = through(points[name], name, activation)
        activation = expected.whole(name, changed, activation)
    for hook in ours.get(name, ()):
        activation = hook(activation)
    return activation
