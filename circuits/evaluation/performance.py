"""How well a model does tasks by itself, which is all that its circuits can explain."""

from __future__ import annotations

from typing import Any

import pandas as pd

from circuits.evaluation.evaluate import DIFFERENCES, doubts
from circuits.models import Model, check_model, shape_of
from circuits.running.run import model_logits
from circuits.system.errors import InputError
from circuits.system.numbers import WholeNumber, whole
from circuits.system.torch_modes import without_modes
from circuits.tasks.families import make_family, task_forms
from circuits.tasks.metrics import METRICS
from circuits.tasks.registry import load_task
from circuits.tasks.task import Task

Row = dict[str, Any]
COLUMNS = ("task", "prompts", "left_out", "accuracy", *DIFFERENCES, "note")


@without_modes()
def performance(model: Model, *tasks: Task | str, n: WholeNumber = 32) -> pd.DataFrame:
    """How well the whole model does tasks: no circuit explains what the model does not do.

    Args:
        tasks: tasks, or names that `load_task` takes, such as "greater_than:digits=1"; without any,
            every task that there is, also in its other forms.
        n: the number of prompts to draw from the test split where a name is given.

    Returns:
        A row per task: the numbers of `prompts` and of those `left_out` because they do not fit the
        model; the means over scored rows of `accuracy`, `logit_difference` and
        `probability_difference`, NaN where the task has no answers for them; and `note`. It says
        why a task that was named does not fit the model, or that the task's difference is not
        above 0 by two standard errors over prompts. It is empty otherwise.

    Raises:
        InputError: there is no such task, or a given one does not fit the model.

    >>> import circuits
    >>> model = circuits.load_model("toy-world")
    >>> circuits.performance(model, "ioi", "two_hop", n=16)["accuracy"].to_dict()
    {'ioi': 1.0, 'two_hop': 1.0}
    """
    check_model(model)
    n = whole(n, "n", least=1)
    for task in tasks:
        if not isinstance(task, Task):
            # A name that is wrong is a mistake; prompts that do not fit are a finding.
            make_family(task)
    named = tasks or task_forms()
    rows = [_row(model, task, n) for task in named]
    return pd.DataFrame(rows, columns=COLUMNS).set_index("task")


def _row(model: Model, given: Task | str, n: int) -> Row:
    if isinstance(given, Task):
        return {"task": given.name} | _measured(model, given)
    row: Row = {"task": given}
    try:
        task = load_task(given, model, n=n)
    except InputError as error:
        return row | {"prompts": 0, "left_out": n, "note": str(error)}
    return row | _measured(model, task)


def _measured(model: Model, task: Task) -> Row:
    logits = model_logits(model, task)
    task = task.to(shape_of(model).device)
    measured = ["accuracy", *DIFFERENCES]
    if task.wrong_answers is None:
        measured = [] if task.answers is None else ["accuracy"]
    values = {}
    row: Row = {}
    for name in measured:
        metric = METRICS[name]
        values[name] = metric(logits, logits, task).cpu()
        row[name] = float(values[name].mean())
    # A task is done or not by the difference that it is about.
    own = task.metric if task.metric in DIFFERENCES else "logit_difference"
    judged = {name: values[name] for name in values if name == own}
    found = doubts(judged, task.row_prompt.cpu())
    row["note"] = " ".join(found)
    row["prompts"] = len(task)
    row["left_out"] = sum(task.left_out.values())
    return row
