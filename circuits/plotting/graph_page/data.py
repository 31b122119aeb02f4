"""What the page of an attribution graph shows, as JSON values.

Nodes and edges are tables: lists of one length by column name. Where there is a limit, the
strongest or most influential ones are returned.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property, lru_cache
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from circuits.attribution.feature_graph import (
    EMBEDDING,
    FEATURE,
    TARGET,
    EdgeMask,
    EdgeNumbers,
    EdgeScores,
    FeatureGraph,
    NodeMask,
    NodeScores,
)
from circuits.attribution.influence import edge_influence, node_influence, prune

N_CACHED_VIEWS = 16

JsonObject = dict[str, Any]


@dataclass(frozen=True, eq=False)
class GraphData:
    """An attribution graph on the CPU, and the queries of its page.

    A node has a number, its index in the graph, and a name, its text.
    """

    graph: FeatureGraph

    @staticmethod
    def of(graph: FeatureGraph) -> GraphData:
        """Move a graph to the CPU."""
        return GraphData(graph.to("cpu"))

    @cached_property
    def influence(self) -> NodeScores:
        """Influence of each node on the targets."""
        return node_influence(self.graph)

    @cached_property
    def edge_influence(self) -> EdgeScores:
        """Influence that flows along each edge."""
        return edge_influence(self.graph)

    @cached_property
    def names(self) -> list[str]:
        """Names of the nodes."""
        return [str(self.graph.node(number)) for number in range(len(self.graph.nodes))]

    @cached_property
    def numbers(self) -> dict[str, int]:
        """Numbers of the nodes by name."""
        return {name: number for number, name in enumerate(self.names)}

    # A browser stores a reader's groups under the digest, so that groups made with one graph are
    # not shown with another.
    @cached_property
    def digest(self) -> str:
        """Hash of the graph's content."""
        graph = self.graph
        targets = [asdict(target) for target in graph.targets]
        texts = json.dumps([graph.words, targets, graph.n_layers])
        digest = hashlib.blake2b(texts.encode(), digest_size=12)
        edges = (graph.source, graph.target, graph.weight, graph.direct)
        for column in (*vars(graph.nodes).values(), *edges, graph.tokens):
            digest.update(column.contiguous().view(torch.uint8).numpy())
        return digest.hexdigest()

    def about(self) -> JsonObject:
        """Describe the whole graph."""
        graph = self.graph
        total = {
            "nodes": len(graph.nodes),
            "edges": len(graph),
            "influence": _values(self.influence.sum()[None])[0],
        }
        return {
            "digest": self.digest,
            "words": list(graph.words),
            "targets": [asdict(target) for target in graph.targets],
            "n_layers": graph.n_layers,
            "constant_names": list(graph.constant_names),
            "total": total,
        }

    def held(self, max_nodes: int, max_edges: int) -> JsonObject:
        """Return what a page without a server holds: the most influential nodes and edges."""
        every_node = torch.ones(len(self.graph.nodes), dtype=torch.bool)
        every_edge = torch.ones(len(self.graph), dtype=torch.bool)
        held = self._most_influential(every_node, every_edge, max_nodes, max_edges)
        constants = self.graph.constants[held["nodes"]["id"]]
        return {**held, "constants": [_values(row) for row in constants]}

    def view(
        self, node_threshold: float, edge_threshold: float, max_nodes: int, max_edges: int
    ) -> JsonObject:
        """Return the most influential of the nodes and edges that `prune` keeps, and its counts.

        Raises:
            InputError: a threshold is not between 0 and 1.
        """
        kept = prune(self.graph, node_threshold=node_threshold, edge_threshold=edge_threshold)
        counts = {"nodes": int(kept.nodes.sum()), "edges": int(kept.edges.sum())}
        view = self._most_influential(kept.nodes, kept.edges, max_nodes, max_edges)
        return {**view, "kept": counts}

    @cached_property
    def cached_view(self) -> Callable[..., JsonObject]:
        """`view` with a cache of the latest answers."""
        return lru_cache(N_CACHED_VIEWS)(self.view)

    def around(self, numbers: Sequence[int], n: int) -> JsonObject:
        """Return the `n` strongest edges into and out of a node, or of several taken as one.

        Weights between these nodes and another node are summed.
        """
        # Edges between the chosen nodes are inside of the whole, and not listed.
        source, target = self.graph.source, self.graph.target
        inside = self._mask(numbers)
        incoming = self._ends(source, inside[target] & ~inside[source], n)
        outgoing = self._ends(target, inside[source] & ~inside[target], n)
        others = {*incoming["node"], *outgoing["node"]}
        return {
            "incoming": incoming,
            "outgoing": outgoing,
            "constants": _values(self.graph.constants[inside].sum(0)),
            "nodes": self.node_table(sorted(others)),
        }

    def between(self, numbers: Sequence[int], n: int) -> JsonObject:
        """Return the `n` strongest edges between some nodes."""
        inside = self._mask(numbers)
        edges = inside[self.graph.source] & inside[self.graph.target]
        return self._edge_table(_largest(self.graph.weight.abs(), edges, n))

    def search(self, text: str, n: int) -> JsonObject:
        """Return the `n` nodes that match a text best, and how many match.

        The best match is a name, then the start of a name, the token or label of the node itself,
        a part of a name, and last the token at a feature's position.
        """
        wanted = text.strip().lower()
        found = []
        for number, (name, own, nearby) in enumerate(self._search_texts):
            matches = (
                name == wanted,
                name.startswith(wanted),
                wanted in own,
                wanted in name,
                wanted in nearby,
            )
            if wanted and any(matches):
                # Equally good matches are sorted by influence.
                found.append((matches.index(True), self._ranks[number], number))
        numbers = [number for *_, number in sorted(found)[:n]]
        return {"nodes": self.node_table(numbers), "found": len(found)}

    def node_table(self, numbers: list[int]) -> JsonObject:
        """Return the table of some nodes."""
        rows = torch.tensor(numbers, dtype=torch.long)
        columns = vars(self.graph.nodes[rows]) | {"influence": self.influence[rows]}
        return {
            "id": numbers,
            "name": [self.names[number] for number in numbers],
            **{name: _values(column) for name, column in columns.items()},
            "rank": [self._ranks[number] for number in numbers],
        }

    @cached_property
    def _ranks(self) -> list[int]:
        """Rank of each node by influence, from 1."""
        order = self.influence.argsort(descending=True, stable=True)
        return (order.argsort() + 1).tolist()

    @cached_property
    def _search_texts(self) -> list[tuple[str, str, str]]:
        """The name, the token or label, and for features the token nearby, of each node."""
        graph, nodes = self.graph, self.graph.nodes
        columns = (nodes.kind, nodes.position, nodes.index)
        rows = zip(self.names, *(column.tolist() for column in columns), strict=True)
        texts = []
        for name, kind, position, index in rows:
            text = graph.targets[index].label if kind == TARGET else graph.words[position]
            own = text if kind in (EMBEDDING, TARGET) else ""
            nearby = text if kind == FEATURE else ""
            texts.append((name.lower(), own.lower(), nearby.lower()))
        return texts

    def _mask(self, numbers: Sequence[int]) -> NodeMask:
        mask = torch.zeros(len(self.graph.nodes), dtype=torch.bool)
        mask[list(numbers)] = True
        return mask

    def _most_influential(
        self, nodes: NodeMask, edges: EdgeMask, max_nodes: int, max_edges: int
    ) -> JsonObject:
        """Return tables of the most influential of some nodes, and of the edges between them.

        Embeddings and targets always stay, whatever `max_nodes` is.
        """
        ends = self.graph.is_kind(EMBEDDING, TARGET)
        n_others = max(0, max_nodes - int((nodes & ends).sum()))
        kept = nodes & ends
        kept[_largest(self.influence, nodes & ~ends, n_others)] = True
        # An edge can be shown only if both of its ends are.
        inside = edges & kept[self.graph.source] & kept[self.graph.target]
        kept_edges = _largest(self.edge_influence, inside, max_edges).sort().values
        return {
            "nodes": self.node_table(kept.nonzero().flatten().tolist()),
            "edges": self._edge_table(kept_edges),
        }

    def _edge_table(self, edges: EdgeNumbers) -> JsonObject:
        names = ("source", "target", "weight", "direct")
        columns = {name: getattr(self.graph, name) for name in names}
        columns["influence"] = self.edge_influence
        return {name: _values(column[edges]) for name, column in columns.items()}

    def _ends(self, ends: EdgeNumbers, edges: EdgeMask, n: int) -> JsonObject:
        """Sum the weights of some edges by their ends; return the `n` strongest of these nodes."""
        nodes, place = ends[edges].unique(return_inverse=True)
        weight, direct = (
            torch.zeros(len(nodes)).index_add_(0, place, column[edges].float())
            for column in (self.graph.weight, self.graph.direct)
        )
        order = torch.argsort(weight.abs(), descending=True, stable=True)[:n]
        return {
            "node": nodes[order].tolist(),
            "weight": _values(weight[order]),
            "direct": _values(direct[order]),
            "total": len(nodes),
        }


def _largest(
    values: Float[Tensor, " n"], among: Bool[Tensor, " n"], count: int
) -> Int[Tensor, " k"]:
    """Return the indices of the largest values, largest first."""
    candidates = among.nonzero().flatten()
    largest = torch.topk(values[candidates], min(count, len(candidates)))
    return candidates[largest.indices]


def _values(column: Tensor) -> list[Any]:
    # Seven digits are the precision of float32. JSON has no numbers for NaN and infinity.
    values: list[Any] = column.tolist()
    if not column.is_floating_point():
        return values
    return [float(f"{value:.7g}") if math.isfinite(value) else None for value in values]
