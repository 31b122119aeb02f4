"""circuits compare."""

from __future__ import annotations

import json
import warnings
from collections.abc import Sequence
from contextlib import redirect_stderr
from dataclasses import MISSING, fields
from io import StringIO
from pathlib import Path
from types import NoneType
from typing import Any, get_args

import pandas as pd
import tyro

from circuits.cli.console import frame_table, print_json, progress_bar, terminal
from circuits.cli.methods import Method, find_method, option_types
from circuits.cli.options import AblationName, TaskOptions, Unprefixed
from circuits.discovery.discoverer import CircuitDiscoverer
from circuits.evaluation.compare import Comparison, compare
from circuits.models import Model
from circuits.plotting.pages import report_page
from circuits.runs.circuit_run import CircuitRun, run
from circuits.runs.run_folder import digest
from circuits.system.errors import InputError, NotWrittenError
from circuits.system.files import write_bytes, write_json
from circuits.system.ranks import is_first
from circuits.tasks.messages import suggestion
from circuits.tasks.task import Task

RANDOM_SEEDS = 5
# By the label of the method in the table.
Sweeps = dict[str, list[CircuitDiscoverer]]
Runs = dict[str, list[CircuitRun]]
Details = dict[str, str]
Texts = Sequence[str]
MODEL_RUNS_IN_WORDS = (
    "forward passes on all prompts; one that computes only some heads and MLPs counts as that "
    "share; backward passes do not count"
)


def command(
    source: Unprefixed[TaskOptions],
    methods: str = "acdc,eap,eap-ig,random",
    n: int = 16,
    n_eval: int = 64,
    thresholds: str = "0.002,0.005,0.01,0.03,0.1",
    size: int | None = None,
    ablation: AblationName = "resample",
    out: Path = Path("runs"),
) -> None:
    """Discover with several methods on the same prompts, and evaluate them on the same others.

    $ circuits compare --task ioi --methods acdc,eap,eap-ig,random
    $ circuits compare --task docstring --methods acdc:threshold=0.02,eap:gradient_at=both --n 32
    $ circuits compare --task two_hop --methods acdc,attribution-graph:transcoders=toy-world-clt

    Args:
        source: The model and the prompts.
        methods: Methods separated by commas, with settings after colons:
            acdc:threshold=0.02:order=original,eap.
        n: Number of prompts to discover on.
        n_eval: Number of held-out prompts to evaluate on.
        thresholds: Thresholds to try for methods that take one and are given none; the table shows
            the first.
        size: Number of edges for methods that only score; by default as many as the first selecting
            method keeps.
        ablation: What ablated edges carry, in methods that have the choice and in the evaluation.
        out: The folder of all runs and of the report.
    """
    model = source.load_model()
    task = source.load_task(model, n, "train")
    # Users' own prompts have no splits.
    held_out = task if source.data else source.load_task(model, n_eval, "test")
    sweeps = _sweeps(methods, _thresholds(thresholds), ablation)
    runs = _run_all(sweeps, model, task, source, out)
    # All ranks search, and the first evaluates.
    if not is_first():
        return
    circuits, folders = {}, []
    for label, sweep in runs.items():
        circuits[label] = [found.circuit for found in sweep]
        folders += [str(found.folder) for found in sweep]
    comparison = compare(model, circuits, held_out, size=size, ablation=ablation)
    _add_costs(comparison.table, runs)
    settings = [folders, held_out.digest(), size, ablation]
    folder = out / task.name / f"compare-{digest(settings, size=4)}"
    report = folder / "report.html"
    details = _details(source, task, held_out, comparison, ablation)
    table = _write_report(report, comparison, details)
    if source.json:
        print_json({"report": str(report), "table": table})
    else:
        _show(comparison, details)
        terminal().print(f"Report: {report}", soft_wrap=True)


def _thresholds(text: str) -> list[str]:
    found = [each.strip() for each in text.split(",")]
    for each in found:
        try:
            float(each)
        except ValueError as error:
            raise InputError(
                f"--thresholds {text!r}: {each!r} is no number; write numbers separated by commas."
            ) from error
    return found


def _sweeps(methods: str, thresholds: Texts, ablation: str) -> Sweeps:
    """What to run for each entry of --methods, by the entry's label in the table."""
    sweeps: Sweeps = {}
    for entry in methods.split(","):
        name, *settings = entry.strip().split(":")
        # FILE.py:NAME is one method, not a file with a setting.
        if name.endswith(".py") and settings and "=" not in settings[0]:
            name = f"{name}:{settings.pop(0)}"
        kind = find_method(name)
        label = ":".join([kind.name, *settings])
        if label in sweeps:
            raise InputError(f"--methods names {label!r} twice; give each entry other settings.")
        variations = _variations(kind, settings, thresholds, ablation)
        sweeps[label] = [_make(kind, [*settings, *more], entry) for more in variations]
    return sweeps


def _variations(kind: Method, settings: Texts, thresholds: Texts, ablation: str) -> list[list[str]]:
    """Further settings of each run: of a sweep of thresholds, several random seeds, or one run."""
    # One draw of random scores says little.
    if kind.name == "random" and not settings:
        return [[f"seed={seed}"] for seed in range(RANDOM_SEEDS)]
    given = [setting.partition("=")[0] for setting in settings]
    names = {field.name for field in fields(kind)}
    free = names.difference(given)
    shared = [f"ablation={ablation}"] if "ablation" in free else []
    if "threshold" not in free:
        return [shared]
    return [[*shared, f"threshold={threshold}"] for threshold in thresholds]


def _make(kind: Method, settings: Texts, entry: str) -> CircuitDiscoverer:
    where = f"--methods {entry!r}"
    types = option_types(kind)
    values = {}
    for setting in settings:
        name, equals, text = setting.partition("=")
        if name not in types:
            known = suggestion(name, types)
            raise InputError(f"{where}: {kind.name} has no setting {name!r}; {known}")
        if not equals:
            raise InputError(f"{where}: {name} has no value; write {name}=VALUE.")
        if name in values:
            raise InputError(f"{where}: {name} is given twice.")
        values[name] = _value(types[name], text, f"{where}: {setting!r}")
    for field in fields(kind):
        is_needed = field.default is field.default_factory is MISSING
        if is_needed and field.name not in values:
            example = f"{kind.name}:{field.name}=VALUE"
            raise InputError(f"{where}: {kind.name} needs {field.name}; write {example}.")
    return kind(**values)


def _value(hint: Any, text: str, where: str) -> Any:
    try:
        # tyro prints some mistakes in any case, and they are to be one line like all others.
        with redirect_stderr(StringIO()):
            return tyro.cli(hint, args=[text], console_outputs=False)
    except SystemExit as error:
        raise InputError(f"{where} has a wrong value; give {_in_words(hint)}.") from error


def _in_words(hint: Any) -> str:
    """A type as a reader sees it: "float", or "clean or corrupted or both"."""
    parts = get_args(hint)
    if parts:
        return " or ".join(map(_in_words, parts))
    if hint is bool:
        return "True or False"
    return "None" if hint is NoneType else getattr(hint, "__name__", str(hint))


def _run_all(sweeps: Sweeps, model: Model, task: Task, source: TaskOptions, out: Path) -> Runs:
    notes = source.notes()
    runs: Runs = {label: [] for label in sweeps}
    for label, sweep in sweeps.items():
        for number, discoverer in enumerate(sweep, 1):
            description = f"{label}, {number} of {len(sweep)}"
            with progress_bar(description, quiet=source.json) as progress:
                found = run(discoverer, model, task, out=out, progress=progress, notes=notes)
            runs[label].append(found)
    return runs


def _add_costs(table: pd.DataFrame, runs: Runs) -> None:
    # The table shows the first run of each sweep.
    first = [runs[label][0] for label in table.index]
    table["model runs"] = [round(found.model_runs) for found in first]
    table["seconds"] = [found.record["seconds"] for found in first]


def _details(
    source: TaskOptions, task: Task, held_out: Task, comparison: Comparison, ablation: str
) -> Details:
    notes = source.notes()
    found_on, evaluated_on = f"{len(task)} prompts", "the same prompts"
    if not source.data:
        found_on += f" of the train split, seed {notes['seed']}"
        evaluated_on = f"{len(held_out)} prompts of the test split"
    details = {
        "model": notes["model"],
        "task": task.name,
        "found on": found_on,
        "evaluated on": evaluated_on,
        "ablation": ablation,
        "random": f"mean of {RANDOM_SEEDS} seeds",
        "model runs": MODEL_RUNS_IN_WORDS,
    }
    if comparison.notes:
        details["note"] = " ".join(comparison.notes)
    return details


def _write_report(report: Path, comparison: Comparison, details: Details) -> Any:
    # By way of pandas, which writes NaN as null.
    table_json = comparison.table.to_json(orient="index")
    table = json.loads(table_json)
    curves_json = comparison.curves.to_json(orient="records")
    curves = json.loads(curves_json)
    content = {"details": details, "table": table, "curves": curves}
    page = report_page(
        title="{task} in {model}".format(**details),
        table=comparison.table,
        curves=comparison.curves,
        circuits=comparison.circuits,
        details=details,
    )
    try:
        write_json(report.with_name("comparison.json"), content, "circuits.comparison", 1)
        write_bytes(report, page.encode())
    except NotWrittenError as error:
        # The table is shown all the same.
        warnings.warn(f"the report is not kept: {error}", stacklevel=2)
    return table


def _show(comparison: Comparison, details: Details) -> None:
    title = (
        "{task} in {model}: found on {found on}, evaluated on {evaluated on}, {ablation} ablation"
    )
    heading = title.format(**details)
    table = comparison.table.drop(columns="of")
    console = terminal()
    console.print(frame_table(table, heading))
    console.print(f"model runs: {MODEL_RUNS_IN_WORDS}")
    console.print(frame_table(comparison.overlap, "Overlap of the circuits (Jaccard)"))
    for note in comparison.notes:
        console.print(note)
