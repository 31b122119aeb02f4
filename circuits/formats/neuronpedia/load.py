"""Import of attribution graphs from Neuronpedia's JSON, written by this package or others."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pandas import DataFrame, Index
from torch import Tensor

from circuits.attribution.feature_graph import (
    EMBEDDING,
    ERROR,
    FEATURE,
    TARGET,
    EdgeNumbers,
    EdgeScores,
    FeatureGraph,
    LogitTarget,
    Nodes,
    NodeScores,
)
from circuits.formats.neuronpedia.format import FIRST_CUSTOM, SETTINGS, output_label
from circuits.formats.neuronpedia.schema import (
    GRAPH_FILE,
    NO_LAYER,
    GraphFile,
    Link,
    Metadata,
    NodeEntry,
    Texts,
)
from circuits.formats.validation import read_checked_json
from circuits.graph.nodes import Node
from circuits.system.errors import InputError
from circuits.system.files import path_of

NODE_ID = re.compile(r"(E|[0-9]{1,9})_([0-9]{1,15})_([0-9]{1,9})")
# A template that names a row of the table of links in an error message.
LINK = "the link {source!r:.60} -> {target!r:.60}"
UNKNOWN_TOKEN = -1
NodeTuple = tuple[Node, ...]
Groups = dict[str, NodeTuple]

# Kind, layer, position and index of a node. No two nodes have the same.
Place = tuple[int, int, int, int]
PlacedNode = tuple[Place, NodeEntry]
PlacedNodes = list[PlacedNode]
NodeOf = Mapping[str, Node]


@dataclass(frozen=True, eq=False)
class ImportedGraph:
    """An attribution graph read from Neuronpedia's JSON.

    Attributes:
        graph: the graph that the file holds, usually a pruned one. The file does not say everything
            that a `FeatureGraph` can hold: `direct` is NaN, `constants` has no columns, `tokens` is
            -1 at positions without an embedding, and `model` and `transcoders` are None.
        cumulative: for each node, the influence in the file: the share that it and all more
            influential nodes had before pruning. NaN where the file has none.
        groups: the supernodes by name, without nodes that the graph does not have.
        pinned: the nodes pinned on the page, likewise.
        labels: the labels of features that have one.
        slug: the name of the graph.
        scan: the name of the model on Neuronpedia.

    >>> import circuits, tempfile
    >>> model = circuits.load_model("toy-world")
    >>> graph = circuits.AttributionGraph("toy-world-clt").attribute(model, "Dallas is in")
    >>> path = circuits.save_neuronpedia(graph, tempfile.mkdtemp() + "/a.json", slug="dallas")
    >>> circuits.load_neuronpedia(path).slug
    'dallas'
    """

    graph: FeatureGraph
    cumulative: NodeScores
    groups: Mapping[str, tuple[Node, ...]]
    pinned: tuple[Node, ...]
    labels: Mapping[Node, str]
    slug: str
    scan: str | None


def load_neuronpedia(path: str | Path) -> ImportedGraph:
    """Read a graph JSON of Neuronpedia, circuit-tracer or `save_neuronpedia`.

    Errors may have new or old ids. A target without a probability counts 1 for influence. A target
    whose number is at least one billion is not a token.

    Raises:
        InputError: the file is missing, truncated, or has another schema or version; two nodes have
            the same id; a link ends at no node or does not lead upwards; a number is not finite; or
            a node has a type that cannot be read, such as Lorsa's attention features.

    >>> import circuits, tempfile
    >>> model = circuits.load_model("toy-world")
    >>> graph = circuits.AttributionGraph("toy-world-clt").attribute(model, "Dallas is in")
    >>> path = circuits.save_neuronpedia(graph, tempfile.mkdtemp() + "/a.json", slug="dallas")
    >>> circuits.load_neuronpedia(path).graph.prompt == graph.prompt
    True
    """
    path = path_of(path)
    content = read_checked_json(path, GRAPH_FILE, "graph JSON of Neuronpedia")
    try:
        return _imported(content, path)
    except InputError as error:
        raise InputError(f"{path}: {error}") from error


def _imported(content: GraphFile, path: Path) -> ImportedGraph:
    metadata, page_state = content["metadata"], content["qParams"]
    words = tuple(metadata["prompt_tokens"])
    placed = _placed(content["nodes"], len(words))
    settings = {"imported_from": path.name, **_settings(metadata)}
    graph = _feature_graph(words, placed, content["links"], settings)
    entries = [entry for _, entry in placed]
    ids = [entry.node_id for entry in entries]
    nodes = map(graph.node, range(len(ids)))
    node_of = dict(zip(ids, nodes, strict=True))
    labels = {}
    for entry in entries:
        if entry.kind == FEATURE and entry.clerp:
            labels[node_of[entry.node_id]] = entry.clerp
    supernodes = page_state.get("supernodes") or []
    pinned = page_state.get("pinnedIds") or []
    return ImportedGraph(
        graph=graph,
        cumulative=_scores(placed, "influence"),
        groups=_groups(supernodes, node_of),
        pinned=_known_nodes(pinned, node_of),
        labels=labels,
        slug=metadata.get("slug") or path.stem,
        scan=metadata.get("scan"),
    )


def _feature_graph(
    words: tuple[str, ...], placed: PlacedNodes, links: list[Link], settings: dict[str, Any]
) -> FeatureGraph:
    nodes, n_layers = _nodes(placed)
    node_ids = [entry.node_id for _, entry in placed]
    source, target, weight = _edges(links, node_ids, nodes)
    return FeatureGraph(
        nodes=nodes,
        source=source,
        target=target,
        weight=weight,
        direct=torch.full_like(weight, torch.nan),
        constants=torch.zeros(len(nodes), 0, dtype=torch.float32),
        constant_names=(),
        tokens=_tokens(nodes, len(words)),
        words=words,
        targets=_targets(placed),
        n_layers=n_layers,
        settings=settings,
    )


def _tokens(nodes: Nodes, n_words: int) -> Tensor:
    embeddings = nodes[nodes.kind == EMBEDDING]
    tokens = torch.full((n_words,), UNKNOWN_TOKEN)
    tokens[embeddings.position] = embeddings.index
    return tokens


def _placed(entries: list[NodeEntry], n_words: int) -> PlacedNodes:
    # The nodes in the order of `FeatureGraph`.
    by_id: dict[str, NodeEntry] = {}
    by_place: dict[Place, NodeEntry] = {}
    for entry in entries:
        existing = by_id.setdefault(entry.node_id, entry)
        if existing is not entry:
            # The old id of an error, 0_<layer>_<position>, can be the id of a feature, too.
            raise InputError(
                f"two nodes are called {entry.node_id!r:.60}, a {existing.feature_type} and a "
                f"{entry.feature_type}; circuit-tracer before mid-2026 gives errors the ids of "
                "features: export the graph with a later version."
            )
        place = _place(entry, n_words)
        if by_place.setdefault(place, entry) is not entry:
            raise InputError(
                f"node {entry.node_id!r:.60} is in the file twice, under two ids; remove one of "
                "them."
            )
    return sorted(by_place.items(), key=_order)


def _order(placed: PlacedNode) -> tuple[int, ...]:
    # Targets come last, in the order of the file: the first one is the most probable.
    place, _ = placed
    return (TARGET,) if place[0] == TARGET else place


def _place(entry: NodeEntry, n_words: int) -> Place:
    name, kind, position = f"node {entry.node_id!r:.60}", entry.kind, entry.ctx_idx
    if position >= n_words:
        raise InputError(
            f"{name}: ctx_idx is {position}; it must be a position of the prompt, from 0 to "
            f"{n_words - 1}."
        )
    layer = NO_LAYER if kind == EMBEDDING else entry.layer
    if layer == NO_LAYER and kind != EMBEDDING:
        raise InputError(f"{name}: layer is 'E'; a {entry.feature_type} needs a number.")
    if kind == ERROR:
        return kind, layer, position, 0
    match = NODE_ID.fullmatch(entry.node_id)
    written_layer = "E" if kind == EMBEDDING else str(layer)
    expected = (written_layer, str(position))
    is_here = match is not None and match.group(1, 3) == expected
    if kind != TARGET and not is_here:
        raise InputError(
            f"{name} is a {entry.feature_type} at position {position}; its id must be "
            f"{written_layer}_<number>_{position}."
        )
    # Targets may have any id. Those without a token in it give the token as their feature.
    index = entry.feature if match is None else int(match[2])
    if index is None or index < 0:
        raise InputError(
            f"{name}: feature is {entry.feature}; a target needs the id of its token there."
        )
    return kind, layer, position, index


def _nodes(placed: PlacedNodes) -> tuple[Nodes, int]:
    # The nodes in columns, and the number of layers, as far as the nodes tell it.
    places = torch.tensor([place for place, _ in placed])
    kind, layer, position, index = places.T.contiguous()
    is_target = kind == TARGET
    # Features and errors are in layers 0 to n_layers - 1, targets in "layer" n_layers + 1.
    layers_told = layer + 1 - 2 * is_target
    n_layers = max(0, int(layers_told.max()))
    layer[is_target] = n_layers
    index[is_target] = torch.arange(int(is_target.sum()))
    activation = _scores(placed, "activation")
    activation[kind != FEATURE] = torch.nan
    # A target without a probability counts 1 for influence.
    probability = _scores(placed, "token_prob").nan_to_num(1.0)
    probability[~is_target] = 0.0
    return Nodes(kind, layer, position, index, activation, probability), n_layers


def _scores(placed: PlacedNodes, name: str) -> NodeScores:
    # NumPy takes None as NaN.
    values = [getattr(entry, name) for _, entry in placed]
    numbers = np.array(values, dtype="float32")
    return torch.tensor(numbers)


def _targets(placed: PlacedNodes) -> tuple[LogitTarget, ...]:
    targets = []
    for (kind, _, _, number), entry in placed:
        if kind == TARGET:
            label = output_label(entry.clerp or "") or f"#{number}"
            token = number if number < FIRST_CUSTOM else None
            targets.append(LogitTarget(label, token))
    return tuple(targets)


def _edges(
    links: list[Link], node_ids: list[str], nodes: Nodes
) -> tuple[EdgeNumbers, EdgeNumbers, EdgeScores]:
    # Source, target and weight of each edge, sorted by target, then source.
    # Without links, the type of the weights is not known from them.
    table = DataFrame(links, columns=list(Link.__annotations__))
    table = table.astype({"weight": "float32"})
    rows = Index(node_ids)
    source = rows.get_indexer(table["source"])
    target = rows.get_indexer(table["target"])
    _check_links(table, source, target, nodes)
    order = np.lexsort((source, target))
    weight = torch.tensor(table["weight"].to_numpy())
    ends = torch.tensor(source[order]), torch.tensor(target[order])
    return *ends, weight[order]


def _check_links(table: DataFrame, source: Any, target: Any, nodes: Nodes) -> None:
    is_unknown = (source < 0) | (target < 0)
    _refuse(table, is_unknown, f"{LINK} has an end that is none of the nodes; export it again")
    layer = nodes.layer.numpy()
    # The layer of an embedding is -1, of a target n_layers.
    is_upwards = layer[source] < layer[target]
    target_kind = nodes.kind.numpy()[target]
    has_inputs = np.isin(target_kind, (FEATURE, TARGET))
    expected = "from a token, feature or error up to a feature or output"
    is_wrong = ~(is_upwards & has_inputs)
    _refuse(table, is_wrong, f"{LINK} does not lead {expected}; remove it")
    is_repeated = table.duplicated(["source", "target"])
    _refuse(table, is_repeated, f"{LINK} is there twice; remove one of them")


def _refuse(table: DataFrame, wrong: Any, message: str) -> None:
    # Raise an error about the first wrong row, whose values are filled into the message.
    if wrong.any():
        first = table[wrong].iloc[0]
        raise InputError(message.format_map(first) + ".")


def _groups(supernodes: list[Texts], node_of: NodeOf) -> Groups:
    groups: Groups = {}
    for name, *members in supernodes:
        # Two supernodes may have the same name on the page.
        unique, number = name, 2
        while unique in groups:
            unique, number = f"{name} ({number})", number + 1
        groups[unique] = _known_nodes(members, node_of)
    return groups


def _known_nodes(names: Texts, node_of: NodeOf) -> NodeTuple:
    return tuple(node_of[name] for name in names if name in node_of)


def _settings(metadata: Metadata) -> dict[str, Any]:
    # The file's settings under the names that `AttributionGraph` gives them.
    generation = metadata.get("generation_settings") or {}
    pruning = metadata.get("pruning_settings") or {}
    found = {}
    for ours, theirs in SETTINGS.items():
        found[ours] = generation.get(theirs)
    for name in ("node_threshold", "edge_threshold"):
        found[name] = pruning.get(name)
    return {name: value for name, value in found.items() if type(value) in (int, float)}
