"""Bridges that a user has made or changed: a run honours it, or the change is named."""

import contextlib
import copy
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import pytest
import torch
import transformers
from random_transcoders import random_transcoders
from torch import nn
from zoo import bridge_to, config_of, hugging_face_model

import circuits
from circuits.attribution.local_model import freeze
from circuits.models import HAS_HOOKED_TRANSFORMER, changes, counting_passes
from circuits.models.bridge import parts
from circuits.models.bridge.changes import is_known
from circuits.models.identity import identity

# Many models and methods: types are checked where each is tested.
pytestmark = pytest.mark.usefixtures("unchecked_types")

VOCAB = 96


def model_of(name: str = "llama", **settings):
    return bridge_to(hugging_face_model(config_of(name), **settings))


@pytest.fixture
def task() -> circuits.Task:
    generator = torch.Generator().manual_seed(5)
    clean = torch.randint(1, VOCAB, (3, 8), generator=generator)
    corrupted = clean.clone()
    corrupted[:, 2] = torch.randint(1, VOCAB, (3,), generator=generator)
    return circuits.Task.from_tokens(clean, corrupted, clean[:, 0], clean[:, 1])


@torch.no_grad()
def assert_runs_are_the_models(model, task, atol: float = 1e-4) -> None:
    """The whole circuit is the model itself on clean prompts, the empty one on corrupted ones."""
    graph = circuits.component_graph(model)
    kept = torch.stack([~graph.mask([]), graph.mask([])])
    expected = torch.stack([model(tokens)[task.scored] for tokens in (task.clean, task.corrupted)])
    found = circuits.run_circuits(model, graph, kept, task, executor="hooks")
    torch.testing.assert_close(found, expected, atol=atol, rtol=0)


def halved(x, hook):
    return x * 0.5


def without_head(z, hook):
    z = z.clone()
    z[..., :8] = 0
    return z


def half_at_position(x, hook):
    x = x.clone()
    x[:, 2] *= 0.5
    return x


# Points of a bridge that lie where nodes write or read.
HONOURED = {
    "what a head writes": ("blocks.1.attn.hook_z", without_head),
    "what attention mixes": ("blocks.1.attn.o.hook_in", halved),
    "queries": ("blocks.1.attn.q.hook_out", halved),
    "keys": ("blocks.0.attn.k.hook_out", halved),
    "values": ("blocks.1.attn.v.hook_out", half_at_position),
    "a pattern": ("blocks.1.attn.hook_pattern", halved),
    "what an MLP writes": ("blocks.0.mlp.hook_out", halved),
    "an MLP by its old name": ("blocks.1.hook_mlp_out", half_at_position),
    "the embedding": ("embed.hook_out", half_at_position),
    "the first layer's input": ("blocks.0.hook_resid_pre", half_at_position),
    "logits": ("unembed.hook_out", halved),
}
# Points at which a run of circuits computes nothing of the kind, or what nodes do not write.
REFUSED = {
    "what attention is given": ("blocks.1.attn.hook_in", r"blocks\.1\.attn\.hook_in"),
    "scores": ("blocks.1.attn.hook_attn_scores", r"blocks\.1\.attn\.hook_attn_scores"),
    "what a norm gives": ("blocks.1.ln1.hook_normalized", r"blocks\.1\.ln1\.hook_normalized"),
    "a norm's scale": ("ln_final.hook_scale", r"ln_final\.hook_scale"),
    "neurons": ("blocks.1.mlp.in.hook_out", r"blocks\.1\.mlp\.in\.hook_out"),
    "the stream between": ("blocks.1.hook_resid_mid", r"blocks\.1\.ln2\.hook_in"),
    "a steering vector": ("blocks.1.hook_resid_pre", r"do not sum .*blocks\.1\.hook_resid_pre"),
    "the last stream": ("blocks.2.hook_resid_post", r"do not sum .*blocks\.2\.hook_resid_post"),
}


@pytest.mark.parametrize("name", ["llama", "gpt2", "pythia"])
@pytest.mark.parametrize("point", HONOURED)
def test_hooks_where_nodes_write_and_read_are_honoured(name, point, task):
    model = model_of(name)
    plain = circuits.model_logits(model, task)
    where, function = HONOURED[point]
    model.add_hook(where, function)
    assert len(changes(model)) == 1
    assert_runs_are_the_models(model, task)
    assert not torch.allclose(circuits.model_logits(model, task), plain, atol=1e-4)
    model.reset_hooks()
    assert changes(model) == {}
    torch.testing.assert_close(circuits.model_logits(model, task), plain)


@pytest.mark.parametrize("point", REFUSED)
def test_hooks_elsewhere_are_refused_by_name(point, task):
    model = model_of()
    where, told = REFUSED[point]
    ramp = torch.linspace(0.5, 1.5, 32)
    model.add_hook(where, lambda x, hook: x * (ramp if x.shape[-1] == 32 else 0.5))
    with pytest.raises(circuits.InputError, match=told) as error:
        circuits.run_circuit(model, circuits.Circuit.full(circuits.component_graph(model)), task)
    assert "_original_component" not in str(error.value)


@pytest.mark.parametrize("direction", ["fwd", "bwd"])
def test_a_hook_on_a_module_of_hugging_face_is_refused_by_name(direction, task):
    model = model_of()
    mlp = model.original_model.model.layers[1].mlp
    register = mlp.register_forward_hook if direction == "fwd" else mlp.register_full_backward_hook
    register(lambda *arguments: None)
    with pytest.raises(circuits.InputError, match=r"has a hook at .*1\.mlp"):
        circuits.EAP().discover(model, task)


def test_a_hook_on_the_tokens_is_refused(task):
    model = model_of()
    circuits.EAP().discover(model, task)
    model.register_forward_pre_hook(lambda module, args: (args[0].flip(1), *args[1:]))
    with pytest.raises(circuits.InputError, match="has a hook at the model itself"):
        circuits.EAP().discover(model, task)


def test_a_hook_with_separate_inputs_is_refused(task):
    model = model_of("gpt2")
    model.set_use_hook_mlp_in(True)
    model.add_hook("blocks.1.hook_mlp_in", halved)
    with pytest.raises(circuits.InputError, match=r"hook at blocks\.1\.hook_mlp_in"):
        circuits.EAP().discover(model, task)


def test_hooks_that_a_library_puts_on_a_bridge_are_no_users(task):
    model = model_of("opt")
    assert changes(model) == {}
    assert_runs_are_the_models(model, task)
    if HAS_HOOKED_TRANSFORMER:
        # In TransformerLens 3 this point of OPT shows nothing.
        return
    with model.hooks(fwd_hooks=[("blocks.0.mlp.hook_out", halved)]):
        assert_runs_are_the_models(model, task)
    assert changes(model) == {}


# Other code


def test_another_forward_of_a_module_is_refused(task):
    model = model_of()
    mlp = model.original_model.model.layers[1].mlp
    plain = mlp.forward
    mlp.forward = lambda *args, **kwargs: plain(*args, **kwargs) * 0.5
    with pytest.raises(circuits.InputError, match=r"another forward method at .*1\.mlp"):
        circuits.EAP().discover(model, task)


def test_another_forward_of_a_class_is_refused(task, monkeypatch):
    model = model_of()
    circuits.EAP().discover(model, task)
    kind = transformers.models.llama.modeling_llama.LlamaRMSNorm
    plain = kind.forward
    monkeypatch.setattr(kind, "forward", lambda norm, x: plain(norm, x) * 0.5)
    with pytest.raises(circuits.InputError, match="run layer by layer, give other logits"):
        circuits.EAP().discover(model, task)


def replaced_often(rotary):
    # Until what is new may lie where the first was.
    for _ in range(5):
        rotary.inv_freq = rotary.inv_freq * 0.7


OTHER_ANGLES = {
    "written to": lambda rotary: rotary.inv_freq.mul_(0.3),
    "written to, uncounted": lambda rotary: rotary.inv_freq.data.mul_(0.3),
    "replaced": replaced_often,
    "scaled": lambda rotary: setattr(rotary, "attention_scaling", 2.0),
}


@pytest.mark.parametrize("change", OTHER_ANGLES.values(), ids=OTHER_ANGLES)
@torch.no_grad()
def test_other_angles_of_positions_are_run_at_once(change, task):
    model = model_of()
    for _ in range(2):
        assert_runs_are_the_models(model, task)
        change(model.original_model.model.rotary_emb)
        assert_runs_are_the_models(model, task)


@pytest.mark.parametrize(
    "name", ["llama", "gpt2", "phi3 long", "gemma3", "gptj", "bloom", "mistral", "gpt-oss"]
)
def test_what_runs_leave_in_a_bridge_is_no_change(name, task):
    # Long rope makes its angles anew in each run.
    model = model_of(name)
    for _ in range(3):
        circuits.EAP().discover(model, task)
        assert is_known(model)
    assert len(parts._ROTATIONS.get(model, {})) <= 2


def scale_what_layers_write(model):
    for layer in model.original_model.model.layers:
        layer.residual_multiplier = 0.9


def shorten_windows(model):
    for layer in model.original_model.model.layers:
        layer.self_attn.sliding_window = 3


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("granite", scale_what_layers_write),
        ("granite", lambda model: setattr(model.original_model.config, "residual_multiplier", 0.9)),
        (
            "granite",
            lambda model: setattr(model.original_model.config, "embedding_multiplier", 1.0),
        ),
        ("qwen2 window", shorten_windows),
    ],
)
def test_a_setting_that_only_one_of_two_readers_sees_is_refused(name, change, task):
    model = model_of(name)
    circuits.EAP().discover(model, task)
    change(model)
    with pytest.raises(circuits.InputError, match="run layer by layer, give other logits"):
        circuits.EAP().discover(model, task)


def test_a_norm_without_a_bias_says_nothing_of_those_that_have_one(task, monkeypatch):
    monkeypatch.setattr(parts, "_OFFSETS", {})
    plain = {"elementwise_affine": False}
    for norm in (nn.LayerNorm(8, bias=False), nn.LayerNorm(8, **plain), nn.LayerNorm(8)):
        assert parts.norm_weights(norm).is_plain
    for name in ("mpt", "gpt2", "bloom"):
        assert_runs_are_the_models(model_of(name), task)


def test_clipped_values_are_refused_in_attribution_graphs_wherever_the_setting_is(task):
    config = config_of("mpt")
    config.attn_config.clip_qkv = 0.05
    model = bridge_to(hugging_face_model(config))
    with pytest.raises(circuits.InputError, match="clipped values, which are not linear"):
        freeze(model, random_transcoders(model), [task.clean[0]])


def test_a_bridge_in_training_mode_is_run_without_dropout(task):
    model = model_of("gpt2")
    model.train()
    with torch.no_grad():
        model.original_model.transformer.h[0].mlp.c_fc.weight.mul_(1.1)
    found = circuits.EAP().discover(model, task).scores
    assert model.training
    model.eval()
    assert torch.equal(found, circuits.EAP().discover(model, task).scores)


@pytest.mark.parametrize("weight", [torch.nan, 0.0, 500.0])
@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_norms_of_one_model_say_nothing_of_those_of_another(name, weight, task, monkeypatch):
    monkeypatch.setattr(parts, "_OFFSETS", {})
    odd = model_of(name)
    with torch.no_grad():
        odd.original_model.model.layers[0].input_layernorm.weight[0] = weight
    with contextlib.suppress(circuits.InputError):
        circuits.EAP().discover(odd, task)
    assert_runs_are_the_models(model_of(name), task)


@pytest.mark.parametrize("name", ["opt-350m", "opt with norms after", "olmo2", "deepseek"])
def test_a_bridge_of_what_no_circuit_is_found_in_is_refused_in_one_line(name):
    model = model_of(name)
    for use in (circuits.component_graph, partial(circuits.load_task, "ioi", n=2)):
        with pytest.raises(circuits.InputError, match=r"has |cannot be run") as error:
            use(model)
        assert "\n" not in str(error.value)


def test_a_replaced_module_is_refused(task):
    model = model_of()
    model.original_model.model.layers[1].mlp = nn.Identity()
    with pytest.raises(circuits.InputError, match="cannot be run as it is"):
        circuits.EAP().discover(model, task)


def test_a_compiled_bridge_is_refused(task):
    model = model_of()
    model.compile(backend="eager")
    with pytest.raises(circuits.InputError, match="is compiled"):
        circuits.EAP().discover(model, task)


# Weights


def q_of(name: str, model) -> torch.Tensor:
    layer = {
        "llama": lambda: model.original_model.model.layers[1].self_attn.q_proj,
        "gpt2": lambda: model.original_model.transformer.h[1].attn.c_attn,
    }[name]()
    return layer.weight.data


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_edited_weights_are_run_at_once_and_a_circuit_of_the_others_is_told(name, task):
    model = model_of(name)
    graph = circuits.component_graph(model)
    circuit = circuits.EAP().discover(model, task, graph=graph)
    fingerprint = identity(model).weights
    down = model.blocks[1].mlp.out.weight.data
    down.mul_(0.5)
    assert_runs_are_the_models(model, task)
    assert identity(model).weights != fingerprint
    with pytest.warns(UserWarning, match="with other weights than this model has"):
        circuits.run_circuit(model, circuit.top(10), task)
    down.mul_(2)
    assert identity(model).weights == fingerprint


def test_the_unembedding_of_tied_embeddings_is_the_embedding(task):
    model = model_of("llama tied")
    model.original_model.model.embed_tokens.weight.data.mul_(0.7)
    assert_runs_are_the_models(model, task)


# What else users do


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma"])
def test_folded_weights_are_right_or_refused(name, task):
    """TransformerLens' compatibility mode folds norms and centres weights."""
    model = model_of(name)
    model.enable_compatibility_mode()
    try:
        graph = circuits.component_graph(model)
    except circuits.InputError as error:
        assert len(str(error)) <= 500
        return
    assert_runs_are_the_models(model, task)
    assert len(graph) == 262


@pytest.mark.parametrize(
    ("dtype", "atol"), [(torch.float64, 1e-5), (torch.bfloat16, 0.3)], ids=["double", "bfloat16"]
)
@pytest.mark.parametrize("name", ["llama", "gpt2", "pythia"])
def test_another_type_is_run_in_it(name, dtype, atol, task):
    model = model_of(name).to(dtype)
    assert circuits.models.shape_of(model).dtype == dtype
    assert_runs_are_the_models(model, task, atol)
    single = circuits.EAP().discover(model_of(name), task).scores
    scores = circuits.EAP().discover(model, task).scores
    size = float(single.abs().max())
    torch.testing.assert_close(scores.float(), single, atol=0.3 * atol * size + 1e-5, rtol=0)


def test_two_types_in_one_model_are_refused(task):
    model = model_of()
    model.original_model.model.layers[1].mlp.bfloat16()
    with pytest.raises(circuits.InputError, match=r"is in torch\.bfloat16 and other weights"):
        circuits.EAP().discover(model, task)


def state(model) -> list:
    modules = [*model.modules(), *model.original_model.modules()]
    hooks = [len(each._forward_hooks) + len(each._backward_hooks) for each in modules]
    return [
        [each.training for each in modules],
        hooks,
        [each.requires_grad for each in model.original_model.parameters()],
        [each.grad is None for each in model.original_model.parameters()],
        [each._version for each in model.original_model.parameters()],
        dict(vars(model.cfg)),
    ]


@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_nothing_of_a_model_is_left_changed(name, task):
    model = model_of(name)
    model.train()
    model.original_model.model.layers[0].mlp.requires_grad_(False)
    before = state(model)
    graph = circuits.component_graph(model)
    circuits.EAP().discover(model, task)
    circuits.ActivationPatching().discover(model, task)
    circuits.evaluate(model, circuits.Circuit.full(graph), task)
    with pytest.raises(KeyboardInterrupt):
        circuits.ACDC(0.1).discover(model, task, progress=interrupt)
    assert state(model) == before


def interrupt(done: int, total: int) -> None:
    if done:
        raise KeyboardInterrupt


def test_threads_that_share_a_bridge_find_what_each_finds_alone(task):
    model = model_of()
    graph = circuits.component_graph(model)
    few = circuits.EAP().discover(model, task).top(20)
    computations = {
        "eap": lambda: circuits.EAP().discover(model, task, graph=graph).scores,
        "hooks": lambda: circuits.run_circuit(model, few, task, executor="hooks"),
        "incremental": lambda: circuits.run_circuit(model, few, task, executor="incremental"),
    }
    alone = {name: compute() for name, compute in computations.items()}

    def same_each_time(name: str) -> bool:
        found = [computations[name]() for _ in range(3)]
        return all(torch.allclose(each, alone[name], equal_nan=True) for each in found)

    with ThreadPoolExecutor(len(computations)) as pool:
        results = dict(zip(computations, pool.map(same_each_time, computations), strict=True))
    assert results == dict.fromkeys(computations, True)


def test_a_copy_of_a_bridge_is_a_model_of_its_own(task):
    model = model_of()
    other = copy.deepcopy(model)
    expected = circuits.EAP().discover(model, task).scores
    other.blocks[1].mlp.out.weight.data.mul_(0.5)
    assert not torch.allclose(circuits.EAP().discover(other, task).scores, expected)
    torch.testing.assert_close(circuits.EAP().discover(model, task).scores, expected)


def test_passes_of_a_bridge_are_counted(task):
    model = model_of()
    with counting_passes(model) as counts:
        circuits.model_logits(model, task)
    assert counts == {"forward_passes": 1, "prompts_run": 3}
