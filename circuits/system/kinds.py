"""What kind of thing an argument is."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from circuits.system.errors import InputError
from circuits.system.numbers import shown

# Things whose text says more than their type.
PLAIN = (str, bytes, int, float, list, tuple, dict, type(None))


def expect(value: object, kind: Any, wanted: str, remedy: str) -> None:
    """Refuse an argument of another kind: `wanted` says what it should be, such as "a Task"."""
    if not isinstance(value, kind):
        raise InputError(f"expected {wanted}, got {_told(value)}; {remedy}.")


def one_of(value: object, name: str, choices: Sequence[Any]) -> Any:
    """One of a few plain values.

    >>> one_of("signed", "by", ["magnitude", "signed"])
    'signed'
    """
    for choice in choices:
        # The type first, because arrays compare item by item.
        if isinstance(value, type(choice)) and value == choice:
            return choice
    *others, last = map(repr, choices)
    known = f"{', '.join(others)} or {last}" if others else last
    raise InputError(f"{name}={shown(value)}: choose {known}.")


def text(value: object, name: str) -> str:
    """A text, as it is. Half of a character, as of a broken file, cannot be written."""
    if not isinstance(value, str) or re.search(r"[\ud800-\udfff]", value):
        raise InputError(f"{name}={shown(value)} must be a text, of whole characters.")
    return value


def _told(value: object) -> str:
    if isinstance(value, type):
        return f"the class {value.__name__}"
    return shown(value) if isinstance(value, PLAIN) else type(value).__name__
