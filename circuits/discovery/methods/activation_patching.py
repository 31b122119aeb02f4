"""Activation patching: the exact damage of ablating every edge alone, which EAP approximates.

Wang et al. 2022, "Interpretability in the Wild" (https://arxiv.org/abs/2211.00593), path patching;
Goldowsky-Dill et al. 2023, "Localizing Model Behavior with Path Patching"
(https://arxiv.org/abs/2304.05969).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import partial
from itertools import groupby, islice, product, starmap
from typing import ClassVar, Literal

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor
from typing_extensions import override

from circuits.discovery.checkpoint import Checkpoint, TensorState
from circuits.discovery.discoverer import SPEED_ONLY, EdgeScores, Progress, Resumable
from circuits.graph.circuit import Circuit
from circuits.graph.graph import EdgeMask, Graph
from circuits.graph.nodes import MLP, Head, Logits, Node, at_position
from circuits.models import Model, check_model, shape_of
from circuits.models.component_graph import component_graph
from circuits.running.ablation import Ablation
from circuits.running.damage import DamageMeter
from circuits.running.variants import Variants
from circuits.system.errors import InputError
from circuits.system.kinds import one_of
from circuits.system.ranks import ranks
from circuits.system.torch_modes import without_modes
from circuits.tasks.metrics import Metric
from circuits.tasks.model_fit import check_task
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
        every_edge = torch.ones_like(self.scores, dtype=torch.bool)
        edges = range(step.start, step.stop)
        without = Variants.without_each(every_edge, edges)
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
        total = len(graph)
        if saved.is_new:
            progress(0, total)
        meter = self.meter(model, graph, task)
        whole = _whole(meter, graph)
        state = PatchingState.start(graph)
        state.restore(saved)
        for step in _steps(graph):
            if state.scores[step].isnan().any():  # not measured before an interruption
                state.measure(meter, step, whole)
                state.save(saved)
                progress(state.edges_measured, total)
        record = self.record(evaluations=total, node_evaluations=state.node_evaluations)
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
        sources = graph.source.unique().tolist()
        groups = (graph.source == source for source in sources)
        scores = self._without_each(groups, model, graph, task)
        nodes = [graph.nodes[source] for source in sources]
        return dict(zip(nodes, scores.tolist(), strict=True))

    @without_modes()
    def heads(
        self, model: Model, task: Task, *, graph: Graph | None = None
    ) -> Float[Tensor, "layer head"]:
        """The damage of patching each head's output, all positions together.

        Raises:
            InputError: the model, graph, task and settings do not fit together.

        >>> import circuits
        >>> model = circuits.load_model("toy-world")
        >>> task = circuits.load_task("ioi", model, n=2)
        >>> circuits.ActivationPatching().heads(model, task).shape
        torch.Size([4, 4])
        """
        check_model(model)
        graph = self.search_graph(model, graph)
        shape = shape_of(model).n_layers, shape_of(model).n_heads
        labels = [Head(*place).label for place in np.ndindex(shape)]
        groups = (
            _of_nodes(graph, [node.label == label for node in graph.nodes]) for label in labels
        )
        scores = self._without_each(groups, model, graph, task)
        return scores.float().view(shape)

    @without_modes()
    def layers(
        self, model: Model, task: Task, *, graph: Graph | None = None
    ) -> Float[Tensor, "layer 2"]:
        """The damage of patching what each layer's heads write together, and what its MLP writes.

        Raises:
            InputError: the model, graph, task and settings do not fit together.
        """
        check_model(model)
        graph = self.search_graph(model, graph)
        shape = shape_of(model).n_layers, 2
        layers = range(shape_of(model).n_layers)
        places = product(layers, ("heads", "mlp"))
        groups = starmap(partial(_at_layer, graph), places)
        scores = self._without_each(groups, model, graph, task)
        return scores.float().view(shape)

    @without_modes()
    def by_position(
        self,
        model: Model,
        task: Task,
        of: Literal["residual", "heads", "mlp"] = "residual",
        *,
        graph: Graph | None = None,
    ) -> pd.DataFrame:
        """The damage of patching one position of each layer.

        >>> import circuits
        >>> model = circuits.load_model("toy-world")
        >>> task = circuits.load_task("ioi", model, n=2)
        >>> graph = circuits.component_graph(model, positions=["S1", "S2", "END"])
        >>> table = circuits.ActivationPatching().by_position(model, task, graph=graph)
        >>> list(table.index), list(table.columns)
        (['rest', 'S1', 'S2', 'END'], [0, 1, 2, 3])

        Args:
            of: what is patched: the "residual" stream that enters the layer, or what its "heads"
                write together, or its "mlp".
            graph: a graph split by position; None splits by every position of the prompts.

        Returns:
            A row per position, or named span, and a column per layer.

        Raises:
            InputError: there is no such `of`; the graph is not split by position; or the model,
                graph, task and settings do not fit together.
        """
        one_of(of, "of", ["residual", "heads", "mlp"])
        check_task(model, task)
        if graph is None:
            graph = component_graph(model, positions=task.clean.shape[1])
        graph = self.search_graph(model, graph)
        if graph.positions is None:
            raise InputError(
                "this graph is not split by position; make it with component_graph(model, "
                "positions=[...]), or leave it out."
            )
        layers = range(shape_of(model).n_layers)
        groups = (
            _at_layer(graph, layer, of)
            & _of_nodes(graph, [node == at_position(node, position) for node in graph.nodes])
            for position in graph.positions
            for layer in layers
        )
        scores = self._without_each(groups, model, graph, task)
        table = scores.view(len(graph.positions), -1).numpy()
        index = pd.Index(graph.positions, name="position")
        return pd.DataFrame(table, index, pd.Index(layers, name="layer"))

    def _without_each(
        self, groups: Iterable[EdgeMask], model: Model, graph: Graph, task: Task
    ) -> Float[Tensor, " group"]:
        """The damage of ablating each group of edges at once."""
        meter = self.meter(model, graph, task)
        left = iter(groups)
        damages = []
        while step := list(islice(left, NODES_PER_STEP)):
            damages.append(meter(~torch.stack(step)))
        # score(group) = L(G without the group) - L(G)
        return torch.cat(damages) - _whole(meter, graph)


def _of_nodes(graph: Graph, chosen: list[bool]) -> EdgeMask:
    """The edges that leave the chosen ones of a graph's nodes."""
    return torch.tensor(chosen)[graph.source]


def _at_layer(graph: Graph, layer: int, of: str) -> EdgeMask:
    """The edges that carry what enters a layer, or what its heads or its MLP write."""
    if of == "residual":
        # Embeddings come before, and the logits after every layer.
        layers = [getattr(node, "layer", -1) for node in graph.nodes]
        reads = [
            isinstance(node, Logits) or at >= layer
            for node, at in zip(graph.nodes, layers, strict=True)
        ]
        is_before = _of_nodes(graph, [at < layer for at in layers])
        return is_before & torch.tensor(reads)[graph.target]
    kind = Head if of == "heads" else MLP
    chosen = [isinstance(node, kind) and node.layer == layer for node in graph.nodes]
    return _of_nodes(graph, chosen)


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
