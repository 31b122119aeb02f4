"""Saving transcoders as PLT or CLT safetensors files with a config.yaml."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch
import yaml

from circuits.system.arguments import checked_arguments
from circuits.system.errors import InputError
from circuits.system.files import path_of, tensor_file, with_digest, write_bytes
from circuits.transcoders.activations import JumpReLU
from circuits.transcoders.io.config_yaml import CLT_KIND, CONFIG, MEANINGS, PLT_KIND, UNFINISHED
from circuits.transcoders.io.formats import CLT, PLT, Format
from circuits.transcoders.io.layer_files import DECODER, ENCODER, PER_LAYER
from circuits.transcoders.io.tensor_files import PICKLES, WEIGHTS, Tensors, copied
from circuits.transcoders.transcoder import Transcoders, check_is_transcoders

Files = dict[str, Tensors]
Config = dict[str, Any]


@checked_arguments
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
    check_is_transcoders(transcoders)
    transcoders.check()
    folder = path_of(folder)
    config = _config(transcoders, model_name)
    files: Files = {}
    for layer in range(transcoders.n_layers):
        files |= _layer_files(transcoders, layer)
    _check_folder(folder, files)
    # The config.yaml is finished last, so that old and new layers are never taken for one set.
    _write_config(folder, {"model_kind": UNFINISHED})
    for file, tensors in files.items():
        # safetensors refuses tensors that share memory, so each is copied.
        stored = {name: copied(tensor, "cpu", dtype) for name, tensor in tensors.items()}
        write_bytes(folder / file, tensor_file(stored, {}))
    _write_config(folder, config)
    return folder


def _layer_files(transcoders: Transcoders, layer: int) -> Files:
    # The files of a layer, each with its tensors by name.
    decoder = transcoders.decoders[layer]
    format = CLT if transcoders.cross_layer else PLT
    tensors: Tensors = {}
    for part, tensor in _parts(transcoders, layer, format).items():
        tensors[format.tensor(part, layer)] = tensor
    decoder_name = format.tensor("decoder", layer)
    if format is PLT:
        tensors[decoder_name] = decoder[:, 0]
        return {PER_LAYER.format(layer): tensors}
    return {ENCODER.format(layer): tensors, DECODER.format(layer): {decoder_name: decoder}}


def _parts(transcoders: Transcoders, layer: int, format: Format) -> Tensors:
    # All parts but the decoder.
    encoder = transcoders.encoders[layer]
    parts = {
        "encoder": encoder.weight,
        "bias": encoder.bias,
        "decoder_bias": transcoders.decoder_biases[layer],
    }
    if isinstance(encoder.activation, JumpReLU):
        parts["threshold"] = encoder.activation.threshold
    if transcoders.skips is not None:
        skip = transcoders.skips[layer]
        is_transposed = "skip" in format.transposed
        parts["skip"] = skip.T if is_transposed else skip
    return parts


def _config(transcoders: Transcoders, model_name: str) -> Config:
    first, *others = (encoder.activation for encoder in transcoders.encoders)
    for layer, activation in enumerate(others, start=1):
        # All thresholds of JumpReLU are one text, and each k is another.
        if str(activation) != str(first):
            raise InputError(
                f"{transcoders.name}: features of layer 0 fire by {first} and those of layer "
                f"{layer} by {activation}; the formats have one activation for all layers."
            )
    config = {
        "model_kind": CLT_KIND if transcoders.cross_layer else PLT_KIND,
        "model_name": model_name,
        "feature_input_hook": _value("feature_input_hook", transcoders.reads),
        "feature_output_hook": _value("feature_output_hook", transcoders.writes),
        "activation": first.name,
        "k": getattr(first, "k", None),
        "n_layers": transcoders.n_layers,
    }
    return {key: value for key, value in config.items() if value}


def _value(key: str, meaning: str) -> str:
    # The first value with a meaning.
    known = MEANINGS[key].items()
    return next(value for value, means in known if means == meaning)


def _write_config(folder: Path, config: Config) -> None:
    stated = with_digest(config, {})
    text = yaml.safe_dump(stated, sort_keys=False)
    write_bytes(folder / CONFIG, text.encode())


def _check_folder(folder: Path, own: Collection[str]) -> None:
    # Refuse a folder with other weights, which could be taken for layers of this set.
    if folder.exists() and not folder.is_dir():
        raise InputError(f"{folder} is a file; give a folder.")
    for file in sorted(folder.glob("*")):
        if file.suffix in (*WEIGHTS, *PICKLES) and file.name not in own:
            raise InputError(
                f"{folder} holds {file.name}, which is not of this set; give an empty folder."
            )
