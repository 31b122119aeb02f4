"""circuits evaluate."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import tyro
from rich.console import Console

from circuits.commands.console import frame_table, print_json
from circuits.commands.options import AblationName, Common, chosen_model, chosen_task, parse
from circuits.run import Run, evaluate_run, load_run


@dataclass(frozen=True)
class EvaluateOptions(Common):
    """Run a saved circuit on held-out prompts, everything outside it ablated."""

    circuit: tyro.conf.Positional[Path] = Path()
    """A run folder."""
    n: int = 64
    """Held-out prompts."""
    size: int | None = None
    """How many of the highest-scored edges to keep; by default the circuit as it is."""
    metrics: str | None = None
    """Metrics separated by commas; by default kl, logit_difference and the task's own."""
    ablation: AblationName = "resample"
    """What edges outside the circuit carry."""


def evaluate(words: Sequence[str]) -> None:
    """Judge the circuit of a run folder on held-out prompts.

    Raises:
        InputError: something given cannot be used.
    """
    options: EvaluateOptions = parse(EvaluateOptions, "evaluate", words)
    found = load_run(options.circuit)
    model = chosen_model(options)
    task = chosen_task(options, model, options.n, "test")
    metrics = options.metrics.split(",") if options.metrics else None
    show_evaluation(found, evaluate_run(found, model, task, metrics=metrics, ablation=options.ablation, size=options.size), options.json)


def show_evaluation(found: Run, evaluation: Mapping[str, Any], as_json: bool) -> None:
    """Print an evaluation as a table, or as JSON."""
    if as_json:
        print_json({"folder": str(found.folder), "reused": found.reused, **evaluation})
        return
    frame = pd.DataFrame.from_dict(evaluation["values"], orient="index")
    title = f"{found.record['method']}: {evaluation['edges']:,} of {len(found.circuit.graph):,} edges, {evaluation['n_prompts']} prompts"
    console = Console()
    console.print(frame_table(frame.rename_axis("metric"), title))
    console.print(f"{'Found again' if found.reused else 'Saved'}: {found.folder}", soft_wrap=True)
