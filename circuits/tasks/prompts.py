"""Prompt pairs as text: the pair itself, reading pairs from a file, and which split a text belongs to."""

from __future__ import annotations

import difflib
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

from circuits.system.errors import InputError

Split = Literal["train", "test"]
SPLITS: tuple[Split, ...] = ("train", "test")


@dataclass(frozen=True)
class PromptPair:
    """A prompt and its corrupted counterpart, which has the same number of tokens, as text.

    Attributes:
        clean: the prompt as it should be.
        corrupted: the same prompt with what matters changed.
        answer: what comes right after the clean prompt, one token; several where any of them is right. It is written as it continues
            the prompt, with its leading space where the text has one (" Mary").
        wrong_answer: the same for what should not come.
        spans: names for stretches of the clean prompt, as (start, end) in characters. A token belongs to a span when it overlaps it.
    """

    clean: str
    corrupted: str
    answer: str | tuple[str, ...] | None = None
    wrong_answer: str | tuple[str, ...] | None = None
    spans: Mapping[str, tuple[int, int]] = field(default_factory=dict, hash=False)

    @property
    def answers(self) -> tuple[str, ...]:
        """All right answers."""
        return _several(self.answer)

    @property
    def wrong_answers(self) -> tuple[str, ...]:
        """All wrong answers."""
        return _several(self.wrong_answer)


def split_of(text: str) -> Split:
    """The split a prompt belongs to, by a hash of its text: half of all prompts each, whatever the seed and the process."""
    return "test" if hashlib.blake2b(text.encode(), digest_size=1).digest()[0] < 128 else "train"


def read_pairs(path: str | Path) -> list[tuple[int, PromptPair]]:
    """The pairs of a file with one JSON object a line, with their line numbers. Empty lines are skipped.

    Raises:
        InputError: the file is missing, holds no pair, or has a line that is none (with its number).
    """
    path = Path(path)
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(
            f"the task file {path} cannot be read ({error}); give a text file with one JSON object a line."
        ) from error
    pairs = []
    for number, line in enumerate(lines, 1):
        if line.strip():
            try:
                pairs.append((number, _parse(line)))
            except InputError as error:
                raise InputError(f"{path}, line {number}: {error}") from error
    if not pairs:
        raise InputError(
            f"{path} holds no prompt pair; write one JSON object a line, with at least clean and corrupted."
        )
    return pairs


def shorten(text: str) -> str:
    """A prompt as it is shown in an error: its beginning and its end, quoted."""
    return repr(text if len(text) <= 70 else f"{text[:40]} ... {text[-25:]}")


def _several(answer: str | tuple[str, ...] | None) -> tuple[str, ...]:
    if answer is None:
        return ()
    return (answer,) if isinstance(answer, str) else tuple(answer)


_FIELDS = tuple(entry.name for entry in fields(PromptPair))


def _parse(line: str) -> PromptPair:
    try:
        content = json.loads(line)
    except ValueError as error:
        raise InputError(
            f'not JSON ({error}): {shorten(line)}; write one object a line, such as {{"clean": ..., "corrupted": ...}}.'
        ) from error
    if not isinstance(content, dict):
        raise InputError(
            f'expected a JSON object, found {type(content).__name__}; write {{"clean": ..., "corrupted": ...}}.'
        )
    for name in content:
        if name not in _FIELDS:
            near = difflib.get_close_matches(name, _FIELDS, n=1)
            raise InputError(
                f"unknown field {name!r}; {f'did you mean {near[0]!r}?' if near else f'the fields are {_FIELDS}.'}"
            )
    for name in ("clean", "corrupted"):
        if not isinstance(content.get(name), str):
            raise InputError(
                f"field {name!r} is {'missing' if name not in content else 'not a string'}; give the prompt's text."
            )
    answers = {name: _parse_answer(name, content.get(name)) for name in ("answer", "wrong_answer")}
    return PromptPair(
        content["clean"], content["corrupted"], **answers, spans=_parse_spans(content.get("spans"))
    )


def _parse_answer(name: str, value: Any) -> str | tuple[str, ...] | None:
    if value is None or isinstance(value, str):
        return value
    if isinstance(value, list) and value and all(isinstance(word, str) for word in value):
        return tuple(value)
    raise InputError(
        f"field {name!r} is {value!r}; give a string, or a list of strings where several are right."
    )


def _parse_spans(value: Any) -> dict[str, tuple[int, int]]:
    if value is None:
        return {}
    if not isinstance(value, dict) or not all(_is_span(span) for span in value.values()):
        raise InputError(
            f"field 'spans' is {value!r}; give an object of name: [start, end], in characters of the clean prompt."
        )
    return {name: (span[0], span[1]) for name, span in value.items()}


def _is_span(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 2 and all(type(edge) is int for edge in value)
