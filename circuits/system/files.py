"""Read and write safetensors and JSON files that state their format, version and digest.

Every write is atomic: a reader, or a process that is killed, leaves the old file or the new one.
The digest covers all that a file says, so that a change made later is noticed. Files without one
(of earlier versions, or of other programs) are read as they are.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import time
import uuid
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, is_dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from circuits.system.errors import InputError, NotWrittenError
from circuits.system.numbers import shown
from circuits.system.tensors import bytes_of
from circuits.system.torch_modes import without_modes

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

DIGEST, PREFIX = "digest", "circuits-sha256:"
# Below this many bytes, starting threads takes longer than hashing.
MANY_BYTES = 1 << 24
TEMPORARY = re.compile(r"\.(?P<name>.+)\.[0-9a-f]{32}")
# A temporary file that is empty may belong to a process that is about to write it.
SECONDS_EMPTY = 3600
# What safetensors, and torch for shapes or types that it does not know, raise for broken files.
BROKEN = (SafetensorError, OSError, ValueError, TypeError, RuntimeError, AttributeError)

Tensors = Mapping[str, Tensor]
Texts = Mapping[str, str]
Header = Mapping[str, Any]
Content = dict[str, Any]
TensorsAndMetadata = tuple[dict[str, Tensor], dict[str, str]]


def path_of(given: object) -> Path:
    """A file or folder that a user names, if a disk can hold one of that name."""
    path = Path(text_or_path(given, "path"))
    if given == "":
        raise InputError("path='' is empty; name a file or folder, such as '.' for this one.")
    try:
        path.lstat()
    except (FileNotFoundError, NotADirectoryError):
        pass  # whether it has to be there, or can be made, is seen when it is used
    # Names with a zero byte or half a character, too long ones, and folders that may not be read.
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise InputError(
            f"path={shown(str(path))} cannot be used ({reason}); give another one."
        ) from error
    return path


def text_or_path(given: object, name: str) -> str | Path:
    """A text as it is, or a path of any library as a `pathlib.Path`."""
    if isinstance(given, os.PathLike):
        plain = os.fspath(given)
        given = Path(plain) if isinstance(plain, str) else plain
    if not isinstance(given, str | Path):
        raise InputError(f"{name}={shown(given)}: give a text or a pathlib.Path.")
    return given


def write_tensors(path: Path, tensors: Tensors, metadata: Texts, kind: str, version: int) -> Path:
    """Write a safetensors file whose header states its format and version."""
    # The header of a safetensors file holds texts only.
    header = {"format": kind, "format_version": str(version), **metadata}
    return write_bytes(path, tensor_file(tensors, header))


def tensor_file(tensors: Tensors, metadata: Texts) -> bytes:
    """The bytes of a safetensors file with these tensors and metadata, and a digest of both."""
    on_cpu = {}
    for name, tensor in tensors.items():
        on_cpu[name] = tensor.detach().cpu().contiguous()
    return save(on_cpu, with_digest(metadata, on_cpu))


def read_tensors(path: Path, kind: str, version: int) -> TensorsAndMetadata:
    """Read the tensors of a safetensors file and the metadata in its header."""
    while True:
        before = _version_of(path)
        try:
            return _read_tensors(path, kind, version)
        except InputError:
            # safetensors opens a file twice, and another process may replace it in between.
            if _version_of(path) == before:
                raise


def _version_of(path: Path) -> tuple[int, int]:
    with contextlib.suppress(OSError):
        status = path.stat()
        return status.st_ino, status.st_mtime_ns
    return 0, 0


@without_modes()
def _read_tensors(path: Path, kind: str, version: int) -> TensorsAndMetadata:
    _check_exists(path)
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            _check_format(path, metadata, kind, version)
            tensors = {name: file.get_tensor(name) for name in file.keys()}
    except InputError:
        raise
    except BROKEN as error:
        raise InputError(
            f"{path} is truncated or not a safetensors file ({error}); restore it or make it again."
        ) from error
    check_digest(path, metadata, tensors)
    metadata.pop(DIGEST, None)
    return tensors, metadata


def with_digest(header: Header, tensors: Tensors) -> Content:
    """The header of a file with these tensors, beginning with a digest of all other content."""
    return {DIGEST: _content_digest(header, tensors), **header}


def check_digest(path: Path, header: Header, tensors: Tensors) -> None:
    """Compare the digest in a file's header, if there is one, with the file's content."""
    stated: Content = {}
    rest: Content = {}
    for name, value in header.items():
        if name == DIGEST or (isinstance(value, str) and value.startswith(PREFIX)):
            stated[name] = value
        else:
            rest[name] = value
    if stated and stated != {DIGEST: _content_digest(rest, tensors)}:
        raise InputError(
            f"{path} was changed after it was written: its content does not have the digest that "
            "it states. Restore it or make it again; if the change is wanted, "
            + ("save it again with circuits." if tensors else f'delete the line "{DIGEST}" in it.')
        )


def stated_digest(path: Path) -> str:
    """The digest in the header of a safetensors file, without its prefix; empty if it has none."""
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata() or {}
    return metadata.get(DIGEST, "").removeprefix(PREFIX)


def _content_digest(header: Header, tensors: Tensors) -> str:
    if sum(tensor.nbytes for tensor in tensors.values()) < MANY_BYTES:
        described = list(map(_described, tensors.values()))
    else:
        # hashlib lets other threads run while it hashes.
        with ThreadPoolExecutor() as pool:
            described = list(pool.map(_described, tensors.values()))
    content = [header, dict(zip(tensors, described, strict=True))]
    text = json.dumps(content, sort_keys=True, default=str)
    return PREFIX + sha256(text.encode()).hexdigest()


def _described(tensor: Tensor) -> list[Any]:
    digest = sha256(bytes_of(tensor).data)
    shape = list(tensor.shape)
    return [str(tensor.dtype), shape, digest.hexdigest()]


def json_text(content: Header) -> str:
    """Return `content` as JSON text; dataclasses become dictionaries."""
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


def write_json(path: Path, content: Header, kind: str, version: int) -> Path:
    """Write a JSON object that states its format, version and digest."""
    stamped = {"format": kind, "format_version": version, **content}
    # As it will be read: with texts as keys, and lists for tuples.
    plain = json.loads(json_text(stamped))
    text = json.dumps(with_digest(plain, {}), indent=2)
    return write_bytes(path, text.encode())


def read_json(path: Path, kind: str, version: int) -> Content:
    """Read the object in a JSON file, without its format, version and digest."""
    content = read_json_object(path, kind)
    _check_format(path, content, kind, version)
    check_digest(path, content, {})
    del content["format"], content["format_version"]
    content.pop(DIGEST, None)
    return content


def read_json_object(path: Path, kind: str) -> Content:
    """Read a JSON file that holds an object, whoever wrote it; `kind` says what it should be."""
    _check_exists(path)
    try:
        text = path.read_text(encoding="utf-8")
        content = json.loads(text, object_pairs_hook=_with_unique_keys)
    except (ValueError, RecursionError, OSError) as error:
        raise InputError(
            f"{path} is truncated or not JSON ({error}); restore it or make it again."
        ) from error
    if not isinstance(content, dict):
        found = type(content).__name__
        raise InputError(f"{path} holds no {kind}: expected a JSON object, found {found}.")
    return content


def _with_unique_keys(pairs: list[tuple[str, Any]]) -> Content:
    content = dict(pairs)
    if len(content) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"the key {twice!r} appears twice")
    return content


def write_bytes(path: Path, content: bytes) -> Path:
    """Write a file by way of a temporary one in the same folder, creating the folder if needed.

    Temporary files that killed processes left behind for this file are removed.

    Raises:
        NotWrittenError: it cannot be written, for example because the disk is full.
    """
    temporary = path.parent / f".{path.name}.{uuid.uuid4().hex}"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        remove_abandoned(path.parent, path.name)
        with _removed_at_the_end(temporary), temporary.open("wb") as file:
            with contextlib.suppress(OSError):  # some network disks have no locks
                _lock(file)
            file.write(content)
            file.flush()
            # Without fsync a power cut could leave the new name with no content behind it.
            os.fsync(file.fileno())
            if fcntl is None:
                file.close()  # Windows renames no open file
            temporary.replace(path)
    except OSError as error:
        raise NotWrittenError(
            f"{path} cannot be written ({error.strerror or error}); what was there before is "
            "unchanged. Make room there, or give a folder that can be written."
        ) from error
    return path


def remove_abandoned(folder: Path, name: str | None = None) -> None:
    """Remove the temporary files of killed processes, for one file or for all in a folder.

    Those that a process is still writing stay.
    """
    with contextlib.suppress(OSError):
        for path in folder.iterdir():
            match = TEMPORARY.fullmatch(path.name)
            if match and name in (None, match["name"]) and _is_abandoned(path):
                path.unlink(missing_ok=True)


def _is_abandoned(path: Path) -> bool:
    # A writer holds a lock on its file, which ends with the process, from before it writes. An
    # empty file is left alone, because its writer may be about to lock it.
    with contextlib.suppress(OSError), path.open("r+b") as file:
        status = os.fstat(file.fileno())
        is_old = time.time() - status.st_mtime > SECONDS_EMPTY
        if is_old or (status.st_size > 0 and fcntl is not None):
            _lock(file)
            return True
    return False


def _lock(file: BinaryIO) -> None:
    if fcntl is not None:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)


@contextlib.contextmanager
def _removed_at_the_end(path: Path) -> Iterator[None]:
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            path.unlink()


def is_file(path: Path) -> bool:
    """Whether there is a file that can be looked at, with a name that the disk can hold."""
    try:
        return path.is_file()
    except OSError:
        return False


def _check_exists(path: Path) -> None:
    if not is_file(path):
        raise InputError(f"there is no file {path}; check the path.")


def _check_format(path: Path, header: Header, kind: str, version: int) -> None:
    found = header.get("format")
    found_version = str(header.get("format_version"))
    if found != kind:
        raise InputError(
            f"{path} is not a {kind} file (its format is {found!r}); give the right file."
        )
    if not re.fullmatch("[0-9]{1,9}", found_version) or int(found_version) > version:
        raise InputError(
            f"{path} has format version {found_version}, and this version of circuits "
            f"reads up to {version}; upgrade circuits."
        )
