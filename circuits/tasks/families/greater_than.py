"""Greater-than (Hanna et al. 2023, https://arxiv.org/abs/2305.00586).

"The war lasted from the year 1732 to the year 17" -> any two digits above 32. Models that read
years digit by digit complete one digit: "... the year 1732 to the year 173" -> 3 to 9.
"""

from dataclasses import dataclass
from random import Random
from typing import Literal

from circuits.tasks.family import TaskFamily
from circuits.tasks.prompts import PromptPair, fill_template

TEMPLATE = "The {NOUN} lasted from the year {XX1}{YY} to the year {again}"
NOUNS = (
    "war battle conflict fight struggle siege campaign mission expedition journey voyage project "
    "program study work effort treaty reign rule dynasty empire kingdom crisis famine plague "
    "drought strike protest rebellion revolt uprising trial dispute debate marriage friendship "
    "partnership alliance tradition custom practice trend fashion movement festival tour career "
    "construction expansion occupation invasion investigation trade exchange contract lease peace "
    "era period"
).split()
CENTURIES = range(11, 18)


@dataclass(frozen=True)
class GreaterThan(TaskFamily):
    """Greater-than: a span of years ends in a larger two-digit number than it began with.

    The corrupted prompt begins in year 01. Valid endings are answers, all others wrong answers.

    Attributes:
        digits: how many digits of the year are to be completed. 2 is the paper's task, for
            tokenizers that have all pairs of digits. Of tokenizers that read single digits, or
            three and then one, choose 1: the years share their decade, and the corrupted prompt
            begins in a year that ends in 1.
    """

    name = "greater_than"
    metric = "probability_difference"
    digits: Literal[1, 2] = 2

    def draw(self, random: Random) -> PromptPair:
        """Draw one pair, with spans NOUN, XX1 and YY (of the first year, the digits that both years
        share, and the others) and END.
        """
        noun = random.choice(NOUNS)
        shared = str(random.choice(CENTURIES))
        if self.digits == 1:
            shared += str(random.randrange(10))
        numbers = range(10**self.digits)
        endings = [f"{number:0{self.digits}d}" for number in numbers]
        year = random.randint(2, len(endings) - 2)
        clean = {"NOUN": noun, "XX1": shared, "YY": endings[year]}
        clean["again"] = shared
        corrupted = clean | {"YY": endings[1]}
        # Every ending above the year is right.
        first_right = year + 1
        right, wrong = endings[first_right:], endings[:first_right]
        return fill_template(TEMPLATE, clean, corrupted, right, wrong)
