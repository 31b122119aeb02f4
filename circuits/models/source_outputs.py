"""What every source writes to the residual stream on given prompts: one plain forward pass, no per-head flags."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from circuits.graph.nodes import Embed, Head, Node, PosEmbed, TokenEmbed
from circuits.models import Hook, Model, ModelWeights, output_hook, plain_inputs, run_to_residual
from circuits.system.errors import InputError

# Rounding may part the sum of the outputs from the residual stream by this much of its size; a missing term parts them by far more.
TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-3, torch.float16: 0.05, torch.bfloat16: 0.2}


@dataclass(frozen=True, eq=False)
class SourceOutputs:
    """What the sources wrote in one run, kept as small as it comes: of a layer's heads z, whose product with W_O is made when asked for.

    Attributes:
        nodes: all that write, see `component_nodes`.
        activations: by the hook point at which they are read.
    """

    model: Model
    nodes: tuple[Node, ...]
    activations: Mapping[str, Float[Tensor, "batch pos *rest"]]

    def __sub__(self, other: SourceOutputs) -> SourceOutputs:
        """What is to be added to the other's outputs to get these."""
        return SourceOutputs(
            self.model,
            self.nodes,
            {name: value - other.activations[name] for name, value in self.activations.items()},
        )

    def __neg__(self) -> SourceOutputs:
        return SourceOutputs(
            self.model, self.nodes, {name: -value for name, value in self.activations.items()}
        )

    def outputs(
        self,
        rows: slice = slice(None),
        into: Float[Tensor, "source batch pos d_model"] | None = None,
    ) -> Float[Tensor, "source batch pos d_model"]:
        """What the nodes `rows` write. A layer's heads are asked for together.

        Args:
            into: where it is written; None makes a new tensor.
        """
        start, stop, _ = rows.indices(len(self.nodes))
        groups = [
            group
            for group in output_groups(self.nodes)
            if start <= group[1].start and group[1].stop <= stop
        ]
        if into is None:
            example = self.activations[groups[0][0]]
            into = example.new_empty(stop - start, *example.shape[:2], self.model.cfg.d_model)
        for name, where in groups:
            _write(
                self.model,
                self.nodes[where.start],
                self.activations[name],
                into[where.start - start : where.stop - start],
            )
        return into

    def attention(self, layer: int) -> Float[Tensor, "batch pos d_model"]:
        """What a layer's heads and b_O write together."""
        parts = ModelWeights(self.model)
        z, projection = (
            self.activations[output_hook(Head(layer, 0))],
            parts.output_projection(layer),
        )
        return z.flatten(2) @ projection.flatten(0, 1) + parts.output_bias(layer)

    def residual(self) -> Float[Tensor, "batch pos d_model"]:
        """The sum of all that is written and the biases: the residual stream after the last layer, in float32 at least."""
        total = torch.zeros(
            (),
            device=self.model.cfg.device,
            dtype=torch.promote_types(self.model.cfg.dtype, torch.float32),
        )
        for name, rows in output_groups(self.nodes):
            first = self.nodes[rows.start]
            total = total + (
                self.attention(first.layer) if isinstance(first, Head) else self.activations[name]
            )
        return total

    def check(
        self, residual: Float[Tensor, "batch pos d_model"], mask: Bool[Tensor, "batch pos"]
    ) -> None:
        """Refuse a model in whose run the outputs and biases do not sum to the residual stream, looking at the first prompt's last token.

        Raises:
            InputError: with how far they miss it.
        """
        last = int(mask[0].nonzero().max())
        first = SourceOutputs(
            self.model,
            self.nodes,
            {name: value[:1, last : last + 1] for name, value in self.activations.items()},
        )
        residual = residual.detach()[:1, last : last + 1]
        gap = float(
            (first.residual() - residual).abs().max() / residual.abs().max().clamp(min=1e-30)
        )
        # Written so that NaN, which an overflowing model leaves here, is reported where the logits are checked.
        if gap > TOLERANCE[self.model.cfg.dtype]:
            raise InputError(
                f"in {self.model.cfg.model_name} the components' outputs do not sum to the residual stream (they miss {gap:.1%} of it), "
                "so no component graph describes this model."
            )


def run_and_record(
    model: Model,
    nodes: Sequence[Node],
    tokens: Int[Tensor, "batch pos"],
    mask: Bool[Tensor, "batch pos"],
) -> tuple[SourceOutputs, Float[Tensor, "batch pos d_model"]]:
    """What each of `nodes` writes in one forward pass, and the residual stream after the last layer.

    Raises:
        InputError: the outputs and biases do not sum to the residual stream, so that the model is not what a component graph describes.
    """
    activations: dict[str, Tensor] = {}
    with torch.no_grad(), plain_inputs(model):
        residual = run_to_residual(
            model,
            tokens,
            mask,
            [(name, keeper(activations, name)) for name, _ in output_groups(nodes)],
        )
        written = SourceOutputs(model, tuple(nodes), activations)
        written.check(residual, mask)
    return written, residual


def source_outputs(
    model: Model,
    nodes: Sequence[Node],
    tokens: Int[Tensor, "batch pos"],
    mask: Bool[Tensor, "batch pos"],
) -> Float[Tensor, "source batch pos d_model"]:
    """What each of `nodes` (all that write, see `component_nodes`) adds to the residual stream.

    Raises:
        InputError: the outputs and biases do not sum to the residual stream, so that the model is not what a component graph describes.
    """
    with torch.no_grad():
        return run_and_record(model, nodes, tokens, mask)[0].outputs()


def output_groups(nodes: Sequence[Node]) -> Iterator[tuple[str, slice]]:
    """The hook points at which the nodes' outputs are read, each with the nodes (a layer's heads, or one) that write there."""
    start = 0
    for index, node in enumerate(nodes):
        if index + 1 == len(nodes) or output_hook(nodes[index + 1]) != output_hook(node):
            yield output_hook(node), slice(start, index + 1)
            start = index + 1


def keeper(read: dict[str, Tensor], name: str) -> Hook:
    """A hook that puts the activation, without its history, into `read`."""

    def keep(activation: Tensor) -> None:
        read[name] = activation.detach()

    return keep


def embedding_outputs(
    model: Model,
    nodes: Sequence[Node],
    tokens: Int[Tensor, "batch pos"],
    mask: Bool[Tensor, "batch pos"],
) -> Float[Tensor, "embedding batch pos d_model"]:
    """What the embeddings among `nodes` write; the layers are not run."""
    embeddings = [node for node in nodes if isinstance(node, Embed | TokenEmbed | PosEmbed)]
    outputs = torch.empty(
        len(embeddings),
        *tokens.shape,
        model.cfg.d_model,
        dtype=model.cfg.dtype,
        device=tokens.device,
    )
    with torch.no_grad():
        residual = run_to_residual(
            model,
            tokens,
            mask,
            recording_hooks(
                model, [node for node in embeddings if not isinstance(node, Embed)], outputs
            ),
            layers=0,
        )
    return outputs if len(embeddings) > 1 else residual[None]


def recording_hooks(
    model: Model, nodes: Sequence[Node], outputs: Float[Tensor, "source *batch pos d_model"]
) -> list[tuple[str, Hook]]:
    """Hooks that write what each node adds to the residual stream into `outputs`, a row per node."""
    return [
        (name, _recorder(model, nodes[where.start], outputs[where]))
        for name, where in output_groups(nodes)
    ]


def _recorder(model: Model, node: Node, rows: Float[Tensor, "source *batch pos d_model"]) -> Hook:
    def record(activation: Tensor) -> None:
        _write(model, node, activation, rows)

    return record


def _write(
    model: Model,
    node: Node,
    activation: Float[Tensor, "batch pos *rest"],
    rows: Float[Tensor, "source *batch pos d_model"],
) -> None:
    """Put what a layer's heads, or one other node, write into `rows`."""
    if not isinstance(node, Head):
        rows.copy_(activation.reshape(rows.shape))
        return
    # z @ W_O of every head, straight into place.
    by_head = activation.detach().flatten(0, 1).transpose(0, 1)
    torch.bmm(
        by_head,
        ModelWeights(model).output_projection(node.layer).detach(),
        out=rows.view(len(rows), -1, rows.shape[-1]),
    )
