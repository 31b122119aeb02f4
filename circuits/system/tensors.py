"""Tensors from users, who may have lists or arrays instead."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from circuits.system.errors import InputError
from circuits.system.numbers import shown


def optional_tensor(given: Any, name: str, *, padding: int | None = None) -> Tensor | None:
    """`as_tensor`, but None stays None."""
    return None if given is None else as_tensor(given, name, padding=padding)


def as_tensor(given: Any, name: str, *, padding: int | None = None) -> Tensor:
    """Lists, arrays or tensors as a tensor.

    >>> import numpy
    >>> as_tensor([numpy.array([1, 2]), [3]], "answers", padding=-1).tolist()
    [[1, 2], [3, -1]]

    Args:
        padding: fills up lists of different lengths; None refuses them.
    """
    if isinstance(given, Tensor):
        return given
    plain = given if isinstance(given, np.ndarray) else _plain(given)
    if isinstance(plain, list) and padding is not None:
        plain = _filled(plain, padding)
    try:
        # Some arrays cannot be shared with torch, such as reversed ones.
        return torch.as_tensor(np.ascontiguousarray(plain))
    except (TypeError, ValueError) as error:
        raise InputError(
            f"{name}={shown(given)} must hold numbers, in lists of equal length, an array or a "
            "tensor."
        ) from error


def plain_tensor(tensor: Tensor) -> Tensor:
    """The values of a quantised, sparse or complex tensor in a real one; any other as it is."""
    if tensor.is_quantized:
        tensor = tensor.dequantize()
    if tensor.layout != torch.strided:
        tensor = tensor.to_dense()
    tensor = tensor.resolve_conj().resolve_neg()
    return torch.view_as_real(tensor) if tensor.is_complex() else tensor


def bytes_of(tensor: Tensor) -> np.ndarray:
    """The bytes of a contiguous tensor on the CPU, which share its memory."""
    flat = tensor.reshape(-1)
    # A single number can have any stride.
    return flat.as_strided(flat.shape, (1,)).view(torch.uint8).numpy()


def _plain(given: Any) -> Any:
    """Tensors and arrays inside of lists as lists; sets in order."""
    listed = getattr(given, "tolist", None)
    if callable(listed):
        return listed()
    if isinstance(given, set | frozenset):
        return sorted(map(_plain, given))
    if isinstance(given, list | tuple | range):
        return [_plain(each) for each in given]
    return given


def _filled(rows: list[Any], padding: int) -> list[Any]:
    if not any(isinstance(row, list) for row in rows):
        return rows
    lists = [row if isinstance(row, list) else [row] for row in rows]
    width = max(map(len, lists))
    return [row + [padding] * (width - len(row)) for row in lists]
