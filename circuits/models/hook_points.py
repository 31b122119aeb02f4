"""At which hook point a node writes or reads, and where what a run computes can be seen."""

from __future__ import annotations

from circuits.graph.edges import SLOTS
from circuits.graph.nodes import MLP, Embed, Head, Logits, Node, PosEmbed, TokenEmbed
from circuits.models.loading import Model


def output_hook(node: Node) -> str:
    """The hook point at which a component's output can be read. A head's is its z, whose product with W_O is what it writes."""
    match node:
        case TokenEmbed():
            return "hook_embed"
        case PosEmbed():
            return "hook_pos_embed"
        case Embed():
            return "blocks.0.hook_resid_pre"
        case Head(layer=layer):
            return f"blocks.{layer}.attn.hook_z"
        case MLP(layer=layer):
            return f"blocks.{layer}.hook_mlp_out"
    raise TypeError(f"{node} writes nothing to the residual stream.")


def input_hook(model: Model, node: Node, slot: str | None) -> str:
    """The hook point at which what a target reads can be changed; for heads, within `separate_inputs`."""
    match node:
        case Head(layer=layer) if slot in SLOTS:
            return f"blocks.{layer}.hook_{slot}_input"
        case MLP(layer=layer):
            return f"blocks.{layer}.hook_mlp_in"
        case Logits():
            return f"blocks.{model.cfg.n_layers - 1}.hook_resid_post"
    raise TypeError(f"{node} reads nothing in slot {slot}.")


def attention_output_hook(layer: int) -> str:
    """What a layer's heads and b_O add to the residual stream together."""
    return f"blocks.{layer}.hook_attn_out"


def residual_hook(layer: int) -> str:
    """The residual stream as it enters a layer."""
    return f"blocks.{layer}.hook_resid_pre"


def projection_hook(layer: int, slot: str) -> str:
    """A layer's q, k or v, one per head, before norms and rotations of their own."""
    return f"blocks.{layer}.attn.hook_{slot}"


def pattern_hook(layer: int) -> str:
    """How much each query of a layer's heads attends to each key."""
    return f"blocks.{layer}.attn.hook_pattern"


def mlp_residual_hook(model: Model, layer: int) -> str:
    """The residual stream that an MLP reads, before its norm: in a parallel block what its heads read too."""
    return f"blocks.{layer}.{'hook_resid_pre' if model.cfg.parallel_attn_mlp else 'hook_resid_mid'}"


def mlp_output_hook(model: Model, layer: int, *, before_norm: bool = False) -> str:
    """What an MLP adds to the residual stream, or what it gives to a norm that follows it."""
    return f"blocks.{layer}.{'mlp' if before_norm and _norms_after(model) else 'hook_mlp_out'}"


NORMS = ("ln1", "ln1_post", "ln2", "ln2_post")
"""The norms of a block: before and after attention, before and after the MLP."""


def scale_hooks(model: Model) -> dict[tuple[int, str], str]:
    """Where what each norm of each block divides by can be read, by layer and norm; the final norm's is `FINAL_SCALE`."""
    if model.cfg.normalization_type is None:
        return {}
    absent = {
        *(() if _norms_after(model) else ("ln1_post", "ln2_post")),
        *(("ln2", "ln2_post") if model.cfg.attn_only else ()),
    }
    names = [name for name in NORMS if name not in absent]
    return {
        (layer, name): f"blocks.{layer}.{name}.hook_scale"
        for layer in range(model.cfg.n_layers)
        for name in names
    }


FINAL_SCALE = "ln_final.hook_scale"


def _norms_after(model: Model) -> bool:
    return bool(model.cfg.use_normalization_before_and_after)
