"""Export of attribution graphs to Neuronpedia's JSON."""

from __future__ import annotations

import json
import math
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from circuits.attribution.feature_graph import (
    EMBEDDING,
    ERROR,
    FEATURE,
    TARGET,
    FeatureGraph,
    Nodes,
)
from circuits.attribution.influence import prune as choose
from circuits.formats.neuronpedia.format import FIRST_CUSTOM, SCHEMA_VERSION, SETTINGS, TYPE_NAMES
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
    """Write a graph as JSON that Neuronpedia takes as an upload and that circuit-tracer's pages show.

    A node's `influence` is the share that it and the more influential nodes make, before pruning: small is important. A target that is no token
    gets an id from a billion up. Split weights, constants and fingerprints of model and transcoders have no place in these files.

    Args:
        path: of the file, such as `graphs/my-graph.json`.
        slug: the graph's name there.
        scan: the model's name on Neuronpedia; None takes the graph's model.
        source_set: the transcoders' name there, where their features are known to Neuronpedia.
        node_threshold, edge_threshold: see `circuits.prune`; the pages also hide nodes above the first.
        prune: False writes every node and edge, for the pages to hide.
        groups: supernodes, by name; their nodes are pinned as well, since the pages draw pinned ones only.
        pinned: nodes of the pages' subgraph.
        labels: of features, at a position or (`f2.1204`) wherever they fire.

    Raises:
        InputError: the slug is empty, a threshold is not between 0 and 1, a group names a node that the graph lacks or pruning drops, two targets
            are the same, or numbers are not finite.
    """
    _check(graph, Path(path), slug)
    kept = choose(graph, node_threshold=node_threshold, edge_threshold=edge_threshold)
    part, cumulative = (
        (graph.subgraph(kept.nodes, kept.edges), kept.cumulative[kept.nodes])
        if prune
        else (graph, kept.cumulative)
    )
    names = _names(part)
    ids = [name.id for name in names]
    metadata = _metadata(graph, slug, scan, source_set)
    metadata["node_threshold"] = node_threshold
    if prune:
        metadata["pruning_settings"] = {
            "node_threshold": node_threshold,
            "edge_threshold": edge_threshold,
        }
    content = {
        "metadata": metadata,
        "qParams": _parameters(part, ids, groups or {}, pinned),
        "nodes": _entries(part, names, cumulative, _by_text(labels or {})),
        "links": [
            {"source": ids[source], "target": ids[target], "weight": weight}
            for source, target, weight in zip(
                part.source.tolist(), part.target.tolist(), _numbers(part.weight), strict=True
            )
        ],
    }
    return write_bytes(
        Path(path), json.dumps(content, allow_nan=False, separators=(",", ":")).encode()
    )


def _check(graph: FeatureGraph, path: Path, slug: str) -> None:
    if not slug.strip():
        raise InputError("slug is empty; give the graph a name, such as 'capital-of-texas'.")
    if path.is_dir():
        raise InputError(
            f"{path} is a folder; give the file's name, such as {path / f'{slug}.json'}."
        )
    wrong = (~torch.isfinite(graph.weight)).nonzero().flatten().tolist()
    if wrong:
        source, target = (
            graph.node(int(graph.source[wrong[0]])),
            graph.node(int(graph.target[wrong[0]])),
        )
        raise InputError(
            f"the edge {source} -> {target} has weight {float(graph.weight[wrong[0]])}; make the graph again in float32."
        )
    wrong = (
        (torch.isinf(graph.nodes.activation) | ~torch.isfinite(graph.nodes.probability))
        .nonzero()
        .flatten()
        .tolist()
    )
    if wrong:
        raise InputError(
            f"{graph.node(wrong[0])} has an activation or probability that is not finite; make the graph again in float32."
        )


def _metadata(
    graph: FeatureGraph, slug: str, scan: str | None, source_set: str | None
) -> dict[str, Any]:
    settings = {
        theirs: graph.settings[ours]
        for ours, theirs in SETTINGS.items()
        if graph.settings.get(ours) is not None
    }
    transcoders = {} if graph.transcoders is None else {"transcoder_set": graph.transcoders.name}
    generator = {"name": "circuits", "version": version("circuits")}
    return {
        "slug": slug,
        "scan": scan or (graph.model.name if graph.model else "unknown"),
        "transcoder_list": [],
        "prompt_tokens": list(graph.words),
        "prompt": graph.prompt,
        "schema_version": SCHEMA_VERSION,
        "info": {
            "generator": generator,
            **transcoders,
            "create_time_ms": time.time_ns() // 1_000_000,
        },
        **({"feature_details": {"neuronpedia_source_set": source_set}} if source_set else {}),
        **({"generation_settings": settings} if settings else {}),
    }


class _Named(NamedTuple):
    """What a node is called there: its id, layer and number, and what it shares with the same feature elsewhere."""

    id: str
    layer: str
    number: int
    shared: str


def _names(graph: FeatureGraph) -> list[_Named]:
    names = [_named(graph, *place) for place in _places(graph.nodes)]
    if twice := [name for name, times in Counter(names).items() if times > 1]:
        raise InputError(
            f"the graph has the node {graph.node(names.index(twice[0]))} twice; explain each token once at a position."
        )
    return names


def _places(nodes: Nodes) -> list[tuple[int, int, int, int]]:
    """Kind, layer, position and index of each node."""
    return list(
        zip(
            nodes.kind.tolist(),
            nodes.layer.tolist(),
            nodes.position.tolist(),
            nodes.index.tolist(),
            strict=True,
        )
    )


def _named(graph: FeatureGraph, kind: int, layer: int, position: int, index: int) -> _Named:
    if kind == FEATURE:
        # Cantor's pairing, so that one number names a feature of any layer.
        pair = (layer + index) * (layer + index + 1) // 2 + index
        return _Named(f"{layer}_{index}_{position}", str(layer), pair, f"{layer}_{index}-0")
    if kind == ERROR:
        return _Named(f"{layer}_-1_{position}", str(layer), -1, f"{layer}_-1-{position}")
    if kind == EMBEDDING:
        return _Named(f"E_{index}_{position}", "E", position, f"E_{index}-{position}")
    token, above = graph.targets[index].token, graph.n_layers + 1
    number = FIRST_CUSTOM + index if token is None else token
    return _Named(f"{above}_{number}_{position}", str(above), number, f"L_{number}-{position}")


def _entries(
    graph: FeatureGraph,
    names: Sequence[_Named],
    cumulative: Float[Tensor, " node"],
    labels: Mapping[str, str],
) -> list[dict[str, Any]]:
    columns = (
        _numbers(column.float())
        for column in (graph.nodes.probability, cumulative, graph.nodes.activation)
    )
    return [
        {
            "node_id": name.id,
            "feature": name.number,
            "layer": name.layer,
            "ctx_idx": position,
            "feature_type": TYPE_NAMES[kind],
            "token_prob": probability,
            "is_target_logit": kind == TARGET and index == 0,
            "run_idx": 0,
            "reverse_ctx_idx": 0,
            "jsNodeId": name.shared,
            "clerp": _output(graph.targets[index].label, probability)
            if kind == TARGET
            else _label(kind, layer, position, index, labels),
            "influence": None if kind == TARGET else influence,
            "activation": None if math.isnan(activation) else activation,
        }
        for name, (kind, layer, position, index), probability, influence, activation in zip(
            names, _places(graph.nodes), *columns, strict=True
        )
    ]


def _output(label: str, probability: float) -> str:
    return f'Output "{label}" (p={probability:.3f})'


def _label(kind: int, layer: int, position: int, index: int, labels: Mapping[str, str]) -> str:
    everywhere = Feature(layer, index)
    return (
        labels.get(f"{everywhere}@{position}", labels.get(str(everywhere), ""))
        if kind == FEATURE
        else ""
    )


def _parameters(
    graph: FeatureGraph,
    ids: Sequence[str],
    groups: Mapping[str, Sequence[Node | str]],
    pinned: Sequence[Node | str],
) -> dict[str, Any]:
    members = {
        label: [ids[_find(graph, node)] for node in nodes] for label, nodes in groups.items()
    }
    shown = [
        *(ids[_find(graph, node)] for node in pinned),
        *(name for names in members.values() for name in names),
    ]
    supernodes = [[label, *names] for label, names in members.items()]
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
            f"{wanted} is not among the {len(graph.nodes):,} nodes that are written; leave it out of groups and pinned, raise the thresholds, "
            "or use prune=False."
        ) from error


def _by_text(labels: Mapping[Node | str, str]) -> dict[str, str]:
    return {str(_parsed(node)): label for node, label in labels.items()}


def _parsed(node: Node | str) -> Node:
    return parse_node(node) if isinstance(node, str) else node


def _numbers(column: Float[Tensor, " n"]) -> list[float]:
    """The numbers with as many digits as tell them apart, which for most tensors is half of what Python would write."""
    return (
        column.tolist()
        if column.dtype == torch.float64
        else [float(f"{number:.9g}") for number in column.tolist()]
    )
