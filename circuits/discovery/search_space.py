"""Where a search may search: the circuit it starts from, and the edges it may remove."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch

from circuits.graph.circuit import Circuit
from circuits.graph.graph import ChosenEdges, EdgeMask, Graph, NodesOrTexts
from circuits.system.errors import InputError
from circuits.system.numbers import WholeNumber, items, python_number, shown

Edges = Circuit | ChosenEdges
Layers = Iterable[WholeNumber] | WholeNumber


@dataclass(frozen=True, eq=False)
class SearchSpace:
    """A graph, and what a search may do in it. Edges that it may not try stay as they are.

    Attributes:
        graph: the edges there are.
        kept: the circuit that the search starts from.
        tried: the edges that the search may remove; they are kept at the start.

    >>> import circuits
    >>> graph = circuits.component_graph(circuits.load_model("toy-world"))
    >>> space = SearchSpace.parse(graph, frozen_out=["m3->logits"], layers=[3])
    >>> int(space.kept.sum()), int(space.tried.sum())
    (478, 212)
    """

    graph: Graph
    kept: EdgeMask
    tried: EdgeMask

    @staticmethod
    def parse(
        graph: Graph,
        *,
        start: Circuit | None = None,
        frozen_in: Edges | None = None,
        frozen_out: Edges | None = None,
        layers: Layers | None = None,
        nodes: NodesOrTexts | None = None,
    ) -> SearchSpace:
        """The space that a user's arguments ask for, see `CircuitDiscoverer.discover`.

        Raises:
            InputError: an argument does not fit the graph, two contradict each other, or no edge is
                left to try.
        """
        if start is not None and not isinstance(start, Circuit):
            raise InputError(
                f"start={shown(start)} is no circuit; give one, such as scores.greedy(200) or "
                "Circuit.from_edges(graph, edges)."
            )
        whole = ~graph.mask([])
        started = whole if start is None else _edges(graph, start, "start")
        always = _edges(graph, frozen_in, "frozen_in")
        never = _edges(graph, frozen_out, "frozen_out")
        both = (always & never).nonzero().flatten().tolist()
        if both:
            raise InputError(
                f"frozen_in and frozen_out both hold {graph.edges[both[0]]} ({len(both)} edges in "
                "all); take these out of one of them."
            )
        kept = (started | always) & ~never
        # Whatever `start` keeps may be tried, unless something says otherwise.
        tried = kept & ~always & _into_layers(graph, layers) & _touching(graph, nodes)
        if len(graph) and not tried.any():
            raise InputError(
                f"no edge is left to try: of {len(graph)} edges, {int(kept.sum())} are kept at the "
                "start and none of them may be removed; start from more edges, or exclude fewer."
            )
        return SearchSpace(graph, kept, tried)

    def counts(self) -> dict[str, int]:
        """The number of edges tried, kept throughout and ablated throughout, for a record."""
        masks = {
            "tried": self.tried,
            "frozen_in": self.kept & ~self.tried,
            "frozen_out": ~self.kept,
        }
        return {name: int(mask.sum()) for name, mask in masks.items()}

    def identity(self) -> dict[str, str]:
        """What the result of a search depends on besides the graph; nothing for a whole graph."""
        if self.tried.all():
            return {}
        digest = hashlib.blake2b(digest_size=16)
        for mask in (self.kept, self.tried):
            digest.update(mask.numpy().tobytes())
        return {"search_space": digest.hexdigest()}


def _edges(graph: Graph, edges: Edges | None, name: str) -> EdgeMask:
    if isinstance(edges, Circuit):
        return kept_over(graph, edges, name)
    try:
        return graph.mask(() if edges is None else edges)
    except InputError as error:
        raise InputError(f"{name}: {error}") from error


def kept_over(graph: Graph, circuit: Circuit, name: str) -> EdgeMask:
    """The edges that a circuit keeps; an InputError if it is over another graph."""
    own = circuit.graph
    if own != graph:
        raise InputError(
            f"{name} is a circuit over another graph ({len(own)} edges, positions {own.positions}) "
            f"than the search ({len(graph)} edges, positions {graph.positions}); give one over the "
            "same graph, or that graph as graph=."
        )
    return circuit.kept


def _into_layers(graph: Graph, layers: Layers | None) -> EdgeMask:
    """The edges into heads and MLPs of these layers."""
    if layers is None:
        return ~graph.mask([])
    one = python_number(layers) is not None
    given = [layers] if one else items(layers, "layers")
    wanted = [python_number(each) for each in given]
    of_node = np.array([getattr(node, "layer", -1) for node in graph.nodes])
    known = of_node[of_node >= 0]
    if not wanted or not set(wanted) <= set(known.tolist()):
        last = known.max(initial=0)
        raise InputError(
            f"layers={shown(layers)}: give layers of the graph, whole numbers from 0 to {last}, "
            f"such as [0, {last}]."
        )
    into = np.isin(of_node, wanted)
    return torch.from_numpy(into)[graph.target]


def _touching(graph: Graph, nodes: NodesOrTexts | None) -> EdgeMask:
    """The edges from or into these nodes."""
    if nodes is None:
        return ~graph.mask([])
    chosen = graph.node_mask(nodes)
    return chosen[graph.source] | chosen[graph.target]
