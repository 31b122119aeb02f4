"""A circuit: scores and kept edges over a graph. A value: methods return new ones."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import networkx
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from circuits.graph.edges import Edge
from circuits.graph.graph import Graph
from circuits.graph.identity import ModelIdentity, TranscodersIdentity
from circuits.graph.nodes import parse_node
from circuits.system.errors import InputError
from circuits.system.files import read_tensors, write_tensors

FILE = "circuit.safetensors"
FORMAT = "circuits.circuit"
FORMAT_VERSION = 1


@dataclass(frozen=True, eq=False)
class Circuit:
    """A scored, chosen subset of a graph's edges.

    Attributes:
        graph: which edges can exist.
        scores: the damage, mean over scored rows, of ablating each edge, measured or predicted. Positive: it helps; NaN: never scored.
        kept: the chosen edges.
        selected: False when a method only scored and kept everything, so that a size still has to be chosen with `top` or `above`.
        record: how it was found: method, settings, counts. JSON values only.
    """

    graph: Graph
    scores: Float[Tensor, " edge"]
    kept: Bool[Tensor, " edge"]
    selected: bool = True
    record: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("scores", "kept"):
            column = getattr(self, name)
            if column.shape != (len(self.graph),):
                raise InputError(
                    f"{name} has shape {tuple(column.shape)}, but the graph has {len(self.graph)} edges; give one entry per edge."
                )
        if self.kept.dtype != torch.bool:
            raise InputError(
                f"kept holds {self.kept.dtype}; it must be boolean, True for the edges that are kept."
            )
        # Copies, so that changing the tensors that were passed in does not change the circuit.
        object.__setattr__(self, "scores", self.scores.detach().to("cpu", torch.float32, copy=True))
        object.__setattr__(self, "kept", self.kept.detach().to("cpu", copy=True))

    @staticmethod
    def full(
        graph: Graph, scores: Tensor | None = None, *, record: Mapping[str, Any] | None = None
    ) -> Circuit:
        """Everything kept: a whole model, or what a method returns that only scores."""
        scores = torch.full((len(graph),), torch.nan) if scores is None else scores
        return Circuit(
            graph,
            scores,
            torch.ones(len(graph), dtype=torch.bool),
            selected=False,
            record=record or {},
        )

    @staticmethod
    def from_edges(graph: Graph, edges: Sequence[Edge | str]) -> Circuit:
        """The circuit of exactly these edges, unscored.

        Raises:
            InputError: the graph lacks one of them.
        """
        return Circuit(graph, torch.full((len(graph),), torch.nan), graph.mask(edges))

    def __len__(self) -> int:
        return int(self.kept.sum())

    def __repr__(self) -> str:
        return f"Circuit({len(self):,} of {len(self.graph):,} edges{'' if self.selected else ', scored only'})"

    def __eq__(self, other: object) -> bool:
        """Equal graphs, kept edges and scores; how they were found does not matter."""
        if not isinstance(other, Circuit):
            return NotImplemented
        same_scores = self.scores.shape == other.scores.shape and torch.allclose(
            self.scores, other.scores, rtol=0, atol=0, equal_nan=True
        )
        return same_scores and torch.equal(self.kept, other.kept) and self.graph == other.graph

    __hash__ = None  # type: ignore[assignment]

    @property
    def edges(self) -> tuple[Edge, ...]:
        """The kept edges, in graph order."""
        every = self.graph.edges
        return tuple(every[index] for index in self.kept.nonzero().flatten().tolist())

    def top(self, n: int, by: Literal["magnitude", "signed"] = "magnitude") -> Circuit:
        """The `n` kept edges of largest |score| (or largest score); of equal ones the first in graph order, unscored ones last.

        Raises:
            InputError: `n` is negative or larger than the number of kept edges.
        """
        if not 0 <= n <= len(self):
            raise InputError(
                f"top({n}) of a circuit that keeps {len(self)} edges; choose n between 0 and {len(self)}."
            )
        if by not in ("magnitude", "signed"):
            raise InputError(
                f"by={by!r} is not a way to rank edges; choose 'magnitude' or 'signed'."
            )
        rank = self.scores.abs() if by == "magnitude" else self.scores
        rank = torch.where(rank.isnan(), -torch.inf, rank)
        # Kept but unscored edges share -inf with dropped ones: sort by kept first, then (stably) by rank.
        order = torch.sort(rank, descending=True, stable=True).indices
        order = order[torch.sort(self.kept[order].int(), descending=True, stable=True).indices]
        return replace(
            self, kept=torch.zeros_like(self.kept).index_fill(0, order[:n], True), selected=True
        )

    def above(self, threshold: float) -> Circuit:
        """The kept edges whose signed score is above `threshold`: those whose ablation does at least so much damage."""
        return replace(self, kept=self.kept & (self.scores > threshold), selected=True)

    def connected(self, *, from_inputs: bool = False) -> Circuit:
        """Without the edges that cannot reach the logits, which never change what the circuit computes.

        Args:
            from_inputs: drop also what no kept path from an embedding reaches. That is neutral only under resample ablation.
        """
        kept = self.graph.reaching_logits(self.kept)
        while from_inputs:
            smaller = self.graph.reaching_logits(self.graph.reached_from_inputs(kept))
            if torch.equal(smaller, kept):
                break
            kept = smaller
        return replace(self, kept=kept)

    def __and__(self, other: Circuit) -> Circuit:
        return self._combined(other, torch.logical_and)

    def __or__(self, other: Circuit) -> Circuit:
        return self._combined(other, torch.logical_or)

    def __sub__(self, other: Circuit) -> Circuit:
        return self._combined(other, lambda a, b: a & ~b)

    def _combined(self, other: Circuit, operation: Callable[[Tensor, Tensor], Tensor]) -> Circuit:
        if not isinstance(other, Circuit):
            return NotImplemented
        if self.graph != other.graph:
            raise InputError(
                f"these circuits are over different graphs ({len(self.graph)} and {len(other.graph)} edges); "
                "discover both with the same model, split_embed and positions."
            )
        return replace(self, kept=operation(self.kept, other.kept), selected=True, record={})

    def to_networkx(self) -> networkx.MultiDiGraph:
        """Nodes and kept edges by their text, with `slot` and `score` on each edge (a head can be read in several slots)."""
        result = networkx.MultiDiGraph()
        for edge, score in zip(self.edges, self.scores[self.kept].tolist(), strict=True):
            result.add_edge(
                str(edge.source), str(edge.target), key=edge.slot, slot=edge.slot, score=score
            )
        return result

    def save(self, folder: str | Path) -> Path:
        """Write `circuit.safetensors` into `folder` (made when missing), atomically. Returns the file's path."""
        graph = self.graph
        tensors = {
            "scores": self.scores,
            "kept": self.kept,
            "source": graph.source,
            "target": graph.target,
            "slot": graph.slot,
        }
        description = {
            "nodes": [str(node) for node in graph.nodes],
            "positions": graph.positions,
            "causal": graph.causal,
            "model": asdict(graph.model) if graph.model else None,
            "transcoders": asdict(graph.transcoders) if graph.transcoders else None,
            "selected": self.selected,
            "record": dict(self.record),
        }
        return write_tensors(
            Path(folder) / FILE,
            tensors,
            {"description": json.dumps(description)},
            FORMAT,
            FORMAT_VERSION,
        )

    @staticmethod
    def load(folder: str | Path) -> Circuit:
        """Read what `save` wrote; `folder` may also be the file itself.

        Raises:
            InputError: no such file, a truncated one, one of another kind, or one from a newer version of this package.
        """
        path = Path(folder) if Path(folder).is_file() else Path(folder) / FILE
        tensors, metadata = read_tensors(path, FORMAT, FORMAT_VERSION)
        try:
            return _from_file(tensors, json.loads(metadata["description"]))
        except (KeyError, TypeError, ValueError) as error:
            raise InputError(
                f"{path} is damaged ({error}); discover the circuit again or restore the file."
            ) from error


def _from_file(tensors: Mapping[str, Tensor], description: Mapping[str, Any]) -> Circuit:
    positions, model, transcoders = (
        description["positions"],
        description["model"],
        description.get("transcoders"),
    )
    graph = Graph(
        nodes=tuple(parse_node(text) for text in description["nodes"]),
        source=tensors["source"],
        target=tensors["target"],
        slot=tensors["slot"],
        positions=None if positions is None else tuple(positions),
        causal=description["causal"],
        model=None if model is None else ModelIdentity(**model),
        transcoders=None if transcoders is None else TranscodersIdentity(**transcoders),
    )
    return Circuit(
        graph, tensors["scores"], tensors["kept"], description["selected"], description["record"]
    )
