"""Docstrings (Heimersheim and Janiak 2023, https://www.lesswrong.com/posts/u6KXXmKFbXfWzoAXn).

A docstring describes a function's arguments in order; the model names the third described one.
"""

from dataclasses import dataclass
from itertools import islice
from random import Random

from circuits.system.errors import InputError
from circuits.tasks.families.words import COMMON
from circuits.tasks.family import TaskFamily
from circuits.tasks.prompts import PromptPair, fill_template

TEMPLATE = '''def {function}(self, {before}{A_def}, {B_def}, {C_def}{after}):
    """{summary}

    :param {A_doc}: {A_description}
    :param {B_doc}: {B_description}
    :param'''
# A, B and C are the described arguments, in the definition and in the docstring.
FIELDS = ("A_def", "B_def", "C_def", "A_doc", "B_doc")


@dataclass(frozen=True)
class Docstring(TaskFamily):
    """Docstring: two of a function's arguments are described in order; name the third.

    In the corrupted prompt, other words replace the three described arguments in the definition,
    and yet others the two in the docstring. The wrong answers are all other arguments that either
    prompt names.

    Attributes:
        before: the number of arguments before the described ones.
        after: the number of arguments after them.
    """

    name = "docstring"
    metric = "logit_difference"
    before: int = 2
    after: int = 1

    def __post_init__(self) -> None:
        for option in ("before", "after"):
            value = getattr(self, option)
            if not 0 <= value <= 20:
                raise InputError(f"docstring with {option}={value}: choose a number from 0 to 20.")

    def draw(self, random: Random) -> PromptPair:
        """Draw one pair, with spans END, A_def, B_def, C_def, A_doc and B_doc."""
        n_words = 16 + self.before + self.after
        words = iter(random.sample(COMMON, n_words))
        setting = {
            "function": next(words),
            "summary": " ".join(islice(words, 3)),
            "A_description": " ".join(islice(words, 2)),
            "B_description": " ".join(islice(words, 2)),
        }
        *described, answer = islice(words, 3)
        others = list(islice(words, 5))
        before, after = list(islice(words, self.before)), list(words)
        setting["before"] = "".join(f"{word}, " for word in before)
        setting["after"] = "".join(f", {word}" for word in after)
        # The definition and the docstring name the same arguments only in the clean prompt.
        named = [*described, answer, *described]
        clean = setting | dict(zip(FIELDS, named, strict=True))
        corrupted = setting | dict(zip(FIELDS, others, strict=True))
        wrong = tuple(f" {word}" for word in before + described + after + others)
        answers = (f" {answer}", wrong)
        return fill_template(TEMPLATE, clean, corrupted, answers, ("END", *FIELDS))
