"""How well a circuit recovers a known one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import pandas as pd
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from circuits.graph.circuit import Circuit
from circuits.graph.edges import Edge
from circuits.system.errors import InputError

# Scores below this fraction of the largest count as zero, so that rounding noise ranks nothing.
SCORE_FLOOR = 1e-6


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
    return Recovery(
        precision,
        recall,
        node_precision,
        node_recall,
        _area(rank, true),
        _area(node_rank, true_nodes),
        _roc(rank, true),
    )


def _floored(scores: Float[Tensor, " edge"]) -> Float[Tensor, " edge"]:
    size = scores.double().abs().nan_to_num(nan=-1.0)
    return torch.where((size >= 0) & (size < SCORE_FLOOR * size.max()), 0.0, size)


def _touched(circuit: Circuit, edges: Bool[Tensor, " edge"]) -> Bool[Tensor, " node"]:
    touched = torch.zeros(len(circuit.graph.nodes), dtype=torch.bool)
    touched[circuit.graph.source[edges]] = True
    touched[circuit.graph.target[edges]] = True
    return touched


def _precision_recall(
    chosen: Bool[Tensor, " item"], true: Bool[Tensor, " item"]
) -> tuple[float, float]:
    hits, size = int((chosen & true).sum()), int(chosen.sum())
    return (hits / size if size else float("nan")), hits / int(true.sum())


def _area(rank: Float[Tensor, " item"], true: Bool[Tensor, " item"]) -> float:
    """The chance that a true item outranks a false one (Mann and Whitney); NaN when all are true."""
    ranks = torch.tensor(pd.Series(rank.numpy()).rank().to_numpy())
    positive, negative = int(true.sum()), int((~true).sum())
    return (
        (float(ranks[true].sum()) - positive * (positive + 1) / 2) / (positive * negative)
        if negative
        else float("nan")
    )


def _roc(rank: Float[Tensor, " item"], true: Bool[Tensor, " item"]) -> pd.DataFrame:
    frame = pd.DataFrame({"rank": rank.numpy(), "true": true.numpy()})
    counts = (
        frame.groupby("rank")["true"].agg(["sum", "count"]).sort_index(ascending=False).cumsum()
    )
    false = (counts["count"] - counts["sum"]) / max(1, int((~true).sum()))
    points = pd.DataFrame(
        {"false_positive_rate": false, "true_positive_rate": counts["sum"] / int(true.sum())}
    ).reset_index(drop=True)
    return pd.concat(
        [pd.DataFrame({"false_positive_rate": [0.0], "true_positive_rate": [0.0]}), points],
        ignore_index=True,
    )
