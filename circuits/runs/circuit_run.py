"""Run folders of circuits: a method on a task.

    <out>/<task>/<method>-<digest>/
        circuit.safetensors     the circuit
        record.json             every setting, versions, seeds, counts and times
        metrics.json            evaluations, by the prompts they were made on
        circuit.html            a drawing of the circuit
        checkpoint.safetensors  the state of an unfinished run, from which it is resumed

The digest covers what the result depends on: the method with its settings, code and data, the
metric's code, this package's code, the model's weights, settings and hooks, prompts and graph. What
was changed is run anew.
Of several ranks, only the first one reads and writes the folder. A finished run is read without a
lock, so that it can be used where nothing can be written.
"""

from __future__ import annotations

import contextlib
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from circuits.discovery.checkpoint import search_digest
from circuits.discovery.discoverer import (
    CircuitDiscoverer,
    Progress,
    Resumable,
    as_json,
)
from circuits.discovery.search_space import SearchSpace
from circuits.evaluation.evaluate import Evaluation, chosen_metrics, evaluate
from circuits.graph.circuit import FILE, Circuit
from circuits.graph.graph import Graph
from circuits.models import Model, counting_passes
from circuits.models.component_graph import computed_nodes
from circuits.plotting.pages import circuit_page
from circuits.running.ablation import Ablation, get_ablation
from circuits.runs.run_folder import RECORD, describe_setup, locked, read_record
from circuits.system.code_digest import code_digest
from circuits.system.errors import InputError, NotWrittenError
from circuits.system.files import is_file, json_text, path_of, read_json, write_bytes, write_json
from circuits.system.kinds import expect
from circuits.system.numbers import WholeNumber, whole
from circuits.system.ranks import RankError, on_first, ranks, totals
from circuits.system.tensors import digest
from circuits.tasks.metrics import Metric
from circuits.tasks.model_fit import check_task
from circuits.tasks.task import Task

METRICS, PAGE, CHECKPOINT = "metrics.json", "circuit.html", "checkpoint.safetensors"
RECORD_FORMAT, METRICS_FORMAT, FORMAT_VERSION = "circuits.run", "circuits.metrics", 1
# What a record must hold, with the type in JSON.
IN_RECORD: dict[str, Any] = {
    "method": str,
    "settings": dict,
    "seconds": int | float,
    "forward_passes": int | float,
}


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
    **part: Any,
) -> CircuitRun:
    """Discover a circuit into a run folder, resume an interrupted run, or return a finished one.

    A run is found again for the same code and data, prompts and graph, and for a model with the
    same weights, settings, modules and hooks. What cannot be hashed is said, and never found again.

    Args:
        out: the folder of all runs.
        graph: the edges to choose from; by default the component graph, or the method's own graph.
        notes: recorded as well, for example the names and seeds of model and task.
        part: where a search may search, as in `CircuitDiscoverer.discover`: `start`, `frozen_in`,
            `frozen_out`, `layers` and `nodes`.

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
    notes = {} if notes is None else notes
    expect(notes, Mapping, "a dict as notes", "give {'seed': 0}, or leave it out")
    # A note that has no form in JSON is told before the search.
    json_text(notes)
    # An iterator would be empty at its second reading.
    part = {
        name: list(value) if isinstance(value, Iterator) else value
        for name, value in part.items()
        if value is not None
    }
    space = discoverer.search_space(model, graph, **part)
    key = on_first(lambda: _digest(discoverer, model, task, space))
    folder = path_of(out) / task.name / f"{discoverer.name}-{key[:8]}"
    # Only the first rank looks: another may see the folder late, on a network disk.
    if on_first(lambda: is_file(folder / RECORD)):
        return on_first(lambda: _found_again(folder, key))
    with locked(folder, on=on_first):
        if on_first(lambda: is_file(folder / RECORD)):
            return on_first(lambda: _found_again(folder, key))
        checkpoint = folder / CHECKPOINT
        resumed = is_file(checkpoint)
        started = time.perf_counter()
        with counting_passes(model) as passes:
            circuit = _discover(discoverer, model, task, checkpoint, progress, space, part)
        seconds = time.perf_counter() - started
        record = {
            **_describe(discoverer, model, task, circuit),
            **totals(passes),
            "resumed": resumed,
            "seconds": seconds,
            "notes": dict(notes),
            "key": key,
        }
        found = CircuitRun(folder, circuit, record, reused=False)
        return on_first(lambda: _save(found))


def _found_again(folder: Path, key: str) -> CircuitRun:
    found = load_run(folder)
    # The name of the folder holds a part of the key, and folders can be renamed.
    if found.record.get("key", key) != key:
        raise InputError(
            f"{folder} holds another run than its name says; move it away or give another out."
        )
    return found


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
    if not is_file(folder / RECORD):
        remedy = f"give a folder with {RECORD} and {FILE}"
        if is_file(folder / CHECKPOINT):
            remedy = "it is unfinished: give the same discover command again to resume it"
        raise InputError(f"{folder} holds no finished run; {remedy}.")
    record = read_record(folder, RECORD_FORMAT, FORMAT_VERSION, IN_RECORD)
    circuit = Circuit.load(folder)
    return CircuitRun(folder, circuit, record, reused=True)


def evaluate_run(
    found: CircuitRun,
    model: Model,
    task: Task,
    *,
    metrics: str | Metric | Sequence[str | Metric] | None = None,
    ablation: str | Ablation = "resample",
    size: WholeNumber | None = None,
) -> dict[str, Any]:
    """Evaluate a run's circuit on other prompts, unless its `metrics.json` has the evaluation.

    Where the folder cannot be written, the evaluation is computed and a warning says why it is not
    kept.

    Args:
        size: the number of highest-scored edges to keep; by default the circuit as it is.

    Raises:
        InputError: circuit, model and task do not fit together, or the file is damaged.
    """
    check_task(model, task)
    expect(found, CircuitRun, "a run", "read it with circuits.load_run")
    size = None if size is None else whole(size, "size")
    chosen = chosen_metrics(metrics, task)
    get_ablation(ablation)
    settings = {
        "task": task.name,
        "prompts": task.digest(),
        "metrics": None if metrics is None else as_json(chosen),
        "ablation": as_json(ablation),
        "size": size,
    }
    code = code_digest(chosen, ablation, model).key()
    circuit = found.circuit
    key = digest([settings, code], (circuit.kept, circuit.scores), size=8)
    if key in (known := _evaluations(found)):
        return known[key]
    with _locked_if_possible(found.folder):
        known = _evaluations(found)
        if key not in known:
            circuit = circuit if size is None else circuit.top(size)
            evaluation = evaluate(model, circuit, task, metrics=chosen, ablation=ablation)
            known[key] = {
                **settings,
                "n_prompts": len(task),
                "edges": len(circuit),
                "values": _values(evaluation),
                "notes": list(evaluation.notes),
            }
            _keep(found, known)
    return known[key]


def _evaluations(found: CircuitRun) -> dict[str, Any]:
    """The evaluations in `metrics.json`, by what they depend on."""
    path = found.folder / METRICS
    if not is_file(path):
        return {}
    known = read_json(path, METRICS_FORMAT, FORMAT_VERSION).get("evaluations")
    if not isinstance(known, dict) or not all(isinstance(each, dict) for each in known.values()):
        raise InputError(f"{path} is damaged: it holds no evaluations; delete it.")
    return known


@contextlib.contextmanager
def _locked_if_possible(folder: Path) -> Iterator[None]:
    with contextlib.ExitStack() as stack:
        with contextlib.suppress(NotWrittenError):
            stack.enter_context(locked(folder))
        yield


def _keep(found: CircuitRun, evaluations: Mapping[str, Any]) -> None:
    path = found.folder / METRICS
    try:
        write_json(path, {"evaluations": evaluations}, METRICS_FORMAT, FORMAT_VERSION)
    except NotWrittenError as error:
        warnings.warn(f"the evaluation is not kept: {error}", stacklevel=3)


def _values(evaluation: Evaluation) -> dict[Any, Any]:
    """The table of an evaluation by metric and column, as JSON values."""
    table = evaluation.table()
    # JSON has no NaN: a value that is not defined is null.
    defined = table.astype(object).where(table.notna(), None)
    return defined.to_dict(orient="index")


def _discover(
    discoverer: CircuitDiscoverer,
    model: Model,
    task: Task,
    checkpoint: Path,
    progress: Progress | None,
    space: SearchSpace,
    part: Mapping[str, Any],
) -> Circuit:
    options = {"graph": space.graph, "progress": progress, **part}
    if isinstance(discoverer, Resumable):
        options["checkpoint"] = checkpoint
    try:
        circuit = discoverer.discover(model, task, **options)
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


def _digest(discoverer: CircuitDiscoverer, model: Model, task: Task, space: SearchSpace) -> str:
    """Hash what a run depends on."""
    method = discoverer.identity() | space.identity()
    return search_digest(method, model, space.graph, task)


def _describe(
    discoverer: CircuitDiscoverer, model: Model, task: Task, circuit: Circuit
) -> dict[str, Any]:
    graph = circuit.graph
    prompts = {"prompts": len(task), "digest": task.digest(), "left_out": dict(task.left_out)}
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
