"""Models that a user has changed: hooks, replaced modules and methods, and settings set by hand.

Each function changes the model that it is given in place.
"""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from architectures import random_model
from torch import nn
from torch.nn.utils import parametrizations, parametrize

pytest.importorskip("transformer_lens.HookedTransformer")

from transformer_lens import HookedTransformer
from transformer_lens.components import TransformerBlock

Change = Callable[[Any], object]


class Halved(nn.Module):
    def forward(self, x):
        return x * 0.5


class Wrapper(nn.Module):
    """A module under another name, which may change what it returns."""

    def __init__(self, inner: nn.Module, change=lambda x: x) -> None:
        super().__init__()
        self.inner, self.change = inner, change

    def forward(self, *args, **kwargs):
        return self.change(self.inner(*args, **kwargs))


class Transparent(Wrapper):
    """A wrapper that has the parts of what it wraps."""

    def __getattr__(self, name: str):
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.inner, name)


class WithoutMLPInput(TransformerBlock):
    """A layer that never copies what its MLP reads."""

    def forward(self, *args, **kwargs):
        flag, self.cfg.use_hook_mlp_in = self.cfg.use_hook_mlp_in, False
        try:
            return super().forward(*args, **kwargs)
        finally:
            self.cfg.use_hook_mlp_in = flag


class WithLargeEmbeddings(HookedTransformer):
    def input_to_embed(self, *args, **kwargs):
        residual, *rest = super().input_to_embed(*args, **kwargs)
        return residual * 1.5, *rest


class LowRank(nn.Module):
    """A layer with an adapter beside it, and no weights under the names that it had."""

    def __init__(self, base: nn.Module) -> None:
        super().__init__()
        self.base = base
        d_model, _ = base.W_U.shape
        generator = torch.Generator().manual_seed(0)
        down = torch.randn(d_model, 2, generator=generator, dtype=base.W_U.dtype)
        self.down, self.up = nn.Parameter(down), nn.Parameter(base.W_U[:2].clone())

    def forward(self, x):
        return self.base(x) + x @ self.down @ self.up


def hook(point: str, function, direction: str = "fwd") -> Change:
    return lambda model: model.add_hook(point, lambda x, hook: function(x), dir=direction)


def at_position(position: int, function):
    def change(x):
        x = x.clone()
        x[:, position] = function(x[:, position])
        return x

    return change


def without_head(z):
    z[:, :, 1] = 0
    return z


def forward_of(name: str, function) -> Change:
    def change(model):
        module = model.get_submodule(name)
        forward = module.forward
        module.forward = lambda *args, **kwargs: function(forward(*args, **kwargs))

    return change


def module_at(name: str, make) -> Change:
    def change(model):
        parent, _, child = name.rpartition(".")
        owner = model.get_submodule(parent)
        setattr(owner, child, make(getattr(owner, child)))

    return change


def torch_hook(name: str, function, kind: str = "forward_hook") -> Change:
    return lambda model: getattr(model.get_submodule(name), f"register_{kind}")(function)


def as_linear(unembed: nn.Module) -> nn.Linear:
    linear = nn.Linear(*unembed.W_U.shape, dtype=unembed.W_U.dtype)
    linear.weight.data, linear.bias.data = unembed.W_U.data.T * 0.5, unembed.b_U.data
    return linear


def set_value(path: str, value) -> Change:
    owner, _, name = path.rpartition(".")

    def change(model):
        part = model
        for each in filter(None, owner.split(".")):
            part = getattr(part, each)
        setattr(part, name, value)

    return change


def on_tokens(function) -> Change:
    return torch_hook("", lambda m, args: (function(args[0]), *args[1:]), "forward_pre_hook")


def layer_of_another_model(**settings) -> Change:
    def of_another(block: nn.Module) -> nn.Module:
        return random_model(seed=5, dtype=block.attn.W_O.dtype, **settings).blocks[1]

    return module_at("blocks.1", of_another)


def as_class(name: str, kind: type) -> Change:
    return lambda model: setattr(model.get_submodule(name), "__class__", kind)


def with_other_scores(model):
    attention = model.blocks[1].attn
    plain = attention.calculate_attention_scores
    attention.calculate_attention_scores = lambda q, k: plain(q, k) * 0.5


def with_low_mask(model):
    model.blocks[1].attn.IGNORE.fill_(-2.0)


# What the model computes by nodes, whatever it is, so that circuits of it exist.
HONOURED: dict[str, Change] = {
    "a hook on the last norm": hook("ln_final.hook_normalized", lambda x: x * 0.5),
    "a hook on logits at the last position": hook(
        "unembed.hook_out", at_position(-1, lambda x: x * 2)
    ),
    "a hook on logits at another position": hook(
        "unembed.hook_out", at_position(0, lambda x: x * 2)
    ),
    "a hook of torch on the last norm": torch_hook("ln_final", lambda m, args, out: out * 0.7),
    "a hook of torch before the unembedding": torch_hook(
        "unembed", lambda m, args: (args[0] * 0.7,), "forward_pre_hook"
    ),
    "a hook of torch that writes in place": torch_hook(
        "blocks.1.ln1", lambda m, args, out: out.mul_(0.5)
    ),
    "a hook of torch that looks at gradients": torch_hook(
        "blocks.1.mlp", lambda *_: None, "full_backward_hook"
    ),
    "a hook on a norm's scale": hook("blocks.1.ln1.hook_scale", lambda x: x * 0.5),
    "a hook on a norm's output": hook("blocks.1.ln1.hook_normalized", lambda x: x * 0.5),
    "a head ablated in place": hook("blocks.1.attn.hook_z", without_head),
    "a hook that depends on the data": hook("blocks.0.hook_mlp_out", lambda x: x * x.sigmoid()),
    "a hook on embeddings": hook("hook_embed", at_position(2, lambda x: x * 1.3)),
    "a hook on the first layer's input": hook(
        "blocks.0.hook_resid_pre", at_position(2, lambda x: x * 1.3)
    ),
    "a hook on a pattern": hook("blocks.1.attn.hook_pattern", lambda x: x * 0.5),
    "a hook on keys": hook("blocks.1.attn.hook_k", lambda x: x * 0.5),
    "a hook that returns nothing": hook("blocks.1.hook_attn_out", lambda x: None),
    "another forward of the unembedding": forward_of("unembed", lambda x: x * 0.5),
    "another forward of an MLP": forward_of("blocks.1.mlp", lambda x: x * 0.5),
    "another method of attention": with_other_scores,
    "an adapter beside the unembedding": module_at("unembed", LowRank),
    "a linear layer as unembedding": module_at("unembed", as_linear),
    "no last norm": module_at("ln_final", lambda norm: nn.Identity()),
    "no norm before attention": module_at("blocks.1.ln1", lambda norm: nn.Identity()),
    "a module after a norm": module_at("blocks.1.ln2", lambda norm: nn.Sequential(norm, Halved())),
    "a copy of a module": module_at("blocks.1.mlp", copy.deepcopy),
    "a parametrized unembedding": lambda model: parametrize.register_parametrization(
        model.unembed, "W_U", Halved()
    ),
    "a parametrized norm": lambda model: parametrize.register_parametrization(
        model.blocks[1].ln1, "w", Halved()
    ),
    "weight norm": lambda model: parametrizations.weight_norm(model.blocks[1].mlp, "W_in"),
    "logits that are capped": set_value("cfg.output_logits_soft_cap", 2.0),
    "scores that are capped": set_value("cfg.attn_scores_soft_cap", 1.0),
    "another epsilon in the settings": set_value("cfg.eps", 1.0),
    "another epsilon in the last norm": set_value("ln_final.eps", 1.0),
    "another epsilon in a norm": set_value("blocks.1.ln1.eps", 1.0),
    "another scale of attention": set_value("blocks.1.attn.attn_scale", 1.0),
    "another activation": set_value("blocks.1.mlp.act_fn", torch.relu),
    "another activation in the settings": set_value("cfg.act_fn", "gelu_new"),
    "attention that sees later tokens": with_low_mask,
    "a hook of torch on tokens": on_tokens(lambda tokens: (tokens + 1) % 50),
    "a hook that mixes tokens of a prompt": hook("hook_embed", lambda x: x + x.roll(1, 1)),
    "a copy of a layer": module_at("blocks.1", copy.deepcopy),
    "a layer of another model": layer_of_another_model(),
    "a layer with another activation": layer_of_another_model(act_fn="relu"),
    "a layer with capped scores": layer_of_another_model(attn_scores_soft_cap=1.0),
    "a wrapper that has the parts of attention": module_at("blocks.1.attn", Transparent),
    "a wrapper that has the parts of a layer": module_at("blocks.1", Transparent),
    "a wrapped embedding": module_at("embed", lambda embed: Wrapper(embed, lambda x: x * 0.5)),
    "a model of another class": as_class("", WithLargeEmbeddings),
    "one number for every MLP output": hook("blocks.0.hook_mlp_out", lambda x: 0.5),
    "the same neurons for all tokens": hook(
        "blocks.0.mlp.hook_post", lambda x: torch.linspace(-1, 1, x.shape[-1]).to(x)[None, None]
    ),
    "the same heads for all tokens": hook(
        "blocks.1.attn.hook_z",
        lambda z: torch.linspace(-1, 1, 24).view(1, 1, 4, 6).repeat(1, z.shape[1], 1, 1),
    ),
    "the same pattern for all prompts": hook(
        "blocks.1.attn.hook_pattern", lambda x: torch.eye(x.shape[-1]).to(x)[None, None]
    ),
    "embeddings in another type": hook("hook_embed", lambda x: x.double()),
    "values in another type": hook("blocks.1.attn.hook_v", lambda x: x.double()),
    "scales of attention by head": set_value(
        "blocks.1.attn.attn_scale", torch.tensor([1.0, 2.0, 3.0, 4.0]).view(4, 1, 1)
    ),
    "a bias with another axis": lambda model: setattr(
        model.unembed, "b_U", nn.Parameter(model.unembed.b_U.detach()[None])
    ),
    "an activation that depends on the position": set_value(
        "blocks.1.mlp.act_fn", lambda x: x.relu() * torch.arange(x.shape[1])[:, None]
    ),
    "an activation that is a module": set_value("blocks.1.mlp.act_fn", nn.Tanh()),
    "parametrized attention": lambda model: parametrize.register_parametrization(
        model.blocks[1].attn, "W_O", Halved()
    ),
}

# Of these, what gives a prompt other numbers when padding follows it.
READS_PADDING = (
    "a hook on logits at the last position",
    "attention that sees later tokens",
    "a hook that mixes tokens of a prompt",
)

# What gives a prompt other numbers when it is beside others, or each time.
MIXES_PROMPTS: dict[str, Change] = {
    "the mean": hook("blocks.0.hook_mlp_out", lambda x: x - x.mean(0)),
    "the largest": hook("blocks.1.attn.hook_z", lambda x: x.amax(0).expand_as(x)),
    "the other way round": hook("blocks.0.ln1.hook_normalized", lambda x: x.flip(0)),
    "the next one": hook("hook_embed", lambda x: x.roll(1, 0)),
    "the first one": on_tokens(lambda tokens: tokens[:1].expand_as(tokens)),
    "tokens the other way round": on_tokens(lambda tokens: tokens.flip(0)),
    "an activation": set_value("blocks.1.mlp.act_fn", lambda x: x.relu() - x.relu().mean(0)),
    "a module as activation": set_value(
        "blocks.1.mlp.act_fn", Wrapper(nn.ReLU(), lambda x: x - x.mean(0))
    ),
    "chance": module_at("embed", lambda e: Wrapper(e, lambda x: x + torch.randn_like(x))),
}

# What acts in some runs and not in others, or leaves no sum of nodes, and what is said then.
REFUSED: dict[str, tuple[Change, str]] = {
    "a hook of torch on the model": (torch_hook("", lambda m, args, out: out * 0.5), "unembed"),
    "another forward of the model": (forward_of("", lambda x: x * 0.5), "another forward"),
    "a steering vector": (
        hook("blocks.1.hook_resid_pre", lambda x: x + 1 + torch.arange(x.shape[-1])),
        "do not sum .* hook at blocks.1.hook_resid_pre",
    ),
    "a steering vector at one position": (
        hook("blocks.1.hook_resid_pre", at_position(1, lambda x: x * 3)),
        "do not sum .* hook at blocks.1.hook_resid_pre",
    ),
    "a hook between attention and MLP": (
        hook("blocks.0.hook_resid_mid", at_position(1, lambda x: x * 3)),
        "do not sum",
    ),
    "a hook on the last residual stream": (
        hook("blocks.1.hook_resid_post", at_position(1, lambda x: x * 3)),
        "do not sum",
    ),
    "a hook on what attention writes": (
        hook("blocks.1.hook_attn_out", lambda x: x * 0.5),
        "do not sum",
    ),
    "a hook that counts axes": (
        hook("blocks.1.ln1.hook_normalized", lambda x: x.index_fill(2, torch.tensor([1]), 0)),
        r"computes other logits .*ln1\.hook_normalized",
    ),
    "a hook that depends on the batch": (
        hook("ln_final.hook_normalized", lambda x: x * torch.arange(len(x))[:, None, None]),
        "computes other logits",
    ),
    "a hook where edges are ablated": (
        lambda model: (
            set_value("cfg.use_split_qkv_input", True)(model),
            hook("blocks.1.hook_q_input", lambda x: x * 0.5)(model),
        ),
        "where edges are ablated",
    ),
    **{
        f"a hook that mixes prompts: {name}": (change, "other prompts are in the batch")
        for name, change in MIXES_PROMPTS.items()
    },
    "an activation by chance": (
        set_value("blocks.1.mlp.act_fn", nn.functional.dropout),
        r"computes other logits .* another act_fn method at blocks\.1\.mlp",
    ),
    "a bias by position": (
        set_value("blocks.0.attn.b_O", nn.Parameter(torch.rand(8, 24))),
        r"b_O of shape \[8, 24\] at blocks\.0\.attn; let it act on prompts of any",
    ),
    "a hook that keeps the batch of another run": (
        hook("blocks.1.hook_mlp_out", lambda x: torch.ones(6, *x.shape[1:])),
        r"of shape \[6, .* for tokens of shape \[1, .*hook at blocks\.1\.hook_mlp_out",
    ),
    "a hook at a position that only some prompts have": (
        hook("blocks.0.hook_mlp_out", at_position(7, lambda x: x * 0)),
        "cannot be run on each prompt alone.*hook at blocks.0.hook_mlp_out; let it act on",
    ),
    "attention under another name": (
        module_at("blocks.1.attn", Wrapper),
        r"no blocks\.1\.attn\.hook_z: it has a Wrapper at blocks\.1\.attn; give the new module",
    ),
    "a layer under another name": (
        module_at("blocks.1", Wrapper),
        r"no blocks\.1\.attn\.hook_z: it has a Wrapper at blocks\.1; give the new module",
    ),
    "attention whose output is halved": (
        module_at("blocks.1.attn", lambda attention: Transparent(attention, lambda x: x * 0.5)),
        "do not sum .* a Transparent at blocks.1.attn",
    ),
    "one layer twice": (
        lambda model: setattr(model.blocks, "1", model.blocks[0]),
        r"blocks\.1\..* and blocks\.0\..* are one module.*copy\.deepcopy",
    ),
    "one MLP twice": (
        lambda model: setattr(model.blocks[1], "mlp", model.blocks[0].mlp),
        r"blocks\.1\.mlp\..* and blocks\.0\.mlp\..* are one module",
    ),
    "one norm twice in a layer": (
        lambda model: setattr(model.blocks[1], "ln2", model.blocks[1].ln1),
        r"blocks\.1\.ln2\..* and blocks\.1\.ln1\..* are one module",
    ),
    "the norm of a layer at the end": (
        lambda model: setattr(model, "ln_final", model.blocks[1].ln2),
        r"ln_final\..* and blocks\.1\.ln2\..* are one module",
    ),
    "another call of the model": (
        as_class("", type("Called", (HookedTransformer,), {"__call__": lambda *_, **__: None})),
        "another __call__ method at the model itself",
    ),
    "a compiled model": (lambda model: model.compile(backend="eager"), "is compiled"),
    "a compiled layer": (
        module_at("blocks.1", lambda block: torch.compile(block, backend="eager")),
        "blocks.1 is compiled",
    ),
    "half of the weights in another type": (lambda model: model.blocks[0].half(), "float16"),
    "weights on no device": (lambda model: nn.Module.to(model, "meta"), "meta device"),
}
