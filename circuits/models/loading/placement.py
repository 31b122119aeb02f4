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
    def arguments(self) -> dict[str, Any]:
        """Arguments of `from_pretrained`."""
        chosen = {"dtype": self.dtype, "attn_implementation": "eager"}
        return chosen if self.device_map is None else {**chosen, "device_map": self.device_map}
