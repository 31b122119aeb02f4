"""From the attribution graphs of many prompts to one circuit: nodes pooled by feature, and by named position where there is one.

An edge's score is the fall of what is explained that its ablation predicts in the local linear model: its weight, times what a unit of its target's
pre-activation adds to the explained logits over all paths below the frozen attention. Scores are summed within a prompt and averaged over prompts.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from circuits.components import REST
from circuits.feature_graph import FEATURE, FeatureGraph
from circuits.graph import NO_SLOT, Graph, ModelIdentity, TranscodersIdentity
from circuits.nodes import Error, Feature, Logits, Node, TokenEmbed

ANYWHERE = -1


def effects(graph: FeatureGraph) -> tuple[Float[Tensor, "node"], Float[Tensor, "edge"]]:
    """What each node, and each edge, adds to the explained numbers, weighted by their probabilities, over all paths of the linear model."""
    nodes = graph.nodes
    # By how much the explained numbers grow with a node's pre-activation; what is active grows with it one for one.
    slope = nodes.probability.double()
    total = torch.zeros_like(slope)
    weight, edges = graph.weight.double(), torch.zeros(len(graph), dtype=torch.double, device=graph.weight.device)
    for start, stop in graph.levels():
        first, last = torch.searchsorted(graph.target, torch.tensor([start, stop], device=graph.target.device)).tolist()
        here = slice(start, stop)
        features = nodes.kind[here] == FEATURE
        slope[here] = torch.where(features, total[here] / nodes.activation[here].double(), slope[here])
        edges[first:last] = weight[first:last] * slope[graph.target[first:last]]
        total.index_add_(0, graph.source[first:last], edges[first:last])
    return total, edges


@dataclass(frozen=True, eq=False)
class Pooled:
    """What several prompts' graphs have in common so far.

    Attributes:
        nodes: a row of kind, layer, index and span per pooled node, sorted.
        edges: a row of source and target, sorted.
        scores: of each edge, summed over prompts.
        keeping: by how many prompts' pruned graphs each edge was kept.
    """

    nodes: Int[Tensor, "node 4"]
    edges: Int[Tensor, "edge 2"]
    scores: Float[Tensor, "edge"]
    keeping: Int[Tensor, "edge"]

    @staticmethod
    def nothing() -> Pooled:
        """No graph yet."""
        empty = torch.zeros(0, dtype=torch.long)
        return Pooled(empty.view(0, 4), empty.view(0, 2), torch.zeros(0, dtype=torch.double), empty)

    def with_graph(self, graph: FeatureGraph, kept: Bool[Tensor, "edge"], spans: Int[Tensor, "pos"] | None) -> Pooled:
        """These and one more prompt's.

        Args:
            kept: the edges of its pruned graph.
            spans: the number of the span each position belongs to; None pools over positions.
        """
        graph, (_, scores) = graph.to("cpu"), effects(graph)
        nodes = graph.nodes
        # A token is pooled with other tokens at its place; errors have no number.
        index = torch.where(nodes.kind == FEATURE, nodes.index, 0)
        span = torch.full_like(index, ANYWHERE) if spans is None else spans[nodes.position]
        keys = torch.stack([nodes.kind, nodes.layer, index, span], 1)
        every, place = torch.cat([self.nodes, keys]).unique(dim=0, return_inverse=True)
        before, here = place[: len(self.nodes)], place[len(self.nodes) :]
        edges = torch.cat([before[self.edges], torch.stack([here[graph.source], here[graph.target]], 1)])
        flat, where = (edges[:, 0] * len(every) + edges[:, 1]).unique(return_inverse=True)
        old, new = where[: len(self.edges)], where[len(self.edges) :]
        total = torch.zeros(len(flat), dtype=torch.double).index_add_(0, old, self.scores).index_add_(0, new, scores.cpu())
        keeping = torch.zeros(len(flat), dtype=torch.long).index_add_(0, old, self.keeping)
        keeping[new[kept.cpu()].unique()] += 1
        return Pooled(every, torch.stack([flat // len(every), flat % len(every)], 1), total, keeping)

    def graph(
        self, spans: tuple[str, ...] | None, label: str, model: ModelIdentity | None, transcoders: TranscodersIdentity | None
    ) -> tuple[Graph, Int[Tensor, "edge"]]:
        """The pooled graph, in order of computation, and where each of its edges stands among `edges`."""
        kind, layer = self.nodes[:, 0], self.nodes[:, 1]
        # Embeddings have layer -1 and targets the number of layers; within a layer, features before the error. Sorts are stable.
        order = torch.argsort(layer * 4 + kind, stable=True)
        rank = torch.empty_like(order)
        rank[order] = torch.arange(len(order))
        named = [self._node(number, spans, label) for number in order.tolist()]
        source, target = rank[self.edges].unbind(1)
        place = torch.argsort(target * len(order) + source)
        graph = Graph(
            nodes=tuple(named),
            source=source[place],
            target=target[place],
            slot=torch.full_like(place, NO_SLOT),
            positions=spans,
            model=model,
            transcoders=transcoders,
        )
        return graph, place

    def _node(self, number: int, spans: tuple[str, ...] | None, label: str) -> Node:
        kind, layer, index, span = self.nodes[number].tolist()
        position = None if spans is None else spans[span]
        match kind:
            case 0:
                return Feature(layer, index, position)
            case 1:
                return Error(layer, position)
            case 2:
                return TokenEmbed(position)
        return Logits(label, position)


def spans_of(positions: Mapping[str, Bool[Tensor, "batch pos"]], names: tuple[str, ...]) -> Int[Tensor, "batch pos"]:
    """The number in `names` of the span that each position of each prompt belongs to: the first that holds it, or the rest, which is 0."""
    assert names[0] == REST
    first = next(iter(positions.values()))
    result = torch.zeros(first.shape, dtype=torch.long)
    for number, name in reversed(list(enumerate(names))[1:]):
        result[positions[name].cpu()] = number
    return result
