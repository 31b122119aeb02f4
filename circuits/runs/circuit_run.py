"""One run: a method on a task, in a folder that is found again instead of computed again.

    <out>/<task>/<method>-<digest>/
        circuit.safetensors   the circuit
        record.json           every setting, versions, seeds, counts and times
        metrics.json          evaluations, by the prompts they were made on
        circuit.html          the circuit drawn
        checkpoint.safetensors, only while the run is unfinished: what it goes on from after being killed

The digest covers what the result depends on: method and settings, model weights, prompts, graph. Processes that meet in one folder take turns.
Where several ranks make one run together, the first one alone reads and writes the folder.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import platform
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout

from circuits.discovery.discoverer import CircuitDiscoverer, Progress, Resumable, as_json
from circuits.evaluation.evaluate import evaluate
from circuits.graph.circuit import FILE, Circuit
from circuits.graph.graph import Graph
from circuits.models import Model
from circuits.models.component_graph import computed_nodes
from circuits.models.identity import identity
from circuits.plotting.pages import circuit_page
from circuits.running.ablation import Ablation
from circuits.system.errors import InputError
from circuits.system.files import read_json, write_bytes, write_json
from circuits.system.ranks import RankError, on_first, ranks, totals
from circuits.tasks.metrics import Metric
from circuits.tasks.task import Task

RECORD, METRICS, PAGE, CHECKPOINT, LOCK = (
    "record.json",
    "metrics.json",
    "circuit.html",
    "checkpoint.safetensors",
    ".lock",
)
RECORD_FORMAT, METRICS_FORMAT, FORMAT_VERSION = "circuits.run", "circuits.metrics", 1
WAIT = 60  # seconds
PACKAGES = ("circuits", "torch", "transformer-lens", "transformers")


@dataclass(frozen=True)
class CircuitRun:
    """A finished run.

    Attributes:
        folder: where it lies.
        circuit: what was found.
        record: what `record.json` says.
        reused: it was there already.
    """

    folder: Path
    circuit: Circuit
    record: Mapping[str, Any]
    reused: bool

    @property
    def model_runs(self) -> float:
        """How often the model was run forward, what was computed of it in part (`node_evaluations`) counting as that share of a run.

        Where whole runs computed those nodes, which is when the architecture has no faster way, they are not counted twice.
        """
        partial = self.record.get("node_evaluations", 0) / max(
            1, computed_nodes(self.circuit.graph)
        )
        return max(float(self.record["forward_passes"]), partial)


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
    """Discover a circuit into a run folder, or take the one that is there; an interrupted run goes on where it stopped.

    Args:
        out: the folder of all runs.
        graph: None takes the component graph, or lets the method make its own.
        notes: more to record, such as the names and seeds that model and task were loaded with.

    Raises:
        InputError: settings cannot be used, or the folder holds a damaged file or one from a newer version.
        RankError: another rank ended; the message says where the state is.
    """
    graph = discoverer.search_graph(model, graph)
    folder = (
        Path(out) / task.name / f"{discoverer.name}-{_digest(discoverer, model, task, graph)[:8]}"
    )
    with _turn(folder):
        if on_first(lambda: (folder / RECORD).exists()):
            return on_first(lambda: load_run(folder))
        resumed = (folder / CHECKPOINT).exists()
        with counting_passes(model) as passes:
            started = time.perf_counter()
            circuit = _discovered(discoverer, model, task, graph, folder / CHECKPOINT, progress)
            seconds = time.perf_counter() - started
        record = {
            **_circumstances(discoverer, model, task, circuit.graph),
            **circuit.record,
            **totals(passes),
            "seconds": seconds,
            "resumed": resumed,
        }
        record |= {"edges": len(circuit), "notes": dict(notes or {})}
        return on_first(lambda: _write(CircuitRun(folder, circuit, record, reused=False)))


def _discovered(
    discoverer: CircuitDiscoverer,
    model: Model,
    task: Task,
    graph: Graph,
    checkpoint: Path,
    progress: Progress | None,
) -> Circuit:
    try:
        state = checkpoint if isinstance(discoverer, Resumable) else None
        circuit = discoverer.discover(model, task, graph=graph, checkpoint=state, progress=progress)
    except RankError as error:
        kept = f"the state is in {checkpoint}" if checkpoint.exists() else "nothing was saved yet"
        raise RankError(f"{error}; {kept}: run the same command again") from error
    if not isinstance(circuit, Circuit):
        raise InputError(
            f"method {discoverer.name!r} returned {type(circuit).__name__}; discover must return a Circuit."
        )
    return circuit


def _write(found: CircuitRun) -> CircuitRun:
    """Put a run that has just finished into its folder."""
    folder, circuit, record = found.folder, found.circuit, found.record
    circuit.save(folder)
    title = f"{record['method']} on {record['task']['name']}"
    write_bytes(folder / PAGE, circuit_page(circuit, title=title, details=_details(found)).encode())
    # The record comes last: where it stands, the run is whole.
    write_json(folder / RECORD, record, RECORD_FORMAT, FORMAT_VERSION)
    (folder / CHECKPOINT).unlink(missing_ok=True)
    return found


def load_run(folder: str | Path) -> CircuitRun:
    """A finished run.

    Raises:
        InputError: the folder holds no finished run, a damaged file, or one from a newer version.
    """
    folder = Path(folder)
    if not (folder / RECORD).exists():
        unfinished = (
            " (it is unfinished: give the same discover command again, and it goes on)"
            if (folder / CHECKPOINT).exists()
            else ""
        )
        raise InputError(
            f"{folder} holds no finished run{unfinished}; give a folder with {RECORD} and {FILE}."
        )
    record = read_json(folder / RECORD, RECORD_FORMAT, FORMAT_VERSION)
    if missing := [
        name for name in ("method", "settings", "seconds", "forward_passes") if name not in record
    ]:
        raise InputError(
            f"{folder / RECORD} is damaged: it has no {', '.join(missing)}; delete the folder and run again."
        )
    return CircuitRun(folder, Circuit.load(folder), record, reused=True)


def evaluate_run(
    found: CircuitRun,
    model: Model,
    task: Task,
    *,
    metrics: Sequence[str | Metric] | None = None,
    ablation: str | Ablation = "resample",
    size: int | None = None,
) -> dict[str, Any]:
    """Evaluate a run's circuit on other prompts into its `metrics.json`, or take the evaluation that is there.

    Args:
        size: how many of the highest-scored edges to keep; None takes the circuit as it is.

    Raises:
        InputError: the circuit, model and task do not fit together, or the file is damaged.
    """
    circuit = found.circuit if size is None else found.circuit.top(size)
    names = [as_json(metric) for metric in metrics] if metrics is not None else None
    settings = {
        "task": task.name,
        "prompts": task.digest(),
        "metrics": names,
        "ablation": as_json(ablation),
        "size": size,
    }
    key = hashlib.blake2b(
        json.dumps([settings, identity(model).weights]).encode(), digest_size=8
    ).hexdigest()
    path = found.folder / METRICS
    with locked(found.folder):
        known = (
            read_json(path, METRICS_FORMAT, FORMAT_VERSION).get("evaluations", {})
            if path.exists()
            else {}
        )
        if key not in known:
            evaluation = evaluate(model, circuit, task, metrics=metrics, ablation=ablation)
            table = evaluation.table().to_dict(orient="index")
            # JSON has no NaN; a faithfulness that is not defined is null.
            values = {
                name: {column: None if value != value else value for column, value in row.items()}
                for name, row in table.items()
            }
            known[key] = {
                **settings,
                "n_prompts": len(task),
                "edges": len(circuit),
                "values": values,
            }
            write_json(path, {"evaluations": known}, METRICS_FORMAT, FORMAT_VERSION)
    return known[key]


@contextlib.contextmanager
def counting_passes(model: Model) -> Iterator[dict[str, int]]:
    """Counts the model's forward passes, and the prompts in them (a circuit run on a prompt is one), into the dictionary it gives."""
    counts = {"forward_passes": 0, "prompts_run": 0}

    def count(module: torch.nn.Module, arguments: tuple[Any, ...]) -> None:
        counts["forward_passes"] += 1
        counts["prompts_run"] += len(arguments[0])

    handle = model.register_forward_pre_hook(count)
    try:
        yield counts
    finally:
        handle.remove()


@contextlib.contextmanager
def _turn(folder: Path) -> Iterator[None]:
    """Wait until no other run is made in this folder. Of several ranks the first holds the lock, for all."""
    with contextlib.ExitStack() as stack:
        # The others hear from it now and then, so that they do not take it for dead.
        while not on_first(lambda: _acquired(folder, stack)):
            pass
        yield


def _acquired(folder: Path, stack: contextlib.ExitStack) -> bool:
    try:
        stack.enter_context(locked(folder).acquire(timeout=WAIT))
    except Timeout:
        return False
    return True


def locked(folder: Path) -> FileLock:
    """A lock on the folder, which is made. It goes with its process, however that ends.

    Raises:
        InputError: the folder cannot be made.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(
            f"the run folder {folder} cannot be made ({error.strerror}); give another one with out."
        ) from error
    return FileLock(folder / LOCK)


def _digest(discoverer: CircuitDiscoverer, model: Model, task: Task, graph: Graph) -> str:
    parts = [
        version("circuits"),
        discoverer.identity(),
        identity(model).weights,
        task.digest(),
        graph.positions,
    ]
    digest = hashlib.blake2b(json.dumps(parts).encode())
    for column in (graph.source, graph.target, graph.slot):
        digest.update(column.cpu().numpy().tobytes())
    return digest.hexdigest()


def _circumstances(
    discoverer: CircuitDiscoverer, model: Model, task: Task, graph: Graph
) -> dict[str, Any]:
    who = identity(model)
    return {
        "method": discoverer.name,
        "settings": discoverer.settings(),
        "model": {
            "name": who.name,
            "shape": dict(who.shape),
            "weights": who.weights,
            "dtype": str(model.cfg.dtype),
        },
        "task": {"name": task.name, "prompts": len(task), "digest": task.digest()},
        "graph": {"edges": len(graph), "positions": graph.positions},
        "versions": {
            "python": platform.python_version(),
            **{name: version(name) for name in PACKAGES},
        },
        "device": str(model.cfg.device),
        "threads": torch.get_num_threads(),
        "ranks": ranks().world,
    }


def _details(found: CircuitRun) -> dict[str, str]:
    record = found.record
    settings = ", ".join(f"{name}={value}" for name, value in record["settings"].items())
    return {
        "method": f"{record['method']}({settings})",
        "model": record["model"]["name"],
        "task": f"{record['task']['name']}, {record['task']['prompts']} prompts",
        "edges": f"{record['edges']:,} of {record['graph']['edges']:,}",
        "model runs": f"{found.model_runs:,.0f}",
        "seconds": f"{record['seconds']:.1f}",
    }
