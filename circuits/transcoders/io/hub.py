"""Transcoder files on the Hugging Face hub: hf:// addresses, and what is fetched from them."""

from __future__ import annotations

import glob
import posixpath
import re
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from urllib.parse import unquote

import huggingface_hub

from circuits.system.errors import InputError
from circuits.system.messages import warnings_passed_on
from circuits.transcoders.io.tensor_files import WEIGHTS

PREFIX = "hf://"
ADDRESS = re.compile(r"hf://([^/?#]+/[^/?#]+)/*([^?#]*)(?:\?revision=([^&#]*))?")


@dataclass(frozen=True)
class Address:
    """A repository (owner/name) on the hub, or a folder or file in it."""

    repository: str
    path: str = ""
    # A branch, tag or commit; None is the default branch.
    revision: str | None = None

    @classmethod
    def parse(cls, text: str) -> Address:
        """Parse hf://owner/repo or hf://owner/repo/sub/folder, optionally with ?revision=REV."""
        match = ADDRESS.fullmatch(text)
        if match is None:
            raise InputError(
                f"{text!r} is no address of transcoders; write hf://owner/repo/folder?revision=REV,"
                " where folder and revision can be left out."
            )
        parts = match.groups("")
        repository, path, revision = map(unquote, parts)
        return cls(repository, revision=revision or None) / path

    def __truediv__(self, path: str) -> Address:
        """Return the address of a path relative to this one, within the repository."""
        joined = posixpath.join(self.path, path)
        joined = posixpath.normpath(joined)
        if joined.startswith(("/", "..")):
            raise InputError(
                f"{path!r} lies outside of the repository {self.repository}; give a path within it "
                "or an hf:// address."
            )
        return replace(self, path="" if joined == "." else joined)

    @property
    def root(self) -> Address:
        """The repository."""
        return replace(self, path="")

    @property
    def name(self) -> str:
        """The name of the folder, or of the repository."""
        return posixpath.basename(self.path or self.repository)

    def __str__(self) -> str:
        revision = f"?revision={self.revision}" if self.revision else ""
        path = posixpath.join(self.repository, self.path)
        return f"{PREFIX}{path.rstrip('/')}{revision}"


Place = Path | Address


def fetch_if_present(file: Address) -> Path:
    """Fetch a file; return where it is on this machine if the hub has it."""
    wanted = [glob.escape(file.path)]
    return _download(file, wanted) / file.path


def fetch_folder(folder: Address) -> Path:
    """Fetch the weights directly in a folder, but no folders within it."""
    # Some repositories have hundreds of variants there, and a config.yaml lists one for each layer.
    prefix = glob.escape(f"{folder.path}/") if folder.path else ""
    wanted = [f"{prefix}*{suffix}" for suffix in WEIGHTS]
    repository = _download(folder, wanted, ignored=[f"{prefix}*/*"])
    local = repository / folder.path
    files = local.glob("*")
    if not any(file.suffix in WEIGHTS for file in files):
        raise InputError(
            f"{folder} has no safetensors or npz files directly in it, and no config.yaml that "
            "lists others; give a folder within it, or a config.yaml of your own that lists the "
            "file of each layer."
        )
    return local


def fetch_files(files: Sequence[Place]) -> list[Path]:
    """Fetch the files that are on the hub, possibly in several repositories."""
    wanted = defaultdict(list)
    for file in files:
        if isinstance(file, Address):
            pattern = glob.escape(file.path)
            wanted[file.root].append(pattern)
    folders = {root: _download(root, patterns) for root, patterns in wanted.items()}
    return [_fetched(file, folders) for file in files]


def _fetched(file: Place, folders: dict[Address, Path]) -> Path:
    if isinstance(file, Path):
        return file
    path = folders[file.root] / file.path
    if not path.is_file():
        raise InputError(f"there is no file {file}; correct the address or the revision.")
    return path


def _download(address: Address, wanted: list[str], ignored: list[str] | None = None) -> Path:
    # Fetch the matching files that are not in the cache; return the repository's local folder.
    try:
        with warnings_passed_on():
            folder = huggingface_hub.snapshot_download(
                address.repository,
                revision=address.revision,
                allow_patterns=wanted,
                ignore_patterns=ignored,
            )
    # Errors have many types, some from a network library, and vary between versions of the hub.
    except Exception as error:
        lines = str(error).strip().splitlines()
        reason = lines[0] if lines else type(error).__name__
        raise InputError(
            f"{address} cannot be fetched: {reason.rstrip('.')}. Correct the address, or download "
            "it elsewhere and give the folder."
        ) from error
    return Path(folder)
