"""Running a model with hooks. It is never changed: flags, hooks, gradients and modes are put back."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from circuits.models.loading import Model

Hook = Callable[[Tensor], Tensor | None]
"""Takes an activation, returns its replacement, or None to leave it."""


@contextlib.contextmanager
def separate_inputs(model: Model) -> Iterator[None]:
    """Give every MLP and every head's q, k and v an input of its own; the flags are put back.

    Key and value heads that are shared are given one copy per query head.
    """
    mlps, shared = not model.cfg.attn_only, model.cfg.n_key_value_heads is not None
    with _flags(
        model,
        use_hook_mlp_in=mlps,
        use_split_qkv_input=True,
        ungroup_grouped_query_attention=shared,
    ):
        yield


@contextlib.contextmanager
def plain_inputs(model: Model) -> Iterator[None]:
    """Without the flags that make a forward pass slow, whatever the user has set; they are put back."""
    with _flags(model), _shared_norms(model):
        yield


@contextlib.contextmanager
def separate_gradients(model: Model) -> Iterator[None]:
    """Give every MLP an input of its own, and let hooks at k and v turn shared heads into one copy per query head (`copies_per_head`).

    The projections stay shared, so a pass costs what a plain one does. Flags and modules are put back.
    """
    attentions = (
        [block.attn for block in model.blocks] if model.cfg.n_key_value_heads is not None else []
    )
    before = [attention.repeat_kv_heads for attention in attentions]
    try:
        for attention in attentions:
            attention.repeat_kv_heads = 1
        with _flags(model, use_hook_mlp_in=not model.cfg.attn_only), _shared_norms(model):
            yield
    finally:
        for attention, repeats in zip(attentions, before, strict=True):
            attention.repeat_kv_heads = repeats


@contextlib.contextmanager
def _shared_norms(model: Model) -> Iterator[None]:
    """Compute the norm before attention once for q, k and v, where TransformerLens computes it three times; modules are put back."""
    norms = [block.ln1 for block in model.blocks]
    before = [dict(vars(norm)).get("forward") for norm in norms]
    try:
        for norm in norms:
            norm.forward = _remembered(norm.forward)
        yield
    finally:
        for norm, forward in zip(norms, before, strict=True):
            del norm.forward
            if forward is not None:
                norm.forward = forward


def _remembered(forward: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """The same function, which gives its last result again to the next two calls on the very same tensor, and then forgets it."""
    last: list[tuple[Tensor, Tensor]] = []

    def remembering(given: Tensor) -> Tensor:
        if not last or last[0][0] is not given:
            last[:] = [(given, forward(given))] * 3
        return last.pop()[1]

    return remembering


def copies_per_head(model: Model, slot: str) -> int:
    """How many query heads read each head of q, k or v."""
    shared = model.cfg.n_key_value_heads
    return 1 if shared is None or slot == "q" else model.cfg.n_heads // shared


@contextlib.contextmanager
def _flags(model: Model, **chosen: bool) -> Iterator[None]:
    """Set these flags of hooks, and clear the others; all are put back."""
    before = {name: getattr(model.cfg, name) for name in _INPUT_FLAGS}
    try:
        for name in _INPUT_FLAGS:
            setattr(model.cfg, name, chosen.get(name, False))
        yield
    finally:
        for name, value in before.items():
            setattr(model.cfg, name, value)


_INPUT_FLAGS = (
    "use_hook_mlp_in",
    "use_split_qkv_input",
    "ungroup_grouped_query_attention",
    "use_attn_in",
    "use_attn_result",
)


@contextlib.contextmanager
def frozen(model: Model) -> Iterator[None]:
    """Evaluation mode and no gradients into the weights; both are put back."""
    training = [(module, module.training) for module in model.modules() if module.training]
    requiring = [parameter for parameter in model.parameters() if parameter.requires_grad]
    try:
        for module, _ in training:
            module.training = False
        for parameter in requiring:
            parameter.requires_grad_(False)
        yield
    finally:
        for module, mode in training:
            module.training = mode
        for parameter in requiring:
            parameter.requires_grad_(True)


def run_to_residual(
    model: Model,
    tokens: Int[Tensor, "batch pos"],
    mask: Bool[Tensor, "batch pos"],
    hooks: Sequence[tuple[str, Hook]] = (),
    *,
    layers: int | None = None,
) -> Float[Tensor, "batch pos d_model"]:
    """The residual stream after the last layer, or after the first few, with hooks that are removed again even when the forward pass raises.

    Args:
        mask: real tokens, as against padding on the right. What pads hold never reaches a real token.
        hooks: (hook point, function) pairs.
    """
    # A tokenizer that pads on the left would make TransformerLens guess where the padding is.
    left = model.tokenizer is not None and model.tokenizer.padding_side == "left"
    attention_mask = torch.ones_like(tokens) if left else None
    with hooked(model, [*hooks, *_padding_hooks(model, mask)]):
        return model(
            tokens,
            stop_at_layer=model.cfg.n_layers if layers is None else layers,
            attention_mask=attention_mask,
        )


@contextlib.contextmanager
def hooked(model: Model, hooks: Sequence[tuple[str, Hook]]) -> Iterator[None]:
    """With these (hook point or module, function) pairs in place; a module's function takes what the module gives."""
    points: list[Any] = [
        (name, _as_hook(function)) for name, function in hooks if name in model.hook_dict
    ]
    modules = [
        (model.get_submodule(name), function)
        for name, function in hooks
        if name not in model.hook_dict
    ]
    handles = [
        module.register_forward_hook(_as_module_hook(function)) for module, function in modules
    ]
    try:
        with model.hooks(fwd_hooks=points):
            yield
    finally:
        for handle in handles:
            handle.remove()


def unembed(
    model: Model, residual: Float[Tensor, "*batch d_model"]
) -> Float[Tensor, "*batch vocab"]:
    """Logits from the final residual stream: final norm, unembedding, soft cap."""
    rows = residual.reshape(1, -1, residual.shape[-1])
    normed = rows if model.cfg.normalization_type is None else model.ln_final(rows)
    logits = model.unembed(normed)
    cap = model.cfg.output_logits_soft_cap
    if cap is not None and cap > 0:
        logits = cap * torch.tanh(logits / cap)
    return logits.reshape(*residual.shape[:-1], -1)


def _as_hook(function: Hook) -> Callable[..., Tensor | None]:
    def hook(activation: Tensor, hook: object) -> Tensor | None:
        return function(activation)

    return hook


def _as_module_hook(function: Hook) -> Callable[..., Tensor | None]:
    def hook(module: torch.nn.Module, arguments: tuple[Any, ...], output: Tensor) -> Tensor | None:
        return function(output)

    return hook


def _padding_hooks(model: Model, mask: Bool[Tensor, "batch pos"]) -> list[tuple[str, Hook]]:
    """Bidirectional attention would read pads on the right, and TransformerLens masks them only under causal attention."""
    if model.cfg.attention_dir == "causal" or bool(mask.all()):
        return []

    def ignore_pads(scores: Float[Tensor, "batch head query key"]) -> Tensor:
        return scores.masked_fill(~mask[:, None, None, :], -torch.inf)

    return [
        (f"blocks.{layer}.attn.hook_attn_scores", ignore_pads)
        for layer in range(model.cfg.n_layers)
    ]
