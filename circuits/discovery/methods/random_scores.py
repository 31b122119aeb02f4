"""Random scores: the floor of every comparison."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from typing_extensions import override

from circuits.discovery.checkpoint import Checkpoint
from circuits.discovery.discoverer import CircuitDiscoverer, Progress
from circuits.graph.circuit import Circuit
from circuits.graph.graph import Graph
from circuits.models import Model
from circuits.system.randomness import random_generator
from circuits.tasks.task import Task


@dataclass(frozen=True)
class RandomScores(CircuitDiscoverer):
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
    def find(
        self, model: Model, task: Task, graph: Graph, saved: Checkpoint, progress: Progress
    ) -> Circuit:
        generator = random_generator(self.seed)
        scores = torch.rand(len(graph), generator=generator, dtype=torch.float32)
        return Circuit.full(graph, scores, record=self.record())
