"""Interventions on features: set, scale or ablate them while the model runs or generates text.

The change of a feature's activation, times its decoder rows, is added to the outputs of the MLPs
that it writes to. Attention patterns, norm scales, and the MLPs of chosen layers can be frozen at
their clean values, those of a run without interventions. With all of them frozen only direct
effects remain: the columns of an attribution graph's adjacency matrix.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence, Set
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import chain
from numbers import Real

import torch
from jaxtyping import Float, Int
from torch import Tensor

from circuits.attribution.local_model import (
    check_transcoders,
    compute_dtype,
    pad_prompts,
    read_by_features,
)
from circuits.graph.nodes import Feature, parse_node
from circuits.models import (
    FINAL_SCALE,
    Hook,
    Model,
    ModelWeights,
    frozen,
    hooked,
    mlp_output_hook,
    mlp_residual_hook,
    pattern_hook,
    plain_inputs,
    run_to_residual,
    scale_hooks,
    unembed,
)
from circuits.models.source_outputs import keeper
from circuits.system.errors import InputError
from circuits.tasks.tokenization import prompt_tokens
from circuits.transcoders.transcoder import Transcoders

Prompt = str | Sequence[int] | Int[Tensor, " pos"]
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
        position: a position, a slice of positions, or None for all. Negative ones count from the
            end of the prompt. A slice without an end also covers generated tokens.
        value, factor: the new activation, or what it is multiplied by; the other one is None.

    Raises:
        InputError: not exactly one of `value` and `factor` is given, or it is not finite.
    """

    layer: int
    index: int
    position: int | slice | None = None
    value: float | None = None
    factor: float | None = None

    def __post_init__(self) -> None:
        name = f"f{self.layer}.{self.index}"
        given = [number for number in (self.value, self.factor) if number is not None]
        if len(given) != 1:
            raise InputError(
                f"an intervention on {name} has either a value or a factor; give one of them."
            )
        if not isinstance(given[0], Real) or not math.isfinite(given[0]):
            raise InputError(
                f"{name} cannot be set to or multiplied by {given[0]!r}; give a finite number."
            )

    @staticmethod
    def set(feature: Feature | str, value: float) -> Intervention:
        """Set a feature, at its position or, without one, at all positions."""
        return Intervention(*_layer_index_position(feature), value=value)

    @staticmethod
    def scale(feature: Feature | str, factor: float) -> Intervention:
        """Multiply a feature."""
        return Intervention(*_layer_index_position(feature), factor=factor)

    @staticmethod
    def ablate(feature: Feature | str) -> Intervention:
        """Set a feature to zero."""
        return Intervention.scale(feature, 0.0)

    def applied(self, activation: Float[Tensor, " pos"]) -> Float[Tensor, " pos"]:
        """Return the feature's new activation."""
        if self.factor is not None:
            return activation * self.factor
        assert self.value is not None
        return torch.full_like(activation, self.value)


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


def intervene(
    model: Model,
    transcoders: Transcoders,
    prompt: Prompt,
    variants: Sequence[Sequence[Intervention]],
    *,
    freeze_attention: bool = True,
    frozen_layers: Sequence[int] = (),
    freeze_norms: bool = False,
    leading: int = 1,
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

    Raises:
        InputError: the transcoders do not fit the model, the prompt cannot be used, or an
            intervention or frozen layer does not exist.
    """
    tokens = _checked_prompt(model, transcoders, prompt, leading)
    if not _is_list(variants) or not all(map(_is_list, variants)):
        raise InputError(
            "variants must be a list with a list of interventions for each run; "
            "for one run, give [[intervention, ...]]."
        )
    if isinstance(frozen_layers, int | str):
        raise InputError(f"frozen_layers={frozen_layers!r}: give a list of layers, such as [0, 1].")
    layers = range(transcoders.n_layers)
    for layer in frozen_layers:
        if layer not in layers:
            raise InputError(
                f"frozen_layers holds {layer!r}, and the model has layers 0 to {layers[-1]}."
            )
    span = _PromptSpan(len(tokens), len(tokens), leading)
    located = [[span.located(one, transcoders) for one in variant] for variant in variants]
    held = [pattern_hook(layer) for layer in layers] if freeze_attention else []
    if freeze_norms and model.cfg.normalization_type is not None:
        held += [*scale_hooks(model).values(), FINAL_SCALE]
    run = _InterventionRun(model, transcoders, located, leading, set(frozen_layers))
    return run.execute(tokens, held)


def direct_effects(
    model: Model,
    transcoders: Transcoders,
    prompt: Prompt,
    variants: Sequence[Sequence[Intervention]],
    *,
    leading: int = 1,
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
        prompt, variants, leading: see `intervene`.

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
    )


def generate(
    model: Model,
    transcoders: Transcoders,
    prompt: Prompt,
    interventions: Sequence[Intervention],
    *,
    new_tokens: int = 20,
    temperature: float = 0.0,
    seed: int = 0,
    leading: int = 1,
) -> Int[Tensor, " pos"]:
    """Continue a prompt under interventions, with nothing frozen, and return all token ids.

    Interventions at all positions, or in a slice without an end, also act on generated tokens.

    >>> import circuits
    >>> model = circuits.load_model("toy-world")
    >>> transcoders = circuits.load_transcoders("toy-world-clt")
    >>> tokens = circuits.generate(model, transcoders, "The capital of Texas is", [], new_tokens=1)
    >>> model.to_string(tokens)
    '<bos> The capital of Texas is Austin'

    Args:
        prompt, leading: see `intervene`.
        new_tokens: how many tokens to add; fewer if the context ends.
        temperature: 0 takes the most probable token each time.
        seed: seeds the sampling if the temperature is positive.

    Raises:
        InputError: see `intervene`; or `new_tokens` or `temperature` is negative.
    """
    tokens = _checked_prompt(model, transcoders, prompt, leading)
    if not isinstance(new_tokens, int) or new_tokens < 0:
        raise InputError(f"new_tokens={new_tokens!r}: give a whole number, 0 or more.")
    if not 0 <= temperature < math.inf:
        raise InputError(
            f"temperature={temperature}: give 0 for the most probable token each time, or more."
        )
    if not _is_list(interventions):
        raise InputError("interventions must be a list; for a single one, give [intervention].")
    final_length = min(len(tokens) + new_tokens, model.cfg.n_ctx)
    span = _PromptSpan(len(tokens), final_length, leading)
    located = [span.located(one, transcoders) for one in interventions]
    generator = torch.Generator().manual_seed(seed)
    while len(tokens) < final_length:
        run = _InterventionRun(model, transcoders, [located], leading)
        logits = run.execute(tokens).logits[0, -1].float().cpu()
        tokens = torch.cat([tokens, _next_token(logits, temperature, generator)])
    return tokens


def _next_token(
    logits: Float[Tensor, " vocab"], temperature: float, generator: torch.Generator
) -> Int[Tensor, "1"]:
    if temperature == 0:
        return logits.argmax()[None]
    probabilities = (logits / temperature).softmax(-1)
    return torch.multinomial(probabilities, 1, generator=generator)


@dataclass(frozen=True, eq=False)
class _InterventionRun:
    """One run of a prompt under interventions: the hooks on its MLPs and what they record.

    Attributes:
        variants: interventions whose positions are slices; these may reach beyond the prompt.
        clean: clean activations of what is frozen, by hook point.
        changes: by layer, the change of each feature's activation.
        input_changes: by frozen layer, the change of what its features read.
    """

    model: Model
    transcoders: Transcoders
    variants: Sequence[Sequence[Intervention]]
    leading: int
    frozen_layers: Set[int] = frozenset()
    clean: dict[str, Tensor] = field(default_factory=dict)
    preactivations: list[FeatureValues] = field(default_factory=list)
    activations: list[FeatureValues] = field(default_factory=list)
    changes: dict[int, FeatureValues] = field(default_factory=dict)
    input_changes: dict[int, Residual] = field(default_factory=dict)

    def execute(self, tokens: Int[Tensor, " pos"], held: Sequence[str] = ()) -> Intervened:
        """Run all variants, with the activations at the hook points `held` at clean values."""
        model, n_variants = self.model, max(1, len(self.variants))
        rows, mask = pad_prompts(model, [tokens] * n_variants)
        mlp_hooks = chain(*map(self._mlp_hooks, self.frozen_layers))
        with frozen(model), plain_inputs(model), torch.no_grad():
            self._record_clean(tokens, [*held, *mlp_hooks])
            with hooked(model, list(self._hooks(held))):
                residual = run_to_residual(model, rows, mask)
                # Row by row, because a frozen scale of the final norm is that of one row.
                logits = [unembed(model, row) for row in residual]
        return Intervened(torch.stack(logits), self.preactivations, self.activations)

    def _record_clean(self, tokens: Int[Tensor, " pos"], names: Sequence[str]) -> None:
        if not names:
            return
        rows, mask = pad_prompts(self.model, [tokens])
        with hooked(self.model, [(name, keeper(self.clean, name)) for name in names]):
            residual = run_to_residual(self.model, rows, mask)
            if FINAL_SCALE in names:
                unembed(self.model, residual[0])

    def _hooks(self, held: Sequence[str]) -> Iterable[tuple[str, Hook]]:
        for name in held:
            yield name, partial(_replace_by, self.clean[name])
        for layer in range(self.transcoders.n_layers):
            mlp_input, mlp_output = self._mlp_hooks(layer)
            yield mlp_input, partial(self._read, layer)
            yield mlp_output, partial(self._write, layer)

    def _mlp_hooks(self, layer: int) -> tuple[str, str]:
        before_norm = self.transcoders.writes == "mlp"
        output = mlp_output_hook(self.model, layer, before_norm=before_norm)
        return mlp_residual_hook(self.model, layer), output

    def _read(self, layer: int, residual: Residual) -> None:
        """Record what the layer's features compute, and how the interventions change it."""
        inputs = self._feature_inputs(layer, residual)
        preactivations, activations = self._fire(layer, inputs)
        self.preactivations.append(preactivations)
        self.activations.append(activations)
        if layer in self.frozen_layers:
            mlp_input, _ = self._mlp_hooks(layer)
            clean_inputs = self._feature_inputs(layer, self.clean[mlp_input])
            self.input_changes[layer] = inputs - clean_inputs
            # Features of a frozen layer keep their clean activations: no intervention of an
            # earlier layer is seen, so direct effects of several features add up.
            _, clean_activations = self._fire(layer, clean_inputs)
            activations = clean_activations.expand_as(activations)
        self.changes[layer] = self._change(layer, activations)

    def _write(self, layer: int, output: Residual) -> Residual:
        """Add the changes of all features that write to the layer's MLP output."""
        if layer in self.frozen_layers:
            _, mlp_output = self._mlp_hooks(layer)
            # The skip is part of the linear map, so it passes on changes of its input.
            skip = self.transcoders.skip(layer, self.input_changes[layer])
            output = self.clean[mlp_output] + skip.to(output)
        elif self.frozen_layers:
            return output
        # output of MLP l += sum over features s that write to it of (change of a_s) W_dec[s, l]
        change = self.transcoders.decode(self.changes, layer)
        return output + change.to(output)

    def _feature_inputs(self, layer: int, residual: Residual) -> Residual:
        """Return what features read, through the norm with its frozen or its current scale."""
        weights = ModelWeights(self.model)
        scale = self.clean.get(scale_hooks(self.model).get((layer, "ln2"), ""))
        if scale is None:
            _, scale = weights.normalized(layer, residual) or (None, None)
        norm = weights.linear_norm(layer, "ln2", scale)
        residual = residual.to(compute_dtype(self.model))
        return read_by_features(self.transcoders, norm, residual)[1]

    def _fire(self, layer: int, inputs: Residual) -> tuple[FeatureValues, FeatureValues]:
        """Return pre-activations and activations."""
        preactivations = self.transcoders.preactivations(layer, inputs)
        activations = self.transcoders.encoders[layer].activation(preactivations)
        activations[:, : self.leading] = 0
        return preactivations, activations

    def _change(self, layer: int, activations: FeatureValues) -> FeatureValues:
        change = torch.zeros_like(activations)
        for row, interventions in enumerate(self.variants):
            for one in interventions:
                if one.layer == layer:
                    place = (row, one.position, one.index)
                    # change of a_s = (value or factor a_s) - a_s
                    change[place] = one.applied(activations[place]) - activations[place]
        change[:, : self.leading] = 0
        return change


def _replace_by(value: Tensor, activation: Tensor) -> Tensor:
    return value.expand_as(activation)


def _is_list(value: object) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, str)


def _checked_prompt(
    model: Model, transcoders: Transcoders, prompt: Prompt, leading: int
) -> Int[Tensor, " pos"]:
    check_transcoders(model, transcoders)
    if not isinstance(leading, int) or leading < 0:
        raise InputError(f"leading={leading!r}: give a whole number, 0 or more.")
    tokens = prompt_tokens(model, prompt)
    pad_prompts(model, [tokens])  # refuses prompts that are empty or too long
    return tokens


@dataclass(frozen=True)
class _PromptSpan:
    """The lengths of a prompt without and with its continuation; where features begin."""

    length: int
    final_length: int
    leading: int

    def located(self, change: Intervention, transcoders: Transcoders) -> Intervention:
        """Check an intervention and make its position a slice from the start of the prompt."""
        if not isinstance(change, Intervention):
            raise InputError(
                f"{change!r} is no intervention; make one of a feature, "
                f"such as circuits.Intervention.ablate({str(change)!r})."
            )
        name = f"f{change.layer}.{change.index}"
        n_layers, n_features = transcoders.n_layers, transcoders.n_features
        if change.layer not in range(n_layers) or change.index not in range(n_features):
            raise InputError(
                f"there is no feature {name}: {transcoders.name!r} has {n_layers} layers "
                f"of {n_features} features."
            )
        where = f"{name} cannot be changed at position {change.position!r}"
        positions = self._from_start(change.position)
        covered = range(self.final_length)[positions]
        if not covered:
            raise InputError(
                f"{where} of a prompt of {self.length} tokens; choose an existing position."
            )
        if covered[-1] < self.leading:
            raise InputError(
                f"{where}: the first {self.leading} positions have no features; see leading."
            )
        return replace(change, position=positions)

    def _from_start(self, position: int | slice | None) -> slice:
        """Return the positions as a slice without negative bounds; empty if they are invalid."""
        if position is None:
            return slice(None)
        if isinstance(position, int):
            first = position + self.length if position < 0 else position
            return slice(first, first + 1) if first >= 0 else slice(0)
        if not isinstance(position, slice):
            return slice(0)
        parts = (position.start, position.stop, position.step)
        whole = all(isinstance(part, int | None) for part in parts)
        if not whole or (position.step is not None and position.step < 1):
            return slice(0)
        start = self._not_negative(position.start)
        return slice(start, self._not_negative(position.stop), position.step)

    def _not_negative(self, bound: int | None) -> int | None:
        return bound if bound is None or bound >= 0 else max(0, bound + self.length)
