"""Run folders of circuits: a method on a task.

    <out>/<task>/<method>-<digest>/
        circuit.safetensors     the circuit
        record.json             every setting, versions, seeds, counts and times
        metrics.json            evaluations, by the prompts they were made on
        circuit.html            a drawing of the circuit
        checkpoint.safetensors  the state of an unfinished run, from which it is resumed

The digest covers what the result depends on: method, settings, model weights, prompts and graph.
Of several ranks, only the first one reads and writes the folder.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from filelock import Timeout

import circuits
from circuits.discovery.discoverer import CircuitDiscoverer, Progress, Resumable, as_json
from circuits.evaluation.evaluate import Evaluation, evaluate
from circuits.graph.circuit import FILE, Circuit
from circuits.graph.graph import Graph
from circuits.models import Model
from circuits.models.component_graph import computed_nodes
from circuits.models.identity import identity
from circuits.plotting.pages import circuit_page
from circuits.running.ablation import Ablation
from circuits.runs.run_folder import RECORD, describe_setup, digest, lock_folder
from circuits.system.errors import InputError
from circuits.system.files import path_of, read_json, write_bytes, write_json
from circuits.system.kinds import expect
from circuits.system.numbers import WholeNumber, whole
from circuits.system.ranks import RankError, on_first, ranks, totals
from circuits.tasks.metrics import Metric
from circuits.tasks.model_fit import check_task
from circuits.tasks.task import Task

METRICS, PAGE, CHECKPOINT = "metrics.json", "circuit.html", "checkpoint.safetensors"
RECORD_FORMAT, METRICS_FORMAT, FORMAT_VERSION = "circuits.run", "circuits.metrics", 1
Counts = dict[str, int]
REQUIRED_IN_RECORD = ("method", "settings", "seconds", "forward_passes")
SECONDS_BETWEEN_TRIES = 60


@dataclass(frozen=True)
class CircuitRun:
    """A finished run.

    Attributes:
        folder: the run folder.
        circuit: the circuit that was found.
        record: the content of `record.json`.
        reused: whether the run was found in the folder instead of computed.
    """

    folder: Path
    circuit: Circuit
    record: Mapping[str, Any]
    reused: bool

    @property
    def model_runs(self) -> float:
        """The cost of the run in forward passes on all prompts.

        A pass that computes only some nodes (`node_evaluations`) counts as that share of a pass.
        Where whole passes computed these nodes, they are not counted twice.
        """
        # A graph of features has no nodes that are computed one by one.
        nodes_per_pass = max(1, computed_nodes(self.circuit.graph))
        partial_passes = self.record.get("node_evaluations", 0) / nodes_per_pass
        return max(float(self.record["forward_passes"]), partial_passes)


def run(
    discoverer: CircuitDiscoverer,
    model: Model,
    task: Task,
    *,
    out: str | Path = "runs",
    graph: Graph | None = None,
    progress: Progress | None = None,
    notes: Mapping[str, Any] | None = None,
) -> CircuitRun:
    """Discover a circuit into a run folder, resume an interrupted run, or return a finished one.

    Args:
        out: the folder of all runs.
        graph: the edges to choose from; by default the component graph, or the method's own graph.
        notes: recorded as well, for example the names and seeds of model and task.

    Raises:
        InputError: a setting cannot be used, or a file there is damaged or from a newer version.
        RankError: another rank ended; the message says where the state is.

    >>> import circuits, tempfile
    >>> model = circuits.load_model("toy-world")
    >>> task = circuits.load_task("ioi", model, n=2)
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     first = circuits.run(circuits.EAP(), model, task, out=folder)
    ...     again = circuits.run(circuits.EAP(), model, task, out=folder)
    >>> first.reused, again.reused
    (False, True)
    """
    expect(discoverer, CircuitDiscoverer, "a method", "give one, such as circuits.ACDC(0.01)")
    check_task(model, task)
    graph = discoverer.search_graph(model, graph)
    name = f"{discoverer.name}-{_digest(discoverer, model, task, graph)[:8]}"
    folder = path_of(out) / task.name / name
    with _taking_turns(folder):
        # Only the first rank looks: another may see the folder late, on a network disk.
        if on_first((folder / RECORD).exists):
            return on_first(lambda: load_run(folder))
        checkpoint = folder / CHECKPOINT
        resumed = checkpoint.exists()
        started = time.perf_counter()
        with counting_passes(model) as passes:
            circuit = _discover(discoverer, model, task, graph, checkpoint, progress)
        seconds = time.perf_counter() - started
        record = {
            **_describe(discoverer, model, task, circuit),
            **totals(passes),
            "resumed": resumed,
            "seconds": seconds,
            "notes": dict(notes or {}),
        }
        found = CircuitRun(folder, circuit, record, reused=False)
        return on_first(lambda: _save(found))


def load_run(folder: str | Path) -> CircuitRun:
    """Read a finished run.

    Raises:
        InputError: the folder holds no finished run, a damaged file, or one from a newer version.

    >>> import circuits, tempfile
    >>> model = circuits.load_model("toy-world")
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     task = circuits.load_task("ioi", model, n=2)
    ...     found = circuits.run(circuits.EAP(), model, task, out=folder)
    ...     circuits.load_run(found.folder).circuit == found.circuit
    True
    """
    folder = path_of(folder)
    path = folder / RECORD
    if not path.exists():
        remedy = f"give a folder with {RECORD} and {FILE}"
        if (folder / CHECKPOINT).exists():
            remedy = "it is unfinished: give the same discover command again to resume it"
        raise InputError(f"{folder} holds no finished run; {remedy}.")
    record = read_json(path, RECORD_FORMAT, FORMAT_VERSION)
    missing = [name for name in REQUIRED_IN_RECORD if name not in record]
    if missing:
        raise InputError(
            f"{path} is damaged: it has no {', '.join(missing)}; delete the folder and run again."
        )
    return CircuitRun(folder, Circuit.load(folder), record, reused=True)


def evaluate_run(
    found: CircuitRun,
    model: Model,
    task: Task,
    *,
    metrics: Sequence[str | Metric] | None = None,
    ablation: str | Ablation = "resample",
    size: WholeNumber | None = None,
) -> dict[str, Any]:
    """Evaluate a run's circuit on other prompts, unless its `metrics.json` has the evaluation.

    Args:
        size: the number of highest-scored edges to keep; by default the circuit as it is.

    Raises:
        InputError: circuit, model and task do not fit together, or the file is damaged.
    """
    check_task(model, task)
    size = None if size is None else whole(size, "size")
    settings = {
        "task": task.name,
        "prompts": task.digest(),
        "metrics": None if metrics is None else list(map(as_json, metrics)),
        "ablation": as_json(ablation),
        "size": size,
    }
    weights = identity(model).weights
    key = digest([settings, weights], size=8)
    path = found.folder / METRICS
    with lock_folder(found.folder):
        known = {}
        if path.exists():
            content = read_json(path, METRICS_FORMAT, FORMAT_VERSION)
            known = content.get("evaluations", {})
        if key not in known:
            circuit = found.circuit
            if size is not None:
                circuit = circuit.top(size)
            evaluation = evaluate(model, circuit, task, metrics=metrics, ablation=ablation)
            known[key] = {
                **settings,
                "n_prompts": len(task),
                "edges": len(circuit),
                "values": _values(evaluation),
            }
            write_json(path, {"evaluations": known}, METRICS_FORMAT, FORMAT_VERSION)
    return known[key]


def _values(evaluation: Evaluation) -> dict[Any, Any]:
    """The table of an evaluation by metric and column, as JSON values."""
    table = evaluation.table()
    # JSON has no NaN: a value that is not defined is null.
    defined = table.astype(object).where(table.notna(), None)
    return defined.to_dict(orient="index")


@contextlib.contextmanager
def counting_passes(model: Model) -> Iterator[Counts]:
    """Count `forward_passes` of the model, and `prompts_run` in them (prompts times circuits)."""
    counts = {"forward_passes": 0, "prompts_run": 0}

    def count(_: Model, arguments: Any) -> None:
        counts["forward_passes"] += 1
        counts["prompts_run"] += len(arguments[0])

    with model.register_forward_pre_hook(count):
        yield counts


def _discover(
    discoverer: CircuitDiscoverer,
    model: Model,
    task: Task,
    graph: Graph,
    checkpoint: Path,
    progress: Progress | None,
) -> Circuit:
    state = checkpoint if isinstance(discoverer, Resumable) else None
    try:
        circuit = discoverer.discover(model, task, graph=graph, checkpoint=state, progress=progress)
    except RankError as error:
        saved = f"the state is in {checkpoint}" if checkpoint.exists() else "nothing was saved yet"
        raise RankError(f"{error}; {saved}: run the same command again") from error
    if not isinstance(circuit, Circuit):
        raise InputError(
            f"method {discoverer.name!r} returned {type(circuit).__name__}; "
            "discover must return a Circuit."
        )
    return circuit


def _save(found: CircuitRun) -> CircuitRun:
    folder, record = found.folder, found.record
    found.circuit.save(folder)
    settings = [f"{name}={value}" for name, value in record["settings"].items()]
    details = {
        "method": f"{record['method']}({', '.join(settings)})",
        "model": record["model"]["name"],
        "task": f"{record['task']['name']}, {record['task']['prompts']} prompts",
        "edges": f"{record['edges']:,} of {record['graph']['edges']:,}",
        "model runs": f"{found.model_runs:,.0f}",
        "seconds": f"{record['seconds']:.1f}",
    }
    title = f"{record['method']} on {record['task']['name']}"
    page = circuit_page(found.circuit, title=title, details=details)
    write_bytes(folder / PAGE, page.encode())
    # The record comes last: a folder that has one holds a complete run.
    write_json(folder / RECORD, record, RECORD_FORMAT, FORMAT_VERSION)
    (folder / CHECKPOINT).unlink(missing_ok=True)
    return found


@contextlib.contextmanager
def _taking_turns(folder: Path) -> Iterator[None]:
    """Wait until no other process works in the folder. The first rank holds the lock for all."""
    with contextlib.ExitStack() as stack:

        def try_lock() -> bool:
            try:
                lock = lock_folder(folder)
                stack.enter_context(lock.acquire(timeout=SECONDS_BETWEEN_TRIES))
            except Timeout:
                return False
            return True

        # The first rank tells the others after each try. Without this they would time out.
        while not on_first(try_lock):
            pass
        yield


def _digest(discoverer: CircuitDiscoverer, model: Model, task: Task, graph: Graph) -> str:
    parts = [
        circuits.__version__,
        discoverer.identity(),
        identity(model).weights,
        task.digest(),
        graph.positions,
    ]
    edges = (graph.source, graph.target, graph.slot)
    return digest(parts, edges)


def _describe(
    discoverer: CircuitDiscoverer, model: Model, task: Task, circuit: Circuit
) -> dict[str, Any]:
    graph = circuit.graph
    prompts = {"prompts": len(task), "digest": task.digest()}
    return {
        "method": discoverer.name,
        "settings": discoverer.settings(),
        "task": {"name": task.name, **prompts},
        "graph": {"edges": len(graph), "positions": graph.positions},
        **describe_setup(model),
        "threads": torch.get_num_threads(),
        "ranks": ranks().world,
        **circuit.record,
        "edges": len(circuit),
    }
