"""Run a model with hooks and leave it unchanged: flags, hooks, gradients and modes are restored."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from circuits.models.functional import soft_capped
from circuits.models.loading import Model
from circuits.models.overflow import check_size

Hook = Callable[[Tensor], Tensor | None]
"""Takes an activation and returns its replacement, or None to leave it unchanged."""

Hooks = Sequence[tuple[str, Hook]]
TokenMask = Bool[Tensor, "batch pos"]
Forward = Callable[[Tensor], Tensor]
Attribute = tuple[Any, str, Any]

INPUT_FLAGS = (
    "use_hook_mlp_in", "use_split_qkv_input", "ungroup_grouped_query_attention",
    "use_attn_in", "use_attn_result",
)  # fmt: skip
"""TransformerLens' flags that copy the inputs or outputs of heads and MLPs."""


@contextlib.contextmanager
def separate_inputs(model: Model) -> Iterator[None]:
    """Give every MLP, and every head's q, k and v, a separate input, which hooks can change."""
    # One copy of the residual stream for every head's q, k and v, and one for the MLP. Shared key
    # and value heads become one copy per query head.
    flags = ["use_split_qkv_input", "use_hook_mlp_in"]
    if model.cfg.n_key_value_heads is not None:
        flags.append("ungroup_grouped_query_attention")
    with _input_flags(model, *flags):
        yield


@contextlib.contextmanager
def plain_inputs(model: Model) -> Iterator[None]:
    """Clear the flags that make a forward pass slow, whatever the user has set."""
    with _input_flags(model), _shared_norms(model):
        yield


@contextlib.contextmanager
def separate_gradients(model: Model) -> Iterator[None]:
    """Let hooks take a separate gradient at every MLP's input and at every head's q, k and v.

    A hook at k or v must itself repeat a shared head once per query head (`copies_per_head`). The
    projections stay shared, so a pass costs as much as a plain one.
    """
    repeats = []
    if model.cfg.n_key_value_heads is not None:
        # With one repeat the model leaves the repeating of shared heads to the hooks.
        repeats = [(block.attn, "repeat_kv_heads", 1) for block in model.blocks]
    with _attributes(repeats), _input_flags(model, "use_hook_mlp_in"), _shared_norms(model):
        yield


def copies_per_head(model: Model, slot: str) -> int:
    """Return how many query heads share one head of q, k or v."""
    shared = model.cfg.n_key_value_heads
    if shared is None or slot == "q":
        return 1
    return model.cfg.n_heads // shared


@contextlib.contextmanager
def frozen(model: Model) -> Iterator[None]:
    """Set evaluation mode and switch off the gradients of the weights."""
    training = [module for module in model.modules() if module.training]
    modes = [(module, "training", False) for module in training]
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    with _attributes(modes), contextlib.ExitStack() as stack:
        for parameter in trainable:
            stack.callback(parameter.requires_grad_)
            parameter.requires_grad_(False)
        yield


def run_to_residual(
    model: Model,
    tokens: Int[Tensor, "batch pos"],
    mask: TokenMask,
    hooks: Hooks = (),
    *,
    layers: int | None = None,
) -> Float[Tensor, "batch pos d_model"]:
    """Run a model with hooks, and return the residual stream after the last layer.

    Args:
        mask: True for real tokens, False for padding on the right, which no real token reads.
        layers: stop after this many layers.

    Raises:
        NotFiniteError: the residual stream is too large for the norm after it.
    """
    # With a tokenizer that pads on the left TransformerLens would guess where the padding is.
    pads_left = getattr(model.tokenizer, "padding_side", None) == "left"
    attention_mask = torch.ones_like(tokens) if pads_left else None
    last = model.cfg.n_layers if layers is None else layers
    all_hooks = [*hooks, *_padding_hooks(model, mask)]
    with hooked(model, all_hooks):
        residual = model(tokens, stop_at_layer=last, attention_mask=attention_mask)
    check_size(model, residual)
    return residual


@contextlib.contextmanager
def hooked(model: Model, hooks: Hooks) -> Iterator[None]:
    """Add hooks to hook points, or to the outputs of modules, and remove them at the end."""
    with contextlib.ExitStack() as stack:
        for name, function in hooks:
            # A hook point is a module as well: it returns the activation that it is given.
            module = model.get_submodule(name)
            handle = module.register_forward_hook(_on_output(function))
            stack.callback(handle.remove)
        yield


def unembed(
    model: Model, residual: Float[Tensor, "*batch d_model"]
) -> Float[Tensor, "*batch vocab"]:
    """Compute the logits from the final residual stream with the model's own modules."""
    # cap(norm(x) W_U + b_U), where modules want a batch axis
    normed = residual.flatten(0, -2)[None]
    if model.cfg.normalization_type is not None:
        normed = model.ln_final(normed)
    soft_cap = model.cfg.output_logits_soft_cap or 0
    logits = soft_capped(model.unembed(normed), soft_cap)
    batch = residual.shape[:-1]
    return logits[0].unflatten(0, batch)


def _on_output(function: Hook) -> Callable[..., Tensor | None]:
    return lambda module, arguments, output: function(output)


def _padding_hooks(model: Model, mask: TokenMask) -> Hooks:
    """Mask pads on the right, which TransformerLens does under causal attention only."""
    if model.cfg.attention_dir == "causal" or mask.all():
        return []
    # [batch, head, query, key]
    pads = ~mask[:, None, None]

    def ignore_pads(scores: Tensor) -> Tensor:
        return scores.masked_fill(pads, -torch.inf)

    layers = range(model.cfg.n_layers)
    return [(f"blocks.{layer}.attn.hook_attn_scores", ignore_pads) for layer in layers]


@contextlib.contextmanager
def _input_flags(model: Model, *chosen: str) -> Iterator[None]:
    """Set these of `INPUT_FLAGS`, and clear the others."""
    flags = [(model.cfg, name, name in chosen) for name in INPUT_FLAGS]
    with _attributes(flags):
        yield


@contextlib.contextmanager
def _shared_norms(model: Model) -> Iterator[None]:
    """Compute the norm before attention once for q, k and v, not three times as TransformerLens."""
    norms = [block.ln1 for block in model.blocks]
    forwards = [(norm, "forward", _remembering(norm.forward)) for norm in norms]
    with _attributes(forwards):
        yield


def _remembering(forward: Forward) -> Forward:
    """Return the last result again for the next two calls on the same tensor, then forget it."""
    # The input and the output, once for each call that is left.
    last: list[tuple[Tensor, Tensor]] = []

    def remembering(given: Tensor) -> Tensor:
        if not last or last[0][0] is not given:
            call = (given, forward(given))
            last[:] = [call, call, call]
        return last.pop()[1]

    return remembering


@contextlib.contextmanager
def _attributes(changes: Sequence[Attribute]) -> Iterator[None]:
    """Set attributes, given as (object, name, value), and restore them at the end."""
    with contextlib.ExitStack() as stack:
        for owner, name, value in changes:
            if name in vars(owner):
                before = getattr(owner, name)
                stack.callback(setattr, owner, name, before)
            else:
                # The object only inherits the attribute from its class.
                stack.callback(delattr, owner, name)
            setattr(owner, name, value)
        yield
