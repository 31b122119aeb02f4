"""What tests measure with: damage, from a user's arguments, and memory."""

import weakref
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from circuits.running.damage import DamageMeter
from circuits.running.settings import RunSettings


def damage_meter(model, graph, task, **options) -> DamageMeter:
    return DamageMeter.prepare(model, graph, task, RunSettings.parse(task, **options))


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
