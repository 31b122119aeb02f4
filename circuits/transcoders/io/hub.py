"""Files of transcoders on the Hugging Face hub: hf:// addresses, and what of a repository is fetched."""

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

PREFIX = "hf://"
WEIGHTS = (".safetensors", ".npz")


@dataclass(frozen=True)
class Address:
    """A repository, or a folder or file in it.

    Attributes:
        path: within the repository; empty for all of it.
        revision: branch, tag or commit; None for the default branch.
    """

    repository: str
    path: str = ""
    revision: str | None = None

    @classmethod
    def parse(cls, text: str) -> Address:
        """hf://owner/repo, hf://owner/repo/sub/folder or either with ?revision=REV.

        Raises:
            InputError: it is none of these.
        """
        parts = urlsplit(text)
        owner, (repository, _, path) = parts.netloc, unquote(parts.path).strip("/").partition("/")
        query = parse_qs(parts.query, keep_blank_values=True)
        if (
            parts.scheme != "hf"
            or not owner
            or not repository
            or set(query) - {"revision"}
            or parts.fragment
        ):
            raise InputError(
                f"{text!r} is no address of transcoders; write hf://owner/repo/folder?revision=REV, without what is not needed."
            )
        return cls(f"{owner}/{repository}", "", (query.get("revision") or [""])[0] or None).joined(
            path
        )

    def joined(self, path: str) -> Address:
        """A path from here.

        Raises:
            InputError: it leads out of the repository.
        """
        whole = posixpath.normpath(posixpath.join(self.path, path))
        if whole.startswith(("/", "..")):
            raise InputError(
                f"{path!r} lies outside of the repository {self.repository}; give a path within it or an hf:// address."
            )
        return replace(self, path="" if whole == "." else whole)

    @property
    def name(self) -> str:
        """The last part: of the folder, or of the repository."""
        return posixpath.basename(self.path or self.repository)

    def __str__(self) -> str:
        revision = f"?revision={self.revision}" if self.revision else ""
        return f"{PREFIX}{posixpath.join(self.repository, self.path).rstrip('/')}{revision}"


def fetch_config(folder: Address) -> Path | None:
    """The config.yaml of a folder, if it has one.

    Raises:
        InputError: the repository cannot be reached.
    """
    config = folder.joined(CONFIG)
    file = _snapshot(config, [glob.escape(config.path)]) / config.path
    return file if file.is_file() else None


def fetch_folder(folder: Address) -> Path:
    """The weights that lie directly in a folder.

    Folders within it are left: some repositories hold hundreds of variants there, of which a config.yaml lists one per layer.

    Raises:
        InputError: the repository cannot be reached, or has no weights there.
    """
    inside = glob.escape(f"{folder.path}/") if folder.path else ""
    local = (
        _snapshot(folder, [f"{inside}*{suffix}" for suffix in WEIGHTS], [f"{inside}*/*"])
        / folder.path
    )
    if not any(file.suffix in WEIGHTS for file in local.glob("*")):
        raise InputError(
            f"{folder} has no safetensors or npz files directly in it, and no config.yaml that lists others; give a folder within it, or a "
            "config.yaml of your own that lists the file of each layer."
        )
    return local


def fetch_files(files: Sequence[Address]) -> list[Path]:
    """Files by their addresses, which may be of several repositories.

    Raises:
        InputError: a repository cannot be reached, or does not have a file.
    """
    repositories: dict[Address, list[str]] = {}
    for file in files:
        repositories.setdefault(replace(file, path=""), []).append(glob.escape(file.path))
    roots = {
        repository: _snapshot(repository, patterns) for repository, patterns in repositories.items()
    }
    found = [roots[replace(file, path="")] / file.path for file in files]
    if missing := [
        str(file) for file, path in zip(files, found, strict=True) if not path.is_file()
    ]:
        raise InputError(
            f"there is no file {', '.join(missing[:3])}; correct the address or the revision."
        )
    return found


def _snapshot(address: Address, patterns: Sequence[str], ignored: Sequence[str] = ()) -> Path:
    """The local folder of a repository with the files that match; they are fetched where they are not there yet."""
    try:
        return Path(
            huggingface_hub.snapshot_download(
                address.repository,
                revision=address.revision,
                allow_patterns=list(patterns),
                ignore_patterns=list(ignored) or None,
            )
        )
    except Exception as error:  # of many types, some of a network library's own, which differ between versions of huggingface_hub
        reason = next(
            (line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__
        )
        raise InputError(
            f"{address} cannot be fetched: {reason.rstrip('.')}. Correct the address, or download it elsewhere and give the folder."
        ) from error
