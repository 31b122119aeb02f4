"""Influence of nodes and edges on what an attribution graph explains, pruning by it, and scores of the graph (Ameisen et al. 2025).

With |weights| of the edges into each node scaled to sum to 1, influence flows from the targets, each starting with its probability, down along
the edges: a node's influence is the sum over all paths. The graph has no cycles, so one pass from the targets down computes it: no inverse, no
square matrix, and each edge is touched once.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from circuits.attribution.feature_graph import EMBEDDING, ERROR, FEATURE, TARGET, FeatureGraph
from circuits.system.errors import InputError

SMALLEST_SUM = 1e-10


def node_influence(graph: FeatureGraph) -> Float[Tensor, " node"]:
    """How much of the targets' probability reaches each node, over all paths."""
    return _flow(graph, edge_shares(graph))


def edge_shares(graph: FeatureGraph) -> Float[Tensor, " edge"]:
    """Each edge's share of the |weights| into its target."""
    sizes = graph.weight.double().abs()
    sums = (
        sizes.new_zeros(len(graph.nodes))
        .index_add_(0, graph.target, sizes)
        .clamp_(min=SMALLEST_SUM)
    )
    return sizes / sums[graph.target]


def edge_influence(graph: FeatureGraph) -> Float[Tensor, " edge"]:
    """How much of the targets' probability flows along each edge."""
    shares = edge_shares(graph)
    reached = _flow(graph, shares) + graph.nodes.probability.double()
    return shares * reached[graph.target]


def _flow(graph: FeatureGraph, shares: Float[Tensor, " edge"]) -> Float[Tensor, " node"]:
    probability = graph.nodes.probability.double()
    total = torch.zeros_like(probability)
    for start, stop in graph.levels():
        first, last = torch.searchsorted(
            graph.target, torch.tensor([start, stop], device=graph.target.device)
        ).tolist()
        target = graph.target[first:last]
        # B = A + A^2 + ...: what reaches a node is what starts there and what came down to it.
        total.index_add_(
            0, graph.source[first:last], (total + probability)[target] * shares[first:last]
        )
    return total


@dataclass(frozen=True, eq=False)
class Pruning:
    """What to keep of a graph.

    Attributes:
        nodes, edges: what is kept.
        cumulative: for each node, the share of all influence that it and the more influential ones make together; small is important.
    """

    nodes: Bool[Tensor, " node"]
    edges: Bool[Tensor, " edge"]
    cumulative: Float[Tensor, " node"]


def prune(
    graph: FeatureGraph, *, node_threshold: float = 0.8, edge_threshold: float = 0.98
) -> Pruning:
    """The most influential nodes that make so much of the influence, and of the edges between them those that make so much of theirs.

    Embeddings and targets always stay. Features and errors without an edge out, and features without one in, go.

    Raises:
        InputError: a threshold is not between 0 and 1.
    """
    for name, threshold in (("node_threshold", node_threshold), ("edge_threshold", edge_threshold)):
        if not 0 <= threshold <= 1:
            raise InputError(
                f"{name}={threshold}: choose the share of influence to keep, from 0 to 1."
            )
    reached = node_influence(graph)
    always = graph.is_kind(EMBEDDING, TARGET)
    nodes = (reached >= _cut(reached, node_threshold)) | always
    # What is left is normalised anew before edges are scored.
    left = graph.subgraph(nodes)
    scores = edge_influence(left)
    between = (nodes[graph.source] & nodes[graph.target]).nonzero().flatten()
    edges = torch.zeros(len(graph), dtype=torch.bool, device=nodes.device)
    edges[between[scores >= _cut(scores, edge_threshold)]] = True
    return Pruning(*_without_loose_ends(graph, nodes, edges), _cumulative(reached))


def pruned(
    graph: FeatureGraph, *, node_threshold: float = 0.8, edge_threshold: float = 0.98
) -> FeatureGraph:
    """The graph of what `prune` keeps.

    Raises:
        InputError: a threshold is not between 0 and 1.
    """
    kept = prune(graph, node_threshold=node_threshold, edge_threshold=edge_threshold)
    return graph.subgraph(kept.nodes, kept.edges)


def replacement_score(graph: FeatureGraph) -> float:
    """The share of influence on the inputs that comes from tokens and not from errors: 1 when features explain everything, end to end."""
    reached = node_influence(graph)
    tokens, errors = (float(reached[graph.is_kind(kind)].sum()) for kind in (EMBEDDING, ERROR))
    return tokens / (tokens + errors) if tokens + errors else math.nan


def completeness_score(graph: FeatureGraph) -> float:
    """The share of the edges into each node that does not come from errors, averaged with the nodes' influence.

    Nodes without edges in count as wholly explained, as in circuit-tracer.
    """
    shares = edge_shares(graph)
    weight = _flow(graph, shares) + graph.nodes.probability.double()
    from_errors = graph.is_kind(ERROR)[graph.source]
    unexplained = torch.zeros_like(weight).index_add_(
        0, graph.target[from_errors], shares[from_errors]
    )
    total = float(weight.sum())
    return float(((1 - unexplained) * weight).sum()) / total if total else math.nan


def _cut(scores: Float[Tensor, " n"], threshold: float) -> float:
    """The largest value such that all scores from it up make the share `threshold` of their sum.

    The scores are halved into those above and below until few are left, so that millions need not be sorted.
    """
    if not len(scores) or threshold >= 1:
        return 0.0
    wanted, above, rest = threshold * float(scores.sum()), 0.0, scores
    while len(rest) > SORTED_AT_ONCE:
        middle = float(rest.mean())
        upper = rest[rest > middle]
        if not 0 < len(upper) < len(rest):
            break
        size = float(upper.sum())
        if above + size >= wanted:
            rest = upper
        else:
            above, rest = above + size, rest[rest <= middle]
    ordered = rest.sort(descending=True).values
    place = int(torch.searchsorted(above + ordered.cumsum(0), wanted))
    return float(ordered[min(place, len(ordered) - 1)])


SORTED_AT_ONCE = 1 << 14


def _cumulative(reached: Float[Tensor, " node"]) -> Float[Tensor, " node"]:
    order = torch.argsort(reached, descending=True, stable=True)
    result = torch.empty_like(reached)
    result[order] = reached[order].cumsum(0) / reached.sum().clamp(min=SMALLEST_SUM)
    return result


def _without_loose_ends(
    graph: FeatureGraph, nodes: Bool[Tensor, " node"], edges: Bool[Tensor, " edge"]
) -> tuple[Bool[Tensor, " node"], Bool[Tensor, " edge"]]:
    """Drop features and errors that lead nowhere and features that come from nowhere, until all that is left lies on a path."""
    leads, comes = graph.is_kind(FEATURE, ERROR), graph.is_kind(FEATURE)
    while True:
        out, into = (_touched(column[edges], len(nodes)) for column in (graph.source, graph.target))
        fewer = nodes & (out | ~leads) & (into | ~comes)
        if torch.equal(fewer, nodes):
            return nodes, edges
        nodes = fewer
        edges = edges & nodes[graph.source] & nodes[graph.target]


def _touched(numbers: Int[Tensor, " edge"], n: int) -> Bool[Tensor, " node"]:
    return torch.zeros(n, dtype=torch.bool, device=numbers.device).index_fill_(0, numbers, True)
