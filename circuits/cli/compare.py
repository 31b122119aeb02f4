"""circuits compare."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
from rich.console import Console

from circuits.cli.console import frame_table, print_json, progress_bar
from circuits.cli.methods import find_method, options_of
from circuits.cli.options import AblationName, Common, chosen_model, chosen_task, notes, parse
from circuits.discovery.discoverer import CircuitDiscoverer
from circuits.evaluation.compare import Comparison
from circuits.evaluation.compare import compare as compare_circuits
from circuits.plotting.pages import report_page
from circuits.runs.circuit_run import CircuitRun, run
from circuits.system.errors import InputError
from circuits.system.files import write_bytes, write_json
from circuits.system.ranks import is_first
from circuits.tasks.task import Task

RANDOM_SEEDS = 5
MODEL_RUNS_IN_WORDS = "forward passes on all prompts; of one that computes only some heads and MLPs, that share; backward passes do not count"


@dataclass(frozen=True)
class CompareOptions(Common):
    """Discover with several methods on the same prompts and judge them on the same held-out ones.

    circuits compare --task ioi --methods acdc,eap,eap-ig,random
    circuits compare --task docstring --methods acdc:threshold=0.02,eap:gradient_at=both --n 32
    circuits compare --task two_hop --methods acdc,attribution-graph:transcoders=toy-world-clt
    """

    methods: str = "acdc,eap,eap-ig,random"
    """Methods separated by commas, with settings after colons:
    acdc:threshold=0.02:order=original,eap.
    """
    n: int = 16
    """Prompts to discover on."""
    n_eval: int = 64
    """Held-out prompts to evaluate on."""
    thresholds: str = "0.002,0.005,0.01,0.03,0.1"
    """Sweep of methods that take a threshold and are given none; the table shows the first."""
    size: int | None = None
    """Edges to give methods that only score; by default as many as the first selecting method
    keeps.
    """
    ablation: AblationName = "resample"
    """What ablated edges carry, in methods that have the choice and in judging them."""
    out: Path = Path("runs")
    """The folder of all runs, the report's among them."""


def compare(words: Sequence[str]) -> None:
    """Several methods on one task: a table, and a report.

    Raises:
        InputError: something given cannot be used.
    """
    options: CompareOptions = parse(CompareOptions, "compare", words)
    model = chosen_model(options)
    task = chosen_task(options, model, options.n, "train")
    held_out = task if options.data else chosen_task(options, model, options.n_eval, "test")
    sweeps: dict[str, list[CircuitDiscoverer]] = {}
    for spec in options.methods.split(","):
        label, sweep = _sweep(spec.strip(), options)
        if label in sweeps:
            raise InputError(
                f"--methods names {label!r} twice; give each entry settings of its own."
            )
        sweeps[label] = sweep
    runs: dict[str, list[CircuitRun]] = {}
    for label, sweep in sweeps.items():
        runs[label] = []
        for discoverer in sweep:
            with progress_bar(_label(discoverer), quiet=options.json) as progress:
                runs[label].append(
                    run(
                        discoverer,
                        model,
                        task,
                        out=options.out,
                        progress=progress,
                        notes=notes(options),
                    )
                )
    if not is_first():
        return
    found = {label: [finished.circuit for finished in several] for label, several in runs.items()}
    comparison = compare_circuits(
        model, found, held_out, size=options.size, ablation=options.ablation
    )
    seconds = {label: float(several[0].record["seconds"]) for label, several in runs.items()}
    model_runs = {label: round(several[0].model_runs) for label, several in runs.items()}
    table = comparison.table.assign(
        **{"model runs": pd.Series(model_runs), "seconds": pd.Series(seconds)}
    )
    folder = options.out / task.name / f"compare-{_comparison_digest(options, runs, held_out)}"
    report = _write_report(folder, comparison, table, options, task, held_out)
    if options.json:
        print_json({"report": str(report), "table": json.loads(table.to_json(orient="index"))})
        return
    console = Console()
    console.print(frame_table(table.drop(columns="of"), _title(options, task, held_out)))
    console.print(f"model runs: {MODEL_RUNS_IN_WORDS}")
    console.print(frame_table(comparison.overlap, "Overlap of the circuits (Jaccard)"))
    for note in comparison.notes:
        console.print(note)
    console.print(f"Report: {report}", soft_wrap=True)


def _title(options: CompareOptions, task: Task, held_out: Task) -> str:
    judged = "judged on the same" if options.data else f"judged on {len(held_out)} others"
    return f"{task.name} in {notes(options)['model']}: found on {len(task)} prompts, {judged}, {options.ablation} ablation"


def _sweep(spec: str, options: CompareOptions) -> tuple[str, list[CircuitDiscoverer]]:
    """The discoverers that one entry of --methods means: a sweep of thresholds, several seeds, or
    one.
    """
    name, *settings = spec.split(":")
    if settings and "=" not in settings[0] and name.endswith(".py"):
        name = f"{name}:{settings.pop(0)}"
    kind = find_method(name)
    fields = {field.name: field for field in dataclasses.fields(kind)}
    given = {}
    for setting in settings:
        key, equals, value = setting.partition("=")
        if not equals or key not in fields:
            raise InputError(
                f"--methods {spec!r}: {setting!r} is no setting of {kind.name}; it has "
                f"{', '.join(fields)}, written threshold=0.01."
            )
        given[key] = value
    needed = [
        name
        for name, field in fields.items()
        if field.default is field.default_factory is dataclasses.MISSING and name != "threshold"
    ]
    if missing := [name for name in needed if name not in given]:
        raise InputError(
            f"--methods {spec!r}: {kind.name} needs {missing[0]}; write "
            f"{kind.name}:{missing[0]}=..., with what it is."
        )
    label = ":".join([kind.name, *settings])
    if "ablation" in fields:
        given.setdefault("ablation", options.ablation)
    words = [word for key, value in given.items() for word in (f"--{key.replace('_', '-')}", value)]
    if "threshold" in fields and "threshold" not in given:
        return label, [
            _make(kind, [*words, "--threshold", threshold])
            for threshold in options.thresholds.split(",")
        ]
    if kind.name == "random" and not given:
        return label, [_make(kind, ["--seed", str(seed)]) for seed in range(RANDOM_SEEDS)]
    return label, [_make(kind, words)]


def _make(kind: type[CircuitDiscoverer], words: Sequence[str]) -> CircuitDiscoverer:
    return kind(
        **dataclasses.asdict(parse(options_of(kind), f"compare (settings of {kind.name})", words))
    )


def _label(discoverer: CircuitDiscoverer) -> str:
    varied = [
        f"{name}={getattr(discoverer, name)}"
        for name in ("threshold", "seed")
        if hasattr(discoverer, name)
    ]
    return " ".join([discoverer.name, *varied])


def _comparison_digest(
    options: CompareOptions, runs: Mapping[str, Sequence[CircuitRun]], held_out: Task
) -> str:
    parts = [
        [str(found.folder) for several in runs.values() for found in several],
        held_out.digest(),
        options.size,
        options.ablation,
    ]
    return hashlib.blake2b(json.dumps(parts).encode(), digest_size=4).hexdigest()


def _write_report(
    folder: Path,
    comparison: Comparison,
    table: pd.DataFrame,
    options: CompareOptions,
    task: Task,
    held_out: Task,
) -> Path:
    details = {
        "model": notes(options)["model"],
        "task": task.name,
        "found on": f"{len(task)} prompts"
        if options.data
        else f"{len(task)} prompts of the train split, seed {notes(options)['seed']}",
        "judged on": "the same prompts"
        if options.data
        else f"{len(held_out)} prompts of the test split",
        "ablation": options.ablation,
        "random": f"mean of {RANDOM_SEEDS} seeds",
        "model runs": MODEL_RUNS_IN_WORDS,
        **({"note": " ".join(comparison.notes)} if comparison.notes else {}),
    }
    content = {
        "details": details,
        "table": json.loads(table.to_json(orient="index")),
        "curves": json.loads(comparison.curves.to_json(orient="records")),
    }
    write_json(folder / "comparison.json", content, "circuits.comparison", 1)
    page = report_page(
        title=f"{task.name} in {notes(options)['model']}",
        table=table,
        curves=comparison.curves,
        circuits=comparison.circuits,
        details=details,
    )
    return write_bytes(folder / "report.html", page.encode())
