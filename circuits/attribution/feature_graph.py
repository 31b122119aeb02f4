"""The attribution graph of one prompt as a value, with nodes and edges in columns.

Nodes are sorted by kind: features (by layer, position, index), errors (by layer, position), token
embeddings (by position), targets. Edges are sorted by target, then source. Each edge leads to a
feature or a target of a later layer.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import IntEnum
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any

import networkx
import pandas as pd
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from circuits.graph.identity import ModelIdentity, TranscodersIdentity
from circuits.graph.nodes import Error, Feature, Logits, Node, Position, TokenEmbed, parse_node
from circuits.system.errors import InputError
from circuits.system.files import read_tensors, write_tensors

FILE = "graph.safetensors"
FORMAT, FORMAT_VERSION = "circuits.feature_graph", 1
# The fields that are saved as JSON.
DESCRIPTION = ("words", "targets", "constant_names", "n_layers", "model", "transcoders", "settings")
MOST_LAYERS = 10_000
SHOWN_TARGETS = 5

NodeMask = Bool[Tensor, " node"]
NodeNumbers = Int[Tensor, " node"]
NodeScores = Float[Tensor, " node"]
EdgeMask = Bool[Tensor, " edge"]
EdgeNumbers = Int[Tensor, " edge"]
EdgeScores = Float[Tensor, " edge"]


class NodeKind(IntEnum):
    """The kinds of nodes, in the order in which a graph lists them."""

    FEATURE = 0
    ERROR = 1
    EMBEDDING = 2
    TARGET = 3


FEATURE, ERROR, EMBEDDING, TARGET = map(int, NodeKind)


def node_of(
    kind: int, layer: int, index: int, position: Position, logits: Sequence[str | int]
) -> Node:
    """Return the node in one row of node columns; `logits` name the targets by token or label."""
    match kind:
        case NodeKind.FEATURE:
            return Feature(layer, index, position)
        case NodeKind.ERROR:
            return Error(layer, position)
        case NodeKind.EMBEDDING:
            return TokenEmbed(position)
    return Logits(logits[index], position)


@dataclass(frozen=True, eq=False)
class Nodes:
    """The nodes of an attribution graph, in columns.

    Attributes:
        kind: a `NodeKind`.
        layer: -1 for embeddings, the number of layers for targets.
        position: the position in the prompt.
        index: a feature's number, an embedding's token, a target's place in the graph's `targets`.
        activation: a feature's activation; NaN for other kinds.
        probability: a target's weight in influence, such as its probability; 0 for other kinds.
    """

    kind: NodeNumbers
    layer: NodeNumbers
    position: NodeNumbers
    index: NodeNumbers
    activation: NodeScores
    probability: NodeScores

    def __len__(self) -> int:
        return len(self.kind)

    def __getitem__(self, chosen: Tensor) -> Nodes:
        return Nodes(*(column[chosen] for column in vars(self).values()))

    def to(self, device: str | torch.device) -> Nodes:
        """Return the same nodes on `device`."""
        return Nodes(*(column.to(device) for column in vars(self).values()))


@dataclass(frozen=True)
class LogitTarget:
    """What a graph explains: a logit minus the mean logit, a logit difference, or any direction.

    Attributes:
        label: a text for people; for a token, its text.
        token: the token's id; None for a target that is not one token.
    """

    label: str
    token: int | None = None


@dataclass(frozen=True, eq=False)
class FeatureGraph:
    """The attribution graph of one prompt: how features, errors and tokens lead to the output.

    The weight of an edge is its source's value times the linear weight from the source to the
    target's pre-activation, over all paths through the residual stream and frozen attention.
    A target's pre-activation is the sum of its incoming edges and its constants.

    >>> import circuits
    >>> model = circuits.load_model("toy-world")
    >>> graph = circuits.AttributionGraph("toy-world-clt").attribute(model, "Dallas is in")
    >>> list(graph.incoming(graph.node(-1), n=2)["node"])
    ['f0.475@3', 'f3.30@3']

    Attributes:
        nodes: the nodes in columns. `node(i)` and `find(node)` convert between row and `Node`.
        source, target: rows of `nodes`.
        weight: the weight of each edge.
        direct: the part of the weight that stays at its position; attention carries the rest.
        constants: for each feature and target, what its pre-activation holds besides its edges.
        constant_names: the columns of `constants`.
        tokens, words: the ids and the texts of the prompt's tokens.
        targets: what the graph explains.
        n_layers: the number of layers of the model.
        directions: each target's direction after the final norm; None in an imported graph.
        model, transcoders: what the graph was made from.
        settings: the settings of the method, as JSON values.
    """

    nodes: Nodes
    source: EdgeNumbers
    target: EdgeNumbers
    weight: EdgeScores
    direct: EdgeScores
    constants: Float[Tensor, "node constant"]
    constant_names: tuple[str, ...]
    tokens: Int[Tensor, " pos"]
    words: tuple[str, ...]
    targets: tuple[LogitTarget, ...]
    n_layers: int
    directions: Float[Tensor, "explained d_model"] | None = None
    model: ModelIdentity | None = None
    transcoders: TranscodersIdentity | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)

    def __len__(self) -> int:
        """Return the number of edges."""
        return len(self.source)

    def __repr__(self) -> str:
        counts = ", ".join(f"{count} {name}" for name, count in self._counts().items())
        return f"FeatureGraph({self.prompt!r}: {counts})"

    def _repr_html_(self) -> str:
        """Return a small table for notebooks, with all text escaped."""
        explained = self.nodes[self.nodes.kind == TARGET]
        order = explained.probability.argsort(descending=True)
        top = explained[order[:SHOWN_TARGETS]]
        logits = [
            f"{self.targets[index].label} ({probability:.2f})"
            for index, probability in _rows(top.index, top.probability)
        ]
        rows = {"prompt": self.prompt, "top logits": ", ".join(logits)}
        table = pd.Series(rows | self._counts()).to_frame()
        with pd.option_context("display.max_colwidth", None):
            return table.to_html(header=False)

    def _counts(self) -> dict[str, str]:
        kinds = torch.bincount(self.nodes.kind, minlength=len(NodeKind))
        names = ("features", "errors", "tokens", "targets", "edges")
        counts = zip(names, (*kinds.tolist(), len(self)), strict=True)
        return {name: f"{count:,}" for name, count in counts}

    @property
    def prompt(self) -> str:
        """The prompt's text."""
        words_hold_spaces = any(word.startswith(" ") for word in self.words)
        return ("" if words_hold_spaces else " ").join(self.words)

    def node(self, number: int) -> Node:
        """Return the node in row `number` of `nodes`."""
        return self._all_nodes[number]

    def find(self, node: Node | str) -> int:
        """Return the row of a node, given as a value or as text such as `f2.1204@5`.

        Raises:
            InputError: the graph has no such node.
        """
        wanted = parse_node(node) if isinstance(node, str) else node
        if wanted not in self._numbers:
            examples = ", ".join(map(str, self._all_nodes[-3:]))
            raise InputError(
                f"the graph has no node {wanted}; it has {len(self.nodes):,}, such as {examples}."
            )
        return self._numbers[wanted]

    @cached_property
    def _all_nodes(self) -> list[Node]:
        nodes = self.nodes
        logits = [one.label if one.token is None else one.token for one in self.targets]
        rows = _rows(nodes.kind, nodes.layer, nodes.index, nodes.position)
        return [
            node_of(kind, layer, index, position, logits) for kind, layer, index, position in rows
        ]

    @cached_property
    def _numbers(self) -> dict[Node, int]:
        return {node: number for number, node in enumerate(self._all_nodes)}

    def is_kind(self, *kinds: int) -> NodeMask:
        """Return which nodes are of these kinds."""
        kind = self.nodes.kind
        return torch.isin(kind, torch.tensor(kinds, device=kind.device))

    def adjacency(self) -> Float[Tensor, "target source"]:
        """Return the weights as a square matrix with one row per target."""
        n = len(self.nodes)
        dense = self.weight.new_zeros(n, n)
        dense[self.target, self.source] = self.weight
        return dense

    def levels(self) -> list[slice]:
        """Return slices of the edges by the layer of their targets, the last layer first.

        All edges out of the targets of one slice are in earlier slices.
        """
        # Features are the first nodes, sorted by layer. All edges after theirs lead to targets.
        feature_layers = self.nodes.layer[self.nodes.kind == FEATURE]
        layers = torch.arange(self.n_layers + 1, device=self.target.device)
        first_nodes = torch.searchsorted(feature_layers, layers)
        first_edges = torch.searchsorted(self.target, first_nodes)
        bounds = [*first_edges.tolist(), len(self)]
        return [slice(start, stop) for start, stop in pairwise(bounds)][::-1]

    def subgraph(self, nodes: NodeMask, edges: EdgeMask | None = None) -> FeatureGraph:
        """Return the graph of the chosen nodes and the edges, or chosen edges, between them."""
        kept = nodes[self.source] & nodes[self.target]
        if edges is not None:
            kept &= edges
        number = nodes.long().cumsum(0) - 1
        return replace(
            self,
            nodes=self.nodes[nodes],
            source=number[self.source[kept]],
            target=number[self.target[kept]],
            weight=self.weight[kept],
            direct=self.direct[kept],
            constants=self.constants[nodes],
        )

    def incoming(self, node: Node | str, n: int = 10) -> pd.DataFrame:
        """Return the `n` strongest edges into a node, by absolute weight.

        Columns are `node`, `weight`, and its parts `direct` and `attention`.
        """
        return self._strongest(self.target == self.find(node), self.source, n)

    def outgoing(self, node: Node | str, n: int = 10) -> pd.DataFrame:
        """Return the `n` strongest edges out of a node, with the same columns as `incoming`."""
        return self._strongest(self.source == self.find(node), self.target, n)

    def _strongest(self, chosen: EdgeMask, other_end: EdgeNumbers, n: int) -> pd.DataFrame:
        if n < 0:
            raise InputError(f"n={n} edges were asked for; give 0 or more.")
        edges = chosen.nonzero().flatten()
        order = self.weight[edges].abs().argsort(descending=True, stable=True)
        edges = edges[order[:n]]  # names are made for these only
        names = [str(self.node(number)) for number in other_end[edges].tolist()]
        weight, direct = self.weight[edges].cpu(), self.direct[edges].cpu()
        columns = {"node": names, "weight": weight, "direct": direct}
        return pd.DataFrame(columns | {"attention": weight - direct})

    def to_networkx(self) -> networkx.DiGraph:
        """Return a networkx graph with texts such as `f2.1204@5` as nodes.

        Features have the attribute `activation`; edges have `weight` and `direct`.
        """
        names = [str(node) for node in self._all_nodes]
        result = networkx.DiGraph()
        result.add_nodes_from(names)
        features = (self.nodes.kind == FEATURE).nonzero().flatten()
        for number, activation in _rows(features, self.nodes.activation[features]):
            result.add_node(names[number], activation=activation)
        edges = _rows(self.source, self.target, self.weight, self.direct)
        result.add_edges_from(
            (names[source], names[target], {"weight": weight, "direct": direct})
            for source, target, weight, direct in edges
        )
        return result

    def to(self, device: str | torch.device) -> FeatureGraph:
        """Return the same graph with its tensors on `device`."""
        moved = {name: tensor.to(device) for name, tensor in self._tensors().items()}
        return replace(self, nodes=self.nodes.to(device), **moved)

    def _tensors(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if isinstance(value, Tensor)}

    def save(self, folder: str | Path) -> Path:
        """Write `graph.safetensors` into `folder`, made if missing; return the file's path."""
        tensors = {f"nodes.{name}": column for name, column in vars(self.nodes).items()}
        tensors |= self._tensors()
        # Node numbers fit into half the bytes.
        tensors |= {"source": self.source.int(), "target": self.target.int()}
        description = {name: getattr(self, name) for name in DESCRIPTION}
        metadata = {"description": json.dumps(description, default=vars)}
        return write_tensors(Path(folder) / FILE, tensors, metadata, FORMAT, FORMAT_VERSION)

    @staticmethod
    def load(folder: str | Path) -> FeatureGraph:
        """Read what `save` wrote; `folder` may also be the path of the file.

        Raises:
            InputError: the file is missing, damaged, of another kind, or from a newer version.
        """
        path = Path(folder) if Path(folder).is_file() else Path(folder) / FILE
        tensors, metadata = read_tensors(path, FORMAT, FORMAT_VERSION)
        try:
            graph = _from_file(tensors, json.loads(metadata["description"]))
            _check_shapes(graph)
            _check_nodes(graph)
            _check_edges(graph)
        except (LookupError, TypeError, ValueError, AttributeError, RecursionError) as error:
            raise InputError(
                f"{path} is damaged ({error}); make the graph again or restore the file."
            ) from error
        return graph


def _rows(*columns: Tensor) -> Iterator[Any]:
    return zip(*(column.tolist() for column in columns), strict=True)


def _from_file(tensors: dict[str, Tensor], fields: dict[str, Any]) -> FeatureGraph:
    for name in ("words", "constant_names"):
        fields[name] = tuple(fields[name])
    fields["targets"] = tuple(LogitTarget(**target) for target in fields["targets"])
    identities = {"model": ModelIdentity, "transcoders": TranscodersIdentity}
    for name, identity in identities.items():
        if fields[name] is not None:
            fields[name] = identity(**fields[name])
    columns = {}
    for name, tensor in tensors.items():
        if name.startswith("nodes."):
            columns[name.removeprefix("nodes.")] = tensor
        else:
            fields[name] = tensor
    for name in ("source", "target"):
        fields[name] = fields[name].long()
    return FeatureGraph(nodes=Nodes(**columns), **fields)


def _require(holds: bool | Tensor, problem: str) -> None:
    if not holds:
        raise ValueError(problem)


def _check_shapes(graph: FeatureGraph) -> None:
    n_nodes, n_layers = len(graph.nodes), graph.n_layers
    node_shapes = {column.shape for column in vars(graph.nodes).values()}
    edge_columns = (graph.source, graph.target, graph.weight, graph.direct)
    edge_shapes = {column.shape for column in edge_columns}
    same = node_shapes == {(n_nodes,)} and edge_shapes == {(len(graph),)}
    _require(same, "its columns differ in length")
    labels = [target.label for target in graph.targets]
    texts = (*graph.words, *labels, *graph.constant_names)
    all_text = all(isinstance(text, str) for text in texts)
    complete = all_text and len(graph.words) == len(graph.tokens)
    _require(complete, "its words are incomplete")
    constants = (n_nodes, len(graph.constant_names))
    _require(graph.constants.shape == constants, "its constants are incomplete")
    sensible = type(n_layers) is int and 0 < n_layers <= MOST_LAYERS
    _require(sensible, f"it has {n_layers} layers")


def _check_nodes(graph: FeatureGraph) -> None:
    nodes, top = graph.nodes, graph.n_layers
    _check_range("a node's kind", nodes.kind, TARGET)
    _check_range("a node's position", nodes.position, len(graph.tokens) - 1)
    is_target, probability = nodes.kind == TARGET, nodes.probability
    _check_range("a target's index", nodes.index[is_target], len(graph.targets) - 1)
    _require((nodes.layer[is_target] == top).all(), "a target is in a layer")
    in_layer = nodes.layer[graph.is_kind(FEATURE, ERROR)]
    _check_range("the layer of a feature or error", in_layer, top - 1)
    proper = torch.isfinite(probability) & (probability >= 0)
    _require(proper.all(), "a target's probability is negative or not finite")
    order = nodes.kind * (top + 2) + nodes.layer
    _require((order.diff() >= 0).all(), "its nodes are not in order")
    _require(len(graph._numbers) == len(nodes), "a node appears twice")


def _check_edges(graph: FeatureGraph) -> None:
    source, target, n = graph.source, graph.target, len(graph.nodes)
    _check_range("an edge's source", source, n - 1)
    _check_range("an edge's target", target, n - 1)
    _require(torch.isfinite(graph.weight).all(), "a weight is not finite")
    order = target * n + source
    _require((order.diff() > 0).all(), "its edges are not in order")
    layer = graph.nodes.layer
    has_inputs = graph.is_kind(FEATURE, TARGET)
    _require(has_inputs[target].all(), "an edge leads to an error or token")
    _require((layer[source] < layer[target]).all(), "an edge does not lead to a later layer")


def _check_range(name: str, numbers: Tensor, highest: int) -> None:
    inside = (numbers >= 0) & (numbers <= highest)
    _require(inside.all(), f"{name} is outside 0 to {highest}")
