"""Gradient scores in detail: by prompt, node, head, layer, position and neuron."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from circuits.graph.graph import Graph
from circuits.graph.nodes import MLP, Head, Node
from circuits.system.numbers import WholeNumber, whole
from circuits.system.randomness import random_generator
from circuits.system.torch_modes import without_modes


@dataclass(frozen=True, eq=False)
class EdgeAttribution:
    """What one score per edge cannot hold. All entries are predicted damage.

    Sums over prompts are weighted by the number of scored rows.

    Attributes:
        graph: the edges.
        nodes: the sources, one per row below.
        rows: scored rows of each prompt.
        edges_by_prompt: damage on each prompt; its mean, weighted by `rows`, is the edge's score.
        sources_by_position: of ablating all outgoing edges of a source at one position.
        neurons: of ablating all outgoing edges of one coordinate of a source's output.

    >>> import circuits
    >>> model = circuits.load_model("toy-world")
    >>> found = circuits.EAP().attribute(model, circuits.load_task("ioi", model, n=4))
    >>> found.heads().shape, found.edges_by_prompt.shape
    (torch.Size([4, 4]), torch.Size([4, 479]))
    """

    graph: Graph
    nodes: tuple[Node, ...]
    rows: Int[Tensor, " prompt"]
    edges_by_prompt: Float[Tensor, "prompt edge"]
    sources_by_position: Float[Tensor, "prompt source pos"]
    neurons: Float[Tensor, "source d_model"]

    @property
    def edges(self) -> Float[Tensor, " edge"]:
        """The score of each edge."""
        return self._mean(self.edges_by_prompt)

    def node_scores(self) -> dict[Node, float]:
        """For every node with outgoing edges, the sum of their scores."""
        graph = self.graph
        sources, of_edge = graph.source.unique(return_inverse=True)
        scores = self.edges.double()
        sums = scores.new_zeros(len(sources))
        sums.index_add_(0, of_edge, scores)
        numbers = sources.tolist()
        nodes = [graph.nodes[number] for number in numbers]
        return dict(zip(nodes, sums.tolist(), strict=True))

    @without_modes()
    def heads(self) -> Float[Tensor, "layer head"]:
        """Scores of heads, all positions together."""
        scores = [score for node, score in self._by_source if isinstance(node, Head)]
        by_layer = (self._n_layers, -1)
        return torch.stack(scores).unflatten(0, by_layer)

    @without_modes()
    def layers(self) -> Float[Tensor, "layer 2"]:
        """Scores of each layer: its heads together, and its MLP."""
        result = torch.zeros(self._n_layers, 2, dtype=torch.float32)
        for node, score in self._by_source:
            if isinstance(node, Head | MLP):
                is_mlp = isinstance(node, MLP)
                result[node.layer, int(is_mlp)] += score
        return result

    @without_modes()
    def bootstrap(
        self, samples: WholeNumber, *, seed: WholeNumber = 0
    ) -> Float[Tensor, "sample edge"]:
        """Scores on `samples` draws of the prompts with replacement; no model is run.

        Raises:
            InputError: `samples` or `seed` is no whole number, or there is no sample.
        """
        n_prompts = len(self.rows)
        generator = random_generator(seed)
        shape = (whole(samples, "samples", least=1), n_prompts)
        draws = torch.randint(n_prompts, shape, generator=generator)
        weights = torch.zeros(shape, dtype=torch.float32)
        # A prompt drawn several times counts its rows as often.
        rows = self.rows[draws].float()
        weights.scatter_add_(1, draws, rows)
        weights /= weights.sum(1, keepdim=True)
        return weights @ self.edges_by_prompt

    @property
    def _by_source(self) -> Iterator[tuple[Node, Tensor]]:
        means = self._mean(self.sources_by_position)
        return zip(self.nodes, means.sum(-1), strict=True)

    @property
    def _n_layers(self) -> int:
        return len({node.layer for node in self.nodes if isinstance(node, Head)})

    @without_modes()
    def _mean(self, by_prompt: Float[Tensor, " prompt *rest"]) -> Float[Tensor, " *rest"]:
        # mean = sum over prompts of rows[prompt] / sum(rows) * value[prompt]
        rows = self.rows.to(by_prompt.dtype)
        weights = rows / self.rows.sum()
        return torch.tensordot(weights, by_prompt, dims=1)
