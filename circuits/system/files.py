"""Read and write safetensors and JSON files that state their format and version.

Every write is atomic: a reader, or a process that is killed, leaves the old file or the new one.
"""

from __future__ import annotations

import json
import os
import uuid
from collections.abc import Mapping
from dataclasses import asdict, is_dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from circuits.system.errors import InputError
from circuits.system.kinds import expect

Tensors = dict[str, Tensor]
TensorsAndMetadata = tuple[Tensors, dict[str, str]]


def path_of(given: object) -> Path:
    """A file or folder that a user names.

    Raises:
        InputError: it is no path.
    """
    expect(given, str | Path, "a path", "give a text or a pathlib.Path")
    return Path(str(given))


def write_tensors(
    path: Path,
    tensors: Mapping[str, Tensor],
    metadata: Mapping[str, str],
    kind: str,
    version: int,
) -> Path:
    """Write a safetensors file whose header states its format and version."""
    # The header of a safetensors file holds texts only.
    header = {"format": kind, "format_version": str(version), **metadata}
    on_cpu = {}
    for name, tensor in tensors.items():
        copy = tensor.detach().cpu()
        on_cpu[name] = copy.contiguous()
    return write_bytes(path, save(on_cpu, header))


def read_tensors(path: Path, kind: str, version: int) -> TensorsAndMetadata:
    """Read the tensors of a safetensors file and the metadata in its header.

    Raises:
        InputError: the file is missing, truncated, of another format or from a newer version.
    """
    _check_exists(path)
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            _check_format(path, metadata, kind, version)
            tensors = {name: file.get_tensor(name) for name in file.keys()}
            return tensors, metadata
    except (SafetensorError, OSError) as error:
        raise InputError(
            f"{path} is truncated or not a safetensors file ({error}); restore it or make it again."
        ) from error


def json_text(content: Mapping[str, Any]) -> str:
    """Return `content` as JSON text; dataclasses become dictionaries.

    Raises:
        InputError: a value or key is something else that JSON has no form for, such as a tensor.
    """
    try:
        return json.dumps(content, default=_plain)
    except TypeError as error:
        raise InputError(
            f"a record cannot be saved as JSON ({error}); keep only numbers, texts, lists and "
            "dictionaries with texts as keys in it."
        ) from error


def _plain(value: object) -> Any:
    if is_dataclass(value) and not isinstance(value, type):
        return asdict(value)
    if isinstance(value, np.generic):
        return value.item()
    raise TypeError(f"it holds a {type(value).__name__}")


def write_json(path: Path, content: Mapping[str, Any], kind: str, version: int) -> Path:
    """Write a JSON object that states its format and version."""
    stamped = {"format": kind, "format_version": version, **content}
    text = json.dumps(stamped, indent=2)
    return write_bytes(path, text.encode())


def read_json(path: Path, kind: str, version: int) -> dict[str, Any]:
    """Read the object in a JSON file, without its format and version.

    Raises:
        InputError: the file is missing, truncated, of another format or from a newer version.
    """
    _check_exists(path)
    try:
        content = json.loads(path.read_text())
    except (ValueError, RecursionError) as error:
        raise InputError(
            f"{path} is truncated or not JSON ({error}); restore it or make it again."
        ) from error
    if not isinstance(content, dict):
        found = type(content).__name__
        raise InputError(f"{path} holds no {kind}: expected a JSON object, found {found}.")
    _check_format(path, content, kind, version)
    del content["format"], content["format_version"]
    return content


def write_bytes(path: Path, content: bytes) -> Path:
    """Write a file by way of a temporary one in the same folder, creating the folder if needed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    try:
        with temporary.open("wb") as file:
            file.write(content)
            file.flush()
            # Without fsync a power cut could leave the new name with no content behind it.
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    return path


def _check_exists(path: Path) -> None:
    if not path.is_file():
        raise InputError(f"there is no file {path}; check the path.")


def _check_format(path: Path, header: Mapping[str, Any], kind: str, version: int) -> None:
    found = header.get("format")
    found_version = str(header.get("format_version"))
    if found != kind:
        raise InputError(
            f"{path} is not a {kind} file (its format is {found!r}); give the right file."
        )
    if not found_version.isdecimal() or int(found_version) > version:
        raise InputError(
            f"{path} has format version {found_version}, and this version of circuits "
            f"reads up to {version}; upgrade circuits."
        )
