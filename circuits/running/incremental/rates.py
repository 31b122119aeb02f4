"""How fast a device is: the figures from which the cost of a batch is estimated."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from math import log2

import torch

# What a step does besides its products takes as long as about this many operations on a small
# tensor: some 35 of them, counted on a CPU, and the Python around them.
OPERATIONS = 80
# A product of this many rows and columns is bound by multiplications; one of a single row with
# a matrix of this many rows and columns by the reading of the matrix.
SIZE, WIDE = 2048, 8192
CALLS = 20


@dataclass(frozen=True)
class Rates:
    """Overheads, in multiplications that take as long."""

    # The fixed overhead of a step
    step: float
    # Reading one number of a weight: the rows for which a product takes twice as long as reading
    weight: float

    @staticmethod
    @cache
    def of(device: torch.device) -> Rates:
        """Those of a CPU are constants, so that a search gives the same numbers in every process;
        those of a GPU, which is much less alike, are measured once.
        """
        return ON_CPU if device.type == "cpu" else measured(device)


# On AMD EPYC, one core. With a weight of 4 or 16 a search of SmolLM2 took 3 % longer.
ON_CPU = Rates(step=1e7, weight=8.0)


@torch.inference_mode()
def measured(device: torch.device) -> Rates:
    """Measure a device, to the next power of two, as batch sizes depend little on it."""
    square = torch.ones(SIZE, SIZE, device=device)
    wide = torch.ones(WIDE, WIDE, device=device)
    few = torch.ones(1, device=device)
    product = _seconds(lambda: square @ square, device)
    row = wide[:1]
    reading = _seconds(lambda: row @ wide, device)
    operation = _seconds(lambda: few + few, device)
    per_second = SIZE**3 / product
    step = OPERATIONS * operation * per_second
    weight = reading / wide.numel() * per_second
    return Rates(_power_of_two(step), _power_of_two(weight))


def _seconds(operation: Callable[[], object], device: torch.device) -> float:
    """Seconds of one call, after a first one."""
    operation()
    _wait(device)
    start = time.perf_counter()
    for _ in range(CALLS):
        operation()
    _wait(device)
    return (time.perf_counter() - start) / CALLS


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _power_of_two(value: float) -> float:
    return 2.0 ** round(log2(value))
