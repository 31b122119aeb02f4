"""Random scores: the floor of every comparison."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from typing_extensions import override

from circuits.discovery.discoverer import EdgeScorer, EdgeScores, Progress
from circuits.graph.graph import Graph
from circuits.models import Model
from circuits.tasks.task import Task


@dataclass(frozen=True)
class RandomScores(EdgeScorer):
    """Score every edge at random: what a method must beat.

    Reference: none; a control.

    Attributes:
        seed: the same seed gives the same scores.

    >>> import circuits
    >>> model = circuits.load_model("toy-world")
    >>> circuits.RandomScores(seed=1).discover(model, circuits.load_task("ioi", model, n=2))
    Circuit(479 of 479 edges, scored only)
    """

    name: ClassVar[str] = "random"
    seed: int = 0

    @override
    def score(
        self, model: Model, task: Task, graph: Graph, progress: Progress | None
    ) -> EdgeScores:
        generator = torch.Generator().manual_seed(self.seed)
        return torch.rand(len(graph), generator=generator)
