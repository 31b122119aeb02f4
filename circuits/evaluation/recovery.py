"""How well a circuit recovers a known one."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import pandas as pd
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from circuits.graph.circuit import Circuit, check_is_circuit
from circuits.graph.edges import Edge
from circuits.graph.graph import Graph
from circuits.system.errors import InputError

# Scores below this fraction of the largest count as zero, so that rounding noise ranks nothing.
SCORE_FLOOR = 1e-6
ROC_COLUMNS = ["false_positive_rate", "true_positive_rate"]

Ranks = Float[Tensor, " item"]
Truth = Bool[Tensor, " item"]
Rates = Float[Tensor, "threshold rate"]


@dataclass(frozen=True)
class Recovery:
    """How well a circuit finds edges that are known to be true.

    Attributes:
        precision, recall: of the kept edges; for a method that only scores, of as many of its
            highest-scored edges as there are true ones.
        node_precision, node_recall: the same for the nodes that these edges touch.
        edge_auc, node_auc: area under the ROC curve; ties count half.
        edge_roc: true- and false-positive rates, from the strictest threshold to the laxest.

    >>> import circuits
    >>> known = circuits.known_circuit("induction", n_prompts=8)
    >>> graph = circuits.component_graph(known.model, split_embed=True)
    >>> circuits.recovery(circuits.Circuit.from_edges(graph, known.edges), known.edges).recall
    1.0
    """

    precision: float
    recall: float
    node_precision: float
    node_recall: float
    edge_auc: float
    node_auc: float
    edge_roc: pd.DataFrame


def recovery(circuit: Circuit, truth: Sequence[Edge | str]) -> Recovery:
    """Compare a circuit with the true edges. Only a kept edge can be a true positive.

    Edges are ranked by |score|; those of a method that selects, by whether they are kept.

    Raises:
        InputError: the truth is empty, or names an edge that the graph does not have.

    >>> import circuits
    >>> graph = circuits.component_graph(circuits.load_model("toy-world"))
    >>> found = circuits.Circuit.from_edges(graph, ["m3->logits", "m2->logits"])
    >>> result = circuits.recovery(found, ["m3->logits"])
    >>> result.precision, result.recall
    (0.5, 1.0)
    """
    check_is_circuit(circuit)
    graph = circuit.graph
    true = graph.mask(truth)
    if not true.any():
        raise InputError("there are no true edges to recover; give at least one.")
    chosen, rank = _chosen_and_rank(circuit, true)
    chosen_nodes = _of_nodes(graph, chosen.double()) > 0
    true_nodes = _of_nodes(graph, true.double()) > 0
    edge_roc = _roc(rank, true)
    node_roc = _roc(_of_nodes(graph, rank), true_nodes)
    return Recovery(
        *_precision_recall(chosen, true),
        *_precision_recall(chosen_nodes, true_nodes),
        _area_under(edge_roc),
        _area_under(node_roc),
        pd.DataFrame(edge_roc, columns=ROC_COLUMNS),
    )


def _chosen_and_rank(circuit: Circuit, true: Truth) -> tuple[Truth, Ranks]:
    if circuit.selected:
        return circuit.kept, circuit.kept.double()
    n_true = int(true.sum())
    return circuit.top(n_true).kept, _without_noise(circuit.scores)


def _without_noise(scores: Float[Tensor, " edge"]) -> Ranks:
    size = scores.double().abs()
    size = size.nan_to_num(nan=-1.0)
    smallest = SCORE_FLOOR * size.max()
    is_noise = (size >= 0) & (size < smallest)
    return torch.where(is_noise, 0.0, size)


def _of_nodes(graph: Graph, rank: Float[Tensor, " edge"]) -> Float[Tensor, " node"]:
    """A node ranks as high as its highest edge."""
    result = rank.new_zeros(len(graph.nodes))
    for column in (graph.source, graph.target):
        result.scatter_reduce_(0, column, rank, "amax")
    return result


def _precision_recall(chosen: Truth, true: Truth) -> tuple[float, float]:
    # precision = hits / |chosen|;  recall = hits / |true|;  0 / 0 is NaN.
    hits = (chosen & true).sum().double()
    return float(hits / chosen.sum()), float(hits / true.sum())


def _roc(rank: Ranks, true: Truth) -> Rates:
    # Items of equal rank pass a threshold together.
    # Thresholds fall, from the highest rank to the lowest.
    thresholds, place = (-rank).unique(return_inverse=True)
    rates, n_thresholds = [], len(thresholds)
    for items in (~true, true):
        passing = torch.bincount(place[items], minlength=n_thresholds)
        total = items.sum().clamp(min=1)
        rates.append(passing.cumsum(0) / total.double())
    none = torch.zeros(1, 2, dtype=torch.double)
    return torch.cat([none, torch.stack(rates, dim=1)])


def _area_under(roc: Rates) -> float:
    """The chance that a true item outranks a false one; NaN if all are true."""
    false_positives, true_positives = roc.T
    # Between two thresholds the curve is straight, so that ties count half.
    area = float(torch.trapezoid(true_positives, false_positives))
    return area if false_positives.any() else math.nan
