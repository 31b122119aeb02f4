"""circuits list."""

from __future__ import annotations

import json
from collections.abc import Mapping
from inspect import getdoc
from typing import Any

from rich.table import Table

from circuits.cli.console import frame_table, print_json, terminal
from circuits.cli.inputs import model_of
from circuits.cli.parsing.options import ListOptions
from circuits.cli.progress import note, phase
from circuits.discovery.registry import discoverers
from circuits.evaluation.performance import performance
from circuits.running.ablation import NAMES as ABLATIONS
from circuits.tasks.families import task_families, task_forms
from circuits.tasks.metrics import METRICS
from circuits.transcoders.io.load import embedded_transcoders


def command(options: ListOptions) -> None:
    """List what there is; of a model, how well it does every task."""
    if options.model is not None:
        _list_tasks(options)
        return
    content = {
        "methods": _described(discoverers()),
        "tasks": dict.fromkeys(task_forms(), "") | _described(task_families()),
        "metrics": _described({name: METRICS[name].function for name in METRICS}),
        "ablations": ABLATIONS,
        "transcoders that ship with the package": embedded_transcoders(),
    }
    if options.json:
        print_json(content)
        return
    for title, names in content.items():
        _print_table(title, names)


def _list_tasks(options: ListOptions) -> None:
    model = model_of(options)
    with phase(f"running {options.model} on every task", quiet=options.json):
        table = performance(model, n=options.n)
    if options.json:
        # By way of pandas, which writes NaN as null.
        content = table.to_json(orient="index")
        print_json(json.loads(content))
        return
    notes = filter(None, table.pop("note"))
    terminal().print(frame_table(table, f"{options.n} prompts of each task"))
    for text in notes:
        note(text)


def _print_table(title: str, names: Any) -> None:
    table = Table(title=title, title_justify="left", show_header=False)
    # Ablations and transcoders have no descriptions here.
    described = names if isinstance(names, dict) else dict.fromkeys(names, "")
    for name, description in described.items():
        table.add_row(name, description)
    terminal().print(table)


def _described(documented: Mapping[str, Any]) -> dict[str, str]:
    """The first line of each docstring."""
    first_lines = {}
    for name, each in documented.items():
        first_lines[name], *_ = (getdoc(each) or "").partition("\n")
    return first_lines
