"""Activation patching: the exact damage of ablating every edge alone, which gradient methods approximate.

Wang et al. 2022, "Interpretability in the Wild" (https://arxiv.org/abs/2211.00593), path patching; Goldowsky-Dill et al. 2023,
"Localizing Model Behavior with Path Patching" (https://arxiv.org/abs/2304.05969).
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import torch
from jaxtyping import Bool
from torch import Tensor

from circuits.ablation import Ablation
from circuits.circuit import Circuit
from circuits.components import component_graph
from circuits.discoverer import Checkpoint, CircuitDiscoverer, Progress
from circuits.distributed import ranks
from circuits.execution import DamageMeter
from circuits.graph import Graph
from circuits.metrics import Metric
from circuits.models import Model
from circuits.nodes import Node
from circuits.tasks.base import Task

EDGES_PER_STEP = 32


@dataclass(frozen=True)
class ActivationPatching(CircuitDiscoverer):
    """Score every edge by the damage of ablating it alone, measured.

    One run of the model for each edge: exact, slow, and the yardstick for EAP. Edges that stand in for each other all score low.

    Reference: Goldowsky-Dill et al. 2023, https://arxiv.org/abs/2304.05969

    Attributes:
        metric: what damage is measured in.
        ablation: what an ablated edge carries instead.
    """

    name: ClassVar[str] = "activation-patching"
    metric: str | Metric = "logit_difference"
    ablation: str | Ablation = "resample"

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
        saved = Checkpoint.open(checkpoint, self, graph, task)
        damage = DamageMeter.prepare(model, graph, task, metric=self.metric, ablation=self.ablation)
        unharmed = damage(torch.ones(1, len(graph), dtype=torch.bool))
        state = saved.restore({"next": torch.tensor(0), "scores": torch.full((len(graph),), torch.nan)})
        step = EDGES_PER_STEP * ranks().world
        for start in range(int(state["next"]), len(graph), step):
            edges = torch.arange(start, min(start + step, len(graph)))
            state["scores"][edges] = (damage(_without_each(edges, len(graph))) - unharmed).float()
            state["next"] = edges[-1] + 1
            saved.save(state)
            if progress:
                progress(int(state["next"]), len(graph))
        return Circuit.full(graph, state["scores"], record=self.record(evaluations=len(graph)))

    def node_scores(self, model: Model, task: Task, *, graph: Graph | None = None) -> dict[Node, float]:
        """The damage of ablating every outgoing edge of a node at once, for each node that has any: patching its output."""
        graph = component_graph(model) if graph is None else graph
        damage = DamageMeter.prepare(model, graph, task, metric=self.metric, ablation=self.ablation)
        sources = graph.source.unique()
        kept = graph.source[None] != sources[:, None]
        unharmed = damage(torch.ones(1, len(graph), dtype=torch.bool))
        scores = torch.cat([damage(part) for part in kept.split(EDGES_PER_STEP)]) - unharmed
        return {graph.nodes[source]: score for source, score in zip(sources.tolist(), scores.tolist(), strict=True)}


def _without_each(edges: Tensor, total: int) -> Bool[Tensor, "variant edge"]:
    kept = torch.ones(len(edges), total, dtype=torch.bool)
    kept[torch.arange(len(edges)), edges] = False
    return kept
