"""circuits graph."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
from tyro.conf import Positional

from circuits.attribution.feature_graph import FEATURE, FeatureGraph
from circuits.attribution.influence import node_influence
from circuits.cli.console import frame_table, print_run, terminal
from circuits.cli.options import ModelOptions, Unprefixed
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


def command(
    prompt: Positional[str],
    source: Unprefixed[ModelOptions],
    transcoders: str | None = None,
    explain: str | None = None,
    budget: int | None = None,
    node_threshold: float = 0.8,
    edge_threshold: float = 0.98,
    leading: int = 1,
    prepend_bos: bool | None = None,
    neuronpedia: bool = False,
    out: Path = Path("runs"),
) -> None:
    """Compute which features, at which positions, made the model say this: an attribution graph.

    The run folder gets a page to explore the graph.

    $ circuits graph "The capital of the state containing Dallas is"
    $ circuits graph "The capital of Texas is" --explain " Austin" --transcoders toy-world-plt
    $ circuits graph "Fact: the" --model gpt2 --transcoders my_set --budget 5000 --neuronpedia

    Args:
        prompt: The prompt's text.
        source: The model.
        transcoders: A folder, a hub address (hf://owner/name), or embedded ones: toy-world-plt,
            toy-world-skip-plt, toy-world-clt (the default for toy-world).
        explain: The token to explain, with its leading space if it has one in the text; two tokens
            separated by / explain their difference. By default the most probable next tokens.
        budget: Number of features that get incoming edges, the most influential ones; by default
            all.
        node_threshold: Share of the influence that the nodes shown at first have.
        edge_threshold: Share of the influence between these nodes that the edges shown at first
            have.
        leading: Number of first positions without features (beginning-of-sequence tokens).
        prepend_bos: Begin the prompt with exactly one BOS token, or (False) take it as it is; by
            default as the model does.
        neuronpedia: Write the pruned graph as Neuronpedia's JSON, too.
        out: The folder of all runs. A graph that is already there is not computed again.
    """
    method = AttributionGraph(
        _transcoders(transcoders, source.model),
        budget=budget,
        node_threshold=node_threshold,
        edge_threshold=edge_threshold,
        leading=leading,
    )
    notes = {"model": source.model or EMBEDDED, "transcoders": method.transcoders}
    model, explained = source.load_model(), _explained(explain)
    found = run_graph(
        method,
        model,
        prompt,
        explain=explained,
        prepend_bos=prepend_bos,
        out=out,
        notes=notes,
    )
    if neuronpedia:
        save_neuronpedia(
            found.graph,
            found.folder / "neuronpedia.json",
            slug=found.folder.name,
            node_threshold=node_threshold,
            edge_threshold=edge_threshold,
        )
    if source.json:
        print_run(found, found.record)
    else:
        _show(found)


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
    page = found.folder / PAGE
    console.print(f"{'Found again' if found.reused else 'Saved'}: {page}", soft_wrap=True)


def _top_features(graph: FeatureGraph) -> pd.DataFrame:
    """The most influential features: where they fire, how strongly, and their strongest input."""
    influence = node_influence(graph)
    total = influence.sum()
    is_feature = graph.is_kind(FEATURE)
    features = is_feature.nonzero().flatten()
    order = influence[features].argsort(descending=True)
    most_influential = features[order]
    rows = {}
    for number in most_influential[:N_SHOWN]:
        node = graph.node(int(number))
        position = graph.nodes.position[number]
        rows[str(node)] = {
            "token": graph.words[position],
            "activation": float(graph.nodes.activation[number]),
            "share of influence": float(influence[number] / total),
            "strongest input": "".join(graph.incoming(node, 1)["node"]),
        }
    table = pd.DataFrame.from_dict(rows, orient="index")
    return table.rename_axis("feature")
