"""Indirect object identification (Wang et al. 2022, https://arxiv.org/abs/2211.00593).

"Then, Mary and John went to the store. John gave a drink to" -> " Mary", the name that occurs once.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from random import Random
from typing import Literal

from circuits.tasks.families.words import MEN, WOMEN, as_words
from circuits.tasks.family import TaskFamily
from circuits.tasks.prompts import PromptPair, fill_template

NAMES = (*WOMEN, *MEN)
PLACES = "store garden restaurant school hospital office house station".split()
OBJECTS = "ring kiss bone basketball computer necklace drink snack".split()

ABBA = ("IO", "S1", "S2")
BABA = ("S1", "IO", "S2")
SPANS = ("S2", "IO", "S1", "S1+1", "END")
# The three blanks are filled in the order ABBA or BABA.
TEMPLATES = (
    "Then, {} and {} went to the {place}. {} gave a {object} to",
    "Then, {} and {} had a lot of fun at the {place}. {} gave a {object} to",
    "Then, {} and {} were working at the {place}. {} decided to give a {object} to",
    "Then, {} and {} were thinking about going to the {place}. {} wanted to give a {object} to",
    "After {} and {} went to the {place}, {} gave a {object} to",
    "When {} and {} got a {object} at the {place}, {} decided to give it to",
    "While {} and {} were working at the {place}, {} gave a {object} to",
    "While {} and {} were commuting to the {place}, {} gave a {object} to",
    "After the lunch, {} and {} went to the {place}. {} gave a {object} to",
    "Afterwards, {} and {} went to the {place}. {} gave a {object} to",
    "The {place} {} and {} went to had a {object}. {} gave it to",
    "Friends {} and {} found a {object} at the {place}. {} gave it to",
)


@dataclass(frozen=True)
class IOI(TaskFamily):
    """Indirect object identification: complete with the name that is not repeated.

    Attributes:
        corruption: "abc" replaces IO, S1 and S2 by three other, distinct names, so that no name is
            repeated and neither answer is in the prompt. "swapped" replaces only S2, by the IO
            name, so that the right answer becomes the wrong one.
        names: what is drawn from. For a model that has few of the 80 names as single tokens, give
            `circuits.single_token_words(model, names)`.
    """

    name = "ioi"
    corruption: Literal["abc", "swapped"] = "abc"
    names: Sequence[str] = NAMES

    def __post_init__(self) -> None:
        names = as_words(self.names, "names", 5)
        object.__setattr__(self, "names", names)

    def draw(self, random: Random) -> PromptPair:
        """Draw one pair, with spans S2, IO, S1, S1+1 (the token after S1) and END."""
        template, place, thing = map(random.choice, (TEMPLATES, PLACES, OBJECTS))
        io, subject, *others = random.sample(self.names, 5)
        fields = ABBA if random.random() < 0.5 else BABA
        # Fill everything but the names; their blanks become fields such as {IO}.
        blanks = [f"{{{field}}}" for field in fields]
        template = template.format(*blanks, place=place, object=thing)
        clean = {"IO": io, "S1": subject, "S2": subject}
        corrupted = clean | {"S2": io}
        if self.corruption == "abc":
            corrupted = dict(zip(fields, others, strict=True))
        pair = fill_template(template, clean, corrupted, f" {io}", f" {subject}")
        # A space follows S1, then a word, whose first character marks its first token.
        _, s1_end = pair.spans["S1"]
        after_s1 = (s1_end + 1, s1_end + 2)
        spans = {**pair.spans, "S1+1": after_s1}
        # In a fixed order: which name comes first depends on the template.
        ordered = {name: spans[name] for name in SPANS}
        return replace(pair, spans=ordered)
