"""What a reader should know of a result besides its numbers."""

from __future__ import annotations

import math
from collections.abc import Sequence

from circuits.runs.circuit_run import CircuitRun


def notes_on(found: CircuitRun) -> list[str]:
    """Say when a threshold removed all edges or none, and which would not."""
    circuit, settings = found.circuit, found.record["settings"]
    n_kept, n_edges = len(circuit), len(circuit.graph)
    space = found.record.get("search_space", {"tried": n_edges, "frozen_out": 0})
    n_removed = n_edges - space["frozen_out"] - n_kept
    if "threshold" not in settings or 0 < n_removed < space["tried"]:
        return []
    # Scores are the measured increases in damage; an edge goes if its increase is below the
    # threshold.
    increases = circuit.scores[circuit.scores.isfinite()]
    if settings.get("absolute"):
        increases = increases.abs()
    removed_all = n_removed > 0
    which_edges = f"{'every' if removed_all else 'no'} edge{' tried' * (space['tried'] < n_edges)}"
    text = f"{which_edges} was removed ({n_kept:,} of {n_edges:,} left)"
    if len(increases) == 0:
        return [f"{text}, and none was measured alone."]
    which, extreme = ("largest", "max") if removed_all else ("smallest", "min")
    limit = float(getattr(increases, extreme)())
    text += f": the {which} increase in damage measured was {limit:.2g}"
    if limit > 0:
        return [f"{text}; try --threshold {_two_digits(limit, above=not removed_all):g}."]
    effect = "no threshold keeps any" if removed_all else "a threshold above 0 removes some"
    return [f"{text}; {effect}."]


def notes_on_sweep(label: str, sweep: Sequence[CircuitRun]) -> list[str]:
    """Say when several thresholds gave the same circuit."""
    alike: dict[bytes, list[str]] = {}
    for found in sweep:
        if "threshold" in found.record["settings"]:
            kept = found.circuit.kept.numpy().tobytes()
            alike.setdefault(kept, []).append(f"{found.record['settings']['threshold']:g}")
    several = [" and ".join(each) for each in alike.values() if len(each) > 1]
    return [f"{label}: the thresholds {each} give the same circuit." for each in several]


def _two_digits(value: float, *, above: bool) -> float:
    """The nearest number of two digits that is not above a positive value, or the one after it."""
    unit = 10.0 ** (math.floor(math.log10(value)) - 1)
    return (math.floor(value / unit) + above) * unit
