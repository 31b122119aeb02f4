"""What does low precision change in a search?

    python experiments/precision.py
    python experiments/precision.py --types bfloat16 --tasks ioi --n 8    # part of it
    python experiments/precision.py --device cuda --n 256                 # with seconds and memory

The first command runs toy-world's six tasks and takes about ten minutes on one core.

Compares plain low precision, mixed precision, and mixed precision with confirmation, by type. Their
decisions are compared with those in float32 on the same prompts. AUC compares the kept edges with
the true edges of the hand-wired models. Where a device has no kernels for a type, as on every CPU,
its rounding is simulated; time and memory are only measured on GPUs.
"""

from __future__ import annotations

import statistics
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import get_args

import pandas as pd
import torch
import tyro
from benchmarks.common import circumstances, most_allocated, paired_times, write_results
from markdown_tables import markdown

import circuits
from circuits.running.precision import Background, TypeName
from circuits.tasks.known_circuits.circuits import known_circuits


@dataclass(frozen=True)
class Config:
    """Model, prompts and settings."""

    model: str = "toy-world"
    """Model name or folder."""
    device: str = "cpu"
    """Device of the model."""
    tasks: str = ",".join(circuits.task_names())
    """Task names, separated by commas."""
    types: str = ",".join(get_args(TypeName))
    """Background types, separated by commas."""
    thresholds: str = "0.003,0.03"
    """Separated by commas."""
    n: int = 16
    """Prompts to search on."""
    repeats: int = 1
    """Timed repetitions of each search, after one warm-up."""
    threads: int = 1
    """torch threads."""
    out: Path = Path("runs/precision")
    """Output folder: rows as JSON, their means as markdown."""


def main(config: Config) -> None:
    torch.set_num_threads(config.threads)
    warnings.filterwarnings("ignore", message=".*simulated")  # the table says it
    model = circuits.load_model(config.model, device=config.device)
    methods = settings(config)
    results = {
        "settings": {name: str(value) for name, value in vars(config).items() if name != "out"},
        **circumstances(config.device),
    }
    results["simulated"] = [
        name
        for name in config.types.split(",")
        if not Background.of(circuits.Precision(name), config.device).kernel
    ]
    rows: list[dict[str, object]] = []
    for name in config.tasks.split(","):
        task = circuits.load_task(name, model, n=config.n, split="train").to(model.cfg.device)
        for threshold in map(float, config.thresholds.split(",")):
            rows += search_rows(model, task, threshold, methods, config)
            write_results(config.out / "rows.json", {**results, "rows": rows})
        print(f"{name} done", flush=True)
    table = summary(pd.DataFrame(rows))
    table["AUC, known circuits"] = [
        known_auc(precision, config.device) for precision in methods.values()
    ]
    print(table.round(5).to_string())
    simulated = ", ".join(results["simulated"]) or "none"
    lines = [
        f"{config.model}, tasks {config.tasks}, {config.n} prompts, thresholds "
        f"{config.thresholds}, on {results['hardware']}.",
        f"Simulated, with nothing to be said of their speed: {simulated}.",
        "",
        markdown(table.rename_axis("precision").reset_index()),
    ]
    (config.out / "means.md").write_text("\n".join(lines))


def settings(config: Config) -> dict[str, circuits.Precision | None]:
    """All settings to compare, by name."""
    methods: dict[str, circuits.Precision | None] = {"float32": None}
    for name in config.types.split(","):
        methods[f"{name}, plain"] = circuits.Precision(name, investigated=name, confirm=False)
        methods[f"{name}, mixed"] = circuits.Precision(name, confirm=False)
        methods[f"{name}, mixed + confirm"] = circuits.Precision(name)
    return methods


def search_rows(
    model: circuits.models.Model,
    task: circuits.Task,
    threshold: float,
    methods: dict[str, circuits.Precision | None],
    config: Config,
) -> list[dict[str, object]]:
    """One task at one threshold: circuits, time and memory for each setting."""
    graph = circuits.component_graph(model)
    searches = {
        name: circuits.ACDC(threshold, precision=precision) for name, precision in methods.items()
    }
    found = {name: search.discover(model, task, graph=graph) for name, search in searches.items()}
    programs = {
        name: lambda search=search: search.discover(model, task, graph=graph)
        for name, search in searches.items()
    }
    on_gpu = torch.device(config.device).type == "cuda"
    seconds = paired_times(programs, config.repeats, config.device) if on_gpu else {}
    rows = []
    for name, circuit in found.items():
        row = {"precision": name, "task": task.name, "threshold": threshold, "edges": len(circuit)}
        row["decisions changed"] = int((circuit.kept != found["float32"].kept).sum())
        if on_gpu:
            row["seconds"] = seconds[name]
            row["peak bytes"] = most_allocated(programs[name], config.device)
        # Judged in float32, whatever it was found in.
        row["kl"] = circuits.evaluate(model, circuit, task, metrics=["kl"]).kl
        rows.append(
            {
                **row,
                **{
                    key: circuit.record.get(key)
                    for key in ("evaluations", "measured", "confirmed", "noise")
                },
            }
        )
    return rows


def known_auc(precision: circuits.Precision | None, device: str) -> float:
    """AUC of kept edges, mean over the hand-wired models and two ablations."""
    areas = []
    for name in known_circuits():
        known = circuits.known_circuit(name, n_prompts=16, device=device)
        graph = circuits.component_graph(known.model, split_embed=True)
        for ablation in ("resample", "zero"):
            method = circuits.ACDC(
                1e-3, metric="squared_error", ablation=ablation, precision=precision
            )
            found = method.discover(known.model, known.task, graph=graph)
            areas.append(circuits.recovery(found, known.minimal[ablation]).edge_auc)
    return statistics.mean(areas)


def summary(rows: pd.DataFrame) -> pd.DataFrame:
    """By precision: sums of decisions, means of everything else."""
    if "seconds" in rows:
        rows = rows.assign(seconds=rows["seconds"].map(statistics.median))
    groups = rows.groupby("precision", sort=False)
    table = groups[
        [name for name in ("seconds", "peak bytes", "edges", "kl", "noise") if name in rows]
    ].mean()
    table.insert(0, "decisions changed", groups["decisions changed"].sum())
    table.insert(
        1,
        "searches changed",
        groups["decisions changed"].agg(lambda changed: int((changed > 0).sum())),
    )
    table["confirmed, share of measured"] = groups["confirmed"].sum() / groups["measured"].sum()
    return table


if __name__ == "__main__":
    main(tyro.cli(Config))
