"""circuits evaluate."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import tyro
from rich.console import Console

from circuits.cli.console import frame_table, print_json
from circuits.cli.options import AblationName, TaskOptions
from circuits.running.ablation import NAMES as ABLATIONS
from circuits.runs.circuit_run import CircuitRun, evaluate_run, load_run
from circuits.system.errors import InputError


@dataclass(frozen=True)
class EvaluateOptions(TaskOptions):
    """Run a saved circuit on held-out prompts, with everything outside it ablated.

    Model, task and seed are by default those of the run.

    circuits evaluate runs/ioi/acdc-1a2b3c4d --n 64
    circuits evaluate runs/ioi/eap-ig-1a2b3c4d --size 50 --metrics kl,accuracy
    """

    circuit: tyro.conf.Positional[Path] = dataclasses.field(kw_only=True)
    """A run folder."""
    n: int = 64
    """Number of held-out prompts."""
    size: int | None = None
    """Number of highest-scored edges to keep; by default the circuit as it is."""
    metrics: str | None = None
    """Metrics separated by commas; by default kl, logit_difference and the task's own."""
    ablation: AblationName | None = None
    """What edges outside the circuit carry; by default what they carried in the search."""


def evaluate_command(words: Sequence[str]) -> None:
    """Evaluate the circuit of a run folder on held-out prompts."""
    options = tyro.cli(EvaluateOptions, prog="circuits evaluate", args=words)
    found = load_run(options.circuit)
    if not found.circuit.selected and options.size is None:
        raise InputError(size_needed(found))
    options = _with_defaults_of_run(options, found.record.get("notes", {}))
    model = options.load_model()
    task = options.load_task(model, options.n, "test")
    metrics = options.metrics.split(",") if options.metrics else None
    ablation = options.ablation or _ablation_of_run(found)
    evaluation = evaluate_run(
        found, model, task, metrics=metrics, ablation=ablation, size=options.size
    )
    show_evaluation(found, evaluation, options)


def size_needed(found: CircuitRun) -> str:
    """What to say of a run that chose no edges."""
    return (
        f"{found.record['method']} scores every edge and chooses none: "
        "give --size N to evaluate the N highest-scored ones."
    )


def show_evaluation(found: CircuitRun, evaluation: Mapping[str, Any], options: TaskOptions) -> None:
    """Print an evaluation as a table, or as JSON."""
    if options.json:
        print_json({"folder": str(found.folder), "reused": found.reused, **evaluation})
        return
    edges = f"{evaluation['edges']:,} of {len(found.circuit.graph):,} edges"
    prompts = f"{evaluation['n_prompts']} prompts of {evaluation['task']}"
    if options.data:
        prompts += ", those it was found on"
    title = f"{found.record['method']}: {edges}, {prompts}, {evaluation['ablation']} ablation"
    frame = pd.DataFrame.from_dict(evaluation["values"], orient="index")
    console = Console()
    console.print(frame_table(frame.rename_axis("metric"), title))
    console.print(f"Run folder: {found.folder}", soft_wrap=True)


def _with_defaults_of_run(options: EvaluateOptions, notes: Mapping[str, Any]) -> EvaluateOptions:
    model = options.model or notes.get("model")
    seed = notes.get("seed") if options.seed is None else options.seed
    options = dataclasses.replace(options, model=model, seed=seed)
    if options.task or options.data:
        return options
    if notes.get("data"):
        return dataclasses.replace(options, data=Path(notes["data"]))
    return dataclasses.replace(options, task=notes.get("task"))


def _ablation_of_run(found: CircuitRun) -> str:
    ablation = found.record["settings"].get("ablation", "resample")
    if ablation not in ABLATIONS:
        raise InputError(
            f"{found.folder} was found under the ablation {ablation!r}; "
            f"choose one with --ablation: {', '.join(ABLATIONS)}."
        )
    return ablation
