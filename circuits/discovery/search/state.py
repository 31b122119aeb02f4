"""A sequential search over edges: what has been decided, and what to decide next."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from circuits.discovery.checkpoint import Checkpoint, TensorState
from circuits.discovery.discoverer import EdgeScores, Progress
from circuits.discovery.search.confirmation import Damages, Increases, Noise
from circuits.discovery.search.edge_order import Chain
from circuits.discovery.search_space import SearchSpace
from circuits.graph.graph import EdgeMask
from circuits.running.damage import DamageMeter
from circuits.running.variants import Variants
from circuits.system.errors import InputError
from circuits.system.ranks import on_first

NEVER, BEFORE = 1 << 62, -1
Group = list[int]
"""Edges that are removed together; most groups have one edge."""
Guesses = Float[Tensor, " edge"]
Seen = Float[Tensor, " group"]
Decisions = Bool[np.ndarray, " group"]
"""True for groups that stay."""


@dataclass(kw_only=True)
class Removals(TensorState):
    """What every search that removes edges keeps."""

    # The circuit so far, H
    kept: EdgeMask
    # The measured increase in damage of each edge tried alone
    scores: EdgeScores
    # The damage of H
    damage: float
    # Decisions made by measuring
    evaluations: int = 0
    # Counted by the executor
    batches: int = 0
    node_evaluations: int = 0

    @contextmanager
    def counting(self, meter: DamageMeter) -> Iterator[None]:
        """Count what the executor does inside the block."""
        counts: dict[str, int] = {}
        with meter.counting(counts):
            yield
        self.batches += counts["batches"]
        self.node_evaluations += counts["node_evaluations"]


@dataclass(kw_only=True)
class SearchState(Removals, Noise):
    """Everything a sequential search has decided so far, and what it expects.

    A chain is what is tried between two targets, see `edge_order.chains`.
    """

    # `announced` when each edge was removed; NEVER for kept edges, BEFORE for those not in the
    # circuit that the search started from
    removed_at: Int[Tensor, " edge"]
    # The number of finished chains
    chains_done: int = 0
    # The number of decided groups of the current chain
    decided: int = 0
    # How often the executor has been told about H (`DamageMeter.near`)
    announced: int = 0
    # `announced` when the current chain began
    began: int = 0
    # For each edge of the graph, by how much its removal is guessed to raise the damage: 0 if
    # nothing is known, infinitely if it is expected to stay
    guessed: Guesses
    # For each group of the current chain, the increase measured last, if it was surveyed
    seen: Seen
    # The number of groups of the current chain that have been measured
    surveyed: int = 0
    # measured and wrong: states measured, and decisions guessed wrong, in the whole search
    measured: int = 0
    wrong: int = 0

    @staticmethod
    def start(space: SearchSpace, meter: DamageMeter, stays: EdgeMask | None) -> SearchState:
        """Nothing tried; `stays=None` expects that all edges go."""
        kept = space.kept.clone()
        guessed = torch.zeros(kept.shape, dtype=torch.float64)
        if stays is not None:
            guessed[stays] = torch.inf
        return SearchState(
            kept=kept,
            scores=torch.full(kept.shape, torch.nan, dtype=torch.float32),
            damage=damage_at_start(space, meter),
            removed_at=torch.where(kept, NEVER, BEFORE),
            guessed=guessed,
            seen=torch.zeros(kept.shape, dtype=torch.float64),
        )

    def remove(self, edges: Sequence[int]) -> None:
        """Take edges out of H."""
        # numpy indexing takes a tenth of the time of torch's.
        # H <- H \ edges
        removed = np.array(edges)
        self.kept.numpy()[removed] = False
        self.removed_at.numpy()[removed] = self.announced


@dataclass
class Search:
    """Walks through the edges of a search space in a fixed order."""

    space: SearchSpace
    meter: DamageMeter
    chains: list[Chain]
    state: SearchState
    # Where the state is saved after every decision
    saved: Checkpoint
    # Called after each chain
    progress: Progress
    # Whether the next decision is the first on edges into its target
    at_new_target: bool = False
    # The fixed cost of a batch of circuits without edges into that target, in circuits
    fixed_cost: float | None = field(default=None, init=False)

    def undecided(self) -> Iterator[list[Group]]:
        """The groups of a chain left to decide; the caller decides at least the first of them."""
        state = self.state
        self._resume()
        while state.chains_done < len(self.chains):
            groups = self._groups(self.chains[state.chains_done])
            while state.decided < len(groups):
                self._approach(groups)
                yield groups[state.decided :]
                state.save(self.saved)
            state.chains_done += 1
            state.decided = 0
            state.began = state.announced
            state.save(self.saved)
            self.progress(state.chains_done, len(self.chains))

    def decide_all(
        self, groups: list[Group], increases: Increases, damages: Damages, stays: Decisions
    ) -> None:
        """Record the decisions on the next groups: `damages` are L(H without each), in turn."""
        state = self.state
        alone = [row for row, group in enumerate(groups) if len(group) == 1]
        tried_alone = [groups[row][0] for row in alone]
        state.scores.numpy()[tried_alone] = increases[alone]
        removed = np.flatnonzero(~stays).tolist()
        if removed:
            state.remove([edge for row in removed for edge in groups[row]])
            state.damage = float(damages[removed[-1]])
        state.decided += len(groups)
        state.evaluations += len(groups)

    def _approach(self, groups: list[Group]) -> None:
        """At a new target, tell the executor about H, which the next circuits are close to."""
        state = self.state
        first_edges = [group[0] for group in groups]
        targets = self.space.graph.target.numpy()[first_edges].tolist()
        target = targets[state.decided]
        self.at_new_target = target not in targets[: state.decided][-1:]
        if self.at_new_target:
            with state.counting(self.meter):
                self.meter.near(state.kept)
            state.announced += 1
        if self.at_new_target or self.fixed_cost is None:
            first = groups[targets.index(target)]
            # GPUs are measured, so ranks may differ, but they take the same batches.
            fixed_cost = self.meter.executor.fixed_cost
            self.fixed_cost = on_first(lambda: fixed_cost(first))

    def _resume(self) -> None:
        """Restore the state, and lead the executor along its history, for equal rounding."""
        self.state.restore(self.saved)
        if self.state.chains_done < len(self.chains):
            for number in range(self.state.announced):
                self.meter.near(self.state.removed_at > number)

    def _groups(self, chain: Chain) -> list[Group]:
        """The groups of a chain, given H when the chain began."""
        # Edges into a target that no longer reaches the logits are removed untried.
        at_start = self.state.removed_at > self.state.began
        kept = at_start.numpy()
        live = self.meter.reaching_logits(at_start).numpy()
        groups: list[Group] = []
        for trial in chain:
            edges = [edge for edge in trial.edges if kept[edge]]
            if edges and not live[edges].any():
                self.state.remove(edges)
            elif trial.together and edges:
                groups.append(edges)
            else:
                groups += [[edge] for edge in edges]
        return groups


def without_in_turn(kept: EdgeMask, groups: list[Group], expected: Decisions) -> Variants:
    """For each group, H without it and without the groups before it that are expected to go."""
    numbers = np.arange(len(groups))
    sizes = list(map(len, groups))
    group_of_edge = np.repeat(numbers, sizes)
    row = numbers[:, None]
    gone_before = (row > group_of_edge) & ~expected[group_of_edge]
    gone = gone_before | (row == group_of_edge)
    return Variants(kept, np.concatenate(groups), ~gone)


def damage_at_start(space: SearchSpace, meter: DamageMeter) -> float:
    """Measure the circuit that a search starts from; refuse one of which nothing matters."""
    live = meter.reaching_logits(space.kept)
    if not (live & space.tried).any():
        counts = space.counts()
        raise InputError(
            f"none of the {counts['tried']} edges to try reaches the logits, with "
            f"{counts['frozen_out']} others ablated from the start; start from a circuit that "
            "reaches them, such as scores.greedy(n), or from a graph with edges."
        )
    return float(meter(space.kept[None]))
