"""Finding the files of each layer in a folder, by their names."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path

from circuits.system.errors import InputError
from circuits.transcoders.io.config_yaml import TranscoderConfig
from circuits.transcoders.io.tensor_files import PICKLES, WEIGHTS, pickle_message

LayerFiles = Mapping[int, Sequence[Path]]
"""The file of each layer, or the two of a cross-layer transcoder: W_enc, then W_dec."""

MAX_MISSING_SHOWN = 8
MAX_FILES_SHOWN = 3


def find_layer_files(folder: Path, config: TranscoderConfig) -> LayerFiles:
    """Find the files of each layer.

    Raises:
        InputError: there are none, or only pickles; a layer has several files or none; or the
            folder holds a PLT and a CLT and the config.yaml does not choose.
    """
    files = list(folder.glob("*.safetensors"))
    single = _group_by_layer(files, r"(?:params_)?layer_(\d+)\.safetensors")
    encoders = _group_by_layer(files, r"W_enc_(\d+)\.safetensors")
    decoders = _group_by_layer(files, r"W_dec_(\d+)\.safetensors")
    if encoders and single and config.cross_layer is None:
        raise InputError(
            f"{folder} holds both layer_*.safetensors and W_enc_*.safetensors; add model_kind to "
            "its config.yaml."
        )
    if encoders and not (single and config.cross_layer is False):
        n_layers = max([*encoders, *decoders]) + 1
        encoder = _one_per_layer(encoders, folder, "W_enc_{}.safetensors", n_layers)
        decoder = _one_per_layer(decoders, folder, "W_dec_{}.safetensors", n_layers)
        return {layer: [encoder[layer], decoder[layer]] for layer in range(n_layers)}
    if decoders and not single:
        raise InputError(
            f"{folder} holds decoders (W_dec_*.safetensors) and no W_enc_*.safetensors; restore "
            "them."
        )
    if single:
        chosen = _one_per_layer(single, folder, "layer_{}.safetensors")
    elif nested := _nested_files(folder):
        chosen = _one_per_layer(nested, folder, "layer_{}")
    else:
        raise InputError(_nothing_found(folder))
    return {layer: [file] for layer, file in chosen.items()}


def require_all(
    layers: Collection[int],
    where: str,
    name: str = "layer {}",
    n_layers: int | None = None,
) -> None:
    """Check that no layer below the highest one, or below `n_layers`, is missing.

    Args:
        where: the folder or file, for messages.
        name: what is missing where a layer is, with {} for its number.

    Raises:
        InputError: with the names of what is missing.
    """
    if n_layers is None:
        n_layers = max(layers) + 1
    missing = [name.format(layer) for layer in range(n_layers) if layer not in layers]
    if missing:
        raise InputError(
            f"{where}: {_shorten(missing, MAX_MISSING_SHOWN)} is missing, and all layers from 0 "
            "must be there; restore it."
        )


def _group_by_layer(files: Iterable[Path], pattern: str) -> dict[int, list[Path]]:
    """Files whose names match a pattern, by the number in the name."""
    groups: dict[int, list[Path]] = {}
    for file in sorted(files):
        if match := re.fullmatch(pattern, file.name):
            groups.setdefault(int(match[1]), []).append(file)
    return groups


def _nested_files(folder: Path) -> dict[int, list[Path]]:
    """Files params.* at any depth of folders layer_0, layer_1_width_16k ..., by layer."""
    folders = _group_by_layer(folder.glob("layer_*/"), r"layer_(\d+)(?:\D.*)?")
    nested = {}
    for layer, inner in folders.items():
        files = [file for path in inner for file in sorted(path.rglob("params.*"))]
        nested[layer] = [file for file in files if file.suffix in WEIGHTS]
    return {layer: files for layer, files in nested.items() if files}


def _one_per_layer(
    groups: Mapping[int, Sequence[Path]],
    folder: Path,
    name: str,
    n_layers: int | None = None,
) -> dict[int, Path]:
    for layer, files in groups.items():
        if len(files) > 1:
            names = [str(file.relative_to(folder)) for file in files]
            raise InputError(
                f"{folder}: there are {len(files)} files for layer {layer} "
                f"({_shorten(names, MAX_FILES_SHOWN)}); list the one to read for each layer under "
                "transcoders in config.yaml."
            )
    require_all(groups, str(folder), name, n_layers)
    return {layer: groups[layer][0] for layer in sorted(groups)}


def _shorten(names: Sequence[str], most: int) -> str:
    more = " ..." if len(names) > most else ""
    return ", ".join(names[:most]) + more


def _nothing_found(folder: Path) -> str:
    pickles = sorted(file for file in folder.rglob("*") if file.suffix in PICKLES)
    if pickles:
        return pickle_message(pickles[0])
    return (
        f"the folder {folder} holds no transcoders; expected layer_0.safetensors ..., "
        "W_enc_0.safetensors with W_dec_0.safetensors ..., params_layer_0.safetensors ..., "
        "layer_0/.../params.npz, or a config.yaml that lists the file of each layer."
    )
