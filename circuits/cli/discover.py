"""circuits discover."""

from __future__ import annotations

from typing import Any

from circuits.cli.console import edge_table, print_place, print_run, terminal
from circuits.cli.evaluate import check_size, show_evaluation, size_needed
from circuits.cli.inputs import held_out_of, model_of, notes_of, task_to_search
from circuits.cli.parsing.checks import layers_of, positions_of
from circuits.cli.parsing.methods import find_method
from circuits.cli.parsing.options import DiscoverOptions
from circuits.cli.progress import phase, progress_bar
from circuits.graph.circuit import Circuit
from circuits.graph.graph import Graph
from circuits.models import Model
from circuits.models.component_graph import component_graph
from circuits.runs.circuit_run import CircuitRun, evaluate_run, run
from circuits.system.errors import InputError
from circuits.system.ranks import is_first


def command(options: DiscoverOptions, settings: dict[str, Any]) -> None:
    """Find a circuit into a run folder, and evaluate it on held-out prompts."""
    discoverer = find_method(options.method)(**settings)
    model = model_of(options)
    task = task_to_search(options, model)
    with progress_bar(f"{discoverer.name} on {task.name}", quiet=options.json) as progress:
        found = run(
            discoverer,
            model,
            task,
            out=options.out,
            graph=_graph(model, options),
            progress=progress,
            notes=notes_of(options),
            start=_start(options),
            layers=layers_of(options.layers),
        )
    # All ranks search, and the first evaluates.
    if not is_first():
        return
    if not found.circuit.selected and options.size is None:
        _show_scores(found, options)
        return
    check_size(found, options.size)
    held_out = held_out_of(options, model, task)
    ablation = getattr(discoverer, "ablation", "resample")
    with phase(f"evaluating on {len(held_out)} prompts", quiet=options.json):
        evaluation = evaluate_run(found, model, held_out, size=options.size, ablation=ablation)
    show_evaluation(found, evaluation, options)


def _graph(model: Model, options: DiscoverOptions) -> Graph | None:
    """The graph that the options ask for; None leaves it to the method."""
    if not (options.split_embed or options.positions):
        return None
    positions = positions_of(options.positions)
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


def _show_scores(found: CircuitRun, options: DiscoverOptions) -> None:
    if options.json:
        print_run(found, {"edges": len(found.circuit)})
        return
    console = terminal()
    console.print(edge_table(found.circuit))
    console.print(size_needed(found))
    print_place(found, found.folder)
