"""Rules for the backward pass: what gradients become on their way through nonlinear parts.

A rule changes the backward pass only; the forward pass stays the model's. With them, gradient times
difference becomes a relevance method, as in RelP (Jafari et al. 2025,
https://arxiv.org/abs/2508.21258).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
from torch import Tensor

from circuits.models.backend import Hook, Model, shape_of
from circuits.models.hook_points import FINAL_SCALE, pattern_hook, scale_hooks

SMALLEST_INPUT = 1e-9
Hooks = list[tuple[str, Hook]]


@dataclass(frozen=True)
class PropagationRules:
    """How gradients pass through each nonlinear part of a model.

    Attributes:
        norms: "constant" treats the number that a norm divides by as a constant.
        attention: "constant" treats attention patterns as constants.
        activations: "ratio" replaces the derivative of f at x by f(x) / x.
        gates: "half" gives each factor of a gated MLP's product half of its gradient.

    >>> PropagationRules(norms="constant").attention
    'derivative'
    """

    norms: Literal["derivative", "constant"] = "derivative"
    attention: Literal["derivative", "constant"] = "derivative"
    activations: Literal["derivative", "ratio"] = "derivative"
    gates: Literal["derivative", "half"] = "derivative"

    def hooks(self, model: Model) -> Hooks:
        """Hooks that apply the rules in the backward pass of a run that they are part of."""
        cfg, constant = shape_of(model), list[str]()
        if self.norms == "constant" and cfg.has_norms:
            constant += [*scale_hooks(model).values(), FINAL_SCALE]
        if self.attention == "constant":
            constant += map(pattern_hook, range(cfg.n_layers))
        hooks: Hooks = [(name, torch.Tensor.detach) for name in constant]
        if not cfg.attn_only:
            for layer in range(cfg.n_layers):
                hooks += self._mlp_hooks(model, layer)
        return hooks

    def _mlp_hooks(self, model: Model, layer: int) -> Hooks:
        """Hooks on one MLP: post = f(pre), or post = f(pre) * linear if it is gated."""
        mlp, gated = f"blocks.{layer}.mlp", shape_of(model).gated_mlp
        if self.activations == "derivative" and not (gated and self.gates == "half"):
            return []
        inputs: dict[str, Tensor] = {}

        def post_with_rules(post: Tensor) -> Tensor:
            pre = inputs["hook_pre"]
            value: Tensor = model.blocks[layer].mlp.act_fn(pre) if gated else post
            if self.activations == "ratio":
                # d f / d pre = f(pre) / pre, with |pre| clamped to avoid 0 / 0
                is_small = pre.abs() < SMALLEST_INPUT
                safe = torch.where(is_small, SMALLEST_INPUT, pre)
                value = safe * (value / safe).detach()
            if gated:
                value = value * inputs["hook_pre_linear"]
                if self.gates == "half":
                    # The gradient of a product reaches both factors; halving both keeps the sum.
                    value = 0.5 * value + 0.5 * value.detach()
            # The value stays the model's own, bias included.
            return post.detach() + value - value.detach()

        hooks: Hooks = [(f"{mlp}.hook_post", post_with_rules)]
        points = ["hook_pre", "hook_pre_linear"] if gated else ["hook_pre"]
        for point in points:
            record_input = partial(inputs.__setitem__, point)
            hooks.append((f"{mlp}.{point}", record_input))
        return hooks
