"""Slopes: the gradient of the damage at the logits, where a backward pass starts.

A metric of this package judges every scored row by itself, so its slopes are computed batch by
batch. Any other may hold data of its own by row or prompt, or compare rows. It is given the logits
of all scored rows together, and each batch starts from its rows of the slopes.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor

from circuits.models import count_not_finite
from circuits.system.errors import InputError, NotFiniteError
from circuits.system.memory import is_out_of_memory
from circuits.tasks.metrics import Metric
from circuits.tasks.task import Task

Logits = Float[Tensor, "scored vocab"]
OfLogits = Callable[[Logits], Logits]


def slopes(metric: Metric, clean_logits: Logits | None, task: Task, logits: Logits) -> Logits:
    """d (damage, summed over scored rows) / d logits; `clean_logits=None` if these are `logits`."""
    with torch.enable_grad():
        varied = logits.detach().requires_grad_()
        against = logits.detach() if clean_logits is None else clean_logits
        damage = metric.damage(varied, against, task)
        total = damage.sum()
        found = _gradient(metric, total, varied) if total.requires_grad else None
    if found is None:
        raise InputError(
            f"metric {metric.name!r} has no gradient; choose a differentiable one, such as "
            "logit_difference."
        )
    n_bad = count_not_finite(found)
    if n_bad:
        raise NotFiniteError(
            f"the gradient of metric {metric.name!r} is NaN or infinite at {n_bad} logits although "
            "its values are finite, as that of a square root is at 0; correct the metric, or take "
            "the gradient elsewhere."
        )
    return found


def _gradient(metric: Metric, total: Tensor, logits: Logits) -> Logits | None:
    try:
        (found,) = torch.autograd.grad(total, logits, allow_unused=True)
    except RuntimeError as error:
        if is_out_of_memory(error):
            raise
        raise InputError(
            f"metric {metric.name!r} cannot be differentiated ({str(error)[:200]}): do not write "
            "to tensors that it has computed with."
        ) from error
    return found


def rows_of(task: Task, prompts: slice) -> slice:
    """The scored rows of some consecutive prompts."""
    before = int(task.scored[: prompts.start].sum())
    within = int(task.scored[prompts].sum())
    return slice(before, before + within)
