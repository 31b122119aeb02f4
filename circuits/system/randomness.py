"""Random draws that depend on nothing but a seed."""

from __future__ import annotations

from typing import Any

import torch

from circuits.system.errors import InputError
from circuits.system.numbers import whole


def random_generator(seed: Any) -> torch.Generator:
    """A generator of this seed, on the CPU, so that a seed means the same on all devices."""
    number = whole(seed, "seed")
    if not -(2**63) <= number < 2**64:
        raise InputError(f"seed={number} is too long; give a number of at most 18 digits.")
    return torch.Generator().manual_seed(number)
