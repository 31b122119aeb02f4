"""Interventions on features: set, scale or ablate them while the model runs or generates text.

The change of a feature's activation, times its decoder rows, is added to the outputs of the MLPs
that it writes to. With attention patterns, norm scales and MLPs frozen at their clean values, only
direct effects remain: the columns of an attribution graph's adjacency matrix.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from circuits.attribution.local_model import (
    check_transcoders,
    compute_dtype,
    norm_at,
    pad_prompts,
    read_by_features,
)
from circuits.graph.nodes import Feature, parse_node
from circuits.models import (
    FINAL_SCALE,
    Hook,
    Model,
    frozen,
    hooked,
    mlp_output_hook,
    mlp_residual_hook,
    pattern_hook,
    plain_inputs,
    run_to_residual,
    scale_hooks,
    shape_of,
    unembed,
)
from circuits.system.arguments import checked_arguments
from circuits.system.errors import InputError
from circuits.system.kinds import expect
from circuits.system.numbers import RealNumber, WholeNumber, items, python_number, shown, whole
from circuits.system.randomness import random_generator
from circuits.system.torch_modes import without_modes
from circuits.tasks.readers.tokens import Prompt
from circuits.tasks.tokenization import prompt_tokens
from circuits.transcoders.transcoder import Transcoders

Tokens = Int[Tensor, " pos"]
Activations = Float[Tensor, " pos"]
FeatureValues = Float[Tensor, "variant pos feature"]
Residual = Float[Tensor, "variant pos d_model"]


@dataclass(frozen=True)
class Intervention:
    """A change of one feature's activation: set to a value, or multiplied by a factor.

    >>> import circuits
    >>> circuits.Intervention.ablate("f2.120@5")
    Intervention(layer=2, index=120, position=5, value=None, factor=0.0)

    Attributes:
        layer, index: the feature.
        position: a position, several of them, a slice, or None for all. Negative ones count from
            the end of the prompt. A slice without an end also covers generated tokens.
        value, factor: the new activation, or what it is multiplied by; the other one is None.

    Raises:
        InputError: not exactly one of `value` and `factor` is given, or it is not finite.
    """

    layer: int
    index: int
    position: int | slice | Sequence[int] | Int[Tensor, " _"] | None = None
    value: RealNumber | None = None
    factor: RealNumber | None = None

    def __post_init__(self) -> None:
        plain: dict[str, Any] = {"position": _plain_position(self.position)}
        for each in ("layer", "index"):
            plain[each] = whole(getattr(self, each), each)
        name = f"f{plain['layer']}.{plain['index']}"
        has_value = self.value is not None
        if has_value == (self.factor is not None):
            raise InputError(
                f"an intervention on {name} has either a value or a factor; give one of them."
            )
        name_of_number = "value" if has_value else "factor"
        given = getattr(self, name_of_number)
        number = python_number(given)
        # Neither NaN nor whole numbers beyond all floats are.
        if number is None or not abs(number) <= sys.float_info.max:
            raise InputError(
                f"{name} cannot be set to or multiplied by {shown(given)}; give a finite number."
            )
        plain[name_of_number] = float(number)
        for each, value in plain.items():
            object.__setattr__(self, each, value)

    @staticmethod
    def set(feature: Feature | str, value: RealNumber) -> Intervention:
        """Set a feature, at its position or, without one, at all positions.

        Raises:
            InputError: `feature` is no feature, or `value` is not finite.
        """
        return Intervention(*_layer_index_position(feature), value=value)

    @staticmethod
    def scale(feature: Feature | str, factor: RealNumber) -> Intervention:
        """Multiply a feature.

        Raises:
            InputError: `feature` is no feature, or `factor` is not finite.
        """
        return Intervention(*_layer_index_position(feature), factor=factor)

    @staticmethod
    def ablate(feature: Feature | str) -> Intervention:
        """Set a feature to zero.

        Raises:
            InputError: `feature` is no feature.
        """
        return Intervention.scale(feature, 0.0)

    def applied(self, activation: Activations) -> Activations:
        """Return the feature's new activation."""
        if self.factor is not None:
            return activation * float(self.factor)
        assert self.value is not None
        return torch.full_like(activation, float(self.value))


Variants = Sequence[Sequence[Intervention]]


def _plain_position(position: Any) -> int | slice | tuple[int, ...] | None:
    if position is None or isinstance(position, slice):
        return position
    if python_number(position) is not None:
        return whole(position, "position")
    several = items(position, "position")
    if not several:
        raise InputError("position=[] holds no position; leave it out for all positions.")
    return tuple(whole(each, "position") for each in several)


def _layer_index_position(feature: Feature | str) -> tuple[int, int, int | None]:
    node = parse_node(feature) if isinstance(feature, str) else feature
    if not isinstance(node, Feature) or isinstance(node.position, str):
        raise InputError(
            f"{feature} is no feature at a position; write f2.1204@5, or f2.1204 for all positions."
        )
    return node.layer, node.index, node.position


@dataclass(frozen=True, eq=False)
class Intervened:
    """The results of a run under interventions, with one row per variant.

    >>> import circuits
    >>> model = circuits.load_model("toy-world")
    >>> transcoders = circuits.load_transcoders("toy-world-clt")
    >>> circuits.intervene(model, transcoders, "Dallas is in", [[]]).activations[0].shape
    torch.Size([1, 4, 512])

    Attributes:
        logits: the logits at each position.
        preactivations: the pre-activations of all features, by layer.
        activations: by layer, the activations before the layer's own interventions.
    """

    logits: Float[Tensor, "variant pos vocab"]
    preactivations: Sequence[FeatureValues]
    activations: Sequence[FeatureValues]


@checked_arguments
@without_modes()
def intervene(
    model: Model,
    transcoders: Transcoders,
    prompt: Prompt,
    variants: Variants,
    *,
    freeze_attention: bool = True,
    frozen_layers: Sequence[int] | Int[Tensor, " _"] = (),
    freeze_norms: bool = False,
    leading: WholeNumber = 1,
    prepend_bos: bool | None = None,
) -> Intervened:
    """Run a prompt under several lists of interventions, one variant per list.

    >>> import circuits
    >>> model = circuits.load_model("toy-world")
    >>> transcoders = circuits.load_transcoders("toy-world-clt")
    >>> ablate = circuits.Intervention.ablate("f0.475@3")
    >>> circuits.intervene(model, transcoders, "Dallas is in", [[], [ablate]]).logits.shape
    torch.Size([2, 4, 673])

    Args:
        prompt: text, or token ids.
        variants: the interventions of each run; without any, the model itself runs. If two change
            the same feature, the later one wins.
        freeze_attention: freeze attention patterns at their clean values.
        frozen_layers: layers whose MLP outputs are their clean values plus the changes by the
            interventions. If any are given, features write their changes to these layers only.
        freeze_norms: freeze the scales of all norms at their clean values.
        leading: the number of first positions without features.
        prepend_bos: True begins the prompt with exactly one BOS token, which it may bring; False
            takes it as it is; None is the model's default for text, and False for token ids.

    Raises:
        InputError: the transcoders do not fit the model, the prompt cannot be used, or an
            intervention or frozen layer does not exist.
    """
    leading = whole(leading, "leading", least=0)
    tokens = _checked_prompt(model, transcoders, prompt, prepend_bos)
    layers = range(transcoders.n_layers)
    _check_variants(variants)
    frozen_layers = [_existing(layer, layers) for layer in items(frozen_layers, "frozen_layers")]
    length = len(tokens)
    span = _PromptSpan(length, length, leading, transcoders)
    located = span.each_located(variants or [[]])
    held = list(map(pattern_hook, layers)) if freeze_attention else []
    if freeze_norms and shape_of(model).has_norms:
        held += [*scale_hooks(model).values(), FINAL_SCALE]
    run = _InterventionRun(model, transcoders, located, leading, held, frozen_layers)
    return run.execute(tokens)


def _check_variants(variants: Variants) -> None:
    if not _is_list(variants) or not all(map(_is_list, variants)):
        raise InputError(
            "variants must be a list with a list of interventions for each run; "
            "for one run, give [[intervention, ...]]."
        )


def _existing(layer: Any, layers: range) -> int:
    if python_number(layer) not in layers:
        raise InputError(
            f"frozen_layers holds {shown(layer)}, and the model has layers 0 to {layers[-1]}; give "
            "some of these."
        )
    return whole(layer, "frozen_layers")


@checked_arguments
def direct_effects(
    model: Model,
    transcoders: Transcoders,
    prompt: Prompt,
    variants: Variants,
    *,
    leading: WholeNumber = 1,
    prepend_bos: bool | None = None,
) -> Intervened:
    """Run `intervene` with attention, norms and all MLPs frozen, as attribution graphs assume.

    >>> import circuits
    >>> model = circuits.load_model("toy-world")
    >>> transcoders = circuits.load_transcoders("toy-world-clt")
    >>> double = circuits.Intervention.scale("f0.475@3", 2.0)
    >>> run = circuits.direct_effects(model, transcoders, "Dallas is in", [[], [double]])
    >>> bool((run.preactivations[0][0] == run.preactivations[0][1]).all())  # its own layer
    True

    Args:
        prompt, variants, leading, prepend_bos: see `intervene`.

    Raises:
        InputError: see `intervene`.
    """
    check_transcoders(model, transcoders)
    return intervene(
        model,
        transcoders,
        prompt,
        variants,
        frozen_layers=range(transcoders.n_layers),
        freeze_norms=True,
        leading=leading,
        prepend_bos=prepend_bos,
    )


@checked_arguments
@without_modes()
def generate(
    model: Model,
    transcoders: Transcoders,
    prompt: Prompt,
    interventions: Sequence[Intervention],
    *,
    new_tokens: WholeNumber = 20,
    temperature: RealNumber = 0.0,
    seed: WholeNumber = 0,
    leading: WholeNumber = 1,
    prepend_bos: bool | None = None,
) -> Tokens:
    """Continue a prompt under interventions, with nothing frozen, and return all token ids.

    Interventions at all positions, or in a slice without an end, also act on generated tokens.

    >>> import circuits
    >>> model = circuits.load_model("toy-world")
    >>> transcoders = circuits.load_transcoders("toy-world-clt")
    >>> tokens = circuits.generate(model, transcoders, "The capital of Texas is", [], new_tokens=1)
    >>> model.to_string(tokens)
    '<bos> The capital of Texas is Austin'

    Args:
        prompt, leading, prepend_bos: see `intervene`.
        new_tokens: how many tokens to add; fewer if the context ends.
        temperature: 0 takes the most probable token each time.
        seed: seeds the sampling if the temperature is positive.

    Raises:
        InputError: see `intervene`; or `new_tokens` or `temperature` is negative.
    """
    leading = whole(leading, "leading", least=0)
    new_tokens = whole(new_tokens, "new_tokens", least=0)
    heat = float(temperature)
    tokens = _checked_prompt(model, transcoders, prompt, prepend_bos)
    if not 0 <= heat < math.inf:
        raise InputError(
            f"temperature={heat}: give 0 for the most probable token each time, or more."
        )
    if not _is_list(interventions):
        raise InputError("interventions must be a list; for a single one, give [intervention].")
    length = len(tokens)
    final_length = min(length + new_tokens, shape_of(model).n_ctx)
    span = _PromptSpan(length, final_length, leading, transcoders)
    (located,) = span.each_located([interventions])
    generator = random_generator(seed)
    while len(tokens) < final_length:
        run = _InterventionRun(model, transcoders, [located], leading)
        logits = run.execute(tokens).logits
        logits = logits[0, -1]
        logits = logits.float().cpu()
        if heat == 0:
            next_token = logits.argmax()[None]
        else:
            probabilities = (logits / heat).softmax(-1)
            next_token = torch.multinomial(probabilities, 1, generator=generator)
        tokens = torch.cat([tokens, next_token])
    return tokens


@dataclass(frozen=True, eq=False)
class _InterventionRun:
    """One run of a prompt under interventions: the hooks on its MLPs and what they record."""

    model: Model
    transcoders: Transcoders
    # Interventions whose positions are slices; these may reach beyond the prompt.
    variants: Variants
    leading: int
    # The hook points whose activations are frozen.
    held: Sequence[str] = ()
    frozen_layers: Sequence[int] = ()
    preactivations: list[FeatureValues] = field(default_factory=list)
    activations: list[FeatureValues] = field(default_factory=list)
    # By layer, the change of each feature's activation.
    changes: dict[int, FeatureValues] = field(default_factory=dict)
    # By frozen layer, the change of what its features read.
    input_changes: dict[int, Residual] = field(default_factory=dict)

    @property
    def n_clean(self) -> int:
        # If anything is frozen, the first row is clean, and the other rows take its values.
        return 1 if self.held or self.frozen_layers else 0

    @torch.no_grad()
    def execute(self, tokens: Tokens) -> Intervened:
        """Run all variants."""
        n_rows = self.n_clean + len(self.variants)
        model = self.model
        prompts = [tokens] * n_rows
        rows, mask = pad_prompts(model, prompts)
        hooks = list(self._hooks(n_rows))
        with frozen(model), plain_inputs(model), hooked(model, hooks):
            residual = run_to_residual(model, rows, mask)
            logits = unembed(model, residual)
        logits = logits[self.n_clean :]
        return Intervened(logits, self.preactivations, self.activations)

    def _hooks(self, n_rows: int) -> Iterator[tuple[str, Hook]]:
        for name in self.held:
            yield name, partial(_as_in_first_row, n_rows)
        before_norm = self.transcoders.writes == "mlp"
        for layer in range(self.transcoders.n_layers):
            mlp_input = mlp_residual_hook(self.model, layer)
            mlp_output = mlp_output_hook(self.model, layer, before_norm=before_norm)
            yield mlp_input, partial(self._read, layer)
            yield mlp_output, partial(self._write, layer)

    def _read(self, layer: int, residual: Residual) -> None:
        """Record what the layer's features compute, and how the interventions change it."""
        inputs = self._feature_inputs(layer, residual)
        preactivations = self.transcoders.preactivations(layer, inputs)
        activations = self.transcoders.encoders[layer].activation(preactivations)
        activations[:, : self.leading] = 0
        self.preactivations.append(preactivations[self.n_clean :])
        self.activations.append(activations[self.n_clean :])
        if layer in self.frozen_layers:
            self.input_changes[layer] = inputs - inputs[:1]
            # Features of a frozen layer keep their clean activations: no intervention of an
            # earlier layer is seen, so direct effects of several features add up.
            activations = activations[:1].expand_as(activations)
        self.changes[layer] = self._change(layer, activations)

    def _write(self, layer: int, output: Residual) -> Residual:
        """Add the changes of all features that write to the layer's MLP output."""
        if layer in self.frozen_layers:
            # The skip is part of the linear map, so it passes on changes of its input.
            input_change = self.input_changes[layer]
            skip = self.transcoders.skip(layer, input_change)
            output = output[:1] + skip.to(output)
        elif self.frozen_layers:
            return output
        # output of MLP l += sum over features s that write to it of (change of a_s) W_dec[s, l]
        change = self.transcoders.decode(self.changes, layer)
        return output + change.to(output)

    def _feature_inputs(self, layer: int, residual: Residual) -> Residual:
        """Return what features read, through the norm with its frozen or its current scale."""
        # In the first row, whose scale is frozen, the residual stream is clean.
        read = residual[:1] if FINAL_SCALE in self.held else residual
        norm = norm_at(self.model, layer, "ln2", read)
        residual = residual.to(compute_dtype(self.model))
        return read_by_features(self.transcoders, norm, residual)[1]

    def _change(self, layer: int, activations: FeatureValues) -> FeatureValues:
        change = torch.zeros_like(activations)
        for row, interventions in enumerate(self.variants, start=self.n_clean):
            for one in interventions:
                if one.layer == layer:
                    place = (row, one.position, one.index)
                    now = activations[place]
                    # change of a_s = (value or factor a_s) - a_s
                    change[place] = one.applied(now) - now
        change[:, : self.leading] = 0
        return change


def _as_in_first_row(n_rows: int, activation: Tensor) -> Tensor:
    # The rows may be one after the other, as at `FINAL_SCALE`.
    rows = activation.reshape(n_rows, -1)
    first = rows[:1].expand_as(rows)
    return first.reshape_as(activation)


def _single_positions(changes: Sequence[Intervention]) -> Iterator[Intervention]:
    """The interventions, those at several positions as one at each."""
    for change in changes:
        if isinstance(change, Intervention) and isinstance(change.position, tuple):
            yield from (replace(change, position=each) for each in change.position)
        else:
            yield change


def _is_list(value: object) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, str)


def _checked_prompt(
    model: Model, transcoders: Transcoders, prompt: Prompt, prepend_bos: bool | None
) -> Tokens:
    check_transcoders(model, transcoders)
    tokens = prompt_tokens(model, prompt, prepend_bos)
    pad_prompts(model, [tokens])  # refuses prompts that are empty or too long
    return tokens


@dataclass(frozen=True)
class _PromptSpan:
    """The lengths of a prompt without and with its continuation, and where features are."""

    length: int
    final_length: int
    leading: int
    transcoders: Transcoders

    def located(self, change: Intervention) -> Intervention:
        """Check an intervention and make its position a slice from the start of the prompt."""
        remedy = "make one of a feature, such as circuits.Intervention.ablate('f2.120@5')"
        expect(change, Intervention, "an intervention", remedy)
        name = f"f{change.layer}.{change.index}"
        n_layers, n_features = self.transcoders.n_layers, self.transcoders.n_features
        is_feature = change.index in range(n_features)
        if change.layer not in range(n_layers) or not is_feature:
            raise InputError(
                f"there is no feature {name}: {self.transcoders.name!r} has {n_layers} layers "
                f"of {n_features} features."
            )
        where = f"{name} cannot be changed at position {change.position!r}"
        covered = self._covered(change.position)
        if not covered:
            raise InputError(
                f"{where} of a prompt of {self.length} tokens; choose an existing position."
            )
        if covered[-1] < self.leading:
            raise InputError(
                f"{where}: the first {self.leading} positions have no features; see leading."
            )
        position = slice(covered.start, covered.stop, covered.step)
        return replace(change, position=position)

    def each_located(self, variants: Variants) -> Variants:
        """Check and locate the interventions of each run."""
        return [[self.located(one) for one in _single_positions(run)] for run in variants]

    def _covered(self, position: Any) -> range:
        """Return the positions that are changed; none if `position` is invalid."""
        everywhere = range(self.final_length)
        if position is None:
            return everywhere
        if isinstance(position, int):
            first = position + self.length if position < 0 else position
            return range(first, first + 1) if first in everywhere else range(0)
        try:
            start = self._from_prompt(position.start)
            stop = self._from_prompt(position.stop)
            covered = everywhere[start : stop : position.step]
        except (AttributeError, TypeError, ValueError):
            return range(0)
        return covered if covered.step > 0 else range(0)

    def _from_prompt(self, bound: int | None) -> int | None:
        # Negative bounds count from the end of the prompt, not of its continuation.
        if bound is None or bound >= 0:
            return bound
        return bound + self.length - self.final_length
