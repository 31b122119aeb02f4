"""Prompt pairs as text: the pair itself, pairs from templates and files, and the two splits."""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from hashlib import blake2b
from pathlib import Path
from string import Formatter
from typing import Annotated, Any, Literal

from pydantic import BaseModel, Field, StrictInt, ValidationError

from circuits.system.errors import InputError
from circuits.tasks.messages import shorten, suggestion

Split = Literal["train", "test"]
SPLITS: tuple[Split, ...] = ("train", "test")
# Start and end of a stretch of text, in characters; the end is exclusive.
CharSpan = tuple[int, int]
Answer = str | tuple[str, ...] | None


@dataclass(frozen=True)
class PromptPair:
    """A clean prompt and its corrupted counterpart, as text with the same number of tokens.

    >>> import circuits
    >>> pair = circuits.PromptPair("So Mary is", "So John is", " she", (" he", " it"))
    >>> pair.answers, pair.wrong_answers
    ((' she',), (' he', ' it'))

    Attributes:
        clean: the prompt whose completion is studied.
        corrupted: the same prompt with the information that decides the answer changed.
        answer: the token that should follow the clean prompt, or a tuple of tokens if any of
            them is right. Write it as it continues the prompt, with its leading space: " Mary".
        wrong_answer: the token or tokens that should not follow, written the same way.
        spans: named stretches of the clean prompt as (start, end), in characters. A token belongs
            to a span when it overlaps it.
    """

    clean: str
    corrupted: str
    answer: Answer = None
    wrong_answer: Answer = None
    spans: Mapping[str, CharSpan] = field(default_factory=dict, hash=False)

    @property
    def answers(self) -> tuple[str, ...]:
        """All right answers."""
        return _as_tuple(self.answer)

    @property
    def wrong_answers(self) -> tuple[str, ...]:
        """All wrong answers."""
        return _as_tuple(self.wrong_answer)


def _as_tuple(answer: Answer) -> tuple[str, ...]:
    return (answer,) if isinstance(answer, str) else tuple(answer or ())


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
    """Read a file with one JSON object per line, and convert each prompt pair.

    An InputError, also one that `convert` raises, gives the line number.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(
            f"the task file {path} cannot be read: {error}; give a text file with one JSON object "
            "per line."
        ) from error
    converted = []
    # str.splitlines would also break lines at characters that JSON allows inside strings.
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            converted.append(convert(_parse(line)))
        except InputError as error:
            raise InputError(f"{path}, line {number}: {error}") from error
    if not converted:
        raise InputError(f"{path} holds no prompt pair; write at least one line, {_EXAMPLE}.")
    return converted


_EXAMPLE = 'such as {"clean": ..., "corrupted": ..., "answer": ...}'
# JSON has lists where PromptPair has tuples; pydantic converts them.
_Words = Annotated[tuple[str, ...], Field(min_length=1)]
_Answer = str | _Words | None
_Spans = dict[str, tuple[StrictInt, StrictInt]] | None
_PROMPT = "the prompt as a string"
_WORDS = "a string, or a list of strings if several are right"
_SPANS = "an object of name: [start, end], in characters of the clean prompt"


class _Line(BaseModel, extra="forbid"):
    clean: str = Field(description=_PROMPT)
    corrupted: str = Field(description=_PROMPT)
    answer: _Answer = Field(None, description=_WORDS)
    wrong_answer: _Answer = Field(None, description=_WORDS)
    spans: _Spans = Field(None, description=_SPANS)


def _parse(line: str) -> PromptPair:
    try:
        content = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise InputError(
            f"not JSON ({error}): {shorten(line)}; write one object per line, {_EXAMPLE}."
        ) from error
    try:
        fields = _Line.model_validate(content)
    except ValidationError as error:
        raise InputError(_problem(content, error)) from error
    return PromptPair(**fields.model_dump(exclude_none=True))


def _problem(content: Any, error: ValidationError) -> str:
    known = _Line.model_fields
    if not isinstance(content, dict):
        kind = type(content).__name__
        return f"expected a JSON object, found {kind}; write one, {_EXAMPLE}."
    unknown = [name for name in content if name not in known]
    if unknown:
        return f"unknown field {unknown[0]!r}; {suggestion(unknown[0], known)}"
    location = error.errors()[0]["loc"]
    name = str(location[0])
    wanted = known[name].description
    if name not in content:
        return f"field {name!r} is missing; give {wanted}."
    return f"field {name!r} is {content[name]!r}; give {wanted}."
