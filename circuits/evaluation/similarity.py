"""How similar circuits and scores are."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping
from itertools import combinations
from typing import Literal

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from circuits.graph.circuit import Circuit, check_is_circuit
from circuits.graph.graph import PooledFeatureGraph
from circuits.graph.nodes import MLP, Embed, Error, Feature, Node, PosEmbed, TokenEmbed, at_position
from circuits.system.errors import InputError
from circuits.system.kinds import one_of


def overlap(first: Circuit, second: Circuit) -> float:
    """Jaccard overlap of the kept edges: shared over all; 1 for two empty circuits.

    Raises:
        InputError: the circuits are over different graphs.

    >>> import circuits
    >>> graph = circuits.component_graph(circuits.load_model("toy-world"))
    >>> small = circuits.Circuit.from_edges(graph, ["m3->logits"])
    >>> circuits.overlap(small, small | circuits.Circuit.from_edges(graph, ["m2->logits"]))
    0.5
    """
    for circuit in (first, second):
        check_is_circuit(circuit)
    # |A and B| / |A or B|
    either = len(first | second)
    return len(first & second) / either if either else 1.0


def overlap_table(circuits: Mapping[str, Circuit]) -> pd.DataFrame:
    """The overlap of every two circuits.

    Over the same graph it is `overlap`; of a circuit of features with any other, `coarse_overlap`;
    elsewhere NaN.
    """
    names = list(circuits)
    table = pd.DataFrame(1.0, index=names, columns=names)
    for a, b in combinations(names, 2):
        value = _any_overlap(circuits[a], circuits[b])
        table.loc[a, b] = value
        table.loc[b, a] = value
    return table


def _any_overlap(first: Circuit, second: Circuit) -> float:
    if first.graph == second.graph:
        return overlap(first, second)
    if PooledFeatureGraph in (type(first.graph), type(second.graph)):
        return coarse_overlap(first, second)
    return math.nan


def coarsened(circuit: Circuit, *, by_position: bool = True) -> dict[Node, float]:
    """The share of a circuit's |score| that leaves each MLP and each embedding.

    Circuits of features and of components can be compared by it: a layer's features and error count
    as its MLP, token and position embedding as the embedding; heads are left out. If a kept edge
    has no score, all edges count the same.
    """
    shares: dict[Node, float] = defaultdict(float)
    totals = _size_by_node(circuit)
    numbers = totals.nonzero().flatten()
    for number in numbers.tolist():
        coarse = _coarse(circuit.graph.nodes[number])
        if coarse is None:
            continue
        if not by_position:
            coarse = at_position(coarse, None)
        shares[coarse] += float(totals[number])
    # share_n = |score| that leaves n / |score| that leaves all of them
    whole = sum(shares.values())
    return {node: share / whole for node, share in shares.items()}


def _size_by_node(circuit: Circuit) -> Float[Tensor, " node"]:
    graph, kept = circuit.graph, circuit.kept
    scores = circuit.scores[kept]
    size = scores.double().abs()
    if size.isnan().any() or not size.any():
        size = torch.ones_like(size)
    totals = size.new_zeros(len(graph.nodes))
    return totals.index_add_(0, graph.source[kept], size)


def coarse_overlap(first: Circuit, second: Circuit) -> float:
    """Weighted Jaccard overlap of `coarsened`: the sum of minima over the sum of maxima.

    By position only if both circuits are split by the same positions.
    """
    by_position = first.graph.positions == second.graph.positions
    shares = [coarsened(circuit, by_position=by_position) for circuit in (first, second)]
    table = pd.DataFrame(shares).fillna(0.0)
    if table.empty:
        return 1.0
    # J(a, b) = sum_n min(a_n, b_n) / sum_n max(a_n, b_n)
    return float(table.min().sum() / table.max().sum())


def _coarse(node: Node) -> MLP | Embed | None:
    if isinstance(node, MLP | Feature | Error):
        return MLP(node.layer, node.position)
    if isinstance(node, Embed | TokenEmbed | PosEmbed):
        return Embed(node.position)
    return None


def score_correlation(
    first: Circuit, second: Circuit, method: Literal["spearman", "pearson"] = "spearman"
) -> float:
    """Correlation of two circuits' scores over the edges that both scored; NaN for fewer than two.

    Raises:
        InputError: the circuits are over different graphs, or there is no such `method`.

    >>> import circuits
    >>> model = circuits.load_model("toy-world")
    >>> scores = circuits.EAP().discover(model, circuits.load_task("ioi", model, n=4))
    >>> round(circuits.score_correlation(scores, scores), 6)
    1.0
    """
    scores = score_table(first, second)
    # Spearman's correlation is Pearson's of the ranks.
    if one_of(method, "method", ["spearman", "pearson"]) == "spearman":
        scores = scores.rank()
    correlation = scores.corr()
    return float(correlation.loc["x", "y"])


def score_table(first: Circuit, second: Circuit) -> pd.DataFrame:
    """The scores `x` and `y` of every edge that both circuits scored, indexed by the edge's text.

    Raises:
        InputError: the circuits are over different graphs.

    >>> import circuits
    >>> model = circuits.load_model("toy-world")
    >>> scores = circuits.EAP().discover(model, circuits.load_task("ioi", model, n=4))
    >>> circuits.score_table(scores, scores).shape
    (479, 2)
    """
    for circuit in (first, second):
        check_is_circuit(circuit)
    if first.graph != second.graph:
        raise InputError(
            "these circuits are over different graphs; score the same graph with both methods."
        )
    names = [str(edge) for edge in first.graph.edges]
    columns = {"x": first.scores.double(), "y": second.scores.double()}
    table = pd.DataFrame(columns, index=names).rename_axis("edge")
    return table.dropna()
