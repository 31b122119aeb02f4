"""Transcoder files on the Hugging Face hub: hf:// addresses, and what is fetched from them.

Whatever cannot be fetched raises an `InputError`.
"""

from __future__ import annotations

import glob
import posixpath
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit

import huggingface_hub

from circuits.system.errors import InputError
from circuits.transcoders.io.config_yaml import CONFIG
from circuits.transcoders.io.tensor_files import WEIGHTS

PREFIX = "hf://"


@dataclass(frozen=True)
class Address:
    """A repository (owner/name) on the hub, or a folder or file in it.

    The revision is a branch, tag or commit; None is the default branch.
    """

    repository: str
    path: str = ""
    revision: str | None = None

    @classmethod
    def parse(cls, text: str) -> Address:
        """Parse hf://owner/repo or hf://owner/repo/sub/folder, optionally with ?revision=REV."""
        parts = urlsplit(text)
        name, _, path = unquote(parts.path).strip("/").partition("/")
        query = parse_qs(parts.query, keep_blank_values=True)
        revision = query.pop("revision", [""])[0]
        is_hub = parts.scheme == "hf" and parts.netloc and name
        if not is_hub or query or parts.fragment:
            raise InputError(
                f"{text!r} is no address of transcoders; write hf://owner/repo/folder?revision=REV,"
                " where folder and revision can be left out."
            )
        return cls(f"{parts.netloc}/{name}", revision=revision or None) / path

    def __truediv__(self, path: str) -> Address:
        """Return the address of a path relative to this one, within the repository."""
        joined = posixpath.normpath(posixpath.join(self.path, path))
        if joined.startswith(("/", "..")):
            raise InputError(
                f"{path!r} lies outside of the repository {self.repository}; give a path within it "
                "or an hf:// address."
            )
        return replace(self, path="" if joined == "." else joined)

    @property
    def name(self) -> str:
        """The name of the folder, or of the repository."""
        return posixpath.basename(self.path or self.repository)

    def __str__(self) -> str:
        revision = f"?revision={self.revision}" if self.revision else ""
        path = posixpath.join(self.repository, self.path)
        return f"{PREFIX}{path.rstrip('/')}{revision}"


def fetch_config(folder: Address) -> Path | None:
    """Fetch the config.yaml of a folder; None if it has none."""
    config = folder / CONFIG
    file = _download(config, [glob.escape(config.path)]) / config.path
    return file if file.is_file() else None


def fetch_folder(folder: Address) -> Path:
    """Fetch the weights directly in a folder.

    Folders within it are not fetched. Some repositories have hundreds of variants there, and a
    config.yaml lists one for each layer.
    """
    prefix = glob.escape(f"{folder.path}/") if folder.path else ""
    wanted = [f"{prefix}*{suffix}" for suffix in WEIGHTS]
    local = _download(folder, wanted, ignored=[f"{prefix}*/*"]) / folder.path
    if not any(file.suffix in WEIGHTS for file in local.glob("*")):
        raise InputError(
            f"{folder} has no safetensors or npz files directly in it, and no config.yaml that "
            "lists others; give a folder within it, or a config.yaml of your own that lists the "
            "file of each layer."
        )
    return local


def fetch_files(files: Sequence[Address]) -> list[Path]:
    """Fetch files, possibly from several repositories."""
    roots = [replace(file, path="") for file in files]
    wanted: dict[Address, list[str]] = {root: [] for root in roots}
    for root, file in zip(roots, files, strict=True):
        wanted[root].append(glob.escape(file.path))
    local = {root: _download(root, patterns) for root, patterns in wanted.items()}
    found = [local[root] / file.path for root, file in zip(roots, files, strict=True)]
    for file, path in zip(files, found, strict=True):
        if not path.is_file():
            raise InputError(f"there is no file {file}; correct the address or the revision.")
    return found


def _download(address: Address, wanted: list[str], ignored: list[str] | None = None) -> Path:
    # Fetch the matching files that are not in the cache; return the repository's local folder.
    try:
        folder = huggingface_hub.snapshot_download(
            address.repository,
            revision=address.revision,
            allow_patterns=wanted,
            ignore_patterns=ignored,
        )
    # Errors have many types, some from a network library, and vary between versions of the hub.
    except Exception as error:
        reason, *_ = str(error).strip().splitlines() or [type(error).__name__]
        raise InputError(
            f"{address} cannot be fetched: {reason.rstrip('.')}. Correct the address, or download "
            "it elsewhere and give the folder."
        ) from error
    return Path(folder)
