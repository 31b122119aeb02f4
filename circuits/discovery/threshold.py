"""The threshold of a search, which is checked before torch is imported, too."""

from circuits.system.errors import InputError


def check_threshold(threshold: float) -> None:
    """Refuse a threshold that is negative or no number."""
    if not threshold >= 0:
        raise InputError(
            f"threshold={threshold} must be a number of at least 0; 0.01 is usual for KL."
        )
