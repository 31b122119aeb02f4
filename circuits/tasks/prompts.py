"""Prompt pairs as text: the pair itself, pairs from templates and files, and the two splits."""

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from string import Formatter
from typing import Any, Literal, TypeVar

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
    if isinstance(answer, str):
        return (answer,)
    return () if answer is None else tuple(answer)


def split_of(text: str) -> Split:
    """The split of a prompt: a hash of its text assigns half of all possible prompts to each."""
    digest = hashlib.blake2b(text.encode(), digest_size=1).digest()
    return "test" if digest[0] < 128 else "train"


def fill_template(
    template: str,
    clean: Mapping[str, str],
    corrupted: Mapping[str, str],
    answers: tuple[Answer, Answer],
    spans: Sequence[str],
) -> PromptPair:
    """Make a pair of two fillings of a template.

    >>> mary, john = {"NAME": "Mary"}, {"NAME": "John"}
    >>> fill_template("So {NAME} is", mary, john, (" she", " he"), ["NAME", "END"]).spans
    {'NAME': (3, 7), 'END': (9, 10)}

    Args:
        template: a `str.format` template.
        clean: the words that fill the fields of the clean prompt.
        corrupted: the same for the corrupted prompt.
        answers: the right and the wrong answer.
        spans: the fields that are spans of the clean prompt. If there is no field "END", this
            name means the last character of the prompt, which marks the last token.
    """
    # str.format does not say where it puts a word, so the clean prompt is put together here.
    text = ""
    found: dict[str, CharSpan] = {}
    for literal, name, _, _ in Formatter().parse(template):
        text += literal
        if name is not None:
            start = len(text)
            text += clean[name]
            found[name] = (start, len(text))
    last_character = (len(text) - 1, len(text))
    found.setdefault("END", last_character)
    kept = {name: found[name] for name in spans}
    return PromptPair(text, template.format(**corrupted), *answers, kept)


Converted = TypeVar("Converted")


def read_pairs(path: str | Path, convert: Callable[[PromptPair], Converted]) -> list[Converted]:
    """Read a file with one JSON object per line, and convert each prompt pair. Skip empty lines.

    Raises:
        InputError: the file cannot be read or has no pairs; or a line is not a prompt pair or
            `convert` rejects it (the message gives the line number).
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"the task file {path} cannot be read: {error}.") from error
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
_ANSWER = "a string, or a list of strings if several are right"
# What each field of a line must be.
_FIELDS = {
    "clean": "the prompt as a string",
    "corrupted": "the prompt as a string",
    "answer": _ANSWER,
    "wrong_answer": _ANSWER,
    "spans": "an object of name: [start, end], in characters of the clean prompt",
}


def _parse(line: str) -> PromptPair:
    try:
        content = json.loads(line)
    except ValueError as error:
        raise InputError(
            f"not JSON ({error}): {shorten(line)}; write one object per line, {_EXAMPLE}."
        ) from error
    if not isinstance(content, dict):
        kind = type(content).__name__
        raise InputError(f"expected a JSON object, found {kind}; write one, {_EXAMPLE}.")
    for name in content:
        if name not in _FIELDS:
            raise InputError(f"unknown field {name!r}; {suggestion(name, _FIELDS)}")
    for name in ("clean", "corrupted"):
        if name not in content:
            raise InputError(f"field {name!r} is missing; give {_FIELDS[name]}.")
    return PromptPair(**{name: _field(name, value) for name, value in content.items()})


def _field(name: str, value: Any) -> Any:
    # JSON has lists where PromptPair has tuples.
    match name, value:
        case (("clean" | "corrupted" | "answer" | "wrong_answer"), str()):
            return value
        case (("answer" | "wrong_answer"), None):
            return None
        case (("answer" | "wrong_answer"), [_, *_]) if all(isinstance(text, str) for text in value):
            return tuple(value)
        case "spans", None:
            return {}
        case "spans", dict() if all(map(_is_span, value.values())):
            return {span: tuple(ends) for span, ends in value.items()}
    raise InputError(f"field {name!r} is {value!r}; give {_FIELDS[name]}.")


def _is_span(ends: Any) -> bool:
    return isinstance(ends, list) and [type(end) for end in ends] == [int, int]
