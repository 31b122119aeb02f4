"""Errors for invalid input."""

LONGEST = 500  # characters of a message


class InputError(ValueError):
    """Raised for invalid input. The message is one line: the problem, the value, and the remedy.

    >>> import circuits
    >>> circuits.parse_node("a9.h6.q")
    Traceback (most recent call last):
        ...
    circuits.system.errors.InputError: 'a9.h6.q' names no node; nodes are written like ...
    """

    def __init__(self, message: str = "") -> None:
        line = " ".join(message.split())
        if len(line) > LONGEST:
            # The problem comes first, the remedy last, and what is too long between them.
            line = f"{line[:300]} ... {line[-150:]}"
        super().__init__(line)


class NotFiniteError(InputError):
    """Raised where logits or a metric are NaN or infinite."""


class NotWrittenError(InputError):
    """Raised where a file cannot be written, such as on a full or read-only disk."""
