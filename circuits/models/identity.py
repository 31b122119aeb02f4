"""Fingerprints: which model a graph was made from."""

from __future__ import annotations

import hashlib
import json
import warnings

import torch
from torch import Tensor

from circuits.graph.graph import Graph
from circuits.graph.identity import ModelIdentity
from circuits.models import Model
from circuits.system.errors import InputError

# Settings that change no logit: flags of hooks, where a model is and where it came from.
NOT_ARCHITECTURE = (
    "use_attn_result", "use_attn_in", "use_split_qkv_input", "use_hook_mlp_in", "ungroup_grouped_query_attention", "use_hook_tokens", "model_name",
    "device", "n_devices", "seed", "init_", "tokenizer", "default_prepend_bos", "checkpoint", "from_checkpoint", "n_params", "trust_remote_code",
    "original_architecture", "load_", "dtype",
)  # fmt: skip


SHAPE = (
    "n_layers",
    "n_heads",
    "n_key_value_heads",
    "d_model",
    "d_head",
    "d_mlp",
    "d_vocab",
    "attn_only",
    "parallel_attn_mlp",
)


# Of parameters with at most so many numbers the fingerprint takes the bits as they are.
SMALL = 1 << 12


def check_fits(model: Model, graph: Graph) -> None:
    """Refuse a graph made from a model of another shape; warn when only the weights differ.

    Raises:
        InputError: the shapes differ.
    """
    if graph.model is None:
        return
    here = identity(model)
    differences = [
        f"{name} {graph.model.shape.get(name)} there, {size} here"
        for name, size in here.shape.items()
        if graph.model.shape.get(name) != size
    ]
    if differences:
        raise InputError(
            f"this circuit belongs to {graph.model.name!r}, a model of another shape ({'; '.join(differences)}); "
            "load that model, or discover a circuit in this one."
        )
    if here.weights != graph.model.weights:
        warnings.warn(
            f"this circuit was found in {graph.model.name!r} with other weights than the model at hand has.",
            stacklevel=4,
        )


def identity(model: Model) -> ModelIdentity:
    """The model's name, shape and a fingerprint of its weights and architecture (equal on every device, and whatever its hook flags)."""
    architecture = {
        name: str(value)
        for name, value in sorted(vars(model.cfg).items())
        if not name.startswith(NOT_ARCHITECTURE)
    }
    digest = hashlib.blake2b(json.dumps(architecture).encode(), digest_size=16)
    for name, parameter in sorted(model.named_parameters()):
        digest.update(f"{name} {tuple(parameter.shape)} {parameter.dtype}".encode())
        digest.update(checksum(parameter.detach()))
    shape = {name: getattr(model.cfg, name) for name in SHAPE}
    return ModelIdentity(str(model.cfg.model_name), shape, digest.hexdigest())


def checksum(parameter: Tensor) -> bytes:
    """The bits of small parameters; of others integer sums of them over rows and over columns.

    These depend on every bit and its place, not on device or order of summation. Sums wrap around in the width of the bits, which keeps
    them exact in any order and is twenty times faster than summing in 64 bits.
    """
    kind = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[parameter.element_size()]
    bits = (
        parameter.contiguous().view(kind).reshape(-1, parameter.shape[-1] if parameter.dim() else 1)
    )
    if bits.numel() <= SMALL:
        return bits.cpu().numpy().tobytes()
    if kind is torch.int16 and bits.shape[1] % 2 == 0:
        bits = bits.view(torch.int32)
    width = torch.int64 if kind is torch.int64 else torch.int32
    sums = [bits.sum(axis, dtype=width) for axis in (0, 1)]
    return b"".join(part.cpu().numpy().tobytes() for part in sums)
