"""The config.yaml of a set: where features read and write, how they fire, and the layer files."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from circuits.system.errors import InputError
from circuits.transcoders.transcoder import Reads, Writes

CONFIG = "config.yaml"
# The model_kind of a set that is being saved.
UNFINISHED = "unfinished"

# By value in the file. Of several hooks with one meaning, the first is the one that is written.
# A parallel block has no hook_resid_mid: its MLP reads hook_resid_pre.
CROSS_LAYER = {"transcoder_set": False, "cross_layer_transcoder": True}
READS: dict[str, Reads] = {
    "hook_resid_mid": "residual",
    "hook_resid_pre": "residual",
    "hook_mlp_in": "residual",
    "ln2.hook_normalized": "normalized",
    "mlp.hook_in": "mlp_input",
}
WRITES: dict[str, Writes] = {"hook_mlp_out": "residual", "mlp.hook_out": "mlp"}
ACTIVATIONS = {name: name for name in ("relu", "jump_relu", "topk", "batch_topk")}


@dataclass(frozen=True)
class TranscoderConfig:
    """The content of a config.yaml; None, or nothing, where it says nothing.

    Attributes:
        source: the file, for messages; empty if there is none.
        cross_layer: whether it is of a cross-layer transcoder.
        files: layer and file of each entry, as written: a path or an hf:// address.
    """

    source: str = ""
    cross_layer: bool | None = None
    reads: Reads | None = None
    writes: Writes | None = None
    activation: str | None = None
    k: int | None = None
    files: tuple[tuple[int, str], ...] = ()


def read_config(file: Path, source: str) -> TranscoderConfig:
    """Read a config.yaml.

    Args:
        source: name of the file in messages.

    Raises:
        InputError: it is not YAML, not a mapping, or a value is not allowed.
    """
    content = _read_mapping(file, source)
    if content.get("model_kind") == UNFINISHED:
        raise InputError(
            f"{source}: saving into this folder was interrupted, so its files may be of different "
            "sets; save it again."
        )
    k = content.get("k")
    # bool is a subclass of int, and `k: true` is a mistake.
    if k is not None and (type(k) is not int or k < 1):
        raise InputError(
            f"{source}: k is {k!r}; give the number of features that may fire, a positive integer."
        )
    entries = content.get("transcoders")
    if entries is not None and not (isinstance(entries, list) and entries):
        raise InputError(
            f"{source}: transcoders is {entries!r}; give a list with the file of each layer, or "
            "leave it out."
        )
    files = [_layer_file(number, entry, source) for number, entry in enumerate(entries or [])]
    return TranscoderConfig(
        source,
        cross_layer=_choose(content, "model_kind", CROSS_LAYER, source),
        reads=_choose(content, "feature_input_hook", READS, source),
        writes=_choose(content, "feature_output_hook", WRITES, source),
        activation=_choose(content, "activation", ACTIVATIONS, source),
        k=k,
        files=tuple(files),
    )


def _read_mapping(file: Path, source: str) -> dict[str, Any]:
    try:
        content = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError, OSError, RecursionError) as error:
        reason = " ".join(str(error).split())
        raise InputError(
            f"{source} cannot be read as YAML ({reason}); correct or restore it."
        ) from error
    if not isinstance(content, dict):
        raise InputError(
            f"{source} holds {type(content).__name__} and no settings; expected lines like "
            "model_kind: transcoder_set."
        )
    return content


def _choose(
    content: Mapping[str, Any],
    key: str,
    choices: Mapping[str, Any],
    source: str,
) -> Any:
    """The meaning of a value, however it is spelled: JumpReLU, jump-relu and jump_relu are one."""
    value = content.get(key)
    if value is None:
        return None
    meanings = {_plain(name): meaning for name, meaning in choices.items()}
    if not isinstance(value, str) or _plain(value) not in meanings:
        raise InputError(
            f"{source}: {key} is {value!r}, which is not known; use one of {', '.join(choices)}."
        )
    return meanings[_plain(value)]


def _plain(name: str) -> str:
    return re.sub(r"[-_\s]", "", name).lower()


def _layer_file(number: int, entry: object, source: str) -> tuple[int, str]:
    """Layer and file of an entry: a path, whose layer is its number, or {layer, filepath}."""
    if isinstance(entry, dict):
        layer, file = entry.get("layer"), entry.get("filepath")
        if type(layer) is int and layer >= 0 and isinstance(file, str):
            return layer, file
    if not isinstance(entry, str):
        raise InputError(
            f"{source}: entry {number} of transcoders is {entry!r}; give a path, an hf:// address, "
            "or layer and filepath."
        )
    # A list that begins at another layer must not be taken for layers 0, 1, ...
    layers = re.findall(r"(?:^|[/_])layer_(\d+)(?=[/_.]|$)", entry)
    if layers and int(layers[-1]) != number:
        raise InputError(
            f"{source}: entry {number} of transcoders is {entry!r}, so layer {number} would be "
            f"read from a file of layer {layers[-1]}; list all layers in order from 0, or each "
            "with its layer and filepath."
        )
    return number, entry
