"""How similar circuits and scores are."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import combinations
from typing import Literal

import pandas as pd
import torch

from circuits.graph.circuit import Circuit
from circuits.graph.graph import PooledFeatureGraph
from circuits.graph.nodes import MLP, Embed, Error, Feature, Node, PosEmbed, TokenEmbed, at_position
from circuits.system.errors import InputError


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
    either = len(first | second)
    return len(first & second) / either if either else 1.0


def overlap_table(circuits: Mapping[str, Circuit]) -> pd.DataFrame:
    """The overlap of every two circuits.

    Over the same graph it is `overlap`; of a circuit of features with any other, `coarse_overlap`;
    elsewhere NaN.
    """
    table = pd.DataFrame(1.0, index=list(circuits), columns=list(circuits))
    for a, b in combinations(circuits, 2):
        first, second = circuits[a], circuits[b]
        features = [isinstance(each.graph, PooledFeatureGraph) for each in (first, second)]
        if first.graph == second.graph:
            value = overlap(first, second)
        else:
            value = coarse_overlap(first, second) if any(features) else float("nan")
        table.loc[a, b] = table.loc[b, a] = value
    return table


def coarsened(circuit: Circuit) -> dict[Node, float]:
    """The share of a circuit's |score| that leaves each MLP and each embedding.

    Circuits of features and of components can be compared by it: a layer's features and error count
    as its MLP, token and position embedding as the embedding; heads are left out. If a kept edge
    has no score, all edges count the same.
    """
    graph, size = circuit.graph, circuit.scores[circuit.kept].double().abs()
    if bool(size.isnan().any()) or not bool(size.sum()):
        size = torch.ones_like(size)
    totals = torch.zeros(len(graph.nodes), dtype=torch.double)
    totals.index_add_(0, graph.source[circuit.kept], size)
    shares: dict[Node, float] = {}
    for node, total in zip(graph.nodes, totals.tolist(), strict=True):
        coarse = _coarse(node)
        if coarse is not None and total:
            shares[coarse] = shares.get(coarse, 0.0) + total
    whole = sum(shares.values())
    return {node: share / whole for node, share in shares.items()}


def coarse_overlap(first: Circuit, second: Circuit) -> float:
    """Weighted Jaccard overlap of `coarsened`: the sum of minima over the sum of maxima.

    By position only if both circuits are split by the same positions.
    """
    here, there = coarsened(first), coarsened(second)
    if first.graph.positions != second.graph.positions:
        here, there = _at_all_positions(here), _at_all_positions(there)
    pairs = [(here.get(node, 0.0), there.get(node, 0.0)) for node in {**here, **there}]
    return sum(map(min, pairs)) / sum(map(max, pairs)) if pairs else 1.0


def _at_all_positions(shares: Mapping[Node, float]) -> dict[Node, float]:
    result: dict[Node, float] = {}
    for node, share in shares.items():
        anywhere = at_position(node, None)
        result[anywhere] = result.get(anywhere, 0.0) + share
    return result


def _coarse(node: Node) -> Node | None:
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
        InputError: the circuits are over different graphs.

    >>> import circuits
    >>> model = circuits.load_model("toy-world")
    >>> scores = circuits.EAP().discover(model, circuits.load_task("ioi", model, n=4))
    >>> round(circuits.score_correlation(scores, scores), 6)
    1.0
    """
    scores = score_table(first, second)
    if len(scores) < 2:
        return float("nan")
    # Spearman's correlation is Pearson's of the ranks.
    ranked = scores.rank() if method == "spearman" else scores
    return float(ranked.corr().iloc[0, 1])


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
    if first.graph != second.graph:
        raise InputError(
            "these circuits are over different graphs; score the same graph with both methods."
        )
    both = (~first.scores.isnan() & ~second.scores.isnan()).nonzero().flatten()
    names = [str(first.graph.edges[index]) for index in both.tolist()]
    columns = {"x": first.scores[both].double(), "y": second.scores[both].double()}
    return pd.DataFrame(columns, index=pd.Index(names, name="edge"))
