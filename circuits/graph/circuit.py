"""Circuits: scores and kept edges over a graph, as values; methods return new ones."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from html import escape
from itertools import compress
from pathlib import Path
from typing import Any, Literal, get_args

import networkx
import pandas as pd
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from circuits.graph.edges import Edge, EdgesOrTexts
from circuits.graph.graph import (
    COLUMNS,
    Graph,
    NodesOrTexts,
    PooledFeatureGraph,
    by_edge,
    check_is_graph,
)
from circuits.graph.identity import ModelIdentity, TranscodersIdentity
from circuits.graph.nodes import Node, parse_node
from circuits.system.errors import InputError
from circuits.system.files import is_file, json_text, path_of, read_tensors, write_tensors
from circuits.system.kinds import expect, one_of
from circuits.system.numbers import (
    RealNumber,
    WholeNumber,
    python_number,
    real,
    shown,
    truth,
    whole,
)
from circuits.system.tensors import as_tensor

RankBy = Literal["magnitude", "signed"]

FILE = "circuit.safetensors"
FORMAT = "circuits.circuit"
FORMAT_VERSION = 1
ROWS_SHOWN = 10  # in a notebook


@dataclass(frozen=True, eq=False)
class Circuit:
    """A scored, chosen subset of a graph's edges.

    A circuit behaves like a collection of its kept edges: it has a length, can be iterated over,
    and tells whether it keeps an edge. `&`, `|` and `-` combine circuits over the same graph.

    Attributes:
        graph: which edges can exist.
        scores: the damage of ablating each edge, measured or predicted, mean over scored rows.
            Positive: the edge helps. NaN: the edge was never scored.
        kept: the chosen edges.
        selected: False if a method only scored the edges and kept them all, so that a size has yet
            to be chosen with `top` or `above`.
        record: how the circuit was found: method, settings and counts, as JSON values.

    >>> import circuits
    >>> graph = circuits.component_graph(circuits.load_model("toy-world"))
    >>> circuit = circuits.Circuit.from_edges(graph, ["a0.h1->m3", "m3->logits"])
    >>> circuit
    Circuit(2 of 479 edges)
    >>> "m3->logits" in circuit, [str(edge) for edge in circuit]
    (True, ['a0.h1->m3', 'm3->logits'])
    """

    graph: Graph
    scores: Float[Tensor, " edge"]
    kept: Bool[Tensor, " edge"]
    selected: bool = True
    record: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check_is_graph(self.graph)
        object.__setattr__(self, "selected", truth(self.selected, "selected"))
        expect(self.record, Mapping, "a dict as record", "leave it out")
        for name, dtype in (("scores", torch.float32), ("kept", torch.bool)):
            given = by_edge(self.graph, getattr(self, name), name)
            column = as_tensor(given, name).detach()
            if column.shape != (len(self.graph),):
                raise InputError(
                    f"{name} has shape {tuple(column.shape)}, but the graph has {len(self.graph)} "
                    "edges; give one entry per edge."
                )
            if name == "kept" and column.dtype != dtype:
                raise InputError(
                    f"kept holds {column.dtype}; it must be boolean, True for the edges to keep."
                )
            if column.is_complex():
                raise InputError(f"{name} holds {column.dtype}; give real numbers, such as .real.")
            # A copy, so that later changes to the tensor passed in do not change the circuit.
            copied = column.to("cpu", dtype, copy=True)
            object.__setattr__(self, name, copied)
            became_infinite = copied.isinf() & column.cpu().isfinite()
            if became_infinite.any():
                number = int(became_infinite.int().argmax())
                raise InputError(
                    f"{name} holds {float(column[number]):g} for {self.graph.edges[number]}, which "
                    f"is infinite in {dtype}; scale the scores down."
                )

    @staticmethod
    def full(
        graph: Graph, scores: Any = None, *, record: Mapping[str, Any] | None = None
    ) -> Circuit:
        """The circuit that keeps every edge: a whole model, or scores without a selection.

        Args:
            scores: one per edge, in graph order, or a series of pandas labelled by edges.

        Raises:
            InputError: there is not one real number per edge, or the labels of a series are those
                of other edges, or numbers in another order.
        """
        check_is_graph(graph)
        if scores is None:
            scores = _no_scores(graph)
        kept = torch.ones_like(graph.source, dtype=torch.bool)
        return Circuit(graph, scores, kept, selected=False, record={} if record is None else record)

    @staticmethod
    def from_edges(graph: Graph, edges: EdgesOrTexts) -> Circuit:
        """The circuit of exactly these edges, without scores.

        Raises:
            InputError: the graph lacks one of them.
        """
        check_is_graph(graph)
        kept = graph.mask(edges)
        return Circuit(graph, _no_scores(graph), kept)

    @staticmethod
    def from_nodes(graph: Graph, nodes: NodesOrTexts) -> Circuit:
        """The circuit of all edges between these nodes, without scores.

        Nothing is added to the nodes: without `embed` no edge comes from the input, and without
        `logits` none leads there. A node without a position stands for it at every position.

        Raises:
            InputError: the graph lacks one of them.

        >>> import circuits
        >>> graph = circuits.component_graph(circuits.load_model("toy-world"))
        >>> list(map(str, circuits.Circuit.from_nodes(graph, ["m0", "m3", circuits.Logits()])))
        ['m0->m3', 'm0->logits', 'm3->logits']
        """
        check_is_graph(graph)
        chosen = graph.node_mask(nodes)
        kept = chosen[graph.source] & chosen[graph.target]
        return Circuit(graph, _no_scores(graph), kept)

    def __len__(self) -> int:
        return int(self.kept.sum())

    def __iter__(self) -> Iterator[Edge]:
        return iter(self.edges)

    def __contains__(self, edge: Edge | str) -> bool:
        """Whether the circuit keeps `edge`."""
        graph = self.graph
        return edge in graph and bool(self.kept[graph.index(edge)])

    def __getitem__(self, edge: Edge | str) -> float:
        """The score of `edge`, kept or not; NaN if it was never scored.

        Raises:
            InputError: the graph has no such edge.
        """
        number = self.graph.index(edge)
        return float(self.scores[number])

    def __repr__(self) -> str:
        scored_only = "" if self.selected else ", scored only"
        return f"Circuit({len(self):,} of {len(self.graph):,} edges{scored_only})"

    def _repr_html_(self) -> str:
        strongest = self.strongest(ROWS_SHOWN)
        table = strongest.to_html(index=False)
        more = len(self) - len(strongest)
        rest = f"<p>... and {more:,} more edges</p>" if more else ""
        return f"<p><b>{escape(repr(self))}</b></p>{table}{rest}"

    def __eq__(self, other: object) -> bool:
        """Equal graphs, kept edges and scores, however the circuits were found."""
        if not isinstance(other, Circuit):
            return NotImplemented
        return (
            torch.equal(self.kept, other.kept)
            and torch.allclose(self.scores, other.scores, rtol=0, atol=0, equal_nan=True)
            and self.graph == other.graph
        )

    __hash__ = None  # type: ignore[assignment]

    @property
    def edges(self) -> tuple[Edge, ...]:
        """The kept edges, in graph order."""
        kept = self.kept.tolist()
        return tuple(compress(self.graph.edges, kept))

    @property
    def nodes(self) -> tuple[Node, ...]:
        """The nodes at either end of a kept edge, in order of computation.

        Nodes that only edges which the graph lacks lead to, or from, are not among them.
        """
        graph, kept = self.graph, self.kept
        ends = torch.cat([graph.source[kept], graph.target[kept]])
        numbers = ends.unique().tolist()
        return tuple(graph.nodes[number] for number in numbers)

    def top(self, n: WholeNumber, by: RankBy = "magnitude") -> Circuit:
        """The `n` kept edges of largest |score| (or largest score).

        Ties go to the first edge in graph order; edges without a score come last.

        Raises:
            InputError: `n` is no number of edges, or larger than that of the kept ones; or none of
                them has a score.
        """
        # 1.0 is the whole circuit where a size is a fraction, and would be a single edge here.
        if isinstance(python_number(n), float):
            raise InputError(f"top({shown(n)}): give a number of edges, such as {len(self) // 2}.")
        n = whole(n, "n")
        if not 0 <= n <= len(self):
            raise InputError(
                f"top({shown(n)}) of a circuit that keeps {len(self)} edges; "
                f"choose n between 0 and {len(self)}."
            )
        return self._choosing(self._ranked(by)[:n], self, "top")

    def greedy(self, n: WholeNumber, by: RankBy = "magnitude") -> Circuit:
        """`n` kept edges that all reach the logits, chosen as by EAP-IG's greedy search.

        Edges are added one at a time: the one of largest |score| (or largest score) among those
        whose target reaches the logits, along edges added before or edges that the graph lacks.
        Ties go to the first edge in graph order; edges without a score come last.

        Raises:
            InputError: `n` is negative or larger than the number of kept edges that can reach the
                logits; or none of them has a score; or the graph names no model.

        >>> import circuits, torch
        >>> graph = circuits.component_graph(circuits.load_model("toy-world"))
        >>> scores = torch.arange(len(graph), 0.0, -1)  # the first edge has the largest score
        >>> circuit = circuits.Circuit.full(graph, scores)
        >>> str(circuit.top(1).edges[0]), str(circuit.greedy(1).edges[0])
        ('embed->a0.h0.q', 'embed->logits')
        """
        n = whole(n, "n")
        ranked = self._ranked(by).tolist()
        chosen = self.graph.paths.grown(ranked, n) if n >= 0 else []
        reaching = self.connected()
        if len(chosen) != n:
            raise InputError(
                f"greedy({shown(n)}) of a circuit of which {len(reaching)} edges reach the logits; "
                f"choose n between 0 and {len(reaching)}."
            )
        return self._choosing(torch.tensor(chosen, dtype=torch.long), reaching, "greedy")

    def above(self, threshold: RealNumber, by: RankBy = "signed") -> Circuit:
        """The kept edges whose score is larger than `threshold`, or whose |score| is.

        Edges without a score are left out.

        Raises:
            InputError: `threshold` is no number, `by` is no way to rank edges, or no edge has a
                score.
        """
        threshold = real(threshold, "threshold")
        rank = self._rank(by)
        if len(self):
            self._check_scored(f"above({threshold})")
        kept = self.kept & (rank > threshold)
        return replace(self, kept=kept, selected=True)

    def connected(self, *, from_inputs: bool = False) -> Circuit:
        """The circuit without edges that cannot reach the logits, which never change its output.

        Paths lead along kept edges, along edges of the model that the graph lacks, which are never
        ablated, and, split by position, through attention: what a head reads at a position through
        k or v feeds its outputs there and later. In a graph of features they lead along kept edges
        only; such circuits are run by their nodes, so dropping the last edge of a node can change
        the output.

        Args:
            from_inputs: also drop edges that no path from an embedding reaches. That leaves the
                output unchanged only under resample ablation.

        Raises:
            InputError: the graph names no model, so that it is unknown which edges it lacks.
        """
        graph = self.graph
        from_inputs = truth(from_inputs, "from_inputs")
        kept = graph.reaching_logits(self.kept)
        # Dropping edges that no input reaches may cut off others from the logits.
        while from_inputs:
            smaller = graph.reaching_logits(graph.reached_from_inputs(kept))
            if torch.equal(smaller, kept):
                break
            kept = smaller
        return replace(self, kept=kept)

    def __and__(self, other: Circuit) -> Circuit:
        return self._combined(other, torch.logical_and)

    def __or__(self, other: Circuit) -> Circuit:
        return self._combined(other, torch.logical_or)

    def __sub__(self, other: Circuit) -> Circuit:
        return self._combined(other, lambda ours, theirs: ours & ~theirs)

    def strongest(self, n: WholeNumber) -> pd.DataFrame:
        """At most `n` kept edges as a table, those of largest |score| first, for people to read.

        Edges without a score come last, in graph order.

        Raises:
            InputError: `n` is no whole number, or negative.
        """
        n = whole(n, "n", least=0)
        edges = self._ranked("magnitude")[:n]
        kept = torch.zeros_like(self.kept)
        kept[edges] = True
        table = replace(self, kept=kept).to_dataframe()
        return table.sort_values("score", key=abs, ascending=False, kind="stable")

    def to_dataframe(self) -> pd.DataFrame:
        """The kept edges as a table: columns `edge`, `source`, `target`, `slot`, `score`."""
        texts = [
            (str(edge), str(edge.source), str(edge.target), edge.slot or "") for edge in self.edges
        ]
        table = pd.DataFrame(texts, columns=["edge", "source", "target", "slot"], dtype=object)
        scores = self.scores[self.kept].double()
        return table.assign(score=scores.numpy())

    def to_networkx(self) -> networkx.MultiDiGraph:
        """The circuit as a networkx graph, with nodes and kept edges named by their text.

        Edges have the attributes `slot` (if the target is a head) and `score` (if scored), so that
        networkx can write the graph to GraphML, GML and dot.

        >>> import circuits
        >>> graph = circuits.component_graph(circuits.load_model("toy-world"))
        >>> exported = circuits.Circuit.from_edges(graph, ["m0->a1.h0.q"]).to_networkx()
        >>> list(exported.edges(data=True))
        [('m0', 'a1.h0', {'slot': 'q'})]
        """
        result = networkx.MultiDiGraph()
        scores = self.scores[self.kept].tolist()
        pairs = zip(self.edges, scores, strict=True)
        for edge, score in pairs:
            attributes = {"slot": edge.slot} if edge.slot else {}
            if not math.isnan(score):
                attributes["score"] = score
            source = str(edge.source)
            result.add_edge(source, str(edge.target), edge.slot, **attributes)
        return result

    def save(self, folder: str | Path) -> Path:
        """Write `circuit.safetensors` into `folder` (created if missing), atomically.

        Returns:
            The path of the file.
        """
        graph = self.graph
        tensors = {"scores": self.scores, "kept": self.kept}
        for name in COLUMNS:
            tensors[name] = getattr(graph, name)
        description = {
            "nodes": [str(node) for node in graph.nodes],
            "positions": graph.positions,
            "causal": graph.causal,
            "model": graph.model,
            "transcoders": getattr(graph, "transcoders", None),
            "selected": self.selected,
            "record": dict(self.record),
        }
        path = path_of(folder) / FILE
        metadata = {"description": json_text(description)}
        return write_tensors(path, tensors, metadata, FORMAT, FORMAT_VERSION)

    @staticmethod
    def load(folder: str | Path) -> Circuit:
        """Read what `save` wrote; `folder` may also be the file itself.

        Raises:
            InputError: there is no such file, or it is damaged, of another kind, or from a newer
                version of this package.
        """
        path = path_of(folder)
        if not is_file(path):
            path /= FILE
        tensors, metadata = read_tensors(path, FORMAT, FORMAT_VERSION)
        try:
            description = json.loads(metadata["description"])
            graph = _graph_from_file(tensors, description)
            scores, kept = tensors["scores"], tensors["kept"]
            return Circuit(graph, scores, kept, description["selected"], description["record"])
        except (KeyError, TypeError, ValueError) as error:
            raise InputError(
                f"{path} is damaged ({error}); discover the circuit again or restore the file."
            ) from error

    def _rank(self, by: RankBy) -> Float[Tensor, " edge"]:
        """The numbers that edges are ranked by; NaN for those without a score."""
        return (
            self.scores.abs() if one_of(by, "by", get_args(RankBy)) == "magnitude" else self.scores
        )

    def _ranked(self, by: RankBy) -> Int[Tensor, " kept"]:
        """The kept edges, those that rank highest first."""
        edges = self.kept.nonzero().flatten()
        rank = self._rank(by)[edges]
        # Edges without a score come last.
        rank[rank.isnan()] = -torch.inf
        return edges[rank.argsort(descending=True, stable=True)]

    def _check_scored(self, call: str) -> None:
        """Refuse to choose among kept edges none of which has a score: an InputError."""
        if self.scores[self.kept].isnan().all():
            raise InputError(
                f"{call}: none of the {len(self)} edges has a score, so nothing says which to "
                "take; find them with a method that scores edges, such as EAP."
            )

    def _choosing(self, edges: Int[Tensor, " chosen"], of: Circuit, name: str) -> Circuit:
        if 0 < len(edges) < len(of):
            of._check_scored(f"{name}({len(edges)})")
        kept = torch.zeros_like(self.kept)
        kept[edges] = True
        return replace(self, kept=kept, selected=True)

    def _combined(self, other: Circuit, operation: Callable[[Tensor, Tensor], Tensor]) -> Circuit:
        if not isinstance(other, Circuit):
            return NotImplemented
        if self.graph != other.graph:
            raise InputError(
                f"these circuits are over different graphs ({len(self.graph)} and "
                f"{len(other.graph)} edges); discover both with the same model, split_embed and "
                "positions."
            )
        # The scores stay those of the first circuit; no method found the combination.
        kept = operation(self.kept, other.kept)
        return replace(self, kept=kept, selected=True, record={})


def check_is_circuit(circuit: object) -> None:
    """Refuse what is no circuit, such as its graph or its folder."""
    remedy = "discover one, or read it with Circuit.load"
    expect(circuit, Circuit, "a Circuit", remedy)


def _no_scores(graph: Graph) -> Float[Tensor, " edge"]:
    return torch.full_like(graph.source, torch.nan, dtype=torch.float32)


def _graph_from_file(tensors: Mapping[str, Tensor], description: Mapping[str, Any]) -> Graph:
    positions, model = description["positions"], description["model"]
    fields: dict[str, Any] = {name: tensors[name] for name in COLUMNS}
    fields["nodes"] = tuple(map(parse_node, description["nodes"]))
    fields["positions"] = None if positions is None else tuple(positions)
    fields["causal"] = description["causal"]
    fields["model"] = None if model is None else ModelIdentity(**model)
    transcoders = description.get("transcoders")
    if transcoders is None:
        return Graph(**fields)
    return PooledFeatureGraph(**fields, transcoders=TranscodersIdentity(**transcoders))
