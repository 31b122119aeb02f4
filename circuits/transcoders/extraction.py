"""Which features fire on hidden states of any model, inside TransformerLens or out of it: for all layers and positions at once.

    states: dict[int, Tensor] = {}  # by layer, [batch, pos, d_model]: what the features read
    for number, layer in enumerate(model.model.layers):  # of a model from Hugging Face
        layer.mlp.register_forward_pre_hook(lambda module, given, number=number: states.update({number: given[0]}))
    model(**inputs)
    found = extract_features(states, transcoders, top_k=50, threshold=0.01)

What the features read (`Transcoders.reads`) is for the caller to give: what the MLP itself reads, as here, or the residual stream before the norm
of the MLP. Published loops go over layers and positions and read each number back from the device, which waits for it. Here the encoders' products
are followed by an exact selection whose size is known beforehand, and the host waits once, at the end, for how many there are.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor

from circuits.system.errors import InputError
from circuits.system.memory import memory_budget
from circuits.transcoders.activations import BatchTopK, ReLU
from circuits.transcoders.transcoder import Encoder, Transcoders

# The largest of a row are looked for among the blocks of so many neighbours that hold them.
BLOCK = 32
# So many tensors of the size of the activations are held at a time: pre-activations, activations, those of a group of layers, what selects.
COPIES = 4
CACHED_BYTES = 1 << 20


@dataclass(frozen=True, eq=False)
class ExtractedFeatures:
    """The features that fire, in columns: ordered by layer, then prompt, position and index, whatever their activations.

    Attributes:
        layer, batch, position, index: of each.
        activation: how strongly it fires, in the precision of the hidden states.
        layers: those that were searched.
        shape: how many prompts and positions were.
    """

    layer: Int[Tensor, " found"]
    batch: Int[Tensor, " found"]
    position: Int[Tensor, " found"]
    index: Int[Tensor, " found"]
    activation: Float[Tensor, " found"]
    layers: tuple[int, ...]
    shape: tuple[int, int]

    def __len__(self) -> int:
        return len(self.layer)

    def table(self) -> pd.DataFrame:
        """A row for each: `layer`, `batch`, `position`, `index`, `activation`."""
        names = ("layer", "batch", "position", "index")
        return pd.DataFrame(
            {
                **{name: getattr(self, name).cpu().numpy() for name in names},
                "activation": self.activation.float().cpu().numpy(),
            }
        )


@torch.no_grad()
def extract_features(
    hidden_states: Mapping[int, Float[Tensor, "batch pos d_model"]],
    transcoders: Transcoders,
    top_k: int | None = None,
    threshold: float = 0.0,
    *,
    max_memory: int | None = None,
) -> ExtractedFeatures:
    """The features that fire on hidden states, at every position of every layer given.

    A feature is found where its activation is above zero and not below `threshold`: a number equal to it counts, as in published loops. (That is
    apart from the threshold of a `JumpReLU`, which an activation must exceed for the feature to fire at all.) Where the memory does not hold the
    activations of all layers, they are computed in pieces; the result is the same but for
    rounding, and the host waits once for each piece if `top_k` is None.

    Args:
        hidden_states: what the features of each layer read. Layers may be missing and lie on different devices; what pads hold is not told apart.
        top_k: at most so many at each position of each layer, the largest; of equal ones those of lower index. None: all.
        max_memory: bytes that it may take besides what is found; None chooses from what is free. One position, or with `BatchTopK` one prompt, is
            taken even if it needs more.

    Returns:
        Columns on the device of the first layer's hidden states.

    Raises:
        InputError: no hidden states; a layer that the transcoders do not cover; shapes or a width that do not fit; numbers that are not finite; a
            `top_k` or `threshold` out of range.
    """
    _check(hidden_states, transcoders, top_k, threshold)
    layers = sorted(hidden_states)
    like = hidden_states[layers[0]]
    states = {layer: hidden_states[layer].to(like.device).flatten(0, 1) for layer in layers}
    budget = memory_budget(like.device, max_memory)
    activations = _Activations(transcoders, states, like.shape[1], budget // 4)
    bound = _number_below(threshold, activations.dtype)
    most = None if top_k is None or top_k >= transcoders.n_features else top_k
    columns, selected, row = [], [], 0
    for some, tokens in activations.pieces(budget // 2):
        values = activations(some, tokens)
        if most is None:
            columns.append(_compacted(values, None, bound, row))
        else:
            selected.append(largest(values, most))
        row += len(values)
    if selected:
        found, places = (torch.cat(part) for part in zip(*selected, strict=True))
        columns.append(_compacted(found, places, bound, 0))
    rows, index, activation = (torch.cat(part) for part in zip(*columns, strict=True))
    activations.check_finite()
    layer, batch, position = _places(rows, layers, like.shape[0], like.shape[1])
    return ExtractedFeatures(
        layer, batch, position, index, activation, tuple(layers), (like.shape[0], like.shape[1])
    )


def largest(
    values: Float[Tensor, "row n"], k: int
) -> tuple[Float[Tensor, "row k"], Int[Tensor, "row k"]]:
    """The `k` largest numbers of each row and where they stand, in the order in which they stand; of equal ones the first are taken.

    They lie in the k blocks that have the largest maxima, so only these blocks are searched. Numbers below zero are not told apart.
    """
    n, block = values.shape[1], math.gcd(values.shape[1], BLOCK)
    if n // block <= k or block == 1:
        places = _first_largest(values, k)
        return values.gather(1, places), places
    blocks = values.unflatten(1, (n // block, block))
    # Reductions of a GPU are slow over so few numbers.
    maxima = (
        torch.nn.functional.max_pool1d(values[:, None], block)[:, 0]
        if values.is_cuda
        else blocks.amax(-1)
    )
    # A block left out has a smaller maximum than each that is taken, or an equal one and stands later: none of its numbers precedes theirs.
    chosen = _first_largest(maxima, k)
    candidates = blocks[torch.arange(len(values), device=values.device)[:, None], chosen].flatten(1)
    places = _first_largest(candidates, k)
    return candidates.gather(1, places), chosen.gather(1, places // block) * block + places % block


def _first_largest(values: Float[Tensor, "row n"], k: int) -> Int[Tensor, "row k"]:
    """Where the `k` largest stand, in order; of equal ones the first.

    torch.topk leaves open which of equal numbers it takes, and in bfloat16 the k-th has nearly always an equal. The bits of numbers above zero are
    ordered as they are, so bits and place together make whole numbers of which no two are equal.
    """
    n, size = values.shape[1], values.element_size()
    if values.dtype == torch.float64:  # has no integers of twice the width
        return values.sort(dim=1, descending=True, stable=True).indices[:, :k].sort(dim=1).values
    if size == 2 and n > 1 << 16:
        return _first_largest(values.float(), k)
    narrow, wide = (torch.int16, torch.int32) if size == 2 else (torch.int32, torch.int64)
    places = torch.arange(n - 1, -1, -1, dtype=wide, device=values.device)
    keys = torch.add(places, values.view(narrow), alpha=1 << 8 * size)
    return keys.topk(k, dim=1, sorted=False).indices.to(wide).sort(dim=1).values.long()


class _Activations:
    """The activations of features on hidden states, piece by piece."""

    def __init__(
        self,
        transcoders: Transcoders,
        states: Mapping[int, Float[Tensor, "token d_model"]],
        length: int,
        held: int,
    ) -> None:
        """
        Args:
            length: of each prompt.
            held: so many bytes an encoder may take where it has to be brought to the device or the precision of the hidden states.
        """
        self.transcoders, self.states, self.length, self.held = transcoders, states, length, held
        like = next(iter(states.values()))
        self.dtype, self.on_gpu = like.dtype, like.device.type != "cpu"
        self.current = -1, transcoders.encoders[0]
        self.highest: list[tuple[int, Float[Tensor, ""]]] = []

    def pieces(self, budget: int) -> Iterator[tuple[Sequence[int], slice]]:
        """Layers with all tokens, as many at a time as the memory holds, or else one layer with some of the tokens."""
        layers, tokens = list(self.states), len(next(iter(self.states.values())))
        per_token = COPIES * self.transcoders.n_features * self.dtype.itemsize
        most = max(1, budget // per_token)
        if most >= tokens:
            # Together, layers need few calls of a GPU's kernels. On a CPU, where calls are cheap, large ones would leave the caches.
            group = max(
                1, (budget if self.on_gpu else min(budget, CACHED_BYTES)) // (per_token * tokens)
            )
            yield from (
                (layers[start : start + group], slice(0, tokens))
                for start in range(0, len(layers), group)
            )
            return
        for layer in layers:
            step = max(most, self.length) if self._takes_prompts(layer) else most
            step = step // self.length * self.length if step >= self.length else step
            yield from (([layer], slice(start, start + step)) for start in range(0, tokens, step))

    def __call__(self, layers: Sequence[int], tokens: slice) -> Float[Tensor, "row feature"]:
        """A row for each layer and token."""
        reads = [self.states[layer][tokens] for layer in layers]
        pre = reads[0].new_empty(len(layers), len(reads[0]), self.transcoders.n_features)
        for layer, read, into in zip(layers, reads, pre, strict=True):
            # A layer in several pieces has its encoder brought once.
            if self.current[0] != layer:
                self.current = layer, self._brought(layer)
            _product(self.current[1], read, self.held, into)
        self.highest += zip(layers, pre.flatten(1).amax(1), strict=True)
        for layer, into in zip(layers, pre, strict=True):
            activation = self.transcoders.encoders[layer].activation
            # What is below zero is not selected anyway.
            if not isinstance(activation, ReLU):
                into.copy_(
                    activation(
                        into.unflatten(0, (-1, self.length))
                        if self._takes_prompts(layer)
                        else into[None]
                    ).view(into.shape)
                )
        return pre.flatten(0, 1)

    def check_finite(self) -> None:
        """Refuse what is not finite, waiting for the device once. The largest of some numbers is NaN if one of them is."""
        layers, highest = zip(*self.highest, strict=True)
        for layer, fine in zip(layers, torch.stack(highest).isfinite().tolist(), strict=True):
            if not fine:
                if self.states[layer].isfinite().all():
                    raise InputError(
                        f"pre-activations of layer {layer} are not finite; give hidden states in float32, or check the transcoders."
                    )
                raise InputError(
                    f"the hidden states of layer {layer} are not finite; run the model in float32, or check its inputs."
                )

    def _takes_prompts(self, layer: int) -> bool:
        """Whether what fires at one position depends on the others of its prompt."""
        return isinstance(self.transcoders.encoders[layer].activation, BatchTopK)

    def _brought(self, layer: int) -> Encoder:
        encoder, like = self.transcoders.encoders[layer], self.states[layer]
        if encoder.weight.numel() * like.element_size() > self.held:
            return encoder
        return Encoder(encoder.weight.to(like), encoder.bias.to(like), encoder.activation)


def _product(
    encoder: Encoder,
    read: Float[Tensor, "token d_model"],
    held: int,
    into: Float[Tensor, "token feature"],
) -> None:
    """weight @ x + bias, bringing only some rows of the weight at a time to the device and precision of `read` where they are elsewhere."""
    weight, bias = encoder.weight, encoder.bias.to(read)
    if (weight.device, weight.dtype) == (read.device, read.dtype):
        torch.addmm(bias, read, weight.T, out=into)
        return
    step = max(1, held // (weight.shape[1] * read.element_size()))
    for start in range(0, len(weight), step):
        rows = slice(start, start + step)
        into[:, rows] = torch.nn.functional.linear(read, weight[rows].to(read), bias[rows])


def _compacted(
    values: Float[Tensor, "row n"], index: Int[Tensor, "row n"] | None, bound: float, first: int
) -> tuple[Int[Tensor, " found"], Int[Tensor, " found"], Float[Tensor, " found"]]:
    """Row, index and value of each number above `bound`. Here the host waits for the device."""
    row, place = (values > bound).nonzero().unbind(1)
    return row + first, place if index is None else index[row, place], values[row, place]


def _places(
    rows: Int[Tensor, " found"], layers: Sequence[int], prompts: int, length: int
) -> tuple[Int[Tensor, " found"], Int[Tensor, " found"], Int[Tensor, " found"]]:
    """Layer, prompt and position of each row."""
    tokens = prompts * length
    token = rows % tokens
    return torch.tensor(layers, device=rows.device)[rows // tokens], token // length, token % length


def _number_below(threshold: float, dtype: torch.dtype) -> float:
    """The largest number of that precision below the threshold, but not below zero: what exceeds it, and nothing else, is to be kept."""
    number = torch.tensor(threshold, dtype=torch.float64).to(dtype)
    if float(number) >= threshold:
        number = torch.nextafter(number, torch.tensor(-torch.inf, dtype=dtype))
    return max(0.0, float(number))


def _check(
    hidden_states: Mapping[int, Tensor],
    transcoders: Transcoders,
    top_k: int | None,
    threshold: float,
) -> None:
    if not isinstance(hidden_states, Mapping):
        raise InputError(
            "give hidden states as a mapping from layers to tensors: of a list that begins with layer 0, dict(enumerate(states))."
        )
    if not hidden_states:
        raise InputError(
            "there are no hidden states; give a mapping from layers to tensors [batch, pos, d_model]."
        )
    if top_k is not None and top_k < 1:
        raise InputError(f"top_k={top_k}: give 1 or more, or None for all features that fire.")
    if not 0 <= threshold < torch.inf:
        raise InputError(
            f"threshold={threshold}: give a number from 0 up; features that do not fire have activation 0."
        )
    if unknown := [layer for layer in hidden_states if layer not in range(transcoders.n_layers)]:
        raise InputError(
            f"layer {unknown[0]!r} is none of those of {transcoders.name!r}; give hidden states of layers 0 to {transcoders.n_layers - 1}."
        )
    first, like = next(iter(hidden_states.items()))
    for layer, states in hidden_states.items():
        shape = tuple(states.shape)
        if len(shape) != 3 or shape[2] != transcoders.d_model or 0 in shape:
            raise InputError(
                f"the hidden states of layer {layer} have shape {shape}; {transcoders.name!r} reads [batch, pos, {transcoders.d_model}], "
                "at least one position of one prompt."
            )
        if not states.is_floating_point():
            raise InputError(
                f"the hidden states of layer {layer} are of type {states.dtype}; give floating-point numbers."
            )
        if (states.shape, states.dtype) != (like.shape, like.dtype):
            raise InputError(
                f"the hidden states of layer {layer} are {shape} in {states.dtype}, those of layer {first} {tuple(like.shape)} in {like.dtype}; "
                "give the same prompts to all layers, in one precision."
            )
