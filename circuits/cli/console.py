"""Output of commands: progress bars, tables, JSON."""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Iterator, Mapping
from typing import Any

import pandas as pd
from rich.console import Console
from rich.progress import MofNCompleteColumn, Progress, ProgressColumn
from rich.progress import Task as ProgressTask
from rich.table import Table
from rich.text import Text

from circuits.discovery.discoverer import Progress as Callback
from circuits.graph.circuit import Circuit
from circuits.runs.circuit_run import CircuitRun
from circuits.runs.graph_run import GraphRun
from circuits.system.ranks import is_first

MOST_EDGES_SHOWN = 15


@contextlib.contextmanager
def progress_bar(description: str, *, quiet: bool = False) -> Iterator[Callback | None]:
    """Show a progress bar with rate and remaining time, if standard error is a terminal.

    Yields the function that updates the bar; None if there is none.
    """
    if quiet or not is_first() or not sys.stderr.isatty():
        yield None
        return
    columns = Progress.get_default_columns()
    columns += (MofNCompleteColumn(), _RateColumn())
    console = Console(stderr=True)
    bar = Progress(*columns, console=console, transient=True)
    with bar:
        # The method tells the total with every update.
        row = bar.add_task(description, total=None)
        yield lambda done, total: bar.update(row, completed=done, total=total)


class _RateColumn(ProgressColumn):
    # rich's own column shows a speed only while the total is unknown.
    def render(self, task: ProgressTask) -> Text:
        speed = task.finished_speed or task.speed
        return Text(f"{speed:.1f}/s" if speed else "", style="progress.data.speed")


def terminal() -> Console:
    """Make a console that prints texts as they are: names and tokens may look like markup."""
    return Console(markup=False, emoji=False)


def frame_table(frame: pd.DataFrame, title: str) -> Table:
    """Make a table of a frame's rows, with the index as its first column."""
    table = Table(title=title, title_justify="left")
    table.add_column(str(frame.index.name or ""))
    for column in frame.columns:
        heading = str(column).replace("_", " ")
        table.add_column(heading, justify="right", overflow="fold")
    for name, *values in frame.itertuples():
        cells = map(_cell, values)
        table.add_row(str(name), *cells)
    return table


def edge_table(circuit: Circuit) -> Table:
    """Make a table of the edges of largest |score|, strongest first."""
    n_shown = min(MOST_EDGES_SHOWN, len(circuit))
    strongest = circuit.top(n_shown).to_dataframe()
    strongest = strongest.sort_values("score", key=abs, ascending=False)
    scores = strongest.set_index("edge")[["score"]]
    title = f"The {n_shown} edges of largest |score|"
    return frame_table(scores.map("{:+.4f}".format), title)


def print_json(content: Any) -> None:
    """Print one JSON value on standard output, for programs."""
    json.dump(content, sys.stdout, indent=2)
    sys.stdout.write("\n")


def print_run(found: CircuitRun | GraphRun, content: Mapping[str, Any]) -> None:
    """Print where a run is and what it holds, as JSON."""
    print_json({"folder": str(found.folder), "reused": found.reused, **content})


def _cell(value: Any) -> str:
    if isinstance(value, str):
        return value
    # NaN differs from itself.
    if value is None or value != value:
        return "-"
    is_whole = float(value).is_integer()
    if isinstance(value, int) or (is_whole and abs(value) >= 10):
        return f"{value:,}"
    # Adding 0.0 turns -0.0 into 0.0.
    return f"{round(value, 3) + 0.0:.3f}"
