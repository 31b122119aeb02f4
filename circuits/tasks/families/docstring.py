"""Docstrings (Heimersheim and Janiak 2023, https://www.lesswrong.com/posts/u6KXXmKFbXfWzoAXn).

A function's arguments are described in their order; complete with the third one described.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from random import Random
from typing import ClassVar

from circuits.system.errors import InputError
from circuits.tasks.families.words import COMMON
from circuits.tasks.family import TaskFamily
from circuits.tasks.task import PromptPair


@dataclass(frozen=True)
class Docstring(TaskFamily):
    """Docstring: a function's arguments are described in their order; two are, name the third.

    In the corrupted prompt other words stand for the three described arguments in the definition, and yet others for the two in the
    description. The wrong answers are all other arguments named in either prompt.

    Attributes:
        before: the number of arguments before the described ones.
        after: the number of arguments after them.
    """

    name: ClassVar[str] = "docstring"
    metric: ClassVar[str] = "logit_difference"

    before: int = 2
    after: int = 1

    def __post_init__(self) -> None:
        if not (0 <= self.before <= 20 and 0 <= self.after <= 20):
            raise InputError(
                f"docstring with before={self.before} and after={self.after}: choose each from 0 to 20."
            )

    def draw(self, random: Random) -> PromptPair:
        """One prompt pair, with spans A_def, B_def, C_def (the described arguments in the definition), A_doc, B_doc and END."""
        function, *words = random.sample(COMMON, 16 + self.before + self.after)
        prose, described, others, rest = words[:7], words[7:10], words[10:15], words[15:]
        before, after = rest[: self.before], rest[self.before :]
        clean = _text(function, [*before, *described, *after], described[:2], prose)
        corrupted = _text(function, [*before, *others[:3], *after], others[3:], prose)
        wrong = tuple(f" {word}" for word in (*before, *described[:2], *after, *others))
        return PromptPair(clean, corrupted, f" {described[2]}", wrong, _spans(clean, described))


def _text(
    function: str, arguments: Sequence[str], described: Sequence[str], prose: Sequence[str]
) -> str:
    return (
        f'def {function}(self, {", ".join(arguments)}):\n    """{" ".join(prose[:3])}\n\n'
        f"    :param {described[0]}: {prose[3]} {prose[4]}\n    :param {described[1]}: {prose[5]} {prose[6]}\n    :param"
    )


def _spans(clean: str, described: Sequence[str]) -> dict[str, tuple[int, int]]:
    spans = {"END": (len(clean) - 1, len(clean))}
    for letter, word in zip("ABC", described, strict=True):
        start = re.search(rf", {word}\b", clean).start() + 2  # type: ignore[union-attr]  # the word is there
        spans[f"{letter}_def"] = (start, start + len(word))
    for letter, word in zip("AB", described[:2], strict=True):
        start = clean.index(f":param {word}:") + len(":param ")
        spans[f"{letter}_doc"] = (start, start + len(word))
    return spans
