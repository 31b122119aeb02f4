"""Batched-edge ACDC: many edges tried at once, each on its own, and all that pass removed together.

A variant of ACDC (Conmy, Mavor-Parker, Lynch, Heimersheim and Garriga-Alonso 2023, https://arxiv.org/abs/2304.14997, section 3), proposed in
the discussion of its speed: most edges are in no circuit and most pairs of edges do not interact. It rests on the independence of the edges
of one group, in that removing one does not change what removing another does (`experiments/edge_independence.py` measures how often that
fails). The edges of a group do not see each other's removal, so this can keep other edges than ACDC, which it equals for groups of one edge.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from circuits.discovery.checkpoint import Checkpoint
from circuits.discovery.discoverer import SPEED_ONLY, CircuitDiscoverer, Progress
from circuits.discovery.search.edge_order import GroupName, check_group, edge_groups
from circuits.graph.circuit import Circuit
from circuits.graph.graph import Graph
from circuits.models import Model
from circuits.models.component_graph import component_graph
from circuits.running.ablation import Ablation
from circuits.running.damage import DamageMeter
from circuits.system.errors import InputError
from circuits.system.ranks import totals
from circuits.tasks.metrics import Metric
from circuits.tasks.task import Task

State = dict[str, Tensor]

LARGEST_BATCH = 256  # circuits handed over at a time: a layer of GPT-2 small has thousands of edges, and each circuit is a row of all 32,491
COUNTS = ("evaluations", "joint_measurements", "bisections", "batches", "node_evaluations")


@dataclass(frozen=True)
class BatchedACDC(CircuitDiscoverer):
    """Measure a group of edges each on its own, and remove at once all whose removal does less damage than the threshold.

    Groups come in ACDC's topological order; edges into a target that no longer reaches the logits when its group's turn comes go untried,
    and those into one that loses its way to the logits with their own group go with it, whatever their score.
    Scores are the measured increases in damage of each edge's removal alone. With `verify`, a joint removal has to do at most the threshold
    more damage than the sum of what its edges do alone; one that does more is bisected, and its parts are tried one after the other.

    Reference: Conmy et al. 2023, https://arxiv.org/abs/2304.14997, with several edges removed at a time

    Attributes:
        threshold: the largest increase in damage an edge may cost and still go, in the metric's unit (nats for KL).
        metric: what damage is measured in.
        ablation: what a removed edge carries instead.
        group: edges tried at once: "target", into a node (a head's v, k and q); "layer", into a layer's heads or MLP; or so many in a row.
        verify: bisect a group whose joint removal does more damage than its single removals promise.
        max_memory: bytes that one step may take; by default chosen from what is free.
    """

    name: ClassVar[str] = "batched-acdc"
    threshold: float
    metric: str | Metric = "kl"
    ablation: str | Ablation = "resample"
    group: GroupName | int = "target"
    verify: bool = False
    max_memory: int | None = field(default=None, kw_only=True, metadata=SPEED_ONLY)

    def __post_init__(self) -> None:
        if not self.threshold >= 0:
            raise InputError(
                f"threshold={self.threshold} must be a number of at least 0; 0.01 is a usual one for KL."
            )
        check_group(self.group)

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
        groups = edge_groups(graph, self.group)
        saved = Checkpoint.open(checkpoint, self.identity(), graph, task)
        damage = DamageMeter.prepare(
            model,
            graph,
            task,
            metric=self.metric,
            ablation=self.ablation,
            max_memory=self.max_memory,
        )
        state = saved.restore(_start(graph, damage, len(groups)))
        for number in range(int(state["next"])):
            damage.near(
                state["removed_in"] >= number
            )  # along the same way, so that rounding is the same as without a break
        for number in range(int(state["next"]), len(groups)):
            damage.near(state["kept"])
            before = dict(damage.executor.counts)
            self._try(groups[number], state, damage)
            for name, value in totals(
                {name: value - before[name] for name, value in damage.executor.counts.items()}
            ).items():
                state[name] += value
            state["next"] = torch.tensor(number + 1)
            saved.save(state)
            if progress:
                progress(number + 1, len(groups))
        return Circuit(graph, state["scores"], state["kept"], record=self.record(**_summary(state)))

    def _try(self, group: Sequence[int], state: State, damage: DamageMeter) -> None:
        """Decide on the edges of one group, and write the decisions into `state`."""
        edges = _without_dead(group, state, damage)
        if not edges:
            return
        found = torch.cat([_removed_alone(batch, state, damage) for batch in _batches(edges)])
        increases = found - state["damage"]
        state["scores"][edges] = increases
        state["evaluations"] += len(edges)
        harmless = [
            edge
            for edge, increase in zip(edges, increases.tolist(), strict=True)
            if increase < self.threshold
        ]
        if harmless:
            # Of one edge the joint removal is the single one.
            known = found[edges.index(harmless[0])].clone() if len(harmless) == 1 else None
            self._remove_together(harmless, state, damage, known)
        for name in ("largest_excess", "excess_left"):
            state[name] = torch.maximum(state[name], state["excess"])
        state["excess"] = torch.zeros_like(state["excess"])
        # A number of edges may lead into a node that lost its way to the logits with this very group.
        _without_dead(edges, state, damage)

    def _remove_together(
        self,
        edges: list[int],
        state: State,
        damage: DamageMeter,
        after: Float[Tensor, ""] | None = None,
    ) -> bool:
        """Remove edges that are harmless alone, or with `verify` what of them can go. `after` is the damage without all, where it is known.

        `excess` is what the group's removals have done so far beyond the sum of their single increases. A single edge adds nothing to it: its
        increase, and so its score, is then the one measured here. Returns whether all went.
        """
        if after is None:
            kept = state["kept"].clone()
            kept[edges] = False
            after = damage(kept[None])[0]
            state["joint_measurements"] += 1
        increase = after - state["damage"]
        if len(edges) == 1:
            state["scores"][edges] = increase
            goes = not self.verify or bool(increase < self.threshold)
            excess = state["excess"]
        else:
            excess = state["excess"] + increase - state["scores"][edges].sum()
            goes = not self.verify or bool(excess <= self.threshold)
        if goes:
            _remove(edges, state)
            state["damage"], state["excess"] = after, excess
        elif len(edges) > 1:
            state["largest_excess"] = torch.maximum(state["largest_excess"], excess)
            state["bisections"] += 1
            half = len(edges) // 2
            first_went = self._remove_together(edges[:half], state, damage)
            # Without the first half, the circuit without the second one is the one just measured.
            self._remove_together(edges[half:], state, damage, after if first_went else None)
        return goes


def _start(graph: Graph, damage: DamageMeter, groups: int) -> State:
    """The whole graph, nothing tried. `removed_in` is the group in which an edge went, or their number."""
    kept = torch.ones(len(graph), dtype=torch.bool)
    scores = torch.full((len(graph),), torch.nan, dtype=torch.float64)
    start = {
        "kept": kept,
        "scores": scores,
        "removed_in": torch.full((len(graph),), groups),
        "damage": damage(kept[None])[0],
    }
    excesses = {
        name: torch.tensor(0.0, dtype=torch.float64)
        for name in ("excess", "largest_excess", "excess_left")
    }
    return {**start, **excesses, **{name: torch.tensor(0) for name in ("next", *COUNTS)}}


def _without_dead(edges: Sequence[int], state: State, damage: DamageMeter) -> list[int]:
    """The edges still kept that can matter; those into targets that do not reach the logits are removed."""
    live = damage.reaching_logits(state["kept"])
    _remove([edge for edge in edges if state["kept"][edge] and not live[edge]], state)
    return [edge for edge in edges if live[edge]]


def _remove(edges: list[int], state: State) -> None:
    state["kept"][edges] = False
    state["removed_in"][edges] = state["next"]


def _batches(edges: list[int]) -> Iterator[list[int]]:
    return (edges[start : start + LARGEST_BATCH] for start in range(0, len(edges), LARGEST_BATCH))


def _removed_alone(edges: list[int], state: State, damage: DamageMeter) -> Float[Tensor, " tried"]:
    """The damage without each of some edges."""
    without = state["kept"].repeat(len(edges), 1)
    without[torch.arange(len(edges)), edges] = False
    return damage(without)


def _summary(state: State) -> dict[str, Any]:
    """What the record says of the search.

    `evaluations` counts edges tried alone, `joint_measurements` what was measured besides. `largest_excess` is the most damage that a joint
    removal was seen to do beyond the sum of its single increases, `excess_left` the most among removals that were made; both at least 0.
    Without `verify` the two are equal, and cost nothing: the damage after each group is needed anyway.
    """
    return {
        **{name: int(state[name]) for name in COUNTS},
        **{name: float(state[name]) for name in ("largest_excess", "excess_left", "damage")},
    }
