"""Tables: dataclasses in which every tensor is a column with one entry per row."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, TypeVar

import torch
from jaxtyping import Bool, Int
from torch import Tensor

# A dataclass. What is no tensor belongs to the whole table.
Table = TypeVar("Table", bound=Any)


def select_rows(table: Table, rows: Tensor | slice) -> Table:
    """Return the table with some of its rows."""
    columns = tensors_of(table)
    for name, column in columns.items():
        columns[name] = column[rows]
    return replace(table, **columns)


def join_rows(tables: Sequence[Table]) -> Table:
    """Concatenate tables of the same type."""
    columns = {}
    for name in tensors_of(tables[0]):
        parts = [getattr(table, name) for table in tables]
        columns[name] = torch.cat(parts)
    return replace(tables[0], **columns)


def tensors_of(table: Table) -> dict[str, Any]:
    """Return the tensors among the attributes of a table."""
    values = vars(table).items()
    return {name: value for name, value in values if isinstance(value, Tensor)}


def row_numbers(column: Tensor) -> Int[Tensor, " row"]:
    """Return 0, 1, ... for each row of a column, on its device."""
    return torch.arange(len(column), device=column.device)


def true_rows(mask: Bool[Tensor, " row"]) -> Int[Tensor, " true"]:
    """Return the numbers of the rows where `mask` holds."""
    return mask.nonzero().flatten()
