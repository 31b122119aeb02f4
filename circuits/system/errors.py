"""The one error for what a user can mend."""


class InputError(ValueError):
    """What was given cannot be used. The message is one line: what was wrong, with the value, and what to do."""
