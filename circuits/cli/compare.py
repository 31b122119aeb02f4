"""circuits compare."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from typing import Any

import tyro
from rich.console import Console

from circuits.cli.console import frame_table, print_json, progress_bar
from circuits.cli.methods import find_method, options_of
from circuits.cli.options import AblationName, TaskOptions
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
REPORT = "report.html"
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
    options = tyro.cli(CompareOptions, prog="circuits compare", args=words)
    model = options.load_model()
    task = options.load_task(model, options.n, "train")
    held_out = task if options.data else options.load_task(model, options.n_eval, "test")
    runs = {}
    for label, sweep in _sweeps(options).items():
        runs[label] = [*_run_sweep(label, sweep, model, task, options)]
    if not is_first():
        return
    found = {label: [one.circuit for one in sweep] for label, sweep in runs.items()}
    comparison = compare(model, found, held_out, size=options.size, ablation=options.ablation)
    # The table shows the first run of each sweep.
    shown = [runs[label][0] for label in comparison.table.index]
    comparison.table["model runs"] = [round(one.model_runs) for one in shown]
    comparison.table["seconds"] = [one.record["seconds"] for one in shown]
    folders = [str(one.folder) for sweep in runs.values() for one in sweep]
    key = digest([folders, held_out.digest(), options.size, options.ablation], size=4)
    folder = options.out / task.name / f"compare-{key}"
    details = _details(options, task, held_out, comparison)
    content = _write_report(folder, comparison, details)
    if options.json:
        print_json({"report": str(folder / REPORT), "table": content["table"]})
    else:
        _show(comparison, details)
        Console().print(f"Report: {folder / REPORT}", soft_wrap=True)


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
    given = [setting.partition("=")[0] for setting in settings]
    free = {field.name for field in fields(kind)}.difference(given)
    ablation = [f"ablation={options.ablation}"] if "ablation" in free else []
    if "threshold" not in free:
        return [ablation]
    return [[*ablation, f"threshold={value}"] for value in options.thresholds.split(",")]


def _make(kind: type[CircuitDiscoverer], settings: Sequence[str], entry: str) -> CircuitDiscoverer:
    words = [f"--{setting}" for setting in settings]
    try:
        # Silent, so that a mistake is one line like all others.
        options = tyro.cli(options_of(kind), args=words, console_outputs=False)
    except SystemExit as error:
        names = []
        for field in fields(kind):
            is_needed = field.default is field.default_factory is MISSING
            names.append(f"{field.name} (needed)" if is_needed else field.name)
        raise InputError(
            f"--methods {entry!r} cannot be used; the settings of {kind.name} are "
            f"{', '.join(names)}, written like {kind.name}:threshold=0.01."
        ) from error
    return kind(**vars(options))


def _run_sweep(
    label: str,
    sweep: Sequence[CircuitDiscoverer],
    model: Model,
    task: Task,
    options: CompareOptions,
) -> Iterator[CircuitRun]:
    out, notes = options.out, options.notes()
    for number, discoverer in enumerate(sweep, 1):
        description = f"{label}, {number} of {len(sweep)}"
        with progress_bar(description, quiet=options.json) as progress:
            yield run(discoverer, model, task, out=out, progress=progress, notes=notes)


def _details(
    options: CompareOptions, task: Task, held_out: Task, comparison: Comparison
) -> dict[str, str]:
    notes = options.notes()
    found_on, evaluated_on = f"{len(task)} prompts", "the same prompts"
    if not options.data:
        found_on += f" of the train split, seed {notes['seed']}"
        evaluated_on = f"{len(held_out)} prompts of the test split"
    details = {
        "model": notes["model"],
        "task": task.name,
        "found on": found_on,
        "evaluated on": evaluated_on,
        "ablation": options.ablation,
        "random": f"mean of {RANDOM_SEEDS} seeds",
        "model runs": MODEL_RUNS_IN_WORDS,
    }
    if comparison.notes:
        details["note"] = " ".join(comparison.notes)
    return details


def _write_report(
    folder: Path, comparison: Comparison, details: Mapping[str, str]
) -> dict[str, Any]:
    table, curves = comparison.table, comparison.curves
    # By way of pandas, which writes NaN as null.
    content = {
        "details": details,
        "table": json.loads(table.to_json(orient="index")),
        "curves": json.loads(curves.to_json(orient="records")),
    }
    write_json(folder / "comparison.json", content, "circuits.comparison", 1)
    page = report_page(
        title="{task} in {model}".format(**details),
        table=table,
        curves=curves,
        circuits=comparison.circuits,
        details=details,
    )
    write_bytes(folder / REPORT, page.encode())
    return content


def _show(comparison: Comparison, details: Mapping[str, str]) -> None:
    title = (
        "{task} in {model}: found on {found on}, evaluated on {evaluated on}, {ablation} ablation"
    )
    console = Console()
    table = comparison.table.drop(columns="of")
    console.print(frame_table(table, title.format(**details)))
    console.print(f"model runs: {MODEL_RUNS_IN_WORDS}")
    console.print(frame_table(comparison.overlap, "Overlap of the circuits (Jaccard)"))
    for note in comparison.notes:
        console.print(note)
