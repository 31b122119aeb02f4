"""Import of attribution graphs from Neuronpedia's JSON, ours and other programs'."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from circuits.attribution.feature_graph import (
    EMBEDDING,
    ERROR,
    FEATURE,
    TARGET,
    FeatureGraph,
    LogitTarget,
    Nodes,
)
from circuits.formats.neuronpedia.format import (
    FIRST_CUSTOM,
    LARGEST_INDEX,
    LARGEST_WEIGHT,
    MOST_LAYERS,
    NODE_ID,
    OUTPUT,
    SCHEMA_VERSION,
    SETTINGS,
    SHOWN,
    TYPES,
    UNKNOWN_TOKEN,
)
from circuits.graph.nodes import Node
from circuits.system.errors import InputError


@dataclass(frozen=True, eq=False)
class ImportedGraph:
    """What Neuronpedia's graph JSON holds.

    Attributes:
        graph: the graph, with what was pruned gone. Its `direct` is NaN and `constants` has no columns, for the files do not say them; `tokens`
            is -1 at positions without an embedding; `model` and `transcoders` are None. Its influence is that of what is left.
        cumulative: by node, the influence in the file: the share that it and the more influential nodes made before pruning. NaN where absent.
        groups: supernodes, by name. Nodes that are not in the graph are left out.
        pinned: nodes of the pages' subgraph, likewise.
        labels: of features that have one.
        slug: the graph's name.
        scan: the model's.
    """

    graph: FeatureGraph
    cumulative: Float[Tensor, " node"]
    groups: Mapping[str, tuple[Node, ...]]
    pinned: tuple[Node, ...]
    labels: Mapping[Node, str]
    slug: str
    scan: str | None


@dataclass(frozen=True)
class _Row:
    """A node as the file has it; the index of a target is its token."""

    kind: int
    layer: int
    position: int
    index: int
    activation: float
    probability: float
    influence: float
    label: str

    @property
    def place(self) -> tuple[int, int, int, int]:
        return self.kind, self.layer, self.position, self.index


def load_neuronpedia(path: str | Path) -> ImportedGraph:
    """Read a graph JSON of Neuronpedia, circuit-tracer or `save_neuronpedia`.

    Errors may have new ids or old ones. A target without a probability counts 1 for influence; one with an id from a billion up is no token.

    Raises:
        InputError: the file is missing, truncated, of another kind or schema version; two nodes have one id; a link leads to no node, or not
            upwards; a number is not finite or absurdly large; a node is of a type with no place here, such as Lorsa's attention features.
    """
    content = _read(Path(path))
    try:
        return _imported(content, Path(path).name)
    except InputError as error:
        raise InputError(f"{path}: {error}") from error


def _read(path: Path) -> Mapping[str, Any]:
    if not path.is_file():
        raise InputError(f"there is no file {path}; check the path.")
    try:
        content = json.loads(path.read_bytes(), parse_constant=_no_number)
    except (ValueError, RecursionError) as error:
        raise InputError(
            f"{path} is truncated or not JSON ({error}); download it or make it again."
        ) from error
    parts = {"metadata": dict, "qParams": dict, "nodes": list, "links": list}
    if wrong := [
        name
        for name, kind in parts.items()
        if not isinstance(content, dict) or not isinstance(content.get(name), kind)
    ]:
        raise InputError(
            f"{path} is not a graph JSON of Neuronpedia: it has no {' or '.join(wrong)}; give the graph's own file."
        )
    if (found := content["metadata"].get("schema_version")) not in (None, SCHEMA_VERSION):
        raise InputError(
            f"{path} has schema version {_shown(found)}, and version {SCHEMA_VERSION} is read here; upgrade circuits."
        )
    return content


def _no_number(text: str) -> float:
    raise ValueError(f"{text} is no number in JSON")


def _imported(content: Mapping[str, Any], file: str) -> ImportedGraph:
    metadata = content["metadata"]
    words, slug, scan = (
        _texts(metadata, "prompt_tokens"),
        metadata.get("slug"),
        metadata.get("scan"),
    )
    if not words:
        raise InputError("prompt_tokens is empty; a graph is of a prompt.")
    rows = _named_once(content["nodes"], len(words))
    # Targets stay in the file's order.
    order = sorted(
        rows, key=lambda name: (TARGET,) if rows[name].kind == TARGET else rows[name].place
    )
    sorted_rows, numbers = (
        [rows[name] for name in order],
        {name: number for number, name in enumerate(order)},
    )
    layers = _n_layers(sorted_rows)
    source, target, weight = _edges(content["links"], numbers, sorted_rows, layers)
    graph = FeatureGraph(
        nodes=_nodes(sorted_rows, layers),
        source=source,
        target=target,
        weight=weight,
        direct=torch.full_like(weight, math.nan),
        constants=torch.zeros(len(order), 0),
        constant_names=(),
        tokens=_tokens(sorted_rows, len(words)),
        words=words,
        targets=tuple(
            LogitTarget(row.label, row.index if row.index < FIRST_CUSTOM else None)
            for row in sorted_rows
            if row.kind == TARGET
        ),
        n_layers=layers,
        settings={"imported_from": file, **_settings(metadata)},
    )
    nodes = {name: graph.node(number) for name, number in numbers.items()}
    return ImportedGraph(
        graph=graph,
        cumulative=torch.tensor([row.influence for row in sorted_rows], dtype=torch.float32),
        groups=_groups(content["qParams"], nodes),
        pinned=tuple(
            nodes[name]
            for name in _texts(content["qParams"], "pinnedIds", needed=False)
            if name in nodes
        ),
        labels={
            nodes[name]: row.label
            for name, row in rows.items()
            if row.kind == FEATURE and row.label
        },
        slug=slug if isinstance(slug, str) else Path(file).stem,
        scan=scan if isinstance(scan, str) else None,
    )


def _named_once(entries: Sequence[Any], n_words: int) -> dict[str, _Row]:
    """The nodes by id."""
    rows: dict[str, _Row] = {}
    seen: dict[tuple[int, ...], str] = {}
    types: dict[str, str] = {}
    for entry in entries:
        row = _row(entry, n_words)
        name, place = entry["node_id"], row.place
        if name in rows:
            both = f"two nodes are called {_shown(name)}, a {types[name]} and a {entry['feature_type']}"
            known = (
                "; circuit-tracer before mid-2026 gives errors the ids of features of layer 0"
                if rows[name].kind != row.kind
                else ""
            )
            raise InputError(
                f"{both}{known}; links to them are ambiguous: export the graph anew, with a later version."
            )
        if place in seen:
            raise InputError(
                f"the nodes {_shown(seen[place])} and {_shown(name)} are the same one; remove one of them."
            )
        rows[name], seen[place], types[name] = row, name, entry["feature_type"]
    return rows


def _row(entry: Any, n_words: int) -> _Row:
    if not isinstance(entry, dict) or not isinstance(entry.get("node_id"), str):
        raise InputError(f"a node has no text node_id: {_shown(entry)}; every node needs one.")
    where = f"node {_shown(entry['node_id'])}"
    kind = _kind(entry.get("feature_type"), where)
    position = _whole(entry.get("ctx_idx"), n_words - 1, f"{where}: ctx_idx")
    layer = -1 if kind == EMBEDDING else _layer(entry.get("layer"), where)
    index = 0 if kind == ERROR else _index(entry, kind, layer, position, where)
    activation, probability, influence = (
        _real(entry.get(name), f"{where}, {name},")
        for name in ("activation", "token_prob", "influence")
    )
    label = str(entry.get("clerp") or "")
    if kind != TARGET:
        return _Row(
            kind,
            layer,
            position,
            index,
            activation if kind == FEATURE else math.nan,
            0.0,
            influence,
            label,
        )
    output = OUTPUT.fullmatch(label)
    label = output["label"] if output else label or f"#{index}"
    return _Row(
        kind,
        layer,
        position,
        index,
        math.nan,
        1.0 if math.isnan(probability) else probability,
        influence,
        label,
    )


def _kind(name: Any, where: str) -> int:
    if isinstance(name, str) and "lorsa" in name.lower():
        raise InputError(
            f"{where} is of type {_shown(name)}: graphs with Lorsa's attention features cannot be read; make one with transcoders alone."
        )
    if not isinstance(name, str) or name not in TYPES:
        raise InputError(
            f"{where} is of type {_shown(name)}; types that can be read are {', '.join(TYPES)}."
        )
    return TYPES[name]


def _layer(value: Any, where: str) -> int:
    if isinstance(value, str) and re.fullmatch("[0-9]{1,9}", value):
        value = int(value)
    return _whole(value, MOST_LAYERS, f"{where}: layer")


def _index(entry: Mapping[str, Any], kind: int, layer: int, position: int, where: str) -> int:
    """A feature's number, an embedding's or a target's token: what stands in the middle of the id."""
    match = NODE_ID.fullmatch(entry["node_id"])
    if kind == TARGET:
        return (
            int(match["index"])
            if match
            else _whole(entry.get("feature"), LARGEST_INDEX, f"{where}: feature")
        )
    first = "E" if kind == EMBEDDING else str(layer)
    if match is None or (match["layer"], int(match["position"])) != (first, position):
        raise InputError(
            f"{where} is a {entry['feature_type']} at layer {first} and position {position}; its id must be {first}_<number>_{position}."
        )
    return int(match["index"])


def _n_layers(rows: Iterable[_Row]) -> int:
    """Of the model, as far as the nodes tell: targets are at one more, features and errors below."""
    below = {FEATURE: 1, ERROR: 1, TARGET: -1}
    return max((row.layer + below[row.kind] for row in rows if row.kind in below), default=0)


def _nodes(rows: Sequence[_Row], layers: int) -> Nodes:
    is_target = [row.kind == TARGET for row in rows]
    first = is_target.index(True) if any(is_target) else 0

    def column(values: Iterable[int]) -> Tensor:
        return torch.tensor(list(values), dtype=torch.long)

    return Nodes(
        kind=column(row.kind for row in rows),
        layer=column(layers if row.kind == TARGET else row.layer for row in rows),
        position=column(row.position for row in rows),
        index=column(
            number - first if row.kind == TARGET else row.index for number, row in enumerate(rows)
        ),
        activation=torch.tensor([row.activation for row in rows], dtype=torch.float32),
        probability=torch.tensor([row.probability for row in rows], dtype=torch.float32),
    )


def _tokens(rows: Sequence[_Row], n_words: int) -> Tensor:
    tokens = torch.full((n_words,), UNKNOWN_TOKEN, dtype=torch.long)
    for row in rows:
        if row.kind == EMBEDDING:
            tokens[row.position] = row.index
    return tokens


def _edges(
    links: Sequence[Any], numbers: Mapping[str, int], rows: Sequence[_Row], layers: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Sources, targets and weights, by target and then source."""
    source, target = (
        torch.tensor([_ends(link, numbers) for link in links], dtype=torch.long)
        .reshape(-1, 2)
        .unbind(1)
    )
    weight = torch.tensor([_weight(link) for link in links], dtype=torch.float32)
    rank = torch.tensor(
        [layers if row.kind == TARGET else row.layer for row in rows], dtype=torch.long
    )
    has_edges_in = torch.tensor([row.kind in (FEATURE, TARGET) for row in rows], dtype=torch.bool)
    for place in (
        ((rank[source] >= rank[target]) | ~has_edges_in[target]).nonzero().flatten().tolist()
    ):
        raise InputError(
            f"{_between(links[place])} does not lead from a token, feature or error up to a feature or an output; remove it."
        )
    order = torch.argsort(target * len(rows) + source, stable=True)
    source, target, weight = source[order], target[order], weight[order]
    for place in (
        ((source[1:] == source[:-1]) & (target[1:] == target[:-1])).nonzero().flatten().tolist()
    ):
        raise InputError(
            f"{_between(links[int(order[place])])} is there twice; remove one of them."
        )
    return source, target, weight


def _weight(link: Mapping[str, Any]) -> float:
    value = link.get("weight")
    # Millions are read, so that the words for a wrong one are made only then.
    if isinstance(value, float) and abs(value) <= LARGEST_WEIGHT:
        return value
    return _real(value, _between(link), needed=True)


def _between(link: Mapping[str, Any]) -> str:
    return f"the link {_shown(link['source'])} -> {_shown(link['target'])}"


def _ends(link: Any, numbers: Mapping[str, int]) -> tuple[int, int]:
    if not (
        isinstance(link, dict)
        and isinstance(link.get("source"), str)
        and isinstance(link.get("target"), str)
    ):
        raise InputError(f"a link has no source and target: {_shown(link)}; every link needs them.")
    for end in (link["source"], link["target"]):
        if end not in numbers:
            raise InputError(
                f"{_between(link)} leads to {_shown(end)}, which is none of the nodes; export the graph anew."
            )
    return numbers[link["source"]], numbers[link["target"]]


def _groups(
    parameters: Mapping[str, Any], nodes: Mapping[str, Node]
) -> dict[str, tuple[Node, ...]]:
    groups: dict[str, tuple[Node, ...]] = {}
    supernodes = parameters.get("supernodes") or []
    for entry in supernodes if isinstance(supernodes, list) else [supernodes]:
        if (
            not isinstance(entry, list)
            or not entry
            or not all(isinstance(part, str) for part in entry)
        ):
            raise InputError(
                f"a supernode is {_shown(entry)}; it must be a list of its name and the ids of its nodes."
            )
        name, times = entry[0], 2
        while name in groups:
            name, times = f"{entry[0]} ({times})", times + 1
        groups[name] = tuple(nodes[part] for part in entry[1:] if part in nodes)
    return groups


def _settings(metadata: Mapping[str, Any]) -> dict[str, int | float]:
    """The settings in the file under our names."""
    generation, pruning = (metadata.get(f"{part}_settings") for part in ("generation", "pruning"))
    named = (
        {ours: generation.get(theirs) for ours, theirs in SETTINGS.items()}
        if isinstance(generation, dict)
        else {}
    )
    if isinstance(pruning, dict):
        named |= {name: pruning.get(name) for name in ("node_threshold", "edge_threshold")}
    return {
        name: value
        for name, value in named.items()
        if isinstance(value, int | float) and not isinstance(value, bool)
    }


def _texts(content: Mapping[str, Any], name: str, *, needed: bool = True) -> tuple[str, ...]:
    value = content.get(name)
    if value is None and not needed:
        return ()
    if not isinstance(value, list) or not all(isinstance(part, str) for part in value):
        raise InputError(f"{name} is {_shown(value)}; it must be a list of texts.")
    return tuple(value)


def _whole(value: Any, most: int, where: str) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value <= most:
        raise InputError(f"{where} is {_shown(value)}; it must be a whole number from 0 to {most}.")
    return value


def _real(value: Any, where: str, *, needed: bool = False) -> float:
    if value is None and not needed:
        return math.nan
    if (
        not isinstance(value, int | float)
        or isinstance(value, bool)
        or not abs(value) <= LARGEST_WEIGHT
    ):
        raise InputError(
            f"{where} holds the number {_shown(value)}; it must be finite and of ordinary size."
        )
    return float(value)


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= SHOWN else f"{text[:SHOWN]}..."
