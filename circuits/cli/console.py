"""Output of commands: tables, JSON."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pandas as pd
from rich.console import Console
from rich.table import Table

from circuits.graph.circuit import Circuit
from circuits.runs.circuit_run import CircuitRun
from circuits.runs.graph_run import GraphRun

MOST_EDGES_SHOWN = 15


def terminal() -> Console:
    """Make a console that prints texts as they are: names and tokens may look like markup."""
    return Console(markup=False, emoji=False)


def frame_table(frame: pd.DataFrame, title: str) -> Table:
    """Make a table of a frame's rows, with the index as its first column."""
    table = Table(title=title, title_justify="left")
    table.add_column(str(frame.index.name or ""), overflow="fold")
    for column in frame.columns:
        heading = str(column).replace("_", " ")
        table.add_column(heading, justify="right", overflow="fold")
    for name, *values in frame.itertuples():
        cells = map(_cell, values)
        table.add_row(str(name), *cells)
    return table


def edge_table(circuit: Circuit) -> Table:
    """Make a table of the edges of largest |score|, strongest first."""
    strongest = circuit.strongest(MOST_EDGES_SHOWN)
    scores = strongest.set_index("edge")[["score"]]
    title = f"The {len(scores)} edges of largest |score|"
    return frame_table(scores.map("{:+.4f}".format), title)


def print_json(content: Any) -> None:
    """Print one JSON value on standard output, for programs."""
    json.dump(content, sys.stdout, indent=2)
    sys.stdout.write("\n")


def print_run(found: CircuitRun | GraphRun, content: Mapping[str, Any]) -> None:
    """Print where a run is and what it holds, as JSON."""
    print_json({"folder": str(found.folder), "reused": found.reused, **content})


def print_place(found: CircuitRun | GraphRun, place: Path) -> None:
    """Print where a run, or its page, is saved or was found."""
    terminal().print(f"{'Found again' if found.reused else 'Saved'}: {place}", soft_wrap=True)


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
