"""How good a circuit is: metrics of running it, faithfulness over sizes, recovery of a known circuit."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import pandas as pd
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from circuits.ablation import Ablation
from circuits.circuit import Circuit
from circuits.errors import InputError
from circuits.execution import model_logits, run_circuits
from circuits.graph import Edge
from circuits.metrics import Metric, get_metric
from circuits.models import Model
from circuits.tasks.base import Task
from circuits.transcoders.base import Transcoders

CURVE_FRACTIONS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)
# Scores below this fraction of the largest count as zero, so that rounding noise ranks nothing.
SCORE_FLOOR = 1e-6


@dataclass(frozen=True, eq=False)
class Evaluation:
    """Metrics of a circuit, of the whole model and of the empty circuit, at every scored row; `evaluation.kl` is a mean.

    Attributes:
        values, model_values, empty_values: by metric name, one number per scored row, with the metric's natural sign.
        row_prompt: the prompt each scored row belongs to.
        n_edges: how many edges the circuit keeps.
    """

    values: Mapping[str, Float[Tensor, "scored"]]
    model_values: Mapping[str, Float[Tensor, "scored"]]
    empty_values: Mapping[str, Float[Tensor, "scored"]]
    row_prompt: Int[Tensor, "scored"]
    n_edges: int

    def __getattr__(self, name: str) -> float:
        """The mean over scored rows of the metric of that name."""
        values = self.__dict__.get("values", {})
        if name not in values:
            raise AttributeError(f"this evaluation has no metric {name!r}; it has {', '.join(values)}.")
        return float(values[name].mean())

    def mean(self) -> dict[str, float]:
        """Every metric's mean over scored rows."""
        return {name: float(values.mean()) for name, values in self.values.items()}

    def faithfulness(self, metric: str) -> float:
        """(m(circuit) - m(empty)) / (m(model) - m(empty)), m = mean over scored rows: 1 for the whole model, 0 for the empty circuit."""
        if metric not in self.values:
            raise InputError(f"this evaluation has no metric {metric!r}; it has {', '.join(self.values)}.")
        whole, empty = (float(values[metric].mean()) for values in (self.model_values, self.empty_values))
        return faithfulness(float(self.values[metric].mean()), whole, empty)

    def by_prompt(self) -> pd.DataFrame:
        """A row per prompt, a column per metric: the mean over the prompt's scored rows."""
        frame = pd.DataFrame({name: values.cpu().double().numpy() for name, values in self.values.items()})
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
    asked = default_metrics(task) if metrics is None else [metrics] if isinstance(metrics, str) else metrics
    chosen = [get_metric(metric, task) for metric in asked]
    whole = model_logits(model, task)
    kept = torch.stack([circuit.kept, torch.zeros_like(circuit.kept)])
    found, empty = run_circuits(model, circuit.graph, kept, task, ablation=ablation, max_memory=max_memory, transcoders=transcoders)
    logits = {"circuit": found, "model": whole, "empty": empty}
    values = {name: {metric.name: metric(at, whole, task).cpu() for metric in chosen} for name, at in logits.items()}
    return Evaluation(values["circuit"], values["model"], values["empty"], task.row_prompt.cpu(), len(circuit))


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
    numbers = sorted({_number_of_edges(size, len(circuit)) for size in (CURVE_FRACTIONS if sizes is None else sizes)})
    ranked = [circuit.top(number, by=by) for number in numbers]
    return faithfulness_points(model, ranked, task, metric=metric, ablation=ablation, max_memory=max_memory, transcoders=transcoders)


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
        raise InputError("these circuits are over different graphs; evaluate each graph's circuits on their own.")
    chosen, whole = get_metric(metric, task), model_logits(model, task)
    kept = torch.stack([*(circuit.kept for circuit in circuits), torch.zeros(len(graph), dtype=torch.bool)])
    logits = run_circuits(model, graph, kept, task, ablation=ablation, max_memory=max_memory, transcoders=transcoders)
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


@dataclass(frozen=True)
class Recovery:
    """How well a circuit finds edges that are known to be true.

    Attributes:
        precision, recall: of the kept edges (of a method that only scores: of as many of its highest-scored edges as are true).
        node_precision, node_recall: the same for the nodes these edges touch.
        edge_auc, node_auc: area under the ROC curve; ties count half.
        edge_roc: true- and false-positive rates, from the strictest cut to the laxest.
    """

    precision: float
    recall: float
    node_precision: float
    node_recall: float
    edge_auc: float
    node_auc: float
    edge_roc: pd.DataFrame


def recovery(circuit: Circuit, truth: Sequence[Edge | str]) -> Recovery:
    """Compare a circuit with the true edges. Only an edge that is kept can be a true positive.

    Edges are ranked by |score| (below a millionth of the largest: as zero), those of a method that selects by whether they are kept.

    Raises:
        InputError: the truth is empty or names an edge the graph does not have.
    """
    graph, true = circuit.graph, circuit.graph.mask(truth)
    if not true.any():
        raise InputError("there are no true edges to recover; give at least one.")
    chosen = circuit if circuit.selected else circuit.top(int(true.sum()))
    rank = circuit.kept.double() if circuit.selected else _floored(circuit.scores)
    true_nodes, chosen_nodes = (_touched(circuit, edges) for edges in (true, chosen.kept))
    node_rank = torch.zeros(len(graph.nodes), dtype=torch.double)
    for column in (graph.source, graph.target):
        node_rank.scatter_reduce_(0, column, rank, "amax")
    precision, recall = _precision_recall(chosen.kept, true)
    node_precision, node_recall = _precision_recall(chosen_nodes, true_nodes)
    return Recovery(precision, recall, node_precision, node_recall, _area(rank, true), _area(node_rank, true_nodes), _roc(rank, true))


def default_metrics(task: Task) -> list[str]:
    """KL, the logit difference where the task has answers and wrong answers, and the task's own metric."""
    both = task.answers is not None and task.wrong_answers is not None
    return list(dict.fromkeys(["kl", *(["logit_difference"] if both else []), task.metric]))


def _number_of_edges(size: int | float, available: int) -> int:
    if isinstance(size, float) and 0 <= size <= 1:
        return max(1, round(size * available)) if size > 0 else 0
    if isinstance(size, float) or not 0 <= size <= available:
        raise InputError(f"size {size} is out of range; give a number of edges from 0 to {available}, or a fraction from 0.0 to 1.0.")
    return size


def _floored(scores: Float[Tensor, "edge"]) -> Float[Tensor, "edge"]:
    size = scores.double().abs().nan_to_num(nan=-1.0)
    return torch.where((size >= 0) & (size < SCORE_FLOOR * size.max()), 0.0, size)


def _touched(circuit: Circuit, edges: Bool[Tensor, "edge"]) -> Bool[Tensor, "node"]:
    touched = torch.zeros(len(circuit.graph.nodes), dtype=torch.bool)
    touched[circuit.graph.source[edges]] = True
    touched[circuit.graph.target[edges]] = True
    return touched


def _precision_recall(chosen: Bool[Tensor, "item"], true: Bool[Tensor, "item"]) -> tuple[float, float]:
    hits, size = int((chosen & true).sum()), int(chosen.sum())
    return (hits / size if size else float("nan")), hits / int(true.sum())


def _area(rank: Float[Tensor, "item"], true: Bool[Tensor, "item"]) -> float:
    """The chance that a true item outranks a false one (Mann and Whitney); NaN when all are true."""
    ranks = torch.tensor(pd.Series(rank.numpy()).rank().to_numpy())
    positive, negative = int(true.sum()), int((~true).sum())
    return (float(ranks[true].sum()) - positive * (positive + 1) / 2) / (positive * negative) if negative else float("nan")


def _roc(rank: Float[Tensor, "item"], true: Bool[Tensor, "item"]) -> pd.DataFrame:
    frame = pd.DataFrame({"rank": rank.numpy(), "true": true.numpy()})
    counts = frame.groupby("rank")["true"].agg(["sum", "count"]).sort_index(ascending=False).cumsum()
    false = (counts["count"] - counts["sum"]) / max(1, int((~true).sum()))
    points = pd.DataFrame({"false_positive_rate": false, "true_positive_rate": counts["sum"] / int(true.sum())}).reset_index(drop=True)
    return pd.concat([pd.DataFrame({"false_positive_rate": [0.0], "true_positive_rate": [0.0]}), points], ignore_index=True)
