"""Import of attribution graphs from Neuronpedia's JSON, written by this package or others."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from pandas import DataFrame, Index, Series, concat, to_numeric
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
)
from circuits.formats.neuronpedia.format import FIRST_CUSTOM, SETTINGS, output_label
from circuits.formats.neuronpedia.schema import (
    GRAPH_FILE,
    KIND_OF_TYPE,
    NO_LAYER,
    GraphFile,
    Link,
    Metadata,
    NodeEntry,
)
from circuits.formats.validation import read_checked_json
from circuits.graph.nodes import Node
from circuits.system.errors import InputError

NODE_ID = r"^(?P<layer>E|[0-9]{1,9})_(?P<number>[0-9]{1,15})_(?P<position>[0-9]{1,9})$"
# Columns in which no two nodes are equal.
NODE_PLACE = ["kind", "layer", "position", "index"]
# Templates that name a row of a table in an error message.
NODE = "node {node_id!r:.60}"
LINK = "the link {source!r:.60} -> {target!r:.60}"
UNKNOWN_TOKEN = -1


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

    Example:
        >>> import circuits, tempfile
        >>> model = circuits.load_model("toy-world")
        >>> graph = circuits.AttributionGraph("toy-world-clt").attribute(model, "Dallas is in")
        >>> path = circuits.save_neuronpedia(graph, tempfile.mkdtemp() + "/a.json", slug="dallas")
        >>> circuits.load_neuronpedia(path).slug
        'dallas'
    """

    graph: FeatureGraph
    cumulative: Float[Tensor, " node"]
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

    Example:
        >>> import circuits, tempfile
        >>> model = circuits.load_model("toy-world")
        >>> graph = circuits.AttributionGraph("toy-world-clt").attribute(model, "Dallas is in")
        >>> path = circuits.save_neuronpedia(graph, tempfile.mkdtemp() + "/a.json", slug="dallas")
        >>> circuits.load_neuronpedia(path).graph.prompt == graph.prompt
        True
    """
    path = Path(path)
    content = read_checked_json(path, GRAPH_FILE, "graph JSON of Neuronpedia")
    try:
        return _imported(content, path)
    except InputError as error:
        raise InputError(f"{path}: {error}") from error


def _imported(content: GraphFile, path: Path) -> ImportedGraph:
    metadata, page_state = content["metadata"], content["qParams"]
    words = tuple(metadata["prompt_tokens"])
    table = _node_table(content["nodes"], len(words))
    settings = {"imported_from": path.name, **_settings(metadata)}
    graph = _feature_graph(words, table, content["links"], settings)
    node_of = {name: graph.node(number) for number, name in enumerate(table["node_id"])}
    labelled = table[(table["kind"] == FEATURE) & (table["clerp"] != "")]
    return ImportedGraph(
        graph=graph,
        cumulative=_tensor(table["influence"]),
        groups=_groups(page_state.get("supernodes") or [], node_of),
        pinned=_known_nodes(page_state.get("pinnedIds") or [], node_of),
        labels={node_of[row.node_id]: row.clerp for row in labelled.itertuples()},
        slug=metadata.get("slug") or path.stem,
        scan=metadata.get("scan"),
    )


def _feature_graph(
    words: tuple[str, ...], table: DataFrame, links: list[Link], settings: dict[str, Any]
) -> FeatureGraph:
    # Features and errors are in layers 0 to n_layers - 1, targets in "layer" n_layers + 1.
    is_target = table["kind"] == TARGET
    at_least = table["layer"] + 1 - 2 * is_target
    n_layers = max(0, int(at_least.max()))
    nodes = _nodes(table, n_layers)
    source, target, weight = _edges(links, table["node_id"], nodes)
    tokens = torch.full((len(words),), UNKNOWN_TOKEN)
    embeddings = nodes[nodes.kind == EMBEDDING]
    tokens[embeddings.position] = embeddings.index
    return FeatureGraph(
        nodes=nodes,
        source=source,
        target=target,
        weight=weight,
        direct=torch.full_like(weight, torch.nan),
        constants=torch.zeros(len(nodes), 0),
        constant_names=(),
        tokens=tokens,
        words=words,
        targets=_targets(table[is_target]),
        n_layers=n_layers,
        settings=settings,
    )


def _node_table(entries: list[NodeEntry], n_words: int) -> DataFrame:
    """A row for each node, in the order of `FeatureGraph`; targets keep the order of the file."""
    table = DataFrame(entries, columns=list(NodeEntry.__annotations__))
    table = table.rename(columns={"ctx_idx": "position"}).fillna({"clerp": ""})
    table["kind"] = table["feature_type"].map(KIND_OF_TYPE)
    table["layer"] = table["layer"].mask(table["kind"] == EMBEDDING, NO_LAYER)
    _check_nodes(table, n_words)
    table["index"] = _indices(table)
    is_repeated = table.duplicated(NODE_PLACE)
    _refuse(table, is_repeated, f"{NODE} is in the file under another id, too; remove one of them")
    # Targets are not sorted: the first one is the most probable.
    is_target = table["kind"] == TARGET
    inner = table[~is_target].sort_values(NODE_PLACE)
    table = concat([inner, table[is_target]], ignore_index=True)
    # None becomes NaN.
    return table.astype(dict.fromkeys(("activation", "token_prob", "influence"), "float32"))


def _check_nodes(table: DataFrame, n_words: int) -> None:
    is_outside = table["position"] >= n_words
    allowed = f"it must be a position of the prompt, from 0 to {n_words - 1}"
    _refuse(table, is_outside, f"{NODE}: ctx_idx is {{position}}; {allowed}")
    has_no_layer = (table["layer"] == NO_LAYER) & (table["kind"] != EMBEDDING)
    _refuse(table, has_no_layer, f"{NODE}: layer is 'E'; a {{feature_type}} needs a number")
    # The old id of an error, 0_<layer>_<position>, can be the id of a feature, too.
    first_type = table.groupby("node_id")["feature_type"].transform("first")
    _refuse(
        table.assign(first_type=first_type),
        table.duplicated("node_id"),
        "two nodes are called {node_id!r:.60}, a {first_type} and a {feature_type}; circuit-tracer "
        "before mid-2026 gives errors the ids of features: export the graph with a later version",
    )


def _indices(table: DataFrame) -> Series:
    """The numbers of features, the tokens of embeddings and targets, and 0 for errors."""
    kind, position = table["kind"], table["position"].astype(str)
    layer = table["layer"].astype(str).mask(kind == EMBEDDING, "E")
    parts = table["node_id"].str.extract(NODE_ID)
    is_elsewhere = (parts["layer"] != layer) | (parts["position"] != position)
    _refuse(
        table.assign(right_id=layer + "_<number>_" + position),
        is_elsewhere & kind.isin([FEATURE, EMBEDDING]),
        f"{NODE} is a {{feature_type}} at position {{position}}; its id must be {{right_id}}",
    )
    # Targets may have any id. Those without a token in it give the token as their feature.
    index = to_numeric(parts["number"]).fillna(table["feature"]).mask(kind == ERROR, 0)
    needed = "a target needs the id of its token there"
    _refuse(table, ~(index >= 0), f"{NODE}: feature is {{feature}}; {needed}")
    return index.astype("int64")


def _refuse(table: DataFrame, wrong: Any, message: str) -> None:
    """Raise an error about the first wrong row, whose values are filled into the message."""
    if wrong.any():
        raise InputError(message.format_map(table[wrong].iloc[0]) + ".")


def _nodes(table: DataFrame, n_layers: int) -> Nodes:
    is_target = table["kind"] == TARGET
    # A target without a probability counts 1 for influence.
    probability = table["token_prob"].fillna(1.0).where(is_target, 0.0)
    return Nodes(
        kind=_tensor(table["kind"]),
        layer=_tensor(table["layer"].mask(is_target, n_layers)),
        position=_tensor(table["position"]),
        index=_tensor(table["index"].mask(is_target, is_target.cumsum() - 1)),
        activation=_tensor(table["activation"].where(table["kind"] == FEATURE)),
        probability=_tensor(probability),
    )


def _tensor(column: Series) -> Tensor:
    return torch.tensor(column.to_numpy())


def _targets(table: DataFrame) -> tuple[LogitTarget, ...]:
    targets = []
    for text, number in zip(table["clerp"], table["index"].tolist(), strict=True):
        token = number if number < FIRST_CUSTOM else None
        targets.append(LogitTarget(output_label(text) or f"#{number}", token))
    return tuple(targets)


def _edges(
    links: list[Link], node_ids: Series, nodes: Nodes
) -> tuple[EdgeNumbers, EdgeNumbers, EdgeScores]:
    """Source, target and weight of each edge, sorted by target, then source."""
    # Without links, the type of the weights is not known from them.
    table = DataFrame(links, columns=list(Link.__annotations__)).astype({"weight": "float32"})
    rows = Index(node_ids)
    source, target = rows.get_indexer(table["source"]), rows.get_indexer(table["target"])
    is_unknown = (source < 0) | (target < 0)
    _refuse(table, is_unknown, f"{LINK} has an end that is none of the nodes; export it again")
    layer, kind = nodes.layer.numpy(), nodes.kind.numpy()
    # The layer of an embedding is -1, of a target n_layers.
    is_upwards = layer[source] < layer[target]
    has_inputs = np.isin(kind[target], (FEATURE, TARGET))
    expected = "from a token, feature or error up to a feature or output"
    is_wrong = ~(is_upwards & has_inputs)
    _refuse(table, is_wrong, f"{LINK} does not lead {expected}; remove it")
    is_repeated = table.duplicated(["source", "target"])
    _refuse(table, is_repeated, f"{LINK} is there twice; remove one of them")
    order = np.lexsort((source, target))
    weight = _tensor(table["weight"])
    return torch.tensor(source[order]), torch.tensor(target[order]), weight[order]


def _groups(
    supernodes: Sequence[Sequence[str]], node_of: Mapping[str, Node]
) -> dict[str, tuple[Node, ...]]:
    groups: dict[str, tuple[Node, ...]] = {}
    for name, *members in supernodes:
        # Two supernodes may have the same name on the page.
        unique, number = name, 2
        while unique in groups:
            unique, number = f"{name} ({number})", number + 1
        groups[unique] = _known_nodes(members, node_of)
    return groups


def _known_nodes(names: Sequence[str], node_of: Mapping[str, Node]) -> tuple[Node, ...]:
    return tuple(node_of[name] for name in names if name in node_of)


def _settings(metadata: Metadata) -> dict[str, Any]:
    """The file's settings under the names that `AttributionGraph` gives them."""
    generation = metadata.get("generation_settings") or {}
    pruning = metadata.get("pruning_settings") or {}
    found = {ours: generation.get(theirs) for ours, theirs in SETTINGS.items()}
    found |= {name: pruning.get(name) for name in ("node_threshold", "edge_threshold")}
    return {name: value for name, value in found.items() if type(value) in (int, float)}
