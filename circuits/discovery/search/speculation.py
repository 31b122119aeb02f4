"""Speculation: many decisions of a sequential search found in one batch.

Guess the next decisions and measure each removal in the state in which the guess would leave the
search. Accept decisions as long as they turn out as guessed, and the first one that does not: all
of these were measured in exactly the state of the sequential search. Whatever the guess, the result
is that of `sequential`; a good guess only makes it cheaper.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import chain

import numpy as np
from jaxtyping import Float, Int

from circuits.discovery.search.confirmation import Increases
from circuits.discovery.search.measurement import TINY, Measured, Measurement
from circuits.discovery.search.state import Decisions, Group, Search, without_in_turn
from circuits.system.errors import NotFiniteError
from circuits.system.ranks import ranks

Batch = list[Group]
Numbers = Int[np.ndarray, " _"]
Chances = Float[np.ndarray, " row"]

# An edge is expected to stay if an edge like it raised the damage by this many thresholds.
CAUTION = 2.0
# How often a decision is another one than where it was measured before, in a neighbouring state,
# and than that on an edge like it: at least, where the increase was on the edge, and the power
# with which that falls on both sides. Counted on toy-world, a random model and SmolLM2.
MEASURED = (0.01, 0.45, 3.0, 3.0)
GUESSED = (0.0, 0.4, 2.0, 0.5)
# The most decisions to speculate on at once, for each of the ranks that share them.
LARGEST_BATCH = 256


@dataclass
class Speculation:
    """Decides on the groups of a search in batches."""

    search: Search
    measure: Measurement
    # Each measurement becomes the guess for edges from the same source into the same slot of other
    # targets
    learns: bool

    def run(self) -> None:
        """Decide on all edges."""
        largest = LARGEST_BATCH * ranks().world
        for groups in self.search.undecided():
            state = self.search.state
            if state.decided == 0:
                state.surveyed = 0
            expected, doubts = self._outlook(groups[:largest])
            size = self._batch_size(doubts)
            with state.counting(self.search.meter):
                self._decide(groups[:size], expected[:size])

    def _outlook(self, groups: Batch) -> tuple[Decisions, Chances]:
        """The decisions that are expected, and how likely each is another."""
        state = self.search.state
        seen = state.seen.numpy()
        seen = seen[state.decided : state.surveyed][: len(groups)]
        measured = self.measure.ratios(seen)
        guessed = self._guessed(groups[len(seen) :])
        expected = np.append(measured >= 1, guessed >= CAUTION)
        # Guesses fail as often as they did so far; at first, one in eight.
        failing = (state.wrong + 1) / (state.evaluations + 8)
        doubts = _doubts(guessed, CAUTION, GUESSED)
        doubts = doubts.clip(min=failing)
        of_measured = _doubts(measured, 1.0, MEASURED)
        return expected, np.append(of_measured, doubts)

    def _guessed(self, groups: Batch) -> Increases:
        """The largest increase that is guessed in each group, as a multiple of the threshold."""
        if not groups:
            return np.zeros(0)
        edges, firsts = _flat(groups)
        known = self.search.state.guessed.numpy()
        increases = known[self._example[edges]]
        ratios = self.measure.ratios(increases)
        return np.maximum.reduceat(ratios, firsts)

    def _batch_size(self, doubts: Chances) -> int:
        """The number of decisions that makes an accepted decision cheapest."""
        search, world = self.search, ranks().world
        assert search.fixed_cost is not None
        # Ranks share the cost of circuits, but each bears the fixed cost of a batch.
        fixed_cost = search.fixed_cost * world
        # accepted(k) = 1 + sum over j < k of P(the first j guesses hold)
        holds = (1 - doubts).cumprod()
        accepted = 1 + holds.cumsum() - holds
        sizes = 1 + np.arange(len(doubts))
        best = (accepted / (fixed_cost + sizes)).argmax()
        return int(sizes[best])

    def _decide(self, batch: Batch, expected: Decisions) -> None:
        """Measure a batch, and decide on as many of its groups as the guesses allow."""
        increases, values = self._measured_or_first(batch, expected)
        batch = batch[: len(increases)]
        expected = expected[: len(increases)]
        stays = ~self.measure.harmless(increases)
        surprises = np.flatnonzero(stays != expected)
        # Up to and including the first surprise, states were those of the sequential search.
        now = slice(surprises[0] + 1 if len(surprises) else len(batch))
        self._learn(increases, batch[now])
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
        without = without_in_turn(kept, batch, expected)
        # A row is compared with the last row before it that is expected to go, or with H.
        rows = np.arange(len(batch))
        gone = np.where(expected, -1, rows)
        last_gone = np.maximum.accumulate(gone)
        before = last_gone[:-1]
        before = np.append(-1, before)
        before[before < 0] = len(batch)
        return self.measure.many(without, before)

    def _learn(self, increases: Increases, decided: Batch) -> None:
        """Let what was measured guide the guesses to come."""
        state = self.search.state
        stop = state.decided + len(increases)
        state.seen.numpy()[state.decided : stop] = increases
        state.surveyed = max(state.surveyed, stop)
        state.measured += len(increases)
        if self.learns:
            guessed = state.guessed.numpy()
            firsts = [group[0] for group in decided]
            examples = self._example[firsts]
            # Of several edges of a kind the last counts.
            guessed[examples] = increases[: len(decided)]

    @cached_property
    def _example(self) -> Numbers:
        """The edge whose guess holds for each edge: itself, or the first that is like it."""
        graph = self.search.space.graph
        if not self.learns:
            return np.arange(len(graph))
        # Alike are edges from one source into the same slot of any target; -1 is that of MLPs.
        kinds = graph.source * 4 + graph.slot
        found = np.unique(kinds.numpy(), return_index=True, return_inverse=True)
        _, first, kind = found
        return first[kind]


def _doubts(ratios: Increases, edge: float, often: tuple[float, ...]) -> Chances:
    """How likely it is that increases which had these ratios lie on the other side of `edge`."""
    least, most, below, above = often
    nearness = ratios.clip(min=TINY) / edge
    power = np.where(nearness < 1, below, -above)
    return (most * nearness**power).clip(min=least)


def _flat(groups: Sequence[Group]) -> tuple[Numbers, Numbers]:
    """The edges of several groups, and where each group begins."""
    sizes = np.array([0, *map(len, groups)])
    every = chain.from_iterable(groups)
    edges = np.fromiter(every, np.int64)
    return edges, sizes.cumsum()[:-1]
