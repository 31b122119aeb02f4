"""Reading tensors from safetensors or npz files, and copying them.

Whatever is wrong with a file raises an `InputError` that names it. Pickles are never read.
"""

from __future__ import annotations

import zipfile
import zlib
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open
from torch import Tensor

from circuits.system.device import device_called
from circuits.system.errors import InputError
from circuits.system.files import BROKEN, check_digest, is_file

PICKLES = (".pt", ".pth", ".bin", ".pkl", ".pickle", ".ckpt")
WEIGHTS = (".safetensors", ".npz")
# What safetensors, NumPy and zipfile raise for broken files.
BROKEN_FILE = (*BROKEN, zipfile.BadZipFile, zlib.error, EOFError)
Tensors = dict[str, Tensor]


def read_tensors(file: Path, *, check: bool = True) -> Tensors:
    """Read all tensors of a file. Those of safetensors files are mapped, not yet in memory.

    `check` compares the digest of a file that has one, for which the whole file is read.
    """
    if file.suffix in PICKLES:
        raise InputError(pickle_message(file))
    if file.suffix not in WEIGHTS:
        raise InputError(f"{file} is neither a safetensors nor an npz file; give one of these.")
    if not is_file(file):
        raise InputError(
            f"there is no file {file}; restore it, or correct the list in config.yaml."
        )
    try:
        return _load_npz(file) if file.suffix == ".npz" else _load_safetensors(file, check)
    except InputError:
        raise
    except BROKEN_FILE as error:
        reason = str(error).strip() or type(error).__name__
        raise InputError(
            f"{file} is truncated or not what its name says ({reason.splitlines()[0]}); restore it "
            "or fetch it again."
        ) from error


def _load_safetensors(file: Path, check: bool) -> Tensors:
    with safe_open(file, framework="pt") as opened:
        tensors = {name: opened.get_tensor(name) for name in opened.keys()}
        if check:
            check_digest(file, opened.metadata() or {}, tensors)
        return tensors


def _load_npz(file: Path) -> dict[str, Tensor]:
    # The file is opened here because np.load does not close a broken file.
    with file.open("rb") as handle:
        with np.load(handle, allow_pickle=False) as archive:
            return {name: torch.from_numpy(array) for name, array in archive.items()}


def pickle_message(file: Path) -> str:
    """Say what to do with a pickle."""
    return (
        f"{file} may be a pickle, which can run code when it is read, so it is not read; convert "
        "it with torch.load(..., weights_only=True) and safetensors to layer_0.safetensors, "
        "layer_1.safetensors ... with W_enc, W_dec, b_enc and b_dec."
    )


def weight_copier(
    device: str | torch.device | None, dtype: torch.dtype | None, mapped: bool
) -> Callable[[Tensor], Tensor]:
    """Return a function that copies a tensor from a file, or leaves it there if mapped."""
    if mapped and (dtype is not None or str(device or "cpu") != "cpu"):
        raise InputError(
            f"mapped=True leaves weights in their files, so device={device!r} and dtype={dtype} "
            "cannot be applied; leave both out (rows that are used are moved to the device and "
            "dtype of the activations) or load with mapped=False."
        )
    place = device_called(device or "cpu")
    if mapped:
        return lambda tensor: tensor
    return partial(copied, device=place, dtype=dtype or torch.float32)


def copied(tensor: Tensor, device: str | torch.device, dtype: torch.dtype | None) -> Tensor:
    """Return a contiguous copy, in the same precision if `dtype` is None."""
    # Without a copy, the tensor could be a view that keeps its file open.
    contiguous = torch.contiguous_format
    dtype = dtype or tensor.dtype
    return tensor.detach().to(device, dtype, copy=True, memory_format=contiguous)
