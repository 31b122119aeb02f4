"""How a search measures increases in damage: in float32, or in low precision with confirmation."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from jaxtyping import Float, Int
from torch import Tensor

from circuits.discovery.search.confirmation import Damages, Increases, StateIndices, confirm
from circuits.discovery.search.state import Decisions, Group, Search, without_in_turn
from circuits.running.variants import Variants
from circuits.system.errors import NotFiniteError

Rows = Int[np.ndarray, " row"]
Measured = tuple[Increases, Damages]

TINY = 1e-12


@dataclass
class Measurement:
    """Measures how much removals raise the damage, and compares that with the threshold."""

    search: Search
    threshold: float
    # Compare the size of the change, so that edges that hurt are kept too
    absolute: bool
    # In low precision, measure again in float32 what is near the threshold
    confirms: bool

    def harmless(self, increases: Increases) -> Decisions:
        """Whether removals that raise the damage by this much are below the threshold."""
        return self._compared(increases) < self.threshold

    def ratios(self, increases: Increases) -> Increases:
        """Increases, or their sizes if these are compared, as multiples of the threshold."""
        return self._compared(increases) / max(self.threshold, TINY)

    def one(self, edges: Group) -> Measured:
        """L(H without the edges) - L(H), and L(H without the edges), with H the circuit so far."""
        state = self.search.state
        removed = np.array([False])
        without = without_in_turn(state.kept, [edges], removed)
        with state.counting(self.search.meter):
            whole = np.array([1])
            found = self.many(without, before=whole)
        state.measured += 1
        return found

    def many(self, without: Variants, before: Rows) -> Measured:
        """L(row) - L(before[row]) for every row, and L of every row and of H, the circuit so far.

        Args:
            without: the circuits to measure.
            before: the row that each is compared with; `len(without)` is H.
        """
        state, meter = self.search.state, self.search.meter
        if meter.exact is None:
            # In float32 the damage of H is known from an earlier measurement.
            damages = meter(without).tolist()
            values = np.array([*damages, state.damage])
            return values[:-1] - values[before], values
        # H is measured with the others, because rounding depends on what the executor starts from.
        states = without.with_circuit()
        values = self._in_low_precision(states).numpy().copy()
        increases = values[:-1] - values[before]
        if self.confirms:
            self._confirm(increases, values, before, states)
        return increases, values

    def _confirm(
        self, increases: Increases, values: Damages, before: Rows, states: Variants
    ) -> None:
        exact = self.search.meter.exact
        assert exact is not None

        def distance(found: Increases) -> Increases:
            away = self._compared(found) - self.threshold
            return np.abs(away)

        def measure(some: StateIndices) -> Damages:
            return exact(states[some]).numpy()

        noise, sample = self.search.state, self.search.at_new_target
        confirm(increases, values, before, distance, measure, noise, sample=sample)

    def _in_low_precision(self, states: Variants) -> Float[Tensor, " state"]:
        meter = self.search.meter
        try:
            return meter(states)
        except NotFiniteError:
            if len(states) > 2 or meter.exact is None:
                raise
            # A small type can overflow where float32 does not.
            in_float32 = replace(meter, executor=meter.exact.executor)
            return in_float32(states)

    def _compared(self, increases: Increases) -> Increases:
        return np.abs(increases) if self.absolute else increases
