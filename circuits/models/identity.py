"""Fingerprints: which model a graph was made from, and what a model computes as it is now."""

from __future__ import annotations

import functools
import hashlib
import json
import warnings
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor, nn
from torch.nn.modules import module as every_module
from transformer_lens.config import TransformerLensConfig
from transformers import PreTrainedTokenizerFast

from circuits.graph.graph import Graph, check_is_graph
from circuits.graph.identity import ModelIdentity
from circuits.models.changes import HOOKS, Own, turn
from circuits.models.loading import Model, check_class
from circuits.models.overflow import check_weights
from circuits.system.code_digest import stand_in
from circuits.system.errors import InputError
from circuits.system.tensors import plain_tensor

# Prefixes of settings that change no logit: hook flags, where a model is, where it came from.
NOT_ARCHITECTURE = (
    "use_attn_result", "use_attn_in", "use_split_qkv_input", "use_hook_mlp_in", "use_hook_tokens",
    "ungroup_grouped_query_attention", "model_name", "original_architecture", "n_params", "dtype",
    "device", "n_devices", "seed", "init_", "load_", "tokenizer", "default_prepend_bos",
    "checkpoint", "from_checkpoint", "trust_remote_code",
)  # fmt: skip

SHAPE = (
    "n_layers", "n_heads", "n_key_value_heads", "d_model", "d_head", "d_mlp", "d_vocab",
    "attn_only", "parallel_attn_mlp",
)  # fmt: skip

# What torch keeps in every module, and what TransformerLens notes down in its own.
Parts = tuple[Any, ...]
OF_TORCH = {*vars(nn.Module()), "_compiled_call_impl"}
OF_LENS = {
    "mod_dict", "hook_dict", "fwd_hooks", "bwd_hooks", "is_caching", "context_level", "dataset",
    "tokenizer", "alibi",
}  # fmt: skip

# What a tokenizer notes down about its calls, and about the files it was loaded from.
OF_TOKENIZERS = {
    "_tokenizer", "deprecation_warnings", "_in_target_context_manager", "verbose",
    "init_inputs", "init_kwargs", "name_or_path", "files_loaded",
}  # fmt: skip

# The fingerprint of a parameter has one number for so many of its bits, 16 at a time.
BLOCK = 1024
# So many blocks at a time, to stay in a processor's cache.
AT_A_TIME = 1024


def check_fits(model: Model, graph: Graph) -> None:
    """Refuse a graph made from a model of another shape; warn when only the weights differ."""
    check_is_graph(graph)
    if graph.model is None:
        return
    here, there = identity(model), graph.model
    differences = []
    # A graph that was made without a model has the sizes that decide which edges there are.
    for name, size in there.shape.items():
        if here.shape.get(name) != size:
            differences.append(f"{name} {size} there, {here.shape.get(name)} here")
    if differences:
        raise InputError(
            f"this circuit belongs to {there.name!r}, a model of another shape "
            f"({'; '.join(differences)}); load that model, or discover a circuit in this one."
        )
    if there.weights and here.weights != there.weights:
        warnings.warn(
            f"this circuit was found in {there.name!r} with other weights than this model has.",
            stacklevel=4,
        )


def identity(model: Model) -> ModelIdentity:
    """Return the model's name, its shape, and a fingerprint of its weights and architecture."""
    check_class(model)
    check_weights(model)
    # The fingerprint is the same on every device and whatever hook flags are set.
    architecture = _architecture(model.cfg).encode()
    digest = hashlib.blake2b(architecture, digest_size=16)
    # Sorted, so that the order of parameters does not matter.
    for name, parameter in sorted(model.named_parameters()):
        digest.update(f"{name} {tuple(parameter.shape)} {parameter.dtype}".encode())
        digest.update(checksum(parameter.detach()))
    name = str(model.cfg.model_name)
    return ModelIdentity(name, shape_of(model), digest.hexdigest())


def shape_of(model: Model) -> dict[str, Any]:
    """Return what makes circuits of one model meaningless in another."""
    return {name: getattr(model.cfg, name) for name in SHAPE}


@stand_in.register(Model)
def _computed_by(model: Model) -> dict[str, Any]:
    """All that decides what a model computes: its weights, and what is in and on its modules."""
    with turn(model):
        parts = {name: _values_and_hooks(module) for name, module in model.named_modules()}
        on_all = _hooks(every_module, "_global")
    weights = identity(model).weights
    return {"weights": weights, "all modules": on_all, **parts}


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
    return type(module), values, buffers, _hooks(module)


def _told(buffer: Tensor) -> Any:
    try:
        return str(buffer.dtype), tuple(buffer.shape), checksum(buffer)
    except (RuntimeError, NotImplementedError, TypeError, KeyError):
        # One without values, such as on "meta", is named where the digest meets it.
        return buffer


@stand_in.register(PreTrainedTokenizerFast)
def _tokenized_by(tokenizer: PreTrainedTokenizerFast) -> Parts:
    """What a tokenizer makes of a text, without what each call sets anew."""
    settings = json.loads(tokenizer.backend_tokenizer.to_str())
    del settings["padding"], settings["truncation"]
    held = dict(vars(tokenizer))
    for name in OF_TOKENIZERS:
        held.pop(name, None)
    return json.dumps(settings), held


def _hooks(owner: Any, prefix: str = "") -> dict[str, tuple[Any, ...]]:
    found = {}
    for kind in HOOKS:
        registered = getattr(owner, prefix + kind).values()
        if hooks := tuple(hook for hook in registered if not isinstance(hook, Own)):
            found[kind] = hooks
    return found


@stand_in.register(TransformerLensConfig)
def _architecture(cfg: TransformerLensConfig) -> str:
    """The settings that change logits, in an order that does not depend on the model's."""
    settings = vars(cfg)
    texts = {}
    for name in sorted(settings):
        if not name.startswith(NOT_ARCHITECTURE):
            texts[name] = str(settings[name])
    return json.dumps(texts)


def checksum(parameter: Tensor) -> bytes:
    """Return weighted integer sums over blocks of a parameter's bits.

    The sums depend on every bit and its place, but not on the device or the order of summation:
    they wrap around in 32 bits, which is exact in any order.
    """
    values = plain_tensor(parameter).contiguous().flatten()
    size = values.element_size()
    bits = values.view(torch.int8 if size == 1 else torch.int16)
    n_blocks = len(bits) // BLOCK
    blocks, rest = bits.tensor_split([n_blocks * BLOCK])
    # sum_j w_j b_ij, with odd random w_j, so that a one in another column is another sum.
    weights = _odd_numbers().to(bits.device)
    parts = blocks.view(-1, BLOCK).split(AT_A_TIME)
    sums = [(part * weights).sum(1, dtype=torch.int32) for part in parts]
    sums.append(rest.int())
    return _bytes(torch.cat(sums))


@functools.cache
def _odd_numbers() -> Int[Tensor, " block"]:
    numbers = bytearray(hashlib.shake_128(b"checksum").digest(4 * BLOCK))
    return torch.frombuffer(numbers, dtype=torch.int32) | 1


def _bytes(values: Tensor) -> bytes:
    return values.cpu().numpy().tobytes()
