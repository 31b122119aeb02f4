"""How much memory a step may take: what was asked for, or a share of what is free; and what to do when it was too much."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import psutil
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from circuits.system.errors import InputError

# Steps take this share of what is free on a GPU. On a CPU large steps are slower: they leave the caches.
GPU_SHARE = 0.4
CPU_BYTES, CPU_SHARE = 1 << 28, 0.2


def memory_budget(
    device: torch.device | str | None, max_memory: int | None = None, *, cpu_bytes: int = CPU_BYTES
) -> int:
    """How many bytes the tensors of one step may take on a device.

    Args:
        max_memory: as many bytes as the user allows; None chooses from what is free.
        cpu_bytes: no more than this is chosen on a CPU.

    Raises:
        InputError: `max_memory` is no positive number.
    """
    if max_memory is not None:
        if not max_memory > 0:
            raise InputError(
                f"max_memory={max_memory} must be a positive number of bytes, such as {1 << 30} for one GiB."
            )
        return int(max_memory)
    device = torch.device(device or "cpu")
    if device.type == "cuda":
        held = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int((torch.cuda.mem_get_info(device)[0] + held) * GPU_SHARE)
    return min(cpu_bytes, int(psutil.virtual_memory().available * CPU_SHARE))


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
                raise InputError(
                    f"memory runs out even with one {what} at a time; use fewer or shorter prompts."
                ) from error
        # Outside of the handler, which would keep what was allocated alive.
        size //= 2
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


class AllocationMeter(TorchDispatchMode):
    """Counts the bytes of the tensors that operations make while it is entered, on any device.

    What is made of weights alone, such as a transposed copy, does not grow with the number of prompts and is counted apart. What is freed is
    noticed also while the meter is not entered; what a kernel allocates and frees within itself is not seen.

    Attributes:
        fixed: the most bytes held at one time in tensors made of weights alone.
        growing: likewise in all others.
    """

    def __init__(self, weights: Iterable[Tensor] = ()) -> None:
        super().__init__()
        self.fixed = 0
        self.growing = 0
        self._weights = {_storage(tensor) for tensor in weights}
        self._made: dict[int, tuple[int, bool]] = {}
        self._held = {True: 0, False: 0}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the operation and count what it made."""
        result = func(*args, **(kwargs or {}))
        given = {_storage(tensor) for tensor in _tensors((args, kwargs))}
        for tensor in _tensors(result):
            key = _storage(tensor)
            if key not in given and key not in self._made:
                self._count(
                    tensor.untyped_storage(),
                    fixed=bool(given) and all(self._is_fixed(other) for other in given),
                )
        return result

    def _is_fixed(self, storage: int) -> bool:
        return storage in self._weights or self._made.get(storage, (0, False))[1]

    def _count(self, storage: torch.UntypedStorage, fixed: bool) -> None:
        self._made[storage._cdata] = storage.nbytes(), fixed
        self._held[fixed] += storage.nbytes()
        self.fixed, self.growing = (
            max(self.fixed, self._held[True]),
            max(self.growing, self._held[False]),
        )
        weakref.finalize(storage, self._release, storage._cdata).atexit = False

    def _release(self, key: int) -> None:
        size, fixed = self._made.pop(key, (0, False))
        self._held[fixed] -= size


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def _tensors(values: Any) -> Iterator[Tensor]:
    """The tensors among an operation's arguments or results, which are at most in lists."""
    if isinstance(values, Tensor):
        yield values
    elif isinstance(values, list | tuple):
        for value in values:
            yield from _tensors(value)
    elif isinstance(values, dict):
        yield from _tensors(list(values.values()))
