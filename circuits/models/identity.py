"""Fingerprints: which model a graph was made from, and what a model computes as it is now."""

from __future__ import annotations

import functools
import hashlib
import json
import warnings
from collections.abc import Iterator
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor, nn
from torch.nn.modules import module as every_module
from transformer_lens.config import TransformerLensConfig
from transformers import PreTrainedTokenizerFast

from circuits.graph.edges import SLOTS
from circuits.graph.graph import Graph, check_is_graph
from circuits.graph.identity import ModelIdentity
from circuits.models.backend import Model, backend, shape_of
from circuits.models.changes import Own, hooks_by_kind, turn
from circuits.models.hook_points import NORMS
from circuits.models.layers.functional import AttentionSettings, NormWeights, WeightedMLP
from circuits.models.layers.weights import ModelWeights
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

# What torch keeps in every module, and what TransformerLens notes down in its own.
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


# Fingerprints of this version begin with it. Those of the first, without a version, covered the
# parameters and settings of a HookedTransformer by TransformerLens' names.
VERSION = "2:"
# Where activation functions are told apart, and how far from each other they must be.
MLP_WEIGHTS = (
    "weight_in", "bias_in", "weight_gate", "weight_out", "bias_out", "bias_gate", "bias_linear",
)  # fmt: skip
PROBES = (-3.1, -1.3, -0.4, 0.7, 2.3)
DIGITS = 4

Named = Iterator[tuple[str, Tensor | None]]


def check_fits(model: Model, graph: Graph) -> None:
    """Refuse a graph made from a model of another shape; warn when only the weights differ."""
    check_is_graph(graph)
    if graph.model is None:
        return
    here, there = shape_of(model).comparable(), graph.model
    differences = []
    # A graph that was made without a model has the sizes that decide which edges there are.
    for name, size in there.shape.items():
        if here.get(name) != size:
            differences.append(f"{name} {size} there, {here.get(name)} here")
    if differences:
        raise InputError(
            f"this circuit belongs to {there.name!r}, a model of another shape "
            f"({'; '.join(differences)}); load that model, or discover a circuit in this one."
        )
    if not has_weights(model, there):
        warnings.warn(
            f"this circuit was found in {there.name!r} with other weights than this model has.",
            stacklevel=4,
        )


def has_weights(model: Model, there: ModelIdentity) -> bool:
    """Whether a model has these weights, as far as is known."""
    fingerprint = there.weights
    if not fingerprint:
        return True
    if fingerprint.startswith(VERSION):
        return identity(model).weights == fingerprint
    first = backend(model).first_fingerprint()
    return first is None or first == fingerprint


def identity(model: Model) -> ModelIdentity:
    """Return the model's name, its shape, and a fingerprint of its weights and architecture.

    The fingerprint does not depend on the model's class, device or hooks.
    """
    check_weights(model)
    found = backend(model)
    shape = found.shape
    kinds: list[Any] = [shape.comparable(), shape.causal]
    weights = found.weights
    try:
        settings, named = [*kinds, *_settings(weights)], list(_named(weights))
    # Parts that a user has replaced may lack the weights that are looked for, and raise anything.
    except Exception:
        settings, named = kinds, sorted(found.parameters().items())
    digest = hashlib.blake2b(json.dumps(settings).encode(), digest_size=16)
    for name, tensor in named:
        if tensor is not None:
            digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
            digest.update(checksum(tensor.detach()))
    return ModelIdentity(shape.model_name, shape.comparable(), VERSION + digest.hexdigest())


def _named(weights: ModelWeights) -> Named:
    """All weights, in a layout that does not depend on the class of the model."""
    yield "W_E", weights.embedding()
    yield "W_pos", weights.position_embedding()
    for layer in range(weights.shape.n_layers):
        for name, tensor in _of_layer(weights, layer):
            yield f"{layer} {name}", tensor
    unembedding = weights.unembedding()
    yield from _of_norm(weights.norm(None, "ln_final"), "ln_final")
    yield "W_U", unembedding.weight
    yield "b_U", unembedding.bias


def _of_layer(weights: ModelWeights, layer: int) -> Named:
    for name in NORMS:
        yield from _of_norm(weights.norm(layer, name), name)
    for slot in SLOTS:
        yield f"W_{slot}", weights.projection(layer, slot)
        yield f"b_{slot}", weights.projection_bias(layer, slot)
    yield "W_O", weights.output_projection(layer)
    yield "b_O", weights.output_bias(layer)
    settings = weights.attention_settings(layer) or AttentionSettings(scale=1.0)
    for slot, norm in settings.norms.items():
        yield from _of_norm(norm, f"{slot}_norm")
    yield "sinks", settings.sinks
    if weights.shape.attn_only:
        return
    mlp = weights.feed_forward(layer)
    if not isinstance(mlp, WeightedMLP):
        yield from sorted(weights.mlp_parameters(layer).items())
        return
    for name in MLP_WEIGHTS:
        yield name, getattr(mlp, name)


def _of_norm(norm: Any, name: str) -> Named:
    if isinstance(norm, NormWeights):
        yield f"{name}.w", norm.weight
        yield f"{name}.b", norm.bias


def _settings(weights: ModelWeights) -> Iterator[Any]:
    """Numbers that tell what else decides what a model computes, rounded."""
    for layer in range(weights.shape.n_layers):
        settings = weights.attention_settings(layer)
        yield None if settings is None else _told_apart(settings)
        if not weights.shape.attn_only and isinstance(weights.feed_forward(layer), WeightedMLP):
            points = torch.tensor(PROBES, device=weights.shape.device)
            activation = weights.stated_activation(layer)
            # That of Apertus has parameters.
            yield _rounded(activation(points).detach())
        for name in NORMS:
            yield _of_norm_kind(weights, weights.norm(layer, name))
    yield _of_norm_kind(weights, weights.norm(None, "ln_final"))
    unembedding = weights.unembedding()
    yield _rounded([unembedding.soft_cap, unembedding.scale])


def _of_norm_kind(weights: ModelWeights, norm: NormWeights | None) -> list[Any]:
    return [] if norm is None else [norm.centres, f"{weights.stated_eps(norm):.2e}"]


def _told_apart(settings: AttentionSettings) -> list[Any]:
    turned = settings.rotation
    angles: list[Any] = []
    if turned is not None:
        # The mean cosine at a position tells the frequencies, and their number the width.
        position = min(7, len(turned.cos) - 1)
        angles = [round(float(turned.cos[position].float().mean()), DIGITS), turned.adjacent]
    clip = settings.clip or 0
    numbers = [settings.scale, settings.soft_cap, clip, settings.reach, *settings.slopes.tolist()]
    return [*_rounded(numbers), settings.causal, *angles]


def _rounded(numbers: Any) -> list[float]:
    return [round(float(number), DIGITS) for number in numbers]


@stand_in.register(Model)
def _computed_by(model: Model) -> dict[str, Any]:
    """All that decides what a model computes: its weights, and what is in and on its modules."""
    with turn(model):
        parts = backend(model).computed()
        on_all = hooks_by_kind(every_module, "_global")
    return {"weights": identity(model).weights, "all modules": on_all, **parts}


@stand_in.register(nn.Module)
def _held_by(module: nn.Module) -> Any:
    if type(module).__module__.startswith("torch._dynamo."):
        # Compiled, with what the compiler notes down.
        return module._modules["_orig_mod"]
    parts = module._parameters, module._modules
    return values_and_hooks(module), module.training, *parts


def values_and_hooks(module: nn.Module) -> tuple[Any, ...]:
    """Return the class of a module, and what it holds that is not this package's."""
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
def architecture(cfg: TransformerLensConfig) -> str:
    """Return the settings that change logits, in an order that does not depend on the model's."""
    settings = vars(cfg)
    texts = {}
    for name in sorted(settings):
        if not name.startswith(NOT_ARCHITECTURE):
            texts[name] = str(settings[name])
    return json.dumps(texts)


@stand_in.register(PreTrainedTokenizerFast)
def _tokenized_by(tokenizer: PreTrainedTokenizerFast) -> tuple[Any, ...]:
    """What a tokenizer makes of a text, without what each call sets anew."""
    settings = json.loads(tokenizer.backend_tokenizer.to_str())
    del settings["padding"], settings["truncation"]
    held = dict(vars(tokenizer))
    for name in OF_TOKENIZERS:
        held.pop(name, None)
    return json.dumps(settings), held


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
