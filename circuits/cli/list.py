"""circuits list."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from rich.console import Console
from rich.table import Table

from circuits.cli.console import print_json
from circuits.cli.methods import first_line
from circuits.cli.options import parse
from circuits.discovery.registry import discoverers
from circuits.running.ablation import NAMES as ABLATIONS
from circuits.tasks.metrics import METRICS
from circuits.tasks.registry import task_families
from circuits.transcoders.io.load import embedded_transcoders


@dataclass(frozen=True)
class ListOptions:
    """What there is to choose from."""

    json: bool = False
    """Print JSON for programs instead of tables."""


def list_choices(words: Sequence[str]) -> None:
    """Methods, tasks, metrics, ablations and embedded transcoders, with what they are."""
    options: ListOptions = parse(ListOptions, "list", words)
    methods = {name: first_line(kind) for name, kind in discoverers().items()}
    content: dict[str, Any] = {
        "methods": methods,
        "tasks": {name: first_line(kind) for name, kind in task_families().items()},
        "metrics": {
            name: (metric.function.__doc__ or "").strip() for name, metric in METRICS.items()
        },
        "ablations": list(ABLATIONS),
        "transcoders that ship with the package": list(embedded_transcoders()),
    }
    if options.json:
        print_json(content)
        return
    console = Console()
    for title, entries in content.items():
        table = Table(title=title, title_justify="left", show_header=False)
        described = entries if isinstance(entries, dict) else dict.fromkeys(entries, "")
        for name, description in described.items():
            table.add_row(name, description)
        console.print(table)
