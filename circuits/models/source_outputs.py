"""What every source writes to the residual stream on given prompts, from one plain forward pass."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import groupby, starmap

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from circuits.graph.nodes import Head, Node, PosEmbed, TokenEmbed
from circuits.models.backend import Model, shape_of, weights_of
from circuits.models.changes import changes, has_backward_hooks, named
from circuits.models.hook_points import output_hook, residual_hook
from circuits.models.running import (
    Hooks,
    plain_inputs,
    run_to_logits,
    run_to_residual,
    scored_logits,
    separate_inputs,
    told,
)
from circuits.models.tolerance import TOLERANCE, logit_gap, relative_gap
from circuits.system.errors import InputError

Tokens = Int[Tensor, "batch pos"]
Mask = Bool[Tensor, "batch pos"]
MaskedPrompts = tuple[Tensor, Tensor, Tensor]
Residual = Float[Tensor, "batch pos d_model"]
Outputs = Float[Tensor, "source batch pos d_model"]
Directions = Float[Tensor, "d_model direction"]
Compute = Callable[[Model, Tensor, Tensor, Tensor], Tensor]
Gap = Callable[[Tensor, Tensor], float]
Compared = tuple[Compute, Compute, Gap]
OutputRows = Float[Tensor, "source *batch pos d_model"]

DIRECTIONS = 8
CHECKED_PROMPTS = 8


@dataclass(frozen=True, eq=False)
class SourceOutputs:
    """The outputs of the sources in one run, stored as small as possible: of a layer's heads z.

        out_h = z_h W_O[h]        computed on demand

    Attributes:
        nodes: all sources, in the order of `component_nodes`.
        activations: by the hook point at which they are read.
    """

    model: Model
    nodes: tuple[Node, ...]
    activations: Mapping[str, Float[Tensor, "batch pos *rest"]]

    def __sub__(self, other: SourceOutputs) -> SourceOutputs:
        mine, theirs = self.activations, other.activations
        difference = {name: mine[name] - theirs[name] for name in mine}
        return replace(self, activations=difference)

    def outputs(self, rows: slice = slice(None)) -> Outputs:
        """Compute the outputs of the nodes `rows`, which hold all heads of a layer or none."""
        nodes = self.nodes[rows]
        like = next(iter(self.activations.values()))
        batch, pos, *_ = like.shape
        d_model = shape_of(self.model).d_model
        outputs = like.new_empty(len(nodes), batch, pos, d_model)
        # Computed in place: no second copy of the outputs exists.
        writers = recording_hooks(self.model, nodes, outputs)
        for name, write in writers:
            write(self.activations[name])
        return outputs

    def attention(self, layer: int) -> Residual:
        """Compute what a layer's attention writes: the sum of z_h W_O[h] over heads, plus b_O."""
        # The heads' products are one product: [z_1 ... z_n] times the W_O[h] stacked.
        weights = weights_of(self.model)
        hook = output_hook(Head(layer, 0))
        z = self.activations[hook]
        projection = weights.head_output(layer).flatten(0, 1)
        written = z.flatten(2) @ projection
        return written + weights.output_bias(layer)

    def check(self, residual: Residual, mask: Mask) -> None:
        """Refuse a model whose final residual stream is not the sum of the outputs and biases."""
        # Compared along a few random directions r, which needs no product with W_O at every token:
        #     sum over sources u of out_u . r + sum over layers of b_O . r = residual stream . r
        wide = torch.promote_types(residual.dtype, torch.float32)
        generator = torch.Generator().manual_seed(0)
        random = torch.randn(
            shape_of(self.model).d_model, DIRECTIONS, generator=generator, dtype=wide
        )
        directions = random.to(residual.device)
        expected = (residual.detach().to(wide) @ directions)[mask]
        written = [each[mask] for each in self._along(directions)]
        total = torch.stack(written).sum(0)
        gap = (total - expected).norm(dim=-1)
        # Rounding is relative to the largest of all that is summed.
        summed = torch.stack([*written, expected])
        size = summed.norm(dim=-1).amax(0)
        share = gap / size.clamp(min=1e-30)
        largest = float(share.max())
        # False where the gap is NaN: overflow is reported where the logits are checked.
        if largest > TOLERANCE[shape_of(self.model).dtype]:
            found = changes(self.model)
            reason = f": {named(found)}; hooks can be where nodes write, as hook_z" if found else ""
            raise InputError(
                f"in {shape_of(self.model).model_name} the outputs of the components do not sum to "
                f"the residual stream (they miss {largest:.1%} of it at one token), so it has no "
                f"component graph{reason}."
            )

    def _along(self, directions: Directions) -> Iterator[Float[Tensor, "batch pos direction"]]:
        """What is written at each hook point, with biases, along some directions."""
        weights, wide = weights_of(self.model), directions.dtype
        for name, group in output_groups(self.nodes):
            first = self.nodes[group.start]
            written = self.activations[name].flatten(2)
            along, bias = directions, directions.new_zeros(())
            if isinstance(first, Head):
                # out_h . r = z_h . (W_O[h] r)
                layer = first.layer
                projection = weights.head_output(layer).flatten(0, 1)
                along = projection.to(wide) @ directions
                bias = weights.output_bias(layer).to(wide) @ directions
            yield written.to(wide) @ along + bias


def run_and_record(
    model: Model,
    nodes: Sequence[Node],
    tokens: Tokens,
    mask: Mask,
    hooks: Hooks = (),
) -> tuple[SourceOutputs, Residual]:
    """Run a model, and return the outputs of its sources and the final residual stream.

    A model whose outputs and biases do not sum to the residual stream is refused.

    Args:
        hooks: change activations before they are recorded.
    """
    activations: dict[str, Tensor] = {}
    names = dict.fromkeys(map(output_hook, nodes))
    hooks = [*hooks, *keepers(activations, names)]
    with torch.no_grad(), plain_inputs(model):
        residual = run_to_residual(model, tokens, mask, hooks)
        written = SourceOutputs(model, tuple(nodes), activations)
        written.check(residual, mask)
    return written, residual


@torch.no_grad()
def check_honoured(
    model: Model,
    nodes: Sequence[Node],
    prompts: Sequence[MaskedPrompts],
    *,
    gradients: bool = False,
) -> None:
    """Refuse changes of a model that would act in some of the runs made here and not in others.

    In some of them heads have separate inputs, other prompts are in the batch, or padding follows.
    What each prompt gives alone, without padding, is right.

    Args:
        prompts: tokens, which of them are real, and where logits are compared.
        gradients: compare those at what the first layer reads as well, if hooks may change them.
    """
    found = changes(model)
    if not found:
        return
    computed: dict[str, Compared] = {"logits": (_model_logits, _logits, logit_gap)}
    if gradients and has_backward_hooks(model):
        computed["gradients"] = _gradient, _gradient, relative_gap
    for masked in prompts:
        pieces = [each.split(CHECKED_PROMPTS) for each in masked]
        for some, real, rows in zip(*pieces, strict=True):
            with told(model, masked[0]):
                run_and_record(model, nodes, some, real)
            for what, (alone, together, gap_of) in computed.items():
                with told(model, masked[0]):
                    pairs = _pairs(model, (some, real, rows), alone, together)
                gap = max(starmap(gap_of, pairs))
                if gap > TOLERANCE[shape_of(model).dtype]:
                    raise InputError(
                        f"{shape_of(model).model_name} computes other {what} (by {gap:.1%}) where "
                        "other prompts are in the batch, padding follows a prompt or heads have "
                        f"separate inputs, [batch, pos, head, d_model]: {named(found)}; let it act "
                        "on each prompt, and on each vector of the last axis, alone and without "
                        "chance, or remove it."
                    )


def _pairs(
    model: Model, prompts: MaskedPrompts, alone: Compute, together: Compute
) -> list[tuple[Tensor, Tensor]]:
    """What prompts give beside others with separate inputs, and what they give alone."""
    tokens, mask, scored = prompts
    lengths = mask.sum(1).tolist()
    # What acts on the last position, or on all, acts on real tokens here.
    runs = []
    for row, length in enumerate(lengths):
        prompt = [given[row : row + 1, :length] for given in prompts]
        runs.append(alone(model, *prompt))
    expected = torch.cat(runs)
    # Circuits run as copies of the prompts, each with other activations.
    others = (tokens + 1) % shape_of(model).d_vocab
    beside = torch.cat([tokens, tokens, others])
    copies = (given.repeat(3, 1) for given in (mask, scored))
    with separate_inputs(model):
        found = together(model, beside, *copies)
    one, other, _ = found.chunk(3)
    return [(one, expected), (other, expected)]


def _model_logits(model: Model, tokens: Tokens, mask: Mask, scored: Mask) -> Tensor:
    return run_to_logits(model, tokens, mask)[scored]


def _logits(model: Model, tokens: Tokens, mask: Mask, scored: Mask) -> Tensor:
    residual = run_to_residual(model, tokens, mask)
    return scored_logits(model, residual, scored)


@torch.enable_grad()
def _gradient(model: Model, tokens: Tokens, mask: Mask, scored: Mask) -> Tensor:
    """The gradient of half the squared logits with respect to what the first layer reads.

    At real tokens, [token, d_model].
    """
    read: dict[str, Tensor] = {}
    name = residual_hook(0)

    def start(residual: Tensor) -> Tensor:
        read[name] = residual.detach().requires_grad_()
        return read[name]

    final = run_to_residual(model, tokens, mask, [(name, start)])
    logits = scored_logits(model, final, scored)
    (gradient,) = torch.autograd.grad(logits, read[name], logits.detach())
    return gradient[mask]


@torch.no_grad()
def source_outputs(model: Model, nodes: Sequence[Node], tokens: Tokens, mask: Mask) -> Outputs:
    """Compute what each of `nodes`, which are all sources, adds to the residual stream."""
    written, _ = run_and_record(model, nodes, tokens, mask)
    return written.outputs()


@torch.no_grad()
def embedding_outputs(model: Model, nodes: Sequence[Node], tokens: Tokens, mask: Mask) -> Outputs:
    """Compute what the embeddings among `nodes` write, without running the layers."""
    recorded: dict[str, Tensor] = {}
    split = [node for node in nodes if isinstance(node, TokenEmbed | PosEmbed)]
    names = list(map(output_hook, split))
    hooks = keepers(recorded, names)
    residual = run_to_residual(model, tokens, mask, hooks, layers=0)
    if not names:
        # The embedding as one node writes the whole residual stream before the first layer.
        return residual[None]
    return torch.stack([recorded[name] for name in names])


def output_groups(nodes: Sequence[Node]) -> Iterator[tuple[str, slice]]:
    """Yield each hook point where outputs are read, and who writes: a layer's heads or one node."""
    start = 0
    for name, group in groupby(nodes, key=output_hook):
        stop = start + len(list(group))
        yield name, slice(start, stop)
        start = stop


def keepers(recorded: dict[str, Tensor], names: Iterable[str]) -> Hooks:
    """Return hooks that store the activations at these points, detached, in `recorded`."""
    return [(name, partial(_keep, recorded, name)) for name in names]


def _keep(recorded: dict[str, Tensor], name: str, activation: Tensor) -> None:
    recorded[name] = activation.detach()


def recording_hooks(model: Model, nodes: Sequence[Node], outputs: OutputRows) -> Hooks:
    """Return hooks that write what each node adds to the residual stream into its row."""
    return [
        (name, partial(_write_outputs, model, nodes[group.start], outputs[group]))
        for name, group in output_groups(nodes)
    ]


def _write_outputs(model: Model, node: Node, into: OutputRows, activation: Tensor) -> None:
    """Write what all heads of the layer of `node`, or `node` alone, add to the residual stream."""
    if not isinstance(node, Head):
        into.copy_(activation.reshape(into.shape))
        return
    # out_h = z_h W_O[h]
    weights = weights_of(model)
    projection = weights.head_output(node.layer).detach()
    z = activation.detach().flatten(0, 1)
    rows = into.view(len(into), -1, into.shape[-1])
    torch.bmm(z.transpose(0, 1), projection, out=rows)
