"""Devices and types of numbers by name."""

from __future__ import annotations

import os
from typing import Any

import torch

from circuits.system.errors import InputError
from circuits.system.numbers import shown
from circuits.system.ranks import ranks

REMEDY = "use 'cpu', 'cuda' or 'cuda:1'."


def device_called(name: str | torch.device) -> torch.device:
    """Return the device with this name; `cuda` without a number is the GPU of this rank.

    Raises:
        InputError: no such device exists or it holds no data, torch finds no CUDA on this machine,
            or there are more ranks than GPUs.
    """
    device = _device(name)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise InputError(
            f"device {str(name)!r} was asked for, but torch {torch.__version__} finds "
            "no CUDA here; use device='cpu' or a CUDA build."
        )
    try:
        torch.zeros(1, device=device).cpu()
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).partition("\n")[0]
        raise InputError(f"device {str(name)!r} cannot be used ({reason}); {REMEDY}") from error
    is_shared = ranks().world > 1 and device == torch.device("cuda")
    return _gpu_of_rank() if is_shared else device


def _gpu_of_rank() -> torch.device:
    rank = ranks().rank
    local = int(os.environ.get("LOCAL_RANK", rank))
    count = torch.cuda.device_count()
    if local >= count:
        raise InputError(
            f"rank {rank} is process {local + 1} on this machine, which has {count} GPUs; "
            f"start {count} processes, or use device='cpu'."
        )
    return torch.device("cuda", local)


def _device(name: str | torch.device) -> torch.device:
    try:
        return torch.device(name)
    except (RuntimeError, TypeError, ValueError) as error:
        raise InputError(f"there is no device {shown(name)}; {REMEDY}") from error


def dtype_called(name: Any) -> torch.dtype:
    """Return the type of numbers with this name, such as "float32", also numpy's."""
    text = getattr(name, "__name__", str(name)).removeprefix("torch.")
    dtype = name if isinstance(name, torch.dtype) else getattr(torch, text, None)
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise InputError(
            f"dtype={shown(name)}: choose torch.float32, float64, bfloat16 or float16."
        )
    return dtype
