"""Metrics: from logits to one number per scored row. A metric never averages; its caller does.

Values have their natural sign. A metric's `direction` says which way is worse, so that `damage`
always grows as the output gets worse.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from circuits.models import Model, cause, count_not_finite
from circuits.system.arguments import checked_arguments
from circuits.system.code_digest import code_digest
from circuits.system.errors import InputError, NotFiniteError
from circuits.system.fields import CheckedFields
from circuits.system.memory import is_out_of_memory
from circuits.system.messages import suggestion
from circuits.system.numbers import shown
from circuits.tasks.metric_names import ALIASES as ALIASES, METRICS as METRICS
from circuits.tasks.model_fit import check_is_task
from circuits.tasks.task import Task

MetricFunction = Callable[[Tensor, Tensor, Task], Tensor]
Direction = Literal["higher_is_damage", "lower_is_damage"]
Reads = Literal["vocabulary", "answers"]

# What rounding may change: a share, and an absolute difference
TOLERANCES = (1e-3, 1e-4)

RowLogits = Float[Tensor, "scored vocab"]
# The logits of one circuit, or of several ("variants") on a leading axis.
CircuitLogits = Float[Tensor, "*variant scored vocab"]
Values = Float[Tensor, "*variant scored"]
AnswerTokens = Int[Tensor, "scored k"]
AnswerKind = Literal["answers", "wrong_answers"]


@dataclass(frozen=True)
class Metric(CheckedFields):
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
            `clean_logits` are those of the whole model on the clean prompts. Every method gives
            it all scored rows of the whole task at once, so it may hold data of its own, by row or
            by prompt (`task.row_prompt` is the prompt of each scored row), and compare rows. Whole
            numbers and booleans count as numbers.
        direction: whether larger values are worse ("higher_is_damage", as for KL) or better
            ("lower_is_damage", as for a logit difference).
        vectorised: set it if `function` also maps logits [variant, scored, vocab] to
            [variant, scored], each variant as if alone; one call then does for several circuits.
        reads: "answers" says that the value depends on no logits but those of the task's answers
            and wrong answers. Searches then compute only these: the logits may be a selection of
            columns, in which the task's answers are numbered.
    """

    name: str
    function: MetricFunction
    direction: Direction
    vectorised: bool = False
    reads: Reads = "vocabulary"

    def __post_init__(self) -> None:
        if not callable(self.function):
            raise InputError(
                f"metric {self.name!r} with function={shown(self.function)}: give a function of "
                "(logits, clean_logits, task)."
            )

    def __str__(self) -> str:
        """The name; for a user's metric, with a digest of its code, since names may coincide."""
        if self.shipped:
            return self.name
        digest = code_digest(self.function, self.direction)
        return f"{self.name} {digest.text[:8]}"

    @property
    def shipped(self) -> bool:
        """Whether it is one of this package: vectorised, row by row, and known by its name."""
        return _SHIPPED.get(self.name) == self

    @property
    def sign(self) -> int:
        """+1 if higher values are damage, -1 if lower values are."""
        return 1 if self.direction == "higher_is_damage" else -1

    @checked_arguments
    def __call__(self, logits: CircuitLogits, clean_logits: RowLogits, task: Task) -> Values:
        """One value per scored row, in float32 or float64.

        The logits of several circuits, on a leading axis, give a row of values each. They must be
        finite, as checking them again would cost time.

        Raises:
            InputError: the logits are not finite, the metric fails on them, or it returns NaN,
                another shape or no numbers.
        """
        check_is_task(task)
        is_single = logits.ndim == 2
        if not logits.numel():
            return _at_least_float32(logits.new_zeros(logits.shape[:-1]))
        if not (is_single or self.vectorised or self.shipped):
            alone = [self(each, clean_logits, task) for each in logits]
            return torch.stack(alone)
        logits = _at_least_float32(logits)
        clean_logits = _at_least_float32(clean_logits)
        if is_single:
            check_finite(logits)
        values = self._values(logits, clean_logits, task)
        n_bad = count_not_finite(values)
        if n_bad:
            raise NotFiniteError(
                f"metric {self.name!r} is NaN or infinite on {n_bad} of {values.numel()} scored "
                "rows although the logits are finite; correct the metric."
            )
        if not (is_single or self.shipped):
            self._check_alone(values, logits, clean_logits, task)
        return values

    def _check_alone(
        self, values: Values, logits: CircuitLogits, clean_logits: RowLogits, task: Task
    ) -> None:
        """Refuse a vectorised function that mixes circuits, such as by a mean over all axes."""
        # A sum over the circuits so far leaves the first as it is, and a maximum the largest.
        for place in (-1, 0):
            among = values.flatten(0, -2)[place]
            alone = self._values(logits.flatten(0, -3)[place], clean_logits, task)
            if not torch.allclose(among, alone, *TOLERANCES):
                row = (among - alone).abs().argmax()
                raise InputError(
                    f"metric {self.name!r} is vectorised, but gives row {int(row)} of a circuit "
                    f"{float(among[row]):.4g} among others and {float(alone[row]):.4g} alone; "
                    "reduce over the last axis only, or leave out vectorised=True."
                )

    def _values(self, logits: CircuitLogits, clean_logits: RowLogits, task: Task) -> Values:
        """What the function returns, if that is what it must return, in the logits' dtype."""
        if not self.shipped:
            # Functions of other people may write to what they are given.
            logits, clean_logits = logits.clone(), clean_logits.clone()
        try:
            values: Any = self.function(logits, clean_logits, task)
            self._check_values(values, logits.shape[:-1])
            return values.to(logits)
        except InputError:
            raise
        except Exception as error:
            if is_out_of_memory(error):
                raise
            reason, *_ = str(error).splitlines() or [""]
            failure = f"{type(error).__name__}: {reason[:160]}".rstrip(".")
            several = "[variant, scored, vocab]" if logits.ndim > 2 else "[scored, vocab]"
            raise InputError(
                f"metric {self.name!r} fails with {failure}. It gets logits {several}, here "
                f"{tuple(logits.shape)}, clean_logits {tuple(clean_logits.shape)}, which have no "
                f"axis of positions, and the task; it returns {_wanted(logits.shape[:-1])}."
            ) from error

    def _check_values(self, values: Any, expected: torch.Size) -> None:
        found = type(values).__name__
        if isinstance(values, Tensor):
            found = f"shape {tuple(values.shape)}"
            if values.is_complex() or values.layout != torch.strided:
                found = f"{values.dtype}, {values.layout}"
            elif values.shape == expected:
                return
        raise InputError(
            f"metric {self.name!r} returned {found}; it must return {_wanted(expected)}, as a "
            "tensor, and leave the averaging to the caller."
        )

    def damage(self, logits: CircuitLogits, clean_logits: RowLogits, task: Task) -> Values:
        """The metric with the sign that makes larger values worse."""
        return self.sign * self(logits, clean_logits, task)


def get_metric(metric: str | Metric | None, task: Task) -> Metric:
    """The metric of that name, or an InputError if there is none; None means the task's own."""
    given: Any = task.metric if metric is None else metric
    found = given
    if isinstance(given, str):
        found = METRICS.get(given) or METRICS.get(ALIASES.get(given, given))
    if isinstance(found, Metric):
        if isinstance(given, str) and found.name not in (given, ALIASES.get(given)):
            raise InputError(
                f"METRICS[{given!r}] holds a metric called {found.name!r}, the name under which "
                "its results are kept; give both the same name."
            )
        return found
    if callable(found):
        name = getattr(found, "__name__", "mine")
        raise InputError(
            f"metric {given!r} is a function, which does not say whether more is worse: give "
            f"circuits.Metric({name!r}, function, 'higher_is_damage'), or 'lower_is_damage'."
        )
    if isinstance(given, str):
        known = suggestion(given.lower(), METRICS)
        raise InputError(f"no metric {given!r}; {known[:-1]}, or make a circuits.Metric.")
    raise InputError(f"metric={shown(given)} must be the name of a metric, or a circuits.Metric.")


def check_finite(logits: Float[Tensor, "*rows vocab"], model: Model | None = None) -> None:
    """Raise an InputError if logits, those of `model` if it is given, are NaN or infinite."""
    n_bad = count_not_finite(logits)
    if n_bad:
        why = "give finite ones." if model is None else cause(model)
        found = f"{n_bad} of {logits.numel()} logits are NaN or infinite"
        raise NotFiniteError(f"{found}: {why}")


def _wanted(shape: torch.Size) -> str:
    """What a metric must return, given logits of this shape but for the vocabulary."""
    several = " and circuit, as it is vectorised" if len(shape) > 1 else ""
    return f"one number per scored row{several}, shape {tuple(shape)}"


def _at_least_float32(logits: Tensor) -> Tensor:
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


# The docstring of each metric is its description in `circuits list`.


def kl(logits: CircuitLogits, clean_logits: RowLogits, task: Task) -> Values:
    """KL(model || circuit) in nats, summed over the vocabulary."""
    # sum_v p_model(v) (log p_model(v) - log p_circuit(v))
    log_p_model = clean_logits.log_softmax(-1)
    log_ratio = log_p_model - logits.log_softmax(-1)
    # Multiplied and summed in one pass: passes over the vocabulary are what a metric costs.
    return torch.linalg.vecdot(log_p_model.exp(), log_ratio)


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
for _function, _direction in _DIRECTIONS.items():
    _name = _function.__name__
    _reads: Reads = "answers" if _function is logit_difference else "vocabulary"
    METRICS[_name] = Metric(_name, _function, _direction, reads=_reads)
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
    rows = values.shape[:-1]
    found = values.gather(-1, indices.expand(*rows, -1))
    return found.masked_fill(tokens < 0, padding)


def _mean_logit(logits: CircuitLogits, task: Task, kind: AnswerKind) -> Values:
    total = _gather(logits, task, kind)
    is_answer = _tokens(task, kind) >= 0
    return total.sum(-1) / is_answer.sum(-1)
