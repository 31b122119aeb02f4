"""Measure again in float32 what low precision cannot decide, so that decisions are float32's."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int

from circuits.discovery.checkpoint import TensorState

Increases = Float[np.ndarray, " row"]
StateIndices = Int[np.ndarray, " some"]

# What is nearer to the threshold than MARGIN times the largest error seen lately is measured again
# in float32. So are the SAMPLE nearest of each target's first batch, wherever they are; errors seen
# earlier then count a little less.
SAMPLE, MARGIN, FORGETTING = 3, 5.0, 0.9


@dataclass
class Noise(TensorState):
    """Rounding errors met so far.

    Attributes:
        noise: the largest error of an increase seen lately, in the metric's unit.
        confirmed: the number of states measured again in float32.
    """

    noise: float = 0.0
    confirmed: int = 0


def confirm(
    increases: Increases,
    values: Float[np.ndarray, " state"],
    before: Int[np.ndarray, " row"],
    distance: Callable[[Increases], Increases],
    measure: Callable[[StateIndices], Float[np.ndarray, " some"]],
    noise: Noise,
    *,
    sample: bool,
) -> None:
    """Replace, in place, increases that might be on the wrong side of the threshold.

    Args:
        increases: values[row] - values[before[row]], measured in low precision.
        values: the damage of every state.
        before: the state that each row is compared with.
        distance: how far increases are from the threshold.
        measure: the damage of some states in float32.
        noise: updated with the errors seen here.
        sample: measure the increases nearest to the threshold, wherever they are.
    """
    known, confirmed = np.zeros(len(values), bool), np.zeros(len(increases), bool)
    noise.noise *= FORGETTING if sample else 1
    while True:
        away = np.where(confirmed, np.inf, distance(increases))
        doubtful = ~confirmed & (away <= MARGIN * noise.noise)
        if sample and not confirmed.any():
            doubtful[np.argsort(away)[:SAMPLE]] = True
        if not doubtful.any():
            noise.confirmed += int(known.sum())
            return
        states = np.unique(np.concatenate([np.flatnonzero(doubtful), before[doubtful]]))
        states = states[~known[states]]
        if len(states):
            values[states], known[states] = measure(states), True
        found = values[: len(increases)][doubtful] - values[before[doubtful]]
        # An error seen here can make other increases doubtful, so repeat until none is left.
        noise.noise = max(noise.noise, float(np.abs(found - increases[doubtful]).max()))
        increases[doubtful], confirmed = found, confirmed | doubtful
