"""Induction in ordinary prose (Olsson et al. 2022, https://arxiv.org/abs/2209.11895).

"On the shelf stood a wooden drum and a tiny jar. ... a customer asked the price of the tiny"
-> " jar".
"""

from dataclasses import dataclass
from random import Random

from circuits.tasks.family import TaskFamily
from circuits.tasks.prompts import PromptPair, fill_template

QUALITIES = (
    "red blue green yellow white black brown golden silver wooden broken heavy tiny small large "
    "round bright dirty plain strange cheap"
).split()
THINGS = (
    "ball bell boat book box chair clock coat cup door drum flag hat jar key lamp letter map "
    "mirror pen pipe plate pot ring table tent watch wheel basket camera doll bag"
).split()
# None of them has a word of the two lists.
TEMPLATES = (
    "On the shelf stood {} and {}. The shop was quiet that afternoon, and rain ran down the "
    "window. At last a customer asked the price of the",
    "In the attic they found {} and {}. Nobody knew how old these objects were. My sister wanted "
    "to keep the",
    "The museum has two new pieces: {} and {}. Both were found by a farmer in the hills. Most "
    "visitors stop in front of the",
    "My neighbor sold me {} and {} last summer. I had little money then. I have never been sorry "
    "that I bought the",
    "Her grandfather left her {} and {}. She was surprised, because he had owned so little. For "
    "years she would not let anyone touch the",
    "There were two things in the room, {} and {}. A cold wind came through the hall. Slowly, the "
    "old man reached for the",
    "The thief took {} and {}, and left everything else. A week later the police found a man who "
    "tried to sell the",
    "For the play we needed {} and {}. It was not easy to find them in such a quiet town. In the "
    "end a teacher lent us the",
)


@dataclass(frozen=True)
class InductionProse(TaskFamily):
    """Induction in prose: two things are described; complete the second mention of one of them.

    In the corrupted prompt the thing has another quality at its first mention, so nothing is
    repeated. The wrong answer is the other thing.
    """

    name = "induction_prose"

    def draw(self, random: Random) -> PromptPair:
        """Draw one pair, with spans A1 (the quality), B (the thing) and END (the second A)."""
        quality, other_quality, changed = random.sample(QUALITIES, 3)
        thing, other_thing = random.sample(THINGS, 2)
        mentions = ["a {A1} {B}", f"a {other_quality} {other_thing}"]
        random.shuffle(mentions)
        template = random.choice(TEMPLATES).format(*mentions) + " {again}"
        clean = {"A1": quality, "B": thing, "again": quality}
        corrupted = clean | {"A1": changed}
        return fill_template(template, clean, corrupted, f" {thing}", f" {other_thing}")
