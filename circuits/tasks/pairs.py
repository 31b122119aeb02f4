"""Prompt pairs from what users have in memory: objects, dicts, tuples, tables."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import fields
from typing import Any

import pandas as pd

from circuits.system.errors import InputError
from circuits.system.messages import suggestion
from circuits.system.numbers import shown
from circuits.tasks.prompts import PromptPair
from circuits.tasks.readers.data_sets import known_fields

PromptPairs = Iterable[Any] | PromptPair
FORMS = "a PromptPair, a dict with its fields, or a tuple (clean, corrupted, answer, wrong_answer)"


def prompt_pairs(given: Any) -> list[PromptPair]:
    """All pairs of a list, a table (of pandas, or a dict of columns), or a single pair."""
    if isinstance(given, pd.DataFrame):
        # A missing cell is None rather than NaN.
        given = given.astype(object).where(given.notna(), None).to_dict("records")
    elif isinstance(given, Mapping) and _has_columns(given):
        columns = given.values()
        rows = zip(*columns, strict=True)
        given = [dict(zip(given, cells, strict=True)) for cells in rows]
    elif isinstance(given, PromptPair | Mapping | pd.Series) or _is_pair(given):
        given = [given]
    if isinstance(given, str) or not isinstance(given, Iterable):
        raise InputError(f"{shown(given)} is no list of prompt pairs; each is {FORMS}.")
    return [_pair(number, each) for number, each in enumerate(given)]


def _has_columns(given: Mapping[str, Any]) -> bool:
    return isinstance(given.get("clean", given.get("prompt")), list | tuple | pd.Series)


def _is_pair(given: Any) -> bool:
    return isinstance(given, tuple) and all(isinstance(each, str) for each in given[:2])


def _pair(number: int, given: Any) -> PromptPair:
    if isinstance(given, PromptPair):
        return given
    try:
        if isinstance(given, Mapping | pd.Series):
            return _from_fields(dict(given))
        if isinstance(given, list | tuple) and 2 <= len(given) <= 4:
            return PromptPair(*given)
    except InputError as error:
        raise InputError(f"prompt pair {number}: {error}") from error
    raise InputError(f"prompt pair {number} is {shown(given)}; give {FORMS}.")


def _from_fields(given: dict[str, Any]) -> PromptPair:
    known = known_fields(given)
    if known is not None:
        return PromptPair(**known)
    names = [each.name for each in fields(PromptPair)]
    for name in given:
        if name not in names:
            raise InputError(f"unknown field {name!r}; {suggestion(str(name), names)}")
    if given.get("clean") is None:
        raise InputError("field 'clean' is missing; give a text.")
    given = {name: value for name, value in given.items() if value is not None}
    return PromptPair(**given)
