"""Saving transcoders as PLT or CLT safetensors files with a config.yaml."""

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
from circuits.transcoders.activations import JumpReLU
from circuits.transcoders.io.config_yaml import CONFIG, CROSS_LAYER, READS, UNFINISHED, WRITES
from circuits.transcoders.io.formats import THRESHOLD
from circuits.transcoders.io.tensor_files import PICKLES, WEIGHTS, check_weight_dtype
from circuits.transcoders.transcoder import Transcoders


def save_transcoders(
    transcoders: Transcoders,
    folder: str | Path,
    *,
    model_name: str = "",
    dtype: torch.dtype | None = None,
) -> Path:
    """Write transcoders to a folder, for `load_transcoders` and other tools that read the formats.

    A PLT is written to layer_{i}.safetensors, a CLT to W_enc_{i}.safetensors and
    W_dec_{i}.safetensors, both with a config.yaml. Files of an earlier set with as many layers are
    replaced. If the process is killed, the folder says that it is unfinished and does not load.

    Args:
        folder: is created if it does not exist.
        model_name: name of the model they are for, for config.yaml.
        dtype: precision of the stored weights; None stores them as they are.

    Returns:
        The folder.

    Raises:
        InputError: parts do not fit together; layers have different activation functions; the
            dtype is not a floating-point type; or the folder holds other weights.

    Example:
        >>> import circuits, tempfile
        >>> transcoders = circuits.load_transcoders("toy-world-plt")
        >>> folder = circuits.save_transcoders(transcoders, tempfile.mkdtemp())
        >>> circuits.load_transcoders(folder).identity.weights == transcoders.identity.weights
        True
    """
    transcoders.check()
    check_weight_dtype(dtype)
    folder = Path(folder)
    config = _config(transcoders, model_name)
    _check_folder(folder, transcoders)
    # The config.yaml is finished last, so that old and new layers are never taken for one set.
    _write_config(folder, {"model_kind": UNFINISHED})
    for layer in range(transcoders.n_layers):
        for file, tensors in _layer_files(transcoders, layer).items():
            stored = {name: _copy(tensor, dtype) for name, tensor in tensors.items()}
            write_bytes(folder / file, save(stored))
    _write_config(folder, config)
    return folder


def _layer_files(transcoders: Transcoders, layer: int) -> dict[str, dict[str, Tensor]]:
    # The files of a layer, each with its tensors by name.
    cross_layer, encoder = transcoders.cross_layer, transcoders.encoders[layer]
    tensors = {
        "W_enc": encoder.weight,
        "b_enc": encoder.bias,
        "b_dec": transcoders.decoder_biases[layer],
    }
    if isinstance(encoder.activation, JumpReLU):
        name = "threshold" if cross_layer else THRESHOLD
        tensors[name] = encoder.activation.threshold
    if transcoders.skips is not None:
        skip = transcoders.skips[layer]
        # A CLT file adds x @ W_skip, a PLT file x @ W_skip.T.
        tensors["W_skip"] = skip.T if cross_layer else skip
    decoder = transcoders.decoders[layer]
    if not cross_layer:
        tensors["W_dec"] = decoder[:, 0]
        return {f"layer_{layer}.safetensors": tensors}
    numbered = {f"{name}_{layer}": tensor for name, tensor in tensors.items()}
    return {
        f"W_enc_{layer}.safetensors": numbered,
        f"W_dec_{layer}.safetensors": {f"W_dec_{layer}": decoder},
    }


def _copy(tensor: Tensor, dtype: torch.dtype | None) -> Tensor:
    # safetensors refuses tensors that share memory, so each is copied.
    copy = torch.empty(tensor.shape, dtype=dtype or tensor.dtype)
    return copy.copy_(tensor.detach())


def _config(transcoders: Transcoders, model_name: str) -> dict[str, Any]:
    activations = [encoder.activation for encoder in transcoders.encoders]
    for layer, activation in enumerate(activations):
        if str(activation) != str(activations[0]):
            raise InputError(
                f"{transcoders.name}: features of layer 0 fire by {activations[0]} and those of "
                f"layer {layer} by {activation}; the formats have one activation for all layers."
            )
    config = {
        "model_kind": _key(CROSS_LAYER, transcoders.cross_layer),
        "model_name": model_name,
        "feature_input_hook": _key(READS, transcoders.reads),
        "feature_output_hook": _key(WRITES, transcoders.writes),
        "activation": activations[0].name,
        "k": getattr(activations[0], "k", None),
    }
    return {key: value for key, value in config.items() if value}


def _key(meanings: Mapping[str, Any], meaning: object) -> str:
    # The first spelling of a meaning.
    return next(key for key in meanings if meanings[key] == meaning)


def _write_config(folder: Path, config: Mapping[str, Any]) -> None:
    text = yaml.safe_dump(dict(config), sort_keys=False)
    write_bytes(folder / CONFIG, text.encode())


def _check_folder(folder: Path, transcoders: Transcoders) -> None:
    # Refuse a folder with other weights, which could be taken for layers of this set.
    if folder.exists() and not folder.is_dir():
        raise InputError(f"{folder} is a file; give a folder.")
    own = [
        name for layer in range(transcoders.n_layers) for name in _layer_files(transcoders, layer)
    ]
    for file in sorted(folder.glob("*")):
        if file.suffix in (*WEIGHTS, *PICKLES) and file.name not in own:
            raise InputError(
                f"{folder} holds {file.name}, which is not of this set; give an empty folder."
            )
