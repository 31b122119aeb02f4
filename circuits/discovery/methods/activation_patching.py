"""Activation patching: the exact damage of ablating every edge alone, which EAP approximates.

Wang et al. 2022, "Interpretability in the Wild" (https://arxiv.org/abs/2211.00593), path patching;
Goldowsky-Dill et al. 2023, "Localizing Model Behavior with Path Patching"
(https://arxiv.org/abs/2304.05969).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import groupby
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor
from typing_extensions import override

from circuits.discovery.checkpoint import Checkpoint, TensorState
from circuits.discovery.discoverer import SPEED_ONLY, EdgeScores, Progress, Resumable
from circuits.graph.circuit import Circuit
from circuits.graph.graph import Graph
from circuits.graph.nodes import Node, at_position
from circuits.models import Model
from circuits.running.ablation import Ablation
from circuits.running.damage import DamageMeter
from circuits.system.ranks import ranks
from circuits.system.torch_modes import without_modes
from circuits.tasks.metrics import Metric
from circuits.tasks.task import Task

# Circuits measured in one go, for each of the ranks that share them. Split by position, thousands
# of edges lead into a component of a large model, and each circuit is a row of all edges.
LARGEST_STEP = 256
# Circuits without a whole node share little, so fewer are measured together.
NODES_PER_STEP = 32
OneDamage = Float[Tensor, " 1"]


@dataclass
class PatchingState(TensorState):
    """The edges measured so far; NaN for the others."""

    scores: EdgeScores
    node_evaluations: int = 0

    @staticmethod
    def start(graph: Graph) -> PatchingState:
        """Nothing measured."""
        shape = (len(graph),)
        return PatchingState(torch.full(shape, torch.nan, dtype=torch.float32))

    @property
    def edges_measured(self) -> int:
        """The number of edges measured so far."""
        measured = ~self.scores.isnan()
        return int(measured.sum())

    def measure(self, meter: DamageMeter, step: slice, whole: OneDamage) -> None:
        """Measure the damage without each of some edges, against that of the whole graph."""
        rows = step.stop - step.start
        without = torch.ones(rows, len(self.scores), dtype=torch.bool)
        without[:, step].fill_diagonal_(False)
        counts: dict[str, int] = {}
        with meter.counting(counts):
            # score(e) = L(G \ e) - L(G)
            increases = meter(without) - whole
            self.scores[step] = increases.float()
        self.node_evaluations += counts["node_evaluations"]


@dataclass(frozen=True)
class ActivationPatching(Resumable):
    """Score every edge by the measured damage of ablating it alone.

    One run of the model for each edge: exact, slow, and the yardstick for EAP. Edges that can stand
    in for each other all score low.

    Reference: Goldowsky-Dill et al. 2023, https://arxiv.org/abs/2304.05969

    Attributes:
        metric: what damage is measured in.
        ablation: what an ablated edge carries instead.
        max_memory: bytes that one step may take; None chooses from the memory that is free.

    >>> import circuits
    >>> model = circuits.load_model("toy-world")
    >>> task = circuits.load_task("ioi", model, n=2)
    >>> exact = circuits.ActivationPatching().discover(model, task)
    >>> bool(exact.scores.isfinite().all())
    True
    """

    name: ClassVar[str] = "activation-patching"
    metric: str | Metric = "logit_difference"
    ablation: str | Ablation = "resample"
    max_memory: int | None = field(default=None, kw_only=True, metadata=SPEED_ONLY)

    @override
    def find(
        self, model: Model, task: Task, graph: Graph, saved: Checkpoint, progress: Progress
    ) -> Circuit:
        meter = self.meter(model, graph, task)
        whole = _whole(meter, graph)
        state = PatchingState.start(graph)
        state.restore(saved)
        for step in _steps(graph):
            left = state.scores[step].isnan()
            if left.any():  # not measured before an interruption
                state.measure(meter, step, whole)
                state.save(saved)
                progress(state.edges_measured, len(graph))
        counted = state.node_evaluations
        record = self.record(evaluations=len(graph), node_evaluations=counted)
        return Circuit.full(graph, state.scores, record=record)

    @without_modes()
    def node_scores(
        self, model: Model, task: Task, *, graph: Graph | None = None
    ) -> dict[Node, float]:
        """The damage of patching each node's output, that is of ablating all its outgoing edges.

        Raises:
            InputError: the model, graph, task and settings do not fit together.
        """
        graph = self.search_graph(model, graph)
        meter = self.meter(model, graph, task)
        sources = graph.source.unique()
        kept = graph.source[None] != sources[:, None]
        parts = kept.split(NODES_PER_STEP)
        # score(u) = L(G without all edges from u) - L(G)
        damages = [meter(part) for part in parts]
        scores = torch.cat(damages) - _whole(meter, graph)
        nodes = [graph.nodes[source] for source in sources.tolist()]
        return dict(zip(nodes, scores.tolist(), strict=True))


def _whole(meter: DamageMeter, graph: Graph) -> OneDamage:
    """The damage of the whole graph, L(G)."""
    kept = torch.ones(1, len(graph), dtype=torch.bool)
    return meter(kept)


def _steps(graph: Graph) -> Iterator[slice]:
    """The edges into one component after the other."""
    # Without any of them the same nodes have to be recomputed, so no work is wasted.
    largest = LARGEST_STEP * ranks().world
    start = 0
    components = [at_position(node, None) for node in graph.nodes]
    targets = graph.target.tolist()
    for _, edges in groupby(targets, key=components.__getitem__):
        stop = start + len(list(edges))
        for first in range(start, stop, largest):
            yield slice(first, min(first + largest, stop))
        start = stop
