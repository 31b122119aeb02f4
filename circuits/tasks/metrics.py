"""Metrics: logits -> one number per scored position. A metric never averages; whoever calls it does, once.

Its `direction` says which way is damage, and nothing else needs to know: values are reported with their natural sign, and
`damage` has the sign that makes more of it worse.
"""

from __future__ import annotations

import hashlib
import inspect
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from circuits.system.errors import InputError
from circuits.tasks.task import Task

MetricFunction = Callable[[Tensor, Tensor, Task], Tensor]


@dataclass(frozen=True)
class Metric:
    """A named metric.

    Attributes:
        function: (logits [scored, vocab], clean_logits [scored, vocab], task) -> [scored]. `clean_logits` are the whole model's on the
            clean prompts; `task.row_prompt` says which prompt each scored row belongs to.
        direction: whether larger values are worse ("higher_is_damage", as KL) or better ("lower_is_damage", as a logit difference).
    """

    name: str
    function: MetricFunction
    direction: Literal["higher_is_damage", "lower_is_damage"]

    def __post_init__(self) -> None:
        if self.direction not in ("higher_is_damage", "lower_is_damage"):
            raise InputError(
                f"Metric {self.name!r}: direction={self.direction!r} must be 'higher_is_damage' or 'lower_is_damage'."
            )

    def __str__(self) -> str:
        """The name; of a metric of one's own also a hash of its source, since two can share a name."""
        if METRICS.get(self.name) is self:
            return self.name
        try:
            source = inspect.getsource(self.function)
        except (OSError, TypeError):
            source = getattr(self.function, "__qualname__", type(self.function).__name__)
        return f"{self.name} {hashlib.blake2b(f'{self.direction} {source}'.encode(), digest_size=4).hexdigest()}"

    @property
    def sign(self) -> int:
        """+1 where higher is damage, -1 where lower is."""
        return 1 if self.direction == "higher_is_damage" else -1

    def __call__(
        self,
        logits: Float[Tensor, "scored vocab"],
        clean_logits: Float[Tensor, "scored vocab"],
        task: Task,
    ) -> Float[Tensor, " scored"]:
        """One number per scored row, computed in float32 at least.

        Raises:
            InputError: the metric returns another shape or NaN, or the logits are not finite.
        """
        logits, clean_logits = _at_least_float32(logits), _at_least_float32(clean_logits)
        check_finite(logits)
        return self._checked(self.function(logits, clean_logits, task), logits)

    def damage(
        self,
        logits: Float[Tensor, "scored vocab"],
        clean_logits: Float[Tensor, "scored vocab"],
        task: Task,
    ) -> Float[Tensor, " scored"]:
        """The metric with the sign that makes more of it worse."""
        return self.sign * self(logits, clean_logits, task)

    def damages(
        self,
        logits: Float[Tensor, "variant scored vocab"],
        clean_logits: Float[Tensor, "scored vocab"],
        task: Task,
    ) -> Float[Tensor, "variant scored"]:
        """The damage in each of several circuits, whose logits are known to be finite."""
        if METRICS.get(self.name) is not self:
            return torch.stack([self.damage(each, clean_logits, task) for each in logits])
        logits, clean_logits = _at_least_float32(logits), _at_least_float32(clean_logits)
        # The functions of this module treat rows alike, however many axes of them there are.
        return self.sign * self._checked(self.function(logits, clean_logits, task), logits)

    def _checked(self, values: Any, logits: Float[Tensor, "*variant scored vocab"]) -> Tensor:
        if not isinstance(values, Tensor) or values.shape != logits.shape[:-1]:
            found = (
                f"shape {tuple(values.shape)}"
                if isinstance(values, Tensor)
                else type(values).__name__
            )
            raise InputError(
                f"metric {self.name!r} returned {found}; it must return one number per scored row, "
                f"shape ({logits.shape[-2]},), and leave the averaging to the caller."
            )
        if not _all_finite(values):
            bad = int((~values.isfinite()).sum())
            raise InputError(
                f"metric {self.name!r} is NaN or infinite on {bad} of {values.numel()} scored rows "
                "although the logits are finite; mend the metric."
            )
        return values.to(logits.dtype)


def get_metric(metric: str | Metric | None, task: Task) -> Metric:
    """The metric of that name; None is the task's own.

    Raises:
        InputError: there is no metric of that name.
    """
    chosen = task.metric if metric is None else metric
    if isinstance(chosen, Metric):
        return chosen
    if chosen not in METRICS:
        raise InputError(
            f"there is no metric {chosen!r}; there are {', '.join(METRICS)}, or make a circuits.Metric."
        )
    return METRICS[chosen]


def check_finite(logits: Float[Tensor, "*rows vocab"]) -> None:
    """Refuse logits that overflowed.

    Raises:
        InputError: some are NaN or infinite.
    """
    if not _all_finite(logits):
        raise InputError(
            f"{int((~logits.isfinite()).sum())} of {logits.numel()} logits are NaN or infinite: the model overflows in its dtype; "
            "load it with dtype=torch.float32 (or torch.bfloat16, whose range is as wide)."
        )


def _all_finite(values: Float[Tensor, "*rows"]) -> bool:
    # A sum is finite only if all of its terms are, and is quicker to have; but it may overflow.
    return math.isfinite(float(values.detach().sum())) or bool(values.isfinite().all())


def kl(
    logits: Float[Tensor, "*variant scored vocab"],
    clean_logits: Float[Tensor, "scored vocab"],
    task: Task,
) -> Float[Tensor, "*variant scored"]:
    """KL(model || circuit) in nats, summed over the vocabulary."""
    clean = clean_logits.log_softmax(-1)
    return (clean.exp() * (clean - logits.log_softmax(-1))).sum(-1)


def logit_difference(
    logits: Float[Tensor, "*variant scored vocab"],
    clean_logits: Float[Tensor, "scored vocab"],
    task: Task,
) -> Float[Tensor, "*variant scored"]:
    """Mean logit of the answers minus mean logit of the wrong answers."""
    return _mean_over(logits, _answers(task)) - _mean_over(logits, _wrong_answers(task))


def probability_difference(
    logits: Float[Tensor, "*variant scored vocab"],
    clean_logits: Float[Tensor, "scored vocab"],
    task: Task,
) -> Float[Tensor, "*variant scored"]:
    """Summed probability of the answers minus that of the wrong answers."""
    probabilities = logits.softmax(-1)
    return _sum_over(probabilities, _answers(task)) - _sum_over(probabilities, _wrong_answers(task))


def negative_log_probability(
    logits: Float[Tensor, "*variant scored vocab"],
    clean_logits: Float[Tensor, "scored vocab"],
    task: Task,
) -> Float[Tensor, "*variant scored"]:
    """Minus the log of the answers' summed probability, in nats."""
    answers = _answers(task)
    chosen = _gather(logits.log_softmax(-1), answers)
    return -chosen.masked_fill(answers < 0, -torch.inf).logsumexp(-1)


def accuracy(
    logits: Float[Tensor, "*variant scored vocab"],
    clean_logits: Float[Tensor, "scored vocab"],
    task: Task,
) -> Float[Tensor, "*variant scored"]:
    """1 where the most likely token is an answer, else 0."""
    return (logits.argmax(-1, keepdim=True) == _answers(task)).any(-1).to(logits.dtype)


def squared_error(
    logits: Float[Tensor, "*variant scored vocab"],
    clean_logits: Float[Tensor, "scored vocab"],
    task: Task,
) -> Float[Tensor, "*variant scored"]:
    """Mean over the vocabulary of the squared difference to the model's logits."""
    return (logits - clean_logits).square().mean(-1)


METRICS: dict[str, Metric] = {
    "kl": Metric("kl", kl, "higher_is_damage"),
    "logit_difference": Metric("logit_difference", logit_difference, "lower_is_damage"),
    "probability_difference": Metric(
        "probability_difference", probability_difference, "lower_is_damage"
    ),
    "negative_log_probability": Metric(
        "negative_log_probability", negative_log_probability, "higher_is_damage"
    ),
    "accuracy": Metric("accuracy", accuracy, "lower_is_damage"),
    "squared_error": Metric("squared_error", squared_error, "higher_is_damage"),
}


def _answers(task: Task) -> Int[Tensor, "scored k"]:
    if task.row_answers is None:
        raise InputError(
            f"task {task.name!r} has no answers, which this metric needs; give answers, or use kl or squared_error."
        )
    return task.row_answers


def _wrong_answers(task: Task) -> Int[Tensor, "scored k"]:
    if task.row_wrong_answers is None:
        raise InputError(
            f"task {task.name!r} has no wrong answers, which this metric needs; give wrong_answers, or use kl."
        )
    return task.row_wrong_answers


def _gather(
    values: Float[Tensor, "*variant scored vocab"], tokens: Int[Tensor, "scored k"]
) -> Float[Tensor, "*variant scored k"]:
    return values.gather(-1, tokens.clamp(min=0).expand(*values.shape[:-1], -1))


def _sum_over(
    values: Float[Tensor, "*variant scored vocab"], tokens: Int[Tensor, "scored k"]
) -> Float[Tensor, "*variant scored"]:
    return _gather(values, tokens).masked_fill(tokens < 0, 0).sum(-1)


def _mean_over(
    values: Float[Tensor, "*variant scored vocab"], tokens: Int[Tensor, "scored k"]
) -> Float[Tensor, "*variant scored"]:
    return _sum_over(values, tokens) / (tokens >= 0).sum(-1)


def _at_least_float32(logits: Tensor) -> Tensor:
    return logits.float() if logits.dtype in (torch.float16, torch.bfloat16) else logits
