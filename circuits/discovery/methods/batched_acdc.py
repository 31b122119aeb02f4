"""Batched-edge ACDC: try many edges at once, each alone, and remove all that pass together.

A variant of ACDC (Conmy et al. 2023, https://arxiv.org/abs/2304.14997, section 3), proposed in the
discussion of its speed: most edges are in no circuit, and most pairs of edges do not interact. It
assumes that the edges of a group are independent: that removing one does not change what removing
another does (`experiments/edge_independence.py` measures how often that fails). Since the edges of
a
group do not see each other's removal, it can keep other edges than ACDC; with groups of one edge it
equals ACDC.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from typing_extensions import override

from circuits.discovery.checkpoint import Checkpoint, TensorState
from circuits.discovery.discoverer import SPEED_ONLY, Progress, Resumable
from circuits.discovery.search.edge_order import GroupName, check_group, edge_groups
from circuits.graph.circuit import Circuit
from circuits.graph.graph import Graph
from circuits.models import Model
from circuits.running.ablation import Ablation
from circuits.running.damage import DamageMeter
from circuits.running.settings import RunSettings
from circuits.system.errors import InputError
from circuits.tasks.metrics import Metric
from circuits.tasks.task import Task

# Circuits measured at a time: a layer of GPT-2 small has thousands of edges, and each circuit is a
# row of all 32,491.
LARGEST_BATCH = 256


@dataclass
class BatchedState(TensorState):
    """What has been decided so far.

    Attributes:
        kept: the circuit so far, H.
        scores: the measured increase in damage of each edge alone.
        removed_in: the group in which each edge was removed; the number of groups for kept edges.
        damage: the damage of H.
        groups_done: the number of finished groups.
        excess: damage of the current group's removals beyond the sum of their single increases.
        largest_excess: the largest excess seen, removed together or not.
        excess_left: the largest excess among removals that were made.
        evaluations: edges tried alone.
        joint_measurements: circuits measured besides.
    """

    kept: Bool[Tensor, " edge"]
    scores: Float[Tensor, " edge"]
    removed_in: Int[Tensor, " edge"]
    damage: float
    groups_done: int = 0
    excess: float = 0.0
    largest_excess: float = 0.0
    excess_left: float = 0.0
    evaluations: int = 0
    joint_measurements: int = 0
    bisections: int = 0
    batches: int = 0
    node_evaluations: int = 0

    def remove(self, edges: Sequence[int]) -> None:
        """Take edges out of H."""
        self.kept[edges] = False
        self.removed_in[edges] = self.groups_done

    def summary(self) -> dict[str, Any]:
        """What the circuit's record says of the search."""
        internal = ("kept", "scores", "removed_in", "groups_done", "excess")
        return {name: value for name, value in vars(self).items() if name not in internal}


@dataclass(frozen=True)
class BatchedACDC(Resumable):
    """Remove, at once, all edges of a group whose removal alone does little damage.

    Groups come in ACDC's topological order. Edges into a target that no longer reaches the logits
    are removed without being tried, or, if their own group cut the target off, whatever their
    score. Scores are the measured increases in damage of each edge's removal alone. With `verify`,
    a joint removal may do at most the threshold more damage than the sum of its single removals;
    one that does more is bisected, and its parts are tried one after the other.

    Reference: Conmy et al. 2023, https://arxiv.org/abs/2304.14997, with several edges at a time

    Attributes:
        threshold: the largest increase in damage at which an edge is still removed, in the metric's
            unit (nats for KL).
        metric: what damage is measured in.
        ablation: what a removed edge carries instead.
        group: edges tried at once: "target", into a node (a head's v, k and q); "layer", into a
            layer's heads or MLP; or a number of consecutive edges.
        verify: bisect a group whose joint removal does more damage than its single removals.
        max_memory: bytes that one step may take; None chooses from the memory that is free.

    >>> import circuits
    >>> model = circuits.load_model("toy-world")
    >>> task = circuits.load_task("ioi", model, n=4, split="train")
    >>> circuit = circuits.BatchedACDC(threshold=0.1, group="layer").discover(model, task)
    >>> 0 < len(circuit) < 60
    True
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
                f"threshold={self.threshold} must be a number of at least 0; 0.01 is usual for KL."
            )
        check_group(self.group)

    @override
    def discover(
        self,
        model: Model,
        task: Task,
        *,
        graph: Graph | None = None,
        checkpoint: Checkpoint | str | Path | None = None,
        progress: Progress | None = None,
    ) -> Circuit:
        graph = self.search_graph(model, graph)
        groups = edge_groups(graph, self.group)
        saved = Checkpoint.open(checkpoint, self.identity(), graph, task)
        settings = RunSettings.parse(
            task, ablation=self.ablation, metric=self.metric, max_memory=self.max_memory
        )
        meter = DamageMeter.prepare(model, graph, task, settings)
        start = _start(graph, meter, len(groups))
        state = start.from_tensors(saved.restore(start.to_tensors()))
        for number in range(state.groups_done):
            # Lead the executor along the same circuits as before the interruption, so that its
            # rounding is the same.
            meter.near(state.removed_in >= number)
        for number in range(state.groups_done, len(groups)):
            counts: dict[str, int] = {}
            with meter.counting(counts):
                meter.near(state.kept)
                self._decide(groups[number], state, meter)
            state.batches += counts["batches"]
            state.node_evaluations += counts["node_evaluations"]
            state.groups_done = number + 1
            saved.save(state.to_tensors())
            if progress:
                progress(number + 1, len(groups))
        return Circuit(graph, state.scores, state.kept, record=self.record(**state.summary()))

    def _decide(self, group: Sequence[int], state: BatchedState, meter: DamageMeter) -> None:
        """Decide on the edges of one group."""
        edges = _without_dead(group, state, meter)
        if not edges:
            return
        # increase(e) = L(H \ e) - L(H), each edge alone
        damages = torch.cat([_removed_alone(some, state, meter) for some in _batches(edges)])
        increases = damages - state.damage
        state.scores[edges] = increases
        state.evaluations += len(edges)
        harmless = [edges[row] for row in (increases < self.threshold).nonzero().flatten().tolist()]
        if harmless:
            # For one edge the joint removal is the single one, measured already.
            known = float(damages[edges.index(harmless[0])]) if len(harmless) == 1 else None
            self._remove_together(harmless, state, meter, known)
        state.largest_excess = max(state.largest_excess, state.excess)
        state.excess_left = max(state.excess_left, state.excess)
        state.excess = 0.0
        # The group may have cut off a target that other edges of the group lead to.
        _without_dead(edges, state, meter)

    def _remove_together(
        self, edges: list[int], state: BatchedState, meter: DamageMeter, after: float | None = None
    ) -> bool:
        """Remove edges that are harmless alone; with `verify`, as many of them as pass.

        A single edge has no excess: its increase, and so its score, is then the one measured here.

        Args:
            after: the damage without all of the edges, if known.

        Returns:
            Whether all of them were removed.
        """
        if after is None:
            kept = state.kept.clone()
            kept[edges] = False
            after = float(meter(kept[None])[0])
            state.joint_measurements += 1
        increase, excess = after - state.damage, state.excess
        if len(edges) == 1:
            state.scores[edges] = increase
            removed = not self.verify or increase < self.threshold
        else:
            # excess = increase of the joint removal - sum of the single increases
            excess += increase - float(state.scores[edges].sum())
            removed = not self.verify or excess <= self.threshold
        if removed:
            state.remove(edges)
            state.damage, state.excess = after, excess
        elif len(edges) > 1:
            state.largest_excess = max(state.largest_excess, excess)
            state.bisections += 1
            half = len(edges) // 2
            first_removed = self._remove_together(edges[:half], state, meter)
            # Without the first half, the circuit without the second one was measured just now.
            self._remove_together(edges[half:], state, meter, after if first_removed else None)
        return removed


def _start(graph: Graph, meter: DamageMeter, groups: int) -> BatchedState:
    """The whole graph, with nothing tried."""
    kept = torch.ones(len(graph), dtype=torch.bool)
    scores = torch.full((len(graph),), torch.nan, dtype=torch.float64)
    removed_in = torch.full((len(graph),), groups)
    return BatchedState(kept, scores, removed_in, float(meter(kept[None])[0]))


def _without_dead(edges: Sequence[int], state: BatchedState, meter: DamageMeter) -> list[int]:
    """The kept edges that can matter; those into targets cut off from the logits are removed."""
    live = meter.reaching_logits(state.kept)
    state.remove([edge for edge in edges if state.kept[edge] and not live[edge]])
    return [edge for edge in edges if live[edge]]


def _batches(edges: list[int]) -> list[list[int]]:
    starts = range(0, len(edges), LARGEST_BATCH)
    return [edges[start : start + LARGEST_BATCH] for start in starts]


def _removed_alone(
    edges: list[int], state: BatchedState, meter: DamageMeter
) -> Float[Tensor, " tried"]:
    """The damage without each of some edges."""
    without = state.kept.repeat(len(edges), 1)
    without[torch.arange(len(edges)), edges] = False
    return meter(without)
