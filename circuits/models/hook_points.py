"""The hook points of TransformerLens: where nodes write and read, and where runs are observed."""

from __future__ import annotations

from itertools import product

from circuits.graph.edges import SLOTS
from circuits.graph.nodes import MLP, Embed, Head, Logits, Node, PosEmbed, TokenEmbed
from circuits.models.backend import Model, shape_of

NORMS = ("ln1", "ln1_post", "ln2", "ln2_post")
"""The norms of a block: before and after attention, before and after the MLP."""

FINAL_SCALE = "ln_final.hook_scale"
"""What the final norm divides by."""


def output_hook(node: Node) -> str:
    """Return where the output of a source can be read: a head writes z W_O, and its z is read."""
    match node:
        case TokenEmbed():
            return "hook_embed"
        case PosEmbed():
            return "hook_pos_embed"
        case Embed():
            return residual_hook(0)
        case Head(layer=layer):
            return f"blocks.{layer}.attn.hook_z"
        case MLP(layer=layer):
            return f"blocks.{layer}.hook_mlp_out"
    raise TypeError(f"{node} writes nothing to the residual stream.")


def input_hook(model: Model, node: Node, slot: str | None) -> str:
    """Return where the input of a target can be changed; inside `separate_inputs` only."""
    match node:
        case Head(layer=layer) if slot in SLOTS:
            return f"blocks.{layer}.hook_{slot}_input"
        case MLP(layer=layer):
            return f"blocks.{layer}.hook_mlp_in"
        case Logits():
            return f"blocks.{shape_of(model).n_layers - 1}.hook_resid_post"
    raise TypeError(f"{node} reads nothing in slot {slot}.")


def attention_output_hook(layer: int) -> str:
    """Return where the sum of what a layer's heads and b_O write can be read."""
    return f"blocks.{layer}.hook_attn_out"


def residual_hook(layer: int) -> str:
    """Return where the residual stream enters a layer."""
    return f"blocks.{layer}.hook_resid_pre"


def projection_hook(layer: int, slot: str) -> str:
    """Return where a layer's q, k or v can be read per head, before per-head norms and rotation."""
    return f"blocks.{layer}.attn.hook_{slot}"


def pattern_hook(layer: int) -> str:
    """Return where the attention pattern of a layer's heads can be read."""
    return f"blocks.{layer}.attn.hook_pattern"


def mlp_residual_hook(model: Model, layer: int) -> str:
    """Return where the residual stream that an MLP reads can be read, before the MLP's norm."""
    # In a parallel block the MLP reads what the heads read.
    point = "hook_resid_pre" if shape_of(model).parallel_attn_mlp else "hook_resid_mid"
    return f"blocks.{layer}.{point}"


def mlp_output_hook(model: Model, layer: int, *, before_norm: bool = False) -> str:
    """Return where an MLP's output can be read, optionally before a norm that follows the MLP."""
    # The module itself is the last point before such a norm.
    inside = before_norm and shape_of(model).has_norms_after
    return f"blocks.{layer}.mlp" if inside else f"blocks.{layer}.hook_mlp_out"


def scale_hooks(model: Model) -> dict[tuple[int, str], str]:
    """Return where the divisor of each norm of each block can be read, by layer and norm."""
    # The divisor of the final norm is at `FINAL_SCALE`.
    cfg = shape_of(model)
    if not cfg.has_norms:
        return {}
    names = ["ln1"] if cfg.attn_only else ["ln1", "ln2"]
    # Gemma 2 and 3 have norms after attention and MLP as well.
    if cfg.has_norms_after:
        names += [f"{name}_post" for name in names]
    places = product(range(cfg.n_layers), names)
    return {(layer, name): f"blocks.{layer}.{name}.hook_scale" for layer, name in places}
