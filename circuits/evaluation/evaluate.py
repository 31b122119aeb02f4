"""How good a circuit is: metrics of running it, faithfulness over sizes, recovery of a known circuit."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor

from circuits.graph.circuit import Circuit
from circuits.models import Model
from circuits.running.ablation import Ablation
from circuits.running.run import model_logits, run_circuits
from circuits.system.errors import InputError
from circuits.tasks.metrics import Metric, get_metric
from circuits.tasks.task import Task
from circuits.transcoders.transcoder import Transcoders

CURVE_FRACTIONS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)


@dataclass(frozen=True, eq=False)
class Evaluation:
    """Metrics of a circuit, of the whole model and of the empty circuit, at every scored row; `evaluation.kl` is a mean.

    Attributes:
        values, model_values, empty_values: by metric name, one number per scored row, with the metric's natural sign.
        row_prompt: the prompt each scored row belongs to.
        n_edges: how many edges the circuit keeps.
    """

    values: Mapping[str, Float[Tensor, " scored"]]
    model_values: Mapping[str, Float[Tensor, " scored"]]
    empty_values: Mapping[str, Float[Tensor, " scored"]]
    row_prompt: Int[Tensor, " scored"]
    n_edges: int

    def __getattr__(self, name: str) -> float:
        """The mean over scored rows of the metric of that name."""
        values = self.__dict__.get("values", {})
        if name not in values:
            raise AttributeError(
                f"this evaluation has no metric {name!r}; it has {', '.join(values)}."
            )
        return float(values[name].mean())

    def mean(self) -> dict[str, float]:
        """Every metric's mean over scored rows."""
        return {name: float(values.mean()) for name, values in self.values.items()}

    def faithfulness(self, metric: str) -> float:
        """(m(circuit) - m(empty)) / (m(model) - m(empty)), m = mean over scored rows: 1 for the whole model, 0 for the empty circuit."""
        if metric not in self.values:
            raise InputError(
                f"this evaluation has no metric {metric!r}; it has {', '.join(self.values)}."
            )
        whole, empty = (
            float(values[metric].mean()) for values in (self.model_values, self.empty_values)
        )
        return faithfulness(float(self.values[metric].mean()), whole, empty)

    def by_prompt(self) -> pd.DataFrame:
        """A row per prompt, a column per metric: the mean over the prompt's scored rows."""
        frame = pd.DataFrame(
            {name: values.cpu().double().numpy() for name, values in self.values.items()}
        )
        return frame.groupby(self.row_prompt.cpu().numpy()).mean().rename_axis("prompt")

    def table(self) -> pd.DataFrame:
        """A row per metric: its mean for the circuit, the whole model and the empty circuit, and the circuit's faithfulness."""
        rows = {
            name: {
                "circuit": float(self.values[name].mean()),
                "model": float(self.model_values[name].mean()),
                "empty": float(self.empty_values[name].mean()),
                "faithfulness": self.faithfulness(name),
            }
            for name in self.values
        }
        return pd.DataFrame.from_dict(rows, orient="index").rename_axis("metric")


def faithfulness(value: float, model: float, empty: float) -> float:
    """(value - empty) / (model - empty); NaN where the metric does not tell the model from the empty circuit."""
    return (value - empty) / (model - empty) if model != empty else float("nan")


def evaluate(
    model: Model,
    circuit: Circuit,
    task: Task,
    *,
    metrics: Sequence[str | Metric] | None = None,
    ablation: str | Ablation = "resample",
    max_memory: int | None = None,
    transcoders: Transcoders | None = None,
) -> Evaluation:
    """Run a circuit, everything outside it ablated, and judge its logits. Nothing in the circuit changes.

    Args:
        metrics: None takes `kl`, `logit_difference` where the task has answers and wrong answers, and the task's own metric.
        max_memory, transcoders: see `run_circuits`.

    Raises:
        InputError: the model, circuit and task do not fit together, or a metric does not fit the task.
    """
    task = task.to(model.cfg.device)
    asked = (
        default_metrics(task)
        if metrics is None
        else [metrics]
        if isinstance(metrics, str)
        else metrics
    )
    chosen = [get_metric(metric, task) for metric in asked]
    whole = model_logits(model, task)
    kept = torch.stack([circuit.kept, torch.zeros_like(circuit.kept)])
    found, empty = run_circuits(
        model,
        circuit.graph,
        kept,
        task,
        ablation=ablation,
        max_memory=max_memory,
        transcoders=transcoders,
    )
    logits = {"circuit": found, "model": whole, "empty": empty}
    values = {
        name: {metric.name: metric(at, whole, task).cpu() for metric in chosen}
        for name, at in logits.items()
    }
    return Evaluation(
        values["circuit"], values["model"], values["empty"], task.row_prompt.cpu(), len(circuit)
    )


def faithfulness_curve(
    model: Model,
    circuit: Circuit,
    task: Task,
    sizes: Sequence[int | float] | None = None,
    *,
    metric: str | Metric | None = None,
    ablation: str | Ablation = "resample",
    by: Literal["magnitude", "signed"] = "magnitude",
    max_memory: int | None = None,
    transcoders: Transcoders | None = None,
) -> pd.DataFrame:
    """How faithful the highest-scored edges are, by how many of them are kept.

    Args:
        sizes: numbers of edges, or fractions (floats up to 1.0) of the circuit's edges; None takes the ten fractions of the MIB benchmark.
        metric: None takes the task's own.
        by: what edges are ranked by.
        max_memory, transcoders: see `run_circuits`.

    Returns:
        A row per size, ascending: `edges`, `fraction` (of the graph), the metric's mean under its name, `kl`, `faithfulness`.

    Raises:
        InputError: a size is out of range, or the model, circuit and task do not fit together.
    """
    numbers = sorted(
        {
            _number_of_edges(size, len(circuit))
            for size in (CURVE_FRACTIONS if sizes is None else sizes)
        }
    )
    ranked = [circuit.top(number, by=by) for number in numbers]
    return faithfulness_points(
        model,
        ranked,
        task,
        metric=metric,
        ablation=ablation,
        max_memory=max_memory,
        transcoders=transcoders,
    )


def faithfulness_points(
    model: Model,
    circuits: Sequence[Circuit],
    task: Task,
    *,
    metric: str | Metric | None = None,
    ablation: str | Ablation = "resample",
    max_memory: int | None = None,
    transcoders: Transcoders | None = None,
) -> pd.DataFrame:
    """How faithful each of some circuits over one graph is: the points of a threshold sweep, or of a curve.

    Args:
        metric: None takes the task's own.
        max_memory, transcoders: see `run_circuits`.

    Returns:
        A row per circuit: `edges`, `fraction` (of the graph), the metric's mean under its name, `kl`, `faithfulness`.

    Raises:
        InputError: the circuits are over different graphs, or do not fit the model and task.
    """
    task = task.to(model.cfg.device)
    if not circuits:
        raise InputError("there are no circuits to evaluate; give at least one, or one size.")
    graph = circuits[0].graph
    if any(circuit.graph != graph for circuit in circuits):
        raise InputError(
            "these circuits are over different graphs; evaluate each graph's circuits on their own."
        )
    chosen, whole = get_metric(metric, task), model_logits(model, task)
    kept = torch.stack(
        [*(circuit.kept for circuit in circuits), torch.zeros(len(graph), dtype=torch.bool)]
    )
    logits = run_circuits(
        model, graph, kept, task, ablation=ablation, max_memory=max_memory, transcoders=transcoders
    )
    values = [float(chosen(found, whole, task).mean()) for found in [*logits, whole]]
    kls = [float(get_metric("kl", task)(found, whole, task).mean()) for found in logits]
    *found, empty, at_model = values
    rows = [
        {
            "edges": len(circuit),
            "fraction": len(circuit) / len(graph),
            "kl": divergence,
            chosen.name: value,
            "faithfulness": faithfulness(value, at_model, empty),
        }
        for circuit, value, divergence in zip(circuits, found, kls[:-1], strict=True)
    ]
    return pd.DataFrame(rows)


def default_metrics(task: Task) -> list[str]:
    """KL, the logit difference where the task has answers and wrong answers, and the task's own metric."""
    both = task.answers is not None and task.wrong_answers is not None
    return list(dict.fromkeys(["kl", *(["logit_difference"] if both else []), task.metric]))


def _number_of_edges(size: int | float, available: int) -> int:
    if isinstance(size, float) and 0 <= size <= 1:
        return max(1, round(size * available)) if size > 0 else 0
    if isinstance(size, float) or not 0 <= size <= available:
        raise InputError(
            f"size {size} is out of range; give a number of edges from 0 to {available}, or a fraction from 0.0 to 1.0."
        )
    return size
