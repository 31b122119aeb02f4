"""Compare circuits and methods on the same numbers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from html import escape
from typing import Any

import pandas as pd

from circuits.evaluation.evaluate import (
    Evaluation,
    Row,
    Sizes,
    default_metrics,
    doubts,
    evaluations,
    judge_points,
    mean_and_faithfulness,
    no_faithfulness,
    of_sizes,
    settings_of_points,
)
from circuits.evaluation.similarity import overlap_table
from circuits.graph.circuit import Circuit, check_is_circuit
from circuits.graph.graph import PooledFeatureGraph
from circuits.models import Model
from circuits.running.ablation import Ablation
from circuits.running.settings import RunSettings
from circuits.system.errors import InputError
from circuits.system.kinds import expect
from circuits.system.numbers import WholeNumber, items, shown, whole
from circuits.system.torch_modes import without_modes
from circuits.tasks.metrics import Metric
from circuits.tasks.task import Task
from circuits.transcoders.transcoder import Transcoders

Sweep = Sequence[Circuit]
Judged = Mapping[str, Sequence[Evaluation]]


@dataclass(frozen=True, eq=False)
class Comparison:
    """Methods side by side.

    Attributes:
        table: a row per method: the number of edges kept, and the metrics of running that circuit.
        curves: `method`, and the columns of `faithfulness_curve`. A method that selects instead of
            ranking has a row per circuit it found.
        overlap: the Jaccard overlap of every two methods' circuits.
        reference: the same columns for the whole model and for the empty circuit (of the first
            method's graph).
        circuits: the circuit of each method that the table is about.
        notes: what else to know before reading these numbers.
    """

    table: pd.DataFrame
    curves: pd.DataFrame
    overlap: pd.DataFrame
    reference: pd.DataFrame
    circuits: Mapping[str, Circuit]
    notes: tuple[str, ...] = ()

    def _repr_html_(self) -> str:
        notes = "".join(f"<p>{escape(note)}</p>" for note in self.notes)
        table = pd.concat([self.table, self.reference])
        return table.to_html(float_format="%.4g") + notes


@without_modes()
def compare(
    model: Model,
    found: Mapping[str, Circuit | Sequence[Circuit]],
    task: Task,
    *,
    size: WholeNumber | None = None,
    sizes: Sizes | None = None,
    metric: str | Metric | None = None,
    ablation: str | Ablation = "resample",
    transcoders: Mapping[str, Transcoders] | None = None,
) -> Comparison:
    """Judge what several methods found on the same prompts.

    Args:
        found: by method, one circuit or several. Several circuits of a method that selects are a
            threshold sweep, whose first circuit is tabulated; several of a method that ranks are
            seeds, which are averaged.
        size: the number of edges for methods that only score; None takes the size of the first
            selected circuit over a graph of the same kind, or a tenth of the graph.
        sizes: of the faithfulness curves; None takes the fractions of the MIB benchmark.
        metric: of the faithfulness; None takes the task's own.
        ablation: what edges outside a circuit carry instead.
        transcoders: by method, for circuits of features whose transcoders are not in a file.

    Raises:
        InputError: nothing was found, or the circuits do not fit the model and task.

    >>> import circuits
    >>> model = circuits.load_model("toy-world")
    >>> task = circuits.load_task("ioi", model, n=4)
    >>> found = {name: method().discover(model, task) for name, method in
    ...          {"eap": circuits.EAP, "random": circuits.RandomScores}.items()}
    >>> circuits.compare(model, found, task, size=50).table["edges"].to_dict()
    {'eap': 50, 'random': 50}
    """
    expect(found, Mapping, "a dict of circuits by method", "give {'eap': circuit, ...}")
    if transcoders is not None:
        expect(transcoders, Mapping, "a dict of transcoders by method", "give {'graph': ...}")
    if not found:
        raise InputError("there is nothing to compare; give at least one method's circuit.")
    size = None if size is None else whole(size, "size")
    options: dict[str, Any] = {"ablation": ablation, "metric": metric}
    settings = settings_of_points(model, task, **options)
    # An iterator could be read once only.
    sizes = None if sizes is None else items(sizes, "sizes")
    sweeps = {name: _sweep(given, name) for name, given in found.items()}
    points, chosen = {}, {}
    for name, sweep in sweeps.items():
        # Before anything is run.
        try:
            chosen[name] = _tabulated(sweep, sweeps, size)
            points[name] = _points(sweep, sizes)
        except InputError as error:
            raise InputError(f"{name}: {error}") from error
    judged: dict[str, list[Evaluation]] = {}
    curves = []
    for name in sweeps:
        if transcoders is not None:
            options["transcoders"] = transcoders.get(name)
            settings = settings_of_points(model, task, **options)
        curve = _curve(model, points[name], task, settings)
        is_selected = sweeps[name][0].selected
        curves.append(curve.assign(selected=is_selected, method=name))
        judged[name] = _judged(model, chosen[name], task, settings)
    circuits = {name: first for name, (first, *_) in chosen.items()}
    # What is doubted of the whole model is so for every method.
    first = next(iter(judged.values()))[0]
    doubted = doubts(first.model_values, first.row_prompt)
    assert settings.metric is not None
    of = [len(circuit.graph) for circuit in circuits.values()]
    table = _table(judged, of, settings.metric)
    ends = _ends(judged, of[0])
    undefined = [settings.metric.name] if table["faithfulness"].isna().any() else []
    return Comparison(
        table,
        pd.concat(curves, ignore_index=True),
        overlap_table(circuits),
        _table(ends, of[:1] * len(ends), settings.metric),
        circuits,
        _notes(circuits) + no_faithfulness(undefined) + doubted,
    )


def _sweep(given: Any, name: str) -> Sweep:
    """What one method found."""
    sweep = [given] if isinstance(given, Circuit) else items(given, str(name))
    for circuit in sweep:
        check_is_circuit(circuit)
    if len({circuit.selected for circuit in sweep}) != 1:
        raise InputError(
            f"{name}={shown(sweep)} must hold circuits that all choose edges, or that all only "
            "score them, and one at least."
        )
    return sweep


def _points(sweep: Sweep, sizes: Sizes | None) -> list[Sweep]:
    """The circuits of a method's curve; of several rankings, each one's."""
    if sweep[0].selected:
        return [sweep]
    return [of_sizes(circuit, sizes) for circuit in sweep]


def _tabulated(sweep: Sweep, sweeps: Mapping[str, Sweep], size: WholeNumber | None) -> Sweep:
    """One circuit of a threshold sweep, or the seeds of a ranking cut to a size."""
    if sweep[0].selected:
        return sweep[:1]
    if size is None:
        size = _common_size(sweeps, sweep[0])
    return [seed.top(size) for seed in sweep]


def _common_size(sweeps: Mapping[str, Sweep], like: Circuit) -> int:
    """The size of the first selected circuit over the same kind of graph, or a tenth of it."""
    for first, *_ in sweeps.values():
        same_kind = type(first.graph) is type(like.graph)
        if same_kind and first.selected and len(first):
            return min(len(first), len(like))
    tenth = round(len(like.graph) / 10)
    return max(1, tenth)


def _notes(circuits: Mapping[str, Circuit]) -> tuple[str, ...]:
    of_features = [
        name for name, circuit in circuits.items() if isinstance(circuit.graph, PooledFeatureGraph)
    ]
    if not of_features or len(circuits) == 1:
        return ()
    return (
        f"{', '.join(of_features)}: edges between features; their number cannot be compared with "
        "that of edges between components. Overlap with other circuits is that of the shares of "
        "|score| that leave each MLP and embedding (of edges, where one has no score): a layer's "
        "features and error count as its MLP, and heads, which are no features, are left out.",
    )


def _judged(model: Model, circuits: Sweep, task: Task, settings: RunSettings) -> list[Evaluation]:
    metric = settings.metric
    assert metric is not None
    # A metric given by the user replaces the shipped one of its name.
    metrics = {each.name: each for each in (*default_metrics(task), metric)}
    return evaluations(model, circuits, task, [*metrics.values()], settings)


def _ends(judged: Judged, of: int) -> Judged:
    """The whole model and the empty circuit, as an evaluation of the first method has them."""
    (found, *_), *_ = judged.values()
    whole = replace(found, values=found.model_values, n_edges=of)
    empty = replace(found, values=found.empty_values, n_edges=0)
    return {"whole model": [whole], "empty circuit": [empty]}


def _table(judged: Judged, of: Sequence[int], metric: Metric) -> pd.DataFrame:
    """A row for each name: the mean over its circuits."""
    rows = {}
    for name, evaluated in judged.items():
        each: list[Row] = []
        for found in evaluated:
            size: Row = {"edges": found.n_edges}
            each.append(size | mean_and_faithfulness(found, metric))
        rows[name] = pd.DataFrame(each).mean()
    table = pd.DataFrame.from_dict(rows, orient="index").rename_axis("method")
    table.insert(1, "of", of)
    return table.astype({"edges": int})


def _curve(
    model: Model, points: Sequence[Sweep], task: Task, settings: RunSettings
) -> pd.DataFrame:
    tables = [judge_points(model, each, task, settings) for each in points]
    if len(tables) == 1:
        return tables[0]
    # The seeds of a ranking are averaged at each size.
    by_size = pd.concat(tables).groupby("edges", as_index=False)
    return by_size.mean()
