"""Wiring: transformers set by hand, so that the edges that matter are known by construction.

The residual stream is cut into named slots, and each slot has one writer: the token embedding (slot `token`, one dimension per
token), the position embedding (`position`), a head or an MLP. Wiring a read is the only way to set a weight that reads, and it
records the edge from the slot's writer to the reader. So the edges follow from the weights' making, not from any patching code.
Constants are biases (b_Q, b_in) and not a direction of the residual stream, so no edge carries only a constant one.

What hides the circuit comes afterwards: decoys in the components that were not wired, and a rotation of the residual stream.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from circuits.graph.edges import Edge
from circuits.graph.nodes import MLP, Head, Logits, Node, PosEmbed, TokenEmbed

TOKEN, POSITION, UNREAD = "token", "position", "unread"
UNREAD_SIZE = 8
DECOY_SCALE = 0.5

READING = ("W_Q", "W_K", "W_V", "W_in", "W_U")
WRITING = ("W_E", "W_pos", "W_O", "W_out")


@dataclass(frozen=True)
class Shape:
    """The sizes of a hand-wired model, under TransformerLens's names; `d_mlp` 0 is attention only."""

    n_layers: int
    n_heads: int
    d_head: int
    n_ctx: int
    d_vocab: int
    d_vocab_out: int
    d_mlp: int = 0


@dataclass(frozen=True, eq=False)
class Attends:
    """One term of a head's attention score: query @ matrix @ key.

    Attributes:
        query: the slot read at the position that attends; None is the constant 1, which is a bias and no edge.
        key: the slot read at the position attended to.
        matrix: [query, key]; one row when the query is constant.
    """

    query: str | None
    key: str
    matrix: Float[Tensor, "query key"]


class Wiring:
    """A model's weights while they are set, in float64, and the edges recorded on the way.

    Args:
        shape: the sizes of the model.
        slots: name and size of every slot besides `token`, `position` and `unread`.
    """

    def __init__(self, shape: Shape, slots: Mapping[str, int]) -> None:
        sizes = {TOKEN: shape.d_vocab, POSITION: shape.n_ctx, **slots, UNREAD: UNREAD_SIZE}
        ends = torch.tensor(list(sizes.values())).cumsum(0).tolist()
        self.shape = shape
        self.d_model = ends[-1]
        self.edges: list[Edge] = []
        self.weights = _zeros(shape, self.d_model)
        self._dimensions = {
            name: slice(end - size, end)
            for (name, size), end in zip(sizes.items(), ends, strict=True)
        }
        self._writers: dict[str, Node] = {}
        self._write(TOKEN, TokenEmbed(), self.weights["embed.W_E"])
        self._write(POSITION, PosEmbed(), self.weights["pos_embed.W_pos"])

    @property
    def config(self) -> dict[str, Any]:
        """The arguments of HookedTransformerConfig: no norms, ReLU, causal attention."""
        mlp = (
            {"d_mlp": self.shape.d_mlp} if self.shape.d_mlp else {"d_mlp": None, "attn_only": True}
        )
        fixed = {
            "act_fn": "relu",
            "normalization_type": None,
            "attention_dir": "causal",
            "default_prepend_bos": False,
        }
        return {**asdict(self.shape), "d_model": self.d_model, **mlp, **fixed}

    @property
    def unwired(self) -> list[Head | MLP]:
        """The heads and MLPs that have nothing to do."""
        layers, heads = range(self.shape.n_layers), range(self.shape.n_heads)
        components: list[Head | MLP] = [Head(layer, head) for layer in layers for head in heads]
        components += [MLP(layer) for layer in layers if self.shape.d_mlp]
        return [node for node in components if node not in self._writers.values()]

    def head(
        self,
        layer: int,
        head: int,
        *,
        attends: Sequence[Attends],
        copies: str,
        matrix: Float[Tensor, "copied written"],
        writes: str,
        sharpness: float,
    ) -> None:
        """Let a head attend by the sum of `attends`, times `sharpness`, and write (slot `copies`) @ `matrix` into slot `writes`.

        With no terms it attends alike to all positions so far, and reads nothing through q and k.
        """
        node, weights = Head(layer, head), _head_weights(self.weights, layer, head)
        scale = sharpness * math.sqrt(self.shape.d_head)  # attention divides by this root
        start = 0
        for term in attends:
            width = len(term.matrix)
            columns = slice(start, start + width)
            if term.query is None:
                weights["b_Q"][columns] = scale
            else:
                self._read(
                    term.query, node, "q", weights["W_Q"][:, columns], scale * _identity(width)
                )
            self._read(term.key, node, "k", weights["W_K"][:, columns], term.matrix.T)
            start += width
        width = matrix.shape[1]
        self._read(copies, node, "v", weights["W_V"][:, :width], matrix)
        self._write(writes, node, weights["W_O"][:width])

    def mlp(
        self,
        layer: int,
        *,
        reads: Mapping[str, Float[Tensor, "_ neuron"]],
        bias: Float[Tensor, " neuron"],
        matrix: Float[Tensor, "neuron written"],
        writes: str,
    ) -> None:
        """Let an MLP write relu(sum of slot @ its matrix in `reads` + `bias`) @ `matrix` into slot `writes`."""
        node, neurons = MLP(layer), len(bias)
        for slot, through in reads.items():
            self._read(
                slot, node, None, self.weights[f"blocks.{layer}.mlp.W_in"][:, :neurons], through
            )
        self.weights[f"blocks.{layer}.mlp.b_in"][:neurons] = bias
        self._write(writes, node, self.weights[f"blocks.{layer}.mlp.W_out"][:neurons], matrix)

    def unembed(self, slot: str, matrix: Float[Tensor, "slot vocab"]) -> None:
        """Let the logits be slot @ `matrix`."""
        self._read(slot, Logits(), None, self.weights["unembed.W_U"], matrix)

    def with_decoys(self, generator: torch.Generator, leak: float) -> dict[str, Tensor]:
        """The weights with random ones in every component that was not wired.

        Decoys read the whole residual stream and write into the slot that nothing else reads; with a `leak`, that much less
        strongly into all other slots too.
        """
        weights = {name: tensor.clone() for name, tensor in self.weights.items()}
        reached = torch.full((self.d_model,), leak, dtype=torch.float64)
        reached[self._dimensions[UNREAD]] = 1.0
        for node in self.unwired:
            parts = (
                _head_weights(weights, node.layer, node.head)
                if isinstance(node, Head)
                else _mlp_weights(weights, node.layer)
            )
            for name, tensor in parts.items():
                if name in READING:
                    tensor.copy_(DECOY_SCALE * _normal(tensor.shape, generator))
                elif name in WRITING:
                    tensor.copy_(
                        DECOY_SCALE
                        / math.sqrt(len(tensor))
                        * _normal(tensor.shape, generator)
                        * reached
                    )
        return weights

    def _read(
        self,
        slot: str,
        target: Node,
        name: str | None,
        weight: Float[Tensor, "d_model read"],
        through: Float[Tensor, "slot read"],
    ) -> None:
        """Let `target` read a slot, and record the edge."""
        weight[self._dimensions[slot]] = through.double()
        edge = Edge(self._writers[slot], target, name)
        if edge not in self.edges:
            self.edges.append(edge)

    def _write(
        self,
        slot: str,
        source: Node,
        weight: Float[Tensor, "row d_model"],
        through: Float[Tensor, "row slot"] | None = None,
    ) -> None:
        """Let `source` write a slot, by default one dimension of it per row of `weight`."""
        assert slot not in self._writers, (
            f"slot {slot} is written by {self._writers[slot]} already."
        )
        weight[:, self._dimensions[slot]] = (
            _identity(len(weight)) if through is None else through.double()
        )
        self._writers[slot] = source


def rotated(weights: Mapping[str, Tensor], generator: torch.Generator) -> dict[str, Tensor]:
    """The same model in a random orthonormal basis of the residual stream, in which every slot is spread over all dimensions."""
    d_model = weights["unembed.W_U"].shape[0]
    basis = torch.linalg.qr(_normal((d_model, d_model), generator)).Q
    turned = dict(weights)
    for name, tensor in weights.items():
        if name.endswith(WRITING):
            turned[name] = tensor @ basis
        elif name.endswith(READING):
            turned[name] = basis.T @ tensor
    return turned


def _zeros(shape: Shape, d_model: int) -> dict[str, Tensor]:
    """A state dict of zeros, under TransformerLens's names."""
    sizes: dict[str, tuple[int, ...]] = {
        "embed.W_E": (shape.d_vocab, d_model),
        "pos_embed.W_pos": (shape.n_ctx, d_model),
    }
    for layer in range(shape.n_layers):
        for letter in "QKV":
            sizes[f"blocks.{layer}.attn.W_{letter}"] = (shape.n_heads, d_model, shape.d_head)
            sizes[f"blocks.{layer}.attn.b_{letter}"] = (shape.n_heads, shape.d_head)
        sizes |= {
            f"blocks.{layer}.attn.W_O": (shape.n_heads, shape.d_head, d_model),
            f"blocks.{layer}.attn.b_O": (d_model,),
        }
        if shape.d_mlp:
            sizes |= {
                f"blocks.{layer}.mlp.W_in": (d_model, shape.d_mlp),
                f"blocks.{layer}.mlp.b_in": (shape.d_mlp,),
            }
            sizes |= {
                f"blocks.{layer}.mlp.W_out": (shape.d_mlp, d_model),
                f"blocks.{layer}.mlp.b_out": (d_model,),
            }
    sizes |= {"unembed.W_U": (d_model, shape.d_vocab_out), "unembed.b_U": (shape.d_vocab_out,)}
    return {name: torch.zeros(size, dtype=torch.float64) for name, size in sizes.items()}


def _head_weights(weights: Mapping[str, Tensor], layer: int, head: int) -> dict[str, Tensor]:
    """Views of one head's weights."""
    return {
        name: weights[f"blocks.{layer}.attn.{name}"][head]
        for name in ("W_Q", "b_Q", "W_K", "W_V", "W_O")
    }


def _mlp_weights(weights: Mapping[str, Tensor], layer: int) -> dict[str, Tensor]:
    """Views of one MLP's weights."""
    return {name: weights[f"blocks.{layer}.mlp.{name}"] for name in ("W_in", "W_out")}


def _identity(size: int) -> Float[Tensor, "size size"]:
    return torch.eye(size, dtype=torch.float64)


def _normal(size: Sequence[int], generator: torch.Generator) -> Tensor:
    return torch.randn(tuple(size), generator=generator, dtype=torch.float64)
