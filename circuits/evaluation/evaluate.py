"""How good a circuit is: its metrics, and its faithfulness over sizes."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor

from circuits.graph.circuit import Circuit, check_is_circuit
from circuits.models import Model, check_model, shape_of
from circuits.models.tolerance import logit_gap
from circuits.running.ablation import Ablation
from circuits.running.run import model_logits, run_variants
from circuits.running.settings import RunSettings
from circuits.system.errors import InputError
from circuits.system.kinds import expect
from circuits.system.numbers import RealNumber, WholeNumber, items, python_number, shown
from circuits.system.torch_modes import without_modes
from circuits.tasks.metrics import ALIASES, Metric, get_metric
from circuits.tasks.model_fit import check_task
from circuits.tasks.task import Task
from circuits.transcoders.transcoder import Transcoders

Size = WholeNumber | RealNumber
"""A number of edges, or as a float a fraction of the circuit's edges."""
Sizes = Sequence[Size] | np.ndarray | Tensor

Row = dict[str, float]

RowPrompt = Int[Tensor, " scored"]
ByRow = Mapping[str, Float[Tensor, " scored"]]
"""By metric name, one number per scored row, with the metric's natural sign."""

# The sizes of the MIB benchmark.
CURVE_FRACTIONS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)
# Metrics that are above 0 where a model prefers the answers
DIFFERENCES = ("logit_difference", "probability_difference")
# The relative difference of two means of a metric that float32 cannot tell apart.
ROUNDING = 1e-6
# What a curve's table has besides metrics.
COLUMNS = ("edges", "fraction", "faithfulness", "method", "selected", "of")


if TYPE_CHECKING:

    class _MetricMean:
        """Tells type checkers that an attribute is a float."""

        def __get__(self, evaluation: object, kind: type | None = None) -> float: ...


@dataclass(frozen=True, eq=False)
class Evaluation:
    """Metrics of a circuit, with those of the whole model and of the empty circuit.

    `evaluation.kl` and `evaluation["kl"]` are means over scored rows; `logit_diff` is understood as
    `logit_difference`. `dir(evaluation)` lists the metrics.

    Attributes:
        values, model_values, empty_values: by metric name, one number per scored row.
        row_prompt: the prompt that each scored row belongs to.
        n_edges: the number of edges that the circuit keeps.

    >>> import circuits
    >>> model = circuits.load_model("toy-world")
    >>> task = circuits.load_task("ioi", model, n=4)
    >>> whole = circuits.Circuit.full(circuits.component_graph(model))
    >>> evaluation = circuits.evaluate(model, whole, task)
    >>> round(abs(evaluation.kl), 3), round(evaluation.faithfulness("logit_diff"), 3)
    (0.0, 1.0)
    """

    values: ByRow
    model_values: ByRow
    empty_values: ByRow
    row_prompt: RowPrompt
    n_edges: int

    def __getitem__(self, metric: str) -> float:
        """The mean of a metric over scored rows.

        Raises:
            InputError: the metric was not evaluated.
        """
        name = self._name(metric)
        return float(self.values[name].mean())

    if TYPE_CHECKING:
        # Type checkers know the shipped metrics, so that a misspelt one is an error.
        kl = logit_difference = probability_difference = _MetricMean()
        negative_log_probability = accuracy = squared_error = _MetricMean()
        logit_diff = prob_diff = _MetricMean()
    else:

        def __getattr__(self, metric: str) -> float:
            """`self[metric]`, for metrics that were evaluated."""
            values = self.__dict__.get("values", {})
            if ALIASES.get(metric, metric) not in values:
                raise AttributeError(
                    f"this evaluation has no metric {metric!r}; it has {', '.join(values)}."
                )
            return self[metric]

    def __dir__(self) -> list[str]:
        return [*super().__dir__(), *self.values]

    def __repr__(self) -> str:
        metrics = ", ".join(f"{name}={value:.4g}" for name, value in self.mean().items())
        return f"Evaluation({self.n_edges:,} edges, {metrics})"

    def _repr_html_(self) -> str:
        table = self.table().to_html(float_format="%.4g")
        notes = "".join(f"<p>{escape(note)}</p>" for note in self.notes)
        return f"<p><b>{self.n_edges:,} edges</b></p>{table}{notes}"

    def mean(self) -> Row:
        """Every metric's mean over scored rows."""
        return _means(self.values)

    def faithfulness(self, metric: str) -> float:
        """(m(circuit) - m(empty)) / (m(model) - m(empty)), with m the mean over scored rows.

        1 for the whole model, 0 for the empty circuit; NaN if the metric is equal on both, up to
        rounding. `notes` then says so.

        Raises:
            InputError: the metric was not evaluated.
        """
        name = self._name(metric)
        runs = (self.values, self.model_values, self.empty_values)
        # (m(circuit) - m(empty)) / (m(model) - m(empty))
        circuit, model, empty = (_means(run)[name] for run in runs)
        if math.isclose(model, empty, rel_tol=ROUNDING):
            return math.nan
        return (circuit - empty) / (model - empty)

    @property
    def notes(self) -> tuple[str, ...]:
        """What else to know before reading these numbers."""
        undefined = [name for name in self.values if math.isnan(self.faithfulness(name))]
        return no_faithfulness(undefined) + doubts(self.model_values, self.row_prompt)

    def by_prompt(self) -> pd.DataFrame:
        """A row per prompt and a column per metric: the mean over the prompt's scored rows."""
        return _by_prompt(self.values, self.row_prompt)

    def table(self) -> pd.DataFrame:
        """A row per metric: its mean for circuit, model and empty circuit, and the faithfulness."""
        columns = {
            "circuit": _means(self.values),
            "model": _means(self.model_values),
            "empty": _means(self.empty_values),
            "faithfulness": {name: self.faithfulness(name) for name in self.values},
        }
        return pd.DataFrame(columns).rename_axis("metric")

    def _name(self, metric: str) -> str:
        expect(metric, str, "a metric's name", f"choose of {', '.join(self.values)}")
        name = metric if metric in self.values else ALIASES.get(metric, metric)
        if name not in self.values:
            raise InputError(
                f"this evaluation has no metric {metric!r}; it has {', '.join(self.values)}."
            )
        return name


def no_faithfulness(metrics: Sequence[str]) -> tuple[str, ...]:
    """Why these metrics have no faithfulness; nothing if there are none."""
    if not metrics:
        return ()
    return (
        f"the empty circuit has the {', '.join(metrics)} of the model up to rounding, so there is "
        "no faithfulness (NaN): the ablation changes nothing that matters here.",
    )


def doubts(model_values: ByRow, row_prompt: RowPrompt) -> tuple[str, ...]:
    """Why the whole model cannot be said to do a task; nothing if it prefers the answers."""
    by_prompt = _by_prompt(model_values, row_prompt)
    means, errors = by_prompt.mean(), by_prompt.sem()
    # The standard error of a single prompt is not known (NaN).
    are_sure = means > 2 * errors.fillna(0)
    return tuple(
        f"the whole model does not clearly prefer the answers, so that there is little to explain: "
        f"its {name} is {means[name]:.2g} (standard error {errors[name]:.2g}, {len(by_prompt)} "
        "prompts)."
        for name in DIFFERENCES
        if not are_sure.get(name, True)
    )


def _by_prompt(values: ByRow, row_prompt: RowPrompt) -> pd.DataFrame:
    rows = pd.DataFrame(values, row_prompt.numpy(), dtype=float)
    return rows.groupby(level=0).mean().rename_axis("prompt")


def _means(values: ByRow) -> Row:
    return {name: float(row.mean()) for name, row in values.items()}


@without_modes()
def evaluate(
    model: Model,
    circuit: Circuit,
    task: Task,
    *,
    metrics: str | Metric | Sequence[str | Metric] | None = None,
    ablation: str | Ablation = "resample",
    max_memory: WholeNumber | None = None,
    transcoders: Transcoders | None = None,
) -> Evaluation:
    """Run a circuit, with everything outside it ablated, and judge its logits.

    Args:
        metrics: one or several; None takes `kl`, `logit_difference` if the task has answers and
            wrong answers, and the task's own metric.
        ablation: what edges outside the circuit carry instead.
        max_memory, transcoders: see `run_circuits`.

    Raises:
        InputError: the model, circuit and task do not fit together, or a metric does not fit the
            task.

    >>> import circuits
    >>> model = circuits.load_model("toy-world")
    >>> task = circuits.load_task("ioi", model, n=4)
    >>> circuit = circuits.EAP().discover(model, task).top(50)
    >>> list(circuits.evaluate(model, circuit, task).table().columns)
    ['circuit', 'model', 'empty', 'faithfulness']
    """
    check_task(model, task)
    settings = RunSettings.parse(ablation=ablation, max_memory=max_memory, transcoders=transcoders)
    chosen = chosen_metrics(metrics, task)
    _check_names(chosen)
    return evaluations(model, [circuit], task, chosen, settings)[0]


@without_modes()
def evaluations(
    model: Model,
    circuits: Sequence[Circuit],
    task: Task,
    metrics: Sequence[Metric],
    settings: RunSettings,
) -> list[Evaluation]:
    """Evaluate circuits over one graph, which share the runs of the model and the empty circuit."""
    if not circuits:
        raise InputError("there are no circuits to evaluate; give at least one, or one size.")
    for circuit in circuits:
        check_is_circuit(circuit)
    graph = circuits[0].graph
    if any(circuit.graph != graph for circuit in circuits):
        raise InputError(
            "these circuits are over different graphs; evaluate each graph's circuits separately."
        )
    check_model(model)
    task = task.to(shape_of(model).device)
    whole = model_logits(model, task)
    kept = [circuit.kept for circuit in circuits]
    # The empty circuit is one more variant.
    kept.append(torch.zeros_like(kept[0]))
    runs = run_variants(model, graph, torch.stack(kept), task, settings)
    if logit_gap(runs[-1], whole) <= min(32 * torch.finfo(whole.dtype).eps, 1e-2):
        # The ablation changes nothing, so that a faithfulness would be noise over noise.
        runs = torch.cat([runs[:-1], whole[None]])
    model_values, *values, empty_values = (
        {metric.name: metric(logits, whole, task).cpu() for metric in metrics}
        for logits in (whole, *runs)
    )
    row_prompt = task.row_prompt.cpu()
    return [
        Evaluation(by_row, model_values, empty_values, row_prompt, len(circuit))
        for by_row, circuit in zip(values, circuits, strict=True)
    ]


@without_modes()
def faithfulness_curve(
    model: Model,
    circuit: Circuit,
    task: Task,
    sizes: Sizes | None = None,
    *,
    metric: str | Metric | None = None,
    ablation: str | Ablation = "resample",
    by: Literal["magnitude", "signed"] = "magnitude",
    max_memory: WholeNumber | None = None,
    transcoders: Transcoders | None = None,
) -> pd.DataFrame:
    """How faithful the highest-scored edges are, by the number of edges kept.

    Args:
        sizes: numbers of edges, or fractions (floats up to 1.0) of the circuit's edges; None takes
            the ten fractions of the MIB benchmark.
        metric: None takes the task's own.
        by: what edges are ranked by.
        ablation, max_memory, transcoders: see `run_circuits`.

    Returns:
        A row per size, ascending: `edges`, `fraction` (of the graph), the metric's mean under its
        name, `kl` and `faithfulness`.

    Raises:
        InputError: a size is out of range, or the model, circuit and task do not fit together.

    >>> import circuits
    >>> model = circuits.load_model("toy-world")
    >>> task = circuits.load_task("ioi", model, n=4)
    >>> scores = circuits.EAP().discover(model, task)
    >>> curve = circuits.faithfulness_curve(model, scores, task, [0, 1.0])
    >>> curve["faithfulness"].round(3).tolist()
    [0.0, 1.0]
    """
    options = {"ablation": ablation, "max_memory": max_memory, "transcoders": transcoders}
    settings = settings_of_points(model, task, metric=metric, **options)
    return judge_points(model, of_sizes(circuit, sizes, by), task, settings)


@without_modes()
def faithfulness_points(
    model: Model,
    circuits: Sequence[Circuit],
    task: Task,
    *,
    metric: str | Metric | None = None,
    ablation: str | Ablation = "resample",
    max_memory: WholeNumber | None = None,
    transcoders: Transcoders | None = None,
) -> pd.DataFrame:
    """How faithful each of several circuits over one graph is, such as those of a threshold sweep.

    Args:
        metric: None takes the task's own.
        ablation, max_memory, transcoders: see `run_circuits`.

    Returns:
        A row per circuit, with the columns of `faithfulness_curve`.

    Raises:
        InputError: the circuits are over different graphs, or do not fit the model and task.

    >>> import circuits
    >>> model = circuits.load_model("toy-world")
    >>> task = circuits.load_task("ioi", model, n=4)
    >>> found = circuits.ACDC(0.1).sweep(model, task, [0.1, 1.0])
    >>> circuits.faithfulness_points(model, found, task)["edges"].is_monotonic_decreasing
    True
    """
    options = {"ablation": ablation, "max_memory": max_memory, "transcoders": transcoders}
    settings = settings_of_points(model, task, metric=metric, **options)
    return judge_points(model, circuits, task, settings)


def settings_of_points(model: Model, task: Task, **options: Any) -> RunSettings:
    """The settings of `judge_points`, from a user's arguments."""
    check_task(model, task)
    settings = RunSettings.parse(task, **options)
    metric = settings.metric
    if metric is not None and metric.name in COLUMNS:
        raise InputError(
            f"metric {metric.name!r} has the name of another column of the table; rename it."
        )
    return settings


def judge_points(
    model: Model, circuits: Sequence[Circuit], task: Task, settings: RunSettings
) -> pd.DataFrame:
    """`faithfulness_points`, with its arguments parsed."""
    metric = settings.metric
    assert metric is not None
    metrics = [get_metric("kl", task), metric]
    # An iterator could be read once only.
    circuits = items(circuits, "circuits")
    rows = []
    for evaluation in evaluations(model, circuits, task, metrics, settings):
        fraction = evaluation.n_edges / len(circuits[0].graph)
        row: Row = {"edges": evaluation.n_edges, "fraction": fraction}
        rows.append(row | mean_and_faithfulness(evaluation, metric))
    return pd.DataFrame(rows)


def mean_and_faithfulness(evaluation: Evaluation, metric: Metric) -> Row:
    """Every metric's mean, and the faithfulness by one of them."""
    faithfulness = evaluation.faithfulness(metric.name)
    return evaluation.mean() | {"faithfulness": faithfulness}


def of_sizes(
    circuit: Circuit, sizes: Sizes | None, by: Literal["magnitude", "signed"] = "magnitude"
) -> list[Circuit]:
    """The circuits of the highest-scored edges; see `faithfulness_curve`."""
    wanted = CURVE_FRACTIONS if sizes is None else items(sizes, "sizes")
    check_is_circuit(circuit)
    available = len(circuit)
    numbers = {_number_of_edges(size, available) for size in wanted}
    return [circuit.top(number, by=by) for number in sorted(numbers)]


def chosen_metrics(metrics: Any, task: Task) -> list[Metric]:
    """One or several metrics, or those of these names; None takes the usual ones."""
    if metrics is None:
        return default_metrics(task)
    one = isinstance(metrics, str | Metric) or callable(metrics)
    names = [metrics] if one else items(metrics, "metrics")
    if not names:
        raise InputError("metrics=[] names no metric; leave it out for the usual ones.")
    return [get_metric(each, task) for each in names]


def default_metrics(task: Task) -> list[Metric]:
    """KL, the logit difference if the task has answers and wrong answers, and the task's metric."""
    names = ["kl", "logit_difference", task.metric]
    if task.answers is None or task.wrong_answers is None:
        names.remove("logit_difference")
    metrics = [get_metric(name, task) for name in names]
    return [*{metric.name: metric for metric in metrics}.values()]


def _check_names(metrics: Sequence[Metric]) -> None:
    by_name: dict[str, Metric] = {}
    for metric in metrics:
        if by_name.setdefault(metric.name, metric) != metric:
            raise InputError(
                f"two metrics are named {metric.name!r}, and an evaluation holds one of a name; "
                "give one of them another name."
            )


def _number_of_edges(size: Size, available: int) -> int:
    number = python_number(size)
    is_fraction = isinstance(number, float)
    if is_fraction and 0 < number <= 1:
        return max(1, round(number * available))
    if number == 0 or (isinstance(number, int) and 0 <= number <= available):
        return int(number)
    raise InputError(
        f"size {shown(size)} is out of range; give a number of edges from 0 to {available}, or a "
        "fraction from 0.0 to 1.0."
    )
