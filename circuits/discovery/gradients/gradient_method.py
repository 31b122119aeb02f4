"""The base class of methods that score edges by difference times gradient, see `edge_scores`."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field

from typing_extensions import override

from circuits.discovery.checkpoint import Checkpoint
from circuits.discovery.discoverer import SPEED_ONLY, CircuitDiscoverer, Progress, progress_of
from circuits.discovery.gradients.edge_attribution import EdgeAttribution
from circuits.discovery.gradients.edge_scores import EdgeScoring, GradientPoint
from circuits.graph.circuit import Circuit
from circuits.graph.graph import Graph
from circuits.graph.nodes import Node
from circuits.models import Model, check_fits
from circuits.models.component_graph import check_supported, component_graph, component_nodes
from circuits.models.propagation import PropagationRules
from circuits.running.ablation import Ablation
from circuits.system.torch_modes import without_modes
from circuits.tasks.metrics import Metric
from circuits.tasks.task import Task

Nodes = tuple[Node, ...]


@dataclass(frozen=True)
class GradientMethod(CircuitDiscoverer, ABC):
    """A method that scores edges by difference times gradient.

    A subclass says where gradients are taken (`points`) and, if it is a relevance method, how they
    pass through norms, attention and activations (`rules`).
    """

    metric: str | Metric = "logit_difference"
    ablation: str | Ablation = "resample"
    max_memory: int | None = field(default=None, kw_only=True, metadata=SPEED_ONLY)

    @abstractmethod
    def points(self, nodes: Nodes) -> list[GradientPoint]:
        """Where gradients are taken, in a graph whose sources are `nodes`."""

    @property
    def rules(self) -> PropagationRules:
        """How gradients pass through nonlinear parts; by default as their derivatives say."""
        return PropagationRules()

    @override
    def find(
        self, model: Model, task: Task, graph: Graph, saved: Checkpoint, progress: Progress
    ) -> Circuit:
        scoring = self._scoring(model, graph, task)
        scores = scoring.scores(progress)
        return Circuit.full(graph, scores, record=self.record())

    @without_modes()
    def attribute(
        self,
        model: Model,
        task: Task,
        *,
        graph: Graph | None = None,
        progress: Progress | None = None,
    ) -> EdgeAttribution:
        """Scores in detail: by prompt, node, head, layer, position and neuron.

        Raises:
            InputError: the model, graph and task do not fit together; the metric has no gradient,
                or one that vanishes; or a single prompt does not fit into `max_memory`.
        """
        graph = self.search_graph(model, graph)
        scoring = self._scoring(model, graph, task, details=True)
        return scoring.attribution(progress_of(progress))

    def _scoring(
        self, model: Model, graph: Graph, task: Task, *, details: bool = False
    ) -> EdgeScoring:
        points = self.points(component_nodes(model, graph.splits_embedding))
        settings = self.run_settings(task)
        return EdgeScoring(model, graph, task, settings, points, rules=self.rules, details=details)

    @override
    def search_graph(self, model: Model, graph: Graph | None) -> Graph:
        """The graph to score: the one given, if it fits the model, or the component graph.

        Raises:
            InputError: the model has no component graph, or the graph is of another model.
        """
        # A graph that is made here fits; checking it would read all weights again.
        if graph is None:
            return component_graph(model)
        check_supported(model)
        check_fits(model, graph)
        return graph
