"""Gendered pronouns (Mathwin et al. 2023, in the appendix of https://arxiv.org/abs/2304.14997).

"So Mary is a really great friend, isn't" -> " she".
"""

from __future__ import annotations

from dataclasses import dataclass
from random import Random
from typing import ClassVar

from circuits.tasks.families.words import MEN, WOMEN
from circuits.tasks.family import TaskFamily
from circuits.tasks.task import PromptPair

TEMPLATES = (
    "So {name} is a {degree} {quality} {role}, isn't",
    "I think {name} is a {degree} {quality} {role}, isn't",
    "Well, {name} is such a {quality} {role}, isn't",
)
DEGREES = ("really", "very", "truly", "rather")
QUALITIES = ("great", "good", "nice", "kind", "bad", "strange", "clever", "quiet")
ROLES = ("friend", "person", "teacher", "student", "neighbor", "doctor", "writer", "singer")


@dataclass(frozen=True)
class GenderedPronoun(TaskFamily):
    """Gendered pronouns: complete a tag question with the pronoun that goes with the name.

    The corrupted prompt has a name of the other gender, and the wrong answer is the pronoun that goes with that one.
    """

    name: ClassVar[str] = "gendered_pronoun"
    metric: ClassVar[str] = "logit_difference"

    def draw(self, random: Random) -> PromptPair:
        """One prompt pair, with spans NAME and END."""
        template = random.choice(TEMPLATES)
        choices = {
            "degree": random.choice(DEGREES),
            "quality": random.choice(QUALITIES),
            "role": random.choice(ROLES),
        }
        woman, man = random.choice(WOMEN), random.choice(MEN)
        names, pronouns = (woman, man), (" she", " he")
        if random.random() < 0.5:
            names, pronouns = names[::-1], pronouns[::-1]
        clean, corrupted = (template.format(name=name, **choices) for name in names)
        start = template.index("{name}")
        spans = {"NAME": (start, start + len(names[0])), "END": (len(clean) - 1, len(clean))}
        return PromptPair(clean, corrupted, *pronouns, spans)
