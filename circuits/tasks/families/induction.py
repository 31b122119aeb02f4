"""Induction on random words (Olsson et al. 2022, https://arxiv.org/abs/2209.11895): "... A B ... A" -> " B"."""

from __future__ import annotations

from dataclasses import dataclass
from random import Random
from typing import ClassVar

from circuits.system.errors import InputError
from circuits.tasks.families.words import COMMON
from circuits.tasks.family import TaskFamily
from circuits.tasks.task import PromptPair


@dataclass(frozen=True)
class Induction(TaskFamily):
    """Induction: random words, all different, of which one comes again at the end; complete with what followed it.

    In the corrupted prompt another word stands in the place of its first occurrence, so nothing is repeated.
    The wrong answers are all other words of the prompt.

    Attributes:
        length: the number of words before the repetition.
    """

    name: ClassVar[str] = "induction"
    metric: ClassVar[str] = "logit_difference"

    length: int = 12

    def __post_init__(self) -> None:
        if not 4 <= self.length < len(COMMON):
            raise InputError(
                f"induction with length={self.length}: choose a length from 4 to {len(COMMON) - 1}."
            )

    def draw(self, random: Random) -> PromptPair:
        """One prompt pair, with spans A1, B, and END (which is the second A)."""
        *words, other = random.sample(COMMON, self.length + 1)
        # Not the first word, which has no leading space; and at least one word stands between B and the repetition.
        index = random.randrange(1, self.length - 2)
        repeated, answer = words[index], words[index + 1]
        clean = " ".join([*words, repeated])
        corrupted = " ".join([*words[:index], other, *words[index + 1 :], repeated])
        start = len(" ".join(words[:index])) + 1
        middle = start + len(repeated)
        spans = {
            "A1": (start, middle),
            "B": (middle + 1, middle + 1 + len(answer)),
            "END": (len(clean) - 1, len(clean)),
        }
        wrong = tuple(f" {word}" for word in words if word not in (repeated, answer))
        return PromptPair(clean, corrupted, f" {answer}", wrong, spans)
