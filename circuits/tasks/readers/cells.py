"""Rows of files and tables: what their cells stand for."""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Iterable, Mapping
from contextlib import suppress
from typing import Any

from circuits.system.errors import InputError
from circuits.system.numbers import is_missing, is_series, items, python_number, shown
from circuits.tasks.prompts import held

# The columns that are text whatever it looks like.
PROMPTS = ("clean", "corrupted", "prompt")
# How the others begin that may be lists or objects, in JSON or Python
LISTED = ("[", "{", "('", '("')
# Texts that may be several answers, as numpy, torch and pandas write them, or as objects that only
# have an address, or what is left of a list
SEVERAL = re.compile(
    r"""\s*([\[{]\s*['"]|\[.*[\s,(].*\]\s*$|(array|tensor)\(|<.* at 0x|.*\bdtype[:=])""", re.DOTALL
)
AS_JSON = 'write several, or one with brackets, as a JSON list, such as [" a"]'


class TableRow(dict[str, Any]):
    """A row of a file or table, where answers are text: token ids have columns of their own."""

    @staticmethod
    def of_cells(names: Iterable[Any], cells: Iterable[Any]) -> TableRow:
        """A row whose empty cells hold nothing, and whose lists and objects may be JSON."""
        pairs = [(name, _cell(name, cell)) for name, cell in zip(names, cells, strict=True)]
        # Columns without a name are row numbers, which pandas writes, or empty.
        pairs = [(name, value) for name, value in pairs if name != "" or value is not None]
        twice = repeated(name for name, _ in pairs if name != "")
        if twice:
            raise InputError(f"the column {twice[0]!r} is there twice; rename one.")
        return TableRow(pairs)

    def check_answers(self) -> None:
        """Refuse numbers, which may stand for text or for token ids, and what may be a list."""
        for name in ("answer", "wrong_answer"):
            given = self.get(name)
            is_one = isinstance(given, str | bytes | Mapping) or not is_series(given)
            several = [given] if is_one else items(given, name)
            is_list = isinstance(given, str) and _may_be_list(given)
            if is_list or not several or isinstance(given, Mapping):
                raise InputError(f"field {name!r} is {shown(given)}, no plain text; {AS_JSON}.")
            if any(python_number(each) is not None for each in several if not is_missing(each)):
                raise InputError(
                    f"field {name!r} is {shown(given)}; give a string, or a list of strings; "
                    f"token ids go into {name}_idx."
                )


def _may_be_list(text: str) -> bool:
    if SEVERAL.match(text):
        return True
    # "[0]" is a list in JSON, which was read before; " [0]" is none.
    return not text.lstrip().startswith("[") and bool(held(text))


def repeated(names: Iterable[Any]) -> list[Any]:
    """The names that come more than once."""
    listed = list(names)
    return [name for name in listed if listed.count(name) > 1]


def from_json(text: str) -> Any:
    """What JSON stands for. An object that has a name twice is none: one value would be lost."""
    return DECODER.decode(text)


def from_text(text: str) -> Any:
    """What a text stands for in JSON, or as Python and so pandas writes it; else the text."""
    for read in (from_json, _literal):
        with suppress(ValueError, SyntaxError, RecursionError, MemoryError):
            return read(text)
    return text


def _literal(text: str) -> Any:
    found = ast.literal_eval(text)
    # To Python, what numpy writes as ['a' 'b'] is ['ab'].
    if not isinstance(found, list | tuple | dict) or repr(found) != text:
        raise ValueError
    return found


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    twice = repeated(name for name, _ in pairs)
    if twice:
        raise ValueError(f"the name {twice[0]!r} is there twice")
    return dict(pairs)


DECODER = json.JSONDecoder(object_pairs_hook=_object)


def _cell(name: Any, cell: Any) -> Any:
    if not isinstance(cell, str):
        return None if is_missing(cell) else cell
    is_text = name in PROMPTS or not cell.startswith(LISTED)
    return cell or None if is_text else from_text(cell)
