"""Saving transcoders in the published formats: PLT or CLT safetensors with a config.yaml."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors.torch import save
from torch import Tensor

from circuits.system.errors import InputError
from circuits.system.files import write_bytes
from circuits.transcoders.activations import BatchTopK, JumpReLU, TopK
from circuits.transcoders.io.config_yaml import CONFIG, READS, UNFINISHED, WRITES
from circuits.transcoders.io.formats import THRESHOLD
from circuits.transcoders.io.tensor_files import PICKLES
from circuits.transcoders.transcoder import Transcoders


def save_transcoders(
    transcoders: Transcoders,
    folder: str | Path,
    *,
    model_name: str = "",
    dtype: torch.dtype | None = None,
) -> Path:
    """Write transcoders so that `load_transcoders(folder)` gives the same, and other tools that read these formats can use them.

    PLTs are written to layer_{i}.safetensors, CLTs to W_enc_{i}.safetensors and W_dec_{i}.safetensors, both with a config.yaml. Files of an
    earlier set of as many layers are replaced. A process that is killed leaves a folder that says it is unfinished and does not load.

    Args:
        folder: made if it is not there.
        model_name: of the model they are for, for config.yaml.
        dtype: to store weights in; None stores them as they are.

    Returns:
        The folder.

    Raises:
        InputError: parts do not fit together, layers fire differently, dtype is no floating-point type, or the folder holds other weights.
    """
    transcoders.check()
    if dtype is not None and not dtype.is_floating_point:
        raise InputError(
            f"weights cannot be of dtype {dtype}; use torch.float32, torch.bfloat16 or torch.float16."
        )
    folder, config = Path(folder), _config(transcoders, model_name)
    contents = _clt if transcoders.cross_layer else _plt
    _check_folder(folder, transcoders)
    # config.yaml is finished last: old and new layers side by side are never taken for a set.
    write_bytes(folder / CONFIG, _yaml({"model_kind": UNFINISHED}))
    for layer in range(transcoders.n_layers):
        for name, tensors in contents(transcoders, layer).items():
            write_bytes(
                folder / name,
                save({key: _stored(tensor, dtype) for key, tensor in tensors.items()}),
            )
    write_bytes(folder / CONFIG, _yaml(config))
    return folder


def _plt(transcoders: Transcoders, layer: int) -> dict[str, dict[str, Tensor]]:
    """The file of a layer."""
    encoder = transcoders.encoders[layer]
    tensors = {
        "W_enc": encoder.weight,
        "W_dec": transcoders.decoders[layer][:, 0],
        "b_enc": encoder.bias,
        "b_dec": transcoders.decoder_biases[layer],
    }
    if isinstance(encoder.activation, JumpReLU):
        tensors[THRESHOLD] = encoder.activation.threshold
    if transcoders.skips is not None:
        tensors["W_skip"] = transcoders.skips[layer]
    return {f"layer_{layer}.safetensors": tensors}


def _clt(transcoders: Transcoders, layer: int) -> dict[str, dict[str, Tensor]]:
    """The two files of a layer."""
    encoder = transcoders.encoders[layer]
    tensors = {
        f"W_enc_{layer}": encoder.weight,
        f"b_enc_{layer}": encoder.bias,
        f"b_dec_{layer}": transcoders.decoder_biases[layer],
    }
    if isinstance(encoder.activation, JumpReLU):
        tensors[f"threshold_{layer}"] = encoder.activation.threshold
    if transcoders.skips is not None:
        tensors[f"W_skip_{layer}"] = transcoders.skips[
            layer
        ].T  # in this format x @ W_skip is added, and not its transpose
    decoder = {f"W_dec_{layer}": transcoders.decoders[layer]}
    return {f"W_enc_{layer}.safetensors": tensors, f"W_dec_{layer}.safetensors": decoder}


def _stored(tensor: Tensor, dtype: torch.dtype | None) -> Tensor:
    """A copy of its own, as safetensors refuses tensors that share memory."""
    return torch.empty(tensor.shape, dtype=dtype or tensor.dtype).copy_(tensor.detach())


def _config(transcoders: Transcoders, model_name: str) -> dict[str, Any]:
    fires = [(encoder.activation.name, _k(encoder.activation)) for encoder in transcoders.encoders]
    if unlike := [layer for layer, one in enumerate(fires) if one != fires[0]]:
        raise InputError(
            f"{transcoders.name}: features of layer 0 fire by {_told(fires[0])} and those of layer {unlike[0]} by {_told(fires[unlike[0]])}, "
            "which these formats cannot say; save sets with one activation."
        )
    name, k = fires[0]
    return {
        "model_kind": "cross_layer_transcoder" if transcoders.cross_layer else "transcoder_set",
        **({"model_name": model_name} if model_name else {}),
        "feature_input_hook": next(
            hook for hook, reads in READS.items() if reads == transcoders.reads
        ),
        "feature_output_hook": next(
            hook for hook, writes in WRITES.items() if writes == transcoders.writes
        ),
        "activation": name,
        **({} if k is None else {"k": k}),
    }


def _k(activation: object) -> int | None:
    return activation.k if isinstance(activation, TopK | BatchTopK) else None


def _told(fires: tuple[str, int | None]) -> str:
    return fires[0] if fires[1] is None else f"{fires[0]} with k={fires[1]}"


def _yaml(config: Mapping[str, Any]) -> bytes:
    return yaml.safe_dump(dict(config), sort_keys=False).encode()


def _check_folder(folder: Path, transcoders: Transcoders) -> None:
    """Refuse a folder with weights that would stay beside the new ones: they could be taken for layers of this set."""
    if folder.exists() and not folder.is_dir():
        raise InputError(f"{folder} is a file; give a folder.")
    contents = _clt if transcoders.cross_layer else _plt
    mine = {name for layer in range(transcoders.n_layers) for name in contents(transcoders, layer)}
    weights = (
        file.name
        for file in sorted(folder.glob("*"))
        if file.suffix in (".safetensors", ".npz", *PICKLES)
    )
    if other := [name for name in weights if name not in mine]:
        raise InputError(
            f"{folder} holds {other[0]}, which is not of this set; give an empty folder, or remove it."
        )
