"""Reading the tensors of a layer from safetensors or npz files, and checking names and shapes.

Whatever is wrong with a file raises an `InputError` that names it. Pickles are never read.
"""

from __future__ import annotations

import zipfile
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from circuits.system.device import device_called
from circuits.system.errors import InputError

PICKLES = (".pt", ".pth", ".bin", ".pkl", ".pickle", ".ckpt")
WEIGHTS = (".safetensors", ".npz")
# What safetensors, NumPy and zipfile raise for broken files.
BROKEN_FILE = (SafetensorError, zipfile.BadZipFile, zlib.error)
BROKEN_ARRAY = (OSError, ValueError, TypeError, EOFError)


@dataclass(frozen=True)
class LayerTensors:
    """The tensors of one layer, by name.

    Attributes:
        where: the file or files, for messages.
        sizes: sizes of named axes. Those of layer 0 hold for all layers; `get` adds new ones.
        known: names that were asked for.
    """

    tensors: Mapping[str, Tensor]
    where: str
    layer: int
    sizes: dict[str, int]
    known: list[str] = field(default_factory=list)

    def get(self, name: str, axes: str, *, or_transposed: bool = False) -> Tensor:
        """Return a floating-point tensor with certain axes, such as "features, d_model".

        A size that is not known yet is taken from this tensor. With `or_transposed`, a matrix that
        fits only when transposed is transposed.
        """
        tensor = self.raw(name)
        if not tensor.is_floating_point():
            raise InputError(
                f"{self.where}: {name} holds {tensor.dtype}, not floating-point numbers; convert "
                "the weights to bfloat16 or float32."
            )
        names = axes.split(", ")
        if or_transposed and tensor.dim() == 2 and not self._fits(tensor, names):
            tensor = tensor.T
        if not self._fits(tensor, names):
            expected = tuple(self.sizes.get(axis, "any size") for axis in names)
            same = "; features and d_model are as in layer 0" if self.layer else ""
            raise InputError(
                f"{self.where}: {name} has shape {tuple(self.tensors[name].shape)}, expected "
                f"{expected} ({axes}){same}. Check that the file is complete and of this set."
            )
        self.sizes.update(zip(names, tensor.shape, strict=True))
        return tensor

    def find(self, name: str, axes: str) -> Tensor | None:
        """Return the same as `get`, or None if there is no such tensor."""
        self.known.append(name)
        return self.get(name, axes) if name in self.tensors else None

    def find_count(self, name: str) -> int | None:
        """Return the positive integer that a tensor holds, or None if there is no such tensor."""
        self.known.append(name)
        if name not in self.tensors:
            return None
        tensor = self.tensors[name]
        if tensor.numel() != 1 or tensor.is_floating_point() or int(tensor) < 1:
            raise InputError(
                f"{self.where}: {name} has shape {tuple(tensor.shape)} and type {tensor.dtype}, "
                "expected one positive integer."
            )
        return int(tensor)

    def raw(self, name: str) -> Tensor:
        """Return a tensor as it is stored."""
        self.known.append(name)
        if name not in self.tensors:
            raise InputError(
                f"{self.where}: there is no tensor {name}; there are {', '.join(self.tensors)}. "
                "Restore the file."
            )
        return self.tensors[name]

    def check_all_known(self) -> None:
        """Refuse tensors that were not asked for: they might change what features do."""
        if unknown := set(self.tensors).difference(self.known):
            raise InputError(
                f"{self.where}: it is not known what {', '.join(sorted(unknown))} does. Fold it "
                "into the other tensors, or remove it if it changes nothing."
            )

    def _fits(self, tensor: Tensor, axes: Sequence[str]) -> bool:
        if tensor.dim() != len(axes):
            return False
        sizes = zip(axes, tensor.shape, strict=True)
        return all(self.sizes.get(axis, size) == size for axis, size in sizes)


def read_tensors(files: Sequence[Path]) -> dict[str, Tensor]:
    """Read all tensors of some files. Those of safetensors files are mapped, not yet in memory."""
    tensors = {}
    for file in files:
        tensors.update(_read_file(file))
    return tensors


def _read_file(file: Path) -> dict[str, Tensor]:
    if file.suffix in PICKLES:
        raise InputError(pickle_message(file))
    if file.suffix not in WEIGHTS:
        raise InputError(f"{file} is neither a safetensors nor an npz file; give one of these.")
    if not file.is_file():
        raise InputError(
            f"there is no file {file}; restore it, or correct the list in config.yaml."
        )
    try:
        if file.suffix == ".safetensors":
            return load_file(file)
        # The file is opened here because np.load does not close a broken file.
        with file.open("rb") as handle, np.load(handle, allow_pickle=False) as archive:
            return {name: torch.from_numpy(array) for name, array in archive.items()}
    except (*BROKEN_FILE, *BROKEN_ARRAY) as error:
        reason = str(error).strip() or type(error).__name__
        raise InputError(
            f"{file} is truncated or not what its name says ({reason.splitlines()[0]}); restore it "
            "or fetch it again."
        ) from error


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
    """Return a function that copies a tensor from a file, or leaves it there if mapped.

    The defaults are the CPU and float32.
    """
    if mapped and (dtype is not None or str(device or "cpu") != "cpu"):
        raise InputError(
            f"mapped=True leaves weights in their files, so device={device!r} and dtype={dtype} "
            "cannot be applied; leave both out (rows that are used are moved to the device and "
            "dtype of the activations) or load with mapped=False."
        )
    check_weight_dtype(dtype)
    place = device_called(device or "cpu")

    def copy(tensor: Tensor) -> Tensor:
        # `tensor.to` could return a view that is not contiguous and keeps the file open.
        empty = torch.empty(tensor.shape, dtype=dtype or torch.float32, device=place)
        return empty.copy_(tensor)

    return (lambda tensor: tensor) if mapped else copy


def check_weight_dtype(dtype: torch.dtype | None) -> None:
    """Refuse a dtype that is not a floating-point type."""
    if dtype is not None and not dtype.is_floating_point:
        raise InputError(
            f"weights cannot be of dtype {dtype}; use torch.float32, torch.bfloat16 or "
            "torch.float16."
        )
