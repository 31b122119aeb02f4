"""What a HookedTransformer computes, for digests, and the first version of its fingerprint."""

from __future__ import annotations

import hashlib
import json
from typing import Any

from torch import Tensor, nn
from transformer_lens import HookedTransformer
from transformer_lens.config import TransformerLensConfig

from circuits.models.changes import Own, hooks_by_kind
from circuits.models.identity import checksum
from circuits.system.code_digest import stand_in

# Prefixes of settings that change no logit: hook flags, where a model is, where it came from.
NOT_ARCHITECTURE = (
    "use_attn_result", "use_attn_in", "use_split_qkv_input", "use_hook_mlp_in", "use_hook_tokens",
    "ungroup_grouped_query_attention", "model_name", "original_architecture", "n_params", "dtype",
    "device", "n_devices", "seed", "init_", "load_", "tokenizer", "default_prepend_bos",
    "checkpoint", "from_checkpoint", "trust_remote_code",
)  # fmt: skip

# What torch keeps in every module, and what TransformerLens notes down in its own.
Parts = tuple[Any, ...]
OF_TORCH = {*vars(nn.Module()), "_compiled_call_impl"}
OF_LENS = {
    "mod_dict", "hook_dict", "fwd_hooks", "bwd_hooks", "is_caching", "context_level", "dataset",
    "tokenizer", "alibi",
}  # fmt: skip


def computed_by(model: HookedTransformer) -> dict[str, Any]:
    """All that is in and on its modules, but for their parameters."""
    return {name: _values_and_hooks(module) for name, module in model.named_modules()}


def first_fingerprint(model: HookedTransformer) -> str:
    """Return the fingerprint that the first version of this package wrote to files."""
    digest = hashlib.blake2b(_architecture(model.cfg).encode(), digest_size=16)
    # Sorted, so that the order of parameters does not matter.
    for name, parameter in sorted(model.named_parameters()):
        digest.update(f"{name} {tuple(parameter.shape)} {parameter.dtype}".encode())
        digest.update(checksum(parameter.detach()))
    return digest.hexdigest()


@stand_in.register(nn.Module)
def _held_by(module: nn.Module) -> Any:
    if type(module).__module__.startswith("torch._dynamo."):
        # Compiled, with what the compiler notes down.
        return module._modules["_orig_mod"]
    parts = module._parameters, module._modules
    return _values_and_hooks(module), module.training, *parts


def _values_and_hooks(module: nn.Module) -> Parts:
    """The class, attributes, buffers and hooks of a module, but for those of this package."""
    is_lens = type(module).__module__.startswith("transformer_lens.")
    noted = OF_TORCH | OF_LENS if is_lens else OF_TORCH
    values = {}
    for name, value in sorted(vars(module).items()):
        if name not in noted and not isinstance(value, Own):
            values[name] = value
    buffers = {}
    for name, buffer in module._buffers.items():
        # Masks and tables of positions can be large.
        buffers[name] = buffer if buffer is None else _told(buffer)
    return type(module), values, buffers, hooks_by_kind(module)


def _told(buffer: Tensor) -> Any:
    try:
        return str(buffer.dtype), tuple(buffer.shape), checksum(buffer)
    except (RuntimeError, NotImplementedError, TypeError, KeyError):
        # One without values, such as on "meta", is named where the digest meets it.
        return buffer


@stand_in.register(TransformerLensConfig)
def _architecture(cfg: TransformerLensConfig) -> str:
    """The settings that change logits, in an order that does not depend on the model's."""
    settings = vars(cfg)
    texts = {}
    for name in sorted(settings):
        if not name.startswith(NOT_ARCHITECTURE):
            texts[name] = str(settings[name])
    return json.dumps(texts)
