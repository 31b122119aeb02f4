"""Extract the features that fire on hidden states, for all layers and positions of any model.

The hidden states may come from a model outside TransformerLens, such as one from Hugging Face:

    states: dict[int, Tensor] = {}  # by layer, [batch, pos, d_model]: what the features read
    for layer, block in enumerate(model.model.layers):
        record = lambda module, inputs, layer=layer: states.update({layer: inputs[0]})
        block.mlp.register_forward_pre_hook(record)
    model(**inputs)
    found = extract_features(states, transcoders, top_k=50, threshold=0.01)

`Transcoders.reads` says which hidden states the features read: the input of the MLP, as here, or
the residual stream before the norm of the MLP.

A loop over layers and positions would read each result back from the device and wait for it. Here
the products with the encoders are followed by an exact selection of known size, and the host waits
once, at the end, for the number of features found.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor

from circuits.system.errors import InputError
from circuits.system.memory import memory_budget
from circuits.transcoders.activations import BatchTopK, ReLU
from circuits.transcoders.transcoder import Transcoders

# `largest` first selects among blocks of this many neighbouring numbers.
BLOCK = 32
# Tensors of the size of the activations that exist at once: pre-activations, activations, those of
# a group of layers, and the keys of the selection.
LIVE_COPIES = 4
# On a CPU, pieces of more than this many bytes would leave the caches.
CACHED_BYTES = 1 << 20

# Integers of the width of a float and of twice that width.
INTEGERS = {
    16: (torch.int16, torch.int32),
    32: (torch.int32, torch.int64),
}

COLUMNS = ["layer", "batch", "position", "index"]

HiddenStates = Mapping[int, Float[Tensor, "batch pos d_model"]]
Column = Int[Tensor, " found"]
FloatColumn = Float[Tensor, " found"]
Found = tuple[Column, Column, FloatColumn]
Tokens = Float[Tensor, "token d_model"]
Values = Float[Tensor, "row n"]
Columns = Int[Tensor, "row k"]


@dataclass(frozen=True, eq=False)
class ExtractedFeatures:
    """The features that fire, as columns sorted by layer, batch, position and index.

    Attributes:
        layer, batch, position: where each feature fires; batch is the number of the prompt.
        index: number of the feature in its layer.
        activation: its activation, in the dtype of the hidden states.
        layers: the layers that were searched.
        shape: number of prompts and of positions that were searched.

    Example:
        >>> import circuits, torch
        >>> transcoders = circuits.load_transcoders("toy-world-plt")
        >>> found = circuits.extract_features({0: torch.ones(1, 2, 128)}, transcoders)
        >>> list(found.table().columns)
        ['layer', 'batch', 'position', 'index', 'activation']
    """

    layer: Column
    batch: Column
    position: Column
    index: Column
    activation: FloatColumn
    layers: tuple[int, ...]
    shape: tuple[int, int]

    def __len__(self) -> int:
        return len(self.layer)

    def table(self) -> pd.DataFrame:
        """Return a table with columns `layer`, `batch`, `position`, `index` and `activation`."""
        indices = torch.stack([self.layer, self.batch, self.position, self.index], dim=1)
        table = pd.DataFrame(indices.cpu().numpy(), columns=COLUMNS)
        # NumPy has no bfloat16.
        return table.assign(activation=self.activation.float().cpu().numpy())


@torch.no_grad()
def extract_features(
    hidden_states: HiddenStates,
    transcoders: Transcoders,
    top_k: int | None = None,
    threshold: float = 0.0,
    *,
    max_memory: int | None = None,
) -> ExtractedFeatures:
    """Find the features that fire on hidden states, at every position of every layer given.

    A feature is found if its activation is positive and at least `threshold`. (The threshold of a
    `JumpReLU` is separate: an activation must exceed that one for the feature to fire at all.)
    Activations are computed in pieces where the memory does not hold them all. The result is the
    same but for rounding. If `top_k` is None, the host waits once for each piece.

    Args:
        hidden_states: what the features of each layer read, by layer. Layers may be missing and
            may be on different devices. Padding is searched like any other position.
        top_k: maximum number of features at each position of each layer. The largest activations
            are taken and, among equal ones, the lowest indices. None: no maximum.
        threshold: smallest activation to be found.
        max_memory: bytes of memory to use besides the result; None chooses from what is free. One
            position, or one prompt with `BatchTopK`, is processed even if it needs more.

    Returns:
        The features, on the device of the hidden states of the first layer.

    Raises:
        InputError: there are no hidden states; the transcoders do not have a layer; shapes or
            widths do not fit; numbers are not finite; `top_k` or `threshold` is out of range.

    Example:
        >>> import circuits, torch
        >>> transcoders = circuits.load_transcoders("toy-world-plt")
        >>> states = {layer: torch.ones(2, 3, transcoders.d_model) for layer in (0, 1)}
        >>> found = circuits.extract_features(states, transcoders, top_k=5)
        >>> len(found) <= 2 * 2 * 3 * 5  # layers, prompts, positions, top_k
        True
    """
    if top_k is not None and top_k < 1:
        raise InputError(f"top_k={top_k}: give 1 or more, or None for all features that fire.")
    if not 0 <= threshold < torch.inf:
        raise InputError(f"threshold={threshold}: give a number from 0 up.")
    _check_states(hidden_states, transcoders)
    layers = tuple(sorted(hidden_states))
    first = hidden_states[layers[0]]
    n_prompts, n_positions, _ = first.shape
    tokens = {}
    for layer in layers:
        tokens[layer] = hidden_states[layer].to(first.device).flatten(0, 1)
    budget = memory_budget(first.device, max_memory)
    encoder = _PiecewiseEncoder(transcoders, tokens, n_positions, budget)
    bound = _largest_below(threshold, first.dtype)
    if top_k is None or top_k >= transcoders.n_features:
        row, index, activation = _find_all(encoder, bound)
    else:
        row, index, activation = _find_largest(encoder, bound, top_k)
    encoder.check_finite()
    searched = (len(layers), n_prompts, n_positions)
    number, batch, position = torch.unravel_index(row, searched)
    layer_numbers = torch.tensor(layers, device=row.device)[number]
    shape = (n_prompts, n_positions)
    return ExtractedFeatures(layer_numbers, batch, position, index, activation, layers, shape)


def _find_all(encoder: _PiecewiseEncoder, bound: float) -> Found:
    # Row (layer and token), index and activation of all features above `bound`.
    found, first_row = [], 0
    for piece in encoder.pieces():
        activations = encoder.encode(*piece)
        # The host waits for the device here.
        row, index = (activations > bound).nonzero(as_tuple=True)
        found.append((first_row + row, index, activations[row, index]))
        first_row += len(activations)
    row, index, activation = map(torch.cat, zip(*found, strict=True))
    return row, index, activation


def _find_largest(encoder: _PiecewiseEncoder, bound: float, k: int) -> Found:
    # The same for at most `k` features of each row.
    found = [largest(encoder.encode(*piece), k) for piece in encoder.pieces()]
    activations, indices = map(torch.cat, zip(*found, strict=True))
    row, place = (activations > bound).nonzero(as_tuple=True)
    return row, indices[row, place], activations[row, place]


def largest(values: Values, k: int) -> tuple[Float[Tensor, "row k"], Columns]:
    """Find the `k` largest numbers of each row; the first ones among equal numbers.

    They are in the k blocks with the largest maxima, so only these blocks are searched. Negative
    numbers are not ordered among each other. Results are in ascending order of columns.
    """
    n_columns = values.shape[1]
    block = math.gcd(n_columns, BLOCK)
    n_blocks = n_columns // block
    if n_blocks <= k or block == 1:
        columns = _largest_columns(values, k)
        return values.gather(1, columns), columns
    blocks = values.unflatten(1, (n_blocks, block))
    if values.is_cuda:
        # Reductions over few numbers are slow on a GPU.
        pooled = torch.nn.functional.max_pool1d(values[:, None], block)
        maxima = pooled.squeeze(1)
    else:
        maxima = blocks.amax(-1)
    # A block that is left out has a smaller maximum than each chosen block, or an equal one and
    # follows it, so none of its numbers precedes the k largest ones.
    chosen = _largest_columns(maxima, k)
    rows = torch.arange(len(values), device=values.device)
    candidates = blocks[rows[:, None], chosen].flatten(1)
    places = _largest_columns(candidates, k)
    # column = block number * block size + offset
    columns = chosen.gather(1, places // block) * block
    columns += places % block
    return candidates.gather(1, places), columns


def _largest_columns(values: Values, k: int) -> Columns:
    # Columns of the `k` largest numbers, ascending; the first ones among equal numbers.
    # torch.topk may take any of several equal numbers, and in bfloat16 the k-th largest nearly
    # always has an equal. Positive floats are ordered like their bits read as integers, so bits and
    # column together form an integer key, and no two keys are equal.
    n_columns = values.shape[1]
    bits = torch.finfo(values.dtype).bits
    if bits == 64:
        # There are no integers of 128 bits.
        columns = values.sort(dim=1, descending=True, stable=True).indices
        return columns[:, :k].sort(dim=1).values
    if bits == 16 and n_columns > 1 << 16:
        # The column does not fit into 16 bits.
        return _largest_columns(values.float(), k)
    narrow, wide = INTEGERS[bits]
    # key = 2^bits * value_bits + (n_columns - 1 - column)
    keys = torch.arange(n_columns - 1, -1, -1, dtype=wide, device=values.device)
    keys = torch.add(keys, values.view(narrow), alpha=1 << bits)
    columns = keys.topk(k, dim=1, sorted=False).indices
    return columns.to(wide).sort(dim=1).values.long()


@dataclass(eq=False)
class _PiecewiseEncoder:
    """Computes the activations of features on the tokens of several layers, piece by piece."""

    transcoders: Transcoders
    # By layer, what the features read: all prompts, one after the other.
    tokens: Mapping[int, Tokens]
    n_positions: int
    # Bytes: half is for activations, a quarter for weights that are moved to the device.
    budget: int
    # Layers of all pieces so far, each with its largest pre-activation.
    maxima: list[tuple[int, Tensor]] = field(default_factory=list)
    # The layer that was encoded last, with its encoder weights.
    moved: dict[int, Tensor] = field(default_factory=dict)

    def pieces(self) -> Iterator[tuple[Sequence[int], slice]]:
        """Split the work into groups of layers with all tokens, or else into tokens of a layer."""
        layers = list(self.tokens)
        tokens = self.tokens[layers[0]]
        n_tokens, budget = len(tokens), self.budget // 2
        token_bytes = LIVE_COPIES * self.transcoders.n_features * tokens.element_size()
        if n_tokens * token_bytes <= budget:
            # Several layers at once need fewer calls of GPU kernels. On a CPU calls are cheap.
            if tokens.device.type == "cpu":
                budget = min(budget, CACHED_BYTES)
            n_layers = max(1, budget // (n_tokens * token_bytes))
            for start in range(0, len(layers), n_layers):
                yield layers[start : start + n_layers], slice(n_tokens)
            return
        for layer in layers:
            needed = self.n_positions if self._needs_prompts(layer) else 1
            step = max(needed, budget // token_bytes)
            if step > self.n_positions:
                # Whole prompts.
                step -= step % self.n_positions
            for start in range(0, n_tokens, step):
                yield [layer], slice(start, start + step)

    def encode(self, layers: Sequence[int], tokens: slice) -> Values:
        """Activations with a row for each layer and token; negative numbers stand for zero."""
        inputs = [self.tokens[layer][tokens] for layer in layers]
        n_features = self.transcoders.n_features
        values = inputs[0].new_empty(len(layers), len(inputs[0]), n_features)
        for layer, x, out in zip(layers, inputs, values, strict=True):
            self._write_preactivations(layer, x, out)
        maxima = values.flatten(1).amax(1)
        self.maxima += zip(layers, maxima, strict=True)
        for layer, out in zip(layers, values, strict=True):
            self._activate(layer, out)
        return values.flatten(0, 1)

    def check_finite(self) -> None:
        """Refuse numbers that are not finite. The host waits for the device once."""
        layers, maxima = zip(*self.maxima, strict=True)
        # The maximum of numbers with a NaN among them is NaN.
        finite = torch.stack(maxima).isfinite().tolist()
        for layer, is_finite in zip(layers, finite, strict=True):
            if is_finite:
                continue
            what, remedy = "the hidden states", "run the model in float32, or check its inputs"
            if self.tokens[layer].isfinite().all():
                what = "pre-activations"
                remedy = "give hidden states in float32, or check the transcoders"
            raise InputError(f"{what} of layer {layer} are not finite; {remedy}.")

    def _needs_prompts(self, layer: int) -> bool:
        # Whether activations at one position depend on other positions of the prompt.
        encoder = self.transcoders.encoders[layer]
        return isinstance(encoder.activation, BatchTopK)

    def _write_preactivations(self, layer: int, x: Tokens, out: Values) -> None:
        weight = self._weight(layer, x)
        bias = self.transcoders.encoders[layer].bias.to(x)
        # out = x W_enc^T + b_enc
        if weight.device == x.device and weight.dtype == x.dtype:
            torch.addmm(bias, x, weight.T, out=out)
            return
        step = max(1, self.budget // 4 // weight[0].numel() // x.element_size())
        for start in range(0, len(weight), step):
            rows = slice(start, start + step)
            moved = weight[rows].to(x)
            out[:, rows] = torch.nn.functional.linear(x, moved, bias[rows])

    def _weight(self, layer: int, like: Tensor) -> Tensor:
        # The encoder weights, moved to the device and dtype of `like` unless too large.
        if layer not in self.moved:
            weight = self.transcoders.encoders[layer].weight
            if weight.numel() * like.element_size() <= self.budget // 4:
                weight = weight.to(like)
            # Only one layer is kept, for its next piece.
            self.moved = {layer: weight}
        return self.moved[layer]

    def _activate(self, layer: int, values: Values) -> None:
        # Replace pre-activations by activations.
        activation = self.transcoders.encoders[layer].activation
        # Only positive numbers are selected, so ReLU can be left out.
        if not isinstance(activation, ReLU):
            length = self.n_positions if self._needs_prompts(layer) else len(values)
            prompts = values.unflatten(0, (-1, length))
            values.copy_(activation(prompts).flatten(0, 1))


def _largest_below(threshold: float, dtype: torch.dtype) -> float:
    # The largest number of a precision below `threshold`, or 0 if that is larger.
    # `activation > bound` then means `activation > 0 and activation >= threshold`.
    number = torch.tensor(threshold, dtype=dtype)
    # Compared as float64: the threshold may lie between two numbers of the precision.
    if float(number) >= threshold:
        number = torch.nextafter(number, torch.full_like(number, -torch.inf))
    return max(0.0, float(number))


def _check_states(hidden_states: HiddenStates, transcoders: Transcoders) -> None:
    if not isinstance(hidden_states, Mapping) or not hidden_states:
        raise InputError(
            "there are no hidden states by layer; give a mapping from layers to tensors "
            "[batch, pos, d_model], such as dict(enumerate(states)) for a list of all layers."
        )
    first_layer, first = next(iter(hidden_states.items()))
    expected = f"{tuple(first.shape)} in {first.dtype}"
    for layer, states in hidden_states.items():
        _check_layer_states(layer, states, transcoders)
        found = f"{tuple(states.shape)} in {states.dtype}"
        if found != expected:
            raise InputError(
                f"the hidden states of layer {layer} are {found}, those of layer {first_layer} "
                f"{expected}; give the same prompts to all layers, in one precision."
            )


def _check_layer_states(layer: int, states: Tensor, transcoders: Transcoders) -> None:
    name, last_layer = transcoders.name, transcoders.n_layers - 1
    if layer not in range(last_layer + 1):
        raise InputError(
            f"layer {layer!r} is none of those of {name!r}; give hidden states of layers 0 to "
            f"{last_layer}."
        )
    shape = tuple(states.shape)
    if len(shape) != 3 or 0 in shape or shape[2] != transcoders.d_model:
        raise InputError(
            f"the hidden states of layer {layer} have shape {shape}; {name!r} reads "
            f"[batch, pos, {transcoders.d_model}], at least one position of one prompt."
        )
    if not states.is_floating_point():
        raise InputError(
            f"the hidden states of layer {layer} are of type {states.dtype}; give "
            "floating-point numbers."
        )
