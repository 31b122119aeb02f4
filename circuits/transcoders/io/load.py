"""Loading transcoders by name, from a folder or from the Hugging Face hub, in all formats."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

import torch
from torch import Tensor

from circuits.system.errors import InputError
from circuits.transcoders.activations import Activation, BatchTopK, JumpReLU, ReLU, TopK
from circuits.transcoders.io.config_yaml import CONFIG, CROSS_LAYER, TranscoderConfig, read_config
from circuits.transcoders.io.formats import DEFAULTS, THRESHOLD, LayerWeights, read_layer
from circuits.transcoders.io.hub import PREFIX, Address, fetch_config, fetch_files, fetch_folder
from circuits.transcoders.io.layer_files import LayerFiles, find_layer_files, require_all
from circuits.transcoders.io.tensor_files import weight_copier
from circuits.transcoders.transcoder import Encoder, Transcoders


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

    Pickles are not read. What config.yaml does not say follows from the files. Features with
    thresholds are JumpReLU, others ReLU. PLTs read what the MLP reads ("mlp_input") and write to
    its output ("mlp"). CLTs read and write the residual stream. GemmaScope reads the normalized
    residual stream, GemmaScope-2 what the MLP reads; both write the residual stream.

    Args:
        where: a folder or its config.yaml; the name of a set in this package (`toy-world-plt`,
            `toy-world-skip-plt`, `toy-world-clt`); or an address on the hub, `hf://owner/repo` or
            `hf://owner/repo/sub/folder?revision=REV`. From the hub only config.yaml and weights
            are fetched: the files it lists, or else those directly in the folder.
        device: where to put the weights; None is the CPU.
        dtype: their precision; None is float32. Files are read one by one, so the memory holds at
            most one copy of the weights and one file.
        mapped: leave the weights in their files, in their stored precision, and read what is used
            when it is used. Give neither device nor dtype then. An encoder stored transposed
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
    found = _find(where)
    config, source = found.config, found.config.source or found.source
    layers = _read_layers(found.files(), source, copy)
    _check_same_set(layers, found.source)
    _check_kind(config, cross_layer=layers[0].format.endswith("CLT"))
    reads, writes = DEFAULTS[layers[0].format]
    skips = [layer.skip for layer in layers if layer.skip is not None]
    transcoders = Transcoders(
        encoders=[
            Encoder(layer.encoder, layer.bias, _activation(layer, config, source))
            for layer in layers
        ],
        decoders=[layer.decoder for layer in layers],
        decoder_biases=[layer.decoder_bias for layer in layers],
        skips=skips or None,
        reads=config.reads or reads,
        writes=config.writes or writes,
        name=found.name,
        source=found.source,
    )
    transcoders.check()
    return transcoders


def embedded_transcoders() -> tuple[str, ...]:
    """Return the names of the sets in this package."""
    return tuple(sorted(config.parent.name for config in _assets().glob(f"*/{CONFIG}")))


def _assets() -> Path:
    return Path(str(resources.files("circuits"))) / "assets" / "transcoders"


@dataclass(frozen=True)
class _FoundSet:
    """A folder with transcoders, here or on the hub, and what its config.yaml says."""

    folder: Path | Address
    config: TranscoderConfig
    name: str
    source: str

    def files(self) -> LayerFiles:
        """The local files of each layer; those on the hub are fetched."""
        folder = self.folder
        if self.config.files:
            return _listed_files(self.config, folder)
        local = fetch_folder(folder) if isinstance(folder, Address) else folder
        return find_layer_files(local, self.config)


def _find(where: str | Path) -> _FoundSet:
    path = Path(where)
    if isinstance(where, str) and where.startswith(PREFIX):
        address = Address.parse(where)
        config = _config(fetch_config(address), str(address / CONFIG))
        return _FoundSet(address, config, address.name, str(address))
    name, source = path.resolve().name, str(path.resolve())
    if isinstance(where, str) and where in embedded_transcoders():
        path, name, source = _assets() / where, where, where
    if path.is_dir():
        return _FoundSet(path, _config(path / CONFIG), name, source)
    if path.is_file() and path.suffix in (".yaml", ".yml"):
        folder = path.parent.resolve()
        return _FoundSet(path.parent, _config(path), folder.name, str(folder))
    names = ", ".join(embedded_transcoders())
    raise InputError(
        f"there are no transcoders {str(where)!r}; give a folder, one of the sets in this package "
        f"({names}) or an address hf://owner/repo."
    )


def _config(file: Path | None, source: str = "") -> TranscoderConfig:
    if file is None or not file.is_file():
        return TranscoderConfig()
    return read_config(file, source or str(file))


def _listed_files(config: TranscoderConfig, folder: Path | Address) -> LayerFiles:
    # The files that a config.yaml lists; their paths are relative to its folder.
    layers = [layer for layer, _ in config.files]
    for layer in layers:
        if layers.count(layer) > 1:
            raise InputError(f"{config.source} lists several files for layer {layer}; list one.")
    require_all(layers, config.source)
    local: dict[int, Path] = {}
    remote: dict[int, Address] = {}
    for layer, file in sorted(config.files):
        place = Address.parse(file) if file.startswith(PREFIX) else folder / file
        if isinstance(place, Path):
            local[layer] = place
        else:
            remote[layer] = place
    fetched = fetch_files(list(remote.values()))
    local.update(zip(remote, fetched, strict=True))
    return {layer: [local[layer]] for layer in sorted(local)}


def _read_layers(
    files: LayerFiles, source: str, copy: Callable[[Tensor], Tensor]
) -> list[LayerWeights]:
    first = read_layer(files[0], 0).map(copy)
    # Layer 0 of a CLT writes to all layers.
    require_all(files, source, n_layers=first.decoder.shape[1])
    layers = [first]
    for layer in range(1, len(files)):
        # Copied at once, so that the memory holds no more than one file.
        layers.append(read_layer(files[layer], layer, first).map(copy))
    return layers


def _check_same_set(layers: list[LayerWeights], source: str) -> None:
    expected = layers[0].traits
    for number, layer in enumerate(layers):
        for trait, value in layer.traits.items():
            if value != expected[trait]:
                raise InputError(
                    f"{source}: layers 0 and {number} are of different sets ({trait}: "
                    f"{expected[trait]} and {value}); restore the wrong one."
                )


def _check_kind(config: TranscoderConfig, cross_layer: bool) -> None:
    if config.cross_layer not in (None, cross_layer):
        plt, clt = CROSS_LAYER
        says, holds = (plt, clt) if cross_layer else (clt, plt)
        raise InputError(
            f"{config.source} says model_kind: {says}, but the files are of a {holds}; correct it."
        )


def _activation(layer: LayerWeights, config: TranscoderConfig, source: str) -> Activation:
    # What config.yaml says, if the files agree; else what the files imply.
    name, k = config.activation, config.k or layer.k
    if name is None and config.k is not None:
        raise InputError(
            f"{source}: activation is missing, and k: {k} is given; add activation: topk or "
            "batch_topk, or remove k."
        )
    if name is None:
        name = "relu" if k is None else "topk"
        name = name if layer.threshold is None else "jump_relu"
    where = f"{source}: activation is {name}"
    if name == "jump_relu" and layer.threshold is None:
        raise InputError(
            f"{where}, but the files hold no thresholds; add them ({THRESHOLD}), or write relu."
        )
    if name != "jump_relu" and layer.threshold is not None:
        raise InputError(f"{where}, but the files hold thresholds; write jump_relu or remove them.")
    if layer.threshold is not None:
        return JumpReLU(layer.threshold)
    if name == "relu":
        return ReLU()
    if k is None:
        raise InputError(f"{where}, but k is not given; add k, how many features may fire.")
    return TopK(k) if name == "topk" else BatchTopK(k)
