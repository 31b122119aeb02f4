"""Errors for invalid input."""


class InputError(ValueError):
    """Raised for invalid input. The message is one line: the problem, the value, and the remedy.

    >>> import circuits
    >>> circuits.parse_node("a9.h6.q")
    Traceback (most recent call last):
        ...
    circuits.system.errors.InputError: 'a9.h6.q' names no node; nodes are written like ...
    """


class NotFiniteError(InputError):
    """Raised where logits or a metric are NaN or infinite."""


class OutOfRangeError(InputError, IndexError):
    """Raised for an index beyond the end, where Python expects an IndexError."""
