"""Paths through a graph: along its edges, along edges that are always kept, through attention."""

from __future__ import annotations

import heapq
from collections import defaultdict
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from itertools import product
from types import UnionType

import numpy as np
import torch
from jaxtyping import Bool, Int
from torch import Tensor

from circuits.graph.nodes import Embed, Head, Logits, Node, PosEmbed, TokenEmbed

EdgeIndex = Int[Tensor, " edge"]
EdgeMask = Bool[Tensor, " edge"]
EdgeNumbers = Int[np.ndarray, " edge"]
Positions = tuple[str | int, ...] | None
Steps = Int[np.ndarray, " step"]
Ends = Bool[np.ndarray, " end"]


@dataclass(frozen=True, eq=False)
class Paths:
    """Steps between the ends of edges.

    Attributes:
        nodes: end n is node n, and end len(nodes) + n what node n, a head, reads through k and v.
        source, reader: the two ends of each step. First come the edges of a graph; the other steps
            can always be taken.
        n_edges: the number of the graph's edges.
    """

    nodes: tuple[Node, ...]
    source: Steps
    reader: Steps
    n_edges: int

    @staticmethod
    def along(
        nodes: tuple[Node, ...],
        source: EdgeIndex,
        target: EdgeIndex,
        slot: EdgeIndex,
        *,
        positions: Positions,
        causal: bool,
    ) -> Paths:
        """Paths along edges; split by position, attention carries what heads read to others.

        Args:
            causal: whether a head's output depends only on earlier positions.
        """
        n_nodes, n_edges = len(nodes), len(source)
        # numpy, whose operations on this few numbers take a fraction of torch's time.
        begin, end = source.numpy(), target.numpy()
        if positions is not None:
            # Named spans have no order that holds for every prompt, so attention may carry
            # information between any two of them. Numbered positions are in order.
            named = any(isinstance(position, str) for position in positions)
            key, query = _attention_steps(nodes, in_order=causal and not named)
            begin = np.concatenate([begin, key + n_nodes])
            through_key = n_nodes * (slot.numpy() > 0)
            end = np.concatenate([end + through_key, query])
        return Paths(nodes, begin, end, n_edges)

    def with_coupled_heads(self) -> Paths:
        """The paths of a model in which what a head writes depends on all heads of its layer."""
        begin, end = _pairs_of_heads(self.nodes, lambda head: (head.layer, head.position))
        source = np.append(self.source, begin)
        reader = np.append(self.reader, end)
        return Paths(self.nodes, source, reader, self.n_edges)

    def of_edges(self, own: EdgeNumbers) -> Paths:
        """The paths of a graph that has only these edges; the others are always kept."""
        numbers = np.arange(len(self.source))
        order = np.concatenate([own, np.delete(numbers, own)])
        return Paths(self.nodes, self.source[order], self.reader[order], len(own))

    def reaching_logits(self, kept: EdgeMask) -> EdgeMask:
        """The kept edges from which a path leads to the logits."""
        return self._crossed(kept, self.reader, self.source, Logits)

    def reached_from_inputs(self, kept: EdgeMask) -> EdgeMask:
        """The kept edges to which a path leads from an embedding."""
        return self._crossed(kept, self.source, self.reader, Embed | TokenEmbed | PosEmbed)

    def grown(self, ranked: Sequence[int], n: int) -> list[int]:
        """Grow a circuit from the logits: n times, add the first of the `ranked` edges whose target
        reaches the logits by then. Fewer if no more can.
        """
        ranks_into = defaultdict(list)
        for rank, edge in enumerate(ranked):
            ranks_into[int(self.reader[edge])].append(rank)
        reaching = np.zeros(2 * len(self.nodes), dtype=bool)
        new = self._ends(Logits)
        candidates: list[int] = []
        chosen: list[int] = []
        while True:
            for end in self._opened(reaching, new):
                for rank in ranks_into[end]:
                    heapq.heappush(candidates, rank)
            if not candidates or len(chosen) == n:
                return chosen
            edge = ranked[heapq.heappop(candidates)]
            chosen.append(edge)
            new = np.zeros_like(reaching)
            new[self.source[edge]] = True

    def _opened(self, reaching: Ends, new: Ends) -> list[int]:
        """Add new ends, and those from which steps that need no edge lead there; return these."""
        source, reader = (ends[self.n_edges :] for ends in (self.source, self.reader))
        before = reaching.copy()
        while (new & ~reaching).any():
            reaching |= new
            new = np.zeros_like(reaching)
            new[source[reaching[reader]]] = True
        return np.flatnonzero(reaching & ~before).tolist()

    def _ends(self, kind: type[Node] | UnionType) -> Ends:
        # No path begins at keys and values.
        is_kind = np.zeros(2 * len(self.nodes), dtype=bool)
        is_kind[: len(self.nodes)] = [isinstance(node, kind) for node in self.nodes]
        return is_kind

    def _crossed(
        self, kept: EdgeMask, begin: Steps, end: Steps, kind: type[Node] | UnionType
    ) -> EdgeMask:
        """The kept edges on paths of steps from `begin` to `end` that leave nodes of a kind."""
        allowed = np.ones(len(begin), dtype=bool)
        allowed[: self.n_edges] = kept.numpy()
        reached = self._ends(kind)
        crossed = np.zeros_like(allowed)
        while True:
            # Follow one more step of every path, until no further step is crossed.
            crossing = allowed & reached[begin]
            if np.array_equal(crossing, crossed):
                return torch.from_numpy(crossed[: self.n_edges])
            crossed = crossing
            reached[end[crossed]] = True


def _attention_steps(nodes: Sequence[Node], *, in_order: bool) -> tuple[Steps, Steps]:
    """Pairs (a head at the position of a key, the same head where a query may attend to it)."""
    key, query = _pairs_of_heads(nodes, lambda head: head.label)
    attends = (key <= query) | (not in_order)
    return key[attends], query[attends]


def _pairs_of_heads(
    nodes: Sequence[Node], group: Callable[[Head], Hashable]
) -> tuple[Steps, Steps]:
    """The numbers of all pairs of heads of the same group."""
    groups = defaultdict(list)
    for number, node in enumerate(nodes):
        if isinstance(node, Head):
            groups[group(node)].append(number)
    pairs: list[tuple[int, int]] = []
    for heads in groups.values():
        pairs += product(heads, heads)
    first, second = np.array(pairs, dtype=np.int64).reshape(-1, 2).T
    return first, second
