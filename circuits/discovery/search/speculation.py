"""Speculation: many decisions of a sequential search found in one batch.

Guess the next decisions and measure each removal in the state in which the guess would leave the
search. Accept decisions as long as they turn out as guessed, and the first one that does not: all
of these were measured in exactly the state of the sequential search. Whatever the guess, the result
is that of `sequential`; a good guess only makes it cheaper.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from circuits.discovery.checkpoint import TensorState
from circuits.discovery.search.confirmation import Increases
from circuits.discovery.search.measurement import Measurement
from circuits.discovery.search.state import Group, Search, without_each
from circuits.graph.graph import Graph
from circuits.system.errors import NotFiniteError
from circuits.system.ranks import ranks

Decisions = Bool[np.ndarray, " group"]
"""True for groups that stay."""

# How often a guess fails that rests on a measurement in a neighbouring state.
WRONG_AFTER_MEASURING = 0.08
# The most decisions to speculate on at once, for each of the ranks that share them.
LARGEST_BATCH = 256


@dataclass
class Guesses(TensorState):
    """What decisions are expected, and how often that was right.

    Attributes:
        stays: for each edge of the graph, whether it is expected to stay.
        expected: for each group of the current chain, whether it is expected to stay.
        surveyed: the number of groups of the current chain that have been measured.
        measured, wrong: states measured, and decisions guessed wrong, in the whole search.
    """

    stays: Bool[Tensor, " edge"]
    expected: Bool[Tensor, " edge"]
    surveyed: int = 0
    measured: int = 0
    wrong: int = 0

    @staticmethod
    def start(graph: Graph, stays: Bool[Tensor, " edge"] | None) -> Guesses:
        """Guess that these edges stay; None guesses that all edges go."""
        none = torch.zeros(len(graph), dtype=torch.bool)
        return Guesses(none if stays is None else stays, none.clone())


@dataclass
class Speculation:
    """Decides on the groups of a search in batches.

    Attributes:
        similar: equal numbers for edges that tend to be decided alike. Each decision then becomes
            the guess for the edges similar to it. None keeps the guesses as they are.
    """

    search: Search
    measure: Measurement
    guesses: Guesses
    similar: Int[np.ndarray, " edge"] | None

    @staticmethod
    def similar_edges(graph: Graph) -> Int[np.ndarray, " edge"]:
        """The same number for edges from one source into the same slot of any target."""
        return (graph.source * 4 + graph.slot).numpy()

    def decisions(self) -> Iterator[None]:
        """Decide on all edges in batches; yields after each batch, when the state can be saved."""
        for groups in self.search.undecided():
            if self.search.state.decided == 0:
                self.guesses.surveyed = 0
            batch = groups[: self._batch_size()]
            with self.search.counting():
                self._decide(batch, self._expected(batch))
            yield

    def _batch_size(self) -> int:
        """The number of decisions that makes an accepted decision cheapest."""
        guesses, world = self.guesses, ranks().world
        # Ranks share the cost of circuits, but each bears the fixed cost of a batch.
        fixed_cost = self.search.fixed_cost * world
        # Guesses fail as often as they did so far; at first, one in eight.
        wrong = (guesses.wrong + 1) / (self.search.state.evaluations + 8)
        sizes = np.arange(1, LARGEST_BATCH * world + 1)
        measured_before = sizes <= guesses.surveyed - self.search.state.decided
        # accepted(k) = 1 + sum over j < k of P(the first j guesses hold)
        holds = np.where(measured_before, 1 - WRONG_AFTER_MEASURING, 1 - wrong).cumprod()
        accepted = 1 + holds.cumsum() - holds
        return int(sizes[(accepted / (fixed_cost + sizes)).argmax()])

    def _expected(self, batch: list[Group]) -> Decisions:
        """What was seen when a group was measured in another state, or else the guess."""
        done, guesses = self.search.state.decided, self.guesses
        expected, stays = guesses.expected.numpy(), guesses.stays.numpy()
        for row in range(max(done, guesses.surveyed), done + len(batch)):
            expected[row] = stays[batch[row - done]].any()
        return expected[done : done + len(batch)].copy()

    def _decide(self, batch: list[Group], expected: Decisions) -> None:
        """Measure a batch, and decide on as many of its groups as the guesses allow."""
        sample = self.search.at_new_target
        try:
            increases, values = self._measured(batch, expected, sample)
        except NotFiniteError:
            if len(batch) == 1:
                raise
            # What cannot be measured may be a state that the search never reaches.
            batch, expected = batch[:1], expected[:1]
            increases, values = self._measured(batch, expected, sample)
        stays = ~self.measure.harmless(increases)
        surprises = np.flatnonzero(stays != expected)
        # Up to and including the first surprise, states were those of the sequential search.
        decided = int(surprises[0]) + 1 if len(surprises) else len(batch)
        self._learn(batch, stays, decided, wrong=len(surprises) > 0)
        for row in range(decided):
            removed, damage = not stays[row], float(values[row])
            self.search.decide(batch[row], float(increases[row]), damage, remove=removed)

    def _measured(
        self, batch: list[Group], expected: Decisions, sample: bool
    ) -> tuple[Increases, Float[np.ndarray, " state"]]:
        """Each removal as if the groups before it were decided as expected."""
        state = self.search.state
        without = without_each(state.kept, batch, expected)
        # A row is compared with the last row before it that is expected to go, or with H.
        before, last = [], len(batch)
        for row, stays in enumerate(expected):
            before.append(last)
            last = last if stays else row
        return self.measure.many(state, without, np.array(before), sample=sample)

    def _learn(self, batch: list[Group], stays: Decisions, decided: int, *, wrong: bool) -> None:
        guesses, done = self.guesses, self.search.state.decided
        guesses.expected.numpy()[done : done + len(batch)] = stays
        guesses.surveyed = max(guesses.surveyed, done + len(batch))
        guesses.measured += len(batch)
        guesses.wrong += int(wrong)
        if self.similar is not None:
            for group, stay in zip(batch[:decided], stays, strict=False):
                guesses.stays.numpy()[self.similar == self.similar[group[0]]] = stay
