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
from circuits.cli.options import AblationName, Common, chosen_model, chosen_task, parse
from circuits.running.ablation import NAMES as ABLATIONS
from circuits.runs.circuit_run import CircuitRun, evaluate_run, load_run
from circuits.system.errors import InputError


@dataclass(frozen=True)
class EvaluateOptions(Common):
    """Run a saved circuit on held-out prompts, everything outside it ablated. Model, task and seed
    are the run's unless given.

    circuits evaluate runs/ioi/acdc-1a2b3c4d --n 64
    circuits evaluate runs/ioi/eap-ig-1a2b3c4d --size 50 --metrics kl,accuracy
    """

    circuit: tyro.conf.Positional[Path] = dataclasses.field(kw_only=True)
    """A run folder."""
    n: int = 64
    """Held-out prompts."""
    size: int | None = None
    """How many of the highest-scored edges to keep; by default the circuit as it is."""
    metrics: str | None = None
    """Metrics separated by commas; by default kl, logit_difference and the task's own."""
    ablation: AblationName | None = None
    """What edges outside the circuit carry; by default what they carried when it was found."""


def evaluate(words: Sequence[str]) -> None:
    """Judge the circuit of a run folder on held-out prompts.

    Raises:
        InputError: something given cannot be used.
    """
    options: EvaluateOptions = parse(EvaluateOptions, "evaluate", words)
    found = load_run(options.circuit)
    if not found.circuit.selected and options.size is None:
        raise InputError(
            f"{found.record['method']} scores every edge and chooses none: give --size N to "
            f"evaluate the N highest-scored ones."
        )
    options = _as_recorded(options, found.record.get("notes", {}))
    model = chosen_model(options)
    task = chosen_task(options, model, options.n, "test")
    metrics = options.metrics.split(",") if options.metrics else None
    ablation = options.ablation or _recorded_ablation(found)
    show_evaluation(
        found,
        evaluate_run(found, model, task, metrics=metrics, ablation=ablation, size=options.size),
        options,
    )


def _as_recorded(options: EvaluateOptions, notes: Mapping[str, Any]) -> EvaluateOptions:
    """The options with what was not given taken from the run's record."""
    own_prompts = options.task is None and options.data is None and notes.get("data")
    return dataclasses.replace(
        options,
        model=options.model or notes.get("model"),
        task=options.task or (None if own_prompts or options.data else notes.get("task")),
        data=Path(notes["data"]) if own_prompts else options.data,
        seed=notes.get("seed") if options.seed is None else options.seed,
    )


def _recorded_ablation(found: CircuitRun) -> str:
    ablation = found.record["settings"].get("ablation", "resample")
    if ablation not in ABLATIONS:
        raise InputError(
            f"{found.folder} was found under the ablation {ablation!r}; choose one with "
            f"--ablation: {', '.join(ABLATIONS)}."
        )
    return ablation


def show_evaluation(found: CircuitRun, evaluation: Mapping[str, Any], options: Common) -> None:
    """Print an evaluation as a table, or as JSON."""
    if options.json:
        print_json({"folder": str(found.folder), "reused": found.reused, **evaluation})
        return
    frame = pd.DataFrame.from_dict(evaluation["values"], orient="index")
    prompts = f"{evaluation['n_prompts']} prompts of {evaluation['task']}{', those it was found on' if options.data else ''}"
    edges = f"{evaluation['edges']:,} of {len(found.circuit.graph):,} edges"
    title = f"{found.record['method']}: {edges}, {prompts}, {evaluation['ablation']} ablation"
    console = Console()
    console.print(frame_table(frame.rename_axis("metric"), title))
    console.print(f"Run folder: {found.folder}", soft_wrap=True)
