"""Greater-than (Hanna et al. 2023, https://arxiv.org/abs/2305.00586).

"The war lasted from the year 1732 to the year 17" -> any two digits above 32.
"""

from __future__ import annotations

from dataclasses import dataclass
from random import Random
from typing import ClassVar

from circuits.tasks.family import TaskFamily
from circuits.tasks.task import PromptPair

NOUNS = (
    "war battle conflict fight struggle siege campaign mission expedition journey voyage project program study work effort treaty "
    "reign rule dynasty empire kingdom crisis famine plague drought strike protest rebellion revolt uprising trial dispute debate "
    "marriage friendship partnership alliance tradition custom practice trend fashion movement festival tour career construction "
    "expansion occupation invasion investigation trade exchange contract lease peace era period"
).split()
CENTURIES = range(11, 18)


@dataclass(frozen=True)
class GreaterThan(TaskFamily):
    """Greater-than: a span of years ends in a larger two-digit number than it began with.

    The corrupted prompt begins in year 01 of the century. Every valid ending is an answer, every other a wrong answer.
    """

    name: ClassVar[str] = "greater_than"
    metric: ClassVar[str] = "probability_difference"

    def draw(self, random: Random) -> PromptPair:
        """One prompt pair, with spans NOUN, XX1, YY (the starting year's two halves), XX2 and END (which is XX2)."""
        noun, century, year = random.choice(NOUNS), random.choice(CENTURIES), random.randint(2, 98)
        start = f"The {noun} lasted from the year {century}"
        clean = f"{start}{year:02d} to the year {century}"
        spans = {
            "NOUN": (4, 4 + len(noun)),
            "XX1": (len(start) - 2, len(start)),
            "YY": (len(start), len(start) + 2),
            "END": (len(clean) - 2, len(clean)),
        }
        endings = [f"{ending:02d}" for ending in range(100)]
        return PromptPair(
            clean,
            f"{start}01 to the year {century}",
            tuple(endings[year + 1 :]),
            tuple(endings[: year + 1]),
            spans,
        )
