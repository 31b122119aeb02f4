"""Components of a model: its embeddings, heads, MLPs and logits, and which of them read which."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

from circuits.graph.edges import NO_SLOT, SLOTS
from circuits.graph.nodes import MLP, Embed, Head, Logits, Node, PosEmbed, TokenEmbed

EdgeColumn = Int[Tensor, " edge"]
# What `Components` takes from a model's shape.
FACTS = {"n_layers", "n_heads", "attn_only", "parallel_attn_mlp"}


@dataclass(frozen=True)
class Components:
    """The facts that decide which edges a component graph has.

    >>> small = Components(n_layers=1, n_heads=2, attn_only=False, parallel_attn_mlp=False)
    >>> [str(node) for node in small.sources], small.n_sources(MLP(0))
    (['embed', 'a0.h0', 'a0.h1', 'm0'], 3)
    """

    n_layers: int
    n_heads: int
    attn_only: bool
    parallel_attn_mlp: bool
    split_embed: bool = False
    # Whether what one head of a layer writes depends on the others, through a norm after attention.
    coupled_heads: bool = False

    @staticmethod
    def of(shape: Mapping[str, Any], split_embed: bool) -> Components:
        """The components of a model of a shape, see `ModelIdentity`."""
        facts = {name: shape[name] for name in FACTS}
        coupled = bool(shape.get("has_norms_after", False))
        return Components(**facts, split_embed=split_embed, coupled_heads=coupled)

    @cached_property
    def sources(self) -> tuple[Node, ...]:
        """All nodes that write, in order of computation."""
        nodes: list[Node] = [TokenEmbed(), PosEmbed()] if self.split_embed else [Embed()]
        for layer in range(self.n_layers):
            heads = range(self.n_heads)
            nodes += [Head(layer, head) for head in heads]
            if not self.attn_only:
                nodes.append(MLP(layer))
        return tuple(nodes)

    def n_sources(self, target: Node) -> int:
        """The number n such that `target` reads the first n of `sources`."""
        n_embeddings = 2 if self.split_embed else 1
        per_layer = self.n_heads if self.attn_only else self.n_heads + 1
        match target:
            case Head(layer=layer):
                return n_embeddings + layer * per_layer
            case MLP(layer=layer):
                # In a parallel block the MLP reads what the heads of its layer read.
                own_heads = 0 if self.parallel_attn_mlp else self.n_heads
                return n_embeddings + layer * per_layer + own_heads
            case Logits():
                return len(self.sources)
        # Embeddings read nothing.
        return 0

    def edges(self, n_spans: int) -> list[EdgeColumn]:
        """Source, target and slot of all edges: of each read in turn, and there of each span.

        The nodes are `sources` and then the logits, each at all spans.
        """
        # Integers in numpy, because a model of a hundred layers has millions of edges.
        reads = np.array(list(self._reads()))
        component, slot, n_sources = reads.T
        n_edges = n_sources.repeat(n_spans)
        run = np.arange(len(n_edges)).repeat(n_edges)
        first_of_run = n_edges.cumsum() - n_edges
        source = np.arange(len(run)) - first_of_run[run]
        read, span = np.divmod(run, n_spans)
        # Component c at span s is node c * n_spans + s.
        columns = [source * n_spans + span, component[read] * n_spans + span, slot[read]]
        return list(map(torch.from_numpy, columns))

    def _reads(self) -> Iterator[tuple[int, int, int]]:
        """Component, slot and number of sources of everything that reads."""
        for number, node in enumerate((*self.sources, Logits())):
            n_sources = self.n_sources(node)
            slots = range(len(SLOTS)) if isinstance(node, Head) else [NO_SLOT]
            yield from ((number, slot, n_sources) for slot in slots)
