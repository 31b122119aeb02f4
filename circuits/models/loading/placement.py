"""Where and in which type a model is loaded."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class Placement:
    """Where and in which type a model is loaded."""

    device: torch.device
    dtype: torch.dtype
    device_map: Any = None

    @property
    def of_lens(self) -> dict[str, Any]:
        """Arguments of TransformerLens' functions."""
        return {"device": str(self.device), "dtype": self.dtype}

    @property
    def arguments(self) -> dict[str, Any]:
        """Arguments of `from_pretrained`."""
        chosen: dict[str, Any] = {"dtype": self.dtype, "attn_implementation": "eager"}
        if self.dtype == torch.float64:
            # The product that runs many experts at once does not take this type.
            chosen["experts_implementation"] = "eager"
        if self.device_map is not None:
            chosen["device_map"] = self.device_map
        return chosen
