"""Executors: what each must offer, and which one runs a given graph on a given model."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from typing import Protocol, runtime_checkable

from jaxtyping import Bool, Float
from torch import Tensor

from circuits.graph.graph import Graph
from circuits.models import Model
from circuits.running.features import FeatureExecutor
from circuits.running.hooked import HookedExecutor
from circuits.running.incremental.executor import IncrementalExecutor
from circuits.running.incremental.sublayer_run import UnsupportedError
from circuits.running.settings import RunSettings
from circuits.system.errors import InputError
from circuits.system.memory import shrinking
from circuits.tasks.task import Task


@runtime_checkable
class Executor(Protocol):
    """Runs circuits of one graph on one task, with the counterfactual outputs computed once."""

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
        """`function` of the logits, applied to a few circuits at a time."""
        ...

    def near(self, kept: Bool[Tensor, " edge"]) -> None:
        """Announce that the circuits to come are mostly subsets of this one."""
        ...

    def fixed_cost(self, edges: Sequence[int]) -> float:
        """Fixed cost of a batch of circuits that lack some of `edges`, in units of one circuit."""
        ...


def get_executor(model: Model, graph: Graph, task: Task, settings: RunSettings) -> Executor:
    """The executor for this graph: the first of `graph.executors` that can run the model.

    Raises:
        InputError: no executor fits the settings, the model, graph and task do not fit together,
            or memory runs out.
    """
    names = graph.executors
    if settings.executor == "hooks" and "hooks" in names:
        names = ("hooks",)
    _check_precision(names, settings)
    for name in names:
        try:
            return _prepare(name, model, graph, task, settings)
        except UnsupportedError as error:
            _fall_back(model, settings, error)
    raise InputError(f"no executor runs a {type(graph).__name__} on {model.cfg.model_name}.")


def _prepare(name: str, model: Model, graph: Graph, task: Task, settings: RunSettings) -> Executor:
    ablation, max_memory = settings.ablation, settings.max_memory
    if name == "features":
        return FeatureExecutor.prepare(
            model,
            graph,
            task,
            ablation,
            transcoders=settings.transcoders,
            max_memory=max_memory,
        )

    def prepare(_: int) -> Executor:
        if name == "hooks":
            return HookedExecutor.prepare(model, graph, task, ablation, max_memory=max_memory)
        return IncrementalExecutor.prepare(
            model, graph, task, ablation, max_memory=max_memory, precision=settings.precision
        )

    # `shrinking` turns running out of memory into an error that says what to do.
    return shrinking(prepare, 1, "run of the prompts")[0]


def _check_precision(names: Sequence[str], settings: RunSettings) -> None:
    reduced = settings.precision is not None
    if "features" in names and (reduced or settings.executor == "incremental"):
        raise InputError(
            "circuits of features are run by hooks, in the model's precision; use executor='auto'."
        )
    if reduced and names == ("hooks",):
        raise InputError(
            f"precision={str(settings.precision)!r} needs the incremental executor; leave out "
            "executor='hooks' or the precision."
        )


def _fall_back(model: Model, settings: RunSettings, error: UnsupportedError) -> None:
    """Warn that the reference executor takes over, or refuse if the user asked for the fast one."""
    name = model.cfg.model_name
    if settings.precision is not None or settings.executor == "incremental":
        remedy = "use executor='auto'" if settings.precision is None else "leave out the precision"
        raise InputError(f"{name} cannot be run incrementally: {error}; {remedy}.") from error
    _warn_once(f"{name} is run by the reference executor, which is slower: {error}.")


@cache
def _warn_once(message: str) -> None:
    warnings.warn(message, stacklevel=4)
