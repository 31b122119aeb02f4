"""Errors for invalid input."""

from circuits.system.messages import one_line


class InputError(ValueError):
    """Raised for invalid input. The message is one line: the problem, the value, and the remedy.

    However long the values in it are, it has at most 480 characters: the middle is left out.

    >>> import circuits
    >>> circuits.parse_node("a9.h6.q")
    Traceback (most recent call last):
        ...
    circuits.system.errors.InputError: 'a9.h6.q' names no node; nodes are written like ...
    """

    def __init__(self, message: str = "") -> None:
        super().__init__(one_line(message))


class NotFiniteError(InputError):
    """Raised where logits or a metric are NaN or infinite."""


class NotWrittenError(InputError):
    """Raised where a file cannot be written, such as on a full or read-only disk."""


class OutOfRangeError(InputError, IndexError):
    """Raised for an index beyond the end, where Python expects an IndexError."""
