"""Metrics: from logits to one number per scored row. A metric never averages; its caller does.

Values have their natural sign. A metric's `direction` says which way is worse, so that `damage`
always grows as the output gets worse.
"""

import inspect
import math
from collections.abc import Callable
from dataclasses import dataclass
from hashlib import blake2b
from typing import Any, Literal, get_args

import torch
from jaxtyping import Float, Int
from torch import Tensor

from circuits.system.errors import InputError, NotFiniteError
from circuits.system.memory import is_out_of_memory
from circuits.system.numbers import shown
from circuits.tasks.task import Task

MetricFunction = Callable[[Tensor, Tensor, Task], Tensor]
Direction = Literal["higher_is_damage", "lower_is_damage"]

# What a function raises that expects other arguments.
FAULTS = (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError)

RowLogits = Float[Tensor, "scored vocab"]
# The logits of one circuit, or of several ("variants") on a leading axis.
CircuitLogits = Float[Tensor, "*variant scored vocab"]
Values = Float[Tensor, "*variant scored"]
AnswerTokens = Int[Tensor, "scored k"]
AnswerKind = Literal["answers", "wrong_answers"]


@dataclass(frozen=True)
class Metric:
    """A named metric. Pass one wherever a metric's name is accepted.

    >>> import circuits
    >>> def largest_logit(logits, clean_logits, task):
    ...     return logits.max(-1).values
    >>> metric = circuits.Metric("largest_logit", largest_logit, "lower_is_damage")
    >>> circuits.EAP(metric=metric).metric.sign
    -1

    Attributes:
        name: identifies the metric in tables and records.
        function: (logits [scored, vocab], clean_logits [scored, vocab], task) -> [scored].
            `clean_logits` are those of the whole model on the clean prompts. `task.row_prompt`
            gives the prompt of each scored row.
        direction: whether larger values are worse ("higher_is_damage", as for KL) or better
            ("lower_is_damage", as for a logit difference).
        vectorised: set it if `function` also maps logits [variant, scored, vocab] to
            [variant, scored]; one call then does for several circuits.
    """

    name: str
    function: MetricFunction
    direction: Direction
    vectorised: bool = False

    def __post_init__(self) -> None:
        if not callable(self.function):
            raise InputError(
                f"metric {self.name!r}: function={shown(self.function)} must be a function of "
                "(logits, clean_logits, task)."
            )
        allowed = get_args(Direction)
        if self.direction not in allowed:
            found = f"metric {self.name!r}: direction={self.direction!r}"
            raise InputError(f"{found} must be one of {allowed}.")

    def __str__(self) -> str:
        """The name; for a user's metric, with a hash of its source, since names may coincide."""
        if self.shipped:
            return self.name
        try:
            source = inspect.getsource(self.function)
        except (OSError, TypeError):
            # Functions typed into a console have no source, and callable objects no name.
            kind = type(self.function).__name__
            source = getattr(self.function, "__qualname__", kind)
        content = f"{self.direction} {source}".encode()
        digest = blake2b(content, digest_size=4)
        return f"{self.name} {digest.hexdigest()}"

    @property
    def shipped(self) -> bool:
        """Whether it is one of this package: vectorised, and identified by its name alone."""
        return _SHIPPED.get(self.name) == self

    @property
    def sign(self) -> int:
        """+1 if higher values are damage, -1 if lower values are."""
        return 1 if self.direction == "higher_is_damage" else -1

    def __call__(self, logits: CircuitLogits, clean_logits: RowLogits, task: Task) -> Values:
        """One value per scored row, in float32 or float64.

        The logits of several circuits, on a leading axis, give a row of values each. They must be
        finite, as checking them again would cost time.

        Raises:
            InputError: the logits are not finite, or the metric returns NaN or another shape.
        """
        is_single = logits.ndim == 2
        if not (is_single or self.vectorised or self.shipped):
            values_by_circuit = [self(each, clean_logits, task) for each in logits]
            return torch.stack(values_by_circuit)
        logits = _at_least_float32(logits)
        clean_logits = _at_least_float32(clean_logits)
        if is_single:
            check_finite(logits)
        values = self._values(logits, clean_logits, task)
        expected = logits.shape[:-1]
        is_tensor = isinstance(values, Tensor)
        if not is_tensor or values.shape != expected:
            found = f"shape {tuple(values.shape)}" if is_tensor else type(values).__name__
            raise InputError(
                f"metric {self.name!r} returned {found}; it must return one number per scored "
                f"row, shape ({expected[-1]},), and leave the averaging to the caller."
            )
        n_bad = _count_not_finite(values)
        if n_bad:
            raise NotFiniteError(
                f"metric {self.name!r} is NaN or infinite on {n_bad} of {values.numel()} scored "
                "rows although the logits are finite; correct the metric."
            )
        return values.to(logits.dtype)

    def _values(self, logits: Tensor, clean_logits: Tensor, task: Task) -> Any:
        try:
            return self.function(logits, clean_logits, task)
        except FAULTS as error:
            if is_out_of_memory(error) or isinstance(error, InputError) or self.shipped:
                raise
            reason = " ".join(f"{type(error).__name__}: {error}".split())
            raise InputError(
                f"metric {self.name!r} fails: {reason[:200]}. It gets logits [scored, vocab] of "
                f"shape {tuple(logits.shape)}, a row per scored position; correct the function."
            ) from error

    def damage(self, logits: CircuitLogits, clean_logits: RowLogits, task: Task) -> Values:
        """The metric with the sign that makes larger values worse."""
        return self.sign * self(logits, clean_logits, task)


def get_metric(metric: str | Metric | None, task: Task) -> Metric:
    """The metric of that name, or an InputError if there is none; None means the task's own."""
    name = task.metric if metric is None else metric
    if isinstance(name, Metric):
        return name
    if not isinstance(name, str) or name not in METRICS:
        names = ", ".join(METRICS)
        raise InputError(f"no metric {shown(name)}; there are {names}, or make a circuits.Metric.")
    return METRICS[name]


def check_finite(logits: Float[Tensor, "*rows vocab"]) -> None:
    """Raise an InputError if logits are NaN or infinite."""
    n_bad = _count_not_finite(logits)
    if n_bad:
        raise NotFiniteError(
            f"{n_bad} of {logits.numel()} logits are NaN or infinite: the model overflows in its "
            "dtype; load it with dtype=torch.float32 (or torch.bfloat16, which has the same range)."
        )


def _count_not_finite(values: Float[Tensor, "*rows"]) -> int:
    # A finite sum has finite terms, and is faster to check. The sum of finite terms may overflow.
    if math.isfinite(float(values.detach().sum())):
        return 0
    is_bad = ~values.isfinite()
    return int(is_bad.sum())


def _at_least_float32(logits: Tensor) -> Tensor:
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


# The docstring of each metric is its description in `circuits list`.


def kl(logits: CircuitLogits, clean_logits: RowLogits, task: Task) -> Values:
    """KL(model || circuit) in nats, summed over the vocabulary."""
    # sum_v p_model(v) (log p_model(v) - log p_circuit(v))
    log_p_model = clean_logits.log_softmax(-1)
    log_ratio = log_p_model - logits.log_softmax(-1)
    terms = log_p_model.exp() * log_ratio
    return terms.sum(-1)


def logit_difference(logits: CircuitLogits, clean_logits: RowLogits, task: Task) -> Values:
    """Mean logit of the answers minus mean logit of the wrong answers."""
    # mean_{v in answers} logit(v) - mean_{v in wrong answers} logit(v)
    right = _mean_logit(logits, task, "answers")
    return right - _mean_logit(logits, task, "wrong_answers")


def probability_difference(logits: CircuitLogits, clean_logits: RowLogits, task: Task) -> Values:
    """Summed probability of the answers minus that of the wrong answers."""
    # sum_{v in answers} p(v) - sum_{v in wrong answers} p(v)
    probabilities = logits.softmax(-1)
    right = _gather(probabilities, task, "answers")
    wrong = _gather(probabilities, task, "wrong_answers")
    return right.sum(-1) - wrong.sum(-1)


def negative_log_probability(logits: CircuitLogits, clean_logits: RowLogits, task: Task) -> Values:
    """Minus the log of the answers' summed probability, in nats."""
    # -log sum_{v in answers} p(v) = -logsumexp_{v in answers} log p(v); padding has p = 0
    log_probabilities = logits.log_softmax(-1)
    of_answers = _gather(log_probabilities, task, "answers", -math.inf)
    return -of_answers.logsumexp(-1)


def accuracy(logits: CircuitLogits, clean_logits: RowLogits, task: Task) -> Values:
    """1 where the most likely token is an answer, else 0."""
    # argmax_v logit(v) in answers; padding is -1, which is never predicted
    predicted = logits.argmax(-1, keepdim=True)
    is_right = predicted == _tokens(task, "answers")
    return is_right.any(-1).to(logits.dtype)


def squared_error(logits: CircuitLogits, clean_logits: RowLogits, task: Task) -> Values:
    """Mean over the vocabulary of the squared difference to the model's logits."""
    difference = logits - clean_logits
    return difference.square().mean(-1)


_DIRECTIONS: dict[MetricFunction, Direction] = {
    kl: "higher_is_damage",
    logit_difference: "lower_is_damage",
    probability_difference: "lower_is_damage",
    negative_log_probability: "higher_is_damage",
    accuracy: "lower_is_damage",
    squared_error: "higher_is_damage",
}
METRICS: dict[str, Metric] = {}
for _function, _direction in _DIRECTIONS.items():
    _name = _function.__name__
    METRICS[_name] = Metric(_name, _function, _direction)
# Users may add metrics of their own to METRICS.
_SHIPPED = dict(METRICS)


def _tokens(task: Task, kind: AnswerKind) -> AnswerTokens:
    tokens: Tensor | None = getattr(task, f"row_{kind}")
    if tokens is None:
        raise InputError(
            f"task {task.name!r} has no {kind}, which this metric needs; "
            f"give {kind}, or use kl or squared_error."
        )
    return tokens


def _gather(
    values: CircuitLogits, task: Task, kind: AnswerKind, padding: float = 0.0
) -> Float[Tensor, "*variant scored k"]:
    tokens = _tokens(task, kind)
    # gather needs valid indices, so it reads token 0 where the tokens are padded with -1.
    indices = tokens.clamp(min=0)
    indices = indices.expand(*values.shape[:-1], -1)
    found = values.gather(-1, indices)
    return found.masked_fill(tokens < 0, padding)


def _mean_logit(logits: CircuitLogits, task: Task, kind: AnswerKind) -> Values:
    total = _gather(logits, task, kind).sum(-1)
    is_answer = _tokens(task, kind) >= 0
    return total / is_answer.sum(-1)
