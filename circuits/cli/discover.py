"""circuits discover."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import tyro

from circuits.cli.console import edge_table, print_run, progress_bar, terminal
from circuits.cli.evaluate import show_evaluation, size_needed
from circuits.cli.methods import find_method, options_of
from circuits.cli.options import TaskOptions, Unprefixed
from circuits.discovery.discoverer import CircuitDiscoverer
from circuits.graph.circuit import Circuit
from circuits.graph.graph import Graph
from circuits.models import Model
from circuits.models.component_graph import component_graph
from circuits.runs.circuit_run import CircuitRun, evaluate_run, run
from circuits.system.errors import InputError
from circuits.system.ranks import is_first


@dataclass(frozen=True)
class DiscoverOptions(TaskOptions):
    """Find a circuit on prompts of the train split, and evaluate it on held-out prompts.

    $ circuits discover --method acdc --threshold 0.01 --task ioi
    $ circuits discover --method eap-ig --steps 10 --task greater_than --size 50
    $ circuits discover --method eap --data prompts.jsonl --model gpt2 --size 200
    $ circuits discover --method acdc --threshold 0.01 --start runs/ioi/eap-1a2b3c4d --start-size 99
    $ torchrun --nproc-per-node=4 -m -- circuits discover --method acdc --threshold 0.01 --n 64

    The last one shares the work among four devices. Without `--`, torchrun would take `--n` for
    one of its own options.
    """

    method: str = "acdc"
    """A method's name (`circuits list` shows them), or a Python file that defines one.
    The last options are the method's own."""
    n: int = 64
    """Number of prompts to discover on."""
    n_eval: int = 64
    """Number of held-out prompts to evaluate on."""
    size: int | None = None
    """Number of highest-scored edges to evaluate, for methods that only score."""
    split_embed: bool = False
    """Make token and position embedding two nodes."""
    positions: str | None = None
    """Split edges by span (names separated by commas, such as IO,S1,S1+1,S2,END), or by position
    (the number of positions)."""
    layers: str | None = None
    """Try only edges into heads and MLPs of these layers, such as 6-11 or 0,2-4; for methods that
    search."""
    start: Path | None = None
    """Start the search from the circuit of this run folder; edges outside it are ablated."""
    start_size: int | None = None
    """Start from that many edges of that circuit, grown from the logits by their |score|."""
    out: Path = Path("runs")
    """The folder of all runs. A run that is already there is not computed again."""


def discover(words: Sequence[str]) -> None:
    """Find a circuit into a run folder, and evaluate it on held-out prompts."""
    options, discoverer = _parse(words)
    model = options.load_model()
    task = options.load_task(model, options.n, "train")
    with progress_bar(f"{discoverer.name} on {task.name}", quiet=options.json) as progress:
        found = run(
            discoverer,
            model,
            task,
            out=options.out,
            graph=_graph(model, options),
            progress=progress,
            notes=options.notes(),
            start=_start(options),
            layers=_layers(options.layers),
        )
    # All ranks search, and the first evaluates.
    if not is_first():
        return
    if not found.circuit.selected and options.size is None:
        _show_scores(found, options)
        return
    # Users' own prompts have no splits.
    held_out = task if options.data else options.load_task(model, options.n_eval, "test")
    ablation = getattr(discoverer, "ablation", "resample")
    evaluation = evaluate_run(found, model, held_out, size=options.size, ablation=ablation)
    show_evaluation(found, evaluation, options)


def _parse(words: Sequence[str]) -> tuple[DiscoverOptions, CircuitDiscoverer]:
    program = "circuits discover"
    # The method comes first, because its fields are options, too.
    chosen, _ = tyro.cli(
        DiscoverOptions, prog=program, args=words, return_unknown_args=True, add_help=False
    )
    kind = find_method(chosen.method)
    # A field called like one of the command's options gets another name.
    taken = [field.name for field in fields(DiscoverOptions)]
    settings: Any = options_of(kind, taken)
    both: Any = tuple[Unprefixed[DiscoverOptions], Unprefixed[settings]]
    description = f"{inspect.getdoc(DiscoverOptions)}\n\nThe options of {kind.name} come last."
    parsed = tyro.cli(both, prog=program, description=description, args=words)
    options, chosen_settings = parsed
    return options, kind(**vars(chosen_settings))


def _graph(model: Model, options: DiscoverOptions) -> Graph | None:
    """The graph that the options ask for; None leaves it to the method."""
    spans = options.positions
    if not (options.split_embed or spans):
        return None
    positions: list[str] | int | None = None
    if spans:
        positions = int(spans) if spans.isdecimal() else spans.split(",")
    return component_graph(model, split_embed=options.split_embed, positions=positions)


def _start(options: DiscoverOptions) -> Circuit | None:
    """The circuit to start from."""
    if options.start is None:
        return None
    circuit = Circuit.load(options.start)
    if options.start_size is not None:
        return circuit.greedy(options.start_size)
    if not circuit.selected:
        raise InputError(
            f"the method of --start {options.start} scores every edge and chooses none: give "
            "--start-size N to start from N of them."
        )
    return circuit


def _layers(text: str | None) -> list[int] | None:
    """The layers that a text such as 0,2-4 names."""
    if text is None:
        return None
    layers: list[int] = []
    for part in text.split(","):
        first, _, last = part.partition("-")
        if not (first.isdecimal() and (last or first).isdecimal()):
            raise InputError(f"--layers {text} names no layers; write them like 6-11 or 0,2-4.")
        layers += range(int(first), int(last or first) + 1)
    return layers


def _show_scores(found: CircuitRun, options: DiscoverOptions) -> None:
    if options.json:
        print_run(found, {"edges": len(found.circuit)})
        return
    console = terminal()
    console.print(edge_table(found.circuit))
    console.print(size_needed(found))
    console.print(f"{'Found again' if found.reused else 'Saved'}: {found.folder}", soft_wrap=True)
