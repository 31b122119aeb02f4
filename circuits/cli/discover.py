"""circuits discover."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro
from rich.console import Console

from circuits.cli.console import edge_table, print_json, progress_bar
from circuits.cli.evaluate import show_evaluation
from circuits.cli.methods import find_method, options_of
from circuits.cli.options import Common, chosen_model, chosen_task, notes, parse
from circuits.graph.graph import Graph
from circuits.models import Model
from circuits.models.component_graph import component_graph
from circuits.runs.circuit_run import evaluate_run, run
from circuits.system.ranks import is_first


@dataclass(frozen=True)
class DiscoverOptions(Common):
    """Find a circuit on prompts of the train split, into a run folder; evaluate it on held-out
    ones.

    circuits discover --method acdc --threshold 0.01 --task ioi
    circuits discover --method eap-ig --steps 10 --task greater_than --size 50
    circuits discover --method eap --data prompts.jsonl --model gpt2 --size 200
    torchrun --nproc-per-node=4 -m -- circuits discover --method acdc --threshold 0.01 --n 64

    The last one shares the work among four devices; without `--`, torchrun takes `--n` for an
    option of its own.
    """

    method: str = "acdc"
    """A method's name (`circuits list` shows them), or a Python file that defines one.

    The options below are the method's own.
    """
    n: int = 64
    """Prompts to discover on."""
    n_eval: int = 64
    """Held-out prompts to evaluate on."""
    size: int | None = None
    """How many of the highest-scored edges to evaluate; for methods that only score."""
    split_embed: bool = False
    """Token and position embedding as two nodes."""
    positions: str | None = None
    """Split edges by span: names separated by commas, such as IO,S1,S1+1,S2,END; or by position:
    the number of positions.
    """
    out: Path = Path("runs")
    """The folder of all runs. A run that is there already is not computed again."""


def discover(words: Sequence[str]) -> None:
    """Find a circuit into a run folder, and judge it on held-out prompts.

    Raises:
        InputError: something given cannot be used.
    """
    kind = find_method(_value_of(words, "--method") or "acdc")
    taken = {field.name for field in dataclasses.fields(DiscoverOptions)}
    together = dataclasses.make_dataclass(
        "Discover",
        [
            ("common", Annotated[DiscoverOptions, tyro.conf.arg(name="")]),
            ("chosen", Annotated[options_of(kind, taken), tyro.conf.arg(name="")]),
        ],
    )
    together.__doc__ = (
        f"{DiscoverOptions.__doc__}\n\nThe method at hand is {kind.name}; its options come last."
    )
    parsed = parse(together, "discover", words)
    options: DiscoverOptions = parsed.common
    discoverer = kind(**dataclasses.asdict(parsed.chosen))
    model = chosen_model(options)
    asked = options.split_embed or options.positions
    graph = _graph(model, options) if asked else None
    task = chosen_task(options, model, options.n, "train")
    with progress_bar(f"{kind.name} on {task.name}", quiet=options.json) as progress:
        found = run(
            discoverer,
            model,
            task,
            out=options.out,
            graph=graph,
            progress=progress,
            notes=notes(options),
        )
    if not is_first():
        return
    held_out = task if options.data else chosen_task(options, model, options.n_eval, "test")
    if found.circuit.selected or options.size is not None:
        ablation = getattr(discoverer, "ablation", "resample")
        show_evaluation(
            found,
            evaluate_run(found, model, held_out, size=options.size, ablation=ablation),
            options,
        )
        return
    if options.json:
        print_json(
            {"folder": str(found.folder), "edges": len(found.circuit), "reused": found.reused}
        )
        return
    console = Console()
    console.print(edge_table(found.circuit))
    console.print(
        f"{kind.name} scores every edge and chooses none: give --size N to evaluate the N "
        f"highest-scored ones."
    )
    console.print(f"{'Found again' if found.reused else 'Saved'}: {found.folder}", soft_wrap=True)


def _graph(model: Model, options: DiscoverOptions) -> Graph:
    positions: list[str] | int | None = options.positions.split(",") if options.positions else None
    if options.positions and options.positions.isdecimal():
        positions = int(options.positions)
    return component_graph(model, split_embed=options.split_embed, positions=positions)


def _value_of(words: Sequence[str], option: str) -> str | None:
    for index, word in enumerate(words):
        if word == option and index + 1 < len(words):
            return words[index + 1]
        if word.startswith(f"{option}="):
            return word.partition("=")[2]
    return None
