"""Activation patching: the exact damage of ablating every edge alone, which gradient methods approximate.

Wang et al. 2022, "Interpretability in the Wild" (https://arxiv.org/abs/2211.00593), path patching; Goldowsky-Dill et al. 2023,
"Localizing Model Behavior with Path Patching" (https://arxiv.org/abs/2304.05969).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from typing import ClassVar

import torch
from jaxtyping import Bool
from torch import Tensor

from circuits.discovery.checkpoint import Checkpoint
from circuits.discovery.discoverer import SPEED_ONLY, CircuitDiscoverer, Progress
from circuits.graph.circuit import Circuit
from circuits.graph.graph import Graph
from circuits.graph.nodes import Node, at_position
from circuits.models import Model
from circuits.models.component_graph import component_graph
from circuits.running.ablation import Ablation
from circuits.running.damage import DamageMeter
from circuits.system.ranks import ranks, totals
from circuits.tasks.metrics import Metric
from circuits.tasks.task import Task

# Circuits measured in one go, for each of the ranks that share them: split by position, thousands of edges lead into a component of a large
# model, and each circuit is a row of all its edges.
LARGEST_STEP = 256
# Circuits without a node share all that is computed downstream of the first one.
NODES_PER_STEP = 32


@dataclass(frozen=True)
class ActivationPatching(CircuitDiscoverer):
    """Score every edge by the damage of ablating it alone, measured.

    One run of the model for each edge: exact, slow, and the yardstick for EAP. Edges that stand in for each other all score low.

    Reference: Goldowsky-Dill et al. 2023, https://arxiv.org/abs/2304.05969

    Attributes:
        metric: what damage is measured in.
        ablation: what an ablated edge carries instead.
        max_memory: bytes that one step may take; by default chosen from what is free.
    """

    name: ClassVar[str] = "activation-patching"
    metric: str | Metric = "logit_difference"
    ablation: str | Ablation = "resample"
    max_memory: int | None = field(default=None, kw_only=True, metadata=SPEED_ONLY)

    def discover(
        self,
        model: Model,
        task: Task,
        *,
        graph: Graph | None = None,
        checkpoint: Checkpoint | str | Path | None = None,
        progress: Progress | None = None,
    ) -> Circuit:
        graph = component_graph(model) if graph is None else graph
        saved = Checkpoint.open(checkpoint, self.identity(), graph, task)
        damage = self._damage(model, graph, task)
        unharmed = damage(torch.ones(1, len(graph), dtype=torch.bool))
        state = saved.restore(
            {"scores": torch.full((len(graph),), torch.nan), "node_evaluations": torch.tensor(0)}
        )
        scores, counts = state["scores"], damage.executor.counts
        for step in _steps(graph):
            if not scores[step].isnan().any():
                continue  # measured before the run was interrupted
            before = counts["node_evaluations"]
            scores[step] = (damage(_without_each(step, len(graph))) - unharmed).float()
            state["node_evaluations"] += totals(
                {"node_evaluations": counts["node_evaluations"] - before}
            )["node_evaluations"]
            saved.save(state)
            if progress:
                progress(int((~scores.isnan()).sum()), len(graph))
        return Circuit.full(
            graph,
            scores,
            record=self.record(
                evaluations=len(graph), node_evaluations=int(state["node_evaluations"])
            ),
        )

    def node_scores(
        self, model: Model, task: Task, *, graph: Graph | None = None
    ) -> dict[Node, float]:
        """The damage of ablating every outgoing edge of a node at once, for each node that has any: patching its output."""
        graph = component_graph(model) if graph is None else graph
        damage = self._damage(model, graph, task)
        sources = graph.source.unique()
        kept = graph.source[None] != sources[:, None]
        unharmed = damage(torch.ones(1, len(graph), dtype=torch.bool))
        scores = torch.cat([damage(part) for part in kept.split(NODES_PER_STEP)]) - unharmed
        return {
            graph.nodes[source]: score
            for source, score in zip(sources.tolist(), scores.tolist(), strict=True)
        }

    def _damage(self, model: Model, graph: Graph, task: Task) -> DamageMeter:
        return DamageMeter.prepare(
            model,
            graph,
            task,
            metric=self.metric,
            ablation=self.ablation,
            max_memory=self.max_memory,
        )


def _steps(graph: Graph) -> Iterator[slice]:
    """The edges into one component after the other: without any of them the same nodes are to be computed again, so that no work is wasted."""
    largest, start = LARGEST_STEP * ranks().world, 0
    components = [at_position(node, None) for node in graph.nodes]
    for _, group in groupby(graph.target.tolist(), key=components.__getitem__):
        stop = start + sum(1 for _ in group)
        yield from (
            slice(first, min(first + largest, stop)) for first in range(start, stop, largest)
        )
        start = stop


def _without_each(edges: slice, total: int) -> Bool[Tensor, "variant edge"]:
    """A circuit without each of some edges."""
    kept = torch.ones(edges.stop - edges.start, total, dtype=torch.bool)
    kept[:, edges].fill_diagonal_(False)
    return kept
