"""How well do models do each task, in each of its forms?

    python experiments/performance_on_tasks.py                                  # toy-world, seconds
    python experiments/performance_on_tasks.py --models toy-world SmolLM2-135M-Instruct

Every form is a row: how many of the drawn prompts fit, the model's accuracy on them, and by how
much it prefers the right answers to the wrong ones, in probability and in logits; the latter also
on the corrupted prompts. Besides the forms that `circuits list --model` shows there is induction on
longer repetitions and on random words of the model's own vocabulary, and IOI with those names only
that are single tokens of the model.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
import tyro
from markdown_tables import markdown

import circuits
from circuits.tasks.families import task_forms
from circuits.tasks.families.ioi import NAMES
from circuits.tasks.metrics import get_metric

LONG = "induction:repeated=8:length=24"


@dataclass(frozen=True)
class Config:
    """Models and prompts."""

    models: tuple[str, ...] = ("toy-world",)
    """Names of models, or folders."""
    n: int = 100
    """Prompts to draw of each form."""
    out: Path = Path("runs/performance-on-tasks.md")
    """File for the table."""


def main(config: Config) -> None:
    rows = []
    for name in config.models:
        model = circuits.load_model(name)
        for form, task in forms(model, config.n):
            row = {"model": Path(name).name, "task": form, "prompts": 0}
            rows.append(row | (measured(model, task) if task else {}))
    config.out.parent.mkdir(parents=True, exist_ok=True)
    config.out.write_text(markdown(pd.DataFrame(rows)))
    print(config.out.read_text())


def forms(model: object, n: int) -> Iterator[tuple[str, circuits.Task | None]]:
    """Every form of every task; None where too few prompts fit."""
    for name in sorted((*task_forms(), "induction:repeated=4", LONG)):
        try:
            yield name, circuits.load_task(name, model, n=n)
        except circuits.InputError:
            yield name, None
    words = circuits.single_token_words(model)
    yield f"{LONG}, {len(words):,} words", circuits.load_task(LONG, model, n=n, words=words)
    names = circuits.single_token_words(model, NAMES)
    yield f"ioi, {len(names)} names", circuits.load_task("ioi", model, n=n, names=names)


def measured(model: object, task: circuits.Task) -> dict[str, float]:
    """How well the model does a task, and what it makes of the corrupted prompts."""
    row = circuits.performance(model, task).iloc[0].drop(["left_out", "note"]).to_dict()
    corrupted = circuits.model_logits(model, task, "corrupted")
    difference = get_metric("logit_difference", task)(corrupted, corrupted, task)
    return row | {"corrupted": float(difference.mean())}


if __name__ == "__main__":
    main(tyro.cli(Config))
