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

Ranks = Float[Tensor, " item"]
Truth = Bool[Tensor, " item"]


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
    true = circuit.graph.mask(truth)
    if not true.any():
        raise InputError("there are no true edges to recover; give at least one.")
    chosen = circuit if circuit.selected else circuit.top(int(true.sum()))
    rank = circuit.kept.double() if circuit.selected else _without_noise(circuit.scores)
    graph = circuit.graph
    # A node ranks as high as its highest edge.
    node_rank = torch.zeros(len(graph.nodes), dtype=torch.double)
    for column in (graph.source, graph.target):
        node_rank.scatter_reduce_(0, column, rank, "amax")
    true_nodes, chosen_nodes = _touched(circuit, true), _touched(circuit, chosen.kept)
    return Recovery(
        *_precision_recall(chosen.kept, true),
        *_precision_recall(chosen_nodes, true_nodes),
        _area_under_roc(rank, true),
        _area_under_roc(node_rank, true_nodes),
        _roc(rank, true),
    )


def _without_noise(scores: Float[Tensor, " edge"]) -> Float[Tensor, " edge"]:
    size = scores.double().abs().nan_to_num(nan=-1.0)
    is_noise = (size >= 0) & (size < SCORE_FLOOR * size.max())
    return torch.where(is_noise, 0.0, size)


def _touched(circuit: Circuit, edges: Bool[Tensor, " edge"]) -> Bool[Tensor, " node"]:
    touched = torch.zeros(len(circuit.graph.nodes), dtype=torch.bool)
    touched[circuit.graph.source[edges]] = True
    touched[circuit.graph.target[edges]] = True
    return touched


def _precision_recall(chosen: Truth, true: Truth) -> tuple[float, float]:
    hits, size = int((chosen & true).sum()), int(chosen.sum())
    return (hits / size if size else float("nan")), hits / int(true.sum())


def _area_under_roc(rank: Ranks, true: Truth) -> float:
    """The chance that a true item outranks a false one (Mann-Whitney); NaN if all are true."""
    ranks = torch.tensor(pd.Series(rank.numpy()).rank().to_numpy())
    n_true, n_false = int(true.sum()), int((~true).sum())
    if not n_false:
        return float("nan")
    # U = sum of the true items' ranks - n (n + 1) / 2;  AUC = U / (n_true n_false)
    u = float(ranks[true].sum()) - n_true * (n_true + 1) / 2
    return u / (n_true * n_false)


def _roc(rank: Ranks, true: Truth) -> pd.DataFrame:
    frame = pd.DataFrame({"rank": rank.numpy(), "true": true.numpy()})
    by_rank = frame.groupby("rank")["true"].agg(["sum", "count"])
    counts = by_rank.sort_index(ascending=False).cumsum()
    false_positives = counts["count"] - counts["sum"]
    rates = {
        "false_positive_rate": [0.0, *(false_positives / max(1, int((~true).sum())))],
        "true_positive_rate": [0.0, *(counts["sum"] / int(true.sum()))],
    }
    return pd.DataFrame(rates)
