"""Rows of this package's and of other projects' data sets, as the fields of a `PromptPair`.

EAP-IG (https://github.com/hannamw/EAP-IG) keeps tables with the columns clean and corrupted, and
the token ids of the answers in two columns named after the task. MIB (https://huggingface.co/
mib-bench) has a prompt, its answer, and counterfactuals, each with a prompt of its own.
"""

from __future__ import annotations

import re
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import fields
from itertools import chain
from typing import Any

from circuits.system.errors import InputError
from circuits.system.messages import suggestion
from circuits.system.numbers import is_missing, items, python_number, shown
from circuits.tasks.prompts import DoesNotFit, PromptPair, plain_answer, plain_fields
from circuits.tasks.readers.cells import TableRow, from_text

Content = Mapping[Any, Any]

FIELDS = tuple(field.name for field in fields(PromptPair))
ANSWERS = ("answer", "wrong_answer")
# The columns of the right and the wrong answers' token ids: of this package, then of EAP-IG.
OWN_IDS = ("answer_idx", "wrong_answer_idx")
TOKEN_COLUMNS = (
    ("correct_idx", "incorrect_idx"),
    ("country_idx", "corrupted_country_idx"),
    ("capital_idx", "corrupted_capital_idx"),
    ("clean_answer_idx", "corrupted_answer_idx"),
    ("answers_idx", "corrupted_answers_idx"),
    ("answer_idx", "corrupted_idx"),
    ("clean_idx", "corrupted_idx"),
)
ALL_FIELDS = (*FIELDS, *OWN_IDS, *chain(*TOKEN_COLUMNS))
# What the tables of EAP-IG have besides, which no prompt pair needs.
OF_EAP_IG = (
    *("corrupted_hard", "label", "country", "corrupted_country", "capital", "corrupted_capital"),
    *("h1", "c1", "hypernym", "corrupted_hypernym", "answers", "corrupted_answers"),
    *("clean2", "corrupted2", "prob_diff"),
)
# The counterfactuals that MIB's circuit track uses, of each kind of task.
COUNTERFACTUALS = ("s2_io_flip_counterfactual", "symbol_counterfactual", "random_counterfactual")
OF_MIB = (
    *("prompt", "choices", "answerKey", "label", "metadata", "template", "question", "idx"),
    *("arc_id", "dataset", "dataset_specific_id", "operator", "operand1", "operand2", "num_digit"),
)
# What pandas calls row numbers: in files, named tuples, data sets of the hub, `reset_index`.
ROW_NUMBERS = re.compile(r"|[Ii]ndex|level_\d+|Unnamed: [\d.]+|__index_level_\d+__")
# What a column says: a field of the pair, the column's own name, and the value of the field.
Claim = tuple[str, str, Any]


def pair_fields(row: Content) -> dict[str, Any]:
    """The fields of a `PromptPair` that a row gives. Every column is used or known, or refused."""
    if isinstance(row, TableRow):
        row.check_answers()
    pairs = [pair for pair in TOKEN_COLUMNS if all(column in row for column in pair)]
    counterfactuals = [name for name in row if str(name).endswith("_counterfactual")]
    claims = [(name, name, row[name]) for name in FIELDS if name in row]
    claims += _of_ids(row, pairs)
    known = {*FIELDS, *OWN_IDS, *chain(*pairs), *(OF_EAP_IG if pairs else ())}
    if "prompt" in row and counterfactuals:
        claims += _of_mib(row, counterfactuals)
        known |= {*OF_MIB, *counterfactuals}
    _check_known(row, known)
    columns: dict[str, str] = {}
    given = {}
    for field, column, value in claims:
        if is_missing(value):
            continue
        if columns.setdefault(field, column) != column:
            both = f"{columns[field]!r} and {column!r}"
            raise InputError(f"{both} both give the {field}; leave one of them out.")
        given[field] = value
    if "clean" not in given:
        raise DoesNotFit("field 'clean' is missing; give a text.", "no clean prompt")
    return plain_fields(given)


def _check_known(row: Content, known: Container[str]) -> None:
    for name, value in row.items():
        is_number = python_number(value) is not None or str(value).isdecimal()
        counts = ROW_NUMBERS.fullmatch(str(name)) and (is_number or is_missing(value))
        if name in known or counts:
            continue
        wrong = dict(TOKEN_COLUMNS).get(name)
        if wrong is not None:
            # In EAP-IG's greater-than data, correct_idx is a year.
            raise InputError(
                f"{name!r} without {wrong!r} need not be a token id (EAP-IG writes years there); "
                "instead give the answers as text in columns answer and wrong_answer."
            )
        told = suggestion(str(name), (*FIELDS, *OWN_IDS))
        raise InputError(f"unknown field {name!r}; {told} If it is none, remove it.")


def _of_ids(row: Content, pairs: Iterable[tuple[str, str]]) -> Iterator[Claim]:
    """The answers that are token ids."""
    for pair in (OWN_IDS, *pairs):
        for field, column in zip(ANSWERS, pair, strict=True):
            if not is_missing(row.get(column)):
                yield field, column, _ids(row[column], column)


def _ids(value: Any, column: str) -> Any:
    """Token ids from a number, a list, or the text of either."""
    if isinstance(value, str):
        value = from_text(value)
    ids = plain_answer(value, column)
    several = ids if isinstance(ids, tuple) else (ids,)
    if any(isinstance(each, str) for each in several):
        raise InputError(f"{column!r} is {shown(value)}; give a token id, or a list of token ids.")
    return ids


def _of_mib(row: Content, counterfactuals: Sequence[str]) -> Iterator[Claim]:
    chosen = [name for name in COUNTERFACTUALS if name in counterfactuals]
    if not chosen:
        raise DoesNotFit(
            f"of the counterfactuals {', '.join(counterfactuals)} none is MIB's for circuits; give "
            "PromptPairs with the prompts you want to Task.from_prompts.",
            "no counterfactual of MIB's circuit track",
        )
    name = chosen[0]
    other = row[name]
    if not isinstance(other, Mapping) or not other.get("prompt"):
        raise DoesNotFit(f"{name!r} has no prompt; leave out this row.", "no counterfactual prompt")
    yield "clean", "prompt", row["prompt"]
    yield "corrupted", name, other["prompt"]
    names = row.get("metadata")
    if isinstance(names, Mapping) and {"indirect_object", "subject"} <= names.keys():
        # The names of the clean prompt, whichever counterfactual it is.
        for field, role in zip(ANSWERS, ("indirect_object", "subject"), strict=True):
            yield field, "metadata", f" {names[role]}"
    else:
        yield "answer", "choices" if "choices" in row else "label", _mib_answer(row)
        yield "wrong_answer", name, _mib_answer(other)


def _mib_answer(row: Content) -> str:
    """The label that is the right answer, as MIB writes it."""
    choices, key = row.get("choices"), python_number(row.get("answerKey"))
    labels = choices.get("label") if isinstance(choices, Mapping) else choices
    if is_missing(labels):
        answer = row.get("label")
    else:
        answer = dict(enumerate(items(labels, "choices"))).get(key)
    if is_missing(answer):
        told = "a row has no answer; give choices and answerKey, or a label."
        raise DoesNotFit(told, "no answer")
    return str(answer)
