"""The edges to draw, strongest first, and how strong their strokes are."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from circuits.graph.circuit import Circuit, check_is_circuit
from circuits.graph.edges import Edge
from circuits.graph.graph import PooledFeatureGraph
from circuits.system.errors import InputError
from circuits.system.numbers import WholeNumber, whole

DEFAULT_MAX_EDGES = 200
# Features are side by side in one row, so fewer of their edges fit on a page.
DEFAULT_MAX_FEATURE_EDGES = 50
MIN_STROKE_WIDTH, MAX_STROKE_WIDTH = 1.2, 6.5
MIN_OPACITY, MAX_OPACITY = 0.55, 0.95


@dataclass(frozen=True)
class RankedEdge:
    """A kept edge of a circuit, and how strong its stroke is, from 0 to 1."""

    edge: Edge
    score: float
    rank: int
    strength: float

    @property
    def score_text(self) -> str:
        """The score for readers."""
        return "not scored" if math.isnan(self.score) else f"{self.score:+.4g}"

    @property
    def text(self) -> str:
        """The edge and its score, for tooltips."""
        return f"{self.edge}  {self.score_text}"

    @property
    def width(self) -> float:
        """Width of the stroke in pixels."""
        return MIN_STROKE_WIDTH + (MAX_STROKE_WIDTH - MIN_STROKE_WIDTH) * self.strength

    @property
    def opacity(self) -> float:
        """Opacity of the stroke."""
        return MIN_OPACITY + (MAX_OPACITY - MIN_OPACITY) * self.strength


Edges = Sequence[RankedEdge]


def edge_limit(circuit: Circuit, max_edges: WholeNumber | None) -> int:
    """Return the largest number of edges to draw, which has a default for each kind of graph.

    Raises:
        InputError: `max_edges` is negative.
    """
    check_is_circuit(circuit)
    if max_edges is None:
        has_features = isinstance(circuit.graph, PooledFeatureGraph)
        return DEFAULT_MAX_FEATURE_EDGES if has_features else DEFAULT_MAX_EDGES
    max_edges = whole(max_edges, "max_edges")
    if max_edges < 0:
        raise InputError(
            f"max_edges={max_edges} is negative; give the largest number of edges to draw, "
            f"for example {DEFAULT_MAX_EDGES}."
        )
    return max_edges


def ranked_edges(circuit: Circuit, limit: int) -> Edges:
    """Return the strongest kept edges, strongest first; edges without a score come last."""
    edges = circuit.edges
    scores = circuit.scores[circuit.kept].double()
    sizes = scores.abs()
    strengths = _strengths(sizes).tolist()
    sortable = sizes.nan_to_num(nan=-1, posinf=math.inf)
    # Ties are in graph order.
    strongest = sortable.argsort(descending=True, stable=True)
    ranked = []
    for rank, index in enumerate(strongest[:limit].tolist(), 1):
        edge, score = edges[index], float(scores[index])
        ranked.append(RankedEdge(edge, score, rank, strengths[index]))
    return ranked


def _strengths(sizes: Tensor) -> Tensor:
    # strength = sqrt(|score| / max |score|). Scores span orders of magnitude; the root keeps weak
    # edges visible without changing the order.
    finite = sizes[sizes.isfinite()].tolist()
    largest = max(finite, default=0.0) or 1
    share = sizes.nan_to_num() / largest
    return share.clamp(max=1).sqrt()
