"""What all run folders share: a digest in their name, a lock, and a record written last.

`circuit_run` and `graph_run` list the files that their folders hold.
"""

from __future__ import annotations

import contextlib
import platform
import warnings
from collections.abc import Callable, Iterator, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout

import circuits
from circuits.models import Model, shape_of
from circuits.models.identity import identity
from circuits.system.errors import InputError, NotWrittenError
from circuits.system.files import read_json, remove_abandoned

RECORD, LOCK = "record.json", ".lock"
PACKAGES = ("transformer-lens", "transformers")
SECONDS_BETWEEN_TRIES = 60

Entering = Callable[[], bool]


@contextlib.contextmanager
def locked(folder: Path, on: Callable[[Entering], bool] = lambda enter: enter()) -> Iterator[None]:
    """Make a folder, and wait until no other process works in it; see `_locked_once`.

    With `on=on_first`, the first rank holds the lock for all. It tells the others after each try,
    since they would time out.
    """
    with contextlib.ExitStack() as stack:
        while not on(lambda: _entered(stack, folder)):
            pass
        yield


def _entered(stack: contextlib.ExitStack, folder: Path) -> bool:
    """Try to enter `_locked_once`; say why nothing happens if another process holds the lock."""
    try:
        stack.enter_context(_locked_once(folder))
    except Timeout:
        warnings.warn(f"another process works in {folder}; waiting until it is done.", stacklevel=2)
        return False
    return True


@contextlib.contextmanager
def _locked_once(folder: Path) -> Iterator[None]:
    """Make a folder and lock it, with a lock that ends with its process.

    Raises:
        NotWrittenError: the folder cannot be made, written or locked.
        Timeout: another process holds the lock for longer than `SECONDS_BETWEEN_TRIES`.
    """
    # A lock that is a file which exists would outlive its process, and be copied with the folder.
    lock = FileLock(folder / LOCK, fallback_to_soft=False)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock.acquire(timeout=SECONDS_BETWEEN_TRIES)
    except Timeout:
        raise
    except (OSError, NotImplementedError) as error:
        reason = getattr(error, "strerror", None) or error
        raise NotWrittenError(
            f"the run folder {folder} cannot be made or locked ({reason}); give another one, on a "
            "disk that can be written and has locks, with out."
        ) from error
    try:
        remove_abandoned(folder)
        yield
    finally:
        lock.release()


def read_record(folder: Path, kind: str, version: int, needed: Mapping[str, Any]) -> dict[str, Any]:
    """Read the record of a finished run, which holds values of the `needed` types by their names.

    Raises:
        InputError: the file is missing, damaged, of another kind or from a newer version.
    """
    path = folder / RECORD
    record = read_json(path, kind, version)
    wrong = [name for name, type_ in needed.items() if not isinstance(record.get(name), type_)]
    if wrong:
        raise InputError(
            f"{path} is damaged: it has no {', '.join(wrong)}; delete the folder and run again."
        )
    return record


def describe_setup(model: Model) -> dict[str, Any]:
    """Describe the model, the installed versions and the device for a record."""
    model_identity = identity(model)
    versions = {name: version(name) for name in PACKAGES}
    return {
        "model": {
            "name": model_identity.name,
            "shape": dict(model_identity.shape),
            "weights": model_identity.weights,
            "dtype": str(shape_of(model).dtype),
        },
        "versions": {
            "python": platform.python_version(),
            "circuits": circuits.__version__,
            **versions,
            # With its build, such as "+cu130", which its package does not always say.
            "torch": torch.__version__,
        },
        "device": str(shape_of(model).device),
    }
