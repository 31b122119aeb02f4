"""What each command of the command line does. A method's options are its dataclass fields, their help its docstring."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import importlib.util
import json
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_type_hints

import docstring_parser
import pandas as pd
import torch
import tyro
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, TextColumn, TimeRemainingColumn
from rich.progress import Task as ProgressTask
from rich.table import Table
from rich.text import Text

from circuits import discoverer as registry
from circuits.ablation import NAMES as ABLATIONS
from circuits.circuit import Circuit
from circuits.compare import Comparison, compare
from circuits.component_graph import component_graph
from circuits.discoverer import CircuitDiscoverer
from circuits.errors import InputError
from circuits.files import write_bytes, write_json
from circuits.graph import Graph
from circuits.metrics import METRICS
from circuits.models import EMBEDDED, Model, load_model
from circuits.plot import report_page
from circuits.run import Run, evaluate_run, load_run, run
from circuits.tasks import load_task, task_names
from circuits.tasks.base import Task

AblationName = Literal["resample", "zero", "mean", "mean_by_position"]
DTYPES = {"float32": torch.float32, "float64": torch.float64, "bfloat16": torch.bfloat16, "float16": torch.float16}
RANDOM_SEEDS = 5


@dataclass(frozen=True)
class Common:
    """What every command takes."""

    model: str = EMBEDDED
    """toy-world, a name TransformerLens knows (gpt2, pythia-160m), or a folder."""
    task: str = "ioi"
    """A task's name; `circuits list` shows them."""
    data: Path | None = None
    """Your own prompts instead of a task: a JSONL file, one object with clean, corrupted, answer, wrong_answer a line."""
    seed: int = 0
    """Of the prompts drawn."""
    device: str | None = None
    """cpu, cuda, cuda:1, ...; by default CUDA where there is one."""
    dtype: Literal["float32", "float64", "bfloat16", "float16"] = "float32"
    """Of the weights."""
    json: bool = False
    """Print JSON for programs instead of tables."""


@dataclass(frozen=True)
class DiscoverOptions(Common):
    """Find a circuit on prompts of the train split, into a run folder; evaluate it on held-out ones."""

    method: str = "acdc"
    """A method's name (`circuits list` shows them), or a Python file that defines one. The options below are the method's own."""
    n: int = 64
    """Prompts to discover on."""
    n_eval: int = 64
    """Held-out prompts to evaluate on."""
    size: int | None = None
    """How many of the highest-scored edges to evaluate and draw; for methods that only score."""
    split_embed: bool = False
    """Token and position embedding as two nodes."""
    positions: str | None = None
    """Split edges by span: names separated by commas, such as IO,S1,S1+1,S2,END."""
    out: Path = Path("runs")
    """The folder of all runs. A run that is there already is not computed again."""


@dataclass(frozen=True)
class EvaluateOptions(Common):
    """Run a saved circuit on held-out prompts, everything outside it ablated."""

    circuit: tyro.conf.Positional[Path] = Path()
    """A run folder."""
    n: int = 64
    """Held-out prompts."""
    size: int | None = None
    """How many of the highest-scored edges to keep; by default the circuit as it is."""
    metrics: str | None = None
    """Metrics separated by commas; by default kl, logit_difference and the task's own."""
    ablation: AblationName = "resample"
    """What edges outside the circuit carry."""


@dataclass(frozen=True)
class CompareOptions(Common):
    """Discover with several methods on the same prompts and judge them on the same held-out ones."""

    methods: str = "acdc,eap,eap-ig,random"
    """Methods separated by commas, with settings after colons: acdc:threshold=0.02:order=original,eap."""
    n: int = 16
    """Prompts to discover on."""
    n_eval: int = 64
    """Held-out prompts to evaluate on."""
    thresholds: str = "0.01,0.003,0.03,0.1"
    """Sweep of methods that take a threshold and are given none; the table shows the first."""
    size: int | None = None
    """Edges to give methods that only score; by default as many as the first selecting method keeps."""
    ablation: AblationName = "resample"
    """What edges outside a circuit carry."""
    out: Path = Path("runs")
    """The folder of all runs, the report's among them."""


@dataclass(frozen=True)
class ListOptions:
    """What there is to choose from."""

    json: bool = False
    """Print JSON for programs instead of tables."""


def run_command(name: str, words: Sequence[str]) -> None:
    """Parse a command's options and do it.

    Raises:
        InputError: something given cannot be used.
        SystemExit: the options could not be parsed, or help was asked for.
    """
    match name:
        case "discover":
            _discover(words)
        case "evaluate":
            _evaluate(_parse(EvaluateOptions, name, words))
        case "compare":
            _compare(_parse(CompareOptions, name, words))
        case "list":
            _list(_parse(ListOptions, name, words))


# Discover


def _discover(words: Sequence[str]) -> None:
    kind = find_method(_value_of(words, "--method") or "acdc")
    together = dataclasses.make_dataclass(
        "Discover",
        [("common", Annotated[DiscoverOptions, tyro.conf.arg(name="")]), ("chosen", Annotated[options_of(kind), tyro.conf.arg(name="")])],
    )
    together.__doc__ = f"{DiscoverOptions.__doc__}\n\nThe method at hand is {kind.name}; its options come last."
    parsed = _parse(together, "discover", words)
    options: DiscoverOptions = parsed.common
    discoverer = kind(**dataclasses.asdict(parsed.chosen))
    model = _load_model(options)
    graph = _graph(model, options)
    task = _load_task(options, model, options.n, "train")
    with progress_bar(f"{kind.name} on {task.name}", quiet=options.json) as progress:
        found = run(discoverer, model, task, out=options.out, graph=graph, progress=progress, notes=_notes(options))
    held_out = task if options.data else _load_task(options, model, options.n_eval, "test")
    if found.circuit.selected or options.size is not None:
        _show_evaluation(found, evaluate_run(found, model, held_out, size=options.size), options.json)
        return
    if options.json:
        _print_json({"folder": str(found.folder), "edges": len(found.circuit), "reused": found.reused})
        return
    console = Console()
    console.print(_edge_table(found.circuit))
    console.print(f"{kind.name} scores every edge and chooses none: give --size N to evaluate the N highest-scored ones.")
    console.print(f"{'Found again' if found.reused else 'Saved'}: {found.folder}", soft_wrap=True)


def _graph(model: Model, options: DiscoverOptions) -> Graph:
    names = options.positions.split(",") if options.positions else None
    return component_graph(model, split_embed=options.split_embed, positions=names)


# Evaluate


def _evaluate(options: EvaluateOptions) -> None:
    found = load_run(options.circuit)
    model = _load_model(options)
    task = _load_task(options, model, options.n, "test")
    metrics = options.metrics.split(",") if options.metrics else None
    _show_evaluation(found, evaluate_run(found, model, task, metrics=metrics, ablation=options.ablation, size=options.size), options.json)


def _show_evaluation(found: Run, evaluation: Mapping[str, Any], as_json: bool) -> None:
    if as_json:
        _print_json({"folder": str(found.folder), "reused": found.reused, **evaluation})
        return
    frame = pd.DataFrame.from_dict(evaluation["values"], orient="index")
    title = f"{found.record['method']}: {evaluation['edges']:,} of {len(found.circuit.graph):,} edges, {evaluation['n_prompts']} prompts"
    console = Console()
    console.print(_rich_table(frame.rename_axis("metric"), title))
    console.print(f"{'Found again' if found.reused else 'Saved'}: {found.folder}", soft_wrap=True)


# Compare


def _compare(options: CompareOptions) -> None:
    model = _load_model(options)
    task = _load_task(options, model, options.n, "train")
    held_out = task if options.data else _load_task(options, model, options.n_eval, "test")
    sweeps = {label: sweep for spec in options.methods.split(",") for label, sweep in [_sweep(spec, options)]}
    runs: dict[str, list[Run]] = {}
    for label, sweep in sweeps.items():
        runs[label] = []
        for discoverer in sweep:
            with progress_bar(_label(discoverer), quiet=options.json) as progress:
                runs[label].append(run(discoverer, model, task, out=options.out, progress=progress, notes=_notes(options)))
    found = {label: [finished.circuit for finished in several] for label, several in runs.items()}
    comparison = compare(model, found, held_out, size=options.size, ablation=options.ablation)
    seconds = {label: float(several[0].record["seconds"]) for label, several in runs.items()}
    passes = {label: int(several[0].record["forward_passes"]) for label, several in runs.items()}
    table = comparison.table.assign(**{"forward passes": pd.Series(passes), "seconds": pd.Series(seconds)})
    folder = options.out / task.name / f"compare-{_comparison_digest(options, runs, held_out)}"
    report = _write_report(folder, comparison, table, options, task, held_out)
    if options.json:
        _print_json({"report": str(report), "table": json.loads(table.to_json(orient="index"))})
        return
    console = Console()
    console.print(_rich_table(table, f"{task.name} in {options.model}: found on {len(task)} prompts, judged on {len(held_out)} others"))
    console.print(_rich_table(comparison.overlap, "Overlap of the circuits (Jaccard)"))
    console.print(f"Report: {report}", soft_wrap=True)


def _sweep(spec: str, options: CompareOptions) -> tuple[str, list[CircuitDiscoverer]]:
    """The discoverers that one entry of --methods means: a sweep of thresholds, several seeds, or one."""
    name, *settings = spec.strip().split(":")
    kind = find_method(name)
    fields = {field.name: field for field in dataclasses.fields(kind)}
    given = {}
    for setting in settings:
        key, equals, value = setting.partition("=")
        if not equals or key not in fields:
            raise InputError(
                f"--methods {spec!r}: {setting!r} is no setting of {kind.name}; it has {', '.join(fields)}, written threshold=0.01."
            )
        given[key] = value
    words = [word for key, value in given.items() for word in (f"--{key.replace('_', '-')}", value)]
    if "threshold" in fields and "threshold" not in given:
        return kind.name, [_make(kind, [*words, "--threshold", threshold]) for threshold in options.thresholds.split(",")]
    if kind.name == "random" and not given:
        return kind.name, [_make(kind, ["--seed", str(seed)]) for seed in range(RANDOM_SEEDS)]
    return spec if settings else kind.name, [_make(kind, words)]


def _make(kind: type[CircuitDiscoverer], words: Sequence[str]) -> CircuitDiscoverer:
    return kind(**dataclasses.asdict(_parse(options_of(kind), f"compare (settings of {kind.name})", words)))


def _label(discoverer: CircuitDiscoverer) -> str:
    varied = [f"{name}={getattr(discoverer, name)}" for name in ("threshold", "seed") if hasattr(discoverer, name)]
    return " ".join([discoverer.name, *varied])


def _comparison_digest(options: CompareOptions, runs: Mapping[str, Sequence[Run]], held_out: Task) -> str:
    parts = [[str(found.folder) for several in runs.values() for found in several], held_out.digest(), options.size, options.ablation]
    return hashlib.blake2b(json.dumps(parts).encode(), digest_size=4).hexdigest()


def _write_report(folder: Path, comparison: Comparison, table: pd.DataFrame, options: CompareOptions, task: Task, held_out: Task) -> Path:
    details = {
        "model": options.model,
        "task": task.name,
        "found on": f"{len(task)} prompts" if options.data else f"{len(task)} prompts of the train split, seed {options.seed}",
        "judged on": "the same prompts" if options.data else f"{len(held_out)} prompts of the test split",
        "ablation": options.ablation,
        "random": f"mean of {RANDOM_SEEDS} seeds",
    }
    content = {
        "details": details,
        "table": json.loads(table.to_json(orient="index")),
        "curves": json.loads(comparison.curves.to_json(orient="records")),
    }
    write_json(folder / "comparison.json", content, "circuits.comparison", 1)
    page = report_page(
        title=f"{task.name} in {options.model}", table=table, curves=comparison.curves, circuits=comparison.circuits, details=details
    )
    return write_bytes(folder / "report.html", page.encode())


# List


def _list(options: ListOptions) -> None:
    methods = {name: _first_line(kind) for name, kind in registry.discoverers().items()}
    content = {
        "methods": methods,
        "tasks": task_names(),
        "metrics": {name: (metric.function.__doc__ or "").strip() for name, metric in METRICS.items()},
        "ablations": list(ABLATIONS),
    }
    if options.json:
        _print_json(content)
        return
    console = Console()
    for title, entries in content.items():
        table = Table(title=title, title_justify="left", show_header=False)
        described = entries if isinstance(entries, dict) else dict.fromkeys(entries, "")
        for name, description in described.items():
            table.add_row(name, description)
        console.print(table)


def _first_line(kind: type) -> str:
    return (kind.__doc__ or "").strip().splitlines()[0] if kind.__doc__ else ""


# Methods and their options


def find_method(name: str) -> type[CircuitDiscoverer]:
    """A method by its name, or the one that a Python file defines (`file.py`, or `file.py:name` where it defines several).

    Raises:
        InputError: there is no such method or file, or the file defines none or several.
    """
    path, _, chosen = name.partition(":") if ".py" in name else ("", "", name)
    known = registry.discoverers()
    if path:
        before = set(known)
        _import_file(Path(path))
        known = {method: kind for method, kind in registry.discoverers().items() if method not in before}
        if not chosen and len(known) == 1:
            return next(iter(known.values()))
    if chosen not in known:
        where = f"{path} defines" if path else "there is no method " + repr(chosen) + "; there are"
        raise InputError(
            f"{where} {', '.join(known) or 'no CircuitDiscoverer with a name of its own'}. Give --method NAME or FILE.py:NAME."
        )
    return known[chosen]


def _import_file(path: Path) -> None:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    if spec is None or spec.loader is None or not path.is_file():
        raise InputError(f"there is no Python file {path}.")
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module
    spec.loader.exec_module(module)


def options_of(kind: type[CircuitDiscoverer]) -> type:
    """A dataclass of a method's fields that can be written on a command line, with the help its docstring gives."""
    hints = get_type_hints(kind)
    described = {entry.arg_name: entry.description for entry in docstring_parser.parse(kind.__doc__ or "").params}
    fields: list[Any] = []
    for field in dataclasses.fields(kind):
        kind_of_field: Any = _command_line_type(field.name, hints[field.name])
        annotated: Any = Annotated[kind_of_field, tyro.conf.arg(help=described.get(field.name, ""))]
        default = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
        fields.append(
            (field.name, annotated) if default is dataclasses.MISSING else (field.name, annotated, dataclasses.field(default=default))
        )
    made = dataclasses.make_dataclass(f"{kind.__name__}Options", fields, frozen=True)
    made.__doc__ = _first_line(kind)
    return made


def _command_line_type(name: str, hint: Any) -> Any:
    """What a field is on the command line: objects with names, such as metrics, are given by them."""
    choices = get_args(hint)
    if str not in choices:
        return hint
    if name == "ablation":
        return AblationName
    return str | None if type(None) in choices else str


# Shared


def _parse(kind: Any, name: str, words: Sequence[str]) -> Any:
    return tyro.cli(kind, prog=f"circuits {name}", args=list(words))


def _value_of(words: Sequence[str], option: str) -> str | None:
    for index, word in enumerate(words):
        if word == option and index + 1 < len(words):
            return words[index + 1]
        if word.startswith(f"{option}="):
            return word.partition("=")[2]
    return None


def _load_model(options: Common) -> Model:
    return load_model(options.model, device=options.device, dtype=DTYPES[options.dtype])


def _load_task(options: Common, model: Model, n: int, split: str) -> Task:
    return Task.from_jsonl(options.data, model) if options.data else load_task(options.task, model, n=n, seed=options.seed, split=split)


def _notes(options: Common) -> dict[str, Any]:
    return {"model": options.model, "task": options.task, "data": str(options.data) if options.data else None, "seed": options.seed}


@contextlib.contextmanager
def progress_bar(description: str, *, quiet: bool = False) -> Iterator[Callable[[int, int], None] | None]:
    """A bar on standard error with the rate and the remaining time; nothing when `quiet`."""
    if quiet:
        yield None
        return
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), _RateColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True)) as bar:
        row = bar.add_task(description, total=None)
        yield lambda done, total: bar.update(row, completed=done, total=total)


class _RateColumn(ProgressColumn):
    def render(self, task: ProgressTask) -> Text:
        speed = task.finished_speed or task.speed
        return Text(f"{speed:.1f}/s" if speed else "", style="progress.data.speed")


def _rich_table(frame: pd.DataFrame, title: str) -> Table:
    table = Table(title=title, title_justify="left")
    table.add_column(str(frame.index.name or ""))
    for column in frame.columns:
        table.add_column(str(column).replace("_", " "), justify="right")
    for name, row in zip(frame.index, frame.itertuples(index=False), strict=True):
        table.add_row(str(name), *(_cell(value) for value in row))
    return table


def _cell(value: Any) -> str:
    if value is None or value != value:
        return "-"
    return f"{value:,}" if isinstance(value, int) or (float(value).is_integer() and abs(value) >= 10) else f"{value:.3f}"


def _edge_table(circuit: Circuit, n: int = 15) -> Table:
    strongest = circuit.top(min(n, len(circuit)))
    pairs = zip(strongest.edges, strongest.scores[strongest.kept].tolist(), strict=True)
    table = Table(title=f"The {len(strongest)} edges of largest |score|", title_justify="left")
    table.add_column("edge")
    table.add_column("score", justify="right")
    for edge, score in sorted(pairs, key=lambda pair: -abs(pair[1])):
        table.add_row(str(edge), f"{score:+.4f}")
    return table


def _print_json(content: Any) -> None:
    sys.stdout.write(json.dumps(content, indent=2) + "\n")
