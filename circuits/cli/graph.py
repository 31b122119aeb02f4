"""circuits graph."""

from __future__ import annotations

import pandas as pd

from circuits.attribution.feature_graph import FEATURE, FeatureGraph
from circuits.attribution.influence import node_influence
from circuits.cli.console import frame_table, print_place, print_run, terminal
from circuits.cli.inputs import model_of
from circuits.cli.parsing.options import GraphOptions
from circuits.cli.progress import phase
from circuits.discovery.methods.attribution_graph import AttributionGraph, Explained
from circuits.formats.neuronpedia import save_neuronpedia
from circuits.models import EMBEDDED
from circuits.runs.graph_run import PAGE, GraphRun, run_graph
from circuits.system.errors import InputError

N_SHOWN = 12
N_LABELS = 3  # of the explained logits
REPLACEMENT_SCORE_EXPLAINED = (
    "The replacement score is the share of influence from tokens, not errors."
)


def command(options: GraphOptions) -> None:
    """Compute a prompt's attribution graph into a run folder."""
    method = AttributionGraph(
        _transcoders(options.transcoders, options.model),
        budget=options.budget,
        node_threshold=options.node_threshold,
        edge_threshold=options.edge_threshold,
        leading=options.leading,
    )
    name = options.model or EMBEDDED
    model, explained = model_of(options), _explained(options.explain)
    with phase("computing the attribution graph", quiet=options.json):
        found = run_graph(
            method,
            model,
            options.prompt,
            explain=explained,
            prepend_bos=options.prepend_bos,
            out=options.out,
            notes={"model": name, "transcoders": method.transcoders},
        )
        if options.neuronpedia:
            _save_neuronpedia(found, options)
    if options.json:
        print_run(found, found.record)
    else:
        _show(found)


def _save_neuronpedia(found: GraphRun, options: GraphOptions) -> None:
    save_neuronpedia(
        found.graph,
        found.folder / "neuronpedia.json",
        slug=found.folder.name,
        node_threshold=options.node_threshold,
        edge_threshold=options.edge_threshold,
    )


def _transcoders(given: str | None, model: str | None) -> str:
    # Only the embedded model has embedded transcoders.
    if given is None and model not in (None, EMBEDDED):
        raise InputError(
            f"which transcoders of {model}? "
            "Give --transcoders: a folder or a hub address, such as hf://owner/name."
        )
    return given or f"{EMBEDDED}-clt"


def _explained(text: str | None) -> list[Explained] | None:
    if text is None:
        return None
    # "/" itself, or with text on one side only, is a token.
    right, _, wrong = text.partition("/")
    is_pair = right.strip() and wrong.strip()
    return [(right, wrong) if is_pair else text]


def _show(found: GraphRun) -> None:
    console = terminal()
    features = _top_features(found.graph)
    labels = map(repr, found.record["explained"][:N_LABELS])
    counts = f"{len(features)} most influential of {found.record['features']:,} active features"
    title = f"{found.graph.prompt!r} -> {', '.join(labels)}: the {counts}"
    console.print(frame_table(features, title))
    for name, text in found.details.items():
        console.print(f"{name}: {text}")
    console.print(REPLACEMENT_SCORE_EXPLAINED)
    print_place(found, found.folder / PAGE)


def _top_features(graph: FeatureGraph) -> pd.DataFrame:
    """The most influential features: where they fire, how strongly, and their strongest input."""
    influence = node_influence(graph)
    total = influence.sum()
    features = graph.is_kind(FEATURE).nonzero().flatten()
    order = influence[features].argsort(descending=True)
    rows = {}
    for number in features[order][:N_SHOWN]:
        node = graph.node(int(number))
        inputs = graph.incoming(node, 1)
        rows[str(node)] = {
            "token": graph.words[graph.nodes.position[number]],
            "activation": float(graph.nodes.activation[number]),
            "share of influence": float(influence[number] / total),
            "strongest input": "".join(inputs["node"]),
        }
    table = pd.DataFrame.from_dict(rows, orient="index")
    return table.rename_axis("feature")
