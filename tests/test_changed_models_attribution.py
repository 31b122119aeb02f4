"""Attribution graphs of HookedTransformers that a user has changed inside."""

import copy
from functools import partial, partialmethod, wraps

import pytest
import torch
from random_transcoders import model_of, random_transcoders
from torch import nn

pytest.importorskip("transformer_lens.HookedTransformer")

from changed_models import HONOURED, Halved, hook, torch_hook
from transformer_lens import HookedTransformer
from transformer_lens.components import (
    MLP,
    AbstractAttention,
    Attention,
    GatedMLP,
    LayerNorm,
    PosEmbed,
)

import circuits
from circuits.attribution.feature_graph import FEATURE
from circuits.models import changes, check_unchanged

# Many models and methods: types are checked where each is tested.
pytestmark = pytest.mark.usefixtures("unchecked_types")

PROMPT = [3, 14, 15, 9, 26, 5, 35, 8]
MLP_FORWARD = MLP.forward


@torch.no_grad()
@pytest.mark.parametrize(
    "change",
    ["a hook on the last norm", "no last norm", "a parametrized norm", "a head ablated in place"],
)
def test_a_model_that_is_not_what_its_weights_say_is_refused(change):
    transcoders = random_transcoders(model_of("gpt2"))
    model = model_of("gpt2")
    HONOURED[change](model)
    for compute in (
        lambda: circuits.AttributionGraph(transcoders).attribute(model, PROMPT),
        lambda: circuits.intervene(model, transcoders, PROMPT, [[]]),
        lambda: circuits.generate(model, transcoders, PROMPT, [], new_tokens=1),
    ):
        with pytest.raises(circuits.InputError, match=r"not what its weights say.*reset_hooks"):
            compute()


@torch.no_grad()
@pytest.mark.parametrize(
    "replacement",
    [
        partialmethod(lambda mlp, factor, x: MLP_FORWARD(mlp, x) * factor, 0.5),
        wraps(MLP_FORWARD)(lambda mlp, x: MLP_FORWARD(mlp, x) * 0.5),
        staticmethod(lambda x: x * 0.5),
        property(lambda mlp: lambda x: MLP_FORWARD(mlp, x) * 0.5),
        GatedMLP.forward,
        Halved(),
    ],
    ids=["partialmethod", "wraps", "staticmethod", "property", "of another class", "module"],
)
def test_whatever_replaces_a_method_of_a_class_is_seen(replacement, monkeypatch):
    model = model_of("gpt2")
    method = circuits.AttributionGraph(random_transcoders(model))
    method.attribute(model, PROMPT)
    monkeypatch.setattr(MLP, "forward", replacement)
    told = "not what its weights say: it has another forward method at the class MLP"
    with pytest.raises(circuits.InputError, match=told):
        method.attribute(model, PROMPT)


@torch.no_grad()
@pytest.mark.parametrize(
    ("kind", "name"),
    [
        (MLP, "b_in"),
        (MLP, "__call__"),
        (LayerNorm, "eps"),
        (Attention, "calculate_z_scores"),
        (PosEmbed, "forward"),
        (HookedTransformer, "input_to_embed"),
        (HookedTransformer, "get_pos_offset"),
        (AbstractAttention, "create_alibi_bias"),
        (nn.Module, "__call__"),
    ],
)
def test_what_a_run_looks_up_in_a_class_is_seen(kind, name, monkeypatch):
    model = model_of("gpt2")
    replacement = property(lambda module: None, lambda module, value: None)
    monkeypatch.setattr(kind, name, replacement, raising=False)
    told = f"another {name} method at the class|cannot build the modules of .*{name}"
    with pytest.raises(circuits.InputError, match=told):
        check_unchanged(model)


class WithAnotherGenerate(HookedTransformer):
    def generate(self, *args, **kwargs):
        return super().generate(*args, **kwargs)

    def about(self):
        return 3


class WithNamesOfTensors(HookedTransformer):
    size = "small"

    @property
    def device(self):
        return self.cfg.device


# What a user may add or replace without another number in any run.
NOT_COMPUTED = {
    "a method of a subclass": lambda model, patch: patch(model, "__class__", WithAnotherGenerate),
    "names of others": lambda model, patch: patch(model, "__class__", WithNamesOfTensors),
    "a module of its own": lambda model, patch: patch(
        model, "probe", nn.Sequential(copy.deepcopy(model.blocks[0].mlp), Halved()), raising=False
    ),
    "a method of the model": lambda model, patch: patch(
        model, "to_tokens", partial(model.to_tokens, prepend_bos=False)
    ),
    "a method of a class": lambda model, patch: patch(
        HookedTransformer, "about", lambda model: 3, raising=False
    ),
    "a method of a module's class": lambda model, patch: patch(
        MLP, "about", lambda mlp: 3, raising=False
    ),
    "a method of a module": lambda model, patch: patch(model.blocks[0], "extra_repr", lambda: ""),
}


@pytest.mark.parametrize("change", NOT_COMPUTED)
def test_methods_that_compute_nothing_are_no_changes(change, monkeypatch):
    model = model_of("gpt2")
    method = circuits.AttributionGraph(random_transcoders(model))
    expected = method.attribute(model, PROMPT)
    NOT_COMPUTED[change](model, monkeypatch.setattr)
    assert changes(model) == {}
    found = method.attribute(model, PROMPT)
    torch.testing.assert_close(found.weight, expected.weight, rtol=0, atol=0)


@torch.no_grad()
def test_prompts_whose_padding_a_hook_acts_on_are_refused_and_each_alone_is_not():
    model = model_of("gpt2")
    hook("blocks.0.hook_mlp_out", lambda x: torch.cat([x[:, :-1], 0 * x[:, -1:]], 1))(model)
    method = circuits.AttributionGraph(random_transcoders(model))
    assert len(list(method.attribute_all(model, [PROMPT, PROMPT[::-1]]))) == 2
    assert len(method.attribute(model, PROMPT[:-2]))
    with pytest.raises(circuits.InputError, match=r"hook at blocks\.0\.hook_mlp_out"):
        list(method.attribute_all(model, [PROMPT, PROMPT[:-2]]))


def token_times(position: int, factor: float):
    factors = torch.ones(len(PROMPT), 1)
    factors[position] = factor
    return lambda x: x * factors


def added_to(point: str, amount: float):
    # Not a constant: norms would take it away.
    return hook(point, lambda x: x + amount * torch.arange(x.shape[-1]))


def both(*several):
    return lambda model: [change(model) for change in several]


# By what is changed, a change that the last residual stream does not show.
UNSEEN = {
    "what an MLP reads": hook("blocks.1.ln2.hook_normalized", torch.zeros_like),
    "what an MLP is given": torch_hook(
        "blocks.1.mlp", lambda m, args: (args[0] * 0.5,), "forward_pre_hook"
    ),
    "a stream that is changed back": both(
        added_to("blocks.1.hook_resid_mid", 0.1), added_to("blocks.1.hook_resid_post", -0.1)
    ),
    "a token beside a far larger one": both(
        hook("hook_embed", token_times(0, 1e4)),
        hook("blocks.1.hook_resid_pre", token_times(3, 1.1)),
    ),
    "logits beside one that a bias masks": both(
        lambda model: model.unembed.b_U.data[:1].fill_(-1e9),
        hook("ln_final.hook_normalized", lambda x: 2 * x),
    ),
}


@torch.no_grad()
@pytest.mark.parametrize("change", UNSEEN)
def test_a_hook_is_refused_wherever_it_changes_what_weights_say(change):
    model = model_of("gpt2")
    UNSEEN[change](model)
    with pytest.raises(circuits.InputError, match=r"not what its weights say.*reset_hooks"):
        circuits.AttributionGraph(random_transcoders(model)).attribute(model, PROMPT)


@pytest.mark.parametrize(
    "change",
    [
        hook("blocks.1.ln2.hook_scale", lambda x: x * 0.5),
        hook("blocks.0.attn.hook_pattern", lambda x: x * 0.5),
        hook("blocks.0.hook_mlp_out", lambda x: x * 0.5),
        hook("hook_embed", lambda x: x * 0.5),
    ],
)
@torch.no_grad()
def test_hooks_on_what_is_frozen_are_part_of_the_graph(change):
    model = model_of("gpt2")
    change(model)
    transcoders = random_transcoders(model, reads="mlp_input")
    graph = circuits.AttributionGraph(transcoders).attribute(model, PROMPT)
    read: list[torch.Tensor] = []
    for block in model.blocks:
        block.mlp.register_forward_hook(lambda mlp, args, out: read.append(args[0][0]))
    model(graph.tokens[None])
    features = graph.nodes[graph.is_kind(FEATURE)]
    pre = torch.stack([transcoders.preactivations(layer, x) for layer, x in enumerate(read)])
    sums = torch.zeros(len(graph.nodes)).index_add_(0, graph.target, graph.weight)
    sums += graph.constants.sum(1)
    expected = pre[features.layer, features.position, features.index]
    torch.testing.assert_close(sums[graph.is_kind(FEATURE)], expected, rtol=1e-4, atol=1e-4)


def test_prompts_that_a_hook_mixes_are_refused_and_a_single_one_is_not():
    model = model_of("gpt2")
    hook("blocks.0.hook_mlp_out", lambda x: x.mean(0, keepdim=True).expand_as(x))(model)
    method = circuits.AttributionGraph(random_transcoders(model))
    assert len(method.attribute(model, PROMPT))
    with pytest.raises(circuits.InputError, match=r"hook at blocks\.0\.hook_mlp_out"):
        list(method.attribute_all(model, [PROMPT, PROMPT[::-1]]))
