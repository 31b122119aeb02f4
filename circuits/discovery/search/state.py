"""A sequential search over edges: what has been decided, and what to decide next."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from circuits.discovery.checkpoint import TensorState
from circuits.discovery.search.edge_order import OrderName, Trial, chains
from circuits.graph.graph import Graph
from circuits.running.damage import DamageMeter

NEVER = 1 << 62

Group = list[int]
"""Edges that are removed together; most groups have one edge."""


@dataclass
class SearchState(TensorState):
    """Everything a sequential search has decided so far.

    A chain is what is tried between two targets, see `edge_order.chains`.

    Attributes:
        kept: the circuit so far, H.
        scores: the measured increase in damage of each edge tried alone.
        damage: the damage of H.
        chains_done: the number of finished chains.
        decided: the number of decided groups of the current chain.
        announced: how often the executor has been told about H (`DamageMeter.near`).
        began: `announced` when the current chain began.
        removed_at: `announced` when each edge was removed; NEVER for kept edges.
        evaluations: decisions made by measuring.
        batches, node_evaluations: counted by the executor.
    """

    kept: Bool[Tensor, " edge"]
    scores: Float[Tensor, " edge"]
    removed_at: Int[Tensor, " edge"]
    damage: float
    chains_done: int = 0
    decided: int = 0
    announced: int = 0
    began: int = 0
    evaluations: int = 0
    batches: int = 0
    node_evaluations: int = 0

    @staticmethod
    def start(graph: Graph, damage: DamageMeter) -> SearchState:
        """The whole graph, with nothing tried."""
        kept = torch.ones(len(graph), dtype=torch.bool)
        scores = torch.full((len(graph),), torch.nan)
        removed_at = torch.full((len(graph),), NEVER)
        return SearchState(kept, scores, removed_at, float(damage(kept[None])[0]))

    def remove(self, edges: Sequence[int]) -> None:
        """Take edges out of H."""
        # numpy indexing takes a tenth of the time of torch's.
        self.kept.numpy()[edges] = False
        self.removed_at.numpy()[edges] = self.announced


@dataclass
class Search:
    """Walks through the edges of a graph in a fixed order.

    Attributes:
        chain_finished: called with (done, total) after each chain.
        at_new_target: whether the next decision is the first on edges into its target.
    """

    graph: Graph
    meter: DamageMeter
    chains: list[list[Trial]]
    state: SearchState
    chain_finished: Callable[[int, int], None] = lambda done, total: None
    at_new_target: bool = False
    _first_group: Group = field(default_factory=list)
    _fixed_cost: float | None = None

    @staticmethod
    def start(graph: Graph, meter: DamageMeter, order: OrderName) -> Search:
        """A search that has tried nothing."""
        return Search(graph, meter, chains(graph, order), SearchState.start(graph, meter))

    def undecided(self) -> Iterator[list[Group]]:
        """The groups of the current chain that are left to decide, until no chain has any.

        The caller decides at least the first of them before it asks again.
        """
        state = self.state
        self._repeat_announcements()
        while state.chains_done < len(self.chains):
            groups = self._groups(self.chains[state.chains_done])
            targets = self.graph.target.numpy()[[group[0] for group in groups]].tolist()
            self._fixed_cost = None
            while (done := state.decided) < len(groups):
                self._first_group = groups[targets.index(targets[done])]
                self.at_new_target = done == 0 or targets[done] != targets[done - 1]
                if self.at_new_target:
                    self._announce()
                yield groups[done:]
            state.chains_done += 1
            state.decided, state.began = 0, state.announced
            self.chain_finished(state.chains_done, len(self.chains))

    def decide(self, group: Group, increase: float, damage: float, *, remove: bool) -> None:
        """Record the decision on the next undecided group.

        Args:
            increase: L(H without the group) - L(H), in the metric's unit.
            damage: L(H without the group).
        """
        state = self.state
        if len(group) == 1:
            state.scores[group[0]] = increase
        if remove:
            state.remove(group)
            state.damage = damage
        state.decided += 1
        state.evaluations += 1

    @property
    def fixed_cost(self) -> float:
        """Fixed cost of a batch of circuits without edges into the current target, in circuits."""
        if self._fixed_cost is None:
            self._fixed_cost = self.meter.executor.fixed_cost(self._first_group)
        return self._fixed_cost

    @contextmanager
    def counting(self) -> Iterator[None]:
        """Count what the executor does inside the block."""
        counts: dict[str, int] = {}
        with self.meter.counting(counts):
            yield
        self.state.batches += counts["batches"]
        self.state.node_evaluations += counts["node_evaluations"]

    def _announce(self) -> None:
        """Tell the executor about H, from which the circuits to come differ by a few edges."""
        with self.counting():
            self.meter.near(self.state.kept)
        self.state.announced += 1
        self._fixed_cost = None

    def _repeat_announcements(self) -> None:
        """After resuming: lead the executor along the same states as before, so that its rounding
        is that of an uninterrupted search.
        """
        if self.state.chains_done < len(self.chains):
            for number in range(self.state.announced):
                self.meter.near(self.state.removed_at > number)

    def _groups(self, chain: list[Trial]) -> list[Group]:
        """The groups of a chain, given H when the chain began.

        Edges into a target that no longer reaches the logits are removed without being tried.
        """
        at_start = self.state.removed_at > self.state.began
        kept, live = at_start.numpy(), self.meter.reaching_logits(at_start).numpy()
        groups: list[Group] = []
        for trial in chain:
            edges = [edge for edge in trial.edges if kept[edge]]
            if edges and not live[edges].any():
                self.state.remove(edges)
            elif edges:
                groups += [edges] if trial.together else [[edge] for edge in edges]
        return groups


def without_each(
    kept: Bool[Tensor, " edge"], groups: list[Group], expected: Bool[np.ndarray, " group"]
) -> Bool[Tensor, "group edge"]:
    """For each group, H without it and without the groups before it that are expected to go.

    Args:
        expected: True for groups that are expected to stay.
    """
    row = np.arange(len(groups))[:, None]
    group = np.repeat(np.arange(len(groups)), [len(edges) for edges in groups])
    gone = (row == group) | (row > group) & ~expected[group]
    without = np.repeat(kept.numpy()[None], len(groups), axis=0)
    without[:, np.concatenate(groups)] = ~gone
    return torch.from_numpy(without)
