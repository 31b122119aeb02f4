"""Tensors from users, who may have lists or arrays instead."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence, Set
from hashlib import blake2b
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.masked import MaskedTensor

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
        padding: fills up lists of different lengths, sets, and what an array masks; None refuses
            them.
    """
    if isinstance(given, Tensor):
        return _dense(_with_values(given, name))
    try:
        plain = _array(given, name, padding)
        if isinstance(plain, list) and padding is not None:
            plain = _filled(plain, padding)
        # Some arrays cannot be shared with torch, such as reversed ones, or those of pandas.
        array = np.ascontiguousarray(plain)
        return torch.as_tensor(array if array.flags.writeable else array.copy())
    except (TypeError, ValueError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(
            f"{name}={shown(given)} must hold numbers, in lists of equal length (sets have no "
            "order), an array or a tensor."
        ) from error


def check_same_labels(given: Mapping[str, Any]) -> None:
    """Refuse series and frames of pandas whose rows have other labels, or another order of them.

    By order and by label, different entries would belong together. So they would in frames whose
    columns come in another order.
    """
    _check_same(given, "index")
    _check_same(given, "columns")


def _check_same(given: Mapping[str, Any], axis: str) -> None:
    first = expected = None
    for name, each in given.items():
        index = _labels_of(each, axis)
        if expected is None:
            first, expected = name, index
        if index is None or len(index) != len(expected) or index.equals(expected):
            continue
        # Columns may be called after what they hold.
        if axis == "index" or set(index) == set(expected):
            raise InputError(
                f"{first} and {name} have different labels ({shown(list(expected[:3]))} and "
                f"{shown(list(index[:3]))}), so by label other entries belong together than by "
                "order; give both in one frame, or as lists (.tolist()) if the order counts."
            )


def _labels_of(given: Any, axis: str) -> Any:
    """The labels of a series or frame of pandas; None for others, of which lists have a method."""
    index = getattr(given, axis, None)
    return index if hasattr(index, "is_monotonic_increasing") else None


def joined(parts: Sequence[Tensor], axis: int = 0) -> Tensor:
    """Concatenate tensors; a single one is not copied.

    >>> joined([torch.ones(2)]).shape
    torch.Size([2])
    """
    only = len(parts) == 1
    return parts[0] if only else torch.cat([*parts], axis)


def plain_tensor(tensor: Tensor) -> Tensor:
    """The values of a quantised, sparse or complex tensor in a real one; any other as it is."""
    tensor = _dense(tensor).resolve_conj().resolve_neg()
    return torch.view_as_real(tensor) if tensor.is_complex() else tensor


def _dense(tensor: Tensor) -> Tensor:
    if tensor.is_quantized:
        tensor = tensor.dequantize()
    return tensor if tensor.layout == torch.strided else tensor.to_dense()


def _with_values(tensor: Tensor, name: str) -> Tensor:
    """The tensor, if it has a value at each place."""
    kinds = {
        "nested": tensor.is_nested,
        "meta": tensor.is_meta,
        "masked": isinstance(tensor, MaskedTensor),
    }
    for kind in kinds:
        if kinds[kind]:
            raise InputError(
                f"{name} is a {kind} tensor, which lacks some or all of its values; give one that "
                "has them all."
            )
    return tensor


def digest(parts: Any, columns: Iterable[Tensor] = (), *, size: int = 64) -> str:
    """Hash JSON values and then tensors, to `size` bytes in hexadecimal digits."""
    text = json.dumps(parts)
    result = blake2b(text.encode(), digest_size=size)
    for column in columns:
        array = column.cpu().numpy()
        result.update(array.tobytes())
    return result.hexdigest()


def bytes_of(tensor: Tensor) -> np.ndarray:
    """The bytes of a contiguous tensor on the CPU, which share its memory."""
    flat = tensor.reshape(-1)
    # A single number can have any stride.
    return flat.as_strided(flat.shape, (1,)).view(torch.uint8).numpy()


def _array(given: Any, name: str, padding: int | None) -> Any:
    """An array of numbers, or what `_plain` makes of anything else."""
    as_numpy = getattr(given, "to_numpy", None)
    array = as_numpy() if callable(as_numpy) else given
    if isinstance(array, np.ma.MaskedArray):
        n_masked = np.ma.count_masked(array)
        if n_masked and padding is None:
            raise InputError(
                f"{name} is an array that masks {n_masked} of its {array.size} entries; give one "
                "without a mask (token ids with attention_mask=~array.mask)."
            )
        array = array.filled(padding) if n_masked else array.data
    is_array = isinstance(array, np.ndarray)
    return array if is_array and array.dtype.kind != "O" else _plain(array)


def _plain(given: Any) -> Any:
    """Tensors and arrays inside of lists as lists."""
    listed = getattr(given, "tolist", None)
    plain = listed() if callable(listed) else given
    if not isinstance(plain, list | tuple | range):
        return plain
    return list(map(_plain, plain))


def _filled(rows: list[Any], padding: int) -> list[Any]:
    # Within a row, the order of answers does not matter.
    rows = [sorted(row) if isinstance(row, Set) else row for row in rows]
    if not any(isinstance(row, list) for row in rows):
        return rows
    lists = [row if isinstance(row, list) else [row] for row in rows]
    width = max(map(len, lists))
    return [row + [padding] * (width - len(row)) for row in lists]
