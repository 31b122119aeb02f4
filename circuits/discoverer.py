"""The interface every method has, the registry of methods, and checkpoints."""

from __future__ import annotations

import hashlib
import importlib
import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any, ClassVar

from torch import Tensor

from circuits.circuit import Circuit
from circuits.distributed import is_first, on_first
from circuits.errors import InputError
from circuits.files import read_tensors, write_tensors
from circuits.graph import Graph
from circuits.models import Model
from circuits.tasks.base import Task

ENTRY_POINTS = "circuits.discoverers"
FORMAT, FORMAT_VERSION = "circuits.checkpoint", 1

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
            if other is not None and (other.__module__, other.__qualname__) != (cls.__module__, cls.__qualname__):
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
        return {"method": self.name, "settings": {name: value for name, value in self.settings().items() if name not in faster}}

    def record(self, **found: Any) -> dict[str, Any]:
        """What a circuit says of how it was found: method, settings and whatever the run counted."""
        return {"method": self.name, "settings": self.settings(), **found}


_REGISTRY: dict[str, type[CircuitDiscoverer]] = {}


def discoverers() -> dict[str, type[CircuitDiscoverer]]:
    """Every method by name: the shipped ones, other installed packages' (entry-point group `circuits.discoverers`), and your own."""
    importlib.import_module("circuits.algorithms")
    for entry in entry_points(group=ENTRY_POINTS):
        entry.load()
    return dict(sorted(_REGISTRY.items()))


@dataclass(frozen=True)
class Checkpoint:
    """The state of a long run in one file, replaced atomically. Of several ranks the first reads and writes it, for all.

    Attributes:
        path: None keeps nothing.
        key: what the state depends on; a file with another key is refused rather than continued.
    """

    path: Path | None = None
    key: str = ""

    @staticmethod
    def open(where: Checkpoint | str | Path | None, discoverer: CircuitDiscoverer, graph: Graph, task: Task) -> Checkpoint:
        """A checkpoint for this method on this graph and task."""
        path = where.path if isinstance(where, Checkpoint) else where
        return Checkpoint(None if path is None else Path(path), _digest(discoverer, graph, task))

    def restore(self, start: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The state saved last, or `start` when there is none.

        Raises:
            InputError: the file is damaged or belongs to another run.
        """
        return on_first(lambda: self._read(start))

    def _read(self, start: Mapping[str, Tensor]) -> dict[str, Tensor]:
        if self.path is None or not self.path.exists():
            return dict(start)
        state, metadata = read_tensors(self.path, FORMAT, FORMAT_VERSION)
        if metadata.get("key") != self.key or set(state) != set(start):
            raise InputError(
                f"the checkpoint {self.path} belongs to a run with other settings, model or prompts; give another path or delete it."
            )
        return {name: state[name].to(start[name].device) for name in start}

    def save(self, state: Mapping[str, Tensor]) -> None:
        """Replace the saved state."""
        if self.path is not None and is_first():
            write_tensors(self.path, state, {"key": self.key}, FORMAT, FORMAT_VERSION)


def as_json(value: Any) -> Any:
    """A hyperparameter as a JSON value: objects by their names."""
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, list | tuple):
        return [as_json(item) for item in value]
    return str(value)


def _digest(discoverer: CircuitDiscoverer, graph: Graph, task: Task) -> str:
    digest = hashlib.blake2b(digest_size=16)
    model = None if graph.model is None else [graph.model.name, graph.model.weights]
    digest.update(json.dumps([discoverer.identity(), model, [str(node) for node in graph.nodes], task.digest()]).encode())
    for column in (graph.source, graph.target, graph.slot):
        digest.update(column.cpu().numpy().tobytes())
    return digest.hexdigest()
