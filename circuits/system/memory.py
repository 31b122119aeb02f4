"""Memory budgets: how many bytes a step may take, and what to do when memory runs out."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import psutil
import torch

from circuits.system.errors import InputError
from circuits.system.numbers import WholeNumber, whole

# A step takes this share of the free memory. On a CPU a large step is slower, because its tensors
# no longer fit into the caches, so its size is bounded as well.
GPU_SHARE, CPU_SHARE = 0.4, 0.2
CPU_BYTES = 1 << 28


def memory_budget(
    device: torch.device | str | None,
    max_memory: WholeNumber | None = None,
    *,
    cpu_bytes: int = CPU_BYTES,
) -> int:
    """Return how many bytes the tensors of one step may take on a device.

    Without the user's limit `max_memory` it is a share of the free memory, on a CPU up to
    `cpu_bytes`.
    """
    if max_memory is not None:
        max_memory = whole(max_memory, "max_memory")
        if max_memory <= 0:
            raise InputError(
                f"max_memory={max_memory} must be a positive number of bytes, "
                f"such as {1 << 30} for one GiB."
            )
        return max_memory
    device = torch.device(device or "cpu")
    if device.type == "cuda":
        # The driver counts memory in torch's cache as used, but torch will give it to us.
        free, _ = torch.cuda.mem_get_info(device)
        free += torch.cuda.memory_reserved(device)
        free -= torch.cuda.memory_allocated(device)
        return int(free * GPU_SHARE)
    available = psutil.virtual_memory().available
    return min(cpu_bytes, int(available * CPU_SHARE))


def shrinking(step: Callable[[int], Any], size: int, item: str) -> tuple[Any, int]:
    """Run `step(size)`; halve the size as long as memory runs out.

    Returns:
        The result, and the size that worked.

    Raises:
        InputError: memory runs out even with one `item`.
    """
    while True:
        try:
            return step(size), size
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            if size <= 1:
                raise InputError(
                    f"memory runs out even with one {item} at a time; use fewer or shorter prompts."
                ) from error
        # Outside the handler: the traceback would keep the tensors of the failed step alive.
        size //= 2
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def in_steps(
    step: Callable[[slice], Any], total: int, size: int, item: str
) -> Iterator[tuple[int, Any]]:
    """Run `step` on `total` items, at most `size` at a time; on fewer once memory runs out.

    Yields the number of items done, and the result for the last ones; for errors see `shrinking`.

    >>> list(in_steps(lambda some: some, 5, 3, "number"))
    [(3, slice(0, 3, None)), (5, slice(3, 5, None))]
    """
    done = 0
    while done < total:
        size = min(size, total - done)
        found, size = shrinking(partial(_on_next, step, done), size, item)
        done += size
        yield done, found


def _on_next(step: Callable[[slice], Any], done: int, size: int) -> Any:
    return step(slice(done, done + size))


def is_out_of_memory(error: BaseException) -> bool:
    """Whether the error says that there is not enough memory."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    # On the CPU torch raises a plain RuntimeError.
    return "allocate memory" in str(error).lower()
