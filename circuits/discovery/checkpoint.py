"""Checkpoints: the state of a long run in a file, from which it resumes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from circuits.graph.graph import Graph
from circuits.models import Model
from circuits.system.code_digest import code_digest
from circuits.system.errors import InputError
from circuits.system.files import path_of, read_tensors, write_tensors
from circuits.system.ranks import is_first, on_first
from circuits.system.tensors import digest
from circuits.tasks.metrics import METRICS, Metric
from circuits.tasks.task import Task

FORMAT, FORMAT_VERSION = "circuits.checkpoint", 1
Tensors = Mapping[str, Tensor]
State = dict[str, Tensor]


@dataclass(frozen=True)
class Checkpoint:
    """The state of a long run in one file, replaced atomically. With several ranks, the first reads
    and writes the file for all.

    Attributes:
        path: the file; None keeps no state.
        key: what the state depends on. A file with another key is refused.

    >>> import circuits
    >>> circuits.Checkpoint().path is None
    True
    """

    path: Path | None = None
    key: str = ""

    @staticmethod
    def open(
        where: Checkpoint | str | Path | None,
        method: Mapping[str, Any],
        model: Model,
        graph: Graph,
        task: Task,
    ) -> Checkpoint:
        """The checkpoint of one method (its `CircuitDiscoverer.identity`) on one graph and task."""
        key = search_digest(method, model, graph, task)
        given = where.path if isinstance(where, Checkpoint) else where
        path = None if given is None else path_of(given)
        return Checkpoint(path, key)

    @property
    def is_new(self) -> bool:
        """Whether there is no state to resume from."""
        return self.path is None or not self.path.exists()

    def restore(self, start: Tensors) -> State:
        """The state saved last, or `start` if there is none.

        Raises InputError if the file is damaged or belongs to another run.
        """
        return on_first(lambda: self._read(start))

    def _read(self, start: Tensors) -> State:
        if self.path is None or self.is_new:
            return dict(start)
        state, metadata = read_tensors(self.path, FORMAT, FORMAT_VERSION)
        if metadata.get("key") != self.key:
            raise InputError(
                f"the checkpoint {self.path} belongs to a run with other settings, model or "
                "prompts; give another path or delete it."
            )
        if state.keys() != start.keys():
            raise InputError(
                f"the checkpoint {self.path} was written by another version of this package; "
                "delete it to start again."
            )
        return {name: state[name].to(start[name].device) for name in start}

    def save(self, state: Tensors) -> None:
        """Replace the saved state."""
        if self.path is not None and is_first():
            metadata = {"key": self.key}
            write_tensors(self.path, state, metadata, FORMAT, FORMAT_VERSION)


class TensorState:
    """Base class of a dataclass of tensors and numbers that a checkpoint holds."""

    def restore(self, saved: Checkpoint) -> None:
        """Take over the state saved last, if there is one."""
        restored = saved.restore(self._tensors())
        for name, stored in restored.items():
            is_number = not isinstance(getattr(self, name), Tensor)
            setattr(self, name, stored.item() if is_number else stored)

    def save(self, saved: Checkpoint) -> None:
        """Replace the saved state by this one."""
        if saved.path is not None:
            saved.save(self._tensors())

    def _tensors(self) -> Tensors:
        tensors = {}
        for name, value in vars(self).items():
            # Python's floats have double precision.
            dtype = torch.float64 if isinstance(value, float) else None
            tensors[name] = torch.as_tensor(value, dtype=dtype)
        return tensors


def search_digest(method: Mapping[str, Any], model: Model, graph: Graph, task: Task) -> str:
    """Hash what the result of a method (its `CircuitDiscoverer.identity`) depends on."""
    nodes = list(map(str, graph.nodes))
    # A metric that is told by its name counts as it is registered now.
    metric: Any = task.metric
    if isinstance(metric, str):
        metric = METRICS.get(metric, metric)
    if isinstance(metric, Metric) and metric.shipped:
        metric = metric.name
    code = code_digest(model, metric).key()
    prompts = task.digest()
    inputs = [method, code, nodes, graph.positions, prompts]
    return digest(inputs, (graph.source, graph.target, graph.slot))
