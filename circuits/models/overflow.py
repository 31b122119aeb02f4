"""Why numbers that a model computes are not finite."""

from __future__ import annotations

import math

import torch
from jaxtyping import Float
from torch import Tensor

from circuits.models.loading import Model


def cause(model: Model) -> str:
    """The likely cause, for an error message: a parameter, or a dtype that is too narrow."""
    dtype, parameters = model.cfg.dtype, dict(model.named_parameters())
    narrow = f"load it with dtype=torch.float32 instead of {dtype}"
    for name, parameter in parameters.items():
        n_bad = count_not_finite(parameter)
        if n_bad:
            remedy = narrow if dtype == torch.float16 else "load the weights again"
            return f"{n_bad} of {parameter.numel()} entries of {name} are; {remedy}."
    if dtype == torch.float16:
        return (
            "the model overflows in its dtype; load it with dtype=torch.float32 "
            "(or torch.bfloat16, which has the same range)."
        )
    sizes = {name: float(each.detach().abs().max()) for name, each in parameters.items()}
    largest = max(sizes, key=lambda name: sizes[name])
    return (
        f"the weights are finite, the largest {sizes[largest]:.1e} in {largest}: look for damaged "
        "weights if that is too large, else for hooks and given outputs that are not finite."
    )


def count_not_finite(values: Float[Tensor, "*axes"]) -> int:
    """How many entries are NaN or infinite."""
    # A finite sum has finite terms, and is faster to check. The sum of finite terms may overflow.
    if math.isfinite(float(values.detach().sum())):
        return 0
    is_bad = ~values.isfinite()
    return int(is_bad.sum())
