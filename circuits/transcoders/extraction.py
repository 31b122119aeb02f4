"""Extract the features that fire on hidden states, for all layers and positions of any model.

A loop over layers and positions would read each result back from the device and wait for it. Here
the host waits once for each piece of the work, for the number of features found.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import product

import torch
from jaxtyping import Float, Int
from pandas import DataFrame
from torch import Tensor
from torch.nn import functional

from circuits.system.arguments import checked_arguments
from circuits.system.errors import InputError
from circuits.system.memory import memory_budget
from circuits.system.numbers import RealNumber, WholeNumber, whole
from circuits.system.tensors import as_tensor
from circuits.system.torch_modes import without_modes
from circuits.transcoders.activations import BatchTopK, ReLU
from circuits.transcoders.transcoder import Transcoders, check_is_transcoders

# `largest_columns` first selects among blocks of this many neighbouring numbers.
BLOCK = 32
# Tensors of the size of the activations that exist at once: pre-activations, activations, those of
# a group of layers, and the keys of the selection.
LIVE_COPIES = 4
# On a CPU, pieces of more than this many bytes would leave the caches.
CACHED_BYTES = 1 << 20

# Integers of the width of a float and of twice that width.
INTEGERS = {16: (torch.int16, torch.int32), 32: (torch.int32, torch.int64)}

COLUMNS = ["layer", "batch", "position", "index"]

HiddenStates = Mapping[int, Float[Tensor, "batch pos d_model"]]
Column = Int[Tensor, " found"]
FloatColumn = Float[Tensor, " found"]
Found = tuple[Column, Column, FloatColumn]
Tokens = Float[Tensor, "token d_model"]
Values = Float[Tensor, "row n"]
Columns = Int[Tensor, "row k"]
Moved = dict[tuple[int, int], Tensor]


@dataclass(frozen=True, eq=False)
class ExtractedFeatures:
    """The features that fire, as columns sorted by layer, batch, position and index.

    Attributes:
        layer, batch, position: where each feature fires; batch is the number of the prompt.
        index: number of the feature in its layer.
        activation: its activation, in the dtype of the hidden states.
        layers: the layers that were searched.
        shape: number of prompts and of positions that were searched.

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

    def table(self) -> DataFrame:
        """Return a table with columns `layer`, `batch`, `position`, `index` and `activation`."""
        columns = [getattr(self, name) for name in COLUMNS]
        indices = torch.stack(columns, 1).cpu()
        table = DataFrame(indices.numpy(), columns=COLUMNS)
        # NumPy has no bfloat16.
        activation = self.activation.float().cpu()
        return table.assign(activation=activation.numpy())


@checked_arguments
@torch.no_grad()
@without_modes()
def extract_features(
    hidden_states: HiddenStates,
    transcoders: Transcoders,
    top_k: WholeNumber | None = None,
    threshold: RealNumber = 0.0,
    *,
    max_memory: int | None = None,
) -> ExtractedFeatures:
    """Find the features that fire on hidden states, at every position of every layer given.

    A feature is found if its activation is positive and at least `threshold`. (The threshold of a
    `JumpReLU` is separate: an activation must exceed that one for the feature to fire at all.)
    Activations are computed in pieces where the memory does not hold them all. The result is the
    same but for rounding; it is on the device of the hidden states of the first layer.

    The hidden states may come from a model outside TransformerLens, such as one from Hugging Face:

        for layer, block in enumerate(model.model.layers):
            record = lambda module, inputs, layer=layer: states.update({layer: inputs[0]})
            block.mlp.register_forward_pre_hook(record)

    `Transcoders.reads` says which hidden states the features read: the input of the MLP, as here,
    or the residual stream before the norm of the MLP.

    Args:
        hidden_states: what the features of each layer read, by layer. Layers may be missing and
            may be on different devices. Padding is searched like any other position.
        top_k: maximum number of features at each position of each layer. The largest activations
            are taken and, among equal ones, the lowest indices. None: no maximum.
        threshold: smallest activation to be found.
        max_memory: bytes of memory to use besides the result; None chooses from what is free. One
            position, or one prompt with `BatchTopK`, is processed even if it needs more.

    Raises:
        InputError: there are no hidden states; the transcoders do not have a layer; shapes or
            widths do not fit; numbers are not finite; `top_k` or `threshold` is out of range.

    >>> import circuits, torch
    >>> transcoders = circuits.load_transcoders("toy-world-plt")
    >>> states = {layer: torch.ones(2, 3, transcoders.d_model) for layer in (0, 1)}
    >>> found = circuits.extract_features(states, transcoders, top_k=5)
    >>> len(found) <= 2 * 2 * 3 * 5  # layers, prompts, positions, top_k
    True
    """
    if top_k is not None:
        top_k = whole(top_k, "top_k", least=1)
    threshold = float(threshold)
    hidden_states = _checked_states(hidden_states, transcoders, threshold)
    layers = tuple(sorted(hidden_states))
    first = hidden_states[layers[0]]
    n_prompts, n_positions, _ = first.shape
    tokens = {}
    for layer in layers:
        states = hidden_states[layer].to(first.device)
        tokens[layer] = states.flatten(0, 1)
    budget = memory_budget(first.device, max_memory)
    encoders = _Encoders(transcoders, tokens, n_positions, budget)
    bound = _largest_below(threshold, first.dtype)
    found, n_rows = [], 0
    for values in encoders.activations():
        row, index, activation = _above(values, bound, top_k)
        found.append((n_rows + row, index, activation))
        n_rows += len(values)
    columns = zip(*found, strict=True)
    row, index, activation = map(torch.cat, columns)
    searched = (len(layers), n_prompts, n_positions)
    number, batch, position = torch.unravel_index(row, searched)
    layer_numbers = torch.tensor(layers, device=row.device)
    features = (layer_numbers[number], batch, position, index, activation)
    return ExtractedFeatures(*features, layers, searched[1:])


def _above(values: Values, bound: float, top_k: int | None) -> Found:
    """Row, column and value of all numbers above `bound`, or of the `top_k` largest of each row."""
    columns = None
    if top_k is not None and top_k < values.shape[1]:
        columns = largest_columns(values, top_k)
        values = values.gather(1, columns)
    # The host waits for the device here.
    fires = values > bound
    row, place = fires.nonzero(as_tuple=True)
    index = place if columns is None else columns[row, place]
    return row, index, values[row, place]


def largest_columns(values: Values, k: int) -> Columns:
    """Find the columns of the `k` largest numbers of each row; the first ones among equal numbers.

    They are in the k blocks with the largest maxima, so only these blocks are searched. Negative
    numbers are not ordered among each other. Columns are in ascending order.
    """
    block = math.gcd(values.shape[1], BLOCK)
    blocks = values.unflatten(1, (-1, block))
    if blocks.shape[1] <= k or block == 1:
        return _columns_by_key(values, k)
    maxima = _block_maxima(values, block)
    # A block that is left out has a smaller maximum than each chosen block, or an equal one and
    # follows it, so none of its numbers precedes the k largest ones.
    chosen = _columns_by_key(maxima, k)
    rows = torch.arange(len(values), device=values.device)
    candidates = blocks[rows[:, None], chosen]
    place = _columns_by_key(candidates.flatten(1), k)
    # column = block number * block size + offset
    first = chosen.gather(1, place // block) * block
    return first + place % block


def _block_maxima(values: Values, block: int) -> Float[Tensor, "row block"]:
    if values.is_cuda:
        # Reductions over few numbers are slow on a GPU.
        maxima = functional.max_pool1d(values[:, None], block)
        return maxima.squeeze(1)
    blocks = values.unflatten(1, (-1, block))
    return blocks.amax(-1)


def _columns_by_key(values: Values, k: int) -> Columns:
    # Columns of the k largest values of each row, ascending; of equal values the lower columns.
    # torch.topk may take any of several equal numbers, and in bfloat16 the k-th largest nearly
    # always has an equal. Positive floats are ordered like their bits read as integers, so bits and
    # column together form an integer key, and no two keys are equal.
    n_columns = values.shape[1]
    bits = torch.finfo(values.dtype).bits
    if bits == 64:
        # There are no integers of 128 bits.
        _, order = values.sort(dim=1, descending=True, stable=True)
        columns, _ = order[:, :k].sort(1)
        return columns
    if bits == 16 and n_columns > 1 << 16:
        # The column does not fit into 16 bits.
        return _columns_by_key(values.float(), k)
    value_int, key_int = INTEGERS[bits]
    # key = 2^bits * value_bits + (n_columns - 1 - column)
    column = torch.arange(n_columns, dtype=key_int, device=values.device)
    value_bits = values.view(value_int)
    keys = torch.add(column.flip(0), value_bits, alpha=1 << bits)
    _, columns = keys.topk(k, sorted=False)
    columns, _ = columns.to(key_int).sort(1)
    return columns.long()


@dataclass(frozen=True, eq=False)
class _Encoders:
    """The encoders of several layers, applied to tokens piece by piece."""

    transcoders: Transcoders
    # By layer, what the features read: all prompts, one after the other.
    tokens: Mapping[int, Tokens]
    n_positions: int
    # Bytes: half is for activations, a quarter for weights that are moved to the device.
    budget: int
    # The weights that were moved last, by layer and first feature.
    moved: Moved = field(default_factory=dict)

    def activations(self) -> Iterator[Values]:
        """Yield activations with a row for each layer and token; negative numbers mean zero."""
        every = list(self.tokens)
        like = self.tokens[every[0]]
        n_layers, n_tokens = self._piece_size(like)
        firsts = range(0, len(every), n_layers)
        starts = range(0, len(like), n_tokens)
        for first, start in product(firsts, starts):
            layers = every[first : first + n_layers]
            piece = slice(start, start + n_tokens)
            values, maxima = self._of_piece(layers, piece)
            yield values.flatten(0, 1)
            # The host has waited for the device by now.
            self._check_finite(layers, maxima)

    def _of_piece(self, layers: Sequence[int], piece: slice) -> tuple[Tensor, Tensor]:
        """Activations of some layers at some tokens, and each layer's largest pre-activation."""
        like = self.tokens[layers[0]][piece]
        values = like.new_empty(len(layers), len(like), self.transcoders.n_features)
        maxima = []
        for layer, out in zip(layers, values, strict=True):
            x = self.tokens[layer][piece]
            self._write_preactivations(layer, x, out)
            maxima.append(out.amax())
            self._activate(layer, out)
        return values, torch.stack(maxima)

    def _piece_size(self, like: Tokens) -> tuple[int, int]:
        """How many layers with all their tokens make a piece, or how many tokens of one layer."""
        n_tokens, encoders = len(like), self.transcoders.encoders
        row_bytes = LIVE_COPIES * self.transcoders.n_features * like.element_size()
        n_rows = max(1, self.budget // 2 // row_bytes)
        if n_tokens <= n_rows:
            # Several layers at once need fewer calls of GPU kernels. On a CPU calls are cheap.
            if like.device.type == "cpu":
                n_rows = min(n_rows, CACHED_BYTES // row_bytes)
            return max(1, n_rows // n_tokens), n_tokens
        by_prompt = any(isinstance(encoder.activation, BatchTopK) for encoder in encoders)
        if by_prompt or n_rows > self.n_positions:
            n_prompts = max(1, n_rows // self.n_positions)
            n_rows = n_prompts * self.n_positions
        return 1, n_rows

    def _write_preactivations(self, layer: int, x: Tokens, out: Values) -> None:
        encoder = self.transcoders.encoders[layer]
        bias = encoder.bias.to(x)
        # Weights that are too large to be moved whole are moved in parts.
        row_bytes = x.shape[1] * x.element_size()
        step = max(1, self.budget // 4 // row_bytes)
        for start in range(0, len(bias), step):
            part = slice(start, start + step)
            weight = self._weight(layer, part, x)
            into = out[:, part]
            # out = x W_enc^T + b_enc
            torch.addmm(bias[part], x, weight.T, out=into)

    def _weight(self, layer: int, part: slice, like: Tokens) -> Tensor:
        # The part that was moved last is kept, for the next tokens.
        key = (layer, part.start)
        if key not in self.moved:
            self.moved.clear()
            weight = self.transcoders.encoders[layer].weight[part]
            self.moved[key] = weight.to(like)
        return self.moved[key]

    def _activate(self, layer: int, values: Values) -> None:
        """Replace pre-activations by activations."""
        activation = self.transcoders.encoders[layer].activation
        # Only positive numbers are selected, so ReLU can be left out.
        if not isinstance(activation, ReLU):
            # A piece holds whole prompts or a part of one.
            length = min(self.n_positions, len(values))
            prompts = values.unflatten(0, (-1, length))
            activations = activation(prompts)
            values.copy_(activations.flatten(0, 1))

    def _check_finite(self, layers: Sequence[int], maxima: Float[Tensor, " layer"]) -> None:
        # The maximum of numbers with a NaN among them is NaN.
        finite = maxima.isfinite().tolist()
        for layer, is_finite in zip(layers, finite, strict=True):
            if is_finite:
                continue
            what, remedy = "the hidden states", "run the model in float32, or check its inputs"
            states = self.tokens[layer]
            if states.isfinite().all():
                what = "pre-activations"
                remedy = "give hidden states in float32, or check the transcoders"
            raise InputError(f"{what} of layer {layer} are not finite; {remedy}.")


def _largest_below(threshold: float, dtype: torch.dtype) -> float:
    """The largest number of a precision below `threshold`, or 0 if that is larger."""
    # `activation > bound` then means `activation > 0 and activation >= threshold`.
    number = torch.tensor(threshold, dtype=dtype)
    # Compared as float64: the threshold may lie between two numbers of the precision.
    if float(number) >= threshold:
        downwards = torch.tensor(-torch.inf, dtype=dtype)
        number = number.nextafter(downwards)
    return max(0.0, float(number))


def _checked_states(
    given: HiddenStates, transcoders: Transcoders, threshold: float
) -> dict[int, Tensor]:
    check_is_transcoders(transcoders)
    if not 0 <= threshold < math.inf:
        raise InputError(f"threshold={threshold}: give a number from 0 up.")
    if not isinstance(given, Mapping) or not given:
        raise InputError(
            "there are no hidden states by layer; give a mapping from layers to tensors "
            "[batch, pos, d_model], such as dict(enumerate(states)) for a list of all layers."
        )
    hidden_states = {}
    for layer, states in given.items():
        tensor = as_tensor(states, "the hidden states of a layer")
        hidden_states[whole(layer, "a layer")] = tensor
    first_layer, *_ = hidden_states
    expected = _described(hidden_states[first_layer])
    for layer, states in hidden_states.items():
        _check_layer(layer, states, transcoders)
        if _described(states) != expected:
            raise InputError(
                f"the hidden states of layer {layer} are {_described(states)}, those of layer "
                f"{first_layer} {expected}; give the same prompts to all layers, in one precision."
            )
    return hidden_states


def _described(states: Tensor) -> str:
    return f"{tuple(states.shape)} in {states.dtype}"


def _check_layer(layer: int, states: Tensor, transcoders: Transcoders) -> None:
    name, last_layer = transcoders.name, transcoders.n_layers - 1
    if layer not in range(transcoders.n_layers):
        raise InputError(
            f"layer {layer!r} is none of those of {name!r}; give hidden states of layers 0 to "
            f"{last_layer}."
        )
    shape = tuple(states.shape)
    has_positions = len(shape) == 3 and 0 not in shape
    if not has_positions or shape[2] != transcoders.d_model:
        raise InputError(
            f"the hidden states of layer {layer} have shape {shape}; {name!r} reads "
            f"[batch, pos, {transcoders.d_model}], at least one position of one prompt."
        )
    if not states.is_floating_point():
        raise InputError(
            f"the hidden states of layer {layer} are of type {states.dtype}; give "
            "floating-point numbers."
        )
