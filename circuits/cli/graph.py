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
from circuits.cli.options import ModelOptions, chosen_model, parse
from circuits.discovery.methods.attribution_graph import AttributionGraph, Explained
from circuits.formats.neuronpedia import save_neuronpedia
from circuits.models import EMBEDDED
from circuits.runs.graph_run import PAGE, GraphRun, run_graph, score_text
from circuits.system.errors import InputError

NEURONPEDIA = "neuronpedia.json"
SHOWN = 12


@dataclass(frozen=True)
class GraphOptions(ModelOptions):
    """Which features, at which positions, made the model say this: an attribution graph, into a
    folder with a page to explore it.

    circuits graph "The capital of the state containing Dallas is"
    circuits graph "The capital of the state containing Dallas is" --explain " Austin" --transcoders
    toy-world-plt
    circuits graph "Fact: the capital of Texas is" --model gpt2 --transcoders my/transcoders
    --budget 5000 --neuronpedia
    """

    prompt: tyro.conf.Positional[str] = dataclasses.field(kw_only=True)
    """The prompt's text."""
    transcoders: str | None = None
    """A folder, a hub address (hf://owner/name), or embedded ones: toy-world-plt,
    toy-world-skip-plt, toy-world-clt (the default for toy-world).
    """
    explain: str | None = None
    """The token to explain, with its leading space where the text has one; two separated by /
    explain their difference.
    By default the most probable next tokens."""
    budget: int | None = None
    """How many features get edges into them, the most influential ones; by default all active
    features.
    """
    node_threshold: float = 0.8
    """The share of influence that the nodes shown at first make."""
    edge_threshold: float = 0.98
    """The share that the edges shown at first make of what is then left."""
    leading: int = 1
    """So many first positions have no features (beginning-of-sequence tokens)."""
    neuronpedia: bool = False
    """Write the pruned graph as Neuronpedia's JSON too."""
    out: Path = Path("runs")
    """The folder of all runs. A graph that is there already is not computed again."""


def graph(words: Sequence[str]) -> None:
    """An attribution graph of one prompt, into a folder.

    Raises:
        InputError: something given cannot be used.
    """
    options: GraphOptions = parse(GraphOptions, "graph", words)
    method = AttributionGraph(
        _transcoders(options),
        budget=options.budget,
        node_threshold=options.node_threshold,
        edge_threshold=options.edge_threshold,
        leading=options.leading,
    )
    model = chosen_model(options)
    notes = {"model": options.model or EMBEDDED, "transcoders": _transcoders(options)}
    found = run_graph(
        method,
        model,
        options.prompt,
        explain=_explained(options.explain),
        out=options.out,
        notes=notes,
    )
    if options.neuronpedia:
        save_neuronpedia(
            found.graph,
            found.folder / NEURONPEDIA,
            slug=found.folder.name,
            node_threshold=options.node_threshold,
            edge_threshold=options.edge_threshold,
        )
    if options.json:
        print_json({"folder": str(found.folder), "reused": found.reused, **found.record})
    else:
        _show(found)


def _transcoders(options: GraphOptions) -> str:
    if options.transcoders is not None:
        return options.transcoders
    if options.model not in (None, EMBEDDED):
        raise InputError(
            f"which transcoders of {options.model}? Give --transcoders: a folder or a hub address, "
            f"such as hf://owner/name."
        )
    return f"{EMBEDDED}-clt"


def _explained(text: str | None) -> list[Explained] | None:
    if text is None:
        return None
    right, slash, wrong = text.partition("/")
    if slash and right.strip() and wrong.strip():
        return [(right, wrong)]
    return [text]


def _show(found: GraphRun) -> None:
    record, console = found.record, Console()
    said = (
        f"{found.graph.prompt!r} -> {', '.join(repr(label) for label in record['explained'][:3])}"
    )
    title = f"{said}: the {SHOWN} most influential of {record['features']:,} active features"
    console.print(frame_table(_features(found.graph), title))
    console.print(
        f"After pruning {record['kept_features']:,} features and {record['kept_edges']:,} of "
        f"{record['edges']:,} edges are left. "
        f"Replacement score {score_text(record['replacement_score'])} (share of influence from "
        f"tokens, not errors), "
        f"completeness score {score_text(record['completeness_score'])}."
    )
    console.print(
        f"{'Found again' if found.reused else 'Saved'}: {found.folder / PAGE}", soft_wrap=True
    )


def _features(graph: FeatureGraph) -> pd.DataFrame:
    """The most influential features: where they fire, how strongly, and their strongest input."""
    reached = node_influence(graph)
    reached /= reached.sum()
    reached[~graph.is_kind(FEATURE)] = -1
    rows = []
    for number in reached.argsort(descending=True)[
        : min(SHOWN, int((reached >= 0).sum()))
    ].tolist():
        node = graph.node(number)
        into = graph.incoming(node, 1)
        rows.append(
            {
                "feature": str(node),
                "token": graph.words[int(graph.nodes.position[number])],
                "activation": float(graph.nodes.activation[number]),
                "share of influence": float(reached[number]),
                "strongest input": into["node"].iloc[0] if len(into) else "",
            }
        )
    return pd.DataFrame(rows).set_index("feature")
