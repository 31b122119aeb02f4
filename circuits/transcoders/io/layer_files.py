"""Finding the files of each layer in a folder, by their names."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

from circuits.system.errors import InputError
from circuits.transcoders.io.config_yaml import TranscoderConfig
from circuits.transcoders.io.tensor_files import PICKLES, pickle_message

LayerFiles = Mapping[int, Sequence[Path]]
"""The file of each layer, or the two of a cross-layer transcoder: W_enc, then W_dec."""

EXPECTED = (
    "layer_0.safetensors ..., W_enc_0.safetensors with W_dec_0.safetensors ..., "
    "params_layer_0.safetensors ..., layer_0/.../params.npz"
)


def find_layer_files(folder: Path, config: TranscoderConfig) -> LayerFiles:
    """Find the files of each layer; if there are a PLT and a CLT, the config.yaml chooses."""
    per_layer = _by_layer(folder, "*.safetensors", r"(?:params_)?layer_(\d+)\.safetensors")
    encoders = _by_layer(folder, "*.safetensors", r"W_enc_(\d+)\.safetensors")
    decoders = _by_layer(folder, "*.safetensors", r"W_dec_(\d+)\.safetensors")
    if encoders and per_layer and config.cross_layer is None:
        raise InputError(
            f"{folder} holds both layer_*.safetensors and W_enc_*.safetensors; add model_kind to "
            "its config.yaml."
        )
    if encoders and (config.cross_layer or not per_layer):
        n_layers = max([*encoders, *decoders]) + 1
        encoder = _one_per_layer(folder, encoders, "W_enc_{}.safetensors", n_layers)
        decoder = _one_per_layer(folder, decoders, "W_dec_{}.safetensors", n_layers)
        return {layer: [encoder[layer], decoder[layer]] for layer in encoder}
    if decoders and not per_layer:
        raise InputError(f"{folder} holds W_dec_*.safetensors and no W_enc_*.safetensors; add it.")
    name = "layer_{}.safetensors"
    if not per_layer:
        name = "layer_{}"
        # layer_1/params.npz, layer_1_width_16k/average_l0_70/params.safetensors, ...
        nested = r"layer_(\d+)(?:\D[^/]*)?/(?:.*/)?params\.(?:npz|safetensors)"
        per_layer = _by_layer(folder, "layer_*/**/params.*", nested)
    if not per_layer:
        raise InputError(_nothing_found(folder))
    found = _one_per_layer(folder, per_layer, name)
    return {layer: [file] for layer, file in found.items()}


def require_all(
    layers: Collection[int], where: str, name: str = "layer {}", n_layers: int | None = None
) -> None:
    """Check that no layer below the highest one, or below `n_layers`, is missing."""
    if n_layers is None:
        n_layers = max(layers) + 1
    missing = [name.format(layer) for layer in range(n_layers) if layer not in layers]
    if missing:
        raise InputError(
            f"{where}: {_shorten(missing)} is missing, and all layers from 0 must be there; "
            "restore it."
        )


def _by_layer(folder: Path, pattern: str, regex: str) -> dict[int, list[Path]]:
    # Files whose path in the folder matches, by the number in it.
    found: dict[int, list[Path]] = {}
    for file in sorted(folder.glob(pattern)):
        path = file.relative_to(folder).as_posix()
        if match := re.fullmatch(regex, path):
            found.setdefault(int(match[1]), []).append(file)
    return found


def _one_per_layer(
    folder: Path, found: Mapping[int, Sequence[Path]], name: str, n_layers: int | None = None
) -> dict[int, Path]:
    for layer, files in found.items():
        if len(files) > 1:
            names = _shorten([str(file.relative_to(folder)) for file in files])
            raise InputError(
                f"{folder}: there are {len(files)} files for layer {layer} ({names}); list the one "
                "to read for each layer under transcoders in config.yaml."
            )
    require_all(found, str(folder), name, n_layers)
    return {layer: found[layer][0] for layer in sorted(found)}


def _shorten(names: Sequence[str], most: int = 4) -> str:
    more = " ..." if len(names) > most else ""
    return ", ".join(names[:most]) + more


def _nothing_found(folder: Path) -> str:
    for file in sorted(folder.rglob("*")):
        if file.suffix in PICKLES:
            return pickle_message(file)
    return (
        f"the folder {folder} holds no transcoders; expected {EXPECTED}, or a config.yaml that "
        "lists the file of each layer."
    )
