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
    """List methods, tasks, metrics, ablations and embedded transcoders."""

    json: bool = False
    """Print JSON for programs instead of tables."""


def list_command(words: Sequence[str]) -> None:
    """Print what there is to choose from, with descriptions."""
    options: ListOptions = parse(ListOptions, "list", words)
    metrics = {name: metric.function for name, metric in METRICS.items()}
    content: dict[str, Any] = {
        "methods": _descriptions(discoverers()),
        "tasks": _descriptions(task_families()),
        "metrics": _descriptions(metrics),
        "ablations": list(ABLATIONS),
        "transcoders that ship with the package": list(embedded_transcoders()),
    }
    if options.json:
        print_json(content)
        return
    for title, entries in content.items():
        table = Table(title=title, title_justify="left", show_header=False)
        described = entries if isinstance(entries, dict) else dict.fromkeys(entries, "")
        for name, description in described.items():
            table.add_row(name, description)
        Console().print(table)


def _descriptions(documented: dict[str, Any]) -> dict[str, str]:
    return {name: first_line(each) for name, each in documented.items()}
