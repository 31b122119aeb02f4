"""Comparing circuits and methods on the same numbers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Literal

import pandas as pd

from circuits.ablation import Ablation
from circuits.circuit import Circuit
from circuits.errors import InputError
from circuits.evaluation import default_metrics, evaluate, faithfulness_curve, faithfulness_points
from circuits.metrics import Metric, get_metric
from circuits.models import Model
from circuits.tasks.base import Task


@dataclass(frozen=True, eq=False)
class Comparison:
    """Methods side by side.

    Attributes:
        table: a row per method: edges kept and the metrics of running that circuit.
        curves: `method`, and the columns of `faithfulness_curve`; a method that selects instead of ranking has a row per circuit it found.
        overlap: the Jaccard overlap of every two methods' circuits.
        circuits: the circuit of each method that the table speaks of.
    """

    table: pd.DataFrame
    curves: pd.DataFrame
    overlap: pd.DataFrame
    circuits: Mapping[str, Circuit]


def compare(
    model: Model,
    found: Mapping[str, Circuit | Sequence[Circuit]],
    task: Task,
    *,
    size: int | None = None,
    sizes: Sequence[int | float] | None = None,
    metric: str | Metric | None = None,
    ablation: str | Ablation = "resample",
) -> Comparison:
    """Judge what several methods found on the same prompts.

    Args:
        found: by method, its circuit, or several: of a method that selects, a threshold sweep, whose first circuit is tabulated; of a
            method that ranks, several seeds, which are averaged.
        size: how many edges to give methods that only score; None takes the size of the first selected circuit, or a tenth of the graph.
        sizes: of the faithfulness curves; None takes the fractions of the MIB benchmark.
        metric: of the faithfulness; None takes the task's own.

    Raises:
        InputError: nothing was found, or the circuits do not fit the model and task.
    """
    if not found:
        raise InputError("there is nothing to compare; give at least one method's circuit.")
    sweeps = {name: [circuits] if isinstance(circuits, Circuit) else list(circuits) for name, circuits in found.items()}
    chosen_size = _common_size(sweeps) if size is None else size
    chosen = {name: [circuit if circuit.selected else circuit.top(chosen_size) for circuit in sweep] for name, sweep in sweeps.items()}
    # The table speaks of one circuit of a threshold sweep, and of the mean over the seeds of a ranking.
    spoken_of = {name: sweep[:1] if sweeps[name][0].selected else sweep for name, sweep in chosen.items()}
    table = {name: _mean_row(model, circuits, task, metric, ablation) for name, circuits in spoken_of.items()}
    curves = [_curve(model, sweep, task, sizes, metric, ablation).assign(method=name) for name, sweep in sweeps.items()]
    circuits = {name: sweep[0] for name, sweep in chosen.items()}
    frame = pd.DataFrame.from_dict(table, orient="index").rename_axis("method").astype({"edges": int, "of": int})
    return Comparison(frame, pd.concat(curves, ignore_index=True), overlap_table(circuits), circuits)


def _mean_row(
    model: Model, circuits: Sequence[Circuit], task: Task, metric: str | Metric | None, ablation: str | Ablation
) -> dict[str, float]:
    chosen = get_metric(metric, task)
    rows = []
    for circuit in circuits:
        evaluation = evaluate(model, circuit, task, metrics=list(dict.fromkeys([*default_metrics(task), chosen.name])), ablation=ablation)
        rows.append(
            {"edges": len(circuit), "of": len(circuit.graph), **evaluation.mean(), "faithfulness": evaluation.faithfulness(chosen.name)}
        )
    return pd.DataFrame(rows).mean().to_dict()


def _curve(
    model: Model,
    sweep: Sequence[Circuit],
    task: Task,
    sizes: Sequence[int | float] | None,
    metric: str | Metric | None,
    ablation: str | Ablation,
) -> pd.DataFrame:
    if sweep[0].selected:
        return faithfulness_points(model, sweep, task, metric=metric, ablation=ablation).assign(selected=True)
    curves = [faithfulness_curve(model, circuit, task, sizes, metric=metric, ablation=ablation) for circuit in sweep]
    return pd.concat(curves).groupby("edges", as_index=False).mean().assign(selected=False)


def overlap(first: Circuit, second: Circuit) -> float:
    """Jaccard overlap of the kept edges: shared over all; 1 for two empty circuits.

    Raises:
        InputError: the circuits are over different graphs.
    """
    either = len(first | second)
    return len(first & second) / either if either else 1.0


def overlap_table(circuits: Mapping[str, Circuit]) -> pd.DataFrame:
    """The overlap of every two circuits over the same graph; NaN where the graphs differ."""
    table = pd.DataFrame(1.0, index=list(circuits), columns=list(circuits))
    for a, b in combinations(circuits, 2):
        same = circuits[a].graph == circuits[b].graph
        table.loc[a, b] = table.loc[b, a] = overlap(circuits[a], circuits[b]) if same else float("nan")
    return table


def score_correlation(first: Circuit, second: Circuit, method: Literal["spearman", "pearson"] = "spearman") -> float:
    """Correlation of two circuits' scores over the edges that both scored; NaN when fewer than two are.

    Raises:
        InputError: the circuits are over different graphs.
    """
    scores = score_table(first, second)
    return float((scores.rank() if method == "spearman" else scores).corr().iloc[0, 1]) if len(scores) > 1 else float("nan")


def score_table(first: Circuit, second: Circuit) -> pd.DataFrame:
    """A row per edge that both circuits scored, by its text: columns `x` and `y`, for a scatter plot.

    Raises:
        InputError: the circuits are over different graphs.
    """
    if first.graph != second.graph:
        raise InputError("these circuits are over different graphs; score the same graph with both methods.")
    both = (~first.scores.isnan() & ~second.scores.isnan()).nonzero().flatten()
    edges = first.graph.edges
    names = [str(edges[index]) for index in both.tolist()]
    return pd.DataFrame({"x": first.scores[both].double(), "y": second.scores[both].double()}, index=pd.Index(names, name="edge"))


def _common_size(sweeps: Mapping[str, Sequence[Circuit]]) -> int:
    for sweep in sweeps.values():
        if sweep[0].selected and len(sweep[0]):
            return len(sweep[0])
    return max(1, round(len(next(iter(sweeps.values()))[0].graph) / 10))
