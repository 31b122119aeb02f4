"""What a user has changed on a HookedTransformer."""

from __future__ import annotations

import re
from collections.abc import Iterator
from itertools import chain
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, nn
from transformer_lens import HookedTransformer, components
from transformer_lens.hook_points import HookPoint
from transformer_lens.utilities.activation_functions import SUPPORTED_ACTIVATIONS

from circuits.models.backend import Changes
from circuits.models.changes import A_HOOK, HOOKS, WHOLE, Own, because, hooks_on, is_compiled
from circuits.models.hooked_transformer.patches import (
    RUN,
    is_library_function,
    looked_up,
    patched_members,
    patches,
)
from circuits.system.errors import InputError

# Here TransformerLens copies what nodes read or write, if flags say so. Edges are ablated here,
# with flags of our own, so a user's hook would act in some runs and not in others.
FLAGGED_POINTS = (
    "hook_q_input", "hook_k_input", "hook_v_input", "hook_attn_in", "hook_mlp_in", "hook_result",
)  # fmt: skip
NORM_TYPES: dict[str, type[nn.Module]] = {
    "LN": components.LayerNorm,
    "LNPre": components.LayerNormPre,
    "RMS": components.RMSNorm,
    "RMSPre": components.RMSNormPre,
}
# What attention scores of later tokens are set to; up to this, softmax gives them nothing.
LARGEST_MASKED = -1e4

Modules = dict[str, nn.Module]


def changes(model: HookedTransformer) -> Changes:
    """Describe what a model has that TransformerLens does not build from its settings."""
    found = {}
    expected, settings = _expected_modules(model), own_settings(model)
    kinds = {type(model)}
    for name, module in model.named_modules():
        place = _in_any_layer(name)
        if other := _other_module(module, place, expected):
            found[name] = other
            continue
        if place in expected:
            kinds.add(type(module))
        if change := _change_of(module):
            found[name or WHOLE] = change
        elif other := _other_values(module, expected.get(place)):
            found[name] = other
        elif settings.get(name, model.cfg) != model.cfg:
            found[name] = "other settings"
    for kind in kinds:
        found |= patches(kind)
    return found


def own_settings(model: HookedTransformer) -> dict[str, Any]:
    """Return the settings of the modules that do not share those of the model, by their names."""
    found = {name: getattr(module, "cfg", None) for name, module in model.named_modules()}
    return {
        name: cfg
        for name, cfg in found.items()
        if isinstance(cfg, type(model.cfg)) and cfg is not model.cfg
    }


def part_of(model: HookedTransformer, name: str) -> Any:
    """Return a module or a weight by its full name; a model that has it elsewhere is refused."""
    try:
        return attrgetter(name)(model)
    except AttributeError as error:
        raise InputError(
            f"{model.cfg.model_name} has no {name}{because(model)}; give the new module what it "
            "replaces under the same names, as a subclass has, or change its forward method."
        ) from error


def is_changed(module: nn.Module, expected: type) -> bool:
    """Whether a module is of another type than expected, or has been changed inside."""
    if type(module) is not expected:
        return True
    parts = list(module.modules())
    kinds = {type(each) for each in parts}
    return any(map(_change_of, parts)) or any(map(patches, kinds))


def last_step_changed(model: HookedTransformer) -> bool:
    """Whether the final norm or the unembedding has been changed."""
    last: list[nn.Module] = [model.unembed]
    if is_changed(model.unembed, components.Unembed):
        return True
    if model.cfg.normalization_type is not None:
        last.append(model.ln_final)
        if is_changed(model.ln_final, _final_norm_type(model)):
            return True
    # A bias or a norm's weight with more axes than one is another at every position.
    named_weights = (module.named_parameters() for module in last)
    weights = dict(chain(*named_weights))
    weights.pop("W_U", None)
    return any(weight.dim() > 1 for weight in weights.values())


def unusable_parts(model: HookedTransformer) -> Iterator[str]:
    """Say which of its parts keep it from being run."""
    new = {*vars(model), *patched_members(type(model))}
    own = [name for name in RUN if name in new]
    after = [name for name in HOOKS if name != "_forward_pre_hooks"]
    if own or any(hooks_on(model, names=after)):
        what = f"another {own[0]} method" if own else A_HOOK
        yield (
            f"it has {what} at {WHOLE}, and only scored tokens are run to the logits; put a hook "
            "at unembed.hook_out instead, or remove it"
        )
    names: dict[nn.Module, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        where = name or WHOLE
        if is_compiled(module):
            yield f"{where} is compiled, and hooks do not reach into it; use it uncompiled"
        if not isinstance(module, HookPoint):
            continue
        names.setdefault(module, []).append(name)
        if name.endswith(FLAGGED_POINTS) and any(hooks_on(module)):
            yield f"it has a hook at {name}, where edges are ablated; remove it with reset_hooks()"
    shared = [several for several in names.values() if len(several) > 1]
    # Where TransformerLens has no module of this name, it is no second place in a run.
    expected = _expected_modules(model) if shared else {}
    for several in shared:
        first, *others = [name for name in several if _in_any_layer(name) in expected] or [""]
        for name in others:
            yield (
                f"{name} and {first} are one module, so they cannot be told apart; "
                "give each layer modules of its own, as copy.deepcopy makes them"
            )


def unusable_weights(model: HookedTransformer) -> Iterator[str]:
    """Say which weights are not where, or what, its settings say."""
    cfg = model.cfg
    if len(model.blocks) != cfg.n_layers:
        has = f"it has {len(model.blocks)} layers and cfg.n_layers is {cfg.n_layers}"
        yield f"{has}; make them equal"
    expected = torch.device(cfg.device or "cpu")
    if expected == torch.device("cuda") and torch.cuda.is_available():
        expected = torch.device("cuda", torch.cuda.current_device())
    for name, parameter in model.named_parameters():
        device, dtype = parameter.device, parameter.dtype
        if device.type == "meta":
            yield f"{name} is on the meta device, without values; load the weights"
        elif cfg.device is None or (device != expected and cfg.n_devices == 1):
            yield f"{name} is on {device} and cfg.device is {cfg.device}; use model.to('{device}')"
        elif dtype != cfg.dtype and dtype.is_floating_point:
            yield (
                f"{name} is in {dtype} and cfg.dtype is {cfg.dtype}; use model.to({dtype}) or "
                f"model.to({cfg.dtype}), which set both"
            )


def _change_of(module: nn.Module) -> str | None:
    """A hook on a module, a function put in place of its own, or attention that masks nothing."""
    if any(hooks_on(module)):
        return A_HOOK
    for name, value in vars(module).items():
        if not callable(value) or isinstance(value, Own) or _is_activation(value):
            continue
        if name in looked_up(type(module)).names:
            return f"another {name} method"
    masked = module._buffers.get("IGNORE")
    if masked is not None and masked > LARGEST_MASKED:
        return f"IGNORE={float(masked):g}"
    return None


def _is_activation(value: object) -> bool:
    """Whether it is an activation that TransformerLens knows, which acts on each number alone."""
    known = any(value is each for each in SUPPORTED_ACTIVATIONS.values())
    return known and is_library_function(value)


def _other_module(module: nn.Module, place: str, expected: Modules) -> str | None:
    """A module of another class than TransformerLens builds, or where it builds none."""
    if place in expected:
        is_other = type(module) is not type(expected[place])
    else:
        # What is not looked up, as a probe that is kept in the model, is not run.
        parent, _, last = place.rpartition(".")
        if parent not in expected:
            return None
        is_other = last in looked_up(type(expected[parent])).names
    return f"a {type(module).__name__}" if is_other else None


def _other_values(module: nn.Module, expected: nn.Module | None) -> str | None:
    """Weights with more axes, or tensors for numbers, which may depend on the position."""
    if expected is None:
        return None
    for name, built in expected._parameters.items():
        given = module._parameters.get(name)
        if given is None or built is None:
            continue
        if given.dim() != built.dim():
            return f"{name} of shape {list(given.shape)}"
    for name, number in vars(expected).items():
        given = vars(module).get(name)
        if isinstance(number, int | float) and isinstance(given, Tensor):
            return f"a tensor as {name}"
    return None


def _in_any_layer(name: str) -> str:
    return re.sub(r"^blocks\.\d+", "block", name)


def _final_norm_type(model: HookedTransformer) -> type[nn.Module]:
    kind = str(model.cfg.normalization_type)
    if model.cfg.final_rms:
        kind = kind.replace("LN", "RMS")
    return NORM_TYPES[kind]


def _expected_modules(model: HookedTransformer) -> Modules:
    """Every module that TransformerLens builds, without weights; `block` stands for all layers."""
    cfg = model.cfg
    parts = {"embed": components.Embed, "unembed": components.Unembed}
    if cfg.positional_embedding_type == "standard":
        parts["pos_embed"] = components.PosEmbed
    if cfg.normalization_type is not None:
        parts["ln_final"] = _final_norm_type(model)
    # On this device modules take no memory and no random numbers.
    try:
        with torch.device("meta"):
            built = {name: kind(cfg) for name, kind in parts.items()}
            built["block"] = components.TransformerBlock(cfg, 0)
    # Its classes may have been changed in any way.
    except Exception as error:
        raise InputError(
            f"TransformerLens cannot build the modules of {cfg.model_name} any more "
            f"({type(error).__name__}: {str(error)[:80]!r}); undo what was changed in its classes "
            "or in model.cfg."
        ) from error
    expected: Modules = {"hook_embed": HookPoint(), "hook_pos_embed": HookPoint()}
    for part, whole in built.items():
        expected |= whole.named_modules(prefix=part)
    return expected
