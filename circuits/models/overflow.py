"""Whether numbers that a model holds and computes are finite, and why not."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from jaxtyping import Float
from torch import Tensor

from circuits.models.backend import Model, backend, shape_of
from circuits.system.errors import NotFiniteError


def cause(model: Model) -> str:
    """The likely cause, for an error message: a parameter, or a dtype that is too narrow."""
    try:
        check_weights(model)
    except NotFiniteError as error:
        return str(error)
    if shape_of(model).dtype == torch.float16:
        return (
            "the model overflows in its dtype; load it with dtype=torch.float32 "
            "(or torch.bfloat16, which has the same range)."
        )
    parameters = [(name, each) for name, each in _weights(model) if each.numel()]
    sizes = {name: float(each.detach().abs().max()) for name, each in parameters}
    largest = max(sizes, key=sizes.__getitem__)
    return (
        f"the weights are finite, the largest {sizes[largest]:.1e} in {largest}: look for damaged "
        "weights if that is too large, else for hooks and given outputs that are not finite."
    )


def check_weights(model: Model) -> None:
    """Raise an InputError if weights are not finite, some of which TransformerLens would hide."""
    for name, parameter in _weights(model):
        n_bad = count_not_finite(parameter)
        if n_bad:
            is_narrow = shape_of(model).dtype == torch.float16
            remedy = "load it with dtype=torch.float32" if is_narrow else "load the weights again"
            raise NotFiniteError(
                f"{n_bad} of {parameter.numel()} entries of {name} are not finite (NaN or "
                f"infinite); {remedy}."
            )


def _weights(model: Model) -> Iterable[tuple[str, Tensor]]:
    return backend(model).parameters().items()


def check_size(model: Model, residual: Float[Tensor, "*axes d_model"]) -> None:
    """Raise an InputError if the norm of a residual stream overflows, which makes it zero."""
    if not shape_of(model).has_norms:
        return
    wide = torch.promote_types(residual.dtype, torch.float32)
    squares = residual.detach().to(wide).square()
    overflows = squares.sum(-1).isinf()
    n_bad = int(overflows.sum())
    if n_bad:
        raise NotFiniteError(
            f"the residual stream overflows in the norm after it at {n_bad} tokens: {cause(model)}"
        )


def count_not_finite(values: Float[Tensor, "*axes"]) -> int:
    """How many entries are NaN or infinite."""
    # A finite sum has finite terms, and is faster to check. The sum of finite terms may overflow.
    total = values.detach().sum()
    if math.isfinite(float(total)):
        return 0
    is_bad = ~values.isfinite()
    return int(is_bad.sum())
