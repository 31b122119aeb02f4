"""Whether a task fits a model."""

from typing import Any

from circuits.models import Model, check_model
from circuits.system.errors import InputError
from circuits.system.kinds import expect
from circuits.tasks.task import Task


def check_is_task(task: object) -> None:
    """Refuse what is no task, such as a list of prompts."""
    expect(task, Task, "a Task", "make one with circuits.load_task or Task.from_prompts")


def check_task(model: Model, task: Task) -> None:
    """Raise an InputError if one of the two is something else, or the task does not fit."""
    check_model(model)
    check_is_task(task)
    cfg = model.cfg
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
    if task.finds_padding and model.tokenizer is not None:
        _check_padding(model.tokenizer, task)


def _check_known(task: Task, kind: str, tokens: Any, vocabulary: int, cfg: Any) -> None:
    largest = -1 if tokens is None else int(tokens.max())
    if largest >= vocabulary:
        raise InputError(
            f"task {task.name!r} has {kind} {largest}, but {cfg.model_name} knows 0 to "
            f"{vocabulary - 1}; use a task that was made for this model."
        )


def _check_padding(tokenizer: Any, task: Task) -> None:
    """Refuse padding that is read as text because nobody marked it."""
    pad = tokenizer.pad_token_id
    if pad is None:
        return
    has_two_uses = pad in (tokenizer.bos_token_id, tokenizer.eos_token_id)
    for kind, tokens in (("clean", task.clean), ("corrupted", task.corrupted)):
        is_pad = tokens == pad
        # Where BOS is also used for padding, one at the start of every prompt is BOS.
        first = int(has_two_uses and is_pad[:, 0].all())
        before = is_pad[:, first:].cumprod(1).any(1)
        # Padding after the last scored token does no harm.
        after = is_pad[:, -1] & task.scored[:, -1]
        padded = (before | after).nonzero()
        if len(padded):
            prompt = int(padded[0])
            where = "begins" if before[prompt] else "ends"
            raise InputError(
                f"{kind} prompt {prompt} of task {task.name!r} {where} with padding (token {pad}, "
                f"{tokenizer.pad_token!r}), which would be read as text; pass attention_mask to "
                "Task.from_tokens (all ones if it is text)."
            )
