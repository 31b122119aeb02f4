"""Export of attribution graphs to Neuronpedia's JSON."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

import circuits
from circuits.attribution.feature_graph import (
    EMBEDDING,
    ERROR,
    FEATURE,
    TARGET,
    FeatureGraph,
    Nodes,
)
from circuits.attribution.influence import prune as choose_influential
from circuits.formats.neuronpedia.format import (
    FIRST_CUSTOM,
    SCHEMA_VERSION,
    SETTINGS,
    TYPE_OF_KIND,
    output_text,
)
from circuits.graph.nodes import Feature, Node, parse_node
from circuits.system.errors import InputError
from circuits.system.files import write_bytes


def save_neuronpedia(
    graph: FeatureGraph,
    path: str | Path,
    *,
    slug: str,
    scan: str | None = None,
    source_set: str | None = None,
    node_threshold: float = 0.8,
    edge_threshold: float = 0.98,
    prune: bool = True,
    groups: Mapping[str, Sequence[Node | str]] | None = None,
    pinned: Sequence[Node | str] = (),
    labels: Mapping[Node | str, str] | None = None,
) -> Path:
    """Write a graph as JSON that can be uploaded to Neuronpedia and shown by circuit-tracer.

    The `influence` of a node in the file is the share that it and all more influential nodes have
    before pruning, so that small means important. A target that is not a token is numbered from one
    billion up. The files have no place for split weights, constants, and the fingerprints of model
    and transcoders.

    Args:
        graph: the whole graph.
        path: of the file, for example `graphs/my-graph.json`.
        slug: the name of the graph.
        scan: the model's name on Neuronpedia; by default the name of the graph's model.
        source_set: the transcoders' name on Neuronpedia, if it knows their features.
        node_threshold: see `circuits.prune`. The pages also hide nodes above it.
        edge_threshold: see `circuits.prune`.
        prune: whether to prune; if False, every node and edge is written and the pages hide some.
        groups: supernodes by name. Their nodes are pinned, because the pages draw only pinned ones.
        pinned: nodes to pin on the page.
        labels: labels of features, at one position (`f2.1204@5`) or at all of them (`f2.1204`).

    Raises:
        InputError: the slug is empty, a threshold is not between 0 and 1, a group names a node that
            the graph lacks or pruning drops, two targets are the same, or a number is not finite.

    Example:
        >>> import circuits, tempfile
        >>> model = circuits.load_model("toy-world")
        >>> graph = circuits.AttributionGraph("toy-world-clt").attribute(model, "Dallas is in")
        >>> circuits.save_neuronpedia(graph, tempfile.mkdtemp() + "/a.json", slug="dallas").name
        'a.json'
    """
    _check(graph, Path(path), slug)
    thresholds = {"node_threshold": node_threshold, "edge_threshold": edge_threshold}
    kept = choose_influential(graph, **thresholds)
    written, cumulative = graph, kept.cumulative
    if prune:
        written, cumulative = graph.subgraph(kept.nodes, kept.edges), cumulative[kept.nodes]
    nodes = _node_entries(written, cumulative, labels or {})
    ids = [node["node_id"] for node in nodes]
    metadata = {
        **_metadata(graph),
        "slug": slug,
        "scan": scan or (graph.model.name if graph.model else "unknown"),
        "node_threshold": node_threshold,
        "pruning_settings": thresholds if prune else {},
        "feature_details": {"neuronpedia_source_set": source_set},
    }
    content = {
        "metadata": _without_nulls(metadata),
        "qParams": _page_state(written, ids, groups or {}, pinned),
        "nodes": nodes,
        "links": _links(written, ids),
    }
    text = json.dumps(content, allow_nan=False, separators=(",", ":"))
    return write_bytes(Path(path), text.encode())


def _check(graph: FeatureGraph, path: Path, slug: str) -> None:
    if not slug.strip():
        raise InputError("slug is empty; give the graph a name, such as 'capital-of-texas'.")
    if path.is_dir():
        raise InputError(
            f"{path} is a folder; give the file's name, such as {path / f'{slug}.json'}."
        )
    for edge in (~torch.isfinite(graph.weight)).nonzero().flatten().tolist():
        source, target = (graph.node(int(end[edge])) for end in (graph.source, graph.target))
        raise InputError(
            f"the edge {source} -> {target} has weight {float(graph.weight[edge])}; "
            "make the graph again in float32."
        )
    is_wrong = graph.nodes.activation.isinf() | ~torch.isfinite(graph.nodes.probability)
    for number in is_wrong.nonzero().flatten().tolist():
        raise InputError(
            f"{graph.node(number)} has an activation or probability that is not finite; "
            "make the graph again in float32."
        )


def _metadata(graph: FeatureGraph) -> dict[str, Any]:
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


def _without_nulls(content: Mapping[str, Any]) -> dict[str, Any]:
    """Leave out entries that are None, and objects in which nothing is left."""
    nested = {
        name: _without_nulls(value) if isinstance(value, dict) else value
        for name, value in content.items()
    }
    return {name: value for name, value in nested.items() if value not in (None, {})}


def _node_entries(
    graph: FeatureGraph, cumulative: Float[Tensor, " node"], labels: Mapping[Node | str, str]
) -> list[dict[str, Any]]:
    nodes = graph.nodes
    label_of = {_parsed(node): label for node, label in labels.items()}
    columns = (nodes.kind, nodes.layer, nodes.position, nodes.index)
    places = zip(*(column.tolist() for column in columns), strict=True)
    entries: dict[str, dict[str, Any]] = {}
    for number, place in enumerate(places):
        entry = _node_entry(graph, label_of, place)
        if entries.setdefault(entry["node_id"], entry) is not entry:
            raise InputError(
                f"the graph has the node {graph.node(number)} twice; "
                "explain each token once at a position."
            )
    _add_numbers(entries.values(), nodes, cumulative)
    return list(entries.values())


def _add_numbers(
    entries: Iterable[dict[str, Any]], nodes: Nodes, cumulative: Float[Tensor, " node"]
) -> None:
    columns = (nodes.probability, cumulative, nodes.activation)
    rows = zip(entries, *(_numbers(column.float()) for column in columns), strict=True)
    for entry, probability, influence, activation in rows:
        entry["token_prob"] = probability
        entry["influence"] = influence
        entry["activation"] = None if math.isnan(activation) else activation
        if entry["feature_type"] == TYPE_OF_KIND[TARGET]:
            entry["clerp"] = output_text(entry["clerp"], probability)
            # Targets are kept whatever their influence.
            entry["influence"] = None


def _node_entry(
    graph: FeatureGraph, label_of: Mapping[Node, str], place: tuple[int, ...]
) -> dict[str, Any]:
    kind, layer, position, index = place
    written_layer, number, label = str(layer), index, ""
    js_id = f"{layer}_{index}-0"  # the pages show the details of a feature once for all positions
    if kind == FEATURE:
        # Cantor's pairing, so that one number names a feature of any layer.
        feature = (layer + index) * (layer + index + 1) // 2 + index
        at_all_positions = label_of.get(Feature(layer, index), "")
        label = label_of.get(Feature(layer, index, position), at_all_positions)
    elif kind == ERROR:
        number = feature = -1
        js_id = f"{layer}_-1-{position}"
    elif kind == EMBEDDING:
        written_layer, feature = "E", position
        js_id = f"E_{index}-{position}"
    else:
        target = graph.targets[index]
        label = target.label
        number = feature = FIRST_CUSTOM + index if target.token is None else target.token
        written_layer = str(graph.n_layers + 1)
        js_id = f"L_{number}-{position}"
    return {
        "node_id": f"{written_layer}_{number}_{position}",
        "feature": feature,
        "layer": written_layer,
        "ctx_idx": position,
        "feature_type": TYPE_OF_KIND[kind],
        "is_target_logit": kind == TARGET and index == 0,
        "run_idx": 0,
        "reverse_ctx_idx": 0,
        "jsNodeId": js_id,
        "clerp": label,
    }


def _links(graph: FeatureGraph, ids: Sequence[str]) -> list[dict[str, Any]]:
    columns = (graph.source.tolist(), graph.target.tolist(), _numbers(graph.weight))
    return [
        {"source": ids[source], "target": ids[target], "weight": weight}
        for source, target, weight in zip(*columns, strict=True)
    ]


def _page_state(
    graph: FeatureGraph,
    ids: Sequence[str],
    groups: Mapping[str, Sequence[Node | str]],
    pinned: Sequence[Node | str],
) -> dict[str, Any]:
    supernodes = [
        [label, *(ids[_find(graph, node)] for node in nodes)] for label, nodes in groups.items()
    ]
    shown = [ids[_find(graph, node)] for node in pinned]
    for _, *members in supernodes:
        shown += members
    return {
        "pinnedIds": list(dict.fromkeys(shown)),
        "supernodes": supernodes,
        "linkType": "both",
        "clickedId": "",
        "sg_pos": "",
    }


def _find(graph: FeatureGraph, node: Node | str) -> int:
    wanted = _parsed(node)
    try:
        return graph.find(wanted)
    except InputError as error:
        raise InputError(
            f"{wanted} is not among the {len(graph.nodes):,} nodes that are written; "
            "leave it out of groups and pinned, raise the thresholds, or use prune=False."
        ) from error


def _parsed(node: Node | str) -> Node:
    return parse_node(node) if isinstance(node, str) else node


def _numbers(column: Float[Tensor, " n"]) -> list[float]:
    """The values of a column, those of float32 with no more digits than tell them apart."""
    values = column.tolist()
    # Nine digits identify a float32; Python would write about twice as many.
    return values if column.dtype == torch.float64 else [float(f"{value:.9g}") for value in values]
