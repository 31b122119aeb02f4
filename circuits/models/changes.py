"""What a user has changed on a model: hooks, replaced modules and methods, compiled code.

`changes` lists it. The reference executor and gradients run the model itself, and so honour it.
What computes from weights, as the incremental executor and attribution graphs do, needs a model
without changes. `check_model` refuses what nothing here can honour.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager
from typing import Any
from weakref import WeakKeyDictionary

from torch import nn
from torch.nn.modules import module as every_module

from circuits.models.backend import Changes, Model, backend, shape_of
from circuits.system.errors import InputError

HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
"""Where torch keeps the hooks of a module; with `_global` before it, those of all modules."""

EMBEDDING = ("embed", "hook_embed", "pos_embed", "hook_pos_embed")
WHOLE = "the model itself"
A_HOOK = "a hook"

_LOCKS: WeakKeyDictionary[Model, Any] = WeakKeyDictionary()
_LOCKS_LOCK = threading.Lock()


class Own:
    """Marks what this package itself puts on a model while it runs."""


def turn(model: Model) -> AbstractContextManager[object]:
    """Wait until no other thread of this package runs the model, and keep the others waiting.

    While a model runs, hooks and flags are on it that other runs must not see. A thread may take
    its turn again inside its turn.
    """
    with _LOCKS_LOCK:
        lock: AbstractContextManager[object] = _LOCKS.setdefault(model, threading.RLock())
        return lock


def changes(model: Model) -> Changes:
    """Describe what a model has that TransformerLens does not build from its settings."""
    with turn(model):
        found = {}
        if any(hooks_on(every_module, "_global")):
            found["all modules of torch"] = A_HOOK
        return found | backend(model).changes()


def because(model: Model) -> str:
    """What has been changed, as the end of a message; empty if nothing is."""
    found = changes(model)
    return f": {named(found)}" if found else ""


def named(found: Changes) -> str:
    """The first changes, for a message."""
    texts = [f"{change} at {name}" for name, change in found.items()]
    more = f" and {len(texts) - 2} more changes" if len(texts) > 2 else ""
    return f"it has {' and '.join(texts[:2])}{more}"


def only_hooked(found: Changes) -> bool:
    """Whether all changes are hooks: the modules are those that TransformerLens builds."""
    return set(found.values()) <= {A_HOOK}


def has_backward_hooks(model: Model) -> bool:
    """Whether hooks see gradients of the model, and may change them."""
    backward = [name for name in HOOKS if "backward" in name]
    hooked = (any(hooks_on(module, names=backward)) for module in backend(model).modules())
    return any(hooked) or any(hooks_on(every_module, "_global", backward))


def after_embedding(found: Changes) -> Changes:
    """The changes that are not of the embeddings alone."""
    return {name: change for name, change in found.items() if name not in EMBEDDING}


def check_model(model: Model) -> None:
    """Refuse what is no model of TransformerLens, or one that cannot be run as it is.

    Raises:
        InputError: it is of another class; it is compiled; hooks are where edges are ablated or on
            the model itself; or its settings do not say where and in which type its weights are.
    """
    found = backend(model)
    with turn(model):
        problems = list(found.problems())
    if problems:
        name = model.cfg.model_name
        raise InputError(f"{name} cannot be run as it is: {problems[0]}.")


def check_unchanged(model: Model) -> None:
    """Refuse what `check_model` refuses, and changes, where weights must say what is computed."""
    check_model(model)
    if found := changes(model):
        raise InputError(
            f"{shape_of(model).model_name} is not what its weights say: {named(found)}. Features "
            "and attribution graphs are computed from weights; remove hooks with "
            "reset_hooks(including_permanent=True), or load the model anew."
        )


def check_differentiable(model: Model) -> None:
    """Refuse weights that no gradient can pass."""
    if any(parameter.is_inference() for parameter in backend(model).parameters().values()):
        raise InputError(
            f"the weights of {shape_of(model).model_name} were made inside "
            "torch.inference_mode(), so no gradient passes them; load the model outside of it."
        )


def hooks_on(owner: Any, prefix: str = "", names: Iterable[str] = HOOKS) -> Iterator[object]:
    """The hooks of a module, or of all modules, that are not our own."""
    for name in names:
        registered = getattr(owner, prefix + name)
        yield from (hook for hook in registered.values() if not isinstance(hook, Own))


def hooks_by_kind(owner: Any, prefix: str = "") -> dict[str, tuple[object, ...]]:
    """The hooks of a module, or of all modules, that are not our own, by where they act."""
    found = {kind: tuple(hooks_on(owner, prefix, [kind])) for kind in HOOKS}
    return {kind: hooks for kind, hooks in found.items() if hooks}


def is_compiled(module: nn.Module) -> bool:
    """Whether hooks do not reach into a module, as it runs compiled code."""
    return module._compiled_call_impl is not None or "_orig_mod" in module._modules
