"""Which files of a folder hold which layer."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from circuits.system.errors import InputError
from circuits.transcoders.io.config_yaml import Kind, Settings
from circuits.transcoders.io.tensor_files import PICKLES, pickle_message

LayerFiles = Mapping[int, Sequence[Path]]
"""By layer: its file, or the two of a cross-layer transcoder (W_enc, then W_dec)."""

LAYOUTS = "layer_0.safetensors ..., W_enc_0.safetensors with W_dec_0.safetensors ..., params_layer_0.safetensors ..., or layer_0/.../params.npz"


def found_files(folder: Path, settings: Settings) -> LayerFiles:
    """The files of each layer of a folder, told by their names.

    Raises:
        InputError: there are none, only pickles, several for one layer, two kinds between which nothing chooses, or layers are missing.
    """
    single = _by_layer(folder.glob("*.safetensors"), r"(?:params_)?layer_(\d+)\.safetensors")
    encoders, decoders = (
        _by_layer(folder.glob("*.safetensors"), rf"{name}_(\d+)\.safetensors")
        for name in ("W_enc", "W_dec")
    )
    nested = _by_folder(folder)
    if encoders and single and settings.kind is None:
        raise InputError(
            f"{folder} holds both layer_*.safetensors and W_enc_*.safetensors; add model_kind to its config.yaml."
        )
    if encoders and not (single and settings.kind == "transcoder_set"):
        return _paired(folder, encoders, decoders)
    if decoders and not single:
        raise InputError(
            f"{folder} holds decoders (W_dec_*.safetensors) and no W_enc_*.safetensors; restore them."
        )
    chosen = _only(single or nested, str(folder))
    if not chosen:
        raise InputError(_nothing(folder))
    require_all(chosen, str(folder), "layer_{}.safetensors" if single else "layer_{}")
    return {layer: [chosen[layer]] for layer in sorted(chosen)}


def require_all(
    layers: Iterable[int], where: str, name: str = "layer {}", n_layers: int | None = None
) -> None:
    """Refuse a set in which layers below the highest, or below `n_layers`, are missing.

    Raises:
        InputError: with the names of what is missing.
    """
    there = set(layers)
    missing = [
        name.format(layer)
        for layer in range(max(there) + 1 if n_layers is None else n_layers)
        if layer not in there
    ]
    if missing:
        more = " ..." if len(missing) > 8 else ""
        raise InputError(
            f"{where}: {', '.join(missing[:8])}{more} is missing, and all layers from 0 must be there; restore it."
        )


def check_kind(kind: Kind | None, cross_layer: bool, source: str) -> None:
    """Refuse a config.yaml that says another kind than the files are of.

    Raises:
        InputError: with both kinds.
    """
    holds: Kind = "cross_layer_transcoder" if cross_layer else "transcoder_set"
    if kind not in (None, holds):
        raise InputError(
            f"{source} says model_kind: {kind}, but the files are of a {holds}; correct it."
        )


def _by_layer(files: Iterable[Path], pattern: str) -> dict[int, list[Path]]:
    """Files whose name matches, by the number in it."""
    found: dict[int, list[Path]] = {}
    for file in sorted(files):
        if match := re.fullmatch(pattern, file.name):
            found.setdefault(int(match[1]), []).append(file)
    return found


def _by_folder(folder: Path) -> dict[int, list[Path]]:
    """Files of parameters in folders layer_0, layer_1_width_16k ..., at any depth."""
    found: dict[int, list[Path]] = {}
    for inner in sorted(folder.glob("layer_*/")):
        if match := re.fullmatch(r"layer_(\d+)(?:\D.*)?", inner.name):
            files = [
                file
                for file in sorted(inner.rglob("params.*"))
                if file.suffix in (".npz", ".safetensors")
            ]
            found.setdefault(int(match[1]), []).extend(files)
    return {layer: files for layer, files in found.items() if files}


def _only(found: Mapping[int, Sequence[Path]], where: str) -> dict[int, Path]:
    """The one file of each layer.

    Raises:
        InputError: a layer has several.
    """
    for layer, files in found.items():
        if len(files) > 1:
            names = ", ".join(str(file.relative_to(where)) for file in files[:3]) + (
                " ..." if len(files) > 3 else ""
            )
            raise InputError(
                f"{where}: there are {len(files)} files for layer {layer} ({names}); list the one to read of each layer under transcoders "
                "in config.yaml."
            )
    return {layer: files[0] for layer, files in found.items()}


def _paired(
    folder: Path, encoders: Mapping[int, Sequence[Path]], decoders: Mapping[int, Sequence[Path]]
) -> LayerFiles:
    first, second = _only(encoders, str(folder)), _only(decoders, str(folder))
    n_layers = max((*first, *second)) + 1
    require_all(first, str(folder), "W_enc_{}.safetensors", n_layers)
    require_all(second, str(folder), "W_dec_{}.safetensors", n_layers)
    return {layer: [first[layer], second[layer]] for layer in range(n_layers)}


def _nothing(folder: Path) -> str:
    pickles = sorted(file for file in folder.rglob("*") if file.suffix in PICKLES)
    if pickles:
        return pickle_message(pickles[0])
    return f"the folder {folder} holds no transcoders; expected {LAYOUTS}, or a config.yaml that lists the file of each layer."
