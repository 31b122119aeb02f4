"""Fields of dataclasses: users' values, made what the fields are declared to hold."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from functools import cache, partial, reduce, wraps
from operator import or_
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from circuits.system.kinds import one_of, text
from circuits.system.numbers import python_number, real, truth, whole

# Makes a value what it should be, given what errors call it.
Check = Callable[[Any, str], Any]
Further = Callable[[Any], Check | None]
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
    checks = _checks(kind)
    for field in dataclasses.fields(instance):
        if field.init and field.name in checks:
            value = getattr(instance, field.name)
            converted = checks[field.name](value, field.name)
            # Fields of frozen dataclasses are set like this.
            object.__setattr__(instance, field.name, converted)


@cache
def _checks(kind: type) -> dict[str, Check]:
    try:
        return checks_of(get_type_hints(kind))
    except NameError:  # names that only type checkers import, or that are local to a function
        return {}


def no_check(kind: Any) -> Check | None:
    """No check, for any type."""


def checks_of(hints: Mapping[str, Any], further: Further = no_check) -> dict[str, Check]:
    """The checks of values with these declared types, by name.

    Numbers, bools, texts, choices and unions with them are checked, and what `further` knows.
    """
    found = {}
    for name, hint in hints.items():
        check = _check_of(hint, further)
        if check is not None:
            found[name] = check
    return found


def _check_of(hint: Any, further: Further) -> Check | None:
    members = get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)
    kinds = [kind for kind in members if kind is not NoneType]
    if not kinds:
        return None
    kind = reduce(or_, kinds)
    check = CHECKS.get(kind) or further(kind)
    if check is None and get_origin(kind) is Literal:
        check = partial(_one_of, get_args(kind))
    if check is None and len(kinds) > 1:
        check = partial(_number_among, kinds)
    is_optional = len(kinds) < len(members)
    return partial(_optional, check) if check and is_optional else check


def _optional(check: Check, value: Any, name: str) -> Any:
    return None if value is None else check(value, name)


def _one_of(choices: Sequence[Any], value: Any, name: str) -> Any:
    return one_of(value, name, choices)


def _number_among(kinds: Sequence[Any], value: Any, _name: str) -> Any:
    """Of other types, whether they fit is for those who know them."""
    number = python_number(value)
    if number is None:
        return value
    if int in kinds and number % 1 == 0:
        return int(number)
    return float(number) if float in kinds else value
