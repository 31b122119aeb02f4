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
from functools import cached_property, lru_cache, partial
from typing import Any

import numpy as np
import pandas
import torch
from torch import Tensor

from circuits.attribution.feature_graph import (
    EMBEDDING,
    FEATURE,
    TARGET,
    FeatureGraph,
    check_is_feature_graph,
    edge_columns,
)
from circuits.attribution.influence import edge_influence, node_influence, prune

N_CACHED_VIEWS = 16
NO_ROWS = np.empty(0, dtype=int)
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
        check_is_feature_graph(graph)
        return GraphData(graph.to("cpu"))

    @cached_property
    def nodes(self) -> pandas.DataFrame:
        """The nodes by number, with their influence on the targets and their rank by it."""
        graph = self.graph
        influences = node_influence(graph)
        nodes = _frame(**vars(graph.nodes), influence=influences)
        nodes.insert(0, "id", nodes.index)
        names = [str(graph.node(number)) for number in nodes.index]
        # Objects, because the text type of pandas refuses lone surrogates.
        nodes.insert(1, "name", pandas.Series(names, dtype=object))
        # A weight that is not finite makes influences NaN; they rank last.
        influence = nodes["influence"].fillna(-math.inf)
        ranks = influence.mul(-1).rank(method="first")
        return nodes.assign(rank=ranks.astype(int))

    @cached_property
    def edges(self) -> pandas.DataFrame:
        """The edges, with the influence that flows along them."""
        graph = self.graph
        return _frame(
            source=graph.source,
            target=graph.target,
            weight=graph.weight,
            direct=graph.direct,
            influence=edge_influence(graph),
        )

    @cached_property
    def names(self) -> list[str]:
        """Names of the nodes."""
        return self.nodes["name"].tolist()

    @cached_property
    def numbers(self) -> dict[str, int]:
        """Numbers of the nodes by name."""
        return dict(zip(self.names, self.nodes.index, strict=True))

    # A browser stores a reader's groups under the digest, so that groups made with one graph are
    # not shown with another.
    @cached_property
    def digest(self) -> str:
        """Hash of the graph's content."""
        graph = self.graph
        targets = list(map(asdict, graph.targets))
        content = [graph.words, targets, graph.n_layers]
        texts = json.dumps(content).encode()
        digest = hashlib.blake2b(texts, digest_size=12)
        nodes = vars(graph.nodes).values()
        for column in (*nodes, *edge_columns(graph), graph.tokens):
            data = column.contiguous().view(torch.uint8)
            digest.update(data.numpy())
        return digest.hexdigest()

    def about(self) -> JsonObject:
        """Describe the whole graph."""
        graph = self.graph
        influence = self.nodes["influence"].sum(skipna=False)
        return {
            "digest": self.digest,
            "words": graph.words,
            "targets": list(map(asdict, graph.targets)),
            "n_layers": graph.n_layers,
            "constant_names": graph.constant_names,
            "total": {
                "nodes": len(graph.nodes),
                "edges": len(graph),
                "influence": _json_value(influence),
            },
        }

    def held(self, max_nodes: int, max_edges: int) -> JsonObject:
        """Return what a page without a server holds: the most influential nodes and edges."""
        held = self._most_influential(self.nodes, self.edges, max_nodes, max_edges)
        ids = held["nodes"]["id"]
        constants = map(_json_values, self.graph.constants[ids])
        return {**held, "constants": list(constants)}

    def view(
        self, node_threshold: float, edge_threshold: float, max_nodes: int, max_edges: int
    ) -> JsonObject:
        """Return the most influential of the nodes and edges that `prune` keeps, and its counts.

        Raises:
            InputError: a threshold is not between 0 and 1.
        """
        kept = prune(self.graph, node_threshold=node_threshold, edge_threshold=edge_threshold)
        nodes = self.nodes[kept.nodes.numpy()]
        edges = self.edges[kept.edges.numpy()]
        view = self._most_influential(nodes, edges, max_nodes, max_edges)
        view["kept"] = {"nodes": len(nodes), "edges": len(edges)}
        return view

    @cached_property
    def cached_view(self) -> Callable[..., JsonObject]:
        """`view` with a cache of the latest answers."""
        return lru_cache(N_CACHED_VIEWS)(self.view)

    def around(self, numbers: Sequence[int], n: int) -> JsonObject:
        """Return the `n` strongest edges into and out of a node, or of several taken as one."""
        # Weights between these nodes and another node are summed.
        # Edges between the chosen nodes are inside of the whole, and not listed.
        entering = self._edges_with("target", numbers)
        leaving = self._edges_with("source", numbers)
        comes_from_outside = ~entering["source"].isin(numbers)
        goes_outside = ~leaving["target"].isin(numbers)
        incoming = self._ends("source", entering[comes_from_outside], n)
        outgoing = self._ends("target", leaving[goes_outside], n)
        others = {*incoming["node"], *outgoing["node"]}
        constants = self.graph.constants[sorted(set(numbers))]
        return {
            "incoming": incoming,
            "outgoing": outgoing,
            "constants": _json_values(constants.sum(0)),
            "nodes": self.node_table(sorted(others)),
        }

    def between(self, numbers: Sequence[int], n: int) -> JsonObject:
        """Return the `n` strongest edges between some nodes."""
        leaving = self._edges_with("source", numbers)
        stays_inside = leaving["target"].isin(numbers)
        return _table(_strongest(leaving[stays_inside], n))

    def search(self, text: str, n: int) -> JsonObject:
        """Return the `n` nodes that match a text best, and how many match.

        The best match is a name, then the start of a name, the token or label of the node itself,
        a part of a name, and last the token at a feature's position.
        """
        wanted = text.strip().lower()
        quality = self._match_quality(wanted)
        # Equally good matches are sorted by influence.
        matching = self.nodes.assign(quality=quality).dropna(subset="quality")
        found = matching.sort_values(["quality", "rank"])
        best = found["id"].head(n).tolist()
        return {"nodes": self.node_table(best), "found": len(found)}

    def _match_quality(self, wanted: str) -> np.ndarray:
        """Number the kinds of matches, the best 0; NaN where nothing matches."""
        kind = self.nodes["kind"]
        names = self._lower_names
        # Plain Python is faster here than the text methods of pandas.
        as_mask = partial(np.fromiter, dtype=bool)
        in_text = as_mask(wanted in text for text in self._lower_texts)
        matches = [
            as_mask(name == wanted for name in names),
            as_mask(name.startswith(wanted) for name in names),
            in_text & kind.isin([TARGET, EMBEDDING]),
            as_mask(wanted in name for name in names),
            in_text & (kind == FEATURE),
        ]
        quality = np.select(matches, range(len(matches)), np.nan)
        return np.where(wanted != "", quality, np.nan)

    def node_table(self, numbers: list[int]) -> JsonObject:
        """Return the table of some nodes."""
        return _table(self.nodes.loc[numbers])

    @cached_property
    def _lower_names(self) -> list[str]:
        return [name.lower() for name in self.names]

    @cached_property
    def _lower_texts(self) -> list[str]:
        """Labels of targets, and for other nodes the token at their position."""
        graph, nodes = self.graph, self.nodes
        texts = []
        for kind, position, index in zip(
            nodes["kind"], nodes["position"], nodes["index"], strict=True
        ):
            text = graph.targets[index].label if kind == TARGET else graph.words[position]
            texts.append(text.lower())
        return texts

    def _most_influential(
        self, nodes: pandas.DataFrame, edges: pandas.DataFrame, max_nodes: int, max_edges: int
    ) -> JsonObject:
        """Return tables of the most influential of some nodes, and of the edges between them."""
        # Embeddings and targets always stay, whatever `max_nodes` is.
        is_end = nodes["kind"].isin([EMBEDDING, TARGET])
        ends, others = nodes[is_end], nodes[~is_end]
        n_others = max(0, max_nodes - len(ends))
        others = others.nlargest(n_others, "influence")
        kept = pandas.concat([ends, others])
        kept = kept.sort_index()
        # An edge can be shown only if both of its ends are.
        leaves = edges["source"].isin(kept.index)
        enters = edges["target"].isin(kept.index)
        inside = edges[leaves & enters]
        kept_edges = inside.nlargest(max_edges, "influence").sort_index()
        return {"nodes": _table(kept), "edges": _table(kept_edges)}

    # A large graph has millions of edges, too many to search at every request.
    @cached_property
    def _rows_by_node(self) -> dict[str, dict[Any, np.ndarray]]:
        """The rows of the edges by the node at each end."""
        return {end: self.edges.groupby(end).indices for end in ("source", "target")}

    def _edges_with(self, end: str, numbers: Sequence[int]) -> pandas.DataFrame:
        """Return the edges with one of some nodes at an end, in graph order."""
        by_node = self._rows_by_node[end]
        rows = [by_node[number] for number in set(numbers) if number in by_node]
        in_order = np.sort(np.concatenate([NO_ROWS, *rows]))
        return self.edges.iloc[in_order]

    def _ends(self, end: str, edges: pandas.DataFrame, n: int) -> JsonObject:
        """Sum the weights of some edges by their ends; return the `n` strongest of these nodes."""
        numbers, groups = np.unique(edges[end], return_inverse=True)
        # Unlike pandas, a sum with a weight that is NaN is NaN.
        sums = {name: np.bincount(groups, edges[name]) for name in ("weight", "direct")}
        nodes = pandas.DataFrame({"node": numbers, **sums})
        strongest = _strongest(nodes, n)
        return {**_table(strongest), "total": len(nodes)}


def _frame(**columns: Tensor) -> pandas.DataFrame:
    """Make a data frame with floats in double precision, because numpy has no bfloat16."""
    frame = pandas.DataFrame()
    for name, column in columns.items():
        exact = column.double() if column.is_floating_point() else column
        frame[name] = exact.numpy()
    return frame


def _strongest(edges: pandas.DataFrame, n: int) -> pandas.DataFrame:
    by_strength = edges.sort_values("weight", key=abs, ascending=False, kind="stable")
    return by_strength.head(n)


def _table(frame: pandas.DataFrame) -> JsonObject:
    return {name: _json_values(column) for name, column in frame.items()}


def _json_values(column: Tensor | pandas.Series) -> list[Any]:
    return list(map(_json_value, column.tolist()))


def _json_value(value: Any) -> Any:
    # Seven digits are the precision of float32. JSON has no numbers for NaN and infinity.
    if not isinstance(value, float):
        return value
    return float(f"{value:.7g}") if math.isfinite(value) else None
