"""Random scores: the floor under every comparison."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import torch

from circuits.discovery.checkpoint import Checkpoint
from circuits.discovery.discoverer import CircuitDiscoverer, Progress
from circuits.graph.circuit import Circuit
from circuits.graph.graph import Graph
from circuits.models import Model
from circuits.models.component_graph import component_graph
from circuits.tasks.task import Task


@dataclass(frozen=True)
class RandomScores(CircuitDiscoverer):
    """Score every edge at random: what a method must beat.

    Reference: none; a control.

    Attributes:
        seed: the same seed gives the same scores.
    """

    name: ClassVar[str] = "random"
    seed: int = 0

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
        scores = torch.rand(len(graph), generator=torch.Generator().manual_seed(self.seed))
        return Circuit.full(graph, scores, record=self.record())
