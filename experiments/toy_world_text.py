"""The training text of toy-world, and its tokenizer.

Prompts of every task (train split), facts, repeated words and filler.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from random import Random

from tokenizers import Regex, Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from circuits.tasks.families.docstring import Docstring
from circuits.tasks.families.gendered_pronoun import GenderedPronoun
from circuits.tasks.families.greater_than import GreaterThan
from circuits.tasks.families.induction import Induction
from circuits.tasks.families.ioi import IOI, NAMES
from circuits.tasks.families.two_hop import STATES, TwoHop
from circuits.tasks.families.words import COMMON
from circuits.tasks.family import TaskFamily
from circuits.tasks.prompts import split_of

# Two digits, a word with its apostrophe, three quotes, or one other mark.
PIECE = r"\d{1,2}|[A-Za-z]+(?:'[a-z]+)?|\"\"\"|[^\sA-Za-z\d]"
SPECIAL = ("<bos>", "<pad>", "<unk>")
DRAWS = 4000
"""Prompts per task whose words make up the vocabulary; each word is expected in at least 20 of
them.
"""


@dataclass(frozen=True)
class Chunk:
    """Some text: its words, and the indices of those that the preceding words predict."""

    words: list[str]
    predictable: Sequence[int]


def make_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer for all words of the tasks and the filler.

    It has one token per word, per punctuation mark and per pair of digits.
    """
    words = sorted({word for text in _every_text() for word in _pieces(text)})
    vocabulary = {word: index for index, word in enumerate((*SPECIAL, *words))}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    pieces = pre_tokenizers.Split(Regex(PIECE), behavior="isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), pieces])
    tokenizer.post_processor = processors.TemplateProcessing(
        "<bos> $A", special_tokens=[("<bos>", vocabulary["<bos>"])]
    )
    special = {
        "bos_token": "<bos>",
        "eos_token": "<bos>",
        "pad_token": "<pad>",
        "unk_token": "<unk>",
    }
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, add_bos_token=True, padding_side="right", **special
    )


def chunks(random: Random, length: int) -> list[Chunk]:
    """Chunks that fill a sequence.

    Most sequences begin with a task's prompt, as they do when a task is run.
    """
    makers, weights = zip(*MIXTURE, strict=True)
    result, total = [], 1
    while total < length:
        chunk = random.choices(makers, weights)[0](random)
        result.append(chunk)
        total += len(chunk.words)
    return result


def _pieces(text: str) -> list[str]:
    return re.findall(PIECE, text)


def _prompt(*families: TaskFamily) -> Callable[[Random], Chunk]:
    def draw(random: Random) -> Chunk:
        family = random.choice(families)
        while split_of((pair := family.draw(random)).clean) != "train":
            pass
        words = _pieces(pair.clean + random.choice(pair.answers))
        return Chunk([*words, "."], (len(words) - 1,))

    return draw


def _three_names(random: Random) -> Chunk:
    """An IOI prompt in which no name is repeated.

    Either of the first two names may follow, so the model has to notice repetition.
    """
    while split_of((pair := IOI().draw(random)).corrupted) != "train":
        pass
    words = _pieces(pair.corrupted)
    first, second = [word for word in words if word in NAMES][:2]
    return Chunk([*words, random.choice((first, second)), "."], (len(words),))


def _repetition(random: Random) -> Chunk:
    """Random words, twice.

    All but the first repeated word can be predicted, which trains induction most directly.
    """
    words = random.sample(COMMON, random.randint(4, 24))
    again = words[random.randrange(max(1, len(words) - 12)) :][:16]
    return Chunk([*words, *again], range(len(words) + 1, len(words) + len(again)))


def _fact(random: Random) -> Chunk:
    state, (capital, cities) = random.choice(list(STATES.items()))
    city = random.choice(cities)
    text = random.choice(
        (
            f"{city} lies in the state of {state}",
            f"The capital of {state} is {capital}",
            f"{state} is governed from {capital}",
        )
    )
    words = _pieces(text)
    return Chunk([*words, "."], (len(words) - 1,))


FILLER = (
    "The {a} is near the {b}.",
    "{name} has a {a} and a {b}.",
    "{name} saw the {a} and the {b} at the {c}.",
    "There is a {a} in the {b}.",
    "{name} and {other} like the {a}.",
    "The year {year} was good for the {a}.",
)


def _filler(random: Random) -> Chunk:
    a, b, c = random.sample(COMMON, 3)
    name, other = random.sample(NAMES, 2)
    year = f"{random.randint(11, 17)}{random.randint(0, 99):02d}"
    return Chunk(
        _pieces(random.choice(FILLER).format(a=a, b=b, c=c, name=name, other=other, year=year)), ()
    )


_INDUCTION = _prompt(*(Induction(length=length) for length in (6, 9, 12, 12, 15)))
_DOCSTRING = _prompt(
    Docstring(), Docstring(), Docstring(before=1, after=2), Docstring(before=3, after=0)
)

MIXTURE: Sequence[tuple[Callable[[Random], Chunk], float]] = (
    (_prompt(IOI()), 0.20),
    (_three_names, 0.03),
    (_prompt(GreaterThan()), 0.10),
    (_DOCSTRING, 0.12),
    (_INDUCTION, 0.12),
    (_repetition, 0.24),
    (_prompt(GenderedPronoun()), 0.03),
    (_prompt(TwoHop()), 0.08),
    (_fact, 0.04),
    (_filler, 0.04),
)


def induction_first(random: Random, length: int) -> list[Chunk]:
    """An induction prompt at the beginning, where a task's prompt is, and repetitions after it."""
    result = [_INDUCTION(random)]
    while sum(len(chunk.words) for chunk in result) + 1 < length:
        result.append(_repetition(random))
    return result


def _every_text() -> Iterator[str]:
    random = Random("toy-world vocabulary")
    for family in (IOI(), GreaterThan(), Docstring(), Induction(), GenderedPronoun(), TwoHop()):
        for _ in range(DRAWS):
            pair = family.draw(random)
            yield " ".join((pair.clean, pair.corrupted, *pair.answers, *pair.wrong_answers))
    for make in (_fact, _filler):
        for _ in range(DRAWS):
            yield " ".join(make(random).words)
