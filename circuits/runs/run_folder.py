"""What all run folders share: a digest in their name, a lock, and a record written last.

`circuit_run` and `graph_run` list the files that their folders hold.
"""

from __future__ import annotations

import json
import platform
from collections.abc import Iterable
from hashlib import blake2b
from importlib.metadata import version
from pathlib import Path
from typing import Any

from filelock import FileLock
from torch import Tensor

import circuits
from circuits.models import Model
from circuits.models.identity import identity
from circuits.system.errors import InputError

RECORD, LOCK = "record.json", ".lock"
PACKAGES = ("torch", "transformer-lens", "transformers")


def digest(parts: Any, columns: Iterable[Tensor] = (), *, size: int = 64) -> str:
    """Hash JSON values and then tensors, to `size` bytes in hexadecimal digits."""
    text = json.dumps(parts)
    result = blake2b(text.encode(), digest_size=size)
    for column in columns:
        array = column.cpu().numpy()
        result.update(array.tobytes())
    return result.hexdigest()


def lock_folder(folder: Path) -> FileLock:
    """Make a folder, or raise an InputError; return a lock on it that ends with its process."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(
            f"the run folder {folder} cannot be made ({error.strerror}); give another one with out."
        ) from error
    return FileLock(folder / LOCK)


def describe_setup(model: Model) -> dict[str, Any]:
    """Describe the model, the installed versions and the device for a record."""
    model_identity = identity(model)
    versions = {name: version(name) for name in PACKAGES}
    return {
        "model": {
            "name": model_identity.name,
            "shape": dict(model_identity.shape),
            "weights": model_identity.weights,
            "dtype": str(model.cfg.dtype),
        },
        "versions": {
            "python": platform.python_version(),
            "circuits": circuits.__version__,
            **versions,
        },
        "device": str(model.cfg.device),
    }
