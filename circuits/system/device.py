"""Devices by name."""

from __future__ import annotations

import torch

from circuits.system.errors import InputError
from circuits.system.ranks import own_gpu


def device_called(name: str | torch.device) -> torch.device:
    """A device by its name; `cuda` alone is the GPU of this rank.

    Raises:
        InputError: there is no such device, or no CUDA here.
    """
    try:
        chosen = torch.device(name)
    except RuntimeError as error:
        raise InputError(f"there is no device {name!r}; use 'cpu', 'cuda' or 'cuda:1'.") from error
    if chosen.type == "cuda" and not torch.cuda.is_available():
        raise InputError(
            f"device {str(name)!r} was asked for, but torch {torch.__version__} finds no CUDA here; use device='cpu' or a CUDA build."
        )
    return own_gpu() if chosen == torch.device("cuda") else chosen
