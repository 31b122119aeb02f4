"""Greater-than (Hanna et al. 2023, https://arxiv.org/abs/2305.00586).

"The war lasted from the year 1732 to the year 17" -> any two digits above 32.
"""

from dataclasses import dataclass
from random import Random

from circuits.tasks.family import TaskFamily
from circuits.tasks.prompts import PromptPair, fill_template

TEMPLATE = "The {NOUN} lasted from the year {XX1}{YY} to the year {END}"
NOUNS = (
    "war battle conflict fight struggle siege campaign mission expedition journey voyage project "
    "program study work effort treaty reign rule dynasty empire kingdom crisis famine plague "
    "drought strike protest rebellion revolt uprising trial dispute debate marriage friendship "
    "partnership alliance tradition custom practice trend fashion movement festival tour career "
    "construction expansion occupation invasion investigation trade exchange contract lease peace "
    "era period"
).split()
CENTURIES = range(11, 18)
ENDINGS = tuple(f"{year:02d}" for year in range(100))


@dataclass(frozen=True)
class GreaterThan(TaskFamily):
    """Greater-than: a span of years ends in a larger two-digit number than it began with.

    The corrupted prompt begins in year 01. Valid endings are answers, all others wrong answers.
    """

    name = "greater_than"
    metric = "probability_difference"

    def draw(self, random: Random) -> PromptPair:
        """Draw one pair, with spans NOUN, XX1 and YY (the halves of the first year) and END."""
        noun = random.choice(NOUNS)
        century = str(random.choice(CENTURIES))
        year = random.randint(2, 98)
        clean = {"NOUN": noun, "XX1": century, "YY": ENDINGS[year], "END": century}
        corrupted = clean | {"YY": ENDINGS[1]}
        # Every ending above the year is right.
        first_right = year + 1
        right, wrong = ENDINGS[first_right:], ENDINGS[:first_right]
        return fill_template(TEMPLATE, clean, corrupted, right, wrong)
