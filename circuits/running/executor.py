"""Executors: what one must offer, and which one runs a given graph on a given model."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import cache, partial
from typing import Literal, Protocol, get_args, runtime_checkable

from jaxtyping import Bool, Float
from torch import Tensor

from circuits.graph.graph import Graph
from circuits.models import Model
from circuits.running.ablation import Ablation, get_ablation
from circuits.running.features import FeatureExecutor
from circuits.running.hooked import HookedExecutor
from circuits.running.incremental.executor import IncrementalExecutor
from circuits.running.incremental.sublayer_run import UnsupportedError
from circuits.running.precision import Precision
from circuits.system.errors import InputError
from circuits.system.memory import shrinking
from circuits.tasks.task import Task
from circuits.transcoders.transcoder import Transcoders

ExecutorName = Literal["auto", "incremental", "hooks"]


@runtime_checkable
class Executor(Protocol):
    """Runs circuits of one graph on one task, counterfactual outputs at hand."""

    @property
    def counts(self) -> Mapping[str, int]:
        """Nodes computed so far (one node in one circuit), and batches of circuits."""
        ...

    def logits(self, kept: Bool[Tensor, "variant edge"]) -> Float[Tensor, "variant scored vocab"]:
        """Logits of every circuit at every scored row."""
        ...

    def map(
        self, kept: Bool[Tensor, "variant edge"], function: Callable[[Tensor], Tensor]
    ) -> Tensor:
        """`function` of the logits, some circuits at a time."""
        ...

    def near(self, kept: Bool[Tensor, " edge"]) -> None:
        """A hint: circuits that follow are mostly subsets of this one."""
        ...

    def fixed_cost(self, edges: Sequence[int]) -> float:
        """About what a batch costs on top of what each circuit in it does, in circuits, where they lack such edges of the one told of."""
        ...


def get_executor(
    model: Model,
    graph: Graph,
    task: Task,
    *,
    ablation: str | Ablation = "resample",
    executor: ExecutorName = "auto",
    max_memory: int | None = None,
    precision: Precision | None = None,
    transcoders: Transcoders | None = None,
) -> Executor:
    """An executor that keeps what does not change between circuits.

    Args:
        executor: "incremental" recomputes only what changes; "hooks" runs the model's own modules, and is the reference; "auto" takes the
            first where it knows the architecture, and says so where it does not.
        max_memory: bytes that one step may take; None chooses from what is free.
        precision: of the incremental executor; None is float32 throughout.
        transcoders: of a graph of features, which has one executor of its own; None loads those the graph remembers.

    Raises:
        InputError: there is no such executor, it has no such precision, the model, graph and task do not fit together, or memory runs out.
    """
    if executor not in get_args(ExecutorName):
        raise InputError(
            f"there is no executor {executor!r}; choose 'auto', 'incremental' or 'hooks'."
        )
    chosen = get_ablation(ablation)
    if graph.transcoders is not None:
        if executor == "incremental" or precision is not None:
            raise InputError(
                "circuits of features are run by hooks, in the model's precision; use executor='auto'."
            )
        return FeatureExecutor.prepare(
            model, graph, task, chosen, transcoders=transcoders, max_memory=max_memory
        )
    if executor == "hooks" and precision is not None:
        raise InputError(
            f"precision={str(precision)!r} needs the incremental executor; leave out executor='hooks' or the precision."
        )
    if executor != "hooks":
        try:
            return _prepared(
                partial(IncrementalExecutor.prepare, precision=precision),
                model,
                graph,
                task,
                chosen,
                max_memory,
            )
        except UnsupportedError as error:
            if precision is not None:
                raise InputError(
                    f"{model.cfg.model_name} cannot be run incrementally: {error}; leave out the precision."
                ) from error
            if executor == "incremental":
                raise InputError(
                    f"{model.cfg.model_name} cannot be run incrementally: {error}; use executor='auto'."
                ) from error
            _say_once(
                f"{model.cfg.model_name} is run by the reference executor, which is slower: {error}."
            )
    return _prepared(HookedExecutor.prepare, model, graph, task, chosen, max_memory)


def _prepared(
    prepare: Callable[..., Executor],
    model: Model,
    graph: Graph,
    task: Task,
    ablation: Ablation,
    max_memory: int | None,
) -> Executor:
    return shrinking(
        lambda _: prepare(model, graph, task, ablation, max_memory=max_memory),
        1,
        "run of the prompts",
    )[0]


@cache
def _say_once(message: str) -> None:
    warnings.warn(message, stacklevel=4)
