"""circuits graph."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
import tyro
from rich.console import Console

from circuits.attribution.feature_graph import FEATURE, FeatureGraph
from circuits.attribution.influence import node_influence
from circuits.cli.console import frame_table, print_json
from circuits.cli.options import ModelOptions
from circuits.discovery.methods.attribution_graph import AttributionGraph, Explained
from circuits.formats.neuronpedia import save_neuronpedia
from circuits.models import EMBEDDED
from circuits.runs.graph_run import PAGE, GraphRun, run_graph
from circuits.system.errors import InputError

NEURONPEDIA = "neuronpedia.json"
N_SHOWN = 12


@dataclass(frozen=True)
class GraphOptions(ModelOptions):
    """Compute which features, at which positions, made the model say this: an attribution graph.

    The run folder gets a page to explore the graph.

    circuits graph "The capital of the state containing Dallas is"
    circuits graph "The capital of Texas is" --explain " Austin" --transcoders toy-world-plt
    circuits graph "Fact: the" --model gpt2 --transcoders my/transcoders --budget 5000 --neuronpedia
    """

    prompt: tyro.conf.Positional[str] = dataclasses.field(kw_only=True)
    """The prompt's text."""
    transcoders: str | None = None
    """A folder, a hub address (hf://owner/name), or embedded ones: toy-world-plt,
    toy-world-skip-plt, toy-world-clt (the default for toy-world)."""
    explain: str | None = None
    """The token to explain, with its leading space if it has one in the text; two tokens separated
    by / explain their difference. By default the most probable next tokens."""
    budget: int | None = None
    """Number of features that get incoming edges, the most influential ones; by default all."""
    node_threshold: float = 0.8
    """Share of the influence that the nodes shown at first have."""
    edge_threshold: float = 0.98
    """Share of the influence between these nodes that the edges shown at first have."""
    leading: int = 1
    """Number of first positions without features (beginning-of-sequence tokens)."""
    neuronpedia: bool = False
    """Write the pruned graph as Neuronpedia's JSON, too."""
    out: Path = Path("runs")
    """The folder of all runs. A graph that is already there is not computed again."""


def graph_command(words: Sequence[str]) -> None:
    """Compute the attribution graph of a prompt into a run folder."""
    options = tyro.cli(GraphOptions, prog="circuits graph", args=words)
    thresholds = {name: getattr(options, name) for name in ("node_threshold", "edge_threshold")}
    transcoders = _transcoders(options)
    method = AttributionGraph(
        transcoders, budget=options.budget, leading=options.leading, **thresholds
    )
    found = run_graph(
        method,
        options.load_model(),
        options.prompt,
        explain=_explained(options.explain),
        out=options.out,
        notes={"model": options.model or EMBEDDED, "transcoders": transcoders},
    )
    if options.neuronpedia:
        path = found.folder / NEURONPEDIA
        save_neuronpedia(found.graph, path, slug=found.folder.name, **thresholds)
    if options.json:
        print_json({"folder": str(found.folder), "reused": found.reused, **found.record})
    else:
        _show(found)


def _transcoders(options: GraphOptions) -> str:
    if options.transcoders is None and options.model not in (None, EMBEDDED):
        raise InputError(
            f"which transcoders of {options.model}? "
            "Give --transcoders: a folder or a hub address, such as hf://owner/name."
        )
    return options.transcoders or f"{EMBEDDED}-clt"


def _explained(text: str | None) -> list[Explained] | None:
    if text is None:
        return None
    right, _, wrong = text.partition("/")
    return [(right, wrong)] if right.strip() and wrong.strip() else [text]


def _show(found: GraphRun) -> None:
    console = Console()
    title = f"{found.graph.prompt!r}: the most influential features"
    console.print(frame_table(_top_features(found.graph), title))
    for name, text in found.details.items():
        console.print(f"{name}: {text}")
    page = found.folder / PAGE
    console.print(f"{'Found again' if found.reused else 'Saved'}: {page}", soft_wrap=True)


def _top_features(graph: FeatureGraph) -> pd.DataFrame:
    """The most influential features: where they fire, how strongly, and their strongest input."""
    influence = node_influence(graph)
    total = influence.sum()
    features = graph.is_kind(FEATURE).nonzero().flatten()
    order = influence[features].argsort(descending=True)
    rows = []
    for number in features[order][:N_SHOWN].tolist():
        node = graph.node(number)
        row = {
            "feature": str(node),
            "token": graph.words[int(graph.nodes.position[number])],
            "activation": float(graph.nodes.activation[number]),
            "share of influence": float(influence[number] / total),
            "strongest input": "".join(graph.incoming(node, 1)["node"]),
        }
        rows.append(row)
    return pd.DataFrame(rows).set_index("feature")
