"""Fields of dataclasses: users' values, made what the fields are declared to hold."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import cache, wraps
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from circuits.system.kinds import one_of, text
from circuits.system.numbers import python_number, real, truth, whole

Check = Callable[[Any, str], Any]
CHECKS: dict[Any, Check] = {int: whole, float: real, bool: truth, str: text}


class CheckedFields:
    """Base class of dataclasses that users fill.

    Numbers of other libraries become Python's own, so that settings compare, print and save alike,
    before a subclass's own `__post_init__` compares them. Fields are changed whose type is a
    number, bool, text, `Literal` or union with one; other types are for others to check.

    Raises:
        InputError: a field holds something that its type does not include.
    """

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        own = cls.__dict__.get("__post_init__")
        if own is None:
            return

        @wraps(own)
        def checked(self: Any, *arguments: Any) -> None:
            convert_fields(self)
            own(self, *arguments)

        cls.__post_init__ = checked  # type: ignore[method-assign]

    def __post_init__(self) -> None:
        convert_fields(self)


def convert_fields(instance: Any) -> None:
    """Make the fields of a dataclass what they are declared to hold; see `CheckedFields`."""
    kind: Any = type(instance)
    hints = _hints(kind)
    for field in dataclasses.fields(instance):
        if field.init and field.name in hints:
            value = getattr(instance, field.name)
            converted = _converted(value, field.name, hints[field.name])
            # Fields of frozen dataclasses are set like this.
            object.__setattr__(instance, field.name, converted)


@cache
def _hints(kind: type) -> dict[str, Any]:
    try:
        return get_type_hints(kind)
    except NameError:  # names that only type checkers import, or that are local to a function
        return {}


def _converted(value: Any, name: str, hint: Any) -> Any:
    if hint in CHECKS:
        return CHECKS[hint](value, name)
    if get_origin(hint) is Literal:
        return one_of(value, name, get_args(hint))
    if get_origin(hint) in (Union, UnionType):
        return _of_union(value, name, hint)
    return value


def _of_union(value: Any, name: str, hint: Any) -> Any:
    kinds = [kind for kind in get_args(hint) if kind is not type(None)]
    is_optional = len(kinds) < len(get_args(hint))
    if is_optional and value is None:
        return None
    if is_optional and len(kinds) == 1:
        return _converted(value, name, kinds[0])
    # A number among other types: whether the others fit is for those who know them.
    number = python_number(value)
    if number is None:
        return value
    if int in kinds and number % 1 == 0:
        return int(number)
    return float(number) if float in kinds else value
