"""Prompt pairs as text: the pair, pairs from templates, and the two splits."""

import ast
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence, Set
from dataclasses import dataclass, field
from hashlib import blake2b
from string import Formatter
from typing import Any, Literal

from circuits.system.errors import InputError
from circuits.system.numbers import (
    is_missing,
    is_series,
    items,
    ordered_items,
    python_number,
    shown,
    whole,
)

Split = Literal["train", "test"]
SPLITS: tuple[Split, ...] = ("train", "test")
# Start and end of a stretch of text, in characters; the end is exclusive.
CharSpan = tuple[int, int]
CharSpans = Mapping[str, CharSpan]
Token = str | int
"""The text of a token, or its id."""
Answer = Token | Sequence[Token] | None
# What is no single answer, and how Python writes it where that begins with a name
HELD = (list, tuple, set, dict, bytes)
COLLECTIONS = (
    "range set frozenset list tuple dict dict_keys dict_values bytearray deque array tensor "
    "RangeIndex"
).split()
ENDS_OF_COLLECTIONS = (")", "]", "}", "'", '"')
_ANSWERS = "give a text, a token id, or a list of them"


class DoesNotFit(InputError):
    """A prompt pair that cannot be used with this model.

    Attributes:
        reason: why, in words that other pairs may share.
        words: the words that are to blame, if any are.
    """

    def __init__(self, message: str, reason: str, words: Iterable[str] = ()) -> None:
        super().__init__(message)
        self.reason = reason
        self.words = tuple(words)


@dataclass(frozen=True)
class PromptPair:
    """A clean prompt and its corrupted counterpart, as text.

    Both have the same number of tokens, unless `corrupted_spans` says what corresponds.

    >>> import circuits
    >>> pair = circuits.PromptPair("So Mary is", "So John is", " she", (" he", " it"))
    >>> pair.answers, pair.wrong_answers
    ((' she',), (' he', ' it'))

    Attributes:
        clean: the prompt whose completion is studied.
        corrupted: the same prompt with the information that decides the answer changed; None if
            there is no such prompt, for ablations that need none.
        answer: what should follow the clean prompt, or a tuple of tokens if any of them is right.
            Write it as it continues the prompt, with its leading space: " Mary"; or
            give its id. Every token of an answer of several tokens is scored, each after the ones
            before it.
        wrong_answer: what should not follow, written the same way. A wrong answer of several tokens
            has as many as the answer, and is compared with it token by token, each after the
            beginning of the right answer.
        spans: named stretches of the clean prompt as (start, end), in characters. A token belongs
            to a span when it overlaps it.
        corrupted_spans: where these stretches are in the corrupted prompt, if it has another number
            of tokens. Within each stretch, and after it, tokens are then paired from the right;
            before the first one, from the left.

    Raises:
        InputError: a prompt is no text, an answer neither text nor id, or a span no (start, end).
    """

    clean: str
    corrupted: str | None = None
    answer: Answer = None
    wrong_answer: Answer = None
    spans: CharSpans = field(default_factory=dict, hash=False)
    corrupted_spans: CharSpans = field(default_factory=dict, hash=False)

    def __post_init__(self) -> None:
        for name, value in plain_fields(vars(self)).items():
            object.__setattr__(self, name, value)

    @property
    def answers(self) -> tuple[Token, ...]:
        """All right answers."""
        return _as_tuple(self.answer)

    @property
    def wrong_answers(self) -> tuple[Token, ...]:
        """All wrong answers."""
        return _as_tuple(self.wrong_answer)


def plain_fields(given: Mapping[str, Any]) -> dict[str, Any]:
    """Fields of a pair as Python's own texts, numbers, tuples and dicts, or an InputError."""
    return {name: _PLAIN[name](value, name) for name, value in given.items()}


def _plain_text(text: Any, name: str) -> str:
    if not isinstance(text, str):
        raise InputError(
            f"field {name!r} is {shown(text)}; give the prompt as a string; for token ids use "
            "Task.from_tokens."
        )
    return text


def _optional_text(text: Any, name: str) -> str | None:
    return None if is_missing(text) else _plain_text(text, name)


def plain_answer(answer: Any, name: str) -> Answer:
    """A text, an id, or a tuple of them, whatever the user has them in; None if it is missing."""
    if is_missing(answer):
        return None
    of_text = held(answer) if isinstance(answer, str) else []
    if any(isinstance(each, str | bytes) for each in of_text):
        raise InputError(
            f"{name}={shown(answer)} is a text that holds a list; give the list, or [text] if it "
            "is one answer."
        )
    if isinstance(answer, str) or python_number(answer) is not None:
        return _plain_token(answer, name)
    if isinstance(answer, bytes | Mapping) or not is_series(answer):
        raise InputError(f"{name}={shown(answer)}: {_ANSWERS}.")
    in_order = sorted(answer, key=repr) if isinstance(answer, Set) else answer
    several = items(in_order, name)
    if not several:
        raise InputError(f"{name}={shown(answer)} holds no answer; leave it out, or give one.")
    return tuple(_plain_token(each, name) for each in several)


def _plain_token(token: Any, name: str) -> Token:
    if isinstance(token, str):
        return token
    if python_number(token) is None:
        raise InputError(f"{name} holds {shown(token)}: {_ANSWERS}.")
    return whole(token, name, least=0)


def held(text: str) -> list[Any]:
    """What a text holds if it is a collection or bytes, as Python writes them; else nothing.

    >>> held("(9, 10)"), held("frozenset({' a'})"), held("range(0, 3)"), held("f(x)")
    ([9, 10], [' a'], [0, 3], [])
    """
    if not text.rstrip().endswith(ENDS_OF_COLLECTIONS):
        return []
    try:
        # Of escape sequences, which are text here.
        with warnings.catch_warnings(action="ignore"):
            node = ast.parse(text.strip(), mode="eval").body
        name, parts = "", [node]
        if isinstance(node, ast.Call):
            name, parts = ast.unparse(node.func), node.args
        values = [ast.literal_eval(part) for part in parts]
    except (ValueError, SyntaxError, RecursionError, MemoryError):
        return []
    is_named = name.rpartition(".")[-1] in COLLECTIONS
    # Brackets around nothing are text.
    is_written = any(isinstance(value, HELD) and value for value in values)
    if not is_named and not is_written:
        return []
    leaves = [each.value for each in ast.walk(node) if isinstance(each, ast.Constant)]
    return leaves or [None]


def _plain_spans(spans: Any, name: str) -> dict[str, CharSpan]:
    """Spans as pairs of Python's own numbers; there are none if they are missing."""
    if is_missing(spans):
        return {}
    if not isinstance(spans, Mapping) or not all(isinstance(each, str) for each in spans):
        raise InputError(
            f"{name} is {shown(spans)}; give a dict of name: [start, end], in characters."
        )
    plain = {}
    for span, bounds in spans.items():
        title = f"{name}[{span!r}]"
        try:
            start, end = (whole(each, title) for each in ordered_items(bounds, title))
        except ValueError as error:
            raise InputError(
                f"{title} is {shown(bounds)}; give [start, end], in characters of the prompt."
            ) from error
        plain[span] = (start, end)
    return plain


_PLAIN: dict[str, Callable[[Any, str], Any]] = {
    "clean": _plain_text,
    "corrupted": _optional_text,
    "answer": plain_answer,
    "wrong_answer": plain_answer,
    "spans": _plain_spans,
    "corrupted_spans": _plain_spans,
}


def _as_tuple(answer: Answer) -> tuple[Token, ...]:
    if answer is None:
        return ()
    return (answer,) if isinstance(answer, Token) else tuple(answer)


def split_of(text: str) -> Split:
    """The split of a prompt: a hash of its text assigns half of all possible prompts to each."""
    digest = blake2b(text.encode(), digest_size=1)
    return "test" if digest.digest()[0] < 128 else "train"


def fill_template(
    template: str,
    clean: Mapping[str, str],
    corrupted: Mapping[str, str],
    answer: Answer,
    wrong_answer: Answer,
) -> PromptPair:
    """Make a pair of two fillings of a `str.format` template.

    >>> mary, john = {"NAME": "Mary", "role": "friend"}, {"NAME": "John", "role": "friend"}
    >>> fill_template("So {NAME} is a {role}", mary, john, " she", " he").spans
    {'NAME': (3, 7), 'END': (18, 19)}

    The fields whose names begin with a capital letter are spans of the clean prompt. So is END: if
    no field has this name, it is the last character of the prompt, which marks the last token.
    """
    # str.format does not say where it puts a word, so the clean prompt is put together here.
    text = ""
    spans: dict[str, CharSpan] = {}
    for literal, name, _, _ in Formatter().parse(template):
        text += literal
        if name is None:
            continue
        start = len(text)
        text += clean[name]
        if name[0].isupper():
            spans[name] = (start, len(text))
    end = len(text)
    spans.setdefault("END", (end - 1, end))
    other_text = template.format(**corrupted)
    return PromptPair(text, other_text, answer, wrong_answer, spans)
