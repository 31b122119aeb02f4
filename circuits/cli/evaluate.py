"""circuits evaluate."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pandas as pd

from circuits.cli.console import frame_table, print_run, terminal
from circuits.cli.inputs import model_of, task_of
from circuits.cli.notes import notes_on
from circuits.cli.parsing.checks import check_skipping, listed
from circuits.cli.parsing.options import EvaluateOptions, TaskOptions
from circuits.cli.progress import note, phase
from circuits.running.ablation import NAMES as ABLATIONS
from circuits.runs.circuit_run import CircuitRun, evaluate_run, load_run
from circuits.system.errors import InputError
from circuits.system.files import path_of

Record = Mapping[str, Any]


def command(options: EvaluateOptions) -> None:
    """Run a saved circuit on held-out prompts."""
    with phase(f"reading {options.circuit}", quiet=options.json):
        found = load_run(options.circuit)
    if not found.circuit.selected and options.size is None:
        raise InputError(size_needed(found))
    check_size(found, options.size)
    notes = found.record.get("notes", {})
    options = _with_defaults_of_run(options, notes)
    model = model_of(options)
    task = task_of(options, model, options.n, "test")
    ablation = options.ablation or _ablation_of_run(found)
    metrics = listed(options.metrics) if options.metrics else None
    with phase(f"evaluating on {len(task)} prompts", quiet=options.json):
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


def check_size(found: CircuitRun, size: int | None) -> None:
    """Refuse to cut a circuit to more edges than it has."""
    largest = len(found.circuit)
    if size is not None and not 0 <= size <= largest:
        raise InputError(
            f"--size {size}: the circuit that {found.record['method']} found has {largest} edges; "
            f"give a number from 0 to {largest}, or leave --size out."
        )


def show_evaluation(found: CircuitRun, evaluation: Record, options: TaskOptions) -> None:
    """Print an evaluation as a table, or as JSON."""
    for text in [*notes_on(found), *evaluation.get("notes", ())]:
        note(text)
    if options.json:
        print_run(found, evaluation)
        return
    edges = f"{evaluation['edges']:,} of {len(found.circuit.graph):,} edges"
    prompts = f"{evaluation['n_prompts']} prompts of {evaluation['task']}"
    if evaluation["prompts"] == found.record["task"]["digest"]:
        prompts += ", those it was found on"
    title = f"{found.record['method']}: {edges}, {prompts}, {evaluation['ablation']} ablation"
    values = pd.DataFrame.from_dict(evaluation["values"], orient="index")
    values.index.name = "metric"
    console = terminal()
    console.print(frame_table(values, title))
    console.print(f"Run folder: {found.folder}", soft_wrap=True)


def _with_defaults_of_run(options: EvaluateOptions, notes: Record) -> EvaluateOptions:
    model = options.model or notes.get("model")
    changes: dict[str, Any] = {}
    for name in ("seed", "prepend_bos"):
        given = getattr(options, name)
        changes[name] = notes.get(name) if given is None else given
    task, data = options.task, options.data
    # A task given here replaces the run's own prompts, and the other way round.
    if task is None and data is None:
        data = path_of(notes["data"]) if notes.get("data") else None
        task = None if data else notes.get("task")
    skip = options.skip_misfits or bool(data and notes.get("skip_misfits"))
    changes |= {"model": model, "task": task, "data": data, "skip_misfits": skip}
    completed = replace(options, **changes)
    check_skipping(completed)
    return completed


def _ablation_of_run(found: CircuitRun) -> str:
    # A method without the setting resamples.
    ablation = found.record["settings"].get("ablation", "resample")
    if ablation not in ABLATIONS:
        raise InputError(
            f"{found.folder} was found under the ablation {ablation!r}; "
            f"choose one with --ablation: {', '.join(ABLATIONS)}."
        )
    return ablation
