"""Numbers from users: of Python, numpy or torch, as Python's own, or refused in one line."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Reversible, Set
from numbers import Real
from typing import Any, SupportsFloat, SupportsIndex

from circuits.system.errors import InputError

# What signatures say that these functions check: numpy's and torch's numbers are such, too.
WholeNumber = SupportsIndex
RealNumber = SupportsFloat

# More make numbers that fit into no tensor.
MOST_DIGITS = 18
MOST_SHOWN = 80
# What pandas and numpy have in the place of a value that is missing
MISSING = ("NAType", "NaTType", "MaskedConstant")


def whole(value: Any, name: str, *, least: int | None = None) -> int:
    """A whole number, at least `least`. Bools, texts and fractions are none; 16.0 is one.

    >>> import numpy, torch
    >>> whole(numpy.int64(3), "n"), whole(torch.tensor([3]), "n"), whole(3.0, "n")
    (3, 3, 3)
    """
    number = python_number(value)
    is_below = least is not None and number is not None and number < least
    # The remainder of an infinite number is NaN, which counts as true.
    if number is None or number % 1 or is_below:
        bound = "" if least is None else f", {least} or more"
        raise InputError(f"{name}={shown(value)}: give a whole number{bound}.")
    # Seeds have up to 64 bits.
    if abs(number) >= 2**64:
        raise InputError(f"{name}={shown(value)} is too long; give at most {MOST_DIGITS} digits.")
    return int(number)


def real(value: Any, name: str) -> float:
    """A number, which may be infinite. Bools, texts and NaN are none.

    >>> import numpy, torch
    >>> real(numpy.float32(0.5), "threshold"), real(torch.tensor(0.5), "threshold")
    (0.5, 0.5)
    """
    number = python_number(value)
    # NaN differs from itself.
    if number is None or number != number:
        raise InputError(f"{name}={shown(value)} must be a number.")
    try:
        return float(number)
    except OverflowError as error:
        raise InputError(f"{name}={shown(value)} is too large; give a smaller number.") from error


def truth(value: Any, name: str) -> bool:
    """True or False, also of numpy or torch. Other values have a truth too, which nobody meant."""
    found = _item(value)
    if not isinstance(found, bool):
        raise InputError(f"{name}={shown(value)} must be True or False.")
    return found


def python_number(value: Any) -> Any:
    """The value as a number of Python's, whichever library it is from; None if it is no number."""
    number = _item(value)
    is_number = isinstance(number, Real) and not isinstance(number, bool)
    return number if is_number else None


def is_missing(value: Any) -> bool:
    """Whether a value stands for nothing: None, NaN, or what pandas has for it.

    >>> is_missing(float("nan")), is_missing(0), is_missing("")
    (True, False, False)
    """
    # Not imported, as pandas is slow to load.
    if value is None or type(value).__name__ in MISSING:
        return True
    number = python_number(value)
    # NaN differs from itself.
    return bool(number != number)


def is_series(value: Any) -> bool:
    """Whether a value has items: an array or tensor without axes has none."""
    n_axes = getattr(value, "ndim", 1)
    return isinstance(value, Iterable) and n_axes > 0


def items(values: Any, name: str) -> list[Any]:
    """What a list, tuple, array, tensor or other series holds, as Python's own objects."""
    listed = getattr(values, "tolist", None)
    found = listed() if callable(listed) else values
    if not isinstance(found, Iterable) or isinstance(found, str | bytes | Mapping):
        raise InputError(f"{name}={shown(values)} must be a list; for one, give [{shown(values)}].")
    return list(found)


def ordered_items(values: Any, name: str) -> list[Any]:
    """`items`, where their order matters: a set has none, and gives another in every process."""
    # Views of dicts and sets of other libraries may have one.
    if isinstance(values, Set) and not isinstance(values, Reversible):
        raise InputError(f"{name}={shown(values)} is a set, which has no order; give a list.")
    return items(values, name)


def shown(value: object) -> str:
    """The value as code, in one line of moderate length."""
    try:
        text = " ".join(repr(value).split())
    except ValueError:  # Python writes no number of more than 4300 digits
        text = f"a value of {type(value).__name__} that cannot be shown"
    return text if len(text) <= MOST_SHOWN else f"{text[:MOST_SHOWN]} ..."


def _item(value: Any) -> Any:
    """The only item of an array or tensor, as Python's own; other values as they are."""
    item = getattr(value, "item", None)
    # What an array masks has a value, too, which nobody meant.
    if not callable(item):
        return value
    if hasattr(value, "filled") and value.mask.all():
        return value
    try:
        return item()
    except (RuntimeError, TypeError, ValueError):
        return value
