"""Models that a user has changed inside: HookedTransformers, which TransformerLens 4 has not."""

import copy
import warnings

import pytest
import torch
from architectures import random_model, random_task
from finite_differences import differentiated_by_hand
from torch import nn

pytest.importorskip("transformer_lens.HookedTransformer")

from changed_models import (
    HONOURED,
    MIXES_PROMPTS,
    READS_PADDING,
    REFUSED,
    WithoutMLPInput,
    at_position,
    hook,
    module_at,
)
from transformer_lens.components import (
    AbstractAttention,
    LayerNorm,
    TransformerBlock,
    abstract_attention as attention_functions,
)
from transformer_lens.components.mlps import mlp as mlp_functions

import circuits
from circuits.discovery.methods.eap import EAP
from circuits.models import check_model, check_unchanged
from circuits.runs.circuit_run import counting_passes
from circuits.system.code_digest import code_digest
from circuits.tasks.task import Task

# Many models and methods: types are checked where each is tested.
pytestmark = pytest.mark.usefixtures("unchecked_types")


@pytest.fixture(scope="module")
def task() -> Task:
    return random_task(ragged=True, several=True)


ACTS_ON_PADDING = {
    "the last position of an MLP": hook("blocks.1.hook_mlp_out", at_position(-1, torch.zeros_like)),
    "the last position of heads": hook("blocks.1.attn.hook_z", at_position(-1, lambda z: z * 3)),
    "the last position of logits": hook("unembed.hook_out", at_position(-1, lambda x: x * 3)),
    "the last position of embeddings": hook("hook_embed", at_position(-1, lambda x: x * 3)),
    "the mean over positions": hook("blocks.0.hook_mlp_out", lambda x: x - x.mean(1, keepdim=True)),
    "the other way round": hook("blocks.1.hook_mlp_out", lambda x: x + x.flip(1)),
}


class Adapter(nn.Module):
    """Around a module of TransformerLens, with some of its parts under the names that they had."""

    def __init__(self, base: nn.Module, *names: str) -> None:
        super().__init__()
        self.base = base
        for name in names:
            setattr(self, name, getattr(base, name))

    def forward(self, *args, **kwargs):
        return self.base(*args, **kwargs)


def around_attention(attention: nn.Module) -> nn.Module:
    points = [name for name, _ in attention.named_children()]
    return Adapter(attention, *points, "W_O", "b_O", "W_Q", "W_K", "W_V", "cfg")


SECOND_NAMES = {
    "all layers": lambda model: setattr(model, "layers", model.blocks),
    "one layer": lambda model: setattr(model, "probe_layer", model.blocks[1]),
    "one hook point": lambda model: setattr(model, "probe", model.blocks[1].hook_resid_post),
    "an adapter around an MLP": module_at("blocks.1.mlp", lambda mlp: Adapter(mlp, "hook_pre")),
    "an adapter around attention": module_at("blocks.1.attn", around_attention),
}


def with_half_norms(model):
    for norm in filter(lambda part: isinstance(part, LayerNorm), model.modules()):
        norm.register_forward_hook(lambda norm, given, out: out / 2)


def with_half_patterns(model):
    for layer in range(2):
        hook(f"blocks.{layer}.attn.hook_pattern", lambda x: x / 2)(model)


def with_half_weights(model):
    for parameter in (each for block in model.blocks for each in block.mlp.parameters()):
        parameter.data /= 2


# What is patched for all models, and the same change of one model.
PATCHES = {
    "a method": (LayerNorm, "forward", with_half_norms),
    "a function of a module": (mlp_functions, "batch_addmm", with_half_weights),
    "a function of torch": (nn.functional, "softmax", with_half_patterns),
}


MIXING_PATCHES = {
    "an MLP": (mlp_functions.MLP, "forward", lambda x: x - x.mean(0)),
    "heads": (AbstractAttention, "calculate_attention_scores", lambda x: x.roll(1, 0)),
    "one way of reading": (attention_functions, "simple_attn_linear", lambda x: x * 1.5),
}


class TestModelsThatAUserHasChanged:
    """The whole circuit is the model and the empty one its corrupted run, or both are refused."""

    @pytest.fixture(autouse=True)
    def reference_executor_is_said_to_be_used(self, recwarn):
        warnings.simplefilter("default")

    @pytest.mark.parametrize("change", HONOURED)
    def test_are_run_as_they_are(self, change, task):
        model = random_model("gpt2")
        HONOURED[change](model)
        if change in READS_PADDING:
            task = task[task.lengths == task.clean.shape[1]]
        graph = circuits.component_graph(model)
        kept = torch.stack([~graph.mask([]), graph.mask([])])
        expected = torch.stack(
            [whole_logits(model, tokens)[task.scored] for tokens in (task.clean, task.corrupted)]
        )
        torch.testing.assert_close(
            circuits.model_logits(model, task), expected[0], atol=1e-4, rtol=0
        )
        for executor in ("auto", "hooks"):
            found = circuits.run_circuits(model, graph, kept, task, executor=executor)
            torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)

    @pytest.mark.parametrize("change", ACTS_ON_PADDING)
    @torch.no_grad()
    def test_are_refused_where_they_act_on_padding_and_give_logits_of_prompts_alone(
        self, change, unequal
    ):
        model = circuits.load_model("toy-world")
        whole = circuits.Circuit.full(circuits.component_graph(model))
        ACTS_ON_PADDING[change](model)
        clean, corrupted = (
            [model(row[None, :n])[0] for row, n in zip(tokens, mask.sum(1), strict=True)]
            for tokens, mask, _ in unequal.masked_prompts
        )
        rows = [
            (clean[prompt][position], corrupted[prompt][unequal.alignment[prompt, position]])
            for prompt, position in unequal.scored.nonzero().tolist()
        ]
        for prompts, expected in zip(("clean", "corrupted"), zip(*rows, strict=True), strict=True):
            found = circuits.model_logits(model, unequal, prompts)
            torch.testing.assert_close(found, torch.stack(expected), atol=1e-4, rtol=1e-4)
        told = "padding follows a prompt"
        for compute in (
            lambda: circuits.run_circuit(model, whole, unequal),
            lambda: circuits.circuit_activations(model, whole, unequal, ["m1"]),
            lambda: circuits.EAP().discover(model, unequal),
        ):
            with pytest.raises(circuits.InputError, match=told):
                compute()

    def test_means_over_prompts_with_padding_that_a_hook_acts_on_are_refused(self, task):
        model = random_model("gpt2")
        even = task[task.lengths == task.clean.shape[1]]
        whole = circuits.Circuit.full(circuits.component_graph(model))
        ACTS_ON_PADDING["the last position of an MLP"](model)
        circuits.run_circuit(model, whole, even, ablation=circuits.Ablation("mean", over=even))
        with pytest.raises(circuits.InputError, match="padding follows a prompt"):
            circuits.run_circuit(model, whole, even, ablation=circuits.Ablation("mean", over=task))

    @pytest.mark.parametrize("change", SECOND_NAMES)
    def test_second_names_of_modules_change_nothing(self, change, task, monkeypatch):
        model = random_model("gpt2")
        graph = circuits.component_graph(model)
        kept = torch.stack([~graph.mask([]), graph.mask([])])
        expected = circuits.run_circuits(model, graph, kept, task)
        scores = circuits.EAP().discover(model, task).scores
        SECOND_NAMES[change](model)
        built = []
        initial = TransformerBlock.__init__
        with monkeypatch.context() as patch:
            patch.setattr(
                TransformerBlock,
                "__init__",
                lambda block, *args: (built.append(block), initial(block, *args))[1],
            )
            check_model(model)
        assert len(built) <= 1
        torch.testing.assert_close(circuits.run_circuits(model, graph, kept, task), expected)
        found = circuits.EAP().discover(model, task).scores
        torch.testing.assert_close(found, scores, atol=1e-6, rtol=1e-4)

    @pytest.mark.parametrize("change", REFUSED)
    def test_are_refused_in_one_line_where_circuits_would_not_be_theirs(self, change, task):
        model = random_model("gpt2")
        graph = circuits.component_graph(model)
        make, told = REFUSED[change]
        make(model)
        whole = circuits.Circuit.full(graph)
        for compute in (
            lambda: circuits.run_circuit(model, whole, task),
            lambda: circuits.run_circuit(model, whole, task, executor="hooks"),
            lambda: circuits.EAP().discover(model, task, graph=graph),
        ):
            with pytest.raises(circuits.InputError, match=told) as error:
                compute()
            assert "\n" not in str(error.value) and len(str(error.value)) <= 500

    @pytest.mark.parametrize("patch", PATCHES)
    def test_a_patch_of_a_library_is_what_the_same_change_of_a_model_is(
        self, patch, task, monkeypatch
    ):
        patched, changed = random_model("gpt2"), random_model("gpt2")
        whole = circuits.Circuit.full(circuits.component_graph(patched))
        owner, name, change = PATCHES[patch]
        change(changed)
        logits = circuits.run_circuit(changed, whole, task)
        expected = circuits.EAP().discover(changed, task).scores
        plain = getattr(owner, name)
        monkeypatch.setattr(owner, name, lambda *args, **rest: plain(*args, **rest) / 2)
        found = circuits.run_circuit(patched, whole, task)
        torch.testing.assert_close(found, logits, atol=1e-4, rtol=0)
        found = circuits.EAP().discover(patched, task).scores
        torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-4)

    @pytest.mark.parametrize("patch", MIXING_PATCHES)
    def test_a_patch_of_a_library_that_acts_in_some_runs_only_is_refused(
        self, patch, task, monkeypatch
    ):
        model = random_model("gpt2")
        graph = circuits.component_graph(model)
        owner, name, change = MIXING_PATCHES[patch]
        plain = getattr(owner, name)
        monkeypatch.setattr(owner, name, lambda *args: change(plain(*args)))
        for compute in (
            lambda: circuits.evaluate(model, circuits.Circuit.full(graph), task),
            lambda: circuits.EAP().discover(model, task),
        ):
            with pytest.raises(circuits.InputError, match=f"computes other .* another {name} "):
                compute()

    @pytest.mark.parametrize("masked", [-1e9, -1e4])
    def test_a_masked_token_does_not_hide_what_mixes_prompts(self, masked, task):
        model = random_model("gpt2")
        model.unembed.b_U.data[:40] = masked
        whole = circuits.Circuit.full(circuits.component_graph(model))
        circuits.run_circuit(model, whole, task, executor="hooks")
        MIXES_PROMPTS["the mean"](model)
        with pytest.raises(circuits.InputError, match="computes other logits"):
            circuits.run_circuit(model, whole, task)

    def test_a_layer_in_which_edges_cannot_be_ablated_is_refused_if_any_are(self, task):
        model = random_model("gpt2")
        graph = circuits.component_graph(model)
        model.blocks[1].__class__ = WithoutMLPInput
        whole = circuits.Circuit.full(graph)
        expected = whole_logits(model, task.clean)[task.scored]
        found = circuits.run_circuit(model, whole, task)
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)
        none = circuits.run_circuits, (model, graph, graph.mask([])[None], task)
        for compute, arguments in (none, (circuits.EAP().discover, (model, task))):
            told = r"blocks\.1\.hook_mlp_in is not computed.* a WithoutMLPInput at blocks\.1\."
            with pytest.raises(circuits.InputError, match=told):
                compute(*arguments)

    def test_another_method_in_a_class_of_transformer_lens_is_honoured(self, task, monkeypatch):
        model = random_model("gpt2")
        whole = circuits.Circuit.full(circuits.component_graph(model))
        forward = LayerNorm.forward
        monkeypatch.setattr(LayerNorm, "forward", lambda norm, x: forward(norm, x) * 0.5)
        with pytest.raises(circuits.InputError, match="another forward method at the class Layer"):
            check_unchanged(model)
        expected = whole_logits(model, task.clean)[task.scored]
        found = circuits.run_circuit(model, whole, task)
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)

    @pytest.mark.parametrize("change", [name for name in MIXES_PROMPTS if name != "chance"])
    def test_the_logits_of_a_prompt_are_what_it_gives_alone(self, change, task):
        model = random_model("gpt2")
        MIXES_PROMPTS[change](model)
        alone = [whole_logits(model, tokens[None])[0] for tokens in task.clean]
        expected = torch.stack(alone)[task.scored]
        found = circuits.model_logits(model, task)
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)

    def test_noise_for_an_embedding_without_weights_is_refused(self, task):
        model = random_model("gpt2")
        HONOURED["a wrapped embedding"](model)
        whole = circuits.Circuit.full(circuits.component_graph(model))
        told = r"has no embed\.W_E: it has a Wrapper at embed"
        with pytest.raises(circuits.InputError, match=told):
            circuits.run_circuit(model, whole, task, ablation="noise")

    def test_a_hook_that_fails_with_separate_inputs_is_named(self, task):
        def change(x, hook):
            _, _, d_model = x.shape
            return x / d_model

        model = random_model("gpt2")
        model.add_hook("blocks.1.ln1.hook_normalized", change)
        whole = circuits.Circuit.full(circuits.component_graph(model))
        told = r"ValueError: 'too many values .*blocks\.1\.ln1\.hook_normalized"
        with pytest.raises(circuits.InputError, match=told):
            circuits.run_circuit(model, whole, task)

    def test_a_hook_that_mixes_the_embeddings_of_tokens_is_honoured(self, task):
        model = random_model("gpt2")
        model.add_hook("hook_embed", lambda x, hook: x + x.mean(1, keepdim=True))
        even = task[task.lengths == task.clean.shape[1]]
        graph = circuits.component_graph(model)
        kept = torch.stack([~graph.mask([]), graph.mask([])])
        found = circuits.run_circuits(model, graph, kept, even)
        for logits, tokens in zip(found, (even.clean, even.corrupted), strict=True):
            expected = whole_logits(model, tokens)[even.scored]
            torch.testing.assert_close(logits, expected, atol=1e-4, rtol=0)

    def test_a_hook_of_torch_on_all_modules_is_honoured(self, task):
        def halve_norms(module, arguments, output):
            return output * 0.5 if type(module).__name__ == "LayerNorm" else None

        model = random_model("gpt2")
        whole = circuits.Circuit.full(circuits.component_graph(model))
        handle = torch.nn.modules.module.register_module_forward_hook(halve_norms)
        try:
            found, expected = circuits.run_circuit(model, whole, task), model(task.clean)
        finally:
            handle.remove()
        torch.testing.assert_close(found, expected[task.scored].detach(), atol=1e-4, rtol=0)

    def test_a_hook_that_writes_over_what_gradients_need_is_refused(self, task):
        model = random_model("gpt2")
        model.add_hook("blocks.1.ln1.hook_scale", lambda x, hook: x.mul_(0.5))
        with pytest.raises(circuits.InputError, match=r"in place .*ln1\.hook_scale"):
            circuits.EAP().discover(model, task)

    def test_hooks_in_a_context_act_inside_of_it_only(self, task):
        model = random_model("gpt2")
        graph = circuits.component_graph(model)
        whole = circuits.Circuit.full(graph)
        halve = ("ln_final.hook_normalized", lambda x, hook: x * 0.5)
        with model.hooks(fwd_hooks=[halve]):
            inside, expected = circuits.run_circuit(model, whole, task), model(task.clean)
        torch.testing.assert_close(inside, expected[task.scored].detach(), atol=1e-4, rtol=0)
        outside = circuits.run_circuit(model, whole, task)
        torch.testing.assert_close(
            outside, whole_logits(model, task.clean)[task.scored], atol=1e-4, rtol=0
        )

    def test_are_searched_and_evaluated_as_they_are(self, task):
        model = random_model("gpt2")
        HONOURED["a hook on the last norm"](model)
        circuit = circuits.ACDC(0.05).discover(model, task)
        evaluation = circuits.evaluate(model, circuit, task)
        expected = whole_logits(model, task.clean)[task.scored]
        metric = circuits.tasks.metrics.METRICS["logit_difference"]
        mean = float(metric.function(expected, expected, task).mean())
        assert evaluation.table().loc["logit_difference", "model"] == pytest.approx(mean, abs=1e-4)
        whole = circuits.evaluate(model, circuits.Circuit.full(circuit.graph), task)
        assert whole.kl == pytest.approx(0, abs=1e-5)


def whole_logits(model, tokens) -> torch.Tensor:
    with torch.no_grad():
        return model(tokens)


# Gradients


@pytest.mark.parametrize("change", HONOURED)
def test_eap_of_a_model_that_a_user_has_changed_is_the_derivative_of_what_it_computes(change):
    model, task = random_model("gpt2", dtype=torch.float64), random_task(batch=3)
    HONOURED[change](model)
    graph = circuits.component_graph(model)
    some = torch.arange(0, len(graph), 5)
    few = circuits.Graph(graph.nodes, graph.source[some], graph.target[some], graph.slot[some])
    expected = differentiated_by_hand(model, few, task, "logit_difference")
    scores = EAP().discover(model, task, graph=few).scores
    torch.testing.assert_close(
        scores, expected.float(), atol=2e-6 * float(expected.abs().max()), rtol=1e-4
    )


BACKWARD = {
    "the other way round": hook("blocks.1.hook_mlp_out", lambda g: (g.flip(0),), "bwd"),
    "the mean": hook("blocks.0.hook_mlp_out", lambda g: (g.mean(0).expand_as(g),), "bwd"),
    "by axis": hook(
        "blocks.1.ln1.hook_normalized", lambda g: (g.index_fill(2, torch.tensor(1), 0),), "bwd"
    ),
}


@pytest.mark.parametrize("change", BACKWARD)
def test_a_hook_that_mixes_the_gradients_of_prompts_is_refused(change):
    model, task = random_model("gpt2"), random_task()
    BACKWARD[change](model)
    told = r"computes other gradients .* hook at blocks\.\d\."
    with pytest.raises(circuits.InputError, match=told):
        EAP().discover(model, task)


def test_a_hook_that_gives_one_gradient_for_all_prompts_is_refused():
    model = random_model("gpt2")
    hook("blocks.0.hook_mlp_out", lambda g: (g[:1],), "bwd")(model)
    with pytest.raises(circuits.InputError, match=r"changed the size .* hook at blocks\.0\."):
        EAP().discover(model, random_task())


def test_a_hook_that_scales_gradients_scales_scores():
    model, task = random_model("gpt2"), random_task()
    plain = EAP().discover(model, task).scores
    hook("blocks.1.hook_resid_post", lambda g: (g * 0.5,), "bwd")(model)
    into_logits = torch.tensor(
        [isinstance(e.target, circuits.Logits) for e in circuits.component_graph(model).edges]
    )
    scores = EAP().discover(model, task).scores
    torch.testing.assert_close(
        scores[~into_logits], plain[~into_logits] * 0.5, atol=1e-6, rtol=1e-4
    )


# Digests


def test_every_change_of_a_model_changes_its_digest_and_what_this_package_does_changes_none():
    model = random_model("gpt2")
    plain = code_digest(model)
    digests = {plain.text: "no change"}
    for name in (
        "a hook of torch on the last norm", "another forward of an MLP", "another activation",
        "an adapter beside the unembedding", "weight norm", "no norm before attention",
        "another epsilon in a norm", "another scale of attention",
        "attention that sees later tokens",
    ):  # fmt: skip
        changed = copy.deepcopy(model)
        HONOURED[name](changed)
        digest = code_digest(changed)
        assert not digest.unknown
        assert digests.setdefault(digest.text, name) == name
    with counting_passes(model):
        circuits.EAP().discover(model, random_task())
        circuits.ACDC(0.02).discover(model, random_task())
        assert code_digest(model) == plain == code_digest(copy.deepcopy(model).train())
    model.add_hook("blocks.0.hook_mlp_out", lambda x, hook: x * model.cfg.n_layers)
    assert code_digest(model) != plain
    model.reset_hooks()
    assert code_digest(model) == plain
