"""Memory budgets: how many bytes a step may take, and what to do when memory runs out."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import psutil
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from circuits.system.errors import InputError

# A step takes this share of the free memory. On a CPU a large step is slower, because its tensors
# no longer fit into the caches, so its size is bounded as well.
GPU_SHARE, CPU_SHARE = 0.4, 0.2
CPU_BYTES = 1 << 28


def memory_budget(
    device: torch.device | str | None, max_memory: int | None = None, *, cpu_bytes: int = CPU_BYTES
) -> int:
    """Return how many bytes the tensors of one step may take on a device.

    Args:
        max_memory: the user's limit in bytes; None takes a share of the free memory.
        cpu_bytes: upper bound on a CPU, where the user gives no limit.

    Raises:
        InputError: `max_memory` is not a positive number.
    """
    if max_memory is not None:
        if not max_memory > 0:
            raise InputError(
                f"max_memory={max_memory} must be a positive number of bytes, "
                f"such as {1 << 30} for one GiB."
            )
        return int(max_memory)
    device = torch.device(device or "cpu")
    if device.type == "cuda":
        # The driver counts memory in torch's cache as used, but torch will give it to us.
        reserved, allocated = (
            torch.cuda.memory_reserved(device),
            torch.cuda.memory_allocated(device),
        )
        free, _ = torch.cuda.mem_get_info(device)
        return int((free + reserved - allocated) * GPU_SHARE)
    available = psutil.virtual_memory().available
    return min(cpu_bytes, int(available * CPU_SHARE))


def shrinking(step: Callable[[int], Any], size: int, what: str) -> tuple[Any, int]:
    """Run `step(size)`, and halve the size as long as memory runs out.

    Args:
        what: what `size` counts, in the singular, for the error message.

    Returns:
        The result of the step, and the size at which it succeeded.

    Raises:
        InputError: memory runs out even at size 1.
    """
    while True:
        try:
            return step(size), size
        except (RuntimeError, MemoryError) as error:
            if not _is_out_of_memory(error):
                raise
            if size <= 1:
                raise InputError(
                    f"memory runs out even with one {what} at a time; use fewer or shorter prompts."
                ) from error
        # Outside the handler: the traceback would keep the tensors of the failed step alive.
        size //= 2
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def _is_out_of_memory(error: BaseException) -> bool:
    # On the CPU torch raises a plain RuntimeError.
    return (
        isinstance(error, torch.OutOfMemoryError | MemoryError)
        or "allocate memory" in str(error).lower()
    )


@dataclass(eq=False)
class _HeldBytes:
    """Bytes held now, and the most held at one time."""

    now: int = 0
    most: int = 0

    def add(self, size: int) -> None:
        self.now += size
        self.most = max(self.most, self.now)


class AllocationMeter(TorchDispatchMode):
    """Measures the bytes of the tensors that operations create while the meter is entered.

    Tensors computed from weights alone, such as a transposed copy, do not grow with the number of
    prompts and are counted separately. Freed tensors are noticed at any time, even while the meter
    is not entered. Memory that a kernel allocates and frees internally is not seen.
    """

    def __init__(self, weights: Iterable[Tensor] = ()) -> None:
        super().__init__()
        self._weights = {_storage_key(tensor) for tensor in weights}
        self._from_weights, self._from_prompts = _HeldBytes(), _HeldBytes()
        # Which count each storage that was created belongs to.
        self._count_of: dict[int, _HeldBytes] = {}

    @property
    def fixed(self) -> int:
        """The most bytes held at one time in tensors computed from weights alone."""
        return self._from_weights.most

    @property
    def growing(self) -> int:
        """The most bytes held at one time in all other tensors."""
        return self._from_prompts.most

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the operation and count the storages that it created."""
        result = func(*args, **(kwargs or {}))
        inputs = {_storage_key(tensor) for tensor in _tensors((args, kwargs))}
        from_weights = bool(inputs) and all(self._is_from_weights(key) for key in inputs)
        for tensor in _tensors(result):
            key = _storage_key(tensor)
            # An operation in place, or a view, returns a storage that exists already.
            if key not in inputs and key not in self._count_of:
                count = self._from_weights if from_weights else self._from_prompts
                self._add(tensor.untyped_storage(), count)
        return result

    def _is_from_weights(self, key: int) -> bool:
        return key in self._weights or self._count_of.get(key) is self._from_weights

    def _add(self, storage: torch.UntypedStorage, count: _HeldBytes) -> None:
        key, size = storage._cdata, storage.nbytes()
        self._count_of[key] = count
        count.add(size)
        weakref.finalize(storage, self._release, key, size).atexit = False

    def _release(self, key: int, size: int) -> None:
        self._count_of.pop(key).add(-size)


def _storage_key(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def _tensors(values: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(values) if isinstance(leaf, Tensor)]
