"""Rules for the backward pass: what gradients become on their way through nonlinear parts.

A rule changes the backward pass only; the forward pass stays the model's. With them, gradient times
difference becomes a relevance method, as in RelP (Jafari et al. 2025,
https://arxiv.org/abs/2508.21258).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from circuits.models.hook_points import FINAL_SCALE, pattern_hook, scale_hooks
from circuits.models.hooked_run import Hook
from circuits.models.loading import Model

SMALLEST_INPUT = 1e-9


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

    def hooks(self, model: Model) -> list[tuple[str, Hook]]:
        """Hooks that apply the rules in the backward pass of a run that they are part of."""
        hooks: list[tuple[str, Hook]] = []
        if self.norms == "constant" and model.cfg.normalization_type is not None:
            names = [*scale_hooks(model).values(), FINAL_SCALE]
            hooks += [(name, torch.Tensor.detach) for name in names]
        if self.attention == "constant":
            names = [pattern_hook(layer) for layer in range(model.cfg.n_layers)]
            hooks += [(name, torch.Tensor.detach) for name in names]
        if not model.cfg.attn_only:
            for layer in range(model.cfg.n_layers):
                hooks += self._mlp_hooks(model, layer)
        return hooks

    def _mlp_hooks(self, model: Model, layer: int) -> list[tuple[str, Hook]]:
        """Hooks on one MLP: post = f(pre), or post = f(pre) * linear if it is gated."""
        mlp, gated = f"blocks.{layer}.mlp", model.cfg.gated_mlp
        inputs: dict[str, Tensor] = {}

        def keep(name: str) -> Hook:
            def keep_input(value: Tensor) -> None:
                inputs[name] = value

            return keep_input

        def replace_backward(post: Tensor) -> Tensor:
            pre = inputs["pre"]
            safe = torch.where(pre.abs() < SMALLEST_INPUT, SMALLEST_INPUT, pre)
            if not gated:
                # d post / d pre = f(pre) / pre
                return post if self.activations == "derivative" else safe * (post / safe).detach()
            activated: Tensor = model.blocks[layer].mlp.act_fn(pre)
            if self.activations == "ratio":
                activated = safe * (activated / safe).detach()
            product = activated * inputs["linear"]
            if self.gates == "half":
                # The gradient of a product reaches both factors; half of each keeps the sum.
                product = 0.5 * product + 0.5 * product.detach()
            # The value stays the model's own, bias included.
            return post.detach() + product - product.detach()

        if self.activations == "derivative" and not (gated and self.gates == "half"):
            return []
        names = {
            "pre": f"{mlp}.hook_pre",
            **({"linear": f"{mlp}.hook_pre_linear"} if gated else {}),
        }
        kept = [(point, keep(name)) for name, point in names.items()]
        return [*kept, (f"{mlp}.hook_post", replace_backward)]
