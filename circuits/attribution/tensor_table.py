"""Tables of tensors: dataclasses in which every field is a column with one entry per row."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields
from typing import TypeVar

import torch
from jaxtyping import Bool, Int
from torch import Tensor

Table = TypeVar("Table")


def select_rows(table: Table, rows: Tensor | slice) -> Table:
    """Return the table with some of its rows."""
    names = _column_names(table)
    return type(table)(**{name: getattr(table, name)[rows] for name in names})


def join_rows(tables: Sequence[Table]) -> Table:
    """Concatenate tables of the same type."""
    names = _column_names(tables[0])
    columns = {name: [getattr(table, name) for table in tables] for name in names}
    return type(tables[0])(**{name: torch.cat(parts) for name, parts in columns.items()})


def row_numbers(column: Tensor) -> Int[Tensor, " row"]:
    """Return 0, 1, ... for each row of a column, on its device."""
    return torch.arange(len(column), device=column.device)


def true_rows(mask: Bool[Tensor, " row"]) -> Int[Tensor, " true"]:
    """Return the numbers of the rows where `mask` holds."""
    return mask.nonzero().flatten()


def _column_names(table: object) -> list[str]:
    return [field.name for field in fields(table)]  # type: ignore[arg-type]
