"""Interventions on features: set, scale or ablate them while the model runs, and generate text meanwhile.

A feature's change, times its decoder rows, is added to the outputs of the MLPs it writes to. How far the change may spread is chosen: attention
patterns can be frozen, and MLPs of chosen layers held at what they wrote without the intervention. With attention, all MLPs and the divisors of
norms frozen only the direct effects are left, which are the columns of an attribution graph's adjacency.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from numbers import Real

import torch
from jaxtyping import Float, Int
from torch import Tensor

from circuits.attribution.local_model import check_transcoders, padded, read_by_features, wide
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


@dataclass(frozen=True)
class Intervention:
    """One feature's activation set to a value, or multiplied.

    Attributes:
        layer, index: which feature.
        position: where: a position, a slice of them (open at the end, it goes on while text is generated), or None: everywhere. Negative ones count
            from the end of the prompt, also while text is generated.
        value: what it is set to; or
        factor: what it is multiplied by: 0 ablates.
    """

    layer: int
    index: int
    position: int | slice | None = None
    value: float | None = None
    factor: float | None = None

    def __post_init__(self) -> None:
        if (self.value is None) == (self.factor is None):
            raise InputError(
                f"an intervention on f{self.layer}.{self.index} has either a value or a factor; give one of them."
            )
        given = self.factor if self.value is None else self.value
        if not isinstance(given, Real) or not math.isfinite(given):
            raise InputError(
                f"f{self.layer}.{self.index} cannot be set to or multiplied by {given!r}; give a finite number."
            )

    @staticmethod
    def set(feature: Feature | str, value: float) -> Intervention:
        """Set a feature, at its position or (without one) everywhere."""
        return Intervention(*_place(feature), value=value)

    @staticmethod
    def scale(feature: Feature | str, factor: float) -> Intervention:
        """Multiply a feature."""
        return Intervention(*_place(feature), factor=factor)

    @staticmethod
    def ablate(feature: Feature | str) -> Intervention:
        """Switch a feature off."""
        return Intervention.scale(feature, 0.0)


@dataclass(frozen=True, eq=False)
class Intervened:
    """What a run under interventions gave, a row per variant.

    Attributes:
        logits: at each position.
        preactivations: of every feature, by layer.
        activations: likewise, as they were before the intervention of their own layer.
    """

    logits: Float[Tensor, "variant pos vocab"]
    preactivations: Sequence[Float[Tensor, "variant pos feature"]]
    activations: Sequence[Float[Tensor, "variant pos feature"]]


def intervene(
    model: Model,
    transcoders: Transcoders,
    prompt: str | Sequence[int] | Int[Tensor, " pos"],
    variants: Sequence[Sequence[Intervention]],
    *,
    freeze_attention: bool = True,
    frozen_layers: Sequence[int] = (),
    freeze_norms: bool = False,
    leading: int = 1,
) -> Intervened:
    """Run a prompt under several sets of interventions, a variant each.

    Args:
        prompt: text, or token ids as they are.
        variants: the interventions of each run; none of them is the model itself. Of two on one feature the later holds.
        freeze_attention: attention patterns stay what they are without interventions.
        frozen_layers: in these layers MLPs write what they write without interventions, and what is intervened; elsewhere they see the change.
            Features write their change only into these layers, where any are given.
        freeze_norms: what norms divide by stays too. With attention, norms and every layer frozen, what is left are direct effects.
        leading: at so many first positions there are no features.

    Raises:
        InputError: the transcoders do not fit the model, the prompt cannot be used, or an intervention names what is not there.
    """
    check_transcoders(model, transcoders)
    _check_leading(leading)
    tokens = prompt_tokens(model, prompt)
    if not isinstance(variants, Sequence) or not all(
        isinstance(variant, Sequence) and not isinstance(variant, str) for variant in variants
    ):
        raise InputError(
            "variants is a list with a list of interventions for each run; for one run, give [[intervention, ...]]."
        )
    placed = [
        [_placed(change, transcoders, len(tokens), len(tokens), leading) for change in variant]
        for variant in variants
    ]
    if isinstance(frozen_layers, int | str):
        raise InputError(
            f"frozen_layers={frozen_layers!r}: give a list of layers, such as [0, 1] or range(model.cfg.n_layers)."
        )
    if wrong := [layer for layer in frozen_layers if layer not in range(transcoders.n_layers)]:
        raise InputError(
            f"frozen_layers holds {wrong[0]!r}, and the model has layers 0 to {transcoders.n_layers - 1}."
        )
    return _intervened(
        model, transcoders, tokens, placed, freeze_attention, frozen_layers, freeze_norms, leading
    )


def _intervened(
    model: Model,
    transcoders: Transcoders,
    tokens: Int[Tensor, " pos"],
    variants: Sequence[Sequence[Intervention]],
    freeze_attention: bool,
    frozen_layers: Sequence[int] = (),
    freeze_norms: bool = False,
    leading: int = 1,
) -> Intervened:
    """`intervene` with what has been checked; positions are slices, which may reach beyond the text."""
    rows, mask = padded(model, [tokens] * max(1, len(variants)))
    run = _Run(model, transcoders, variants, set(frozen_layers), leading)
    with frozen(model), plain_inputs(model), torch.no_grad():
        before = run.record(rows[:1], mask[:1], freeze_attention, freeze_norms)
        with hooked(model, run.hooks(before)):
            residual = run_to_residual(model, rows, mask)
            # One row of positions after another, as the last norm's frozen divisors are.
            logits = torch.stack([unembed(model, one) for one in residual])
    return Intervened(logits, run.preactivations, run.activations)


def direct_effects(
    model: Model,
    transcoders: Transcoders,
    prompt: str | Sequence[int] | Int[Tensor, " pos"],
    variants: Sequence[Sequence[Intervention]],
    *,
    leading: int = 1,
) -> Intervened:
    """`intervene` with attention, norms and all MLPs frozen: what an attribution graph's edges predict.

    Raises:
        InputError: see `intervene`.
    """
    check_transcoders(model, transcoders)
    layers = range(transcoders.n_layers)
    return intervene(
        model,
        transcoders,
        prompt,
        variants,
        frozen_layers=layers,
        freeze_norms=True,
        leading=leading,
    )


def generate(
    model: Model,
    transcoders: Transcoders,
    prompt: str | Sequence[int] | Int[Tensor, " pos"],
    interventions: Sequence[Intervention],
    *,
    new_tokens: int = 20,
    temperature: float = 0.0,
    seed: int = 0,
    leading: int = 1,
) -> Int[Tensor, " pos"]:
    """Continue a prompt under interventions, which act on the tokens that come too where their position is open. Nothing is frozen.

    Args:
        new_tokens: how many, fewer where the context ends.
        temperature: 0 takes the most probable token each time.
        seed: of the draws, when the temperature is positive.
        leading: see `intervene`.

    Raises:
        InputError: see `intervene`.
    """
    tokens, generator = prompt_tokens(model, prompt), torch.Generator().manual_seed(seed)
    check_transcoders(model, transcoders)
    _check_leading(leading)
    padded(model, [tokens])
    if not isinstance(new_tokens, int) or new_tokens < 0:
        raise InputError(f"new_tokens={new_tokens!r}: give a whole number, 0 or more.")
    if not 0 <= temperature < math.inf:
        raise InputError(
            f"temperature={temperature}: give 0 for the most probable token each time, or more."
        )
    if not isinstance(interventions, Sequence):
        raise InputError("interventions is a list of them; for a single one, give [intervention].")
    reach = min(len(tokens) + new_tokens, model.cfg.n_ctx)
    placed = [_placed(change, transcoders, len(tokens), reach, leading) for change in interventions]
    for _ in range(reach - len(tokens)):
        logits = (
            _intervened(
                model, transcoders, tokens, [placed], freeze_attention=False, leading=leading
            )
            .logits[0, -1]
            .float()
            .cpu()
        )
        if temperature > 0:
            following = torch.multinomial(
                (logits / temperature).softmax(-1), 1, generator=generator
            )
        else:
            following = logits.argmax()[None]
        tokens = torch.cat([tokens, following])
    return tokens


@dataclass(frozen=True, eq=False)
class _Run:
    """The hooks of one run under interventions, and what they saw."""

    model: Model
    transcoders: Transcoders
    variants: Sequence[Sequence[Intervention]]
    frozen_layers: set[int]
    leading: int
    preactivations: list[Tensor] = field(default_factory=list)
    activations: list[Tensor] = field(default_factory=list)
    changes: dict[int, Tensor] = field(default_factory=dict)
    inputs: dict[int, Tensor] = field(default_factory=dict)

    def record(
        self, tokens: Tensor, mask: Tensor, attention: bool, norms: bool
    ) -> dict[str, Tensor]:
        """What is to be frozen, from a run without interventions."""
        names = [
            name
            for layer in range(self.transcoders.n_layers)
            for name in (self._reads(layer), self._writes(layer))
        ]
        names += (
            [pattern_hook(layer) for layer in range(self.transcoders.n_layers)] if attention else []
        )
        names += list(scale_hooks(self.model).values()) if norms else []
        before: dict[str, Tensor] = {}
        residual = run_to_residual(
            self.model, tokens, mask, [(name, keeper(before, name)) for name in names]
        )
        if norms and self.model.cfg.normalization_type is not None:
            with hooked(self.model, [(FINAL_SCALE, keeper(before, FINAL_SCALE))]):
                unembed(self.model, residual[0])
        return before

    def hooks(self, before: dict[str, Tensor]) -> list[tuple[str, Hook]]:
        """Freeze what was recorded, and intervene."""
        ours = {
            name
            for layer in range(self.transcoders.n_layers)
            for name in (self._reads(layer), self._writes(layer))
        }
        held: list[tuple[str, Hook]] = [
            (name, _holding(value)) for name, value in before.items() if name not in ours
        ]
        for layer in range(self.transcoders.n_layers):
            held.append((self._reads(layer), self._reader(layer, before)))
            held.append((self._writes(layer), self._writer(layer, before)))
        return held

    def _reads(self, layer: int) -> str:
        return mlp_residual_hook(self.model, layer)

    def _writes(self, layer: int) -> str:
        return mlp_output_hook(self.model, layer, before_norm=self.transcoders.writes == "mlp")

    def _reader(self, layer: int, before: dict[str, Tensor]) -> Hook:
        def read(residual: Float[Tensor, "variant pos d_model"]) -> None:
            inputs = self._inputs(layer, residual, before)
            pre = self.transcoders.preactivations(layer, inputs)
            activations = self.transcoders.encoders[layer].activation(pre)
            activations[:, : self.leading] = 0
            self.inputs[layer] = inputs
            self.preactivations.append(pre)
            self.activations.append(activations)
            current = activations
            if layer in self.frozen_layers:
                was = self._inputs(layer, before[self._reads(layer)], before)
                current = self.transcoders.encode(layer, was).expand_as(activations).clone()
                current[:, : self.leading] = 0
            self.changes[layer] = self._change(layer, current)

        return read

    def _inputs(
        self, layer: int, residual: Float[Tensor, "variant pos d_model"], before: dict[str, Tensor]
    ) -> Tensor:
        """What features read, through the norm's frozen divisor where it is frozen."""
        parts, name = ModelWeights(self.model), scale_hooks(self.model).get((layer, "ln2"), "")
        normalized = parts.normalized(layer, residual)
        scale = before.get(name, None if normalized is None else normalized[1])
        return read_by_features(
            self.transcoders, parts.linear_norm(layer, "ln2", scale), residual.to(wide(self.model))
        )[1]

    def _change(
        self, layer: int, current: Float[Tensor, "variant pos feature"]
    ) -> Float[Tensor, "variant pos feature"]:
        change = torch.zeros_like(current)
        for row, interventions in enumerate(self.variants):
            for one in interventions:
                if one.layer == layer:
                    where = one.position
                    now = current[row, where, one.index]
                    if one.value is not None:
                        wanted = torch.full_like(now, one.value)
                    else:
                        wanted = now * one.factor  # type: ignore[operator]
                    change[row, where, one.index] = wanted - now
        change[:, : self.leading] = 0
        return change

    def _writer(self, layer: int, before: dict[str, Tensor]) -> Hook:
        def write(output: Float[Tensor, "variant pos d_model"]) -> Tensor:
            if layer in self.frozen_layers:
                was = self._inputs(layer, before[self._reads(layer)], before)
                # The skip is part of the linear map, so it goes on seeing changes.
                skipped = self.transcoders.skip(layer, self.inputs[layer] - was)
                output = before[self._writes(layer)] + skipped.to(output)
            if self.frozen_layers and layer not in self.frozen_layers:
                return output
            return output + self.transcoders.decode(self.changes, layer).to(output)

        return write


def _holding(value: Tensor) -> Hook:
    def hold(activation: Tensor) -> Tensor:
        return value.expand_as(activation)

    return hold


def _place(feature: Feature | str) -> tuple[int, int, int | None]:
    node = parse_node(feature) if isinstance(feature, str) else feature
    if not isinstance(node, Feature) or isinstance(node.position, str):
        raise InputError(
            f"{feature} is no feature at a position; write f2.1204@5, or f2.1204 for every position."
        )
    return node.layer, node.index, node.position


def _placed(
    change: Intervention, transcoders: Transcoders, length: int, reach: int, leading: int
) -> Intervention:
    """An intervention that has been checked, its position a slice from the start of the prompt.

    Args:
        length: of the prompt.
        reach: the length that it may grow to.
    """
    if not isinstance(change, Intervention):
        raise InputError(
            f"{change!r} is no intervention; make one of a feature, such as circuits.Intervention.ablate({str(change)!r})."
        )
    name = f"f{change.layer}.{change.index}"
    if change.layer not in range(transcoders.n_layers) or change.index not in range(
        transcoders.n_features
    ):
        raise InputError(
            f"there is no feature {name}: {transcoders.name!r} has {transcoders.n_layers} layers of {transcoders.n_features} features."
        )
    where = _slice(change.position, length)
    covered = range(reach)[where] if where is not None else range(0)
    if where is None or not len(covered):
        raise InputError(
            f"{name} is to be changed at position {change.position!r} of a prompt of {length} tokens, which it does not have."
        )
    if covered[-1] < leading:
        raise InputError(
            f"{name} is to be changed at position {change.position!r}, and the first {leading} have no features; see leading."
        )
    return replace(change, position=where)


def _check_leading(leading: int) -> None:
    if not isinstance(leading, int) or leading < 0:
        raise InputError(f"leading={leading!r}: give a whole number, 0 or more.")


def _slice(position: int | slice | None, length: int) -> slice | None:
    """A position, or some, counted from the start of a prompt of that length; None where it is none."""
    if position is None:
        return slice(None)
    if isinstance(position, slice):
        parts = (position.start, position.stop, position.step)
        if not all(part is None or isinstance(part, int) for part in parts) or (
            position.step is not None and position.step < 1
        ):
            return None
        start, stop = (
            part if part is None or part >= 0 else max(0, part + length)
            for part in (position.start, position.stop)
        )
        return slice(start, stop, position.step)
    if not isinstance(position, int) or position < -length:
        return None
    start = position % length if position < 0 else position
    return slice(start, start + 1)
