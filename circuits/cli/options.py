"""What every command takes, and how it is turned into a model and a task."""

from __future__ import annotations

import inspect
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import tyro

from circuits.models import EMBEDDED, Model, load_model
from circuits.system.errors import InputError
from circuits.tasks.registry import load_task
from circuits.tasks.task import Task

AblationName = Literal["resample", "zero", "mean", "mean_by_position"]
DTYPES = {
    "float32": torch.float32,
    "float64": torch.float64,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}


@dataclass(frozen=True)
class ModelOptions:
    """Which model, and how."""

    model: str | None = None
    """toy-world (the default), a name TransformerLens knows (gpt2, pythia-160m), or a folder."""
    device: str | None = None
    """cpu, cuda, cuda:1, ...; by default CUDA where there is one."""
    dtype: Literal["float32", "float64", "bfloat16", "float16"] = "float32"
    """Of the weights."""
    json: bool = False
    """Print JSON for programs instead of tables."""


@dataclass(frozen=True)
class Common(ModelOptions):
    """What every command on a task takes."""

    task: str | None = None
    """A task's name; `circuits list` shows them. By default ioi."""
    data: Path | None = None
    """Your own prompts instead of a task: a JSONL file, one object with clean, corrupted, answer,
    wrong_answer a line.
    All of its prompts are discovered and judged on."""
    seed: int | None = None
    """Of the prompts drawn; by default 0."""


def parse(kind: Any, name: str, words: Sequence[str]) -> Any:
    """A command's options from its words; help and mistakes in form end the program."""
    description = inspect.cleandoc(kind.__doc__ or "")
    return tyro.cli(kind, prog=f"circuits {name}", description=description, args=list(words))


def chosen_model(options: ModelOptions) -> Model:
    """The model that was asked for."""
    return load_model(options.model or EMBEDDED, device=options.device, dtype=DTYPES[options.dtype])


def chosen_task(options: Common, model: Model, n: int, split: str) -> Task:
    """Prompts of one split of a task, or the user's own."""
    if options.data and options.task:
        raise InputError(
            f"--task {options.task} and --data {options.data} were both given; give one of them."
        )
    if options.data:
        return Task.from_jsonl(
            options.data, model, name=re.sub(r"[^\w+-]+", "-", options.data.stem) or "data"
        )
    return load_task(options.task or "ioi", model, n=n, seed=options.seed or 0, split=split)


def notes(options: Common) -> dict[str, Any]:
    """What a record says of how model and prompts were chosen."""
    data = str(options.data) if options.data else None
    return {
        "model": options.model or EMBEDDED,
        "task": options.task or "ioi",
        "data": data,
        "seed": options.seed or 0,
    }
