"""config.yaml of a set of transcoders: where features read and write, how they fire, and which files there are."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import yaml

from circuits.system.errors import InputError
from circuits.transcoders.transcoder import Reads, Writes

CONFIG = "config.yaml"
Kind = Literal["transcoder_set", "cross_layer_transcoder"]
KINDS: tuple[Kind, ...] = ("transcoder_set", "cross_layer_transcoder")
UNFINISHED = "unfinished"

# The first hook of a kind is the one that is written. What an MLP reads before its norm is hook_resid_pre in a parallel block.
READS: dict[str, Reads] = {
    "hook_resid_mid": "residual",
    "hook_resid_pre": "residual",
    "hook_mlp_in": "residual",
    "ln2.hook_normalized": "normalized",
    "mlp.hook_in": "mlp_input",
}
WRITES: dict[str, Writes] = {"hook_mlp_out": "residual", "mlp.hook_out": "mlp"}
ACTIVATIONS = ("relu", "jump_relu", "topk", "batch_topk")


@dataclass(frozen=True)
class Settings:
    """What a config.yaml says; None, or nothing, where it does not.

    Attributes:
        source: the file, for messages; empty without one.
        files: which file each layer is in, as written: a path or an hf:// address.
    """

    source: str = ""
    kind: Kind | None = None
    reads: Reads | None = None
    writes: Writes | None = None
    activation: str | None = None
    k: int | None = None
    files: tuple[tuple[int, str], ...] = ()


def read_settings(file: Path, source: str) -> Settings:
    """What a config.yaml says.

    Args:
        source: what to call it in messages.

    Raises:
        InputError: it is not YAML, not a mapping, or one of its values is none of those that are known.
    """
    try:
        content = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError, OSError, RecursionError) as error:
        raise InputError(
            f"{source} cannot be read as YAML ({' '.join(str(error).split())}); correct or restore it."
        ) from error
    if not isinstance(content, dict):
        raise InputError(
            f"{source} holds {type(content).__name__} and no settings; expected lines like model_kind: transcoder_set."
        )
    if content.get("model_kind") == UNFINISHED:
        raise InputError(
            f"{source}: saving into this folder was interrupted, so its files may be of different sets; save it again."
        )
    return Settings(
        source,
        _one_of(content, "model_kind", {kind: kind for kind in KINDS}, source),
        _one_of(content, "feature_input_hook", READS, source),
        _one_of(content, "feature_output_hook", WRITES, source),
        _activation(content, source),
        _k(content, source),
        tuple(
            _file(number, entry, source) for number, entry in enumerate(_listed(content, source))
        ),
    )


def _one_of(content: dict[str, Any], key: str, known: dict[str, Any], source: str) -> Any:
    value = content.get(key)
    if value is None:
        return None
    if not isinstance(value, str) or value not in known:
        raise InputError(
            f"{source}: {key} is {value!r}, which is not known; use one of {', '.join(known)}."
        )
    return known[value]


def _activation(content: dict[str, Any], source: str) -> str | None:
    """The activation, however it is spelled: JumpReLU, jump-relu and jump_relu are one."""

    def plain(name: str) -> str:
        return re.sub(r"[-_\s]", "", name).lower()

    value = content.get("activation")
    known = {plain(name): name for name in ACTIVATIONS}
    if value is not None and (not isinstance(value, str) or plain(value) not in known):
        raise InputError(
            f"{source}: activation is {value!r}, which is not known; use one of {', '.join(ACTIVATIONS)}."
        )
    return None if value is None else known[plain(value)]


def _k(content: dict[str, Any], source: str) -> int | None:
    value = content.get("k")
    if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
        raise InputError(
            f"{source}: k is {value!r}; give the number of features that may fire, a positive integer."
        )
    return value


def _listed(content: dict[str, Any], source: str) -> list[Any]:
    entries = content.get("transcoders")
    if entries is not None and (not isinstance(entries, list) or not entries):
        raise InputError(
            f"{source}: transcoders is {entries!r}; give a list with the file of each layer, or leave it out."
        )
    return entries or []


def _file(number: int, entry: object, source: str) -> tuple[int, str]:
    """Layer and file of one entry: a path, by its place in the list, or {layer, filepath}."""
    if (
        isinstance(entry, dict)
        and _is_layer(entry.get("layer"))
        and isinstance(entry.get("filepath"), str)
    ):
        return entry["layer"], entry["filepath"]
    if not isinstance(entry, str):
        raise InputError(
            f"{source}: entry {number} of transcoders is {entry!r}; give a path, an hf:// address, or layer and filepath."
        )
    numbers = re.findall(r"(?:^|[/_])layer_(\d+)(?=[/_.]|$)", entry)
    if numbers and int(numbers[-1]) != number:
        # A list that begins at another layer would otherwise be taken for layers 0, 1, ...
        raise InputError(
            f"{source}: entry {number} of transcoders is {entry!r}, so layer {number} would be read from a file of layer {numbers[-1]}; "
            "list all layers in order from 0, or each with its layer and filepath."
        )
    return number, entry


def _is_layer(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0
