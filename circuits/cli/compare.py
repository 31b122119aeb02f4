"""circuits compare."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import pandas as pd
import tyro
from rich.console import Console

from circuits.cli.console import frame_table, print_json, progress_bar
from circuits.cli.methods import find_method, options_of
from circuits.cli.options import AblationName, TaskOptions, parse
from circuits.discovery.discoverer import CircuitDiscoverer
from circuits.evaluation.compare import Comparison, compare
from circuits.models import Model
from circuits.plotting.pages import report_page
from circuits.runs.circuit_run import CircuitRun, run
from circuits.runs.run_folder import digest
from circuits.system.errors import InputError
from circuits.system.files import write_bytes, write_json
from circuits.system.ranks import is_first
from circuits.tasks.task import Task

RANDOM_SEEDS = 5
MODEL_RUNS_IN_WORDS = (
    "forward passes on all prompts; one that computes only some heads and MLPs counts as that "
    "share; backward passes do not count"
)


@dataclass(frozen=True)
class CompareOptions(TaskOptions):
    """Discover with several methods on the same prompts, and evaluate them on the same others.

    circuits compare --task ioi --methods acdc,eap,eap-ig,random
    circuits compare --task docstring --methods acdc:threshold=0.02,eap:gradient_at=both --n 32
    circuits compare --task two_hop --methods acdc,attribution-graph:transcoders=toy-world-clt
    """

    methods: str = "acdc,eap,eap-ig,random"
    """Methods separated by commas, with settings after colons:
    acdc:threshold=0.02:order=original,eap."""
    n: int = 16
    """Number of prompts to discover on."""
    n_eval: int = 64
    """Number of held-out prompts to evaluate on."""
    thresholds: str = "0.002,0.005,0.01,0.03,0.1"
    """Thresholds to try for methods that take one and are given none; the table shows the first."""
    size: int | None = None
    """Number of edges for methods that only score; by default as many as the first selecting method
    keeps."""
    ablation: AblationName = "resample"
    """What ablated edges carry, in methods that have the choice and in the evaluation."""
    out: Path = Path("runs")
    """The folder of all runs and of the report."""


def compare_command(words: Sequence[str]) -> None:
    """Run several methods on one task, print a table and write a report."""
    options: CompareOptions = parse(CompareOptions, "compare", words)
    model = options.load_model()
    task = options.load_task(model, options.n, "train")
    held_out = task if options.data else options.load_task(model, options.n_eval, "test")
    runs = _run_all(_sweeps(options), model, task, options)
    if not is_first():
        return
    found = {label: [one.circuit for one in sweep] for label, sweep in runs.items()}
    comparison = compare(model, found, held_out, size=options.size, ablation=options.ablation)
    table = _with_costs(comparison.table, runs)
    folder = options.out / task.name / f"compare-{_digest(options, runs, held_out)}"
    details = _details(options, task, held_out, comparison)
    report = _write_report(folder, comparison, table, details)
    if options.json:
        print_json({"report": str(report), "table": _as_json(table, "index")})
    else:
        _show(comparison, table, details, report)


def _sweeps(options: CompareOptions) -> dict[str, list[CircuitDiscoverer]]:
    """What to run for each entry of --methods, by the entry's label in the table."""
    sweeps: dict[str, list[CircuitDiscoverer]] = {}
    for entry in options.methods.split(","):
        name, *settings = entry.strip().split(":")
        # FILE.py:NAME is one method, not a file with a setting.
        if name.endswith(".py") and settings and "=" not in settings[0]:
            name = f"{name}:{settings.pop(0)}"
        kind = find_method(name)
        label = ":".join([kind.name, *settings])
        if label in sweeps:
            raise InputError(f"--methods names {label!r} twice; give each entry other settings.")
        sweeps[label] = [
            _make(kind, [*settings, *varied], entry)
            for varied in _variations(kind, settings, options)
        ]
    return sweeps


def _variations(
    kind: type[CircuitDiscoverer], settings: Sequence[str], options: CompareOptions
) -> list[list[str]]:
    """Further settings of each run: of a sweep of thresholds, several random seeds, or one run."""
    if kind.name == "random" and not settings:
        return [[f"seed={seed}"] for seed in range(RANDOM_SEEDS)]
    names = {field.name for field in dataclasses.fields(kind)}
    names -= {setting.partition("=")[0] for setting in settings}
    ablation = [f"ablation={options.ablation}"] if "ablation" in names else []
    if "threshold" not in names:
        return [ablation]
    return [[*ablation, f"threshold={value}"] for value in options.thresholds.split(",")]


def _make(kind: type[CircuitDiscoverer], settings: Sequence[str], entry: str) -> CircuitDiscoverer:
    words = [f"--{setting}" for setting in settings]
    try:
        # Silent, so that a mistake is one line like all others.
        options: Any = tyro.cli(options_of(kind), args=words, console_outputs=False)
    except SystemExit as error:
        names = []
        for field in dataclasses.fields(kind):
            is_needed = field.default is field.default_factory is dataclasses.MISSING
            names.append(f"{field.name} (needed)" if is_needed else field.name)
        raise InputError(
            f"--methods {entry!r} cannot be used; the settings of {kind.name} are "
            f"{', '.join(names)}, written like {kind.name}:threshold=0.01."
        ) from error
    return kind(**vars(options))


def _run_all(
    sweeps: Mapping[str, Sequence[CircuitDiscoverer]],
    model: Model,
    task: Task,
    options: CompareOptions,
) -> dict[str, list[CircuitRun]]:
    runs: dict[str, list[CircuitRun]] = {label: [] for label in sweeps}
    for label, sweep in sweeps.items():
        for number, discoverer in enumerate(sweep, 1):
            description = f"{label}, {number} of {len(sweep)}"
            with progress_bar(description, quiet=options.json) as progress:
                found = run(
                    discoverer,
                    model,
                    task,
                    out=options.out,
                    progress=progress,
                    notes=options.notes(),
                )
            runs[label].append(found)
    return runs


def _with_costs(table: pd.DataFrame, runs: Mapping[str, Sequence[CircuitRun]]) -> pd.DataFrame:
    # The table shows the first run of each sweep.
    first = [runs[label][0] for label in table.index]
    costs = {
        "model runs": [round(found.model_runs) for found in first],
        "seconds": [found.record["seconds"] for found in first],
    }
    return table.assign(**costs)


def _digest(
    options: CompareOptions, runs: Mapping[str, Sequence[CircuitRun]], held_out: Task
) -> str:
    folders = [str(found.folder) for sweep in runs.values() for found in sweep]
    return digest([folders, held_out.digest(), options.size, options.ablation], size=4)


def _details(
    options: CompareOptions, task: Task, held_out: Task, comparison: Comparison
) -> dict[str, str]:
    found_on, evaluated_on = f"{len(task)} prompts", "the same prompts"
    if not options.data:
        found_on += f" of the train split, seed {options.notes()['seed']}"
        evaluated_on = f"{len(held_out)} prompts of the test split"
    details = {
        "model": options.notes()["model"],
        "task": task.name,
        "found on": found_on,
        "evaluated on": evaluated_on,
        "ablation": options.ablation,
        "random": f"mean of {RANDOM_SEEDS} seeds",
        "model runs": MODEL_RUNS_IN_WORDS,
    }
    return details | ({"note": " ".join(comparison.notes)} if comparison.notes else {})


def _write_report(
    folder: Path, comparison: Comparison, table: pd.DataFrame, details: dict[str, Any]
) -> Path:
    content = {
        "details": details,
        "table": _as_json(table, "index"),
        "curves": _as_json(comparison.curves, "records"),
    }
    write_json(folder / "comparison.json", content, "circuits.comparison", 1)
    page = report_page(
        title=f"{details['task']} in {details['model']}",
        table=table,
        curves=comparison.curves,
        circuits=comparison.circuits,
        details=details,
    )
    return write_bytes(folder / "report.html", page.encode())


def _as_json(frame: pd.DataFrame, orient: Literal["index", "records"]) -> Any:
    # By way of pandas, which writes NaN as null.
    return json.loads(frame.to_json(orient=orient))


def _show(
    comparison: Comparison, table: pd.DataFrame, details: Mapping[str, str], report: Path
) -> None:
    title = (
        f"{details['task']} in {details['model']}: found on {details['found on']}, evaluated on "
        f"{details['evaluated on']}, {details['ablation']} ablation"
    )
    console = Console()
    console.print(frame_table(table.drop(columns="of"), title))
    console.print(f"model runs: {MODEL_RUNS_IN_WORDS}")
    console.print(frame_table(comparison.overlap, "Overlap of the circuits (Jaccard)"))
    for note in comparison.notes:
        console.print(note)
    console.print(f"Report: {report}", soft_wrap=True)
