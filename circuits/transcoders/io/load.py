"""Loading transcoders: by name, from folders and from the Hugging Face hub, in every published format."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

import torch

from circuits.system.errors import InputError
from circuits.transcoders.activations import Activation, BatchTopK, JumpReLU, ReLU, TopK
from circuits.transcoders.io.config_yaml import CONFIG, Settings, read_settings
from circuits.transcoders.io.formats import ANY, DEFAULTS, LayerWeights, layers_written, read_layer
from circuits.transcoders.io.hub import PREFIX, Address, fetch_config, fetch_files, fetch_folder
from circuits.transcoders.io.layer_files import LayerFiles, check_kind, found_files, require_all
from circuits.transcoders.io.tensor_files import Placement, placement
from circuits.transcoders.transcoder import Encoder, Transcoders


def load_transcoders(
    where: str | Path,
    *,
    device: str | torch.device | None = None,
    dtype: torch.dtype | None = None,
    mapped: bool = False,
) -> Transcoders:
    """Transcoders of every layer of a model: per layer (PLT), with a skip, or across layers (CLT).

    The format is told by the files and their contents: layer_0.safetensors ... (PLT), W_enc_0.safetensors with W_dec_0.safetensors ... (CLT),
    GemmaScope (layer_0/.../params.npz) and GemmaScope-2 (params_layer_0.safetensors ..., or the files that a config.yaml lists). Pickles are
    not read. What config.yaml does not say is taken from the files: a threshold makes features JumpReLU, else they are ReLU; PLTs read what
    the MLP reads ("mlp_input") and write what it writes ("mlp"), CLTs read and write the residual stream, GemmaScope reads the normalized
    residual stream and GemmaScope-2 what the MLP reads, and both write the residual stream.

    Args:
        where: a folder or its config.yaml; the name of a set that ships with this package (`toy-world-plt`, `toy-world-skip-plt`,
            `toy-world-clt`); or an address on the hub, `hf://owner/repo` or `hf://owner/repo/sub/folder?revision=REV`, of which only
            config.yaml and weights are fetched: the files it lists, else those directly in the folder.
        device: None is the CPU.
        dtype: None is float32. Files are read one by one, so there is never more than one copy of the weights and one file.
        mapped: leave weights in their files, in their stored precision: what is used of them is read when it is used. Needs neither
            device nor dtype. An encoder that is stored transposed (GemmaScope-2) is read whole then, and npz files cannot be mapped: they are
            read into memory.

    Raises:
        InputError: there are none, a layer is missing, a file cannot be read or fetched, a tensor is missing or has another shape or type
            than expected, config.yaml does not fit the files, there is no such device.
    """
    wanted = placement(device, dtype, mapped)
    with _located(where) as place:
        files, settings = place.files, place.settings
        layers = _read(files, settings.source or place.source, wanted)
    _check_alike(layers, place.source)
    check_kind(settings.kind, layers[0].format.endswith("CLT"), settings.source)
    reads, writes = DEFAULTS[layers[0].format]
    encoders = [
        Encoder(layer.encoder, layer.bias, _activation(settings, layer, place.source))
        for layer in layers
    ]
    skips = [layer.skip for layer in layers if layer.skip is not None]
    transcoders = Transcoders(
        encoders,
        [layer.decoder for layer in layers],
        [layer.decoder_bias for layer in layers],
        skips or None,
        settings.reads or reads,
        settings.writes or writes,
        place.name,
        place.source,
    )
    transcoders.check()
    return transcoders


@dataclass(frozen=True)
class _Place:
    """A set that was found: its files on this machine, what its config.yaml says, and what to call it."""

    files: LayerFiles
    settings: Settings
    name: str
    source: str


def embedded_transcoders() -> tuple[str, ...]:
    """The names of the sets that ship with the package."""
    assets = resources.files("circuits") / "assets" / "transcoders"
    return (
        tuple(sorted(item.name for item in assets.iterdir() if (item / CONFIG).is_file()))
        if assets.is_dir()
        else ()
    )


@contextlib.contextmanager
def _located(where: str | Path) -> Iterator[_Place]:
    assets = resources.files("circuits") / "assets" / "transcoders"
    path = Path(where)
    if isinstance(where, str) and where.startswith(PREFIX):
        yield _on_hub(Address.parse(where))
    elif path.parent == Path() and isinstance(where, str) and (assets / where / CONFIG).is_file():
        with resources.as_file(assets / where) as folder:
            yield _in_folder(folder, where, where)
    elif path.is_file() and path.suffix in (".yaml", ".yml"):
        yield _in_folder(path.parent, path.resolve().parent.name, str(path.parent.resolve()), path)
    elif path.is_dir():
        yield _in_folder(path, path.resolve().name, str(path.resolve()))
    else:
        shipped = ", ".join(embedded_transcoders())
        named = f", one of the sets that ship with this package ({shipped})" if shipped else ""
        raise InputError(
            f"there are no transcoders {str(where)!r}; give a folder{named} or an address hf://owner/repo."
        )


def _in_folder(folder: Path, name: str, source: str, config: Path | None = None) -> _Place:
    config = config or folder / CONFIG
    settings = read_settings(config, str(config)) if config.is_file() else Settings()
    if not settings.files:
        return _Place(found_files(folder, settings), settings, name, source)
    require_all(_layers(settings), settings.source)
    remote = {
        layer: Address.parse(file) for layer, file in settings.files if file.startswith(PREFIX)
    }
    fetched = dict(zip(remote, fetch_files(list(remote.values())), strict=True))
    return _Place(
        {layer: [fetched.get(layer, folder / file)] for layer, file in sorted(settings.files)},
        settings,
        name,
        source,
    )


def _on_hub(address: Address) -> _Place:
    config = fetch_config(address)
    settings = Settings() if config is None else read_settings(config, str(address.joined(CONFIG)))
    if not settings.files:
        return _Place(
            found_files(fetch_folder(address), settings), settings, address.name, str(address)
        )
    require_all(_layers(settings), settings.source)
    files = [
        Address.parse(file) if file.startswith(PREFIX) else address.joined(file)
        for _, file in sorted(settings.files)
    ]
    return _Place(
        {layer: [path] for layer, path in enumerate(fetch_files(files))},
        settings,
        address.name,
        str(address),
    )


def _layers(settings: Settings) -> list[int]:
    """The layers that a config.yaml lists, each once."""
    layers = [layer for layer, _ in settings.files]
    if len(set(layers)) < len(layers):
        twice = next(layer for layer in layers if layers.count(layer) > 1)
        raise InputError(f"{settings.source} lists several files for layer {twice}; list one.")
    return layers


def _read(files: LayerFiles, source: str, wanted: Placement) -> list[LayerWeights]:
    """All layers, the sizes of the first expected of the others."""
    written = layers_written(files[0])
    if written > 1:
        require_all(files, source, n_layers=written)
    layers: list[LayerWeights] = []
    for layer in range(len(files)):
        layers.append(
            read_layer(files[layer], layer, len(files), layers[0].sizes if layers else ANY, wanted)
        )
    return layers


def _check_alike(layers: list[LayerWeights], source: str) -> None:
    for number, layer in enumerate(layers):
        if layer.parts != layers[0].parts:
            names = ("format", "threshold", "skip", "k")
            parts = zip(names, layers[0].parts, layer.parts, strict=True)
            unlike = "; ".join(
                f"{name}: {first} and {other}" for name, first, other in parts if first != other
            )
            raise InputError(
                f"{source}: layers 0 and {number} are of different sets ({unlike}); restore the one that is wrong."
            )


def _activation(settings: Settings, layer: LayerWeights, source: str) -> Activation:
    """What config.yaml says, as far as the files allow it; without a word from it, what the files imply."""
    k = settings.k or layer.k
    name = settings.activation or (
        "jump_relu" if layer.threshold is not None else "topk" if layer.k else "relu"
    )
    told = f"{settings.source or source}: activation"
    if settings.activation is None and settings.k is not None:
        raise InputError(
            f"{told} is missing, and k: {k} is given; add activation: topk or batch_topk, or remove k."
        )
    if layer.threshold is not None:
        if name != "jump_relu":
            raise InputError(
                f"{told} is {name}, but the files hold thresholds; write jump_relu, or remove the thresholds from the files."
            )
        return JumpReLU(layer.threshold)
    if name == "jump_relu":
        raise InputError(
            f"{told} is jump_relu, but the files hold no thresholds; add them (activation_function.threshold), or write relu."
        )
    if name == "relu":
        return ReLU()
    if k is None:
        raise InputError(
            f"{told} is {name}, but k is not given; add k, the number of features that may fire."
        )
    return TopK(k) if name == "topk" else BatchTopK(k)
