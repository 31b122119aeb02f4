"""The model and the prompts that options ask for."""

from __future__ import annotations

import warnings
from typing import Any

import torch

from circuits.cli.parsing.options import CompareOptions, DiscoverOptions, ModelOptions, TaskOptions
from circuits.cli.progress import phase
from circuits.evaluation.performance import performance
from circuits.models import EMBEDDED, Model, load_model
from circuits.tasks.registry import load_task
from circuits.tasks.task import Task

DEFAULT_TASK = "ioi"


def model_of(options: ModelOptions) -> Model:
    """Load the model."""
    name = options.model or EMBEDDED
    dtype = getattr(torch, options.dtype)
    with phase(f"loading the model {name}", quiet=options.json):
        return load_model(name, device=options.device, dtype=dtype)


def task_of(options: TaskOptions, model: Model, n: int, split: str) -> Task:
    """Load n prompts from a split of the task, or all of the user's own prompts."""
    name = options.task or DEFAULT_TASK
    bos = options.prepend_bos
    with phase(f"tokenizing the prompts of {options.data or name}", quiet=options.json):
        if options.data is None:
            seed = options.seed or 0
            return load_task(name, model, n=n, seed=seed, split=split, prepend_bos=bos)
        skip = options.skip_misfits
        return Task.from_file(options.data, model, prepend_bos=bos, skip_misfits=skip)


def task_to_search(options: CompareOptions | DiscoverOptions, model: Model) -> Task:
    """Load the prompts to search on, and say before the search what speaks against them."""
    task = task_of(options, model, options.n, "train")
    if task.left_out and not options.data:
        reasons = ", ".join(task.left_out)
        told = f"task {task.name!r}: {len(task)} of {options.n} prompts fit the model"
        warnings.warn(f"{told}, the others have {reasons}.", stacklevel=2)
    with phase("running the model", quiet=options.json):
        doubt = performance(model, task)["note"].item()
    if doubt:
        warnings.warn(f"task {task.name!r}: {doubt}", stacklevel=2)
    return task


def held_out_of(options: CompareOptions | DiscoverOptions, model: Model, task: Task) -> Task:
    """Load the prompts to evaluate on; users' own have no splits, so they are those of `task`."""
    return task if options.data else task_of(options, model, options.n_eval, "test")


def notes_of(options: TaskOptions) -> dict[str, Any]:
    """What a record says of how the model and the prompts were chosen."""
    return {
        "model": options.model or EMBEDDED,
        "task": options.task or DEFAULT_TASK,
        "data": str(options.data) if options.data else None,
        "seed": options.seed or 0,
        "prepend_bos": options.prepend_bos,
        "skip_misfits": options.skip_misfits,
    }
