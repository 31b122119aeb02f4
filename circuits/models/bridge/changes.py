"""What a user has changed on a bridge, and which changes a run honours."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformer_lens.hook_points import HookPoint
from transformer_lens.model_bridge import TransformerBridge

from circuits.models.changes import WHOLE, hooks_on, is_compiled

# Where the pass of this package computes an activation, and a bridge's hook point for it; some of
# them take the axes of heads as one. Scores are none of them: they are masked or scaled before the
# hook or after it, as the class of attention has it.
POINTS = {
    "hook_resid_pre": "hook_in",
    "attn.hook_q": "attn.q.hook_out",
    "attn.hook_k": "attn.k.hook_out",
    "attn.hook_v": "attn.v.hook_out",
    "attn.hook_pattern": "attn.hook_pattern",
    "attn.o.hook_in": "attn.o.hook_in",
    "hook_attn_out": "attn.hook_out",
    "hook_mlp_out": "mlp.hook_out",
    "hook_resid_post": "hook_out",
}
# Bridges are inside of the modules that they wrap.
INNER = "_original_component."
FLAT = ("attn.hook_q", "attn.hook_k", "attn.hook_v", "attn.o.hook_in")


# Bridges whose pass has been compared with what they wrap, and what was in them then.
_KNOWN: WeakKeyDictionary[TransformerBridge, Any] = WeakKeyDictionary()
FEW = 4096
LIBRARIES = ("transformer_lens", "transformers", "torch", "accelerate")


def note_known(model: TransformerBridge) -> None:
    """Note that a bridge, as it is now, has been compared with its source."""
    _KNOWN[model] = _inside(model)


def is_known(model: TransformerBridge) -> bool:
    """Whether nothing has changed in a bridge since it was compared with its source."""
    return model in _KNOWN and _KNOWN[model] == _inside(model)


def _inside(model: TransformerBridge) -> Any:
    """What tells whether modules compute something else: what they hold, and their code."""
    inner = model.original_model
    versions = [_version(each) for each in inner.parameters()]
    modules = [module for _, module in all_modules(model)]
    held = [(id(module), state(module)) for module in modules]
    code = {type(module): getattr(type(module), "forward", None) for module in modules}
    config = getattr(inner, "config", None)
    return versions, held, code, _settings(config)


def state(module: nn.Module) -> Any:
    """What tells whether a module computes something else by its buffers or its settings."""
    buffers = {}
    for name, buffer in module._buffers.items():
        if buffer is not None:
            # A few numbers may be written to in every way; the others are masks and tables.
            is_small = buffer.numel() <= FEW
            buffers[name] = buffer.tolist() if is_small else _version(buffer)
    return buffers, _settings(module)


def _settings(owner: Any) -> dict[str, Any]:
    """The numbers and words that something holds."""
    values = {} if owner is None else dict(vars(owner))
    # Models are never run in training mode here.
    values.pop("training", None)
    kinds = int | float | str
    return {name: value for name, value in values.items() if isinstance(value, kinds)}


def _version(values: Tensor) -> tuple[int, int | None]:
    """What changes when a tensor is replaced or written to."""
    counted = None if values.is_inference() else values._version
    return id(values), counted


def hook_points(model: TransformerBridge) -> dict[str, HookPoint]:
    """Return the hook points that a run calls, by the names of activations."""
    found = {
        "hook_embed": _embedding_point(model),
        "hook_pos_embed": _point(model, "pos_embed.hook_out"),
        "unembed.hook_out": _point(model, "unembed.hook_out"),
    }
    for layer, block in enumerate(model.blocks):
        for name, path in POINTS.items():
            found[f"blocks.{layer}.{name}"] = _point(block, path)
    return {name: point for name, point in found.items() if point is not None}


def hooked(points: Mapping[str, HookPoint]) -> dict[str, HookPoint]:
    """Return those that have hooks of a user."""
    return {name: point for name, point in points.items() if any(hooks_on(point))}


def all_modules(model: TransformerBridge) -> Iterator[tuple[str, nn.Module]]:
    """Yield all modules once: of the bridge, and of the model that it wraps."""
    seen: set[nn.Module] = set()
    for owner in (model, model.original_model):
        for name, module in owner.named_modules():
            if module not in seen:
                seen.add(module)
                yield name, module


def problems(model: TransformerBridge) -> Iterator[str]:
    """Say why a bridge cannot be run as it is."""
    honoured = set(hook_points(model).values())
    for name, module in all_modules(model):
        if is_compiled(module):
            where = _called(name, module)
            yield f"{where} is compiled, and hooks do not reach into it; use it uncompiled"
        if module in honoured:
            continue
        if any(_is_users(hook) for hook in hooks_on(module)):
            yield (
                f"it has a hook at {_called(name, module)}, which the run of a circuit does not "
                "compute; put it at the output of a head (hook_z), an MLP (hook_mlp_out) or a "
                "layer, or remove it with reset_hooks()"
            )
        forward = vars(module).get("forward")
        if forward is not None and _is_users(forward):
            where = _called(name, module)
            yield f"it has another forward method at {where}; load the model anew"
    yield from _unusable_weights(model)


def _called(name: str, module: nn.Module) -> str:
    """What users call a module: hook points have a name that is not the place where they are."""
    known = module.name if isinstance(module, HookPoint) else None
    return known or name.replace(INNER, "") or WHOLE


def _is_users(function: Any) -> bool:
    """Whether a function is no library's own."""
    while (inner := _inside_of(function)) is not None:
        function = inner
    where = getattr(function, "__module__", None) or type(function).__module__
    return where.partition(".")[0] not in LIBRARIES


def _inside_of(function: Any) -> Any:
    """What a function calls that is the one that was given, as TransformerLens wraps hooks."""
    if isinstance(function, partial):
        return function.func
    code, cells = getattr(function, "__code__", None), getattr(function, "__closure__", None)
    held = dict(zip(code.co_freevars, cells, strict=True)) if code and cells else {}
    found = held.get("hook") or held.get("full_hook")
    return None if found is None else found.cell_contents


def _unusable_weights(model: TransformerBridge) -> Iterator[str]:
    first = next(model.original_model.parameters())
    for inner, parameter in model.original_model.named_parameters():
        name = inner.replace(INNER, "")
        if parameter.device.type == "meta":
            yield f"{name} is on the meta device, without values; load the weights"
        elif parameter.device != first.device:
            yield (
                f"{name} is on {parameter.device} and other weights are on {first.device}; "
                "circuits are found on one device, so load it with device= instead of device_map"
            )
        elif not parameter.dtype.is_floating_point:
            yield f"{name} is quantized ({parameter.dtype}); load the model in a plain type"
        elif parameter.dtype != first.dtype:
            yield (
                f"{name} is in {parameter.dtype} and other weights are in {first.dtype}; "
                f"use model.to({first.dtype})"
            )


def _embedding_point(model: TransformerBridge) -> HookPoint | None:
    has_norm = model._modules.get("embed_ln") is not None
    return _point(model, "embed_ln.hook_out" if has_norm else "embed.hook_out")


def _point(owner: Any, path: str) -> HookPoint | None:
    for name in path.split("."):
        owner = owner._modules.get(name)
        if owner is None:
            return None
    return owner


def through(point: HookPoint, name: str, activation: Tensor) -> Tensor:
    """Pass an activation through a bridge's hook point, in the layout that it has there."""
    if name.endswith(FLAT):
        heads = activation.shape[2:]
        return point(activation.flatten(2)).unflatten(-1, heads)
    changed = torch.as_tensor(point(activation))
    # In OPT what a hook returns is flattened, as the wrapped module wants it.
    is_whole = changed.numel() == activation.numel()
    return changed.view(activation.shape) if is_whole else changed
