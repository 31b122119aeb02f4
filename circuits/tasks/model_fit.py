"""Whether a task fits a model."""

from __future__ import annotations

from circuits.models import (
    Model,
)
from circuits.system.errors import InputError
from circuits.tasks.task import Task


def check_task(model: Model, task: Task) -> None:
    """Refuse tokens that the model does not know, and prompts longer than it reads.

    Raises:
        InputError: with the largest token or the length, and what the model allows.
    """
    cfg = model.cfg
    if task.clean.shape[1] > cfg.n_ctx:
        raise InputError(
            f"task {task.name!r} has prompts of {task.clean.shape[1]} tokens, but {cfg.model_name} reads {cfg.n_ctx}; shorten them."
        )
    answers = [part for part in (task.answers, task.wrong_answers) if part is not None]
    for kind, parts, known in (
        ("token", [task.clean, task.corrupted], cfg.d_vocab),
        ("answer", answers, cfg.d_vocab_out),
    ):
        largest = max((int(part.max()) for part in parts), default=0)
        if largest >= known:
            raise InputError(
                f"task {task.name!r} has {kind} {largest}, but {cfg.model_name} knows 0 to {known - 1}; was it made for another model?"
            )
