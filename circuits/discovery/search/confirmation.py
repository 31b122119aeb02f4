"""Which measurements in low precision must be made again in float32, so that decisions are those of float32."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from jaxtyping import Float, Int

# What is nearer to the threshold than the largest error seen lately, times the margin, is measured in float32. So are the nearest of each first
# batch of a target, wherever they lie; then what was seen earlier counts a little less.
SAMPLE, MARGIN, FORGETTING = 3, 5.0, 0.9


def confirm(
    increases: Float[np.ndarray, " row"],
    values: Float[np.ndarray, " value"],
    before: Int[np.ndarray, " row"],
    distance: Callable[[Float[np.ndarray, " row"]], Float[np.ndarray, " row"]],
    measure: Callable[[Int[np.ndarray, " some"]], Float[np.ndarray, " some"]],
    noise: float,
    *,
    sample: bool,
) -> tuple[float, int]:
    """Replace increases in damage that might lie on the wrong side of a threshold by those measured in float32.

    Args:
        increases: values[row] - values[before[row]], measured in low precision; written to.
        values: the damage in each state; written to.
        before: the state that each row is compared with.
        distance: how far increases are from the threshold.
        measure: damages of some of the states in float32.
        noise: the largest error of an increase that was seen in earlier batches, in the metric's unit.
        sample: measure the increases nearest to the threshold wherever they lie.

    Returns:
        The largest error seen so far, older ones counting less, and how many states were measured.
    """
    known, confirmed = np.zeros(len(values), dtype=bool), np.zeros(len(increases), dtype=bool)
    noise *= FORGETTING if sample else 1
    while True:
        away = np.where(confirmed, np.inf, distance(increases))
        doubtful = ~confirmed & (away <= MARGIN * noise)
        if sample and not confirmed.any():
            doubtful[np.argsort(away)[:SAMPLE]] = True
        if not doubtful.any():
            return noise, int(known.sum())
        states = np.unique(np.concatenate([np.flatnonzero(doubtful), before[doubtful]]))
        states = states[~known[states]]
        if len(states):
            values[states], known[states] = measure(states), True
        found = values[: len(increases)][doubtful] - values[before[doubtful]]
        # An error makes others doubtful, so that this goes on until none is left.
        noise = max(noise, float(np.abs(found - increases[doubtful]).max()))
        increases[doubtful], confirmed = found, confirmed | doubtful
