"""The attribution graph of one prompt as a value, with nodes and edges in columns.

Nodes are sorted by kind: features (by layer, position, index), errors (by layer, position), token
embeddings (by position), targets. Edges are sorted by target, then source. Each edge leads to a
feature or a target of a later layer.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from itertools import pairwise, starmap
from operator import attrgetter
from pathlib import Path
from typing import Any

import networkx
import pandas as pd
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from circuits.attribution.tensor_table import select_rows, tensors_of, true_rows
from circuits.graph.identity import ModelIdentity, TranscodersIdentity
from circuits.graph.nodes import Error, Feature, Logits, Node, Position, TokenEmbed, parse_node
from circuits.system.arguments import checked_arguments
from circuits.system.errors import InputError, OutOfRangeError
from circuits.system.files import is_file, json_text, path_of, read_tensors, write_tensors
from circuits.system.kinds import expect
from circuits.system.numbers import WholeNumber, whole

FILE = "graph.safetensors"
FORMAT, FORMAT_VERSION = "circuits.feature_graph", 1
# The fields that are saved as JSON.
DESCRIPTION = ("words", "targets", "constant_names", "n_layers", "model", "transcoders", "settings")
MOST_LAYERS = 10_000
SHOWN_TARGETS = 5
IDENTITIES = {"model": ModelIdentity, "transcoders": TranscodersIdentity}

# The kinds of nodes, in the order in which a graph lists them.
KINDS = ("features", "errors", "tokens", "targets")
FEATURE, ERROR, EMBEDDING, TARGET = range(len(KINDS))

NodeMask = Bool[Tensor, " node"]
NodeNumbers = Int[Tensor, " node"]
NodeScores = Float[Tensor, " node"]
EdgeMask = Bool[Tensor, " edge"]
EdgeNumbers = Int[Tensor, " edge"]
EdgeScores = Float[Tensor, " edge"]
Device = str | torch.device
edge_columns = attrgetter("source", "target", "weight", "direct")
# The explained logits by token or label.
Names = Sequence[str | int]
# What must hold of a graph, and the problem if it does not.
Condition = tuple[bool | Tensor, str]


def node_of(logits: Names, kind: int, layer: int, index: int, position: Position) -> Node:
    """Return the node in one row of node columns; `logits` name the targets."""
    if kind == FEATURE:
        return Feature(layer, index, position)
    if kind == ERROR:
        return Error(layer, position)
    if kind == EMBEDDING:
        return TokenEmbed(position)
    return Logits(logits[index], position)


@dataclass(frozen=True, eq=False)
class Nodes:
    """The nodes of an attribution graph, in columns.

    Attributes:
        kind: `FEATURE`, `ERROR`, `EMBEDDING` or `TARGET`.
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
        return select_rows(self, chosen)

    def to(self, device: Device) -> Nodes:
        """Return the same nodes on `device`."""
        columns = vars(self).values()
        moved = [column.to(device) for column in columns]
        return Nodes(*moved)


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
        items = self._counts().items()
        counts = [f"{count} {name}" for name, count in items]
        return f"FeatureGraph({self.prompt!r}: {', '.join(counts)})"

    def _repr_html_(self) -> str:
        """Return a small table for notebooks, with all text escaped."""
        explained = self.nodes[self.is_kind(TARGET)]
        order = explained.probability.argsort(descending=True)
        top = explained[order[:SHOWN_TARGETS]]
        logits = [
            f"{self.targets[index].label} ({probability:.2f})"
            for index, probability in _rows(top.index, top.probability)
        ]
        top_logits = ", ".join(logits)
        rows = {"prompt": self.prompt, "top logits": top_logits}
        table = pd.Series(rows | self._counts())
        with pd.option_context("display.max_colwidth", None):
            return table.to_frame().to_html(header=False)

    def _counts(self) -> dict[str, str]:
        counts = {}
        for kind, name in enumerate(KINDS):
            counts[name] = f"{int(self.is_kind(kind).sum()):,}"
        return counts | {"edges": f"{len(self):,}"}

    @property
    def prompt(self) -> str:
        """The prompt's text."""
        # The tokens of most tokenizers hold their spaces; whole words do not.
        hold_spaces = any(word.startswith(" ") for word in self.words)
        return ("" if hold_spaces else " ").join(self.words)

    @checked_arguments
    def node(self, number: WholeNumber) -> Node:
        """Return the node in row `number` of `nodes`; negative ones count from the end."""
        number, n_nodes = int(number), len(self.nodes)
        if not -n_nodes <= number < n_nodes:
            raise OutOfRangeError(f"there is no node {number}: the graph has {n_nodes:,}.")
        return self._all_nodes[number]

    def find(self, node: Node | str) -> int:
        """Return the row of a node, given as a value or as text such as `f2.1204@5`.

        Raises:
            InputError: the graph has no such node.
        """
        wanted = parse_node(node) if isinstance(node, str) else node
        expect(wanted, Node, "a node", "write it like f2.1204@5, or take one of graph.node(row)")
        if wanted not in self._numbers:
            examples = map(str, self._all_nodes[-3:])
            raise InputError(
                f"the graph has no node {wanted}; it has {len(self.nodes):,}, "
                f"such as {', '.join(examples)}."
            )
        return self._numbers[wanted]

    @cached_property
    def _all_nodes(self) -> list[Node]:
        nodes = self.nodes
        logits = [one.label if one.token is None else one.token for one in self.targets]
        rows = _rows(nodes.kind, nodes.layer, nodes.index, nodes.position)
        return [node_of(logits, *row) for row in rows]

    @cached_property
    def _numbers(self) -> dict[Node, int]:
        nodes = enumerate(self._all_nodes)
        return {node: number for number, node in nodes}

    def is_kind(self, *kinds: int) -> NodeMask:
        """Return which nodes are of these kinds."""
        kind = self.nodes.kind
        return torch.isin(kind, kind.new_tensor(kinds))

    def adjacency(self) -> Float[Tensor, "target source"]:
        """Return the weights as a square matrix with one row per target."""
        n_nodes = len(self.nodes)
        # A[t, s] = w[t, s]
        dense = self.weight.new_zeros(n_nodes, n_nodes)
        dense[self.target, self.source] = self.weight
        return dense

    def levels(self) -> list[slice]:
        """Return slices of the edges by the layer of their targets, the last layer first.

        All edges out of the targets of one slice are in earlier slices.
        """
        # Features are the first nodes, sorted by layer. All edges after theirs lead to targets.
        feature_layers = self.nodes.layer[self.is_kind(FEATURE)]
        n_levels = self.n_layers + 1
        layers = self.target.new_tensor(range(n_levels))
        first_nodes = torch.searchsorted(feature_layers, layers)
        first_edges = torch.searchsorted(self.target, first_nodes)
        bounds = [*first_edges.tolist(), len(self)]
        ascending = list(starmap(slice, pairwise(bounds)))
        return ascending[::-1]

    @checked_arguments
    def subgraph(self, nodes: NodeMask, edges: EdgeMask | None = None) -> FeatureGraph:
        """Return the graph of the chosen nodes and the edges, or chosen edges, between them.

        Raises:
            InputError: a mask has another length than there are nodes or edges.
        """
        for name, mask, table in (("nodes", nodes, self.nodes), ("edges", edges, self)):
            if mask is not None and len(mask) != len(table):
                raise InputError(
                    f"{name} has {len(mask)} entries, and the graph has {len(table)} {name}; give "
                    "True or False for each."
                )
        kept = nodes[self.source] & nodes[self.target]
        if edges is not None:
            kept &= edges
        # The row of each chosen node among the chosen ones.
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

    def incoming(self, node: Node | str, n: WholeNumber = 10) -> pd.DataFrame:
        """Return the `n` strongest edges into a node, by absolute weight.

        Columns are `node`, `weight`, and its parts `direct` and `attention`.

        Raises:
            InputError: the graph has no such node, or `n` is negative.
        """
        chosen = self.target == self.find(node)
        return self._strongest(chosen, self.source, n)

    def outgoing(self, node: Node | str, n: WholeNumber = 10) -> pd.DataFrame:
        """Return the `n` strongest edges out of a node, with the same columns as `incoming`.

        Raises:
            InputError: the graph has no such node, or `n` is negative.
        """
        chosen = self.source == self.find(node)
        return self._strongest(chosen, self.target, n)

    def _strongest(self, chosen: EdgeMask, other_end: EdgeNumbers, n: WholeNumber) -> pd.DataFrame:
        n = whole(n, "n", least=0)
        edges = true_rows(chosen)
        sizes = self.weight[edges].abs()
        order = sizes.argsort(descending=True, stable=True)
        edges = edges[order[:n]]
        names = [str(self.node(number)) for number in other_end[edges].tolist()]
        weight = self.weight[edges].cpu()
        direct = self.direct[edges].cpu()
        return pd.DataFrame(
            {"node": names, "weight": weight, "direct": direct, "attention": weight - direct}
        )

    def to_networkx(self) -> networkx.DiGraph:
        """Return a networkx graph with texts such as `f2.1204@5` as nodes.

        Features have the attribute `activation`; edges have `weight` and `direct`.
        """
        names = list(map(str, self._all_nodes))
        result = networkx.empty_graph(names, networkx.DiGraph)
        features = true_rows(self.is_kind(FEATURE))
        activations = self.nodes.activation[features]
        for number, activation in _rows(features, activations):
            result.add_node(names[number], activation=activation)
        columns = edge_columns(self)
        for source, target, weight, direct in _rows(*columns):
            ends = names[source], names[target]
            result.add_edge(*ends, weight=weight, direct=direct)
        return result

    @checked_arguments
    def to(self, device: Device) -> FeatureGraph:
        """Return the same graph with its tensors on `device`."""
        moved = tensors_of(self)
        for name, tensor in moved.items():
            moved[name] = tensor.to(device)
        nodes = self.nodes.to(device)
        return replace(self, nodes=nodes, **moved)

    def save(self, folder: str | Path) -> Path:
        """Write `graph.safetensors` into `folder`, made if missing; return the file's path."""
        tensors = tensors_of(self)
        for name, column in vars(self.nodes).items():
            tensors[f"nodes.{name}"] = column
        # Node numbers fit into half the bytes.
        for name in ("source", "target"):
            tensors[name] = tensors[name].int()
        values = {name: getattr(self, name) for name in DESCRIPTION}
        metadata = {"description": json_text(values)}
        path = path_of(folder) / FILE
        return write_tensors(path, tensors, metadata, FORMAT, FORMAT_VERSION)

    @staticmethod
    def load(folder: str | Path) -> FeatureGraph:
        """Read what `save` wrote; `folder` may also be the path of the file.

        Raises:
            InputError: the file is missing, damaged, of another kind, or from a newer version.
        """
        path = path_of(folder)
        if not is_file(path):
            path /= FILE
        tensors, metadata = read_tensors(path, FORMAT, FORMAT_VERSION)
        try:
            description = json.loads(metadata["description"])
            graph = _from_file(description | tensors)
            _check(graph)
        except (LookupError, TypeError, ValueError, AttributeError, RecursionError) as error:
            raise InputError(
                f"{path} is damaged ({error}); make the graph again or restore the file."
            ) from error
        return graph


def _rows(*columns: Tensor) -> Iterator[Any]:
    lists = [column.tolist() for column in columns]
    return zip(*lists, strict=True)


def _from_file(values: dict[str, Any]) -> FeatureGraph:
    columns = [values.pop(f"nodes.{column.name}") for column in fields(Nodes)]
    for name in ("source", "target"):
        values[name] = values[name].long()
    values["targets"] = [LogitTarget(**target) for target in values["targets"]]
    for name in ("words", "constant_names", "targets"):
        values[name] = tuple(values[name])
    for name, identity in IDENTITIES.items():
        if values[name] is not None:
            values[name] = identity(**values[name])
    return FeatureGraph(Nodes(*columns), **values)


def _check(graph: FeatureGraph) -> None:
    """Raise a ValueError if the contents of a file do not fit together."""
    # A condition may rely on those before it.
    for conditions in (_of_columns, _of_description, _of_targets, _of_nodes, _of_edges):
        for holds, problem in conditions(graph):
            if not torch.as_tensor(holds).all():
                raise ValueError(problem)


def _of_columns(graph: FeatureGraph) -> Iterator[Condition]:
    n_nodes = len(graph.nodes)
    columns = vars(graph.nodes).values()
    shapes = {column.shape for column in columns}
    yield shapes == {(n_nodes,)}, "its columns differ in length"
    shapes = {column.shape for column in edge_columns(graph)}
    yield shapes == {(len(graph),)}, "its columns differ in length"
    constants = (n_nodes, len(graph.constant_names))
    yield graph.constants.shape == constants, "its constants are incomplete"


def _of_description(graph: FeatureGraph) -> Iterator[Condition]:
    labels = [target.label for target in graph.targets]
    texts = [*graph.words, *labels, *graph.constant_names]
    all_text = all(isinstance(text, str) for text in texts)
    same_length = len(graph.words) == len(graph.tokens)
    yield all_text and same_length, "its words are incomplete"
    n_layers = graph.n_layers
    sensible = type(n_layers) is int and 0 < n_layers <= MOST_LAYERS
    yield sensible, f"it has {n_layers} layers"


def _of_targets(graph: FeatureGraph) -> Iterator[Condition]:
    targets = graph.nodes[graph.is_kind(TARGET)]
    last = len(graph.targets) - 1
    yield _in_range("a target's index", targets.index, last)
    yield targets.layer == graph.n_layers, "a target is in a layer"
    probability = graph.nodes.probability
    proper = torch.isfinite(probability) & (probability >= 0)
    yield proper, "a target's probability is negative or not finite"


def _of_nodes(graph: FeatureGraph) -> Iterator[Condition]:
    nodes, top = graph.nodes, graph.n_layers
    yield _in_range("a node's kind", nodes.kind, TARGET)
    last = len(graph.tokens) - 1
    yield _in_range("a node's position", nodes.position, last)
    in_layer = nodes.layer[graph.is_kind(FEATURE, ERROR)]
    yield _in_range("the layer of a feature or error", in_layer, top - 1)
    # Influence visits nodes layer by layer, so it needs their order.
    order = nodes.kind * (top + 2) + nodes.layer
    yield order.diff() >= 0, "its nodes are not in order"
    yield len(graph._numbers) == len(nodes), "a node appears twice"


def _of_edges(graph: FeatureGraph) -> Iterator[Condition]:
    source, target = graph.source, graph.target
    n = len(graph.nodes)
    yield _in_range("an edge's source", source, n - 1)
    yield _in_range("an edge's target", target, n - 1)
    yield torch.isfinite(graph.weight), "a weight is not finite"
    # In strictly ascending order, so no edge appears twice.
    order = target * n + source
    yield order.diff() > 0, "its edges are not in order"
    has_inputs = graph.is_kind(FEATURE, TARGET)
    yield has_inputs[target], "an edge leads to an error or token"
    layer = graph.nodes.layer
    yield layer[source] < layer[target], "an edge does not lead to a later layer"


def _in_range(name: str, numbers: Tensor, highest: int) -> Condition:
    inside = (numbers >= 0) & (numbers <= highest)
    return inside, f"{name} is outside 0 to {highest}"


def check_is_feature_graph(graph: object) -> None:
    """Refuse what is no attribution graph, such as a circuit."""
    remedy = "make one with circuits.AttributionGraph(...).attribute"
    expect(graph, FeatureGraph, "a FeatureGraph", remedy)
