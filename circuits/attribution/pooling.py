"""Pool the attribution graphs of many prompts into one circuit.

Nodes are pooled by feature, and by named position if the task names positions. An edge's score is
the damage that ablating it does in the local linear model: its weight times the change of the
explained logits per unit of its target's pre-activation, over all paths with attention frozen.
Scores are summed over positions and prompts. With a budget, paths through features outside it
do not count.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from circuits.attribution.feature_graph import (
    FEATURE,
    EdgeMask,
    EdgeScores,
    FeatureGraph,
    NodeKind,
    NodeScores,
    node_of,
)
from circuits.attribution.influence import propagate
from circuits.graph.edges import NO_SLOT
from circuits.graph.graph import Graph, PooledFeatureGraph
from circuits.graph.identity import ModelIdentity, TranscodersIdentity
from circuits.models.component_graph import REST

ANYWHERE = -1
"""The span of a node that is pooled over all positions."""


def effects(graph: FeatureGraph) -> tuple[NodeScores, EdgeScores]:
    """Return the contribution of each node and each edge to the explained logits.

    Contributions are sums over all paths of the linear model, weighted by the targets'
    probabilities.
    """
    nodes = graph.nodes
    # A feature's contribution is proportional to its activation a[t], to which the edge from s adds
    # w[t, s]: the edge's share of the contribution is w[t, s] / a[t]. For a target it is w[t, s].
    activation = torch.where(nodes.kind == FEATURE, nodes.activation.double(), 1.0)
    return propagate(graph, graph.weight.double(), activation)


@dataclass(frozen=True, eq=False)
class Pooled:
    """The nodes and edges of several prompts' graphs, pooled.

    Attributes:
        nodes: kind, layer, index and span of each pooled node, in sorted rows.
        edges: source and target of each pooled edge, in sorted rows.
        scores: the score of each edge, summed over prompts.
        keeping: the number of prompts whose pruned graph keeps the edge.
    """

    nodes: Int[Tensor, "node 4"]
    edges: Int[Tensor, "edge 2"]
    scores: EdgeScores
    keeping: Int[Tensor, " edge"]

    @staticmethod
    def nothing() -> Pooled:
        """Return the pool of no graphs."""
        empty = torch.zeros(0, dtype=torch.long)
        return Pooled(empty.view(0, 4), empty.view(0, 2), empty.double(), empty)

    @staticmethod
    def of(
        graph: FeatureGraph,
        kept: EdgeMask,
        spans: Int[Tensor, " pos"] | None,
        *,
        kept_only: bool = False,
    ) -> Pooled:
        """Pool one prompt's graph over its positions.

        Args:
            kept: the edges of the pruned graph.
            spans: the number of the span that holds each position; None pools over all positions.
            kept_only: leave out all other edges.
        """
        _, of_edges = effects(graph)
        chosen = kept if kept_only else slice(None)
        ends = torch.stack([graph.source[chosen], graph.target[chosen]], 1).cpu()
        nodes = graph.nodes.to("cpu")
        # Only features keep their index: tokens are pooled, and errors have none.
        index = torch.where(nodes.kind == FEATURE, nodes.index, 0)
        span = torch.full_like(index, ANYWHERE)
        if spans is not None:
            span = spans[nodes.position]
        keys = torch.stack([nodes.kind, nodes.layer, index, span], 1)
        scores, keeping = of_edges[chosen].cpu(), kept[chosen].long().cpu()
        pooled = Pooled.together([Pooled(keys, ends, scores, keeping)])
        # A prompt that keeps several instances of an edge counts once.
        return replace(pooled, keeping=pooled.keeping.clamp(max=1))

    @staticmethod
    def together(parts: Sequence[Pooled]) -> Pooled:
        """Merge several pools: scores and counts of equal edges are added."""
        rows = torch.cat([part.nodes for part in parts])
        nodes, number = rows.unique(dim=0, return_inverse=True)
        merged = number.split([len(part.nodes) for part in parts])
        # One integer per edge: source * number of nodes + target.
        keys = [
            own[part.edges[:, 0]] * len(nodes) + own[part.edges[:, 1]]
            for part, own in zip(parts, merged, strict=True)
        ]
        edges, place = torch.cat(keys).unique(return_inverse=True)
        scores = torch.zeros(len(edges), dtype=torch.double)
        keeping = torch.zeros(len(edges), dtype=torch.long)
        scores.index_add_(0, place, torch.cat([part.scores for part in parts]))
        keeping.index_add_(0, place, torch.cat([part.keeping for part in parts]))
        ends = torch.stack([edges // len(nodes), edges % len(nodes)], 1)
        return Pooled(nodes, ends, scores, keeping)

    def graph(
        self,
        spans: tuple[str, ...] | None,
        label: str,
        model: ModelIdentity | None,
        transcoders: TranscodersIdentity,
    ) -> tuple[Graph, Int[Tensor, " edge"]]:
        """Return the pooled graph, and for each of its edges the row in `edges`.

        Args:
            spans: the names of the spans; None if nodes are pooled over all positions.
            label: the name of the explained logits.
            model, transcoders: what the prompts' graphs were made from.
        """
        kinds, layers = self.nodes[:, 0], self.nodes[:, 1]
        # Order of computation: layers from -1 (embeddings) to the number of layers (targets), and
        # in a layer, features before the error.
        order = torch.argsort(layers * len(NodeKind) + kinds, stable=True)
        rank = torch.argsort(order)
        source, target = rank[self.edges].unbind(1)
        place = torch.argsort(target * len(order) + source)
        nodes = []
        for kind, layer, index, span in self.nodes[order].tolist():
            position = None if spans is None else spans[span]
            nodes.append(node_of(kind, layer, index, position, [label]))
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


def spans_of(
    positions: Mapping[str, Bool[Tensor, "batch pos"]], names: tuple[str, ...]
) -> Int[Tensor, "batch pos"]:
    """Return for each position of each prompt the place in `names` of the span that holds it.

    The first of several spans wins. Positions outside all spans get 0, the place of the rest.
    """
    assert names[0] == REST
    first = next(iter(positions.values()))
    result = torch.zeros(first.shape, dtype=torch.long)
    for number in range(len(names) - 1, 0, -1):
        result[positions[names[number]].cpu()] = number
    return result
