"""Loading transcoders by name, from a folder or from the Hugging Face hub, in all formats."""

from __future__ import annotations

from dataclasses import replace
from importlib import resources
from pathlib import Path

import torch
from torch import Tensor

from circuits.system.arguments import checked_arguments
from circuits.system.errors import InputError
from circuits.system.files import is_file, path_of
from circuits.system.torch_modes import without_modes
from circuits.transcoders.activations import Activation, BatchTopK, JumpReLU, ReLU, TopK
from circuits.transcoders.io.config_yaml import CONFIG, TranscoderConfig, read_config
from circuits.transcoders.io.formats import THRESHOLD, LayerWeights, read_layers
from circuits.transcoders.io.hub import (
    PREFIX,
    Address,
    Place,
    fetch_files,
    fetch_folder,
    fetch_if_present,
)
from circuits.transcoders.io.layer_files import LayerFiles, find_layer_files, require_all
from circuits.transcoders.io.tensor_files import weight_copier
from circuits.transcoders.transcoder import Encoder, Transcoders

YAML = (".yaml", ".yml")
Layers = list[LayerWeights]
Found = tuple[Place, TranscoderConfig]


@checked_arguments
@without_modes()
def load_transcoders(
    where: str | Path,
    *,
    device: str | torch.device | None = None,
    dtype: torch.dtype | None = None,
    mapped: bool = False,
) -> Transcoders:
    """Load transcoders for all layers of a model: PLTs, PLTs with a skip, or a CLT.

    The files and their tensors tell the format: PLT (layer_0.safetensors ...), CLT
    (W_enc_0.safetensors with W_dec_0.safetensors ...), GemmaScope (layer_0/.../params.npz) or
    GemmaScope-2 (params_layer_0.safetensors ..., or the files that a config.yaml lists).

    Pickles are not read. What config.yaml does not say follows from the files: features with
    thresholds are JumpReLU, others ReLU; PLTs read what the MLP reads and write to its output; CLTs
    read and write the residual stream; GemmaScope reads the normalized residual stream,
    GemmaScope-2 what the MLP reads, and both write the residual stream.

    Args:
        where: a folder or its config.yaml; the name of a set in this package (`toy-world-plt`,
            `toy-world-skip-plt`, `toy-world-clt`); or an address on the hub, `hf://owner/repo` or
            `hf://owner/repo/sub/folder?revision=REV`. From the hub only config.yaml and weights
            are fetched: the files it lists, or else those directly in the folder.
        device: where to put the weights; None is the CPU.
        dtype: their precision; None is float32. Files are read one by one, so the memory holds at
            most one copy of the weights and one file.
        mapped: leave the weights in their files, in their stored precision, and read what is used
            when it is used. Give neither device nor dtype then. Digests, for which whole files
            would be read, are not compared. An encoder stored transposed
            (GemmaScope-2) is read whole when used, and npz files are read into memory.

    Raises:
        InputError: there are no transcoders; a layer is missing; a file cannot be read or fetched;
            a tensor is missing or has a wrong shape or type; config.yaml does not fit the files;
            or there is no such device.

    Example:
        >>> import circuits
        >>> transcoders = circuits.load_transcoders("toy-world-plt")
        >>> transcoders.n_layers, transcoders.n_features, transcoders.reads
        (4, 512, 'mlp_input')
    """
    copy = weight_copier(device, dtype, mapped)
    folder, config = _find(where)
    source = str(where if where in embedded_transcoders() else folder)
    files = _layer_files(folder, config)
    layers = read_layers(files, source, copy, check=not mapped)
    _check_kind(layers, config)
    transcoders = replace(_assembled(layers, config), name=folder.name, source=source)
    transcoders.check()
    return transcoders


def _assembled(layers: Layers, config: TranscoderConfig) -> Transcoders:
    format = layers[0].format
    encoders = []
    for layer in layers:
        activation = _activation(layer, config)
        encoders.append(Encoder(layer.encoder, layer.bias, activation))
    skips = [layer.skip for layer in layers if layer.skip is not None]
    return Transcoders(
        encoders,
        decoders=[layer.decoder for layer in layers],
        decoder_biases=[layer.decoder_bias for layer in layers],
        skips=skips or None,
        reads=config.reads or format.reads,
        writes=config.writes or format.writes,
    )


def embedded_transcoders() -> tuple[str, ...]:
    """Return the names of the sets in this package."""
    return tuple(_embedded())


def _embedded() -> dict[str, Path]:
    package = Path(str(resources.files("circuits")))
    configs = sorted(package.glob(f"assets/transcoders/*/{CONFIG}"))
    folders = (config.parent for config in configs)
    return {folder.name: folder for folder in folders}


def _find(where: str | Path) -> Found:
    # The folder, here or on the hub, and what its config.yaml says.
    text = str(where)
    if text.startswith(PREFIX):
        address = Address.parse(text)
        config = address / CONFIG
        return address, read_config(fetch_if_present(config), str(config))
    embedded = _embedded()
    is_name = isinstance(where, str) and where in embedded
    path = embedded[text] if is_name else path_of(where)
    if path.is_dir():
        path = path / CONFIG
    elif not is_file(path) or path.suffix not in YAML:
        raise InputError(
            f"there are no transcoders {text!r}; give a folder, one of the sets in this "
            f"package ({', '.join(embedded)}) or an address hf://owner/repo."
        )
    folder = path.parent.resolve()
    return folder, read_config(path, str(path))


def _layer_files(folder: Place, config: TranscoderConfig) -> LayerFiles:
    # The local files of each layer; those on the hub are fetched.
    if not config.files:
        local = folder if isinstance(folder, Path) else fetch_folder(folder)
        return find_layer_files(local, config)
    places: dict[int, Place] = {}
    for layer, file in sorted(config.files):
        if layer in places:
            raise InputError(f"{config.source} lists several files for layer {layer}; list one.")
        # Paths are relative to the folder of the config.yaml.
        places[layer] = Address.parse(file) if file.startswith(PREFIX) else folder / file
    require_all(places, config.source)
    files = fetch_files([*places.values()])
    return [[file] for file in files]


def _check_kind(layers: Layers, config: TranscoderConfig) -> None:
    if config.n_layers not in (None, len(layers)):
        raise InputError(
            f"{config.source} says n_layers: {config.n_layers}, but there are files of "
            f"{len(layers)} layers; restore the others."
        )
    kind = layers[0].format.kind
    if config.kind not in (None, kind):
        raise InputError(
            f"{config.source} says model_kind: {config.kind}, but the files are of a {kind}; "
            "correct it."
        )


def _activation(layer: LayerWeights, config: TranscoderConfig) -> Activation:
    # What config.yaml says, if the files agree; else what the files imply.
    name, threshold = config.activation, layer.threshold
    k = config.k or layer.k
    if name is None and config.k is not None:
        raise InputError(
            f"{config.source}: activation is missing, and k: {k} is given; add activation: topk or "
            "batch_topk, or remove k."
        )
    if name is None:
        name = "relu" if k is None else "topk"
        name = name if threshold is None else "jump_relu"
    problem = _contradiction(name, k, threshold)
    if problem:
        raise InputError(f"{config.source}: activation is {name}, but {problem}.")
    if threshold is not None:
        return JumpReLU(threshold)
    if k is None or name == "relu":
        return ReLU()
    return TopK(k) if name == "topk" else BatchTopK(k)


def _contradiction(name: str, k: int | None, threshold: Tensor | None) -> str:
    if name == "jump_relu" and threshold is None:
        return f"the files hold no thresholds; add them ({THRESHOLD}), or write relu"
    if name != "jump_relu" and threshold is not None:
        return "the files hold thresholds; write jump_relu or remove them"
    if name.endswith("topk") and k is None:
        return "k is not given; add k, how many features may fire"
    return ""
