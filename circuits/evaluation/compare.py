"""Comparing circuits and methods on the same numbers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import pandas as pd

from circuits.evaluation.evaluate import (
    default_metrics,
    evaluate,
    faithfulness_curve,
    faithfulness_points,
)
from circuits.evaluation.similarity import overlap_table
from circuits.graph.circuit import Circuit
from circuits.models import Model
from circuits.running.ablation import Ablation
from circuits.system.errors import InputError
from circuits.tasks.metrics import Metric, get_metric
from circuits.tasks.task import Task
from circuits.transcoders.transcoder import Transcoders


@dataclass(frozen=True, eq=False)
class Comparison:
    """Methods side by side.

    Attributes:
        table: a row per method: edges kept and the metrics of running that circuit.
        curves: `method`, and the columns of `faithfulness_curve`; a method that selects instead of ranking has a row per circuit it found.
        overlap: the Jaccard overlap of every two methods' circuits.
        circuits: the circuit of each method that the table speaks of.
        notes: what else to know before reading these numbers.
    """

    table: pd.DataFrame
    curves: pd.DataFrame
    overlap: pd.DataFrame
    circuits: Mapping[str, Circuit]
    notes: tuple[str, ...] = ()


def compare(
    model: Model,
    found: Mapping[str, Circuit | Sequence[Circuit]],
    task: Task,
    *,
    size: int | None = None,
    sizes: Sequence[int | float] | None = None,
    metric: str | Metric | None = None,
    ablation: str | Ablation = "resample",
    transcoders: Mapping[str, Transcoders] | None = None,
) -> Comparison:
    """Judge what several methods found on the same prompts.

    Args:
        found: by method, its circuit, or several: of a method that selects, a threshold sweep, whose first circuit is tabulated; of a
            method that ranks, several seeds, which are averaged.
        size: how many edges to give methods that only score; None takes the size of the first selected circuit over a graph of the same
            kind, or a tenth of the graph.
        sizes: of the faithfulness curves; None takes the fractions of the MIB benchmark.
        metric: of the faithfulness; None takes the task's own.
        transcoders: by method, those of circuits of features that do not come from a file.

    Raises:
        InputError: nothing was found, or the circuits do not fit the model and task.
    """
    if not found:
        raise InputError("there is nothing to compare; give at least one method's circuit.")
    sweeps = {
        name: [circuits] if isinstance(circuits, Circuit) else list(circuits)
        for name, circuits in found.items()
    }
    given = transcoders or {}
    sizes_of = {
        name: _common_size(sweeps, sweep[0]) if size is None else size
        for name, sweep in sweeps.items()
    }
    chosen = {
        name: [circuit if circuit.selected else circuit.top(sizes_of[name]) for circuit in sweep]
        for name, sweep in sweeps.items()
    }
    # The table speaks of one circuit of a threshold sweep, and of the mean over the seeds of a ranking.
    spoken_of = {
        name: sweep[:1] if sweeps[name][0].selected else sweep for name, sweep in chosen.items()
    }
    table = {
        name: _mean_row(model, circuits, task, metric, ablation, given.get(name))
        for name, circuits in spoken_of.items()
    }
    curves = [
        _curve(model, sweep, task, sizes, metric, ablation, given.get(name)).assign(method=name)
        for name, sweep in sweeps.items()
    ]
    circuits = {name: sweep[0] for name, sweep in chosen.items()}
    frame = (
        pd.DataFrame.from_dict(table, orient="index")
        .rename_axis("method")
        .astype({"edges": int, "of": int})
    )
    return Comparison(
        frame,
        pd.concat(curves, ignore_index=True),
        overlap_table(circuits),
        circuits,
        _notes(circuits),
    )


def _notes(circuits: Mapping[str, Circuit]) -> tuple[str, ...]:
    of_features = [
        name for name, circuit in circuits.items() if circuit.graph.transcoders is not None
    ]
    if not of_features or len(circuits) == 1:
        return ()
    return (
        f"{', '.join(of_features)}: edges between features, whose number is not that of edges between components. Their overlap with other "
        "circuits is that of the shares of |score| that leave each MLP and embedding: a layer's features and error count as its MLP, and "
        "heads, which are no features, are left out.",
    )


def _mean_row(
    model: Model,
    circuits: Sequence[Circuit],
    task: Task,
    metric: str | Metric | None,
    ablation: str | Ablation,
    transcoders: Transcoders | None,
) -> dict[str, float]:
    chosen = get_metric(metric, task)
    rows = []
    for circuit in circuits:
        metrics = list(dict.fromkeys([*default_metrics(task), chosen.name]))
        evaluation = evaluate(
            model, circuit, task, metrics=metrics, ablation=ablation, transcoders=transcoders
        )
        rows.append(
            {
                "edges": len(circuit),
                "of": len(circuit.graph),
                **evaluation.mean(),
                "faithfulness": evaluation.faithfulness(chosen.name),
            }
        )
    return pd.DataFrame(rows).mean().to_dict()


def _curve(
    model: Model,
    sweep: Sequence[Circuit],
    task: Task,
    sizes: Sequence[int | float] | None,
    metric: str | Metric | None,
    ablation: str | Ablation,
    transcoders: Transcoders | None,
) -> pd.DataFrame:
    if sweep[0].selected:
        return faithfulness_points(
            model, sweep, task, metric=metric, ablation=ablation, transcoders=transcoders
        ).assign(selected=True)
    curves = [
        faithfulness_curve(
            model, circuit, task, sizes, metric=metric, ablation=ablation, transcoders=transcoders
        )
        for circuit in sweep
    ]
    return pd.concat(curves).groupby("edges", as_index=False).mean().assign(selected=False)


def _common_size(sweeps: Mapping[str, Sequence[Circuit]], like: Circuit) -> int:
    """The size of the first selected circuit of components, or of features, as `like` is; or a tenth of its graph."""
    for sweep in sweeps.values():
        same_kind = (sweep[0].graph.transcoders is None) == (like.graph.transcoders is None)
        if same_kind and sweep[0].selected and len(sweep[0]):
            return min(len(sweep[0]), len(like))
    return max(1, round(len(like.graph) / 10))
