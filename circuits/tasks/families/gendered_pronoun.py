"""Gendered pronouns (Mathwin et al. 2023, in the appendix of https://arxiv.org/abs/2304.14997).

"So Mary is a really great friend, isn't" -> " she".
"""

from dataclasses import dataclass
from random import Random

from circuits.tasks.families.words import MEN, WOMEN
from circuits.tasks.family import TaskFamily
from circuits.tasks.prompts import PromptPair, fill_template

TEMPLATES = (
    "So {NAME} is a {degree} {quality} {role}, isn't",
    "I think {NAME} is a {degree} {quality} {role}, isn't",
    "Well, {NAME} is such a {quality} {role}, isn't",
)
WORDS = {
    "degree": "really very truly rather".split(),
    "quality": "great good nice kind bad strange clever quiet".split(),
    "role": "friend person teacher student neighbor doctor writer singer".split(),
}


@dataclass(frozen=True)
class GenderedPronoun(TaskFamily):
    """Gendered pronouns: complete a tag question with the pronoun that goes with the name.

    The corrupted prompt has a name of the other gender, whose pronoun is the wrong answer.
    """

    name = "gendered_pronoun"

    def draw(self, random: Random) -> PromptPair:
        """Draw one pair, with spans NAME and END."""
        template = random.choice(TEMPLATES)
        setting = {}
        for name, words in WORDS.items():
            setting[name] = random.choice(words)
        woman = setting | {"NAME": random.choice(WOMEN)}
        man = setting | {"NAME": random.choice(MEN)}
        # Half of the clean prompts are about a man.
        if random.random() < 0.5:
            return fill_template(template, man, woman, " he", " she")
        return fill_template(template, woman, man, " she", " he")
