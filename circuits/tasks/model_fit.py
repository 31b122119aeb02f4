"""Whether a task fits a model."""

from circuits.models import Model, check_model
from circuits.system.errors import InputError
from circuits.system.kinds import expect
from circuits.tasks.task import Task


def check_is_task(task: object) -> None:
    """Refuse what is no task, such as a list of prompts."""
    expect(task, Task, "a Task", "make one with circuits.load_task or Task.from_prompts")


def check_task(model: Model, task: Task) -> None:
    """Raise an InputError if the model lacks tokens of a task, or its prompts are too long.

    Also if one of the two is something else.
    """
    check_model(model)
    check_is_task(task)
    cfg = model.cfg
    n_tokens = task.clean.shape[1]
    if n_tokens > cfg.n_ctx:
        raise InputError(
            f"task {task.name!r} has prompts of {n_tokens} tokens, but {cfg.model_name} reads "
            f"{cfg.n_ctx}; shorten them."
        )
    for kind, tokens, vocabulary in (
        ("token", task.clean, cfg.d_vocab),
        ("token", task.corrupted, cfg.d_vocab),
        ("answer", task.answers, cfg.d_vocab_out),
        ("answer", task.wrong_answers, cfg.d_vocab_out),
    ):
        largest = -1 if tokens is None else int(tokens.max())
        if largest >= vocabulary:
            raise InputError(
                f"task {task.name!r} has {kind} {largest}, but {cfg.model_name} knows 0 to "
                f"{vocabulary - 1}; use a task that was made for this model."
            )
