"""Transformers whose weights are set by hand, so that their circuit is known by construction.

The residual stream is divided into named subspaces. Each has one writer: the token embedding
(subspace `token`, one dimension per token), the position embedding (`position`), a head or an MLP.
Setting a weight that reads the residual stream also records the edge from the subspace's writer to
the reader, so the true edges follow from how the weights were made. Constants are biases (b_Q,
b_in), so no edge carries only a constant. Decoys, random weights in unused components, and a
rotation of the residual stream then hide the circuit.
"""

import copy
import math
from collections.abc import Mapping
from itertools import product
from typing import Any

import torch
from jaxtyping import Float
from torch import Generator, Tensor

from circuits.graph.edges import Edge
from circuits.graph.nodes import MLP, Head, Logits, Node, PosEmbed, TokenEmbed

Matrix = Float[Tensor, "_ _"]
Vector = Float[Tensor, " _"]
# For each subspace that is read, the matrix that its dimensions are multiplied by.
Reads = Mapping[str, Matrix]
Sizes = Mapping[str, int]
Weights = dict[str, Tensor]
Config = dict[str, Any]

TOKEN, POSITION, UNREAD = "token", "position", "unread"
UNREAD_WIDTH = 8
DECOY_SCALE = 0.5
# The weights that read and that write the residual stream.
READ_WEIGHTS = ("W_Q", "W_K", "W_V", "W_in", "W_U")
WRITE_WEIGHTS = ("W_E", "W_pos", "W_O", "W_out")
# Shapes of weights, under TransformerLens's names of weights and sizes.
SHAPES = {
    "embed.W_E": "d_vocab d_model",
    "pos_embed.W_pos": "n_ctx d_model",
    "blocks.{layer}.attn.W_Q": "n_heads d_model d_head",
    "blocks.{layer}.attn.b_Q": "n_heads d_head",
    "blocks.{layer}.attn.W_K": "n_heads d_model d_head",
    "blocks.{layer}.attn.b_K": "n_heads d_head",
    "blocks.{layer}.attn.W_V": "n_heads d_model d_head",
    "blocks.{layer}.attn.b_V": "n_heads d_head",
    "blocks.{layer}.attn.W_O": "n_heads d_head d_model",
    "blocks.{layer}.attn.b_O": "d_model",
    "unembed.W_U": "d_model d_vocab_out",
    "unembed.b_U": "d_vocab_out",
}
MLP_SHAPES = {
    "blocks.{layer}.mlp.W_in": "d_model d_mlp",
    "blocks.{layer}.mlp.b_in": "d_mlp",
    "blocks.{layer}.mlp.W_out": "d_mlp d_model",
    "blocks.{layer}.mlp.b_out": "d_model",
}
# The names of the weights of one head, and of one MLP.
HEAD_WEIGHTS = ("W_Q", "b_Q", "W_K", "W_V", "W_O")
MLP_WEIGHTS = ("W_in", "b_in", "W_out")
# No norms, so that reads and writes are matrix products alone.
FIXED_CONFIG = {
    "act_fn": "relu",
    "normalization_type": None,
    "attention_dir": "causal",
    "default_prepend_bos": False,
}


class Wiring:
    """The weights of a model while they are set, in float64, and the edges recorded on the way.

    Args:
        sizes: n_layers, n_heads, d_head, n_ctx, d_vocab, d_vocab_out and, with MLPs, d_mlp.
        subspaces: name and width of every subspace besides `token`, `position` and `unread`.
        sharpness: a factor on every head's attention scores.
    """

    def __init__(self, sizes: Sizes, subspaces: Sizes, sharpness: float = 1.0) -> None:
        self.sharpness = sharpness
        self.edges: list[Edge] = []
        self._writers: dict[str, Node] = {}
        widths = {TOKEN: sizes["d_vocab"], POSITION: sizes["n_ctx"]}
        widths |= {**subspaces, UNREAD: UNREAD_WIDTH}
        d_model = sum(widths.values())
        # Each subspace gets the next dimensions of the residual stream.
        dimensions = torch.arange(d_model).split(list(widths.values()))
        self._dimensions = dict(zip(widths, dimensions, strict=True))
        # The arguments of HookedTransformerConfig.
        self.config: Config = {**FIXED_CONFIG, **sizes, "d_model": d_model}
        self.config["attn_only"] = "d_mlp" not in sizes
        self.weights = _zero_weights(self.config)
        # One dimension per token, and one per position.
        self._write(TOKEN, TokenEmbed(), self.weights["embed.W_E"])
        self._write(POSITION, PosEmbed(), self.weights["pos_embed.W_pos"])

    def head(
        self, node: Head, writes: str, *, q: Reads, k: Reads, v: Reads, b_q: Vector | None = None
    ) -> None:
        """Wire a head that attends by the score q @ k and writes v to the subspace `writes`.

        Each of q, k and v is the sum of subspace @ matrix over what it reads; `b_q` is added to q.
        If q and k are empty, the head attends equally to all positions so far.
        """
        weights = _component_weights(self.weights, node)
        self._read(q, node, "q", weights["W_Q"])
        self._read(k, node, "k", weights["W_K"])
        self._read(v, node, "v", weights["W_V"])
        if b_q is not None:
            weights["b_Q"][: len(b_q)] = b_q
        # Attention divides scores by sqrt(d_head): q becomes sharpness * sqrt(d_head) * q.
        scale = self.sharpness * math.sqrt(self.config["d_head"])
        weights["W_Q"].mul_(scale)
        weights["b_Q"].mul_(scale)
        self._write(writes, node, weights["W_O"])

    def mlp(self, node: MLP, writes: str, *, reads: Reads, bias: Vector, output: Matrix) -> None:
        """Wire an MLP: it writes relu(sum of subspace @ matrix + `bias`) @ `output`."""
        weights = _component_weights(self.weights, node)
        self._read(reads, node, None, weights["W_in"])
        weights["b_in"][: len(bias)] = bias
        self._write(writes, node, weights["W_out"], output)

    def unembed(self, reads: Reads) -> None:
        """Let the logits be subspace @ matrix."""
        self._read(reads, Logits(), None, self.weights["unembed.W_U"])

    def with_decoys(self, generator: Generator, leak: float) -> Weights:
        """The weights with random ones in every component that was not wired.

        Decoys read all subspaces. They write to `unread`, and weaker by `leak` to the others.
        """
        weights = copy.deepcopy(self.weights)
        strength = torch.full_like(weights["blocks.0.attn.b_O"], leak)
        strength[self._dimensions[UNREAD]] = 1.0
        for node in self._unwired():
            for name, tensor in _component_weights(weights, node).items():
                if name in READ_WEIGHTS:
                    tensor.normal_(generator=generator).mul_(DECOY_SCALE)
                elif name in WRITE_WEIGHTS:
                    # Rows are summed, so their scale falls with the root of their number.
                    scale = DECOY_SCALE / math.sqrt(len(tensor))
                    tensor.normal_(generator=generator).mul_(scale).mul_(strength)
        return weights

    def _unwired(self) -> list[Node]:
        layers = range(self.config["n_layers"])
        heads = range(self.config["n_heads"])
        components: list[Node] = [Head(*indices) for indices in product(layers, heads)]
        if not self.config["attn_only"]:
            components += map(MLP, layers)
        wired = self._writers.values()
        return [node for node in components if node not in wired]

    def _read(self, reads: Reads, target: Node, slot: str | None, weight: Tensor) -> None:
        # All that reads the residual stream goes through here, so `edges` is complete.
        for subspace, matrix in reads.items():
            columns = weight[:, : matrix.shape[1]]
            columns[self._dimensions[subspace]] = matrix.double()
            writer = self._writers[subspace]
            self.edges.append(Edge(writer, target, slot))

    def _write(
        self, subspace: str, source: Node, weight: Tensor, matrix: Matrix | None = None
    ) -> None:
        writer = self._writers.setdefault(subspace, source)
        assert writer is source, f"subspace {subspace} is already written by {writer}."
        dimensions = self._dimensions[subspace]
        # By default each of the first rows writes one dimension of the subspace.
        matrix = torch.eye(len(dimensions)) if matrix is None else matrix
        rows = weight[: len(matrix)]
        rows[:, dimensions] = matrix.double()


def _zero_weights(config: Config) -> Weights:
    shapes = SHAPES if config["attn_only"] else SHAPES | MLP_SHAPES
    weights = {}
    for layer, name in product(range(config["n_layers"]), shapes):
        sizes = [config[axis] for axis in shapes[name].split()]
        zeros = torch.zeros(sizes, dtype=torch.float64)
        weights[name.format(layer=layer)] = zeros
    return weights


def rotated(weights: Weights, generator: Generator) -> Weights:
    """The same model in a random orthonormal basis of the residual stream."""
    d_model = len(weights["unembed.W_U"])
    square = torch.randn(d_model, d_model, generator=generator, dtype=torch.float64)
    basis = torch.linalg.qr(square).Q
    turned = dict(weights)
    for name, tensor in weights.items():
        # Residual vectors x become x @ basis, so writing weights turn alike. Reading weights W
        # become basis^T @ W, so that (x @ basis) @ (basis^T @ W) = x @ W.
        if name.endswith(WRITE_WEIGHTS):
            turned[name] = tensor @ basis
        elif name.endswith(READ_WEIGHTS):
            turned[name] = basis.T @ tensor
    return turned


def _component_weights(weights: Weights, node: Node) -> Weights:
    """Views of the weights of a head or an MLP, so that setting them sets `weights`."""
    if isinstance(node, MLP):
        return {name: weights[f"blocks.{node.layer}.mlp.{name}"] for name in MLP_WEIGHTS}
    assert isinstance(node, Head)
    of_layer = {name: weights[f"blocks.{node.layer}.attn.{name}"] for name in HEAD_WEIGHTS}
    return {name: weight[node.head] for name, weight in of_layer.items()}
