"""Edge attribution patching: every edge's damage predicted from a gradient.

EAP: Syed, Rager and Conmy 2023, "Attribution Patching Outperforms Automated Circuit Discovery"
(https://arxiv.org/abs/2310.10348). EAP-IG: Hanna, Pezzelle and Belinkov 2024, "Have Faith in
Faithfulness" (https://arxiv.org/abs/2403.17806).

Both compute, for every edge from a source u to a target r,

    score(u -> r) = (c_u - out_u(clean)) . d L / d x_r

with c_u the counterfactual output, x_r the input of r and L the damage; see
`gradients.edge_scores`. They differ in where the gradient is taken. Scores differ from the
published code's in scale and sign: ours are the predicted damage, mean over scored rows, of
ablating the edge.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from itertools import groupby
from typing import ClassVar, Literal

from typing_extensions import override

from circuits.discovery.checkpoint import Checkpoint
from circuits.discovery.discoverer import SPEED_ONLY, CircuitDiscoverer, Progress, no_progress
from circuits.discovery.gradients.edge_attribution import EdgeAttribution
from circuits.discovery.gradients.edge_scores import EdgeScoring, GradientPoint
from circuits.graph.circuit import Circuit
from circuits.graph.graph import Graph
from circuits.graph.nodes import MLP, Head, Node
from circuits.models import Model
from circuits.models.component_graph import check_supported, component_graph, component_nodes
from circuits.models.identity import check_fits
from circuits.models.propagation import PropagationRules
from circuits.running.ablation import Ablation
from circuits.system.errors import InputError
from circuits.tasks.metrics import Metric
from circuits.tasks.task import Task

Nodes = tuple[Node, ...]
# Where EAP takes gradients on the line from the corrupted run, 0, to the clean run, 1.
FRACTIONS = {"clean": [1.0], "corrupted": [0.0], "both": [0.0, 1.0]}


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
        scores = self._scoring(model, graph, task).scores(progress)
        return Circuit.full(graph, scores, record=self.record())

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
        return self._scoring(model, graph, task, details=True).attribution(progress or no_progress)

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


@dataclass(frozen=True)
class EAP(GradientMethod):
    """Score every edge by (corrupted - clean) . gradient.

    One forward pass on the corrupted prompts, and one forward and backward pass on the clean ones.
    Cheap, and blind where the metric saturates: KL, whose gradient vanishes at the clean run, is
    refused there.

    Reference: Syed et al. 2023, https://arxiv.org/abs/2310.10348

    Attributes:
        metric: what damage is measured in.
        ablation: what an ablated edge carries instead.
        gradient_at: the run on which the gradient is taken, as in Nanda's attribution-patching note
            for "corrupted"; "both" is the mean of the two, a good cheap baseline.
        max_memory: bytes that a run may take on top of model and task; None chooses from the memory
            that is free.

    >>> import circuits
    >>> model = circuits.load_model("toy-world")
    >>> circuits.EAP().discover(model, circuits.load_task("ioi", model, n=4)).top(20)
    Circuit(20 of 479 edges)
    """

    name: ClassVar[str] = "eap"
    gradient_at: Literal["clean", "corrupted", "both"] = "clean"

    def __post_init__(self) -> None:
        if self.gradient_at not in FRACTIONS:
            raise InputError(
                f"gradient_at={self.gradient_at!r}: choose 'clean', 'corrupted' or 'both'."
            )

    @override
    def points(self, nodes: Nodes) -> list[GradientPoint]:
        return [GradientPoint(fraction) for fraction in FRACTIONS[self.gradient_at]]


@dataclass(frozen=True)
class EAPIG(GradientMethod):
    """EAP with integrated gradients: the gradient averaged from the corrupted to the clean run.

    Reference: Hanna et al. 2024, https://arxiv.org/abs/2403.17806

    Attributes:
        metric: what damage is measured in.
        ablation: what an ablated edge carries instead; the line starts at the ablated embedding.
        steps: the number of gradients taken along each line.
        along: "inputs" moves the embeddings; "activations" moves what one sub-layer writes, each in
            turn: 2 n_layers + 1 lines.
        quadrature: "midpoint" takes the middles of equal pieces of the line; "left" their corrupted
            ends, as the published code does.
        max_memory: bytes that a run may take on top of model and task; None chooses from the memory
            that is free.

    >>> import circuits
    >>> model = circuits.load_model("toy-world")
    >>> task = circuits.load_task("ioi", model, n=4)
    >>> circuits.EAPIG(steps=3).discover(model, task).top(20)
    Circuit(20 of 479 edges)
    """

    name: ClassVar[str] = "eap-ig"
    steps: int = 5
    along: Literal["inputs", "activations"] = "inputs"
    quadrature: Literal["midpoint", "left"] = "midpoint"

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise InputError(
                f"steps={self.steps}: at least one gradient must be taken; 5 is usual."
            )
        if self.along not in ("inputs", "activations"):
            raise InputError(f"along={self.along!r}: choose 'inputs' or 'activations'.")
        if self.quadrature not in ("midpoint", "left"):
            raise InputError(f"quadrature={self.quadrature!r}: choose 'midpoint' or 'left'.")

    @override
    def points(self, nodes: Nodes) -> list[GradientPoint]:
        # alpha_k = (k + 1/2) / m, or k / m with the published code's left ends
        offset = 0.5 if self.quadrature == "midpoint" else 0.0
        fractions = [(step + offset) / self.steps for step in range(self.steps)]
        lines = [()] if self.along == "inputs" else _sub_layers(nodes)
        return [GradientPoint(fraction, line) for line in lines for fraction in fractions]


def _sub_layers(nodes: Nodes) -> list[Nodes]:
    """The embeddings, each layer's heads together, and each MLP."""

    def sub_layer(node: Node) -> object:
        if isinstance(node, Head | MLP):
            return type(node), node.layer
        return "embeddings"

    groups = groupby(nodes, key=sub_layer)
    return [tuple(group) for _, group in groups]
