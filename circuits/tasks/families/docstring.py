"""Docstrings (Heimersheim and Janiak 2023, https://www.lesswrong.com/posts/u6KXXmKFbXfWzoAXn).

A docstring describes a function's arguments in order; the model names the third described one.
"""

from dataclasses import dataclass, replace
from random import Random

from circuits.system.errors import InputError
from circuits.tasks.families.words import COMMON
from circuits.tasks.family import TaskFamily
from circuits.tasks.prompts import PromptPair, fill_template

TEMPLATE = '''def {0}(self, {arguments}):
    """{1} {2} {3}

    :param {{A_doc}}: {4} {5}
    :param {{B_doc}}: {6} {7}
    :param'''
# A, B and C are the described arguments, in the definition and in the docstring.
FIELDS = ("A_def", "B_def", "C_def", "A_doc", "B_doc")
SPANS = ("END", *FIELDS)


@dataclass(frozen=True)
class Docstring(TaskFamily):
    """Docstring: two of a function's arguments are described in order; name the third.

    In the corrupted prompt, other words replace the three described arguments in the definition,
    and yet others the two in the docstring. Other arguments of either prompt are wrong answers.

    Attributes:
        before: the number of arguments before the described ones.
        after: the number of arguments after them.
    """

    name = "docstring"
    before: int = 2
    after: int = 1

    def __post_init__(self) -> None:
        for option in ("before", "after"):
            value = getattr(self, option)
            if not 0 <= value <= 20:
                raise InputError(f"docstring with {option}={value}: choose a number from 0 to 20.")

    def draw(self, random: Random) -> PromptPair:
        """Draw one pair, with spans END, A_def, B_def, C_def, A_doc and B_doc."""
        words = random.sample(COMMON, 16 + self.before + self.after)
        # The first eight words fill the numbered blanks.
        *described, answer = words[8:11]
        others = words[11:16]
        first_after = 16 + self.before
        before, after = words[16:first_after], words[first_after:]
        arguments = [*before, "{A_def}", "{B_def}", "{C_def}", *after]
        template = TEMPLATE.format(*words, arguments=", ".join(arguments))
        # The definition and the docstring name the same arguments only in the clean prompt.
        named = [*described, answer, *described]
        clean = dict(zip(FIELDS, named, strict=True))
        corrupted = dict(zip(FIELDS, others, strict=True))
        wrong = before + described + after + others
        wrong_answers = tuple(f" {word}" for word in wrong)
        pair = fill_template(template, clean, corrupted, f" {answer}", wrong_answers)
        ordered = {name: pair.spans[name] for name in SPANS}
        return replace(pair, spans=ordered)
