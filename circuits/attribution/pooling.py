"""From the attribution graphs of many prompts to one circuit: nodes pooled by feature, and by named position where there is one.

An edge's score is the fall of what is explained that its ablation predicts in the local linear model: its weight, times what a unit of its target's
pre-activation adds to the explained logits over all paths below the frozen attention. Scores are summed within a prompt and averaged over scored
rows. With a budget, paths through features outside it are not known and not counted.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from circuits.attribution.feature_graph import FEATURE, FeatureGraph
from circuits.graph.edges import NO_SLOT
from circuits.graph.graph import Graph, PooledFeatureGraph
from circuits.graph.identity import ModelIdentity, TranscodersIdentity
from circuits.graph.nodes import Error, Feature, Logits, Node, TokenEmbed
from circuits.models.component_graph import REST

ANYWHERE = -1


def effects(graph: FeatureGraph) -> tuple[Float[Tensor, " node"], Float[Tensor, " edge"]]:
    """What each node, and each edge, adds to the explained numbers, weighted by their probabilities, over all paths of the linear model."""
    nodes = graph.nodes
    # By how much the explained numbers grow with a node's pre-activation; what is active grows with it one for one.
    slope = nodes.probability.double()
    total = torch.zeros_like(slope)
    weight, edges = (
        graph.weight.double(),
        torch.zeros(len(graph), dtype=torch.double, device=graph.weight.device),
    )
    for start, stop in graph.levels():
        first, last = torch.searchsorted(
            graph.target, torch.tensor([start, stop], device=graph.target.device)
        ).tolist()
        here = slice(start, stop)
        features = nodes.kind[here] == FEATURE
        slope[here] = torch.where(
            features, total[here] / nodes.activation[here].double(), slope[here]
        )
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
    scores: Float[Tensor, " edge"]
    keeping: Int[Tensor, " edge"]

    @staticmethod
    def nothing() -> Pooled:
        """No graph yet."""
        empty = torch.zeros(0, dtype=torch.long)
        return Pooled(empty.view(0, 4), empty.view(0, 2), torch.zeros(0, dtype=torch.double), empty)

    @staticmethod
    def of(
        graph: FeatureGraph,
        kept: Bool[Tensor, " edge"],
        spans: Int[Tensor, " pos"] | None,
        *,
        kept_only: bool = False,
    ) -> Pooled:
        """One prompt's graph.

        Args:
            kept: the edges of its pruned graph.
            spans: the number of the span each position belongs to; None pools over positions.
            kept_only: leave the other edges out.
        """
        _, scores = effects(graph)
        chosen = kept if kept_only else torch.ones_like(kept)
        columns = (graph.source[chosen], graph.target[chosen], scores[chosen], kept[chosen].long())
        source, target, scores, keeping = (column.cpu() for column in columns)
        nodes = graph.to("cpu").nodes
        # A token is pooled with other tokens at its place; errors have no number.
        index = torch.where(nodes.kind == FEATURE, nodes.index, 0)
        span = torch.full_like(index, ANYWHERE) if spans is None else spans[nodes.position]
        keys, place = torch.stack([nodes.kind, nodes.layer, index, span], 1).unique(
            dim=0, return_inverse=True
        )
        one = Pooled(keys, torch.stack([place[source], place[target]], 1), scores, keeping)
        # A prompt counts once, however many instances of an edge it keeps.
        pooled = Pooled.together([one])
        return replace(pooled, keeping=pooled.keeping.clamp(max=1))

    @staticmethod
    def together(parts: Sequence[Pooled]) -> Pooled:
        """Several of them as one: scores and counts are summed."""
        every, place = torch.cat([part.nodes for part in parts]).unique(dim=0, return_inverse=True)
        starts = torch.tensor([0, *(len(part.nodes) for part in parts)]).cumsum(0).tolist()
        flat = torch.cat(
            [
                _flat(place[start:][part.edges], len(every))
                for part, start in zip(parts, starts, strict=False)
            ]
        )
        edges, where = flat.unique(return_inverse=True)
        scores = torch.zeros(len(edges), dtype=torch.double).index_add_(
            0, where, torch.cat([part.scores for part in parts])
        )
        keeping = torch.zeros(len(edges), dtype=torch.long).index_add_(
            0, where, torch.cat([part.keeping for part in parts])
        )
        return Pooled(
            every, torch.stack([edges // len(every), edges % len(every)], 1), scores, keeping
        )

    def graph(
        self,
        spans: tuple[str, ...] | None,
        label: str,
        model: ModelIdentity | None,
        transcoders: TranscodersIdentity,
    ) -> tuple[Graph, Int[Tensor, " edge"]]:
        """The pooled graph, in order of computation, and where each of its edges stands among `edges`."""
        kind, layer = self.nodes[:, 0], self.nodes[:, 1]
        # Embeddings have layer -1 and targets the number of layers; within a layer, features before the error. Sorts are stable.
        order = torch.argsort(layer * 4 + kind, stable=True)
        rank = torch.empty_like(order)
        rank[order] = torch.arange(len(order))
        named = [self._node(number, spans, label) for number in order.tolist()]
        source, target = rank[self.edges].unbind(1)
        place = torch.argsort(target * len(order) + source)
        graph = PooledFeatureGraph(
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


def _flat(edges: Int[Tensor, "edge 2"], n: int) -> Int[Tensor, " edge"]:
    """An edge as one number."""
    return edges[:, 0] * n + edges[:, 1]


def spans_of(
    positions: Mapping[str, Bool[Tensor, "batch pos"]], names: tuple[str, ...]
) -> Int[Tensor, "batch pos"]:
    """The number in `names` of the span that each position of each prompt belongs to: the first that holds it, or the rest, which is 0."""
    assert names[0] == REST
    first = next(iter(positions.values()))
    result = torch.zeros(first.shape, dtype=torch.long)
    for number, name in reversed(list(enumerate(names))[1:]):
        result[positions[name].cpu()] = number
    return result
