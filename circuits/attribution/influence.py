"""Influence of nodes and edges on what an attribution graph explains, pruning, and graph scores.

With A[t, s] = |w[t, s]| / sum over s' of |w[t, s']|, influence starts at the targets with their
probabilities p and flows down the edges along all paths: influence = p (A + A^2 + A^3 + ...).
The graph is acyclic, so one pass from the targets down computes this sum and uses each edge once.

Reference: Ameisen, Lindsey et al. 2025, Circuit tracing,
https://transformer-circuits.pub/2025/attribution-graphs/methods.html
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch
from jaxtyping import Float
from torch import Tensor

from circuits.attribution.feature_graph import (
    EMBEDDING,
    ERROR,
    FEATURE,
    TARGET,
    EdgeMask,
    EdgeScores,
    FeatureGraph,
    NodeMask,
    NodeScores,
    check_is_feature_graph,
)
from circuits.system.errors import InputError
from circuits.system.numbers import RealNumber, real
from circuits.system.torch_modes import without_modes

SMALLEST_SUM = 1e-10
SORTED_AT_ONCE = 1 << 14
Scores = Float[Tensor, " _"]


@without_modes()
def node_influence(graph: FeatureGraph) -> NodeScores:
    """Return how much of the targets' probability reaches each node, over all paths.

    >>> import circuits
    >>> model = circuits.load_model("toy-world")
    >>> graph = circuits.AttributionGraph("toy-world-clt").attribute(model, "Dallas is in")
    >>> str(graph.node(int(circuits.node_influence(graph).argmax())))
    'tok_embed@3'
    """
    return _influence(graph)[0]


@without_modes()
def edge_influence(graph: FeatureGraph) -> EdgeScores:
    """Return how much of the targets' probability flows along each edge."""
    return _influence(graph)[1]


def _influence(graph: FeatureGraph) -> tuple[NodeScores, EdgeScores]:
    check_is_feature_graph(graph)
    sizes = graph.weight.double().abs()
    # A[t, s] = |w[t, s]| / sum over s' of |w[t, s']|
    return propagate(graph, sizes, _incoming_sums(graph, sizes))


def _incoming_sums(graph: FeatureGraph, sizes: EdgeScores) -> NodeScores:
    sums = sizes.new_zeros(len(graph.nodes))
    sums.index_add_(0, graph.target, sizes)
    return sums.clamp_(min=SMALLEST_SUM)


def propagate(
    graph: FeatureGraph, weights: EdgeScores, divisors: NodeScores
) -> tuple[NodeScores, EdgeScores]:
    """Pass the targets' probabilities p down the edges.

    Of what reaches node t, the edge from s passes on the share A[t, s] = weight[t, s] / divisor[t].
    Returns what flows into each node over all paths, and what flows along each edge.
    """
    probability = graph.nodes.probability.double()
    reached = probability.clone()
    flow = torch.empty_like(weights)
    for edges in graph.levels():
        # flow[t, s] = A[t, s] (influence[t] + p[t]);  influence[s] = sum over t of flow[t, s]
        per_weight = (reached / divisors)[graph.target[edges]]
        flow[edges] = weights[edges] * per_weight
        source = graph.source[edges]
        reached.index_add_(0, source, flow[edges])
    return reached - probability, flow


@dataclass(frozen=True, eq=False)
class Pruning:
    """What to keep of a graph.

    Attributes:
        nodes, edges: which ones are kept.
        cumulative: for each node, the share of all influence that it and all more influential
            nodes have together. Important nodes have small values.
    """

    nodes: NodeMask
    edges: EdgeMask
    cumulative: NodeScores


@without_modes()
def prune(
    graph: FeatureGraph, *, node_threshold: RealNumber = 0.8, edge_threshold: RealNumber = 0.98
) -> Pruning:
    """Choose the most influential nodes, and the most influential edges between them.

    Embeddings and targets are always kept. Features and errors that then have no outgoing edge are
    dropped, and so are features without an incoming edge.

    >>> import circuits
    >>> model = circuits.load_model("toy-world")
    >>> graph = circuits.AttributionGraph("toy-world-clt").attribute(model, "Dallas is in")
    >>> kept = circuits.prune(graph, node_threshold=0.5)
    >>> kept.nodes.shape == graph.nodes.kind.shape, kept.edges.shape == graph.weight.shape
    (True, True)

    Args:
        node_threshold: the share of all influence that the kept nodes have together.
        edge_threshold: the share of influence, between kept nodes, that the kept edges have.

    Raises:
        InputError: a threshold is not between 0 and 1.
    """
    node_threshold = _share("node_threshold", node_threshold)
    edge_threshold = _share("edge_threshold", edge_threshold)
    influence = node_influence(graph)
    nodes = influence >= _cutoff(influence, node_threshold)
    nodes |= graph.is_kind(EMBEDDING, TARGET)
    # Shares are normalized again over the remaining edges before these are scored.
    scores = edge_influence(graph.subgraph(nodes))
    edges = nodes[graph.source] & nodes[graph.target]
    cutoff = _cutoff(scores, edge_threshold)
    edges[edges.clone()] = scores >= cutoff
    nodes, edges = _without_dead_ends(graph, nodes, edges)
    return Pruning(nodes, edges, _cumulative_share(influence))


@without_modes()
def pruned(
    graph: FeatureGraph, *, node_threshold: RealNumber = 0.8, edge_threshold: RealNumber = 0.98
) -> FeatureGraph:
    """Return the subgraph that `prune` keeps.

    >>> import circuits
    >>> model = circuits.load_model("toy-world")
    >>> graph = circuits.AttributionGraph("toy-world-clt").attribute(model, "Dallas is in")
    >>> len(circuits.pruned(graph)) < len(graph)
    True

    Args:
        node_threshold, edge_threshold: see `prune`.

    Raises:
        InputError: a threshold is not between 0 and 1.
    """
    kept = prune(graph, node_threshold=node_threshold, edge_threshold=edge_threshold)
    return graph.subgraph(kept.nodes, kept.edges)


@without_modes()
def replacement_score(graph: FeatureGraph) -> float:
    """Return the share of input influence that comes from tokens and not from errors.

    1 means that features explain the output completely. NaN means that nothing has influence.

    >>> import circuits
    >>> model = circuits.load_model("toy-world")
    >>> graph = circuits.AttributionGraph("toy-world-clt").attribute(model, "Dallas is in")
    >>> 0.5 < circuits.replacement_score(graph) < 1
    True
    """
    influence = node_influence(graph)
    tokens = influence[graph.is_kind(EMBEDDING)].sum()
    errors = influence[graph.is_kind(ERROR)].sum()
    # 0 / 0 is NaN.
    return float(tokens / (tokens + errors))


@without_modes()
def completeness_score(graph: FeatureGraph) -> float:
    """Return the share of each node's incoming edges that does not come from errors.

    The mean over nodes is weighted by influence. Nodes without incoming edges count as completely
    explained, as in circuit-tracer. The score is NaN if nothing has influence.

    >>> import circuits
    >>> model = circuits.load_model("toy-world")
    >>> graph = circuits.AttributionGraph("toy-world-clt").attribute(model, "Dallas is in")
    >>> 0.5 < circuits.completeness_score(graph) < 1
    True
    """
    check_is_feature_graph(graph)
    sizes = graph.weight.double().abs()
    sums = _incoming_sums(graph, sizes)
    influence, _ = propagate(graph, sizes, sums)
    weight = influence + graph.nodes.probability.double()
    from_errors = graph.is_kind(ERROR)[graph.source]
    unexplained = torch.zeros_like(weight)
    reader = graph.target[from_errors]
    unexplained.index_add_(0, reader, sizes[from_errors])
    # score = sum_t (1 - share of errors in t) weight[t] / sum_t weight[t]
    explained = (1 - unexplained / sums) * weight
    # 0 / 0 is NaN.
    return float(explained.sum() / weight.sum())


def _share(name: str, threshold: RealNumber) -> float:
    share = real(threshold, name)
    if not 0 <= share <= 1:
        raise InputError(f"{name}={share}: choose the share of influence to keep, from 0 to 1.")
    return share


def _cutoff(scores: Scores, threshold: float) -> float:
    """Return the largest value such that scores from it up make `threshold` of the sum."""
    if not len(scores) or threshold >= 1:
        return 0.0
    wanted = threshold * float(scores.sum())
    above, candidates = _near_cutoff(scores, wanted)
    ordered = candidates.sort(descending=True).values
    sums = above + ordered.cumsum(0)
    # The last sum may stay below `wanted` by rounding.
    is_below = sums[:-1] < wanted
    return float(ordered[is_below.sum()])


def _near_cutoff(scores: Scores, wanted: float) -> tuple[float, Scores]:
    """Return the sum of scores that are certainly above the cutoff, and candidates for it."""
    # Candidates are split at their mean until few are left: sorting millions would be slower.
    above, candidates = 0.0, scores
    while len(candidates) > SORTED_AT_ONCE:
        is_upper = candidates > candidates.mean()
        upper = candidates[is_upper]
        if not 0 < len(upper) < len(candidates):
            break
        size = float(upper.sum())
        if above + size >= wanted:
            candidates = upper
        else:
            above += size
            candidates = candidates[~is_upper]
    return above, candidates


def _cumulative_share(influence: NodeScores) -> NodeScores:
    order = influence.argsort(descending=True, stable=True)
    result = torch.empty_like(influence)
    total = influence.sum().clamp(min=SMALLEST_SUM)
    # cumulative[s] = sum of influence >= influence[s] / sum of all influence
    result[order] = influence[order].cumsum(0)
    return result / total


def _without_dead_ends(
    graph: FeatureGraph, nodes: NodeMask, edges: EdgeMask
) -> tuple[NodeMask, EdgeMask]:
    """Drop nodes that are on no path from an embedding or error to a target, and their edges."""
    needs_output = graph.is_kind(FEATURE, ERROR)
    needs_input = graph.is_kind(FEATURE)
    count = partial(torch.bincount, minlength=len(nodes))
    while True:
        n_outputs = count(graph.source[edges])
        n_inputs = count(graph.target[edges])
        lacks_output = needs_output & (n_outputs == 0)
        is_dead_end = lacks_output | needs_input & (n_inputs == 0)
        fewer = nodes & ~is_dead_end
        if torch.equal(fewer, nodes):
            return nodes, edges
        nodes = fewer
        edges = edges & nodes[graph.source]
        edges &= nodes[graph.target]
