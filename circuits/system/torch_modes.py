"""The modes of torch that a caller may have set around a call, and how to compute without them."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch

AUTOCAST_DEVICES = ("cpu", "cuda")


@contextlib.contextmanager
def without_modes() -> Iterator[None]:
    """Compute as if the caller had set no inference mode, no autocast and no default device.

    No gradient passes through tensors made in inference mode, and autocast rounds.
    """
    with contextlib.ExitStack() as stack:
        if torch.is_inference_mode_enabled():
            stack.enter_context(torch.inference_mode(False))
            # Leaving inference mode switches gradients on.
            stack.enter_context(torch.no_grad())
        for kind in AUTOCAST_DEVICES:
            if torch.is_autocast_enabled(kind):
                stack.enter_context(torch.autocast(kind, enabled=False))
        # This takes time in every operation, so it is only done where it is needed.
        if torch.get_default_device().type != "cpu":
            stack.enter_context(torch.device("cpu"))
        yield
