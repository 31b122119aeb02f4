"""The error raised for invalid input."""


class InputError(ValueError):
    """Raised for invalid input. The message is one line: which value is wrong, and how to fix it.

    >>> import circuits
    >>> circuits.load_model("gpt2-smal")
    Traceback (most recent call last):
        ...
    circuits.system.errors.InputError: there is no model or folder 'gpt2-smal'; did you mean ...
    """
