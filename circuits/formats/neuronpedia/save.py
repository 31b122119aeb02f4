"""Export of attribution graphs to Neuronpedia's JSON."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import circuits
from circuits.attribution.feature_graph import (
    EMBEDDING,
    ERROR,
    FEATURE,
    TARGET,
    FeatureGraph,
    NodeScores,
    check_is_feature_graph,
)
from circuits.attribution.influence import prune as choose_influential
from circuits.formats.neuronpedia.format import (
    FIRST_CUSTOM,
    SCHEMA_VERSION,
    SETTINGS,
    TYPE_OF_KIND,
    output_text,
)
from circuits.graph.nodes import Feature, Logits, Node, at_position, parse_node
from circuits.system.arguments import checked_arguments
from circuits.system.errors import InputError
from circuits.system.files import path_of, write_bytes
from circuits.system.kinds import expect
from circuits.system.numbers import RealNumber, items, shown

NodeName = Node | str
NodeNames = Sequence[NodeName]
NodeTexts = Mapping[Node, str]
Entry = dict[str, Any]


@checked_arguments
def save_neuronpedia(
    graph: FeatureGraph,
    path: str | Path,
    *,
    slug: str,
    scan: str | None = None,
    source_set: str | None = None,
    node_threshold: RealNumber = 0.8,
    edge_threshold: RealNumber = 0.98,
    prune: bool = True,
    groups: Mapping[str, NodeNames] | None = None,
    pinned: NodeNames = (),
    labels: Mapping[NodeName, str] | None = None,
) -> Path:
    """Write a graph as JSON that can be uploaded to Neuronpedia and shown by circuit-tracer.

    The `influence` of a node in the file is the share that it and all more influential nodes have
    before pruning, so that small means important. A target that is not a token is numbered from one
    billion up. The files lack split weights, constants and fingerprints of model and transcoders.

    Args:
        graph: the whole graph.
        path: of the file, for example `graphs/my-graph.json`.
        scan: the model's name on Neuronpedia; by default the name of the graph's model.
        source_set: the transcoders' name on Neuronpedia, if it knows their features.
        node_threshold, edge_threshold: see `circuits.prune`. The pages hide nodes above the first.
        prune: whether to prune; if False, every node and edge is written and the pages hide some.
        groups: supernodes by name. Their nodes are pinned, because the pages draw only pinned ones.
        pinned: nodes to pin on the page.
        labels: labels of features, at one position (`f2.1204@5`) or at all of them (`f2.1204`).

    Raises:
        InputError: the slug is empty, a threshold is not between 0 and 1, a group names a node that
            the graph lacks or pruning drops, two targets are the same, or a number is not finite.

    >>> import circuits, tempfile
    >>> model = circuits.load_model("toy-world")
    >>> graph = circuits.AttributionGraph("toy-world-clt").attribute(model, "Dallas is in")
    >>> circuits.save_neuronpedia(graph, tempfile.mkdtemp() + "/a.json", slug="dallas").name
    'a.json'
    """
    check_is_feature_graph(graph)
    _check(graph, path_of(path), slug)
    expect(groups, Mapping | None, "a dictionary as groups", "give names and lists of nodes")
    expect(labels, Mapping | None, "a dictionary as labels", "give features and texts")
    thresholds = {"node_threshold": node_threshold, "edge_threshold": edge_threshold}
    kept = choose_influential(graph, **thresholds)
    written, cumulative = graph, kept.cumulative
    if prune:
        written = graph.subgraph(kept.nodes, kept.edges)
        cumulative = cumulative[kept.nodes]
    nodes = _node_entries(written, cumulative, labels or {})
    ids = [node["node_id"] for node in nodes]
    id_of = {written.node(number): name for number, name in enumerate(ids)}
    model_name = graph.model.name if graph.model else "unknown"
    metadata = _metadata(graph) | {
        "slug": slug,
        "scan": scan or model_name,
        "node_threshold": node_threshold,
        "pruning_settings": thresholds if prune else {},
        "feature_details": {"neuronpedia_source_set": source_set},
    }
    content = {
        "metadata": _without_nulls(metadata),
        "qParams": _page_state(id_of, groups or {}, pinned),
        "nodes": nodes,
        "links": _links(written, ids),
    }
    text = json.dumps(content, allow_nan=False, separators=(",", ":"))
    return write_bytes(path_of(path), text.encode())


def _check(graph: FeatureGraph, path: Path, slug: str) -> None:
    if not slug.strip():
        raise InputError("slug is empty; give the graph a name, such as 'capital-of-texas'.")
    if path.is_dir():
        example = path / f"{slug}.json"
        raise InputError(f"{path} is a folder; give the file's name, such as {example}.")
    _check_finite(graph)


def _check_finite(graph: FeatureGraph) -> None:
    # An error about the first number that is not finite; an activation can be missing.
    remedy = "make the graph again in float32."
    for edge in (~graph.weight.isfinite()).nonzero():
        ends = int(graph.source[edge]), int(graph.target[edge])
        source, target = map(graph.node, ends)
        weight = float(graph.weight[edge])
        raise InputError(f"the edge {source} -> {target} has weight {weight}; {remedy}")
    is_finite = graph.nodes.probability.isfinite()
    is_wrong = graph.nodes.activation.isinf() | ~is_finite
    for number in is_wrong.nonzero():
        node = graph.node(int(number))
        raise InputError(f"{node} has an activation or probability that is not finite; {remedy}")


def _metadata(graph: FeatureGraph) -> Entry:
    return {
        "transcoder_list": [],
        "prompt_tokens": list(graph.words),
        "prompt": graph.prompt,
        "schema_version": SCHEMA_VERSION,
        "info": {
            "generator": {"name": "circuits", "version": circuits.__version__},
            "transcoder_set": graph.transcoders.name if graph.transcoders else None,
            "create_time_ms": time.time_ns() // 1_000_000,
        },
        "generation_settings": {
            theirs: graph.settings.get(ours) for ours, theirs in SETTINGS.items()
        },
    }


def _without_nulls(content: Entry) -> Entry:
    # Leave out entries that are None, and objects in which nothing is left.
    kept = {}
    for name, value in content.items():
        if isinstance(value, dict):
            value = _without_nulls(value)
        if value not in (None, {}):
            kept[name] = value
    return kept


def _node_entries(
    graph: FeatureGraph, cumulative: NodeScores, labels: Mapping[NodeName, str]
) -> list[Entry]:
    nodes = graph.nodes
    label_of = {}
    for node, label in labels.items():
        expect(label, str, f"a text to label {shown(node)}", "give texts")
        label_of[_parsed(node)] = label
    places = [nodes.kind, nodes.layer, nodes.position, nodes.index]
    scores = [nodes.probability, cumulative, nodes.activation]
    columns = places + [each.float() for each in scores]
    rows = zip(*map(_numbers, columns), strict=True)
    entries: dict[str, Entry] = {}
    for number, (*place, probability, influence, activation) in enumerate(rows):
        entry = _node_entry(graph, *place)
        entry["clerp"] = _text(graph, number, label_of)
        entry["token_prob"] = probability
        # Targets are kept whatever their influence.
        entry["influence"] = None if place[0] == TARGET else influence
        entry["activation"] = None if math.isnan(activation) else activation
        if entries.setdefault(entry["node_id"], entry) is not entry:
            raise InputError(
                f"the graph has the node {graph.node(number)} twice; "
                "explain each token once at a position."
            )
    return list(entries.values())


def _layer_and_number(graph: FeatureGraph, kind: int, layer: int, index: int) -> tuple[str, int]:
    # The layer and the number in the id of a node.
    if kind == EMBEDDING:
        return "E", index
    if kind == TARGET:
        token = graph.targets[index].token
        number = FIRST_CUSTOM + index if token is None else token
        return str(graph.n_layers + 1), number
    return str(layer), -1 if kind == ERROR else index


def _node_entry(graph: FeatureGraph, kind: int, layer: int, position: int, index: int) -> Entry:
    written_layer, number = _layer_and_number(graph, kind, layer, index)
    # Cantor's pairing, so that one number names a feature of any layer.
    diagonal = layer + index
    pair = diagonal * (diagonal + 1) // 2 + index
    js_layer = "L" if kind == TARGET else written_layer
    # The pages show the details of a feature once for all positions.
    js_position = 0 if kind == FEATURE else position
    return {
        "node_id": f"{written_layer}_{number}_{position}",
        "feature": {FEATURE: pair, EMBEDDING: position}.get(kind, number),
        "layer": written_layer,
        "ctx_idx": position,
        "feature_type": TYPE_OF_KIND[kind],
        "is_target_logit": kind == TARGET and index == 0,
        "run_idx": 0,
        "reverse_ctx_idx": 0,
        "jsNodeId": f"{js_layer}_{number}-{js_position}",
    }


def _text(graph: FeatureGraph, number: int, label_of: NodeTexts) -> str:
    # What the pages show for a node.
    node = graph.node(number)
    if isinstance(node, Feature):
        at_all_positions = label_of.get(at_position(node, None), "")
        return label_of.get(node, at_all_positions)
    if isinstance(node, Logits):
        target = graph.targets[graph.nodes.index[number]]
        probability = float(graph.nodes.probability[number])
        return output_text(target.label, probability)
    return ""


def _links(graph: FeatureGraph, ids: Sequence[str]) -> list[Entry]:
    columns = map(_numbers, (graph.source, graph.target, graph.weight))
    return [
        {"source": ids[source], "target": ids[target], "weight": weight}
        for source, target, weight in zip(*columns, strict=True)
    ]


def _page_state(id_of: NodeTexts, groups: Mapping[str, NodeNames], pinned: NodeNames) -> Entry:
    supernodes = []
    shown = _ids(id_of, pinned)
    for label, nodes in groups.items():
        expect(label, str, "a text as the name of a group", "name it")
        members = _ids(id_of, nodes)
        supernodes.append([label, *members])
        shown += members
    return {
        "pinnedIds": list(dict.fromkeys(shown)),
        "supernodes": supernodes,
        "linkType": "both",
        "clickedId": "",
        "sg_pos": "",
    }


def _ids(id_of: NodeTexts, names: NodeNames) -> list[str]:
    nodes = list(map(_parsed, items(names, "a list of nodes")))
    for node in nodes:
        if node not in id_of:
            raise InputError(
                f"{node} is not among the {len(id_of):,} nodes that are written; "
                "leave it out of groups and pinned, raise the thresholds, or use prune=False."
            )
    return [id_of[node] for node in nodes]


def _parsed(node: NodeName) -> Node:
    node = parse_node(node) if isinstance(node, str) else node
    expect(node, Node, "a node", "write it like f2.1204@5")
    return node


def _numbers(column: Tensor) -> list[Any]:
    # The values of a column, with no more digits than tell them apart.
    values = column.tolist()
    # Nine digits identify a float32 or half precision; Python would write about twice as many.
    if column.is_floating_point() and column.dtype != torch.float64:
        values = [float(f"{value:.9g}") for value in values]
    return values
