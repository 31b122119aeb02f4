"""Induction on random words (Olsson et al. 2022, https://arxiv.org/abs/2209.11895).

"... A B ... A" -> " B".
"""

from collections.abc import Sequence
from dataclasses import dataclass
from random import Random

from circuits.system.errors import InputError
from circuits.tasks.families.words import COMMON, as_words
from circuits.tasks.family import TaskFamily
from circuits.tasks.prompts import PromptPair, fill_template


@dataclass(frozen=True)
class Induction(TaskFamily):
    """Induction: distinct random words, then some of them again; complete with what followed.

    In the corrupted prompt other words replace their first occurrence, so nothing is repeated.
    The wrong answers are all other words of the prompt.

    Attributes:
        length: the number of words before the repetition.
        repeated: the number of words that are repeated. Real models need several: with 1,
            SmolLM2-135M says what followed in 11 % of prompts, with 8 (and a length of 24) in 56 %.
        words: what is drawn from, by default common English words; for random tokens of a model's
            vocabulary, `circuits.single_token_words(model)`.
    """

    name = "induction"
    length: int = 12
    repeated: int = 1
    words: Sequence[str] = tuple(COMMON)

    def __post_init__(self) -> None:
        words = as_words(self.words, "words", 5)
        object.__setattr__(self, "words", words)
        # A word comes before the first A, and one after B; the corrupted prompt has others.
        shortest = self.repeated + 3
        longest = len(words) - self.repeated
        if self.repeated < 1 or not shortest <= self.length <= longest:
            raise InputError(
                f"induction with repeated={self.repeated} and length={self.length} of {len(words)} "
                "words: repeat 1 or more, of at least 3 more words, and have as many others left."
            )

    def draw(self, random: Random) -> PromptPair:
        """Draw one pair, with spans A1, B and END (the last token of the second A)."""
        n_drawn = self.length + self.repeated
        drawn = random.sample(self.words, n_drawn)
        words = drawn[: self.length]
        others = drawn[self.length :]
        # The first word has no leading space, so it is not A. A word separates B from the second A.
        n_places = self.length - self.repeated - 2
        start = 1 + random.randrange(n_places)
        index = start + self.repeated
        repeated = " ".join(words[start:index])
        answer = words[index]
        before = words[:start]
        after = words[index + 1 :]
        template = " ".join([*before, "{A1}", "{B}", *after, "{again}"])
        clean = {"A1": repeated, "B": answer, "again": repeated}
        corrupted = clean | {"A1": " ".join(others)}
        wrong_answers = tuple(f" {word}" for word in before + after)
        return fill_template(template, clean, corrupted, f" {answer}", wrong_answers)
