"""The model as functions on the tensors of one task, one sublayer at a time."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from circuits.models import Model, ModelWeights
from circuits.models.functional import Attention, FeedForward, HeadSelection, Multiply, Unembedding
from circuits.running.edge_layout import EdgeLayout
from circuits.running.incremental.base_state import ByBlock, EdgeMask, RunTensors, SplitEdges
from circuits.running.incremental.plan import Blocks, Edges, TargetBlock, sublayers, target_blocks
from circuits.running.incremental.tokens import TokenIndex, TokenSet, Window
from circuits.tasks.task import Task

Outputs = Float[Tensor, "source token d_model"]
HeadOutputs = Float[Tensor, "head variant token d_model"]
Projected = Float[Tensor, "_ _ ... d_head"]
BySlot = dict[str | None, Projected]
Bias = Float[Tensor, "#head batch query key"]
EdgeWeights = Float[Tensor, "#variant span target source"]
BySource = Float[Tensor, "source _ token d_model"]
WeightedSum = Float[Tensor, "target variant token d_model"]


class UnsupportedError(Exception):
    """This model cannot be run incrementally; the reference executor can run it."""


@dataclass(frozen=True, eq=False)
class TaskModel:
    """A model as functions on the tensors of one task.

    Attributes:
        layout: how edges are numbered by source and target.
        blocks: the targets of the layout, in order of computation.
        attention, mlps: the functions of each layer.
        biases: cache of what is added to the attention scores, by layer and queries: minus
            infinity where a query may not attend, and ALiBi.
    """

    model: Model
    task: Task
    layout: EdgeLayout
    blocks: Blocks
    window: Window
    attention: Sequence[Attention]
    mlps: Sequence[FeedForward]
    unembedding: Unembedding
    biases: dict[tuple[int, TokenSet], Bias]

    @staticmethod
    def of(model: Model, task: Task, layout: EdgeLayout, window: Window) -> TaskModel:
        """Read the functions from the weights; raises UnsupportedError if it cannot."""
        weights, layers = ModelWeights(model), range(model.cfg.n_layers)
        attention = [part for part in map(weights.attention, layers) if part is not None]
        if len(attention) < len(layers):
            raise UnsupportedError("positions enter its attention in a way that is not known")
        mlps = [] if model.cfg.attn_only else [weights.feed_forward(layer) for layer in layers]
        blocks, unembedding = target_blocks(layout), weights.unembedding()
        return TaskModel(model, task, layout, blocks, window, attention, mlps, unembedding, {})

    def run(
        self, written: Outputs, tokens: TokenSet, base: ByBlock, multiply: Multiply
    ) -> RunTensors:
        """Run the whole model, or the circuit without edges.

        Args:
            written: for the whole model, the outputs of the embeddings; for the circuit without
                edges, c_u of every source u, which is all that targets read.
            tokens: the tokens that are computed.
            base: keys and values at the other positions.
            multiply: how to compute products with weights.
        """
        outputs = written.new_empty(len(self.layout.nodes), *written.shape[1:])
        outputs[: len(written)] = written
        # What targets read of each source u: out_u, or c_u in the circuit without edges.
        read = outputs if len(written) < len(outputs) else written
        result = RunTensors(outputs, {}, {})
        # The first sources are the embeddings, which read nothing.
        n_embeddings = self.blocks[0].sources.start
        stream = before_attention = written[:n_embeddings].sum(0, keepdim=True)
        for group in sublayers(self.blocks):
            block = group[0]
            result.inputs |= dict.fromkeys(group, stream)
            if block.slot is not None:
                before_attention = stream
                self._run_attention(group, tokens, base, result, multiply)
                # The bias b_O belongs to no node.
                bias = ModelWeights(self.model).output_bias(block.layer)
                stream = stream + read[block.sources].sum(0) + bias
            # The logits read the stream and write nothing.
            elif block.source is not None:
                if self.model.cfg.parallel_attn_mlp:
                    result.inputs[block] = before_attention
                mlp = self.mlps[block.layer]
                outputs[block.sources] = mlp(result.inputs[block], multiply)
                stream = stream + read[block.sources]
        return result

    def _run_attention(
        self, group: Blocks, tokens: TokenSet, base: ByBlock, result: RunTensors, product: Multiply
    ) -> None:
        block, heads = group[0], slice(0, group[0].n_nodes)
        normed = self.attention[block.layer].norm(result.inputs[block][:, None])
        qkv = {}
        for part in group:
            found = self.project(part, heads, normed, tokens, base, product)
            qkv[part.slot], result.projected[part] = found, found[:, 0]
        outputs = self.head_outputs(block.layer, heads, qkv, tokens, product)
        result.outputs[block.sources] = outputs[:, 0]

    def project(
        self,
        block: TargetBlock,
        heads: HeadSelection,
        normed: Float[Tensor, "#head variant token d_model"],
        tokens: TokenSet,
        base: ByBlock,
        multiply: Multiply,
    ) -> Projected:
        """q of some heads at some tokens; or k or v, at the other positions those of `base`."""
        assert block.slot is not None
        attention = self.attention[block.layer]
        found = attention.project(block.slot, heads, normed, tokens.positions, multiply)
        return found if block.slot == "q" else tokens.into_keys(base[block][heads], found)

    def head_outputs(
        self, layer: int, heads: HeadSelection, qkv: BySlot, tokens: TokenSet, multiply: Multiply
    ) -> HeadOutputs:
        """Outputs of some heads, z W_O, from q at some tokens and k and v at all positions."""
        # z = softmax(q k^T / scale + bias) v
        attention, queries = self.attention[layer], tokens.to_prompts(qkv["q"])
        bias = self._attention_bias(layer, tokens)
        z = attention.attend(heads, queries, qkv["k"], qkv["v"], bias)
        z = tokens.to_tokens(z)
        written = multiply(z.flatten(1, -2), attention.output, None, heads)
        return written.view(*z.shape[:-1], -1)

    def _attention_bias(self, layer: int, tokens: TokenSet) -> Bias:
        key, readable = (layer, tokens), self.window.readable
        if key not in self.biases:
            keys = torch.arange(readable.shape[1], device=readable.device).expand(readable.shape)
            queries = tokens.positions[tokens.by_prompt]
            self.biases[key] = self.attention[layer].bias(queries, keys, readable)
        return self.biases[key]


@dataclass(frozen=True, eq=False)
class RunContext:
    """What all runs on a task share.

    Attributes:
        counterfactuals: c_u of every source u.
        differences: out_u - c_u of every source u in the whole model, by token set.
        spans: the span of each token; None if edges are not split by span.
        possible: where the model can have an edge.
    """

    model: TaskModel
    counterfactuals: Outputs
    differences: Mapping[TokenSet, Float[Tensor, "source _ d_model"]]
    spans: TokenIndex | None
    possible: Edges

    def mask(self, kept: EdgeMask) -> SplitEdges:
        """M[u, r] by span; 0 where the model cannot have an edge."""
        return ~self.model.layout.ablated(kept[None])[0].numpy() & self.possible

    def weighted_sum(self, weights: EdgeWeights, values: BySource, tokens: TokenSet) -> WeightedSum:
        """sum over u of weights[u, r] * values[u], each token with the weights of its span."""
        n_variants = max(weights.shape[0], values.shape[1])
        if self.spans is not None:
            by_token = weights[:, self.spans[-len(tokens) :]].expand(n_variants, -1, -1, -1)
            values = values.expand(-1, n_variants, -1, -1)
            return torch.einsum("vtru,uvtd->rvtd", by_token, values)
        matrix, flat = weights[:, 0], values.flatten(2)
        if matrix.shape[0] == 1:
            # The same edges in all variants.
            total = matrix[0] @ flat.flatten(1)
        elif values.shape[1] == 1:
            # The same values in all variants.
            total = matrix.transpose(0, 1).flatten(0, 1) @ flat[:, 0]
        else:
            total = torch.bmm(matrix, flat.transpose(0, 1)).transpose(0, 1)
        return total.reshape(-1, n_variants, *values.shape[2:])
