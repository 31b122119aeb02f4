"""circuits compare."""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd

from circuits.cli.console import frame_table, print_json, terminal
from circuits.cli.evaluate import check_size
from circuits.cli.inputs import held_out_of, model_of, notes_of, task_to_search
from circuits.cli.notes import notes_on, notes_on_sweep
from circuits.cli.parsing.methods import find_method
from circuits.cli.parsing.options import CompareOptions
from circuits.cli.parsing.sweeps import RANDOM_SEEDS, MethodSettings
from circuits.cli.progress import phase, progress_bar
from circuits.discovery.discoverer import CircuitDiscoverer
from circuits.evaluation.compare import Comparison, compare
from circuits.models import Model
from circuits.plotting.pages import report_page
from circuits.runs.circuit_run import CircuitRun, run
from circuits.system.errors import NotWrittenError
from circuits.system.files import write_bytes, write_json
from circuits.system.ranks import is_first
from circuits.system.tensors import digest
from circuits.tasks.task import Task

# By the label of the method in the table.
Sweeps = dict[str, list[CircuitDiscoverer]]
Runs = dict[str, list[CircuitRun]]
Details = dict[str, str]
MODEL_RUNS_IN_WORDS = (
    "forward passes on all prompts; one that computes only some heads and MLPs counts as that "
    "share; backward passes do not count"
)


def command(options: CompareOptions, planned: Mapping[str, Sequence[MethodSettings]]) -> None:
    """Discover with several methods, and evaluate and show them side by side."""
    sweeps: Sweeps = {}
    for label, plan in planned.items():
        sweeps[label] = [find_method(name)(**settings) for name, settings in plan]
    model = model_of(options)
    task = task_to_search(options, model)
    held_out = held_out_of(options, model, task)
    runs = _run_all(sweeps, model, task, options)
    # All ranks search, and the first evaluates.
    if not is_first():
        return
    comparison = _compared(runs, model, held_out, options)
    folders = [str(found.folder) for sweep in runs.values() for found in sweep]
    settings = [folders, held_out.digest(), options.size, options.ablation]
    folder = options.out / task.name / f"compare-{digest(settings, size=4)}"
    report = folder / "report.html"
    details = _details(options, task, held_out, comparison)
    tables = _write_report(report, comparison, details)
    if options.json:
        print_json({"report": str(report), **tables, "notes": list(comparison.notes)})
    else:
        _show(comparison, details)
        terminal().print(f"Report: {report}", soft_wrap=True)


def _run_all(sweeps: Sweeps, model: Model, task: Task, options: CompareOptions) -> Runs:
    notes, out = notes_of(options), options.out
    runs: Runs = {}
    for label, sweep in sweeps.items():
        runs[label] = []
        for number, discoverer in enumerate(sweep, 1):
            description = f"{label}, {number} of {len(sweep)}"
            with progress_bar(description, quiet=options.json) as progress:
                found = run(discoverer, model, task, out=out, progress=progress, notes=notes)
            runs[label].append(found)
    return runs


def _compared(runs: Runs, model: Model, held_out: Task, options: CompareOptions) -> Comparison:
    """The circuits side by side, with what they cost to find and notes on their thresholds."""
    size, ablation = options.size, options.ablation
    circuits = {}
    for label, sweep in runs.items():
        circuits[label] = [found.circuit for found in sweep]
        for found in sweep:
            if not found.circuit.selected:
                check_size(found, size)
    with phase(f"evaluating on {len(held_out)} prompts", quiet=options.json):
        comparison = compare(model, circuits, held_out, size=size, ablation=ablation)
    # The table shows the first run of each sweep.
    table = comparison.table
    first = [runs[label][0] for label in table.index]
    table["model runs"] = [round(found.model_runs) for found in first]
    table["seconds"] = [found.record["seconds"] for found in first]
    # There is nothing to find of the whole model and the empty circuit.
    reference = comparison.reference.assign(**{"model runs": 0, "seconds": 0.0})
    notes = [*comparison.notes]
    for label, sweep in runs.items():
        notes += [f"{label}: {text}" for text in notes_on(sweep[0])]
        notes += notes_on_sweep(label, sweep)
    return replace(comparison, reference=reference, notes=tuple(notes))


def _details(
    options: CompareOptions, task: Task, held_out: Task, comparison: Comparison
) -> Details:
    notes = notes_of(options)
    found_on, evaluated_on = f"{len(task)} prompts", "the same prompts"
    if not options.data:
        found_on += f" of the train split, seed {notes['seed']}"
        evaluated_on = f"{len(held_out)} prompts of the test split"
    details = {
        "model": notes["model"],
        "task": task.name if options.data else notes["task"],
        "found on": found_on,
        "evaluated on": evaluated_on,
        "ablation": options.ablation,
        "random": f"mean of {RANDOM_SEEDS} seeds",
        "model runs": MODEL_RUNS_IN_WORDS,
    }
    if comparison.notes:
        details["note"] = " ".join(comparison.notes)
    return details


def _write_report(report: Path, comparison: Comparison, details: Details) -> dict[str, Any]:
    """Write the report and its numbers; return the tables as JSON values."""
    # By way of pandas, which writes NaN as null.
    table = comparison.table.to_json(orient="index")
    reference = comparison.reference.to_json(orient="index")
    curves = comparison.curves.to_json(orient="records")
    tables = {"table": json.loads(table), "reference": json.loads(reference)}
    page = report_page(
        title="{task} in {model}".format(**details),
        table=_with_reference(comparison),
        curves=comparison.curves,
        circuits=comparison.circuits,
        details=details,
    )
    try:
        whole = {"details": details, **tables, "curves": json.loads(curves)}
        write_json(report.with_name("comparison.json"), whole, "circuits.comparison", 1)
        write_bytes(report, page.encode())
    except NotWrittenError as error:
        # The table is shown all the same.
        warnings.warn(f"the report is not kept: {error}", stacklevel=2)
    return tables


def _with_reference(comparison: Comparison) -> pd.DataFrame:
    return pd.concat([comparison.table, comparison.reference])


def _show(comparison: Comparison, details: Details) -> None:
    title = (
        "{task} in {model}: found on {found on}, evaluated on {evaluated on}, {ablation} ablation"
    )
    heading = title.format(**details)
    table = _with_reference(comparison).drop(columns="of")
    console = terminal()
    console.print(frame_table(table, heading))
    console.print(f"model runs: {MODEL_RUNS_IN_WORDS}")
    console.print(frame_table(comparison.overlap, "Overlap of the circuits (Jaccard)"))
    for note in comparison.notes:
        console.print(note)
