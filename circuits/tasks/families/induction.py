"""Induction on random words (Olsson et al. 2022, https://arxiv.org/abs/2209.11895).

"... A B ... A" -> " B".
"""

from dataclasses import dataclass
from random import Random

from circuits.system.errors import InputError
from circuits.tasks.families.words import COMMON
from circuits.tasks.family import TaskFamily
from circuits.tasks.prompts import PromptPair, fill_template


@dataclass(frozen=True)
class Induction(TaskFamily):
    """Induction: distinct random words, then one of them again; complete with what followed it.

    In the corrupted prompt another word replaces its first occurrence, so nothing is repeated.
    The wrong answers are all other words of the prompt.

    Attributes:
        length: the number of words before the repetition.
    """

    name = "induction"
    length: int = 12

    def __post_init__(self) -> None:
        longest = len(COMMON) - 1
        if not 4 <= self.length <= longest:
            raise InputError(f"induction with length={self.length}: choose 4 to {longest}.")

    def draw(self, random: Random) -> PromptPair:
        """Draw one pair, with spans A1, B and END (the second A)."""
        *words, other = random.sample(COMMON, self.length + 1)
        # The first word has no leading space, so it is not A. A word separates B from the second A.
        index = random.randrange(1, self.length - 2)
        repeated, answer = words[index : index + 2]
        before = words[:index]
        after = words[index + 2 :]
        template = " ".join([*before, "{A1}", "{B}", *after, "{again}"])
        clean = {"A1": repeated, "B": answer, "again": repeated}
        corrupted = clean | {"A1": other}
        wrong_answers = tuple(f" {word}" for word in before + after)
        return fill_template(template, clean, corrupted, f" {answer}", wrong_answers)
