"""The interface of discovery methods, and what only some methods can do."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from functools import wraps
from pathlib import Path
from typing import Any, ClassVar

from jaxtyping import Float
from torch import Tensor

from circuits.discovery.checkpoint import Checkpoint
from circuits.discovery.search_space import Edges, Layers, SearchSpace
from circuits.graph.circuit import Circuit
from circuits.graph.graph import Graph, NodesOrTexts, check_is_graph
from circuits.models import Model, cause, check_model
from circuits.models.component_graph import component_graph
from circuits.running.damage import DamageMeter
from circuits.running.run import model_logits
from circuits.running.settings import RunSettings
from circuits.system.code_digest import code_digest
from circuits.system.errors import InputError, NotFiniteError
from circuits.system.fields import CheckedFields
from circuits.system.messages import suggestion
from circuits.system.numbers import python_number, shown
from circuits.system.torch_modes import without_modes
from circuits.tasks.metrics import ALIASES, METRICS, Metric
from circuits.tasks.model_fit import check_is_task, check_task
from circuits.tasks.task import Task

SPEED_ONLY = {"speed_only": True}
"""Metadata of fields that change how fast a method runs, not what it finds."""

# Fields of methods that say how circuits are run and judged.
RUN_SETTINGS = ("ablation", "metric", "max_memory", "precision")

# What says where to search, besides `start`.
WHERE = ("frozen_in", "frozen_out", "layers", "nodes")

JsonObject = dict[str, Any]
Progress = Callable[[int, int], None]
"""Called with (done, total) while a method runs, first with (0, total) before a long step."""

EdgeScores = Float[Tensor, " edge"]


def _checked(discover: Callable[..., Circuit]) -> Callable[..., Circuit]:
    """`discover` of any method, refusing scores that are not finite."""

    @wraps(discover)
    def checked(self: Any, model: Model, task: Task, **options: Any) -> Any:
        found = discover(self, model, task, **options)
        if isinstance(found, Circuit):
            _check_scores(found, model, task)
        return found

    return checked


def _check_scores(found: Circuit, model: Model, task: Task) -> None:
    infinite = found.scores.isinf()
    n_infinite = int(infinite.sum())
    if n_infinite:
        raise NotFiniteError(f"{n_infinite} scores are infinite: {cause(model)}")
    scores = found.scores[found.kept]
    if scores.isnan().any():
        # They were never scored, or their scores are those of a model that computes NaN.
        model_logits(model, task)
        model_logits(model, task, "corrupted")


@dataclass(frozen=True)
class CircuitDiscoverer(CheckedFields):
    """A method that finds a circuit: hyperparameters are fields, data are arguments.

    A subclass is a frozen dataclass that defines `find`; or `find_within`, if it can be told where
    to search; or `discover` as a whole. If it has a `name` it is registered:
    `circuits.discoverers()` and the command list it, its fields are the command's options, and its
    docstring is the help.

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
        if "discover" in cls.__dict__:
            cls.discover = _checked(cls.discover)  # type: ignore[method-assign]
        if "name" not in cls.__dict__:
            return
        other = REGISTRY.get(cls.name, cls)
        if (other.__module__, other.__qualname__) != (cls.__module__, cls.__qualname__):
            raise InputError(
                f"two methods are named {cls.name!r}: {other.__module__}.{other.__qualname__} and "
                f"{cls.__module__}.{cls.__qualname__}."
            )
        REGISTRY[cls.name] = cls

    @_checked
    @without_modes()
    def discover(
        self,
        model: Model,
        task: Task,
        *,
        graph: Graph | None = None,
        start: Circuit | None = None,
        frozen_in: Edges | None = None,
        frozen_out: Edges | None = None,
        layers: Layers | None = None,
        nodes: NodesOrTexts | None = None,
        checkpoint: Checkpoint | str | Path | None = None,
        progress: Progress | None = None,
    ) -> Circuit:
        """Find a circuit.

        The arguments from `start` to `nodes` say where to search; methods that only score edges
        refuse them. Edges that they exclude are not tried and get no score; unless they are outside
        `start` or in `frozen_out`, they stay in the circuit.

        Args:
            graph: the edges to consider; all other edges of the model are always kept. None takes
                the graph of `start`, the component graph, or the method's own.
            start: the circuit to start from; edges outside it are ablated from the start.
            frozen_in: edges to keep always, even if `start` lacks them: a circuit, edges or their
                texts, or a mask over the graph's edges.
            frozen_out: edges to ablate always, even if `start` keeps them.
            layers: try only edges into heads and MLPs of these layers. The logits are in no layer.
            nodes: try only edges from or into these nodes (nodes or their texts; one without a
                position stands for it at every position). With `layers`, both must hold.
            checkpoint: a file for the state of a long run, from which it resumes after an
                interruption. Only for methods that are `Resumable`.
            progress: called with (done, total).

        Raises:
            InputError: the model, task, graph, checkpoint or settings cannot be used; the method
                does not search, or there is nothing to search; or scores are not finite.
        """
        check_model(model)
        if not isinstance(self, Resumable):
            self.refuse_checkpoint(checkpoint)
        check_task(model, task)
        part = {"frozen_in": frozen_in, "frozen_out": frozen_out, "layers": layers, "nodes": nodes}
        space = self.search_space(model, graph, start=start, **part)
        saved = self.checkpoint_at(checkpoint, model, space, task)
        progress = progress_of(progress)
        if self.searches():
            return self.find_within(model, task, space, saved, progress)
        return self.find(model, task, space.graph, saved, progress)

    def find(
        self, model: Model, task: Task, graph: Graph, saved: Checkpoint, progress: Progress
    ) -> Circuit:
        """Find a circuit in `graph`; `saved` holds no state unless the method is `Resumable`."""
        space = SearchSpace.parse(graph)
        return self.find_within(model, task, space, saved, progress)

    def find_within(
        self, model: Model, task: Task, space: SearchSpace, saved: Checkpoint, progress: Progress
    ) -> Circuit:
        """Find a circuit in a part of a graph."""
        raise NotImplementedError

    @classmethod
    def searches(cls) -> bool:
        """Whether the method can be told where to search: it, or a base, defines `find_within`.

        A `find` defined over that cannot be told, so it is given whole graphs only.
        """
        for kind in cls.__mro__:
            if "find_within" in vars(kind):
                return kind is not CircuitDiscoverer
            if "find" in vars(kind):
                return False
        return False

    def search_space(
        self, model: Model, graph: Graph | None = None, *, start: Circuit | None = None, **part: Any
    ) -> SearchSpace:
        """The graph, and where to search in it; the arguments are those of `discover`.

        Raises InputError if the graph or an argument cannot be used, or the method does not search.
        """
        for name in part.keys() - set(WHERE):
            raise InputError(f"there is no argument {name!r}; {suggestion(name, WHERE)}")
        given = {"start": start, **part}
        names = [f"{name}=" for name, value in given.items() if value is not None]
        if names and not self.searches():
            raise InputError(
                f"{self.name} does not search, so it cannot be told where by {', '.join(names)}; "
                "leave that out, or use a method that searches, such as ACDC."
            )
        if graph is None and isinstance(start, Circuit):
            graph = start.graph
        graph = self.search_graph(model, graph)
        return SearchSpace.parse(graph, **given)

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
        """Refuse a checkpoint, for methods that have no state to resume from: an InputError."""
        where = checkpoint.path if isinstance(checkpoint, Checkpoint) else checkpoint
        if where is not None:
            raise InputError(
                f"{self.name} cannot resume from checkpoint={str(where)!r}: it keeps no state "
                "between steps; leave the checkpoint out."
            )

    def checkpoint_at(
        self, where: Checkpoint | str | Path | None, model: Model, space: SearchSpace, task: Task
    ) -> Checkpoint:
        """The checkpoint of a search in that space; None keeps no state."""
        if where is None:
            return Checkpoint()
        identity = self.identity() | space.identity()
        return Checkpoint.open(where, identity, model, space.graph, task)

    def settings(self) -> JsonObject:
        """The hyperparameters as JSON values."""
        return {each.name: as_json(getattr(self, each.name)) for each in fields(self)}

    def identity(self) -> JsonObject:
        """What the result depends on: method, settings that matter, digest of code and data.

        A metric that is told by its name counts as it is registered now.
        """
        held = _held(self)
        settings = {name: as_json(value) for name, value in held.items()}
        data = {name: value for name, value in held.items() if not _told_by_text(value)}
        code = code_digest(type(self), data).key()
        return {"method": self.name, "settings": settings, "code": code}

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
        names = {each.name for each in fields(self)}.intersection(RUN_SETTINGS)
        own = {name: getattr(self, name) for name in names}
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


def progress_of(given: Any) -> Progress:
    """What a user gives as `progress`; None reports nothing."""
    if given is None:
        return no_progress
    if not callable(given):
        raise InputError(f"progress={shown(given)} must be a function of (done, total).")
    return given


def report_part(progress: Progress, number: int, parts: int, done: int, total: int) -> None:
    """Report the progress of one of several equally long parts as progress of all of them."""
    progress(number * total + done, parts * total)


def _told_by_text(value: Any) -> bool:
    """Whether the settings say all of a value: "int8" and Precision("int8") are one."""
    kind = type(value)
    if isinstance(value, Metric):
        return value.shipped
    is_ours = kind.__module__.startswith("circuits.") and "__str__" in vars(kind)
    return isinstance(value, str) or is_ours


def _held(discoverer: CircuitDiscoverer) -> JsonObject:
    """The fields of a method, except `SPEED_ONLY` ones."""
    kept = (each for each in fields(discoverer) if not each.metadata.get("speed_only"))
    return {each.name: named_metrics(getattr(discoverer, each.name)) for each in kept}


def named_metrics(value: Any) -> Any:
    """A setting with metrics in the places of their names, which others can be registered under."""
    if isinstance(value, str):
        name = ALIASES.get(value, value)
        return METRICS.get(value) or METRICS.get(name, value)
    if type(value) in (list, tuple):
        return type(value)(map(named_metrics, value))
    if type(value) is dict:
        return {name: named_metrics(each) for name, each in value.items()}
    if isinstance(value, CircuitDiscoverer):
        return type(value), _held(value)
    return value


def as_json(value: Any) -> Any:
    """A hyperparameter as a JSON value; other objects as their text."""
    number = python_number(value)
    if number is not None:
        return number
    if value is None or isinstance(value, bool | str):
        return value
    if isinstance(value, list | tuple):
        return [as_json(item) for item in value]
    if isinstance(value, Mapping):
        return {str(key): as_json(item) for key, item in value.items()}
    return str(value)
