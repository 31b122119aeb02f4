"""The interface of discovery methods, and what only some methods can do."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, ClassVar

from jaxtyping import Float
from torch import Tensor

from circuits.discovery.checkpoint import Checkpoint
from circuits.graph.circuit import Circuit
from circuits.graph.graph import Graph, check_is_graph
from circuits.models import Model
from circuits.models.component_graph import component_graph
from circuits.running.damage import DamageMeter
from circuits.running.settings import RunSettings
from circuits.system.errors import InputError
from circuits.system.fields import CheckedFields
from circuits.system.numbers import python_number
from circuits.tasks.model_fit import check_is_task, check_task
from circuits.tasks.task import Task

SPEED_ONLY = {"speed_only": True}
"""Metadata of fields that change how fast a method runs, not what it finds."""

# Fields of methods that say how circuits are run and judged.
RUN_SETTINGS = ("ablation", "metric", "max_memory", "precision")

JsonObject = dict[str, Any]
Progress = Callable[[int, int], None]
"""Called with (done, total) while a method runs."""

EdgeScores = Float[Tensor, " edge"]


@dataclass(frozen=True)
class CircuitDiscoverer(CheckedFields):
    """A method that finds a circuit: hyperparameters are fields, data are arguments.

    A subclass is a frozen dataclass that defines `find`, or `discover` as a whole. If it has a
    `name` it is registered: `circuits.discoverers()` and the command list it, its fields are the
    command's options, and its docstring is the help.

    >>> import circuits, dataclasses, torch
    >>> @dataclasses.dataclass(frozen=True)
    ... class ByLayer(circuits.CircuitDiscoverer):
    ...     \"\"\"Score an edge by the layer it leads to.\"\"\"
    ...
    ...     name = "by-layer"
    ...
    ...     def find(self, model, task, graph, saved, progress):
    ...         scores = torch.arange(len(graph)).float()
    ...         return circuits.Circuit.full(graph, scores, record=self.record())
    >>> model = circuits.load_model("toy-world")
    >>> ByLayer().discover(model, circuits.load_task("ioi", model, n=2)).top(1).edges[0].target
    Logits(token=None, position=None)
    """

    name: ClassVar[str]

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "name" not in cls.__dict__:
            return
        other = REGISTRY.get(cls.name, cls)
        if (other.__module__, other.__qualname__) != (cls.__module__, cls.__qualname__):
            raise InputError(
                f"two methods are named {cls.name!r}: {other.__module__}.{other.__qualname__} and "
                f"{cls.__module__}.{cls.__qualname__}."
            )
        REGISTRY[cls.name] = cls

    def discover(
        self,
        model: Model,
        task: Task,
        *,
        graph: Graph | None = None,
        checkpoint: Checkpoint | str | Path | None = None,
        progress: Progress | None = None,
    ) -> Circuit:
        """Find a circuit.

        Args:
            graph: the edges to consider; None takes the component graph, or the method's own.
            checkpoint: a file for the state of a long run, from which it resumes after an
                interruption. Only for methods that are `Resumable`.
            progress: called with (done, total).

        Raises:
            InputError: the model, task, graph, checkpoint or settings cannot be used.
        """
        if not isinstance(self, Resumable):
            self.refuse_checkpoint(checkpoint)
        check_task(model, task)
        graph = self.search_graph(model, graph)
        saved = Checkpoint()
        if checkpoint is not None:
            identity = self.identity()
            saved = Checkpoint.open(checkpoint, identity, graph, task)
        progress = progress or no_progress
        return self.find(model, task, graph, saved, progress)

    def find(
        self, model: Model, task: Task, graph: Graph, saved: Checkpoint, progress: Progress
    ) -> Circuit:
        """Find a circuit in `graph`; `saved` holds no state unless the method is `Resumable`."""
        raise NotImplementedError

    def search_graph(self, model: Model, graph: Graph | None) -> Graph:
        """The graph to search: the one given, or the component graph.

        Raises:
            InputError: the model has no component graph, or the method cannot take the given graph.
        """
        if graph is None:
            return component_graph(model)
        check_is_graph(graph)
        return graph

    def refuse_checkpoint(self, checkpoint: object) -> None:
        """Refuse a checkpoint, for methods that have no state to resume from.

        Raises:
            InputError: a checkpoint is given.
        """
        where = checkpoint.path if isinstance(checkpoint, Checkpoint) else checkpoint
        if where is not None:
            raise InputError(
                f"{self.name} cannot resume from checkpoint={str(where)!r}: it keeps no state "
                "between steps; leave the checkpoint out."
            )

    def settings(self) -> dict[str, Any]:
        """The hyperparameters as JSON values."""
        return {each.name: as_json(getattr(self, each.name)) for each in fields(self)}

    def identity(self) -> dict[str, Any]:
        """What the result depends on: the method and its settings, except `SPEED_ONLY` ones."""
        settings = self.settings()
        for each in fields(self):
            if each.metadata.get("speed_only"):
                del settings[each.name]
        return {"method": self.name, "settings": settings}

    def record(self, **found: Any) -> JsonObject:
        """The record of a circuit: the method, its settings, and what the run counted."""
        settings = self.settings()
        return {"method": self.name, "settings": settings, **found}

    def meter(self, model: Model, graph: Graph, task: Task) -> DamageMeter:
        """Measures the damage of circuits as the method's fields say.

        Raises:
            InputError: the model, graph, task and fields do not fit together.
        """
        settings = self.run_settings(task)
        return DamageMeter.prepare(model, graph, task, settings)

    def run_settings(self, task: Task) -> RunSettings:
        """How to run circuits on `task` and judge them: the method's fields named RUN_SETTINGS.

        Raises:
            InputError: there is no such ablation, metric or precision.
        """
        check_is_task(task)
        names = {each.name for each in fields(self)}
        own = {name: getattr(self, name) for name in names.intersection(RUN_SETTINGS)}
        return RunSettings.parse(task, **own)


class Resumable(CircuitDiscoverer):
    """A method that saves its state to `checkpoint` and resumes from it.

    Contract: an interrupted and resumed run finds the same circuit as an uninterrupted one.

    >>> import circuits
    >>> [name for name, each in circuits.discoverers().items() if issubclass(each, Resumable)]
    ['acdc', 'activation-patching', 'attribution-graph', 'batched-acdc']
    """


REGISTRY: dict[str, type[CircuitDiscoverer]] = {}


def no_progress(done: int, total: int) -> None:
    """Report nothing."""


def as_json(value: Any) -> Any:
    """A hyperparameter as a JSON value; other objects as their text."""
    number = python_number(value)
    if number is not None:
        return number
    if value is None or isinstance(value, bool | str):
        return value
    if isinstance(value, list | tuple):
        return [as_json(item) for item in value]
    return str(value)
