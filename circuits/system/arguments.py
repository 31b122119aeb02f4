"""Plain arguments of public functions: users' values, made what the annotations say.

Base classes do this for fields of dataclasses, see `CheckedFields`. What is no plain value, such as
a model or a circuit, is checked by the function, which knows where to get one.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import cache, lru_cache, partial, wraps
from itertools import zip_longest
from pathlib import Path
from typing import Any, TypeVar, get_type_hints

import torch
from jaxtyping import AbstractArray, jaxtyped
from torch import Tensor

from circuits.system.device import device_called, dtype_called
from circuits.system.errors import InputError
from circuits.system.fields import Check, checks_of
from circuits.system.files import text_or_path
from circuits.system.numbers import RealNumber, WholeNumber, real, shown, whole
from circuits.system.tensors import as_tensor

Function = TypeVar("Function", bound=Callable[..., Any])

# By type, what makes a value one of it.
MADE: dict[Any, Check] = {
    WholeNumber: whole,
    RealNumber: real,
    str | Path: text_or_path,
    torch.dtype: lambda value, _: dtype_called(value),
    str | torch.device: lambda value, _: device_called(value),
}
# Other classes that are checked, and what a value of them is called.
CLASSES: dict[Any, str] = {
    slice: "a slice",
    Tensor: "a tensor",
}

EMPTY = {"Int": torch.long, "Bool": torch.bool}
"""The type of an empty tensor, by the kind that is asked for; others are floating-point."""


def checked_arguments(function: Function) -> Function:
    """Decorate a public function: it gets plain values of the types it declares.

    Numbers of other libraries become Python's own, texts become paths or devices, and lists and
    arrays become tensors. Arguments of types that are not listed here stay as they are.

    >>> @checked_arguments
    ... def repeated(text: str, times: WholeNumber) -> str:
    ...     return text * times
    >>> repeated("a", torch.tensor(3))
    'aaa'

    Raises:
        InputError: an argument is not of its declared type.
    """
    names = tuple(inspect.signature(function).parameters)

    @wraps(function)
    def checked(*given: Any, **named: Any) -> Any:
        checks = _checks(function)
        values = []
        # What is too many or missing is for Python to say.
        for name, value in zip_longest(names[: len(given)], given):
            values.append(checks[name](value, name) if name in checks else value)
        for name in checks.keys() & named:
            named[name] = checks[name](named[name], name)
        return function(*values, **named)

    return checked  # type: ignore[return-value]


@cache
def _checks(function: Callable[..., Any]) -> dict[str, Check]:
    """The checks of a function's arguments, by name."""
    return checks_of(get_type_hints(function), _check_of)


def _check_of(kind: Any) -> Check | None:
    if kind in MADE:
        return MADE[kind]
    if inspect.isclass(kind) and issubclass(kind, AbstractArray):
        return partial(_tensor, kind)
    return partial(_instance, kind) if kind in CLASSES else None


def _instance(kind: Any, value: Any, name: str) -> Any:
    if not isinstance(value, kind):
        raise InputError(f"{name}={shown(value)}: give {CLASSES[kind]}.")
    return value


def _tensor(kind: Any, value: Any, name: str) -> Tensor:
    found = as_tensor(value, name)
    if not found.numel():
        # An empty list says nothing of its numbers.
        found = found.to(EMPTY.get(kind.dtype.__name__, found.dtype))
    if not _fits(kind, found.dtype, found.shape):
        raise InputError(
            f"{name} has shape {tuple(found.shape)} and type {found.dtype}: give a tensor "
            f"[{kind.dim_str.strip()}] of {_numbers(kind)}."
        )
    return found


# jaxtyping takes longer than many a function that is called in a loop.
@lru_cache(maxsize=1024)
def _fits(kind: Any, dtype: torch.dtype, shape: torch.Size) -> bool:
    # A scope of their own for the names of axes, whatever types the callers check.
    with jaxtyped("context"):
        return isinstance(torch.empty(shape, dtype=dtype, device="meta"), kind)


def _numbers(kind: Any) -> str:
    """What a tensor of this kind holds."""
    names = {"Int": "integers", "Bool": "booleans"}
    return names.get(kind.dtype.__name__, "floating-point numbers")
