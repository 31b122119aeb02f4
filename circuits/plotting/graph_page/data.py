"""What the page of an attribution graph is told, in JSON values: nodes and edges as columns, only the strongest where there is a limit."""

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

from circuits.attribution.feature_graph import EMBEDDING, FEATURE, TARGET, FeatureGraph
from circuits.attribution.influence import edge_influence, node_influence, prune

REMEMBERED_VIEWS = 16

Columns = dict[str, Any]
"""Lists of one length by name."""


@dataclass(frozen=True, eq=False)
class GraphData:
    """A graph and what its page asks for. Nodes go by their numbers in the graph, and by their names where people read or files remember them.

    Attributes:
        graph: on the CPU.
        influence: of each node.
        along: influence along each edge.
    """

    graph: FeatureGraph
    influence: Float[Tensor, " node"]
    along: Float[Tensor, " edge"]

    @staticmethod
    def of(graph: FeatureGraph) -> GraphData:
        """A graph with its influence computed."""
        graph = graph.to("cpu")
        return GraphData(graph, node_influence(graph), edge_influence(graph))

    @cached_property
    def names(self) -> list[str]:
        """The text of every node."""
        return [str(self.graph.node(number)) for number in range(len(self.graph.nodes))]

    @cached_property
    def numbers(self) -> dict[str, int]:
        """The nodes' numbers by their names."""
        return {name: number for number, name in enumerate(self.names)}

    @cached_property
    def digest(self) -> str:
        """Of everything that is in the graph, so that what a reader did with one graph is not shown with another."""
        graph = self.graph
        parts = [
            *vars(graph.nodes).values(),
            graph.source,
            graph.target,
            graph.weight,
            graph.direct,
            graph.tokens,
        ]
        digest = hashlib.blake2b(
            json.dumps(
                [graph.words, [asdict(one) for one in graph.targets], graph.n_layers]
            ).encode(),
            digest_size=12,
        )
        for part in parts:
            digest.update(part.contiguous().flatten().view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()

    def about(self) -> dict[str, Any]:
        """What holds of the whole graph."""
        graph = self.graph
        return {
            "digest": self.digest,
            "words": list(graph.words),
            "targets": [asdict(target) for target in graph.targets],
            "n_layers": graph.n_layers,
            "constant_names": list(graph.constant_names),
            "total": {
                "nodes": len(graph.nodes),
                "edges": len(graph),
                "influence": _values(self.influence.sum()[None])[0],
            },
        }

    def held(self, max_nodes: int, max_edges: int) -> dict[str, Any]:
        """What a page without a server works on: the most influential nodes, and the most influential edges between them."""
        kept = self._most_influential(
            torch.ones(len(self.graph.nodes), dtype=torch.bool), max_nodes
        )
        edges = self._edges_between(kept, torch.ones(len(self.graph), dtype=torch.bool), max_edges)
        nodes = kept.nonzero().flatten()
        constants = [_values(row) for row in self.graph.constants[nodes]]
        return {
            "nodes": self.columns(nodes),
            "edges": self._edge_columns(edges),
            "constants": constants,
        }

    def view(
        self, node_threshold: float, edge_threshold: float, max_nodes: int, max_edges: int
    ) -> dict[str, Any]:
        """What `prune` keeps, of that the most influential nodes and edges; and how many are kept.

        Raises:
            InputError: a threshold is not between 0 and 1.
        """
        kept = prune(self.graph, node_threshold=node_threshold, edge_threshold=edge_threshold)
        nodes = self._most_influential(kept.nodes, max_nodes)
        edges = self._edges_between(nodes, kept.edges, max_edges)
        counts = {"nodes": int(kept.nodes.sum()), "edges": int(kept.edges.sum())}
        return {
            "nodes": self.columns(nodes.nonzero().flatten()),
            "edges": self._edge_columns(edges),
            "kept": counts,
        }

    @cached_property
    def remembered_view(self) -> Callable[..., dict[str, Any]]:
        """`view`, the latest answers remembered."""
        return lru_cache(REMEMBERED_VIEWS)(self.view)

    def around(self, numbers: Sequence[int], most: int) -> dict[str, Any]:
        """The strongest edges into and out of a node, or of several nodes taken as one: weights between them and another node are summed."""
        chosen = torch.tensor(numbers, dtype=torch.long)
        inside = torch.zeros(len(self.graph.nodes), dtype=torch.bool).index_fill_(0, chosen, True)
        incoming = self._ends(_ranges(self.graph.target, numbers), self.graph.source, inside, most)
        outgoing = self._ends(
            self._by_source[_ranges(self._sources, numbers)], self.graph.target, inside, most
        )
        others = torch.tensor([*incoming["node"], *outgoing["node"]], dtype=torch.long).unique()
        constants = _values(self.graph.constants[chosen].sum(0))
        return {
            "incoming": incoming,
            "outgoing": outgoing,
            "constants": constants,
            "nodes": self.columns(others),
        }

    def between(self, numbers: Sequence[int], most: int) -> Columns:
        """The strongest edges between some nodes."""
        inside = torch.zeros(len(self.graph.nodes), dtype=torch.bool).index_fill_(
            0, torch.tensor(numbers, dtype=torch.long), True
        )
        edges = (inside[self.graph.source] & inside[self.graph.target]).nonzero().flatten()
        order = torch.argsort(self.graph.weight[edges].abs(), descending=True, stable=True)[:most]
        return self._edge_columns(edges[order])

    def search(self, text: str, most: int) -> dict[str, Any]:
        """Nodes that a text names or whose token or label holds it, best first; and how many there are."""
        wanted = text.strip().lower()
        fits = [
            (fit, -influence, number)
            for number, influence in enumerate(self.influence.tolist())
            if (fit := self._fit(number, wanted))
        ]
        fits = sorted(fits) if wanted else []
        found = torch.tensor([number for _, _, number in fits[:most]], dtype=torch.long)
        return {"nodes": self.columns(found), "found": len(fits)}

    def columns(self, numbers: Int[Tensor, " some"]) -> Columns:
        """Nodes as columns."""
        nodes = self.graph.nodes[numbers]
        values = {name: _values(column) for name, column in vars(nodes).items()}
        names = [self.names[number] for number in numbers.tolist()]
        more = {"influence": _values(self.influence[numbers]), "rank": self._rank[numbers].tolist()}
        return {"id": numbers.tolist(), "name": names, **values, **more}

    @cached_property
    def _rank(self) -> Int[Tensor, " node"]:
        order = torch.argsort(self.influence, descending=True, stable=True)
        return torch.empty_like(order).index_copy_(0, order, torch.arange(1, len(order) + 1))

    @cached_property
    def _by_source(self) -> Int[Tensor, " edge"]:
        return torch.argsort(self.graph.source, stable=True)

    @cached_property
    def _sources(self) -> Int[Tensor, " edge"]:
        return self.graph.source[self._by_source]

    @cached_property
    def _texts(self) -> list[tuple[str, str, bool]]:
        """For searching: the name, the text of the token or target, and whether that is the node's own rather than its position's."""
        nodes, words = self.graph.nodes, self.graph.words
        texts = []
        for name, kind, position, index in zip(
            self.names,
            nodes.kind.tolist(),
            nodes.position.tolist(),
            nodes.index.tolist(),
            strict=True,
        ):
            text = self.graph.targets[index].label if kind == TARGET else words[position]
            texts.append((name.lower(), text.lower(), kind in (TARGET, EMBEDDING)))
        return texts

    def _fit(self, number: int, wanted: str) -> int:
        """How well a node fits a text: 1 best, 0 not at all."""
        name, text, own = self._texts[number]
        if name.startswith(wanted):
            return 1 if name == wanted else 2
        if wanted in text and own:
            return 3
        if wanted in name:
            return 4
        return 5 if wanted in text and int(self.graph.nodes.kind[number]) == FEATURE else 0

    def _most_influential(self, kept: Bool[Tensor, " node"], most: int) -> Bool[Tensor, " node"]:
        """Of some nodes the most influential; embeddings and targets always stay, for they are what the picture hangs on."""
        always = self.graph.is_kind(EMBEDDING, TARGET)
        others = (kept & ~always).nonzero().flatten()
        order = torch.argsort(self.influence[others], descending=True, stable=True)
        return (kept & always).index_fill(
            0, others[order[: max(0, most - int((kept & always).sum()))]], True
        )

    def _edges_between(
        self, nodes: Bool[Tensor, " node"], edges: Bool[Tensor, " edge"], most: int
    ) -> Int[Tensor, " some"]:
        """The most influential of some edges between some nodes, in the graph's order."""
        among = (edges & nodes[self.graph.source] & nodes[self.graph.target]).nonzero().flatten()
        most = min(most, len(among))
        return among[torch.topk(self.along[among], most).indices].sort().values

    def _edge_columns(self, edges: Int[Tensor, " some"]) -> Columns:
        graph = self.graph
        ends = {"source": graph.source[edges].tolist(), "target": graph.target[edges].tolist()}
        return {**ends, **{name: _values(column[edges]) for name, column in self._measures.items()}}

    @property
    def _measures(self) -> dict[str, Tensor]:
        return {"weight": self.graph.weight, "direct": self.graph.direct, "influence": self.along}

    def _ends(
        self,
        edges: Int[Tensor, " some"],
        other: Int[Tensor, " edge"],
        inside: Bool[Tensor, " node"],
        most: int,
    ) -> Columns:
        """The other ends of some edges, strongest first, with the weights that lead there."""
        edges = edges[~inside[other[edges]]]
        ends, place = other[edges].unique(return_inverse=True)
        weight, direct = (
            torch.zeros(len(ends)).index_add_(0, place, column[edges].float())
            for column in (self.graph.weight, self.graph.direct)
        )
        order = torch.argsort(weight.abs(), descending=True, stable=True)[:most]
        return {
            "node": ends[order].tolist(),
            "weight": _values(weight[order]),
            "direct": _values(direct[order]),
            "total": len(ends),
        }


def _ranges(column: Int[Tensor, " edge"], numbers: Sequence[int]) -> Int[Tensor, " some"]:
    """The places of some numbers in a sorted column."""
    wanted = torch.tensor(sorted(set(numbers)), dtype=column.dtype)
    first, last = torch.searchsorted(column, wanted), torch.searchsorted(column, wanted, right=True)
    return torch.cat(
        [
            torch.arange(start, stop)
            for start, stop in zip(first.tolist(), last.tolist(), strict=True)
        ]
    )


def _values(column: Tensor) -> list[Any]:
    """A column as JSON values: floats as precise as float32 is, None for what JSON has no number for."""
    if not column.is_floating_point():
        return list(column.tolist())
    return [float(f"{value:.7g}") if math.isfinite(value) else None for value in column.tolist()]
