"""Reading and writing files: safetensors and JSON with a format and a version, replaced atomically."""

from __future__ import annotations

import json
import os
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from circuits.system.errors import InputError


def write_tensors(
    path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str], kind: str, version: int
) -> Path:
    """Write a safetensors file whose header says its format and version. A reader sees the old file or the new one, never a part."""
    header = {"format": kind, "format_version": str(version), **metadata}
    return write_bytes(
        path,
        save(
            {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, header
        ),
    )


def read_tensors(path: Path, kind: str, version: int) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors of a file and the metadata of its header.

    Raises:
        InputError: the file is missing, truncated, of another kind or from a newer version.
    """
    if not path.is_file():
        raise InputError(f"there is no file {path}; check the path.")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            _check_format(
                path, metadata.get("format"), metadata.get("format_version"), kind, version
            )
            return {name: file.get_tensor(name) for name in file.keys()}, metadata
    except (SafetensorError, OSError) as error:
        raise InputError(
            f"{path} is truncated or not a safetensors file ({error}); restore it or make it again."
        ) from error


def write_json(path: Path, content: Mapping[str, Any], kind: str, version: int) -> Path:
    """Write a JSON object that says its format and version, atomically."""
    return write_bytes(
        path, json.dumps({"format": kind, "format_version": version, **content}, indent=2).encode()
    )


def read_json(path: Path, kind: str, version: int) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
        InputError: the file is missing, truncated, of another kind or from a newer version.
    """
    if not path.is_file():
        raise InputError(f"there is no file {path}; check the path.")
    try:
        content = json.loads(path.read_text())
    except (ValueError, RecursionError) as error:
        raise InputError(
            f"{path} is truncated or not JSON ({error}); restore it or make it again."
        ) from error
    if not isinstance(content, dict):
        raise InputError(
            f"{path} holds no {kind}: expected a JSON object, found {type(content).__name__}."
        )
    _check_format(
        path, content.pop("format", None), content.pop("format_version", None), kind, version
    )
    return content


def write_bytes(path: Path, content: bytes) -> Path:
    """Write a file through a temporary neighbour, so that a killed process leaves the old file or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    try:
        with temporary.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    return path


def _check_format(
    path: Path, found: object, found_version: object, kind: str, version: int
) -> None:
    if found != kind:
        raise InputError(
            f"{path} is not a {kind} file (its format is {found!r}); give the right file."
        )
    if not str(found_version).isdecimal() or int(str(found_version)) > version:
        raise InputError(
            f"{path} has format version {found_version}, and this version of circuits reads up to {version}; upgrade circuits."
        )
