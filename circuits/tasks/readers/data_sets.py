"""Rows of other projects' data sets, as the fields of a `PromptPair`.

EAP-IG (https://github.com/hannamw/EAP-IG) keeps tables with the columns clean and corrupted, and
the token ids of the answers in two columns named after the task. MIB (https://huggingface.co/
mib-bench) has a prompt, its answer, and counterfactuals, each with a prompt of its own.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from circuits.system.errors import InputError
from circuits.system.numbers import python_number, shown

# The columns of the right and the wrong answers' token ids.
TOKEN_COLUMNS = (
    ("answer_idx", "wrong_answer_idx"),
    ("correct_idx", "incorrect_idx"),
    ("country_idx", "corrupted_country_idx"),
    ("capital_idx", "corrupted_capital_idx"),
    ("clean_answer_idx", "corrupted_answer_idx"),
    ("answers_idx", "corrupted_answers_idx"),
    ("answer_idx", "corrupted_idx"),
    ("clean_idx", "corrupted_idx"),
)
# The counterfactuals that MIB's circuit track uses, of each kind of task.
COUNTERFACTUALS = ("s2_io_flip_counterfactual", "symbol_counterfactual", "random_counterfactual")

Content = Mapping[str, Any]
Fields = dict[str, Any]


def known_fields(row: Content) -> Fields | None:
    """The fields of a `PromptPair` that a row of a known data set stands for; None for others."""
    if "prompt" in row and _counterfactuals(row):
        return _of_mib(row)
    if "clean" in row and "corrupted" in row and "answer" not in row:
        return _of_eap_ig(row)
    return None


def _of_eap_ig(row: Content) -> Fields | None:
    known = [columns for columns in TOKEN_COLUMNS if columns[0] in row]
    found = [(right, wrong) for right, wrong in known if wrong in row]
    if len(found) > 1:
        raise InputError(
            f"{found[0][0]!r} and {found[1][0]!r} both hold answers; leave one pair of columns."
        )
    fields = {"clean": row["clean"], "corrupted": row["corrupted"]}
    if found:
        right, wrong = found[0]
        return fields | {"answer": _ids(row, right), "wrong_answer": _ids(row, wrong)}
    if "answer_idx" in row:
        return fields | {"answer": _ids(row, "answer_idx")}
    if known:
        # In EAP-IG's greater-than data, correct_idx is a year.
        right, wrong = known[0]
        raise InputError(
            f"{right!r} without {wrong!r} need not be a token id (EAP-IG writes years there); "
            "give the answers as text in columns answer and wrong_answer."
        )
    return None


def _ids(row: Content, column: str) -> list[int]:
    """Token ids from a number, a list, or the text of either."""
    value = row[column]
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except ValueError:
            value = [value]
    listed = value if isinstance(value, list | tuple) else [value]
    ids = [python_number(each) for each in listed]
    if not ids or any(each is None or each % 1 or each < 0 for each in ids):
        raise InputError(f"{column!r} is {shown(value)}; give a token id, or a list of token ids.")
    return list(map(int, ids))


def _counterfactuals(row: Content) -> list[str]:
    return [name for name in row if name.endswith("_counterfactual")]


def _of_mib(row: Content) -> Fields:
    available = _counterfactuals(row)
    chosen = [name for name in COUNTERFACTUALS if name in available]
    if not chosen:
        raise InputError(
            f"of the counterfactuals {', '.join(available)} none is MIB's for circuits; give "
            "PromptPairs with the prompts you want to Task.from_prompts."
        )
    other = row[chosen[0]]
    if not isinstance(other, Mapping) or not other.get("prompt"):
        raise InputError(f"{chosen[0]!r} has no prompt; leave out this row.")
    fields = {"clean": row["prompt"], "corrupted": other["prompt"]}
    names = row.get("metadata")
    if isinstance(names, Mapping) and {"indirect_object", "subject"} <= names.keys():
        # The names of the clean prompt, whichever counterfactual it is.
        answers = [f" {names[role]}" for role in ("indirect_object", "subject")]
    else:
        answers = [_mib_answer(each) for each in (row, other)]
    return fields | dict(zip(("answer", "wrong_answer"), answers, strict=True))


def _mib_answer(row: Content) -> str:
    """The label that is the right answer, as MIB writes it."""
    choices, key = row.get("choices"), python_number(row.get("answerKey"))
    labels = choices.get("label") if isinstance(choices, Mapping) else choices
    try:
        answer = row.get("label") if labels is None else list(labels)[int(key)]
    except (IndexError, TypeError, ValueError):
        answer = None
    if answer is None:
        raise InputError("a row has no answer; give choices and answerKey, or a label.")
    return str(answer)
