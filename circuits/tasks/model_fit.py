"""Whether a task fits a model."""

from functools import partial
from typing import Any

import torch

from circuits.models import Model, check_model, shape_of
from circuits.system.errors import InputError
from circuits.system.kinds import expect
from circuits.tasks.readers.padding import check_no_padding
from circuits.tasks.task import Task

ROLES = ("clean", "corrupted")


def check_is_task(task: object) -> None:
    """Refuse what is no task, such as a list of prompts."""
    expect(task, Task, "a Task", "make one with circuits.load_task or Task.from_prompts")


def check_task(model: Model, task: Task) -> None:
    """Raise an InputError if one of the two is something else, or the task does not fit."""
    check_model(model)
    check_is_task(task)
    cfg = shape_of(model)
    if not len(task):
        raise InputError(f"task {task.name!r} has no prompts; select at least one.")
    n_tokens = max(task.clean.shape[1], task.corrupted.shape[1])
    if n_tokens > cfg.n_ctx:
        raise InputError(
            f"task {task.name!r} has prompts of {n_tokens} tokens, but {cfg.model_name} reads "
            f"{cfg.n_ctx}; shorten them."
        )
    for prompts in (task.clean, task.corrupted):
        _check_known(task, "token", prompts, cfg.d_vocab, cfg)
    for answers in (task.answers, task.wrong_answers):
        _check_known(task, "answer", answers, cfg.d_vocab_out, cfg)
    if task.finds_padding:
        _check_padding(model, task)


def _check_known(task: Task, kind: str, tokens: Any, vocabulary: int, cfg: Any) -> None:
    largest = -1 if tokens is None else int(tokens.max())
    if largest >= vocabulary:
        raise InputError(
            f"task {task.name!r} has {kind} {largest}, but {cfg.model_name} knows 0 to "
            f"{vocabulary - 1}; use a task that was made for this model."
        )


def _check_padding(model: Model, task: Task) -> None:
    remedy = (
        "pass attention_mask to Task.from_tokens (all ones if it is text), or lengths and their "
        "padding_side."
    )
    # Together, as what only the corrupted prompts end with is padding. Both have one shape here.
    tokens = torch.cat([task.clean, task.corrupted])
    real = torch.cat([task.mask, task.corrupted_mask])
    called = partial(_called, task)
    check_no_padding(model.tokenizer, shape_of(model), tokens, real, called, remedy)


def _called(task: Task, row: int) -> str:
    """What errors call a row of clean prompts, with corrupted ones after them."""
    role, number = divmod(row, len(task))
    return f"{ROLES[role]} prompt {number} of task {task.name!r}"
