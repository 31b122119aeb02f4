"""Prompt pairs from what users have in memory: objects, dicts, tuples, tables."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Set
from typing import Any

import numpy as np
import pandas as pd

from circuits.system.errors import InputError
from circuits.system.numbers import is_missing, is_series, ordered_items, shown
from circuits.system.tensors import check_same_labels
from circuits.tasks.prompts import PromptPair, plain_fields
from circuits.tasks.readers.cells import TableRow
from circuits.tasks.readers.data_sets import ALL_FIELDS, FIELDS, pair_fields
from circuits.tasks.readers.files import Row

PromptPairs = Iterable[Any] | PromptPair
FORMS = "a PromptPair, a dict with its fields, or a tuple (clean, corrupted, answer, wrong_answer)"


def pair_of(given: Any) -> PromptPair:
    """A pair in any of its forms as a PromptPair."""
    if isinstance(given, PromptPair):
        return given
    if isinstance(given, pd.Series):
        given = TableRow.of_cells(given.index, given)
    elif hasattr(given, "_fields"):
        # A row of a table as a named tuple, whose columns may come in any order
        given = TableRow.of_cells(given._fields, given)
    elif isinstance(given, np.void | np.ndarray):
        names, cells = given.dtype.names, given.tolist()
        if names and not given.ndim:
            cells = TableRow.of_cells(names, cells)
        given = cells
    if isinstance(given, Mapping):
        return PromptPair(**pair_fields(given))
    if isinstance(given, list | tuple) and 2 <= len(given) <= 4:
        named = dict(zip(FIELDS, given, strict=False))
        return PromptPair(**plain_fields(named))
    raise InputError(f"{shown(given)} is no prompt pair; give {FORMS}.")


def pair_rows(given: Any) -> Iterator[Row]:
    """All pairs of a list, a table (of pandas, or a dict of columns), or a single pair."""
    if isinstance(given, pd.DataFrame):
        # An index may be one of the fields.
        named = [name for name in given.index.names if name in ALL_FIELDS]
        table = given.reset_index(named, allow_duplicates=True)
        cells = table.itertuples(index=False, name=None)
        given = (TableRow.of_cells(table.columns, row) for row in cells)
    elif _is_single(given):
        given = [given]
    elif isinstance(given, Mapping):
        given = _rows_of_columns(given)
    if isinstance(given, str) or not is_series(given):
        raise InputError(f"{shown(given)} is no list of prompt pairs; each is {FORMS}.")
    if isinstance(given, Set):
        given = ordered_items(given, "pairs")
    for number, each in enumerate(given):
        yield f"prompt pair {number}", each


def _is_single(given: Any) -> bool:
    if isinstance(given, tuple):
        prompts = given[:2]
        return bool(given) and all(isinstance(each, str) or is_missing(each) for each in prompts)
    if not isinstance(given, Mapping | pd.Series):
        return isinstance(given, PromptPair | np.void)
    clean = given.get("clean", given.get("prompt"))
    is_column = isinstance(clean, Iterable) and not isinstance(clean, str | Mapping)
    return not is_column and (isinstance(given, Mapping) or clean is not None)


def _rows_of_columns(columns: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The rows of a dict of columns; a column that is None holds nothing."""
    given = {name: column for name, column in columns.items() if column is not None}
    check_same_labels(given)
    listed = {name: ordered_items(column, name) for name, column in given.items()}
    lengths = {name: len(column) for name, column in listed.items()}
    if len(set(lengths.values())) > 1:
        counts = ", ".join(f"{name} has {length}" for name, length in lengths.items())
        raise InputError(f"columns of different lengths ({counts}); give an entry for each prompt.")
    rows = zip(*listed.values(), strict=True)
    return [dict(zip(listed, cells, strict=True)) for cells in rows]
