"""Finding the files of each layer in a folder, by their names."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

from circuits.system.errors import InputError
from circuits.transcoders.io.config_yaml import CLT, TranscoderConfig
from circuits.transcoders.io.tensor_files import PICKLES, pickle_message

LayerFiles = Sequence[Sequence[Path]]
"""The file of each layer, or the two of a cross-layer transcoder: W_enc, then W_dec."""

PER_LAYER, NESTED = "layer_{}.safetensors", "layer_{}"
ENCODER, DECODER = "W_enc_{}.safetensors", "W_dec_{}.safetensors"
# Where the files with these names are in a folder.
PATHS = {
    PER_LAYER: r"(?:params_)?layer_(\d+)\.safetensors",
    ENCODER: r"W_enc_(\d+)\.safetensors",
    DECODER: r"W_dec_(\d+)\.safetensors",
    # layer_1/params.npz, layer_1_width_16k/average_l0_70/params.safetensors, ...
    NESTED: r"layer_(\d+)(?:\D[^/]*)?/(?:.*/)?params\.(?:npz|safetensors)",
}
EXPECTED = (
    "layer_0.safetensors ..., W_enc_0.safetensors with W_dec_0.safetensors ..., "
    "params_layer_0.safetensors ..., layer_0/.../params.npz"
)


def find_layer_files(folder: Path, config: TranscoderConfig) -> LayerFiles:
    """Find the files of each layer; if there are a PLT and a CLT, the config.yaml chooses."""
    files = sorted([*folder.glob("*.safetensors"), *folder.glob("layer_*/**/params.*")])
    found = {name: _by_layer(folder, files, path) for name, path in PATHS.items()}
    has_clt, has_plt = bool(found[ENCODER] or found[DECODER]), bool(found[PER_LAYER])
    if has_clt and has_plt and config.kind is None:
        raise InputError(
            f"{folder} holds both layer_*.safetensors and W_enc_*.safetensors; add model_kind to "
            "its config.yaml."
        )
    if has_clt and (config.kind == CLT or not has_plt):
        names = [ENCODER, DECODER]
    else:
        names = [PER_LAYER if has_plt else NESTED]
    layers = {layer for name in names for layer in found[name]}
    if not layers:
        raise InputError(_nothing_found(folder))
    for name in names:
        _check_one_per_layer(folder, found[name])
        require_all(found[name], str(folder), name, max(layers) + 1)
    return [[found[name][layer][0] for name in names] for layer in sorted(layers)]


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


def _by_layer(folder: Path, files: Sequence[Path], pattern: str) -> Mapping[int, Sequence[Path]]:
    # The files whose path in the folder matches, by the number in it.
    found = defaultdict(list)
    for file in files:
        match = re.fullmatch(pattern, file.relative_to(folder).as_posix())
        if match:
            found[int(match[1])].append(file)
    return found


def _check_one_per_layer(folder: Path, found: Mapping[int, Sequence[Path]]) -> None:
    for layer, files in found.items():
        if len(files) > 1:
            names = _shorten([str(file.relative_to(folder)) for file in files])
            raise InputError(
                f"{folder}: there are {len(files)} files for layer {layer} ({names}); list the one "
                "to read for each layer under transcoders in config.yaml."
            )


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
