"""Indirect object identification (Wang et al. 2022, https://arxiv.org/abs/2211.00593).

"Then, Mary and John went to the store. John gave a drink to" -> " Mary": of two names the one that is not repeated.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from random import Random
from typing import ClassVar

from circuits.system.errors import InputError
from circuits.tasks.families.words import MEN, WOMEN
from circuits.tasks.family import TaskFamily
from circuits.tasks.task import PromptPair

NAMES = (*WOMEN, *MEN)
PLACES = ("store", "garden", "restaurant", "school", "hospital", "office", "house", "station")
OBJECTS = ("ring", "kiss", "bone", "basketball", "computer", "necklace", "drink", "snack")

# {first} and {second} are IO and S1 in one order or the other (ABBA: IO first; BABA: S1 first), {again} is S2.
TEMPLATES = (
    "Then, {first} and {second} went to the {place}. {again} gave a {object} to",
    "Then, {first} and {second} had a lot of fun at the {place}. {again} gave a {object} to",
    "Then, {first} and {second} were working at the {place}. {again} decided to give a {object} to",
    "Then, {first} and {second} were thinking about going to the {place}. {again} wanted to give a {object} to",
    "After {first} and {second} went to the {place}, {again} gave a {object} to",
    "When {first} and {second} got a {object} at the {place}, {again} decided to give it to",
    "While {first} and {second} were working at the {place}, {again} gave a {object} to",
    "While {first} and {second} were commuting to the {place}, {again} gave a {object} to",
    "After the lunch, {first} and {second} went to the {place}. {again} gave a {object} to",
    "Afterwards, {first} and {second} went to the {place}. {again} gave a {object} to",
    "The {place} {first} and {second} went to had a {object}. {again} gave it to",
    "Friends {first} and {second} found a {object} at the {place}. {again} gave it to",
)


@dataclass(frozen=True)
class IOI(TaskFamily):
    """Indirect object identification: complete with the name that is not repeated.

    Attributes:
        corruption: "abc" replaces IO, S1 and S2 by three other names, all different, so that no name is repeated and neither answer is
            in the prompt; "swapped" replaces S2 by the IO name and nothing else, so that the right answer becomes the wrong one.
    """

    name: ClassVar[str] = "ioi"
    metric: ClassVar[str] = "logit_difference"

    corruption: str = "abc"

    def __post_init__(self) -> None:
        if self.corruption not in ("abc", "swapped"):
            raise InputError(
                f"task 'ioi' has no corruption {self.corruption!r}; choose 'abc' or 'swapped'."
            )

    def draw(self, random: Random) -> PromptPair:
        """One prompt pair, with spans IO, S1, S1+1 (what follows S1), S2 and END."""
        template = random.choice(TEMPLATES)
        setting = {"place": random.choice(PLACES), "object": random.choice(OBJECTS)}
        io, subject, *others = random.sample(NAMES, 5)
        io_first = random.random() < 0.5
        first, second = (io, subject) if io_first else (subject, io)
        clean, spans = _fill(template, setting, first, second, subject)
        spans["IO"], spans["S1"] = (spans.pop("first"), spans.pop("second"))[
            :: 1 if io_first else -1
        ]
        spans["S1+1"] = (
            spans["S1"][1] + 1,
            spans["S1"][1] + 2,
        )  # a word follows S1, and one of its characters marks its first token
        spans["END"] = (len(clean) - 1, len(clean))
        corruption = (first, second, io) if self.corruption == "swapped" else others
        corrupted, _ = _fill(template, setting, *corruption)
        return PromptPair(clean, corrupted, f" {io}", f" {subject}", spans)


def _fill(
    template: str, setting: Mapping[str, str], first: str, second: str, again: str
) -> tuple[str, dict[str, tuple[int, int]]]:
    """The prompt, and where the names stand in it."""
    # Up to the last name all fields are known, so each name starts where the text before its field ends.
    words = {**setting, "first": first, "second": second, "again": again}
    starts = {
        name: len(template[: template.index(f"{{{name}}}")].format(**words))
        for name in ("first", "second", "again")
    }
    spans = {name: (start, start + len(words[name])) for name, start in starts.items()}
    spans["S2"] = spans.pop("again")
    return template.format(**words), spans
