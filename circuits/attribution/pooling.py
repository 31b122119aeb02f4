"""Pool the attribution graphs of many prompts into one circuit.

Nodes are pooled by feature, and by named position if the task names positions. An edge's score is
the damage that ablating it does in the local linear model: its weight times the change of the
explained logits per unit of its target's pre-activation, over all paths with attention frozen.
Scores are summed over positions and prompts. Paths through features outside a budget do not count.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from circuits.attribution.feature_graph import (
    FEATURE,
    KINDS,
    EdgeMask,
    EdgeNumbers,
    EdgeScores,
    FeatureGraph,
    Nodes,
    NodeScores,
    node_of,
)
from circuits.attribution.influence import propagate
from circuits.attribution.tensor_table import join_rows
from circuits.graph.edges import NO_SLOT
from circuits.graph.graph import Graph, PooledFeatureGraph
from circuits.graph.identity import ModelIdentity, TranscodersIdentity
from circuits.models.component_graph import REST

PooledNodes = Int[Tensor, "node 4"]
Spans = Int[Tensor, " pos"]
TokenMask = Bool[Tensor, "batch pos"]

# The span of a node that is pooled over all positions.
ANYWHERE = -1


def effects(graph: FeatureGraph) -> tuple[NodeScores, EdgeScores]:
    """Return the contribution of each node and each edge to the explained logits.

    Contributions are sums over all paths of the linear model, weighted by target probability.
    """
    # A feature's contribution is proportional to its activation a[t], to which the edge from s adds
    # w[t, s]: the edge's share of the contribution is w[t, s] / a[t]. For a target it is w[t, s].
    activation = graph.nodes.activation.double()
    divisors = torch.where(graph.is_kind(FEATURE), activation, 1.0)
    return propagate(graph, graph.weight.double(), divisors)


@dataclass(frozen=True, eq=False)
class Pooled:
    """The nodes and edges of several prompts' graphs, pooled.

    Attributes:
        nodes: kind, layer, index and span of each pooled node, in sorted rows.
        edges: source and target of each pooled edge, in sorted rows.
        scores: the score of each edge, summed over prompts.
        keeping: the number of prompts whose pruned graph keeps the edge.
    """

    nodes: PooledNodes
    edges: Int[Tensor, "edge 2"]
    scores: EdgeScores
    keeping: EdgeNumbers

    @staticmethod
    def nothing() -> Pooled:
        """Return the pool of no graphs."""
        empty = torch.zeros(0, dtype=torch.long)
        nodes = empty.view(0, 4)
        edges = empty.view(0, 2)
        return Pooled(nodes, edges, empty.double(), empty)

    @staticmethod
    def of(
        graph: FeatureGraph, kept: EdgeMask, spans: Spans | None, *, kept_only: bool = False
    ) -> Pooled:
        """Pool one prompt's graph over its positions.

        `kept` are the edges of the pruned graph; with `kept_only` all others are left out. `spans`
        holds the number of the span that each position is in; None pools over all positions.
        """
        _, scores = effects(graph)
        ends = torch.stack([graph.source, graph.target], 1)
        chosen = kept if kept_only else slice(None)
        columns = (ends, scores, kept.long())
        edges = [column[chosen].cpu() for column in columns]
        nodes = _node_keys(graph.nodes.to("cpu"), spans)
        pooled = Pooled(nodes, *edges).merged()
        # A prompt that keeps several instances of an edge counts once.
        keeping = pooled.keeping.clamp(max=1)
        return replace(pooled, keeping=keeping)

    @staticmethod
    def together(parts: Sequence[Pooled]) -> Pooled:
        """Merge several pools: scores and counts of equal edges are added."""
        shifted, n_nodes = [], 0
        for part in parts:
            edges = part.edges + n_nodes
            shifted.append(replace(part, edges=edges))
            n_nodes += len(part.nodes)
        return join_rows(shifted).merged()

    def merged(self) -> Pooled:
        """Merge equal nodes, and equal edges, whose scores and counts are added."""
        nodes, number = self.nodes.unique(dim=0, return_inverse=True)
        source, target = number[self.edges].T
        # One integer per edge: source * number of nodes + target.
        n = len(nodes)
        keys = source * n + target
        keys, place = keys.unique(return_inverse=True)
        ends = [keys // n, keys % n]
        edges = torch.stack(ends, 1)
        scores = torch.bincount(place, self.scores)
        keeping = torch.bincount(place, self.keeping)
        return Pooled(nodes, edges, scores, keeping.long())

    def graph(
        self,
        spans: tuple[str, ...] | None,
        label: str,
        model: ModelIdentity | None,
        transcoders: TranscodersIdentity,
    ) -> tuple[Graph, EdgeNumbers]:
        """Return the pooled graph, and for each of its edges the row in `edges`.

        `spans` are the names of the spans, or None if nodes are pooled over all positions; `label`
        names the explained logits; `model` and `transcoders` are what the graphs were made from.
        """
        kinds, layers, _, _ = self.nodes.T
        # Order of computation: layers from -1 (embeddings) to the number of layers (targets), and
        # in a layer, features before the error.
        keys = layers * len(KINDS) + kinds
        order = keys.argsort(stable=True)
        rank = order.argsort()
        source, target = rank[self.edges].unbind(1)
        place = torch.argsort(target * len(order) + source)
        nodes = []
        names = [None] if spans is None else spans
        for kind, layer, index, span in self.nodes[order].tolist():
            position = names[span]
            nodes.append(node_of([label], kind, layer, index, position))
        graph = PooledFeatureGraph(
            nodes=tuple(nodes),
            source=source[place],
            target=target[place],
            slot=torch.full_like(place, NO_SLOT),
            positions=spans,
            model=model,
            transcoders=transcoders,
        )
        return graph, place


def _node_keys(nodes: Nodes, spans: Spans | None) -> PooledNodes:
    # Only features keep their index: tokens are pooled, and errors have none.
    is_feature = nodes.kind == FEATURE
    index = torch.where(is_feature, nodes.index, 0)
    span = torch.full_like(index, ANYWHERE)
    if spans is not None:
        span = spans[nodes.position]
    return torch.stack([nodes.kind, nodes.layer, index, span], 1)


def spans_of(
    positions: Mapping[str, TokenMask], names: tuple[str, ...]
) -> Int[Tensor, "batch pos"]:
    """Return for each position of each prompt the place in `names` of the span that holds it.

    The first of several spans wins. Positions outside all spans get 0, the place of the rest.
    """
    assert names[0] == REST
    first = next(iter(positions.values()))
    result = torch.zeros(first.shape, dtype=torch.long)
    for number in reversed(range(1, len(names))):
        inside = positions[names[number]].cpu()
        result[inside] = number
    return result
