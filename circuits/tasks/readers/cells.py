"""Rows of files and tables: what their cells stand for."""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any

from circuits.system.errors import InputError
from circuits.system.numbers import is_missing, python_number, shown

# The columns that are text whatever it looks like.
PROMPTS = ("clean", "corrupted", "prompt")


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
        """Refuse numbers, which may stand for text or for token ids."""
        for name in ("answer", "wrong_answer"):
            given = self.get(name)
            several = given if isinstance(given, list | tuple) else [given]
            if any(python_number(each) is not None for each in several if not is_missing(each)):
                raise InputError(
                    f"field {name!r} is {shown(given)}; give a string, or a list of strings; "
                    f"token ids go into {name}_idx."
                )


def repeated(names: Iterable[Any]) -> list[Any]:
    """The names that come more than once."""
    listed = list(names)
    return [name for name in listed if listed.count(name) > 1]


def from_json(text: str) -> Any:
    """What JSON stands for. An object that has a name twice is none: one value would be lost."""
    return DECODER.decode(text)


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    twice = repeated(name for name, _ in pairs)
    if twice:
        raise ValueError(f"the name {twice[0]!r} is there twice")
    return dict(pairs)


DECODER = json.JSONDecoder(object_pairs_hook=_object)


def _cell(name: Any, cell: Any) -> Any:
    if not isinstance(cell, str):
        return None if is_missing(cell) else cell
    if name in PROMPTS or not cell.startswith(("[", "{")):
        return cell or None
    try:
        return from_json(cell)
    except (ValueError, RecursionError):
        return cell
