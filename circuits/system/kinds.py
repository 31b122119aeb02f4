"""What kind of thing an argument is."""

from __future__ import annotations

from typing import Any

from circuits.system.errors import InputError
from circuits.system.numbers import shown

# Things whose text says more than their type.
PLAIN = (str, int, float, list, tuple, dict, type(None))


def expect(value: object, kind: Any, wanted: str, remedy: str) -> None:
    """Refuse an argument of another kind: `wanted` says what it should be, such as "a Task"."""
    if not isinstance(value, kind):
        found = shown(value) if isinstance(value, PLAIN) else type(value).__name__
        raise InputError(f"expected {wanted}, got {found}; {remedy}.")
