"""The model as functions on the tensors of one task, one sublayer at a time."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from circuits.graph.graph import EdgeMask, Graph
from circuits.models import Model, shape_of, weights_of
from circuits.models.layers.functional import (
    Attention,
    FeedForward,
    Multiply,
    Unembedding,
    multiply,
)
from circuits.models.layers.packed import PackedProduct
from circuits.models.layers.shape import ModelShape
from circuits.running.edge_layout import EdgeLayout
from circuits.running.incremental.base_state import BaseRun, ByBlock, BySlot, Outputs, Projected
from circuits.running.incremental.plan import (
    Blocks,
    Edges,
    Needs,
    Place,
    SplitEdges,
    sublayers,
    target_blocks,
)
from circuits.running.incremental.tokens import TokenIndex, TokenSet, Window
from circuits.system.memory import memory_budget
from circuits.tasks.task import Task
from circuits.tasks.token_spans import token_spans

HeadInputs = Float[Tensor, "#head variant token d_model"]
HeadOutputs = Float[Tensor, "head variant token d_model"]
Bias = Float[Tensor, "#head batch query key"]
Biases = dict[tuple[int, TokenSet], Bias]
EdgeWeights = Float[Tensor, "#variant span target source"]
BySource = Float[Tensor, "source _ token d_model"]
Stream = Float[Tensor, "*rows _"]
WeightedSum = Float[Tensor, "target variant token d_model"]

# The most that a second copy of the unembedding may take.
PACKED_BYTES = 1 << 30
# Logits take up to this share of a step's memory, with what metrics make of them, which is some
# copies. On a CPU the step is smaller: operations on logits are several times as fast in a cache.
LOGITS_SHARE, COPIES_OF_LOGITS = 4, 5
LOGIT_BYTES = 160 << 20


class UnsupportedError(Exception):
    """This model cannot be run incrementally; the reference executor can run it."""


@dataclass(frozen=True, eq=False)
class TaskModel:
    """A model as functions on the tensors of one task."""

    model: Model
    task: Task
    layout: EdgeLayout
    # Where the model can have an edge.
    possible: Edges
    # The targets of the layout, in order of computation.
    blocks: Blocks
    window: Window
    # The span of each token that can change; None if edges are not split by span.
    spans: TokenIndex | None
    attention: Sequence[Attention]
    mlps: Sequence[FeedForward]
    unembedding: Unembedding
    # The user's limit of what a step may take, in bytes
    max_memory: int | None
    # Cache of what is added to the attention scores, by layer and queries: minus infinity where a
    # query may not attend, and ALiBi.
    biases: Biases = field(default_factory=dict)

    @staticmethod
    def of(
        model: Model, graph: Graph, task: Task, window: Window, max_memory: int | None
    ) -> TaskModel:
        """Read the functions from the weights; raises UnsupportedError if it cannot."""
        attention, mlps = _layers(model)
        unembedding = weights_of(model).unembedding()
        layout = EdgeLayout.of(model, graph)
        possible = layout.possible(model).numpy()
        coupled = any(part.norm_after is not None for part in attention)
        blocks = target_blocks(layout, coupled)
        spans, tokens = token_spans(graph, task), window.all
        if spans is not None:
            spans = spans[tokens.prompts, tokens.positions]
        known = (spans, attention, mlps, unembedding, max_memory)
        return TaskModel(model, task, layout, possible, blocks, window, *known)

    @cached_property
    def shape(self) -> ModelShape:
        """The model's."""
        return shape_of(self.model)

    @cached_property
    def sublayers(self) -> Sequence[Blocks]:
        """The blocks of each sublayer, in order of computation."""
        return [*sublayers(self.blocks)]

    @property
    def embeddings(self) -> slice:
        """The embeddings, which are the first sources and read nothing."""
        return slice(self.blocks[0].sources.start)

    @cached_property
    def wide_product(self) -> PackedProduct:
        """Multiplies by the unembedding."""
        budget = memory_budget(self.shape.device, self.max_memory, cpu_bytes=PACKED_BYTES)
        return PackedProduct(budget)

    @cached_property
    def unembedded_together(self) -> int:
        """Of how many variants the logits are computed at once."""
        budget = memory_budget(self.shape.device, self.max_memory, cpu_bytes=LOGIT_BYTES)
        return max(1, budget // LOGITS_SHARE // self.logit_bytes)

    @property
    def logit_bytes(self) -> int:
        """What the logits of one variant take, with what metrics make of them."""
        weight = self.unembedding.weight
        logits = len(self.window.scored) * weight.shape[1]
        return COPIES_OF_LOGITS * logits * weight.element_size()

    def unembed(self, residual: Stream, product: Multiply) -> Stream:
        """The logits, from the residual stream."""
        if product is multiply:
            product = self.wide_product
        return self.unembedding(residual, product)

    def mask(self, kept: EdgeMask) -> SplitEdges:
        """M[u, r] by span; 0 where the model cannot have an edge."""
        ablated = self.layout.ablated(kept[None])
        return ~ablated[0].numpy() & self.possible

    def needs(self, mask: SplitEdges) -> Needs:
        """Which sources a circuit with these edges needs."""
        kept = np.any(mask, axis=0)
        return Needs.of(self.blocks, kept)

    def no_keys(self, like: Outputs) -> ByBlock:
        """Zeros as keys and values of the other positions, for a run of all that is read."""
        cfg = self.shape
        zeros = like.new_zeros(cfg.n_heads, *self.window.readable.shape, cfg.d_head)
        return dict.fromkeys(self.blocks, zeros)

    def run(
        self, kept: EdgeMask, written: Outputs, tokens: TokenSet, keys: ByBlock, multiply: Multiply
    ) -> BaseRun:
        """Run the circuit with all edges, or the one without any.

        Args:
            written: the outputs of the embeddings; for the circuit without edges, c_u of every
                source u, which is all that targets read.
            tokens: the tokens that are computed.
            keys: keys and values at the other positions.
            multiply: how to compute products with weights.
        """
        n_sources = len(self.layout.nodes)
        outputs = written.new_empty(n_sources, *written.shape[1:])
        outputs[: len(written)] = written
        mask = self.mask(kept)
        is_whole = bool(kept.all())
        changed = np.full(n_sources, not is_whole)
        result = BaseRun(kept, mask, self.needs(mask), outputs, {}, {}, changed)
        # What targets read of each source u: out_u, or c_u in the circuit without edges.
        read = outputs if is_whole else written
        stream = before_attention = written[self.embeddings].sum(0, keepdim=True)
        for group in self.sublayers:
            block = group[0]
            result.inputs |= dict.fromkeys(group, stream)
            if block.slot == "q":
                before_attention = stream
                self._run_attention(result, group, tokens, keys, multiply)
                # The bias b_O belongs to no node.
                bias = weights_of(self.model).output_bias(block.layer)
                written_here = read[block.sources].sum(0)
                stream = stream + written_here + bias
            if block.slot == "mlp":
                if self.shape.parallel_attn_mlp:
                    result.inputs[block] = before_attention
                mlp = self.mlps[block.layer]
                outputs[block.sources] = mlp(result.inputs[block], multiply)
                stream = stream + read[block.sources]
        return result

    def _run_attention(
        self, result: BaseRun, group: Blocks, tokens: TokenSet, keys: ByBlock, multiply: Multiply
    ) -> None:
        qkv: BySlot = {}
        for block in group:
            place = Place(block, slice(None), tokens)
            found = self.project(place, result.read(place), keys, multiply)
            qkv[block.slot] = found
            result.projected[block] = found[:, 0]
        outputs = self.head_outputs(place, qkv, multiply)
        result.outputs[block.sources] = outputs[:, 0]

    def project(
        self, place: Place, residual: HeadInputs, keys: ByBlock, multiply: Multiply
    ) -> Projected:
        """q of some heads at some tokens; or k or v, at the other positions those of `keys`."""
        block, heads = place.block, place.nodes
        tokens = place.tokens
        attention = self.attention[block.layer]
        normed = attention.norm(residual)
        found = attention.project(block.slot, heads, normed, tokens.positions, multiply)
        if block.slot == "q":
            return found
        return tokens.into_keys(keys[block][heads], found)

    def head_outputs(self, place: Place, qkv: BySlot, multiply: Multiply) -> HeadOutputs:
        """Outputs of some heads, z W_O, from q at some tokens and k and v at all positions."""
        layer, tokens = place.block.layer, place.tokens
        attention = self.attention[layer]
        bias = self._attention_bias(layer, tokens)
        queries = tokens.to_prompts(qkv["q"])
        # z = softmax(q k^T / scale + bias) v
        by_prompt = attention.attend(place.nodes, queries, qkv["k"], qkv["v"], bias)
        z = tokens.to_tokens(by_prompt)
        # out = z W_O
        written = multiply(z.flatten(1, -2), attention.output, None, place.nodes)
        return attention.shared(written.unflatten(1, z.shape[1:-1]))

    def _attention_bias(self, layer: int, tokens: TokenSet) -> Bias:
        key, readable = (layer, tokens), self.window.readable
        if key not in self.biases:
            n_keys = readable.shape[1]
            positions = torch.arange(n_keys, device=readable.device)
            keys = positions.expand(readable.shape)
            queries = tokens.positions[tokens.by_prompt]
            attention = self.attention[layer]
            self.biases[key] = attention.bias(queries, keys, readable)
        return self.biases[key]

    def weighted_sum(self, weights: EdgeWeights, values: BySource, tokens: TokenSet) -> WeightedSum:
        """sum over u of weights[u, r] * values[u], each token with the weights of its span."""
        if self.spans is None:
            return torch.einsum("vru,uvtd->rvtd", weights[:, 0], values)
        by_token = weights[:, self.spans[-len(tokens) :]]
        return torch.einsum("vtru,uvtd->rvtd", by_token, values)


def _layers(model: Model) -> tuple[list[Attention], list[FeedForward]]:
    """The attention and the MLP of each layer."""
    weights = weights_of(model)
    layers = range(shape_of(model).n_layers)
    mlp_layers = [] if shape_of(model).attn_only else layers
    attention = [weights.attention(layer) for layer in layers]
    known = [part for part in attention if part is not None]
    if len(known) < len(layers):
        raise UnsupportedError("positions enter its attention in a way that is not known")
    return known, [*map(weights.feed_forward, mlp_layers)]
