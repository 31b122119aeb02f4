"""What commands print: progress bars, tables, JSON."""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Callable, Iterator
from typing import Any

import pandas as pd
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    TextColumn,
    TimeRemainingColumn,
)
from rich.progress import Task as ProgressTask
from rich.table import Table
from rich.text import Text

from circuits.graph.circuit import Circuit
from circuits.system.ranks import is_first


@contextlib.contextmanager
def progress_bar(
    description: str, *, quiet: bool = False
) -> Iterator[Callable[[int, int], None] | None]:
    """A bar on standard error with the rate and the remaining time; nothing when `quiet`, when
    nobody watches or on other ranks than the first.
    """
    if quiet or not is_first() or not sys.stderr.isatty():
        yield None
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        _RateColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        row = bar.add_task(description, total=None)
        yield lambda done, total: bar.update(row, completed=done, total=total)


class _RateColumn(ProgressColumn):
    def render(self, task: ProgressTask) -> Text:
        speed = task.finished_speed or task.speed
        return Text(f"{speed:.1f}/s" if speed else "", style="progress.data.speed")


def frame_table(frame: pd.DataFrame, title: str) -> Table:
    """A table of a frame's rows, its index first."""
    table = Table(title=title, title_justify="left")
    table.add_column(str(frame.index.name or ""))
    for column in frame.columns:
        table.add_column(str(column).replace("_", " "), justify="right", overflow="fold")
    for name, row in zip(frame.index, frame.itertuples(index=False), strict=True):
        table.add_row(str(name), *(_cell(value) for value in row))
    return table


def _cell(value: Any) -> str:
    if value is None or value != value:
        return "-"
    if isinstance(value, str):
        return value
    return (
        f"{value:,}"
        if isinstance(value, int) or (float(value).is_integer() and abs(value) >= 10)
        else f"{round(value, 3) + 0.0:.3f}"
    )


def edge_table(circuit: Circuit, n: int = 15) -> Table:
    """The edges of largest |score|, strongest first."""
    strongest = circuit.top(min(n, len(circuit)))
    pairs = zip(strongest.edges, strongest.scores[strongest.kept].tolist(), strict=True)
    table = Table(title=f"The {len(strongest)} edges of largest |score|", title_justify="left")
    table.add_column("edge")
    table.add_column("score", justify="right")
    for edge, score in sorted(pairs, key=lambda pair: -abs(pair[1])):
        table.add_row(str(edge), f"{score:+.4f}")
    return table


def print_json(content: Any) -> None:
    """One JSON value on standard output, for programs."""
    sys.stdout.write(json.dumps(content, indent=2) + "\n")
