"""The config.yaml of a set: where features read and write, how they fire, and the layer files."""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import yaml

from circuits.system.errors import InputError
from circuits.system.files import check_digest, is_file
from circuits.transcoders.transcoder import Reads, Writes

CONFIG = "config.yaml"
PLT_KIND, CLT_KIND = "transcoder_set", "cross_layer_transcoder"
# The list of a set with many layers has some 10,000 bytes; much larger files would take minutes.
MOST_BYTES = 1 << 16
# The model_kind of a set that is being saved.
UNFINISHED = "unfinished"
ACTIVATIONS = ("relu", "jump_relu", "topk", "batch_topk")

Settings = dict[str, Any]
# The values of each key and their meanings. Of several values with one meaning, the first is the
# one that is written. In a parallel block, the MLP reads hook_resid_pre.
MEANINGS: dict[str, Settings] = {
    "model_kind": {PLT_KIND: PLT_KIND, CLT_KIND: CLT_KIND},
    "feature_input_hook": {
        "hook_resid_mid": "residual",
        "hook_resid_pre": "residual",
        "hook_mlp_in": "residual",
        "ln2.hook_normalized": "normalized",
        "mlp.hook_in": "mlp_input",
    },
    "feature_output_hook": {"hook_mlp_out": "residual", "mlp.hook_out": "mlp"},
    "activation": {name: name for name in ACTIVATIONS},
}

ListedFile = tuple[int, str]
ListedFiles = tuple[ListedFile, ...]


@dataclass(frozen=True)
class TranscoderConfig:
    """What a config.yaml, called `source` in messages, says; None or nothing where it does not."""

    source: str
    kind: str | None = None
    reads: Reads | None = None
    writes: Writes | None = None
    activation: str | None = None
    k: int | None = None
    n_layers: int | None = None
    # Layer and file of each entry, as written: a path or an hf:// address.
    files: ListedFiles = ()


def read_config(file: Path, source: str) -> TranscoderConfig:
    """Read a config.yaml, if there is one, that is called `source` in messages."""
    if not is_file(file):
        return TranscoderConfig(source)
    content = _settings(file, source)
    meanings = map(partial(_choose, content, source), MEANINGS)
    kind, reads, writes, activation = meanings
    k = _count(content.get("k"), f"{source}: k", "the number of features that may fire")
    n_layers = _count(content.get("n_layers"), f"{source}: n_layers", "the number of layers")
    files = _files(content.get("transcoders"), source)
    return TranscoderConfig(source, kind, reads, writes, activation, k, n_layers, files)


def _settings(file: Path, source: str) -> Settings:
    try:
        if file.stat().st_size > MOST_BYTES:
            raise ValueError(f"it has more than {MOST_BYTES:,} bytes")
        content = yaml.safe_load(file.read_text(encoding="utf-8"))
    # What is not a valid date or number is a ValueError, and an unhashable key a TypeError.
    except (yaml.YAMLError, ValueError, TypeError, OSError, RecursionError) as error:
        reason = " ".join(str(error).split())
        raise InputError(f"{source} cannot be read as YAML ({reason}); restore it.") from error
    if not isinstance(content, dict):
        raise InputError(
            f"{source} holds {type(content).__name__} and no settings; expected lines like "
            "model_kind: transcoder_set."
        )
    check_digest(file, content, {})
    if content.get("model_kind") == UNFINISHED:
        raise InputError(
            f"{source}: saving into this folder was interrupted, so its files may be of different "
            "sets; save it again."
        )
    return content


def _choose(content: Settings, source: str, key: str) -> Any:
    value = content.get(key)
    if value is None:
        return None
    plain = _plain if key == "activation" else str
    for known, meaning in MEANINGS[key].items():
        if isinstance(value, str) and plain(value) == plain(known):
            return meaning
    known_values = ", ".join(MEANINGS[key])
    raise InputError(
        f"{source}: {key} is {value!r}, which is not known; use one of {known_values}."
    )


def _plain(name: str) -> str:
    # JumpReLU, jump-relu and jump_relu are one activation.
    return re.sub(r"[-_\s]", "", name).lower()


def _count(value: object, name: str, meaning: str) -> int | None:
    # bool is a subclass of int, so `k: true` would be 1.
    if value is None or (type(value) is int and value > 0):
        return value
    raise InputError(f"{name} is {value!r}; give {meaning}.")


def _files(entries: object, source: str) -> ListedFiles:
    if entries is None:
        return ()
    if not isinstance(entries, list) or not entries:
        raise InputError(
            f"{source}: transcoders is {entries!r}; give a list with the file of each layer, or "
            "leave it out."
        )
    numbered = enumerate(entries)
    return tuple(_layer_file(*entry, source) for entry in numbered)


def _layer_file(number: int, entry: object, source: str) -> ListedFile:
    # An entry is a path, whose layer is the entry's number, or {layer, filepath}.
    where = f"{source}: entry {number} of transcoders is {entry!r}"
    match entry:
        # As with k, `layer: true` must not be 1.
        case {"layer": layer, "filepath": str(file)} if type(layer) is int and layer >= 0:
            return layer, file
        case str():
            layers = re.findall(r"(?:^|[/_])layer_(\d+)(?=[/_.]|$)", entry)
        case _:
            raise InputError(f"{where}; give a path, an hf:// address, or layer and filepath.")
    # A list that begins at another layer must not be taken for layers 0, 1, ...
    if layers and int(layers[-1]) != number:
        raise InputError(
            f"{where}, so layer {number} would be read from a file of layer {layers[-1]}; list "
            "all layers in order from 0, or each with its layer and filepath."
        )
    return number, entry
