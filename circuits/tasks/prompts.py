"""Prompt pairs as text: the pair, pairs from templates, files and memory, and the two splits."""

from collections.abc import Callable, Iterable, Mapping, Sequence, Set
from dataclasses import dataclass, field
from hashlib import blake2b
from pathlib import Path
from string import Formatter
from typing import Annotated, Any, Literal

from pydantic import BaseModel, Field, StrictInt, ValidationError

from circuits.system.errors import InputError
from circuits.system.messages import suggestion
from circuits.system.numbers import items, python_number, shown, whole
from circuits.tasks.readers.data_sets import known_fields
from circuits.tasks.readers.files import EXAMPLE, rows

Split = Literal["train", "test"]
SPLITS: tuple[Split, ...] = ("train", "test")
# Start and end of a stretch of text, in characters; the end is exclusive.
CharSpan = tuple[int, int]
CharSpans = Mapping[str, CharSpan]
Token = str | int
"""The text of a token, or its id."""
Answer = Token | Sequence[Token] | None


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
            of tokens. Within each stretch, and between them, tokens are then paired from the right.
    """

    clean: str
    corrupted: str | None = None
    answer: Answer = None
    wrong_answer: Answer = None
    spans: CharSpans = field(default_factory=dict, hash=False)
    corrupted_spans: CharSpans = field(default_factory=dict, hash=False)

    def __post_init__(self) -> None:
        for name in ("clean", "corrupted"):
            text = getattr(self, name)
            may_be = str | None if name == "corrupted" else str
            if not isinstance(text, may_be):
                raise InputError(
                    f"{name}={shown(text)} is no text; for token ids use Task.from_tokens."
                )
        for name in ("answer", "wrong_answer"):
            plain = _plain_answer(getattr(self, name), name)
            object.__setattr__(self, name, plain)

    @property
    def answers(self) -> tuple[Token, ...]:
        """All right answers."""
        return _as_tuple(self.answer)

    @property
    def wrong_answers(self) -> tuple[Token, ...]:
        """All wrong answers."""
        return _as_tuple(self.wrong_answer)


def _plain_answer(answer: Any, name: str) -> Answer:
    """A text, an id, or a tuple of them, whatever the user has them in; None if it is missing."""
    number = python_number(answer)
    # Tables mark what is missing by NaN, which differs from itself.
    if answer is None or number != number:
        return None
    if isinstance(answer, str):
        return answer
    if number is not None:
        return whole(number, name, least=0)
    if isinstance(answer, bool) or not isinstance(answer, Iterable):
        raise InputError(f"{name}={shown(answer)}: give a text, a token id, or a list of them.")
    in_order = sorted(answer, key=repr) if isinstance(answer, Set) else answer
    several = items(in_order, name)
    if not several:
        raise InputError(f"{name}={shown(answer)} holds no answer; leave it out, or give one.")
    return tuple(each if isinstance(each, str) else whole(each, name, least=0) for each in several)


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


def read_pairs(path: str | Path, convert: Callable[[PromptPair], Any]) -> list[Any]:
    """Read a file (see `readers.files`), and convert each prompt pair.

    An InputError, also one that `convert` raises, gives the line number.
    """
    converted = []
    for where, content in rows(path):
        try:
            converted.append(convert(_parse(content)))
        except InputError as error:
            raise InputError(f"{path}, {where}: {error}") from error
    if not converted:
        raise InputError(f"{path} holds no prompt pair; write at least one line, {EXAMPLE}.")
    return converted


# JSON has lists where PromptPair has tuples; pydantic converts them.
_Words = Annotated[tuple[str, ...], Field(min_length=1)]
_Answer = str | _Words | None
_Spans = dict[str, tuple[StrictInt, StrictInt]] | None
_PROMPT = "the prompt as a string"
_WORDS = "a string, or a list of strings if several are right"
_SPANS = "an object of name: [start, end], in characters of the prompt"


class _Line(BaseModel, extra="forbid"):
    clean: str = Field(description=_PROMPT)
    corrupted: str | None = Field(description=_PROMPT)
    answer: _Answer = Field(None, description=_WORDS)
    wrong_answer: _Answer = Field(None, description=_WORDS)
    spans: _Spans = Field(None, description=_SPANS)
    corrupted_spans: _Spans = Field(None, description=_SPANS)


def _parse(content: Any) -> PromptPair:
    known = known_fields(content) if isinstance(content, dict) else None
    if known is not None:
        return PromptPair(**known)
    try:
        line = _Line.model_validate(content)
    except ValidationError as error:
        raise InputError(_problem(content, error)) from error
    return PromptPair(**line.model_dump(exclude_none=True))


def _problem(content: Any, error: ValidationError) -> str:
    known = _Line.model_fields
    if not isinstance(content, dict):
        kind = type(content).__name__
        return f"expected a JSON object, found {kind}; write one, {EXAMPLE}."
    unknown = [name for name in content if name not in known]
    if unknown:
        return f"unknown field {unknown[0]!r}; {suggestion(unknown[0], known)}"
    location = error.errors()[0]["loc"]
    name = str(location[0])
    wanted = known[name].description
    if name not in content:
        return f"field {name!r} is missing; give {wanted}."
    return f"field {name!r} is {shown(content[name])}; give {wanted}."
