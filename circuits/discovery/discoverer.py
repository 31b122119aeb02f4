"""The interface every method has, the registry of methods, and checkpoints."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, ClassVar

from circuits.discovery.checkpoint import Checkpoint
from circuits.graph.circuit import Circuit
from circuits.graph.graph import Graph
from circuits.models import Model
from circuits.system.errors import InputError
from circuits.tasks.task import Task

SPEED_ONLY = {"speed_only": True}
"""Metadata of fields that change how fast a method runs and not what it finds: `field(default=..., metadata=SPEED_ONLY)`."""


Progress = Callable[[int, int], None]
"""Called with (done, total) while a method runs."""


@dataclass(frozen=True)
class CircuitDiscoverer(ABC):
    """A method that finds a circuit: hyperparameters are fields, data are arguments.

    Subclass it as a frozen dataclass with a `name`, and it is registered: `circuits.discoverers()` and the command line list it, its
    fields are the options, their docstring the help.
    """

    name: ClassVar[str]
    makes_own_graph: ClassVar[bool] = False
    """Whether the method finds the nodes itself, so that it takes no graph."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "name" in cls.__dict__:
            other = _REGISTRY.get(cls.name)
            if other is not None and (other.__module__, other.__qualname__) != (
                cls.__module__,
                cls.__qualname__,
            ):
                raise InputError(
                    f"two methods are named {cls.name!r}: {other.__module__}.{other.__qualname__} and {cls.__module__}.{cls.__qualname__}."
                )
            _REGISTRY[cls.name] = cls

    @abstractmethod
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
            checkpoint: a file in which a long run keeps its state, and from which it goes on when it was interrupted.
            progress: called with (done, total).

        Raises:
            InputError: the model, task, graph or settings cannot be used.
        """

    def settings(self) -> dict[str, Any]:
        """The hyperparameters as JSON values."""
        return {field.name: as_json(getattr(self, field.name)) for field in fields(self)}

    def identity(self) -> dict[str, Any]:
        """What the result depends on: the method and its settings, without those that only make it faster (`SPEED_ONLY`)."""
        faster = {field.name for field in fields(self) if field.metadata.get("speed_only")}
        return {
            "method": self.name,
            "settings": {
                name: value for name, value in self.settings().items() if name not in faster
            },
        }

    def record(self, **found: Any) -> dict[str, Any]:
        """What a circuit says of how it was found: method, settings and whatever the run counted."""
        return {"method": self.name, "settings": self.settings(), **found}


_REGISTRY: dict[str, type[CircuitDiscoverer]] = {}


def as_json(value: Any) -> Any:
    """A hyperparameter as a JSON value: objects by their names."""
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, list | tuple):
        return [as_json(item) for item in value]
    return str(value)
