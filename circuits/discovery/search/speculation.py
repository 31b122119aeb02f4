"""Speculation: many decisions of a sequential search found in one batch.

Guess the next decisions and measure each removal in the state in which the guess would leave the
search. Accept decisions as long as they turn out as guessed, and the first one that does not: all
of these were measured in exactly the state of the sequential search. Whatever the guess, the result
is that of `sequential`; a good guess only makes it cheaper.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from jaxtyping import Int

from circuits.discovery.search.measurement import Measured, Measurement
from circuits.discovery.search.state import Decisions, Group, Search, without_each
from circuits.system.errors import NotFiniteError
from circuits.system.ranks import ranks

Batch = list[Group]

# How often a guess fails that rests on a measurement in a neighbouring state.
WRONG_AFTER_MEASURING = 0.08
# The most decisions to speculate on at once, for each of the ranks that share them.
LARGEST_BATCH = 256


@dataclass
class Speculation:
    """Decides on the groups of a search in batches."""

    search: Search
    measure: Measurement
    # Each decision becomes the guess for edges from the same source into the same slot of other
    # targets
    learns: bool

    def run(self) -> None:
        """Decide on all edges."""
        for groups in self.search.undecided():
            state = self.search.state
            if state.decided == 0:
                state.surveyed = 0
            batch = groups[: self._batch_size()]
            with state.counting(self.search.meter):
                self._decide(batch, self._expected(batch))

    def _batch_size(self) -> int:
        """The number of decisions that makes an accepted decision cheapest."""
        search, world = self.search, ranks().world
        state = search.state
        assert search.fixed_cost is not None
        # Ranks share the cost of circuits, but each bears the fixed cost of a batch.
        fixed_cost = search.fixed_cost * world
        # Guesses fail as often as they did so far; at first, one in eight.
        wrong_unmeasured = (state.wrong + 1) / (state.evaluations + 8)
        sizes = 1 + np.arange(LARGEST_BATCH * world)
        measured_before = sizes <= state.surveyed - state.decided
        # accepted(k) = 1 + sum over j < k of P(the first j guesses hold)
        wrong = np.where(measured_before, WRONG_AFTER_MEASURING, wrong_unmeasured)
        holds = (1 - wrong).cumprod()
        accepted = 1 + holds.cumsum() - holds
        best = (accepted / (fixed_cost + sizes)).argmax()
        return int(sizes[best])

    def _expected(self, batch: Batch) -> Decisions:
        """What was seen when a group was measured in another state, or else the guess."""
        state = self.search.state
        start = state.decided
        stop = start + len(batch)
        expected = state.expected.numpy()
        stays = state.stays.numpy()
        first_guessed = max(start, state.surveyed)
        for row in range(first_guessed, stop):
            group = batch[row - start]
            expected[row] = stays[group].any()
        return expected[start:stop].copy()

    def _decide(self, batch: Batch, expected: Decisions) -> None:
        """Measure a batch, and decide on as many of its groups as the guesses allow."""
        increases, values = self._measured_or_first(batch, expected)
        batch = batch[: len(increases)]
        expected = expected[: len(increases)]
        stays = ~self.measure.harmless(increases)
        surprises = np.flatnonzero(stays != expected)
        # Up to and including the first surprise, states were those of the sequential search.
        now = slice(surprises[0] + 1 if len(surprises) else len(batch))
        self._learn(batch, stays, batch[now])
        self.search.state.wrong += len(surprises) > 0
        self.search.decide_all(batch[now], increases[now], values[now], stays[now])

    def _measured_or_first(self, batch: Batch, expected: Decisions) -> Measured:
        """What was measured of the batch; only of its first group if another is not finite."""
        try:
            return self._measured(batch, expected)
        except NotFiniteError:
            if len(batch) == 1:
                raise
            # What cannot be measured may be a state that the search never reaches.
            return self._measured(batch[:1], expected[:1])

    def _measured(self, batch: Batch, expected: Decisions) -> Measured:
        """Each removal as if the groups before it were decided as expected."""
        kept = self.search.state.kept
        without = without_each(kept, batch, expected)
        # A row is compared with the last row before it that is expected to go, or with H.
        rows = np.arange(len(batch))
        gone = np.where(expected, -1, rows)
        last_gone = np.maximum.accumulate(gone)
        before = last_gone[:-1]
        before = np.append(-1, before)
        before[before < 0] = len(batch)
        return self.measure.many(without, before)

    def _learn(self, batch: Batch, stays: Decisions, decided: Batch) -> None:
        """Let what was measured guide the guesses to come."""
        state = self.search.state
        stop = state.decided + len(batch)
        state.expected[state.decided : stop] = torch.from_numpy(stays)
        state.surveyed = max(state.surveyed, stop)
        state.measured += len(batch)
        if self.learns:
            known = state.stays.numpy()
            for group, stay in zip(decided, stays, strict=False):
                kind = self._kind[group[0]]
                known[self._alike[kind]] = stay

    @cached_property
    def _kind(self) -> Int[np.ndarray, " edge"]:
        """The same number for edges from one source into the same slot of any target."""
        graph = self.search.space.graph
        # The slot of a target without slots is -1.
        kind = graph.source * 4 + graph.slot + 1
        return kind.numpy()

    @cached_property
    def _alike(self) -> list[Int[np.ndarray, " alike"]]:
        """The edges of each kind."""
        by_kind = self._kind.argsort(kind="stable")
        ends = np.bincount(self._kind).cumsum()
        return np.split(by_kind, ends[:-1])
