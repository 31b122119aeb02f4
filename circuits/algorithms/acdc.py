"""ACDC: automatic circuit discovery, exact and sequential.

Conmy, Mavor-Parker, Lynch, Heimersheim and Garriga-Alonso 2023, "Towards Automated Circuit Discovery for Mechanistic Interpretability"
(https://arxiv.org/abs/2304.14997), section 3. Start from the whole graph; from the logits up, remove each edge whose removal raises the
damage by less than a threshold, given all that was removed before. A target that no longer reaches the logits loses its edges untried.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor

from circuits.ablation import Ablation
from circuits.circuit import Circuit
from circuits.components import component_graph
from circuits.discoverer import Checkpoint, CircuitDiscoverer, Progress
from circuits.edge_order import OrderName, Trial, edge_order
from circuits.errors import InputError
from circuits.execution import DamageMeter
from circuits.graph import Graph
from circuits.metrics import Metric
from circuits.models import Model
from circuits.tasks.base import Task

State = dict[str, Tensor]


@dataclass(frozen=True)
class ACDC(CircuitDiscoverer):
    """Remove, one at a time from the logits up, every edge whose removal does less damage than the threshold.

    Scores are the measured increases in damage, each in the state the search was in; edges never tried on their own stay unscored.

    Reference: Conmy et al. 2023, https://arxiv.org/abs/2304.14997

    Attributes:
        threshold: the largest increase in damage an edge may cost and still go, in the metric's unit (nats for KL).
        metric: what damage is measured in.
        ablation: what a removed edge carries instead.
        order: in which order edges are tried; "original" is that of the authors' code, with its group tests.
        absolute: compare the size of the change with the threshold, so that edges which hurt are kept too.
    """

    name: ClassVar[str] = "acdc"
    threshold: float
    metric: str | Metric = "kl"
    ablation: str | Ablation = "resample"
    order: OrderName = "topological"
    absolute: bool = False

    def __post_init__(self) -> None:
        if not self.threshold >= 0:
            raise InputError(f"threshold={self.threshold} must be a number of at least 0; 0.01 is a usual one for KL.")

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
        trials = edge_order(graph, self.order)
        saved = Checkpoint.open(checkpoint, self, graph, task)
        damage = DamageMeter.prepare(model, graph, task, metric=self.metric, ablation=self.ablation)
        kept = torch.ones(len(graph), dtype=torch.bool)
        start = {"kept": kept, "scores": torch.full((len(graph),), torch.nan), "damage": damage(kept[None])[0].double()}
        state = saved.restore({**start, "next": torch.tensor(0), "evaluations": torch.tensor(0)})
        for number in range(int(state["next"]), len(trials)):
            self._try(trials[number], state, graph, damage)
            state["next"] = torch.tensor(number + 1)
            saved.save(state)
            if progress:
                progress(number + 1, len(trials))
        counts = {"evaluations": int(state["evaluations"]), "damage": float(state["damage"])}
        return Circuit(graph, state["scores"], state["kept"], record=self.record(**counts))

    def _try(self, trial: Trial, state: State, graph: Graph, damage: DamageMeter) -> None:
        """Decide on one target's slot, and write the decisions into `state`."""
        edges = [edge for edge in trial.edges if state["kept"][edge]]
        if not edges:
            return
        if not graph.reaching_logits(state["kept"])[edges].any():
            state["kept"][edges] = False
            return
        for group in [edges] if trial.together else [[edge] for edge in edges]:
            self._decide(group, state, damage)

    def _decide(self, group: list[int], state: State, damage: DamageMeter) -> None:
        without = state["kept"].clone()
        without[group] = False
        new = damage(without[None])[0].double()
        increase = new - state["damage"]
        state["evaluations"] = state["evaluations"] + 1
        if len(group) == 1:
            state["scores"][group] = increase.float()
        if (increase.abs() if self.absolute else increase) < self.threshold:
            state["kept"], state["damage"] = without, new
