"""The attribution graph of one prompt, as a value: nodes and weighted edges in columns, and everything needed to say where they came from.

Nodes stand in an order in which every edge goes forward or from an error or embedding: features by layer, position and index; errors by layer
and position; token embeddings; targets (logits). Edges are ordered by target, then source.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import networkx
import pandas as pd
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from circuits.graph.identity import ModelIdentity, TranscodersIdentity
from circuits.graph.nodes import Error, Feature, Logits, Node, TokenEmbed, parse_node
from circuits.system.errors import InputError
from circuits.system.files import read_tensors, write_tensors

FILE = "graph.safetensors"
FORMAT, FORMAT_VERSION = "circuits.feature_graph", 1

MOST_LAYERS = 10_000

FEATURE, ERROR, EMBEDDING, TARGET = range(4)
"""Kinds of nodes, in the order in which they stand."""


@dataclass(frozen=True, eq=False)
class Nodes:
    """The nodes of an attribution graph, in columns.

    Attributes:
        kind: FEATURE, ERROR, EMBEDDING or TARGET.
        layer: of a feature or error; -1 for embeddings, the number of layers for targets.
        position: in the prompt.
        index: a feature's number, an embedding's token, a target's place in `FeatureGraph.targets`; 0 for errors.
        activation: of a feature; NaN elsewhere.
        probability: what a target counts for in influence, such as its probability; 0 elsewhere.
    """

    kind: Int[Tensor, " node"]
    layer: Int[Tensor, " node"]
    position: Int[Tensor, " node"]
    index: Int[Tensor, " node"]
    activation: Float[Tensor, " node"]
    probability: Float[Tensor, " node"]

    def __len__(self) -> int:
        return len(self.kind)

    def __getitem__(self, chosen: Tensor) -> Nodes:
        return Nodes(**{name: column[chosen] for name, column in vars(self).items()})


@dataclass(frozen=True)
class LogitTarget:
    """What edges lead up to: a logit less the mean logit, a difference of logits, or any direction.

    Attributes:
        label: for people; of a token its text.
        token: its id, where it is one.
    """

    label: str
    token: int | None = None


@dataclass(frozen=True, eq=False)
class FeatureGraph:
    """An attribution graph: which features, errors and embeddings made the model say this, and through which features.

    The weight of an edge is the value of its source times the linear weight from it to its target's pre-activation, over all paths through
    residual stream and frozen attention. All edges into a target and its constants sum to its pre-activation.

    Attributes:
        nodes: in columns; `node(i)` and `find(node)` go between numbers and `Node` values.
        source, target: numbers of nodes.
        weight: of each edge.
        direct: the part of it that stays at its position (residual stream and skips); the rest goes through attention.
        constants: by node with incoming edges (features, targets) and name: what its pre-activation holds besides its edges.
        constant_names: of the columns of `constants`.
        tokens: of the prompt.
        words: their text.
        targets: what the graph explains.
        n_layers: of the model.
        directions: of each of `targets`, in the output of the last norm; None in a graph from another program.
        model: which one.
        transcoders: which ones.
        settings: of the method, JSON values only.
    """

    nodes: Nodes
    source: Int[Tensor, " edge"]
    target: Int[Tensor, " edge"]
    weight: Float[Tensor, " edge"]
    direct: Float[Tensor, " edge"]
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
        """The number of edges."""
        return len(self.source)

    def __repr__(self) -> str:
        counts = torch.bincount(self.nodes.kind, minlength=4).tolist()
        kinds = f"{counts[FEATURE]:,} features, {counts[ERROR]:,} errors, {counts[EMBEDDING]:,} tokens, {counts[TARGET]:,} targets"
        return f"FeatureGraph({self.prompt!r}: {kinds}, {len(self):,} edges)"

    @property
    def prompt(self) -> str:
        """The prompt's text."""
        spaced = any(word.startswith(" ") for word in self.words)
        return ("" if spaced else " ").join(self.words)

    def node(self, number: int) -> Node:
        """The node of that number."""
        kind, layer, position, index = (
            int(column[number])
            for column in (self.nodes.kind, self.nodes.layer, self.nodes.position, self.nodes.index)
        )
        match kind:
            case 0:
                return Feature(layer, index, position)
            case 1:
                return Error(layer, position)
            case 2:
                return TokenEmbed(position)
        target = self.targets[index]
        return Logits(target.label if target.token is None else target.token, position)

    def find(self, node: Node | str) -> int:
        """The number of a node, or of the node of that text, such as `f2.1204@5`.

        Raises:
            InputError: the graph has no such node.
        """
        wanted = parse_node(node) if isinstance(node, str) else node
        if wanted not in self._numbers:
            some = [
                *range(min(3, len(self.nodes) - len(self.targets))),
                *self.is_kind(TARGET).nonzero().flatten().tolist()[:3],
            ]
            names = ", ".join(str(self.node(number)) for number in some)
            raise InputError(
                f"the graph has no node {wanted}; it has {len(self.nodes):,}, such as {names}."
            )
        return self._numbers[wanted]

    @cached_property
    def _numbers(self) -> dict[Node, int]:
        return {self.node(number): number for number in range(len(self.nodes))}

    def is_kind(self, *kinds: int) -> Bool[Tensor, " node"]:
        """Which nodes are of these kinds."""
        return torch.isin(self.nodes.kind, torch.tensor(kinds, device=self.nodes.kind.device))

    def adjacency(self) -> Float[Tensor, "target source"]:
        """The weights as a square matrix, a row for each target."""
        dense = self.weight.new_zeros(len(self.nodes), len(self.nodes))
        dense[self.target, self.source] = self.weight
        return dense

    def levels(self) -> list[tuple[int, int]]:
        """Numbers (from, to) of nodes with incoming edges, such that those of a level have edges only into earlier ones: targets first."""
        kinds, layers = self.nodes.kind, self.nodes.layer
        rank = torch.where(
            kinds == FEATURE, layers, torch.where(kinds == TARGET, self.n_layers, -1)
        )
        result = []
        for level in range(self.n_layers, -1, -1):
            here = (rank == level).nonzero().flatten()
            if len(here):
                result.append((int(here[0]), int(here[-1]) + 1))
        return result

    def subgraph(
        self, nodes: Bool[Tensor, " node"], edges: Bool[Tensor, " edge"] | None = None
    ) -> FeatureGraph:
        """The graph of some nodes and of the edges between them, or some of these."""
        kept = nodes[self.source] & nodes[self.target]
        kept = kept if edges is None else kept & edges
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
        """The strongest edges into a node: columns `node`, `weight`, `direct`, `attention`."""
        return self._strongest(self.target == self.find(node), self.source, n)

    def outgoing(self, node: Node | str, n: int = 10) -> pd.DataFrame:
        """The strongest edges out of a node, likewise."""
        return self._strongest(self.source == self.find(node), self.target, n)

    def _strongest(
        self, chosen: Bool[Tensor, " edge"], other: Int[Tensor, " edge"], n: int
    ) -> pd.DataFrame:
        if n < 0:
            raise InputError(f"n={n}: how many of the strongest edges? Give 0 or more.")
        edges = chosen.nonzero().flatten()
        edges = edges[torch.argsort(self.weight[edges].abs(), descending=True, stable=True)[:n]]
        weight, direct = self.weight[edges].cpu(), self.direct[edges].cpu()
        names = [str(self.node(number)) for number in other[edges].tolist()]
        return pd.DataFrame(
            {"node": names, "weight": weight, "direct": direct, "attention": weight - direct}
        )

    def to_networkx(self) -> networkx.DiGraph:
        """Nodes by their text, with `activation` where they are features, and edges with `weight` and `direct`."""
        result = networkx.DiGraph()
        names = [str(self.node(number)) for number in range(len(self.nodes))]
        for name, kind, activation in zip(
            names, self.nodes.kind.tolist(), self.nodes.activation.tolist(), strict=True
        ):
            result.add_node(name, **({"activation": activation} if kind == FEATURE else {}))
        columns = zip(
            self.source.tolist(),
            self.target.tolist(),
            self.weight.tolist(),
            self.direct.tolist(),
            strict=True,
        )
        result.add_edges_from(
            (names[s], names[t], {"weight": weight, "direct": direct})
            for s, t, weight, direct in columns
        )
        return result

    def to(self, device: str | torch.device) -> FeatureGraph:
        """The same graph with its tensors on `device`."""
        names = ("source", "target", "weight", "direct", "constants", "directions", "tokens")
        columns = {
            name: getattr(self, name).to(device)
            for name in names
            if getattr(self, name) is not None
        }
        return replace(
            self,
            nodes=Nodes(**{name: column.to(device) for name, column in vars(self.nodes).items()}),
            **columns,
        )

    def save(self, folder: str | Path) -> Path:
        """Write `graph.safetensors` into `folder` (made when missing), atomically. Returns the file's path."""
        tensors = {f"nodes.{name}": column for name, column in vars(self.nodes).items()}
        tensors |= {
            "source": self.source.int(),
            "target": self.target.int(),
            "weight": self.weight,
            "direct": self.direct,
        }
        tensors |= {"constants": self.constants, "tokens": self.tokens}
        tensors |= {} if self.directions is None else {"directions": self.directions}
        description = {
            "words": self.words,
            "targets": [asdict(target) for target in self.targets],
            "constant_names": self.constant_names,
            "n_layers": self.n_layers,
            "model": asdict(self.model) if self.model else None,
            "transcoders": asdict(self.transcoders) if self.transcoders else None,
            "settings": dict(self.settings),
        }
        return write_tensors(
            Path(folder) / FILE,
            tensors,
            {"description": json.dumps(description)},
            FORMAT,
            FORMAT_VERSION,
        )

    @staticmethod
    def load(folder: str | Path) -> FeatureGraph:
        """Read what `save` wrote; `folder` may also be the file itself.

        Raises:
            InputError: no such file, a truncated one, one of another kind, or one from a newer version of this package.
        """
        path = Path(folder) if Path(folder).is_file() else Path(folder) / FILE
        tensors, metadata = read_tensors(path, FORMAT, FORMAT_VERSION)
        try:
            graph = _from_file(tensors, json.loads(metadata["description"]))
            _check(graph)
        except (
            KeyError,
            TypeError,
            ValueError,
            IndexError,
            AttributeError,
            RecursionError,
        ) as error:
            raise InputError(
                f"{path} is damaged ({error}); make the graph again or restore the file."
            ) from error
        return graph


def _from_file(tensors: Mapping[str, Tensor], description: Mapping[str, Any]) -> FeatureGraph:
    model, transcoders = description["model"], description["transcoders"]
    nodes = {
        name.partition(".")[2]: tensor
        for name, tensor in tensors.items()
        if name.startswith("nodes.")
    }
    return FeatureGraph(
        nodes=Nodes(**nodes),
        source=tensors["source"].long(),
        target=tensors["target"].long(),
        weight=tensors["weight"],
        direct=tensors["direct"],
        constants=tensors["constants"],
        constant_names=tuple(description["constant_names"]),
        tokens=tensors["tokens"],
        words=tuple(description["words"]),
        targets=tuple(LogitTarget(**target) for target in description["targets"]),
        directions=tensors.get("directions"),
        n_layers=description["n_layers"],
        model=None if model is None else ModelIdentity(**model),
        transcoders=None if transcoders is None else TranscodersIdentity(**transcoders),
        settings=description["settings"],
    )


def _check(graph: FeatureGraph) -> None:
    """Refuse what does not fit together: a file that was changed or put together by hand."""
    nodes, n, edges = graph.nodes, len(graph.nodes), len(graph)
    columns: Sequence[Tensor] = list(vars(nodes).values())
    if any(column.shape != (n,) for column in columns) or any(
        column.shape != (edges,) for column in (graph.target, graph.weight, graph.direct)
    ):
        raise ValueError("its columns differ in length")
    texts = (*graph.words, *(target.label for target in graph.targets), *graph.constant_names)
    if not all(isinstance(text, str) for text in texts) or len(graph.words) != len(graph.tokens):
        raise ValueError("its words are incomplete")
    if graph.constants.shape != (n, len(graph.constant_names)):
        raise ValueError("its constants are incomplete")
    if type(graph.n_layers) is not int or not 0 < graph.n_layers <= MOST_LAYERS:
        raise ValueError(f"it is of {graph.n_layers} layers")
    _check_nodes(graph)
    _check_edges(graph)


def _check_nodes(graph: FeatureGraph) -> None:
    nodes = graph.nodes
    for name, column, low, high in (
        ("kind", nodes.kind, FEATURE, TARGET),
        ("layer", nodes.layer, -1, graph.n_layers),
        ("position", nodes.position, 0, len(graph.tokens) - 1),
    ):
        if len(column) and not low <= int(column.min()) <= int(column.max()) <= high:
            raise ValueError(f"a node's {name} is outside {low} to {high}")
    if any(
        not 0 <= number < len(graph.targets)
        for number in nodes.index[nodes.kind == TARGET].tolist()
    ):
        raise ValueError("a target has no name")
    inner = (nodes.kind == FEATURE) | (nodes.kind == ERROR)
    if not bool((nodes.layer[inner] >= 0).all() and (nodes.layer[inner] < graph.n_layers).all()):
        raise ValueError("a feature or error is in no layer")
    if not bool(torch.isfinite(nodes.probability).all() and (nodes.probability >= 0).all()):
        raise ValueError("a target's probability is no number from 0 up")
    if len(graph._numbers) != len(nodes):
        raise ValueError("a node is there twice")


def _check_edges(graph: FeatureGraph) -> None:
    if not len(graph):
        return
    source, target = graph.source, graph.target
    if int(torch.min(source.min(), target.min())) < 0 or int(
        torch.max(source.max(), target.max())
    ) >= len(graph.nodes):
        raise ValueError("an edge leads to a node that is not there")
    if not torch.isfinite(graph.weight).all():
        raise ValueError("a weight is no number")
    order = target * len(graph.nodes) + source
    if not bool((order.diff() > 0).all()):
        raise ValueError("its edges are not in order")
    rank = torch.where(
        graph.nodes.kind == TARGET,
        graph.n_layers,
        torch.where(graph.nodes.kind == FEATURE, graph.nodes.layer, -1),
    )
    ends = graph.nodes.kind[target]
    if bool(((ends == ERROR) | (ends == EMBEDDING) | (rank[source] >= rank[target])).any()):
        raise ValueError("an edge leads downwards")
