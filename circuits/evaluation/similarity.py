"""How alike circuits and scores are."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import combinations
from typing import Literal

import pandas as pd
import torch

from circuits.graph.circuit import Circuit
from circuits.graph.nodes import MLP, Embed, Error, Feature, Node, PosEmbed, TokenEmbed, at_position
from circuits.system.errors import InputError


def overlap(first: Circuit, second: Circuit) -> float:
    """Jaccard overlap of the kept edges: shared over all; 1 for two empty circuits.

    Raises:
        InputError: the circuits are over different graphs.
    """
    either = len(first | second)
    return len(first & second) / either if either else 1.0


def overlap_table(circuits: Mapping[str, Circuit]) -> pd.DataFrame:
    """The overlap of every two circuits over the same graph; of components with features `coarse_overlap`, elsewhere NaN."""
    table = pd.DataFrame(1.0, index=list(circuits), columns=list(circuits))
    for a, b in combinations(circuits, 2):
        first, second = circuits[a], circuits[b]
        with_features = first.graph.transcoders is not None or second.graph.transcoders is not None
        if first.graph == second.graph:
            table.loc[a, b] = table.loc[b, a] = overlap(first, second)
        else:
            table.loc[a, b] = table.loc[b, a] = (
                coarse_overlap(first, second) if with_features else float("nan")
            )
    return table


def coarsened(circuit: Circuit) -> dict[Node, float]:
    """The share of a circuit's |score| that leaves each MLP and embedding: where circuits of features and of components can meet.

    A layer's features and its error are its MLP, token and position embeddings are the embedding, heads are left out. Edges of a circuit
    without scores count alike.
    """
    graph, size = circuit.graph, circuit.scores[circuit.kept].double().abs()
    size = torch.ones_like(size) if bool(size.isnan().any()) or not bool(size.sum()) else size
    totals = torch.zeros(len(graph.nodes), dtype=torch.double).index_add_(
        0, graph.source[circuit.kept], size
    )
    shares: dict[Node, float] = {}
    for node, total in zip(graph.nodes, totals.tolist(), strict=True):
        coarse = _coarse(node)
        if coarse is not None and total:
            shares[coarse] = shares.get(coarse, 0.0) + total
    whole = sum(shares.values())
    return {node: share / whole for node, share in shares.items()}


def coarse_overlap(first: Circuit, second: Circuit) -> float:
    """Weighted Jaccard overlap of `coarsened`: the sum of the smaller shares over that of the larger.

    By position only where both circuits are split by the same ones.
    """
    by_position = first.graph.positions == second.graph.positions
    here, there = (
        _anywhere(coarsened(circuit)) if not by_position else coarsened(circuit)
        for circuit in (first, second)
    )
    pairs = [(here.get(node, 0.0), there.get(node, 0.0)) for node in {**here, **there}]
    return sum(map(min, pairs)) / sum(map(max, pairs)) if pairs else 1.0


def _anywhere(shares: Mapping[Node, float]) -> dict[Node, float]:
    result: dict[Node, float] = {}
    for node, share in shares.items():
        result[at_position(node, None)] = result.get(at_position(node, None), 0.0) + share
    return result


def _coarse(node: Node) -> Node | None:
    match node:
        case (
            MLP(layer=layer, position=position)
            | Feature(layer=layer, position=position)
            | Error(layer=layer, position=position)
        ):
            return MLP(layer, position)
        case Embed(position=position) | TokenEmbed(position=position) | PosEmbed(position=position):
            return Embed(position)
    return None


def score_correlation(
    first: Circuit, second: Circuit, method: Literal["spearman", "pearson"] = "spearman"
) -> float:
    """Correlation of two circuits' scores over the edges that both scored; NaN when fewer than two are.

    Raises:
        InputError: the circuits are over different graphs.
    """
    scores = score_table(first, second)
    return (
        float((scores.rank() if method == "spearman" else scores).corr().iloc[0, 1])
        if len(scores) > 1
        else float("nan")
    )


def score_table(first: Circuit, second: Circuit) -> pd.DataFrame:
    """A row per edge that both circuits scored, by its text: columns `x` and `y`, for a scatter plot.

    Raises:
        InputError: the circuits are over different graphs.
    """
    if first.graph != second.graph:
        raise InputError(
            "these circuits are over different graphs; score the same graph with both methods."
        )
    both = (~first.scores.isnan() & ~second.scores.isnan()).nonzero().flatten()
    edges = first.graph.edges
    names = [str(edges[index]) for index in both.tolist()]
    return pd.DataFrame(
        {"x": first.scores[both].double(), "y": second.scores[both].double()},
        index=pd.Index(names, name="edge"),
    )
