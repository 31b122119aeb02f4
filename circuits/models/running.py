"""Run a model with hooks and leave it unchanged: flags, hooks, gradients and modes are restored.

Whoever changes a model for a run takes its turn (`changes.turn`), so that several threads can use
one model.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from circuits.models.backend import Hooks, Model, backend, shape_of, unchanged
from circuits.models.changes import Own, because, changes, named, turn
from circuits.models.overflow import check_size
from circuits.system.errors import InputError
from circuits.system.memory import is_out_of_memory
from circuits.system.torch_modes import without_modes

# Attention's own activations are [batch, head, query, key]. These, norms and the choice of experts
# may be in another type than the model.
ATTENTION = ("hook_pattern", "hook_attn_scores")
MIXED = (*ATTENTION, "hook_scale", "hook_normalized", "hook_expert_weights")
# Where all tokens are run to the logits, about this many numbers at a time.
WHOLE_LOGITS = 1 << 24

TokenMask = Bool[Tensor, "batch pos"]
Attribute = tuple[Any, str, Any]
Counts = dict[str, int]
Context = Iterator[None]

INSTEAD = (
    "read a head's output by its name (a0.h1), what it reads at hook_q_input, hook_k_input and "
    "hook_v_input, and what the logits read at the last hook_resid_post"
)


def separate_inputs(model: Model) -> AbstractContextManager[None]:
    """Give every MLP, and every head's q, k and v, a separate input, which hooks can change."""
    return backend(model).inputs("separate")


def plain_inputs(model: Model) -> AbstractContextManager[None]:
    """Run a model as fast as it can be, whatever flags the user has set."""
    return backend(model).inputs("plain")


def separate_gradients(model: Model) -> AbstractContextManager[None]:
    """Let hooks take a separate gradient at every MLP's input and at every head's q, k and v.

    A hook at k or v must itself repeat a shared head once per query head (`copies_per_head`). The
    projections stay shared, so a pass costs as much as a plain one.
    """
    return backend(model).inputs("gradients")


def copies_per_head(model: Model, slot: str) -> int:
    """Return how many query heads share one head of q, k or v."""
    return 1 if slot == "q" else shape_of(model).repeats


@contextlib.contextmanager
def frozen(model: Model) -> Iterator[None]:
    """Take the model's turn, in evaluation mode, without gradients of weights or modes of torch."""
    with turn(model), unchanged(model), without_modes(), contextlib.ExitStack() as stack:
        here = backend(model)
        training = [module for module in here.modules() if module.training]
        evaluating = [(module, "training", False) for module in training]
        stack.enter_context(attributes_set(evaluating))
        for parameter in here.parameters().values():
            # Weights made in inference mode have no gradient in any case.
            if parameter.requires_grad and not parameter.is_inference():
                stack.callback(parameter.requires_grad_)
                parameter.requires_grad_(False)
        yield


def run_to_residual(
    model: Model,
    tokens: Int[Tensor, "batch pos"],
    mask: TokenMask,
    hooks: Hooks = (),
    *,
    layers: int | None = None,
) -> Float[Tensor, "batch pos d_model"]:
    """Run a model with hooks, and return the residual stream after the last layer.

    One that is too large for the norm after it is refused.

    Args:
        mask: True for real tokens, False for padding on the right, which no real token reads.
        layers: stop after this many layers.
    """
    last = shape_of(model).n_layers if layers is None else layers
    expected = Expected(model, tokens.shape)
    with hooked(model, hooks, tokens.shape):
        given = backend(model).run(tokens, mask, last)
    residual = expected.whole("the residual stream", given)
    check_size(model, residual)
    return residual


def run_to_logits(
    model: Model, tokens: Int[Tensor, "batch pos"], mask: TokenMask
) -> Float[Tensor, "batch pos vocab"]:
    """Run a model as it is, to the logits at every token."""
    with turn(model):
        logits = backend(model).run(tokens, mask, None)
    return Expected(model, tokens.shape).whole("the logits", logits)


@contextlib.contextmanager
def hooked(model: Model, hooks: Hooks, shape: Sequence[int] | None = None) -> Context:
    """Apply hooks to activations, or to the outputs of modules, in the runs inside.

    What no run in between computes is refused.

    Args:
        shape: of the tokens that are run, to which what a user's hooks return is expanded.
    """
    with turn(model), backend(model).hooked(hooks, shape):
        yield


def check_were_run(model: Model, names: Iterable[str]) -> None:
    """Refuse hooks that were not run: they would change nothing, and nobody would know."""
    for name in names:
        reason = because(model) or f"; {INSTEAD}"
        raise InputError(f"{name} is not computed in the run of a circuit{reason}.")


@contextlib.contextmanager
def told(model: Model, tokens: Int[Tensor, "batch pos"]) -> Context:
    """Tell in one line how a changed model cannot be run, though it can be run on these prompts.

    What it raises as well on all of them, with their padding, and on the first is raised as it is.
    """
    try:
        yield
    # A user's hook may raise anything.
    except Exception as error:
        if isinstance(error, InputError) or is_out_of_memory(error):
            raise
        found = changes(model)
        runs = (_can_run(model, each) for each in (tokens, tokens[:1]))
        if not found or not any(runs):
            raise
        raise InputError(
            f"{shape_of(model).model_name} cannot be run on each prompt alone and on many together "
            f"({type(error).__name__}: {str(error)[:80]!r}): {named(found)}; let it act on prompts "
            "of any number and length, and on each vector of the last axis alone, as heads may "
            "have separate inputs, [batch, pos, head, d_model]; or remove it."
        ) from error


@torch.no_grad()
def _can_run(model: Model, tokens: Int[Tensor, "batch pos"]) -> bool:
    mask = torch.ones_like(tokens).bool()
    try:
        backend(model).run(tokens, mask, shape_of(model).n_layers)
    # As above.
    except Exception:
        return False
    return True


@contextlib.contextmanager
def received(model: Model, names: Sequence[str]) -> Iterator[dict[str, Tensor]]:
    """Record what modules are given, by their names."""
    with turn(model), backend(model).received(names) as seen:
        yield seen


@contextlib.contextmanager
def counting_passes(model: Model) -> Iterator[Counts]:
    """Count this thread's `forward_passes`, and the `prompts_run` in them (prompts times circuits).

    >>> import circuits, torch
    >>> model = circuits.load_model("toy-world")
    >>> with counting_passes(model) as counts:
    ...     _ = model(torch.zeros(3, 5, dtype=torch.long))
    >>> counts
    {'forward_passes': 1, 'prompts_run': 3}
    """
    counts = {"forward_passes": 0, "prompts_run": 0}
    with turn(model):
        handle = model.register_forward_pre_hook(_Counter(counts))
    try:
        yield counts
    finally:
        with turn(model):
            handle.remove()


def scored_logits(
    model: Model, residual: Float[Tensor, "batch pos d_model"], scored: TokenMask
) -> Float[Tensor, "scored vocab"]:
    """Compute the logits at some tokens from the final residual stream."""
    if not backend(model).last_step_changed():
        return unembed(model, residual[scored])
    # A user's hook there may depend on the position, so it sees whole prompts, as in the model.
    prompt_logits = shape_of(model).d_vocab_out * residual.shape[1]
    size = max(1, WHOLE_LOGITS // prompt_logits)
    pairs = zip(residual.split(size), scored.split(size), strict=True)
    whole = ((_whole_last_step(model, stream), chosen) for stream, chosen in pairs)
    return torch.cat([logits[chosen] for logits, chosen in whole])


def unembed(
    model: Model, residual: Float[Tensor, "*batch d_model"]
) -> Float[Tensor, "*batch vocab"]:
    """Compute the logits from the final residual stream with the model's own modules."""
    rows = residual.flatten(0, -2)
    logits = backend(model).last_step(rows[None])
    return logits[0].unflatten(0, residual.shape[:-1])


def _whole_last_step(
    model: Model, residual: Float[Tensor, "batch pos d_model"]
) -> Float[Tensor, "batch pos vocab"]:
    logits = backend(model).last_step(residual)
    expected = Expected(model, residual.shape[:2])
    return expected.whole("the logits", logits)


@dataclass(frozen=True)
class Expected:
    """What activations are of a run of tokens: a user's hooks may return what broadcasts to it."""

    model: Model
    shape: Sequence[int] | None

    @cached_property
    def dtype(self) -> torch.dtype:
        """The type of activations."""
        return shape_of(self.model).dtype

    def whole(self, name: str, found: Any, given: Tensor | None = None) -> Tensor:
        """Expand an activation, [batch, pos, ...] or in attention [batch, head, query, key].

        Args:
            given: what it takes the place of.
        """
        if self.shape is None:
            return found
        try:
            # Where the model adds what a hook returns, a number will do.
            found = torch.as_tensor(found)
            like = found if given is None else given
            keeps_type = name.endswith(MIXED) or not like.is_floating_point()
            dtype = like.dtype if keeps_type else self.dtype
            axes = 1 if name.endswith(ATTENTION) else 2
            tokens, rest = self.shape[:axes], like.shape[axes:]
            expected = (*tokens, *rest)
            # Norms of heads see all vectors in a row.
            pairs = zip(like.shape, tokens, strict=False)
            if given is not None and any(have not in (1, want) for have, want in pairs):
                expected = tuple(like.shape)
            found = found.to(like.device, dtype)
            return found if found.shape == expected else found.expand(expected)
        except (RuntimeError, TypeError, ValueError) as error:
            is_tensor = isinstance(found, Tensor)
            what = f"of shape {list(found.shape)}" if is_tensor else f"a {type(found).__name__}"
            raise InputError(
                f"in {shape_of(self.model).model_name} {name} is {what} for tokens of shape "
                f"{list(self.shape)}{because(self.model)}; let hooks return tensors that have the "
                "shape of what they are given, for any number of prompts, or broadcast to it."
            ) from error


class _Counter(Own):
    """A hook of torch that counts the runs of the thread that it was made in."""

    def __init__(self, counts: Counts) -> None:
        self.counts, self.thread = counts, threading.get_ident()

    def __call__(self, module: object, arguments: Sequence[Tensor]) -> None:
        if threading.get_ident() == self.thread:
            self.counts["forward_passes"] += 1
            self.counts["prompts_run"] += len(arguments[0])


@contextlib.contextmanager
def attributes_set(changes: Sequence[Attribute]) -> Context:
    """Set attributes, given as (object, name, value), and restore them at the end."""
    with contextlib.ExitStack() as stack:
        for owner, name, value in changes:
            if name in vars(owner):
                before = getattr(owner, name)
                stack.callback(setattr, owner, name, before)
            else:
                # The object only inherits the attribute from its class.
                stack.callback(delattr, owner, name)
            setattr(owner, name, value)
        yield
