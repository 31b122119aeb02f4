"""How circuits are run and judged: one value, made from the user's arguments once."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, get_args

from jaxtyping import Float
from torch import Tensor

from circuits.running.ablation import Ablation, get_ablation
from circuits.running.precision import Precision, get_precision
from circuits.system.kinds import one_of
from circuits.system.numbers import WholeNumber, whole
from circuits.tasks.metrics import Metric, get_metric
from circuits.tasks.model_fit import check_is_task
from circuits.tasks.task import Task
from circuits.transcoders.transcoder import Transcoders, check_is_transcoders

ExecutorName = Literal["auto", "incremental", "hooks"]

RESAMPLE = Ablation("resample")

# What executors run, return and count.
VariantLogits = Float[Tensor, "variant scored vocab"]
OfLogits = Callable[[Tensor], Tensor]
Counts = dict[str, int]
NO_RUNS: Counts = {"node_evaluations": 0, "batches": 0}


@dataclass(frozen=True)
class RunSettings:
    """How to run circuits, and the metric that judges them.

    Attributes:
        ablation: what ablated edges carry instead.
        metric: None if the logits themselves are wanted.
        executor, transcoders: see `run_circuits`.
        max_memory: bytes that one step may take; None chooses from the memory that is free.
        precision: of the incremental executor; None is float32 throughout.
    """

    ablation: Ablation = RESAMPLE
    metric: Metric | None = None
    executor: ExecutorName = "auto"
    max_memory: int | None = None
    precision: Precision | None = None
    transcoders: Transcoders | None = None

    @staticmethod
    def parse(
        task: Task | None = None,
        *,
        ablation: str | Ablation = "resample",
        metric: str | Metric | None = None,
        executor: ExecutorName = "auto",
        max_memory: WholeNumber | None = None,
        precision: str | Precision | None = None,
        transcoders: Transcoders | None = None,
    ) -> RunSettings:
        """The settings that a user's arguments ask for.

        On a task to be judged on, `metric=None` means the task's own metric.

        Raises:
            InputError: an argument names no ablation, metric, executor or precision, or the metric
                does not fit the task.
        """
        if task is not None:
            check_is_task(task)
        if transcoders is not None:
            check_is_transcoders(transcoders)
        # A metric judges on a task; without one the logits themselves are wanted.
        return RunSettings(
            get_ablation(ablation),
            None if task is None else get_metric(metric, task),
            one_of(executor, "executor", get_args(ExecutorName)),
            None if max_memory is None else whole(max_memory, "max_memory"),
            get_precision(precision),
            transcoders,
        )
