"""Plain arguments of public functions: users' values, made what the annotations say.

Base classes do this for fields of dataclasses, see `CheckedFields`. What is no plain value, such as
a model or a circuit, is checked by the function, which knows where to get one.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import cache, reduce, wraps
from operator import or_
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

import torch
from jaxtyping import AbstractArray, jaxtyped
from torch import Tensor

from circuits.system.device import device_called, dtype_called
from circuits.system.errors import InputError
from circuits.system.fields import CHECKS, Check
from circuits.system.kinds import one_of
from circuits.system.numbers import RealNumber, WholeNumber, real, shown, whole
from circuits.system.tensors import as_tensor

Function = TypeVar("Function", bound=Callable[..., Any])

# By type, what makes a value one of it.
MADE: dict[Any, Check] = {
    **CHECKS,
    WholeNumber: whole,
    RealNumber: real,
    torch.dtype: lambda value, _: dtype_called(value),
    str | torch.device: lambda value, _: device_called(value),
}
# Other classes that are checked, and what a value of them is called.
CLASSES: dict[Any, str] = {
    str: "a text",
    str | Path: "a text or a pathlib.Path",
    slice: "a slice",
    Tensor: "a tensor",
}


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
    signature = inspect.signature(function)

    @wraps(function)
    def checked(*given: Any, **named: Any) -> Any:
        try:
            bound = signature.bind(*given, **named)
        except TypeError:
            # The function itself says best which argument is missing or unknown.
            return function(*given, **named)
        hints = _hints(function)
        for name in bound.arguments.keys() & hints:
            bound.arguments[name] = _checked(bound.arguments[name], name, hints[name])
        return function(*bound.args, **bound.kwargs)

    return checked  # type: ignore[return-value]


@cache
def _hints(function: Callable[..., Any]) -> dict[str, Any]:
    return get_type_hints(function)


def _checked(value: Any, name: str, hint: Any) -> Any:
    is_union = get_origin(hint) in (Union, UnionType)
    kinds = get_args(hint) if is_union else (hint,)
    if value is None and NoneType in kinds:
        return None
    kind: Any = reduce(or_, [kind for kind in kinds if kind is not NoneType])
    if kind in MADE:
        return MADE[kind](value, name)
    if get_origin(kind) is Literal:
        return one_of(value, name, get_args(kind))
    if inspect.isclass(kind) and issubclass(kind, AbstractArray):
        return _tensor(value, name, kind)
    if kind in CLASSES and not isinstance(value, kind):
        raise InputError(f"{name}={shown(value)}: give {CLASSES[kind]}.")
    return value


def _tensor(value: Any, name: str, kind: Any) -> Tensor:
    found = as_tensor(value, name)
    # A scope of their own for the names of axes, whatever types the callers check.
    with jaxtyped("context"):
        fits = isinstance(found, kind)
    if not fits:
        raise InputError(
            f"{name} has shape {tuple(found.shape)} and type {found.dtype}: give a tensor "
            f"[{kind.dim_str.strip()}] of {_numbers(kind)}."
        )
    return found


def _numbers(kind: Any) -> str:
    """What a tensor of this kind holds."""
    names = {"Int": "integers", "Bool": "booleans"}
    return names.get(kind.dtype.__name__, "floating-point numbers")
