"""Tensors in the files of a layer, read from safetensors or npz with their names and shapes checked. Pickles are never read."""

from __future__ import annotations

import contextlib
import zipfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from circuits.system.device import device_called
from circuits.system.errors import InputError

PICKLES = (".pt", ".pth", ".bin", ".pkl", ".pickle", ".ckpt")


@dataclass(frozen=True)
class Placement:
    """Where weights are brought as they are read.

    Attributes:
        device, dtype: of the copies that are made.
        mapped: make none; tensors stay in their files and in their stored precision.
    """

    device: torch.device
    dtype: torch.dtype
    mapped: bool

    def place(self, tensor: Tensor) -> Tensor:
        """A tensor, or a view of one, where it belongs; a copy is contiguous and holds on to no file."""
        if self.mapped:
            return tensor
        return torch.empty(tensor.shape, device=self.device, dtype=self.dtype).copy_(tensor)


def placement(
    device: str | torch.device | None, dtype: torch.dtype | None, mapped: bool
) -> Placement:
    """What was asked for, None being the CPU and float32.

    Raises:
        InputError: no such device, no CUDA here, not a floating-point type, or mapped weights that should be somewhere else too.
    """
    if mapped and (dtype is not None or str(device or "cpu") != "cpu"):
        raise InputError(
            f"mapped=True leaves weights in their files, so device={device!r} and dtype={dtype} cannot be had; leave both out (rows that "
            "are used are brought to the device and precision of the activations) or load with mapped=False."
        )
    if dtype is not None and not dtype.is_floating_point:
        raise InputError(
            f"weights cannot be of dtype {dtype}; use torch.float32, torch.bfloat16 or torch.float16."
        )
    return Placement(
        device_called("cpu" if device is None else device), dtype or torch.float32, mapped
    )


@dataclass(frozen=True)
class LayerTensors:
    """The tensors of one layer, which may lie in two files.

    Attributes:
        readers: by name, the file a tensor is in and what reads it.
        files: all of them.
    """

    readers: dict[str, tuple[Path, Callable[[], Tensor]]]
    files: tuple[Path, ...]

    def __contains__(self, name: str) -> bool:
        return name in self.readers

    @property
    def where(self) -> str:
        """The files, for messages."""
        return " and ".join(str(file) for file in self.files)

    def check_names(self, required: Sequence[str], optional: Sequence[str]) -> None:
        """Refuse what is missing, and what the format does not have: it might change what features do.

        Raises:
            InputError: with the files and the names.
        """
        if missing := [name for name in required if name not in self]:
            raise InputError(
                f"{self.where}: there is no tensor {', '.join(missing)}; there are {self.names}. Restore the file."
            )
        if unknown := [name for name in self.readers if name not in (*required, *optional)]:
            raise InputError(
                f"{self.where}: it is not known what {', '.join(unknown)} does; this format has {', '.join((*required, *optional))}. "
                "Fold it into these, or remove it if it changes nothing."
            )

    @property
    def names(self) -> str:
        """Names of all tensors, for messages."""
        return (
            ", ".join(list(self.readers)[:12]) + (" ..." if len(self.readers) > 12 else "")
            or "none"
        )

    def raw(self, name: str) -> Tensor:
        """A tensor as it is stored.

        Raises:
            InputError: it cannot be read.
        """
        file, read = self.readers[name]
        with _clear(file):
            return read()

    def count(self, name: str) -> int:
        """A tensor that holds one positive integer.

        Raises:
            InputError: it holds something else.
        """
        tensor, file = self.raw(name), self.readers[name][0]
        if tensor.numel() != 1 or tensor.is_floating_point() or int(tensor) < 1:
            raise InputError(
                f"{file}: {name} has shape {tuple(tensor.shape)} and type {tensor.dtype}, expected one positive integer."
            )
        return int(tensor)

    def get(self, name: str, *shape: int, meaning: str, reverse: bool = False) -> Tensor:
        """A tensor of a given shape; a size of -1 may be anything.

        Args:
            meaning: names of the axes, for messages.
            reverse: a matrix may also be stored the other way around, where its shape says so; it is given transposed.

        Raises:
            InputError: it has another shape, or does not hold floating-point numbers.
        """
        tensor, file = self.raw(name), self.readers[name][0]
        if not tensor.is_floating_point():
            raise InputError(
                f"{file}: {name} holds {tensor.dtype}, not floating-point numbers; convert the weights to bfloat16 or float32."
            )
        if _fits(tensor, shape):
            return tensor
        if reverse and _fits(tensor, shape[::-1]):
            return tensor.T
        expected = f"({', '.join('any' if size < 0 else str(size) for size in shape)}{',' if len(shape) == 1 else ''})"
        raise InputError(
            f"{file}: {name} has shape {tuple(tensor.shape)}, expected {expected} ({meaning}); check that the file is whole and of this set."
        )


def _fits(tensor: Tensor, shape: Sequence[int]) -> bool:
    return tensor.dim() == len(shape) and all(
        wanted in (size, -1) for size, wanted in zip(tensor.shape, shape, strict=True)
    )


@contextlib.contextmanager
def opened(files: Sequence[Path]) -> Iterator[LayerTensors]:
    """The tensors in some files, each read when it is asked for; what is mapped can be used after the files are closed.

    Raises:
        InputError: a file is missing, truncated, or a pickle.
    """
    readers: dict[str, tuple[Path, Callable[[], Tensor]]] = {}
    with contextlib.ExitStack() as stack:
        for file in files:
            _check_file(file)
            with _clear(file):
                found = _npz(file, stack) if file.suffix == ".npz" else _safetensors(file, stack)
            readers |= {name: (file, read) for name, read in found.items()}
        yield LayerTensors(readers, tuple(files))


def _check_file(file: Path) -> None:
    if file.suffix in PICKLES:
        raise InputError(pickle_message(file))
    if file.suffix not in (".safetensors", ".npz"):
        raise InputError(f"{file} is neither a safetensors nor an npz file; give one of these.")
    if not file.is_file():
        raise InputError(
            f"there is no file {file}; restore it, or correct the list in config.yaml."
        )


def pickle_message(file: Path) -> str:
    """What to do with a pickle."""
    return (
        f"{file} may be a pickle, which can run code when it is read, so it is not read; convert it with torch.load(..., weights_only=True) "
        "and safetensors to layer_0.safetensors, layer_1.safetensors ... with W_enc, W_dec, b_enc and b_dec."
    )


@contextlib.contextmanager
def _clear(file: Path) -> Iterator[None]:
    """One clear line for whatever a broken file raises."""
    try:
        yield
    except (
        SafetensorError,
        OSError,
        ValueError,
        TypeError,
        EOFError,
        zipfile.BadZipFile,
        zlib.error,
    ) as error:
        if isinstance(error, InputError):
            raise
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise InputError(
            f"{file} is truncated or not what its name says ({reason}); restore it or fetch it again."
        ) from error


def _safetensors(file: Path, stack: contextlib.ExitStack) -> dict[str, Callable[[], Tensor]]:
    handle = stack.enter_context(safe_open(file, framework="pt"))
    return {name: partial(handle.get_tensor, name) for name in handle.keys()}


def _npz(file: Path, stack: contextlib.ExitStack) -> dict[str, Callable[[], Tensor]]:
    # Opened here, as np.load leaves a broken file open.
    archive = stack.enter_context(np.load(stack.enter_context(file.open("rb")), allow_pickle=False))

    def read(name: str) -> Tensor:
        return torch.from_numpy(archive[name])

    return {name: partial(read, name) for name in archive.files}
