"""circuits evaluate."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
from tyro.conf import Positional

from circuits.cli.console import frame_table, print_run, terminal
from circuits.cli.options import AblationName, TaskOptions, Unprefixed
from circuits.running.ablation import NAMES as ABLATIONS
from circuits.runs.circuit_run import CircuitRun, evaluate_run, load_run
from circuits.system.errors import InputError

Record = Mapping[str, Any]


def command(
    circuit: Positional[Path],
    source: Unprefixed[TaskOptions],
    n: int = 64,
    size: int | None = None,
    metrics: str | None = None,
    ablation: AblationName | None = None,
) -> None:
    """Run a saved circuit on held-out prompts, with everything outside it ablated.

    Model, task, seed and BOS token are by default those of the run.

    $ circuits evaluate runs/ioi/acdc-1a2b3c4d --n 64
    $ circuits evaluate runs/ioi/eap-ig-1a2b3c4d --size 50 --metrics kl,accuracy

    Args:
        circuit: A run folder.
        source: The model and the prompts.
        n: Number of held-out prompts.
        size: Number of highest-scored edges to keep; by default the circuit as it is.
        metrics: Metrics separated by commas; by default kl, logit_difference and the task's own.
        ablation: What edges outside the circuit carry; by default what they carried in the search.
    """
    found = load_run(circuit)
    if not found.circuit.selected and size is None:
        raise InputError(size_needed(found))
    notes = found.record.get("notes", {})
    source = _with_defaults_of_run(source, notes)
    model = source.load_model()
    task = source.load_task(model, n, "test")
    evaluation = evaluate_run(
        found,
        model,
        task,
        metrics=metrics.split(",") if metrics else None,
        ablation=ablation or _ablation_of_run(found),
        size=size,
    )
    show_evaluation(found, evaluation, source)


def size_needed(found: CircuitRun) -> str:
    """What to say of a run that chose no edges."""
    return (
        f"{found.record['method']} scores every edge and chooses none: "
        "give --size N to evaluate the N highest-scored ones."
    )


def show_evaluation(found: CircuitRun, evaluation: Record, source: TaskOptions) -> None:
    """Print an evaluation as a table, or as JSON."""
    if source.json:
        print_run(found, evaluation)
        return
    edges = f"{evaluation['edges']:,} of {len(found.circuit.graph):,} edges"
    prompts = f"{evaluation['n_prompts']} prompts of {evaluation['task']}"
    found_on = found.record["task"]["digest"]
    if evaluation["prompts"] == found_on:
        prompts += ", those it was found on"
    title = f"{found.record['method']}: {edges}, {prompts}, {evaluation['ablation']} ablation"
    values = pd.DataFrame.from_dict(evaluation["values"], orient="index")
    values.index.name = "metric"
    console = terminal()
    console.print(frame_table(values, title))
    for note in evaluation.get("notes", ()):
        console.print(f"note: {note}")
    console.print(f"Run folder: {found.folder}", soft_wrap=True)


def _with_defaults_of_run(source: TaskOptions, notes: Record) -> TaskOptions:
    seed = notes.get("seed") if source.seed is None else source.seed
    task, data = source.task, source.data
    # A task given here replaces the run's own prompts, and the other way round.
    if task is None and data is None:
        data = Path(notes["data"]) if notes.get("data") else None
        task = None if data else notes.get("task")
    model = source.model or notes.get("model")
    prepend = notes.get("prepend_bos") if source.prepend_bos is None else source.prepend_bos
    skip = source.skip_misfits or notes.get("skip_misfits", False)
    changes: Record = {"model": model, "seed": seed, "task": task, "data": data}
    return replace(source, **changes, prepend_bos=prepend, skip_misfits=skip)


def _ablation_of_run(found: CircuitRun) -> str:
    # A method without the setting resamples.
    ablation = found.record["settings"].get("ablation", "resample")
    if ablation not in ABLATIONS:
        raise InputError(
            f"{found.folder} was found under the ablation {ablation!r}; "
            f"choose one with --ablation: {', '.join(ABLATIONS)}."
        )
    return ablation
