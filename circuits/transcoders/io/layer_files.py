"""Finding the files of each layer in a folder, by their names."""

from __future__ import annotations

import re
import textwrap
from collections import defaultdict
from collections.abc import Collection, Sequence
from itertools import chain
from pathlib import Path

from circuits.system.errors import InputError
from circuits.transcoders.io.config_yaml import CLT_KIND, TranscoderConfig
from circuits.transcoders.io.tensor_files import PICKLES, pickle_message

LayerFiles = Sequence[Sequence[Path]]
"""The file of each layer, or the two of a cross-layer transcoder: W_enc, then W_dec."""

PER_LAYER, NESTED = "layer_{}.safetensors", "layer_{}"
ENCODER, DECODER = "W_enc_{}.safetensors", "W_dec_{}.safetensors"
GLOBS = ("*.safetensors", "layer_*/**/params.*")
# The paths of the files with these names in a folder.
PATTERNS = {
    PER_LAYER: r"(?:params_)?layer_(\d+)\.safetensors",
    ENCODER: r"W_enc_(\d+)\.safetensors",
    DECODER: r"W_dec_(\d+)\.safetensors",
    # layer_1/params.npz, layer_1_width_16k/average_l0_70/params.safetensors, ...
    NESTED: r"layer_(\d+)(?:\D[^/]*)?/(?:.*/)?params\.(?:npz|safetensors)",
}
Paths = list[str]
PathsByLayer = dict[int, Paths]

EXPECTED = (
    "layer_0.safetensors ..., W_enc_0.safetensors with W_dec_0.safetensors ..., "
    "params_layer_0.safetensors ..., layer_0/.../params.npz"
)


def find_layer_files(folder: Path, config: TranscoderConfig) -> LayerFiles:
    """Find the files of each layer; if there are a PLT and a CLT, the config.yaml chooses."""
    files = chain.from_iterable(map(folder.glob, GLOBS))
    paths = [file.relative_to(folder).as_posix() for file in sorted(files)]
    found = {name: _by_layer(paths, pattern) for name, pattern in PATTERNS.items()}
    present = [name for name in PATTERNS if found[name]]
    if not present:
        raise InputError(_nothing_found(folder))
    names = _chosen(present, folder, config)
    chosen = {name: found[name] for name in names}
    return _of_all_layers(chosen, folder)


def _of_all_layers(found: dict[str, PathsByLayer], folder: Path) -> LayerFiles:
    layers = chain.from_iterable(found.values())
    n_layers = 1 + max(layers, default=0)
    by_name = []
    for name, paths in found.items():
        require_all(paths, str(folder), name, n_layers)
        own = [_only(paths[layer], layer, folder) for layer in range(n_layers)]
        by_name.append([folder / path for path in own])
    return list(zip(*by_name, strict=True))


def _chosen(present: Sequence[str], folder: Path, config: TranscoderConfig) -> Sequence[str]:
    # The names of the one file, or of the two, that each layer has.
    has_plt = PER_LAYER in present
    has_clt = ENCODER in present or DECODER in present
    if has_plt and has_clt and config.kind is None:
        raise InputError(
            f"{folder} holds both layer_*.safetensors and W_enc_*.safetensors; add model_kind to "
            "its config.yaml."
        )
    if has_clt and (config.kind == CLT_KIND or not has_plt):
        return ENCODER, DECODER
    return [PER_LAYER if has_plt else NESTED]


def require_all(
    layers: Collection[int], where: str, name: str = "layer {}", n_layers: int | None = None
) -> None:
    """Check that no layer below the highest one, or below `n_layers`, is missing."""
    if n_layers is None:
        n_layers = max(layers) + 1
    missing = [name.format(layer) for layer in range(n_layers) if layer not in layers]
    if missing:
        raise InputError(
            f"{where}: {_list(missing)} is missing, and all layers from 0 must be there; "
            "restore it."
        )


def _by_layer(paths: Paths, pattern: str) -> PathsByLayer:
    # The paths that match, by the number in them.
    found = defaultdict(list)
    for path in paths:
        if match := re.fullmatch(pattern, path):
            found[int(match[1])].append(path)
    return found


def _only(paths: Paths, layer: int, folder: Path) -> str:
    if len(paths) > 1:
        raise InputError(
            f"{folder}: there are {len(paths)} files for layer {layer} ({_list(paths)}); list the "
            "one to read for each layer under transcoders in config.yaml."
        )
    return paths[0]


def _list(names: Sequence[str]) -> str:
    return textwrap.shorten(", ".join(names), 200, placeholder=" ...")


def _nothing_found(folder: Path) -> str:
    for file in sorted(folder.rglob("*")):
        if file.suffix in PICKLES:
            return pickle_message(file)
    return (
        f"the folder {folder} holds no transcoders; expected {EXPECTED}, or a config.yaml that "
        "lists the file of each layer."
    )
