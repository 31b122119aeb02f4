"""Measure again in float32 what low precision cannot decide, so that decisions are float32's."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int

from circuits.discovery.checkpoint import TensorState

Increases = Float[np.ndarray, " row"]
Damages = Float[np.ndarray, " state"]
StateIndices = Int[np.ndarray, " some"]
SomeDamages = Float[np.ndarray, " some"]
# What is nearer to the threshold than MARGIN times the largest error seen lately is measured again
# in float32. So are the SAMPLE nearest of each target's first batch, wherever they are; errors seen
# earlier then count a little less.
SAMPLE, MARGIN, FORGETTING = 3, 5.0, 0.9


@dataclass
class Noise(TensorState):
    """Rounding errors met so far."""

    # The largest error of an increase seen lately, in the metric's unit
    noise: float = 0.0
    # The number of states measured again in float32
    confirmed: int = 0


def confirm(
    increases: Increases,
    values: Damages,
    before: Int[np.ndarray, " row"],
    distance: Callable[[Increases], Increases],
    measure: Callable[[StateIndices], SomeDamages],
    noise: Noise,
    *,
    sample: bool,
) -> None:
    """Replace, in place, increases that might be on the wrong side of the threshold.

    Args:
        increases: values[row] - values[before[row]], measured in low precision.
        values: the damage of the states in the rows, and then of others.
        distance: how far increases are from the threshold.
        measure: the damage of some states in float32.
        noise: updated with the errors seen here.
        sample: measure the increases nearest to the threshold, wherever they are.
    """
    measured = np.zeros(len(values), bool)
    confirmed = np.zeros(len(increases), bool)
    doubtful = np.zeros(len(increases), bool)
    level = noise.noise
    if sample:
        level *= FORGETTING
        nearest = np.argsort(distance(increases))[:SAMPLE]
        doubtful[nearest] = True
    # An error found here can make other increases doubtful, so repeat until none is left.
    while True:
        away = distance(increases)
        doubtful |= away <= MARGIN * level
        doubtful &= ~confirmed
        if not doubtful.any():
            break
        rows = np.flatnonzero(doubtful)
        compared = np.union1d(rows, before[rows])
        states = compared[~measured[compared]]
        if len(states):
            values[states] = measure(states)
            measured[states] = True
        exact = values[rows] - values[before[rows]]
        errors = np.abs(exact - increases[rows])
        level = max(level, float(errors.max()))
        increases[rows] = exact
        confirmed |= doubtful
    # Only now, as a measurement that fails is repeated.
    noise.noise = level
    noise.confirmed += int(measured.sum())
