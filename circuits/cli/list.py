"""circuits list."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import tyro
from rich.console import Console
from rich.table import Table

from circuits.cli.console import print_json
from circuits.cli.methods import first_line
from circuits.discovery.registry import discoverers
from circuits.running.ablation import NAMES as ABLATIONS
from circuits.tasks.metrics import METRICS
from circuits.tasks.registry import task_families
from circuits.transcoders.io.load import embedded_transcoders


@dataclass(frozen=True)
class ListOptions:
    """List methods, tasks, metrics, ablations and embedded transcoders."""

    json: bool = False
    """Print JSON for programs instead of tables."""


def list_command(words: Sequence[str]) -> None:
    """Print what there is to choose from, with descriptions."""
    options = tyro.cli(ListOptions, prog="circuits list", args=words)
    documented: dict[str, Mapping[str, Any]] = {
        "methods": discoverers(),
        "tasks": task_families(),
        "metrics": {name: metric.function for name, metric in METRICS.items()},
    }
    content: dict[str, Any] = {
        title: {name: first_line(each) for name, each in entries.items()}
        for title, entries in documented.items()
    }
    content["ablations"] = list(ABLATIONS)
    content["transcoders that ship with the package"] = list(embedded_transcoders())
    if options.json:
        print_json(content)
        return
    for title, entries in content.items():
        table = Table(title=title, title_justify="left", show_header=False)
        for name in entries:
            table.add_row(name, entries[name] if isinstance(entries, dict) else "")
        Console().print(table)
