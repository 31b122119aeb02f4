"""How much memory a step may take: what was asked for, or a share of what is free; and what to do when it was too much."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import psutil
import torch

from circuits.errors import InputError

# Steps take this share of what is free on a GPU. On a CPU large steps are slower: they leave the caches.
GPU_SHARE = 0.4
CPU_BYTES, CPU_SHARE = 1 << 28, 0.2


def memory_budget(device: torch.device | str | None, max_memory: int | None = None) -> int:
    """How many bytes the tensors of one step may take on a device.

    Args:
        max_memory: as many bytes as the user allows; None chooses from what is free.

    Raises:
        InputError: `max_memory` is no positive number.
    """
    if max_memory is not None:
        if not max_memory > 0:
            raise InputError(f"max_memory={max_memory} must be a positive number of bytes, such as {1 << 30} for one GiB.")
        return int(max_memory)
    device = torch.device(device or "cpu")
    if device.type == "cuda":
        held = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int((torch.cuda.mem_get_info(device)[0] + held) * GPU_SHARE)
    return min(CPU_BYTES, int(psutil.virtual_memory().available * CPU_SHARE))


def is_out_of_memory(error: BaseException) -> bool:
    """Whether torch failed to allocate memory, on a GPU or on the CPU."""
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or (
        isinstance(error, RuntimeError) and "allocate memory" in str(error).lower()
    )


def shrinking(step: Callable[[int], Any], size: int, what: str) -> tuple[Any, int]:
    """The result of `step(size)`, halving the size for as long as memory runs out; and the size that went well.

    Raises:
        InputError: memory runs out even at size 1.
    """
    while True:
        try:
            return step(size), size
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            if size <= 1:
                raise InputError(f"memory runs out even with one {what} at a time; use fewer or shorter prompts.") from error
        # Outside of the handler, which would keep what was allocated alive.
        size //= 2
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
