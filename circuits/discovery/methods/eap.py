"""Edge attribution patching: every edge's damage predicted by a gradient.

EAP: Syed, Rager and Conmy 2023, "Attribution Patching Outperforms Automated Circuit Discovery" (https://arxiv.org/abs/2310.10348).
EAP-IG: Hanna, Pezzelle and Belinkov 2024, "Have Faith in Faithfulness" (https://arxiv.org/abs/2403.17806).
`gradient_at="corrupted"` is how Nanda's attribution-patching note takes it; "both" is the mean of the two, a good cheap baseline.
We differ from the published code in scale and sign: a score is the predicted damage, mean over scored rows, of ablating the edge.
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal

from circuits.discovery.checkpoint import Checkpoint
from circuits.discovery.discoverer import SPEED_ONLY, CircuitDiscoverer, Progress
from circuits.discovery.gradients.edge_scores import (
    EdgeAttribution,
    GradientPoint,
    attribute_edges,
    score_edges,
)
from circuits.graph.circuit import Circuit
from circuits.graph.graph import Graph
from circuits.graph.nodes import MLP, Head, Node, PosEmbed, TokenEmbed
from circuits.models import Model
from circuits.models.component_graph import check_supported, component_graph, component_nodes
from circuits.models.identity import check_fits
from circuits.running.ablation import Ablation
from circuits.system.errors import InputError
from circuits.tasks.metrics import Metric, get_metric
from circuits.tasks.task import Task


@dataclass(frozen=True)
class GradientMethod(CircuitDiscoverer):
    """What EAP and EAP-IG share: they differ only in the points at which gradients are taken."""

    metric: str | Metric = "logit_difference"
    ablation: str | Ablation = "resample"
    max_memory: int | None = field(default=None, kw_only=True, metadata=SPEED_ONLY)

    @abstractmethod
    def points(self, nodes: tuple[Node, ...]) -> list[GradientPoint]:
        """Where gradients are taken, for a graph whose sources are `nodes`."""

    def discover(
        self,
        model: Model,
        task: Task,
        *,
        graph: Graph | None = None,
        checkpoint: Checkpoint | str | Path | None = None,
        progress: Progress | None = None,
    ) -> Circuit:
        graph = self._graph(model, graph)
        scores = score_edges(
            model, graph, task, **self._settings(model, graph, task), progress=progress
        )
        return Circuit.full(graph, scores, record=self.record())

    def attribute(
        self,
        model: Model,
        task: Task,
        *,
        graph: Graph | None = None,
        progress: Progress | None = None,
    ) -> EdgeAttribution:
        """What one score per edge cannot hold: scores by prompt, node, head, position and neuron.

        Raises:
            InputError: the model, graph and task do not fit together; the metric has no gradient or one that vanishes; not even one
                prompt fits into `max_memory`.
        """
        graph = self._graph(model, graph)
        return attribute_edges(
            model, graph, task, **self._settings(model, graph, task), progress=progress
        )

    def _graph(self, model: Model, graph: Graph | None) -> Graph:
        # One that is made here fits: reading all weights a second time would tell nothing new.
        if graph is None:
            return component_graph(model)
        check_supported(model)
        check_fits(model, graph)
        return graph

    def _settings(self, model: Model, graph: Graph, task: Task) -> dict[str, Any]:
        split_embed = any(isinstance(node, TokenEmbed | PosEmbed) for node in graph.nodes)
        points = self.points(component_nodes(model, split_embed))
        return {
            "metric": get_metric(self.metric, task),
            "ablation": self.ablation,
            "points": points,
            "max_memory": self.max_memory,
        }


@dataclass(frozen=True)
class EAP(GradientMethod):
    """Score every edge by the gradient of the metric times the change that ablating it makes.

    One forward pass on the corrupted prompts and one forward and backward pass on the clean ones. Cheap, and blind where the
    metric saturates: KL, whose gradient vanishes at the clean run, is refused there.

    Reference: Syed et al. 2023, https://arxiv.org/abs/2310.10348

    Attributes:
        metric: what damage is measured in.
        ablation: what an ablated edge carries instead.
        gradient_at: on which run the gradient is taken; "both" is the mean of the two.
        max_memory: bytes that a run may take on top of model and task, to within a fifth; None chooses from what is free.
    """

    name: ClassVar[str] = "eap"
    gradient_at: Literal["clean", "corrupted", "both"] = "clean"

    def __post_init__(self) -> None:
        if self.gradient_at not in ("clean", "corrupted", "both"):
            raise InputError(
                f"gradient_at={self.gradient_at!r}: choose 'clean', 'corrupted' or 'both'."
            )

    def points(self, nodes: tuple[Node, ...]) -> list[GradientPoint]:
        fractions = {"clean": [1.0], "corrupted": [0.0], "both": [0.0, 1.0]}[self.gradient_at]
        return [GradientPoint(fraction) for fraction in fractions]


@dataclass(frozen=True)
class EAPIG(GradientMethod):
    """EAP with integrated gradients: the gradient averaged along a line from the corrupted to the clean run.

    Reference: Hanna et al. 2024, https://arxiv.org/abs/2403.17806

    Attributes:
        metric: what damage is measured in.
        ablation: what an ablated edge carries instead; the line starts at the ablated embedding.
        steps: gradients taken along each line.
        along: "inputs" moves the embeddings; "activations" moves what one sub-layer writes, each in turn: 2 n_layers + 1 lines.
        quadrature: "midpoint" takes the middles of equal pieces of the line; "left" their corrupted ends, as the published code does.
        max_memory: bytes that a run may take on top of model and task, to within a fifth; None chooses from what is free.
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

    def points(self, nodes: tuple[Node, ...]) -> list[GradientPoint]:
        offset = 0.5 if self.quadrature == "midpoint" else 0.0
        fractions = [(step + offset) / self.steps for step in range(self.steps)]
        lines: list[tuple[Node, ...]] = [()] if self.along == "inputs" else _sub_layers(nodes)
        return [GradientPoint(fraction, line) for line in lines for fraction in fractions]


def _sub_layers(nodes: tuple[Node, ...]) -> list[tuple[Node, ...]]:
    """The embeddings, each layer's heads together, and each MLP."""
    groups: dict[tuple[type[Node] | None, int], list[Node]] = {}
    for node in nodes:
        groups.setdefault(
            (type(node), node.layer) if isinstance(node, Head | MLP) else (None, -1), []
        ).append(node)
    return [tuple(group) for group in groups.values()]
