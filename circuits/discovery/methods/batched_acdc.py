"""Batched-edge ACDC: try many edges at once, each alone, and remove all that pass together.

A variant of ACDC (Conmy et al. 2023, https://arxiv.org/abs/2304.14997, section 3), proposed in the
discussion of its speed: most edges are in no circuit, and most pairs of edges do not interact. It
assumes that the edges of a group are independent: that removing one does not change what removing
another does (`experiments/edge_independence.py` measures how often that fails). Since the edges of
a group do not see each other's removal, it can keep other edges than ACDC; with groups of one edge
it equals ACDC.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar, get_args

import torch
from jaxtyping import Float, Int
from torch import Tensor
from typing_extensions import override

from circuits.discovery.checkpoint import Checkpoint
from circuits.discovery.discoverer import SPEED_ONLY, Progress, Resumable
from circuits.discovery.search.edge_order import GroupName, edge_groups
from circuits.discovery.search.state import BEFORE, Removals, damage_at_start
from circuits.discovery.search_space import SearchSpace
from circuits.discovery.threshold import check_threshold
from circuits.graph.circuit import Circuit
from circuits.models import Model
from circuits.running.ablation import Ablation
from circuits.running.damage import DamageMeter
from circuits.running.variants import Variants
from circuits.system.errors import InputError
from circuits.tasks.metrics import Metric
from circuits.tasks.task import Task

# Circuits measured at a time: a layer of GPT-2 small has thousands of edges, and each circuit is a
# row of all 32,491.
LARGEST_BATCH = 256
Group = Sequence[int]

# What the record says of a search.
RECORDED = (
    "damage",
    "largest_excess",
    "excess_left",
    "evaluations",
    "joint_measurements",
    "bisections",
    "batches",
    "node_evaluations",
)


@dataclass(kw_only=True)
class BatchedState(Removals):
    """What has been decided so far."""

    # The group in which each edge was removed; the number of groups for kept edges, BEFORE for
    # those not in the circuit that the search started from
    removed_in: Int[Tensor, " edge"]
    # The number of finished groups
    groups_done: int = 0
    # Damage of the current group's removals beyond the sum of their single increases
    excess: float = 0.0
    # The largest excess seen, removed together or not
    largest_excess: float = 0.0
    # The largest excess among removals that were made
    excess_left: float = 0.0
    # Circuits measured besides those without a single edge
    joint_measurements: int = 0
    # Joint removals that did too much damage
    bisections: int = 0

    @staticmethod
    def start(space: SearchSpace, meter: DamageMeter, groups: int) -> BatchedState:
        """Nothing tried."""
        kept = space.kept.clone()
        return BatchedState(
            kept=kept,
            scores=torch.full(kept.shape, torch.nan, dtype=torch.float64),
            damage=damage_at_start(space, meter),
            removed_in=torch.where(kept, groups, BEFORE),
        )

    def remove(self, edges: Group) -> None:
        """Take edges out of H."""
        self.kept[edges] = False
        self.removed_in[edges] = self.groups_done

    def finish_group(self) -> None:
        """Record the excess of the current group, and start from none."""
        self.largest_excess = max(self.largest_excess, self.excess)
        self.excess_left = max(self.excess_left, self.excess)
        self.excess = 0.0


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
        check_threshold(self.threshold)
        group = self.group
        named = isinstance(group, str) and group in get_args(GroupName)
        # Whole numbers of any library are ints by now, and bools are none.
        is_number = type(group) is int and group >= 1
        if not (named or is_number):
            raise InputError(
                f"group={self.group!r} is no way to group edges; choose 'target', 'layer' or a "
                "number of edges of at least 1."
            )

    @override
    def find_within(
        self, model: Model, task: Task, space: SearchSpace, saved: Checkpoint, progress: Progress
    ) -> Circuit:
        graph = space.graph
        groups = edge_groups(graph, self.group, space.tried)
        if saved.is_new:
            progress(0, len(groups))
        meter = self.meter(model, graph, task)
        state = BatchedState.start(space, meter, len(groups))
        search = BatchedSearch(meter, state, self.threshold, self.verify)
        search.run(groups, saved, progress)
        found = {name: getattr(state, name) for name in RECORDED}
        record = self.record(**found, search_space=space.counts())
        return Circuit(graph, state.scores, state.kept, record=record)


@dataclass
class BatchedSearch:
    """Decides on one group of edges after the other; the attributes are those of `BatchedACDC`."""

    meter: DamageMeter
    state: BatchedState
    threshold: float
    verify: bool

    def run(self, groups: Sequence[Group], saved: Checkpoint, progress: Progress) -> None:
        """Decide on all groups that are not done in the saved state."""
        state = self.state
        state.restore(saved)
        for number in range(state.groups_done):
            # Lead the executor along the same circuits as before the interruption, so that its
            # rounding is the same.
            self.meter.near(state.removed_in >= number)
        for group in groups[state.groups_done :]:
            # What getting near computes is no measurement, and is not counted.
            self.meter.near(state.kept)
            with state.counting(self.meter):
                self.decide(group)
            state.groups_done += 1
            state.save(saved)
            progress(state.groups_done, len(groups))

    def decide(self, group: Group) -> None:
        """Decide on the edges of one group."""
        state = self.state
        edges = self._without_dead(group)
        if not edges:
            return
        # increase(e) = L(H \ e) - L(H), each edge alone
        damages = self._damages_without(edges)
        increases = damages - state.damage
        state.scores[edges] = increases
        state.evaluations += len(edges)
        below = increases < self.threshold
        harmless = torch.tensor(edges)[below].tolist()
        if len(harmless) == 1:
            # The joint removal is the single one, measured already.
            self._remove_together(harmless, float(damages[below]))
        elif harmless:
            self._remove_together(harmless)
        state.finish_group()
        # The group may have cut off a target that other edges of the group lead to.
        self._without_dead(edges)

    def _remove_together(self, edges: Group, after: float | None = None) -> bool:
        """Remove edges that are harmless alone; with `verify`, as many of them as pass.

        A single edge has no excess: its increase, and so its score, is then the one measured here.
        `after` is the damage without all of them, if known. Returns whether all were removed.
        """
        state = self.state
        if after is None:
            after = self._damage_without(edges)
        increase = after - state.damage
        excess = state.excess
        if len(edges) == 1:
            state.scores[edges] = increase
            passes = increase < self.threshold
        else:
            # excess = increase of the joint removal - sum of the single increases
            single_increases = state.scores[edges]
            excess += increase - float(single_increases.sum())
            passes = excess <= self.threshold
        if passes or not self.verify:
            state.remove(edges)
            state.damage = after
            state.excess = excess
            return True
        if len(edges) > 1:
            state.largest_excess = max(state.largest_excess, excess)
            self._bisect(edges, after)
        return False

    def _bisect(self, edges: Group, after: float) -> None:
        """Try to remove first one half of the edges and then the other."""
        self.state.bisections += 1
        half = len(edges) // 2
        first_removed = self._remove_together(edges[:half])
        # Without the first half, the circuit without the second one was measured just now.
        known = after if first_removed else None
        self._remove_together(edges[half:], known)

    def _without_dead(self, edges: Group) -> list[int]:
        """The edges that can matter; those into targets cut off from the logits are removed."""
        state = self.state
        live = self.meter.reaching_logits(state.kept)
        dead = state.kept & ~live
        cut_off = [edge for edge in edges if dead[edge]]
        state.remove(cut_off)
        return [edge for edge in edges if live[edge]]

    def _damages_without(self, edges: Group) -> Float[Tensor, " tried"]:
        """The damage without each of some edges, alone."""
        damages = []
        # L(H \ e) for each edge e
        for start in range(0, len(edges), LARGEST_BATCH):
            some = edges[start : start + LARGEST_BATCH]
            without = Variants.without_each(self.state.kept, some)
            damages.append(self.meter(without))
        return torch.cat(damages)

    def _damage_without(self, edges: Group) -> float:
        """The damage without all of some edges."""
        kept = self.state.kept.clone()
        kept[edges] = False
        self.state.joint_measurements += 1
        return float(self.meter(kept[None]))
