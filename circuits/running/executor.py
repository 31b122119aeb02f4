"""Executors: what each must offer, and which one runs a given graph on a given model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

from torch import Tensor

from circuits.graph.graph import EdgeMask, Graph
from circuits.models import Model, shape_of
from circuits.running.features import FeatureExecutor
from circuits.running.hooked import HookedExecutor
from circuits.running.incremental.executor import IncrementalExecutor
from circuits.running.incremental.sublayer_run import UnsupportedError
from circuits.running.settings import OfLogits, RunSettings, VariantLogits
from circuits.running.variants import KeptEdges, Variants
from circuits.system.errors import InputError
from circuits.system.memory import shrinking
from circuits.system.messages import warn_once
from circuits.tasks.task import Task


@runtime_checkable
class Executor(Protocol):
    """Runs circuits of one graph on one task, with the counterfactual outputs computed once."""

    @property
    def counts(self) -> Mapping[str, int]:
        """Nodes computed so far (one node in one circuit), and batches of circuits."""

    def logits(self, kept: KeptEdges) -> VariantLogits:
        """Logits of every circuit at every scored row."""

    def map(self, variants: Variants, function: OfLogits) -> Tensor:
        """`function` of the logits, applied to a few circuits at a time."""

    def near(self, kept: EdgeMask) -> None:
        """Announce that the circuits to come are mostly subsets of this one."""

    def fixed_cost(self, edges: Sequence[int]) -> float:
        """Fixed cost of a batch of circuits that lack some of `edges`, in units of one circuit."""


def get_executor(model: Model, graph: Graph, task: Task, settings: RunSettings) -> Executor:
    """The executor for this graph: the incremental one, unless it cannot run the model."""
    name, precision = shape_of(model).model_name, settings.precision
    only_incremental = precision is not None or settings.executor == "incremental"

    def prepared(executor: Any, **options: Any) -> Executor:
        max_memory, ablation = settings.max_memory, settings.ablation

        def prepare(_: int) -> Executor:
            return executor.prepare(model, graph, task, ablation, max_memory=max_memory, **options)

        # `shrinking` turns running out of memory into an error that says what to do.
        ready, _ = shrinking(prepare, 1, "run of the prompts")
        return ready

    if "features" in graph.executors:
        if only_incremental:
            raise InputError(
                "circuits of features are run by hooks, in the model's precision; "
                "use executor='auto'."
            )
        return prepared(FeatureExecutor, transcoders=settings.transcoders)
    if settings.executor == "hooks":
        if precision is not None:
            raise InputError(
                f"precision={str(precision)!r} needs the incremental executor; leave out "
                "executor='hooks' or the precision."
            )
        return prepared(HookedExecutor)
    try:
        return prepared(IncrementalExecutor, precision=precision)
    except UnsupportedError as error:
        # The reference executor runs every model that has a component graph.
        if only_incremental:
            remedy = "use executor='auto'" if precision is None else "leave out the precision"
            raise InputError(f"{name} cannot be run incrementally: {error}; {remedy}.") from error
        reason = error
    ready = prepared(HookedExecutor)
    warn_once(f"{name} is run by the reference executor, which is slower: {reason}.")
    return ready
