"""What a GPU finds is what the CPU finds. Run where there is one, skipped elsewhere."""

import pytest
import torch
from random_transcoders import model_of, random_transcoders
from zoo import config_of, hugging_face_model, word_tokenizer

import circuits
from circuits.attribution.feature_graph import FEATURE
from circuits.attribution.interventions import Intervention, direct_effects
from circuits.transcoders.activations import JumpReLU, ReLU
from circuits.transcoders.training.train import Training, train_transcoders
from circuits.transcoders.transcoder import Encoder, Transcoders

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")
SETS = ("toy-world-plt", "toy-world-skip-plt", "toy-world-clt")


@pytest.fixture(autouse=True)
def float32_is_float32():
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    yield
    torch.backends.cuda.matmul.allow_tf32 = before


def on_both(make):
    """What `make` gives for a device and toy-world on it: on the CPU, then on the GPU."""
    return [
        make(device, circuits.load_model("toy-world", device=device)) for device in ("cpu", "cuda")
    ]


def assert_same_graph(here, there, tolerance=2e-5):
    for column in ("kind", "layer", "position", "index"):
        assert torch.equal(getattr(here.nodes, column), getattr(there.nodes, column)), column
    torch.testing.assert_close(there.adjacency(), here.adjacency(), rtol=0, atol=tolerance)
    torch.testing.assert_close(there.constants, here.constants, rtol=0, atol=tolerance)


@pytest.mark.parametrize("name", ["llama", "gemma3", "gptj", "bloom", "gpt-oss"])
def test_a_checkpoint_loaded_as_a_bridge_has_the_same_scores(name, tmp_path):
    source = hugging_face_model(config_of(name))
    source.save_pretrained(tmp_path)
    word_tokenizer(source.config.vocab_size).save_pretrained(tmp_path)
    generator = torch.Generator().manual_seed(5)
    clean, corrupted = torch.randint(1, 96, (2, 3, 8), generator=generator)
    task = circuits.Task.from_tokens(clean, corrupted, clean[:, 0], clean[:, 1])
    scores = []
    for device in ("cpu", "cuda"):
        model = circuits.load_model(tmp_path, device=device, backend="bridge")
        scores.append(circuits.EAP().discover(model, task).scores.cpu())
    here, there = scores
    assert float((there - here).abs().max()) < 1e-4 * float(here.abs().max())


@pytest.mark.parametrize("budget", [None, 20])
@pytest.mark.parametrize("name", SETS)
def test_a_graph_is_the_same(name, budget):
    def graph(device, model):
        method = circuits.AttributionGraph(
            circuits.load_transcoders(name, device=device), budget=budget, at_a_time=8
        )
        prompts = circuits.load_task("ioi", model, n=3, split="test")
        rows = [prompts.clean[row, : int(prompts.lengths[row])] for row in range(3)]
        return method.attribute_all(model, rows)

    for here, there in zip(*on_both(graph), strict=True):
        assert int(here.is_kind(FEATURE).sum()) > 15
        assert_same_graph(here, there)
        torch.testing.assert_close(
            circuits.node_influence(there), circuits.node_influence(here), rtol=0, atol=1e-4
        )


@pytest.mark.parametrize("kind", ["plt", "skip-plt", "clt"])
@pytest.mark.parametrize("architecture", ["gpt2", "gemma2", "pythia"])
def test_architectures(architecture, kind):
    graphs = []
    for device in ("cpu", "cuda"):
        model = model_of(architecture)
        transcoders = random_transcoders(model, kind)
        graphs.append(
            circuits.AttributionGraph(transcoders.to(device)).attribute(
                model.to(device), [3, 14, 15, 9, 26, 5]
            )
        )
    assert_same_graph(*graphs)


def test_a_circuit_of_features_has_the_same_damage():
    def damage(device, model):
        method = circuits.AttributionGraph(
            circuits.load_transcoders("toy-world-clt", device=device)
        )
        task = circuits.load_task("ioi", model, n=4, split="test")
        circuit = method.discover(model, task)
        return circuit, circuits.evaluate(model, circuit, task, transcoders=method.loaded)

    (circuit, here), (other, there) = on_both(damage)
    assert torch.equal(circuit.kept, other.kept)
    assert there.kl == pytest.approx(here.kl, abs=1e-4)
    assert there.logit_difference == pytest.approx(here.logit_difference, abs=1e-3)


def test_direct_effects_are_the_same():
    def effects(device, model):
        transcoders = circuits.load_transcoders("toy-world-clt", device=device)
        prompt = circuits.load_task("two_hop", model, n=1, split="test").clean[0]
        graph = circuits.AttributionGraph(transcoders).attribute(model, prompt)
        return direct_effects(
            model, transcoders, prompt, [[], [Intervention.scale(graph.node(0), 2.0)]]
        ).logits.cpu()

    torch.testing.assert_close(*on_both(effects), rtol=0, atol=1e-4)


def test_edges_are_carried_by_the_same_heads():
    def shares(device, model):
        transcoders = circuits.load_transcoders("toy-world-clt", device=device)
        prompt = circuits.load_task("ioi", model, n=1, split="test").clean[0]
        return circuits.head_shares(
            model,
            transcoders,
            circuits.pruned(circuits.AttributionGraph(transcoders).attribute(model, prompt)),
        )

    here, there = on_both(shares)
    torch.testing.assert_close(there.cpu(), here, rtol=0, atol=2e-5)


@pytest.mark.parametrize("top_k", [None, 5])
def test_features_are_found_in_the_same_places(top_k):
    transcoders = circuits.load_transcoders("toy-world-plt")
    states = {
        layer: torch.randn(2, 40, 128, generator=torch.Generator().manual_seed(layer))
        for layer in range(4)
    }
    found = [
        circuits.extract_features(
            {layer: each.to(device) for layer, each in states.items()},
            transcoders.to(device),
            top_k=top_k,
        ).table()
        for device in ("cpu", "cuda")
    ]
    assert len(found[0]) > 300
    assert found[0].drop(columns="activation").equals(found[1].drop(columns="activation"))
    assert abs(found[0].activation - found[1].activation).max() < 1e-4


@pytest.mark.parametrize("max_memory", [None, 1 << 14])
@pytest.mark.parametrize("activation", ["relu", "jump_relu"])
def test_of_equal_activations_the_same_are_taken(activation, max_memory):
    """Whole numbers, which have no rounding in bfloat16, and of which many are equal."""
    generator = torch.Generator().manual_seed(0)
    fires = {"relu": ReLU(), "jump_relu": JumpReLU(torch.full((96,), 2.5))}[activation]
    weights = [torch.randint(-1, 2, (96, 8), generator=generator).bfloat16() for _ in range(3)]
    nothing = torch.zeros(96, 1, 8).bfloat16()
    transcoders = Transcoders(
        [Encoder(weight, weight[:, 0] * 0, fires) for weight in weights],
        [nothing] * 3,
        [nothing[0, 0]] * 3,
    )
    states = {
        layer: torch.randint(-2, 3, (2, 30, 8), generator=generator).bfloat16()
        for layer in range(3)
    }
    here, there = (
        circuits.extract_features(
            {layer: each.to(device) for layer, each in states.items()},
            transcoders.to(device),
            2,
            1.0,
            max_memory=max_memory,
        ).table()
        for device in ("cpu", "cuda")
    )
    assert len(here) > 250
    assert here.equals(there)


@pytest.mark.parametrize("kind", ["plt", "skip-plt", "clt"])
def test_transcoders_are_trained_there(kind):
    def trained(device, model):
        def batches(step):
            generator = torch.Generator().manual_seed(step)
            tokens = torch.randint(5, 600, (4, 20), generator=generator)
            return tokens.to(device), torch.ones_like(tokens, dtype=torch.bool).to(device)

        return train_transcoders(model, batches, Training(kind, 32, k=(4,), steps=5))

    here, there = on_both(trained)
    for mine, theirs in zip(here.encoders, there.encoders, strict=True):
        assert theirs.weight.device.type == "cuda"
        # Adam's first steps are signs of gradients, so that rounding can turn single ones around.
        assert float((theirs.weight.cpu() - mine.weight).abs().mean()) < 1e-4


@pytest.mark.parametrize(
    "method",
    [circuits.ACDC(0.01), circuits.EAP(), circuits.BatchedACDC(0.01)],
    ids=lambda method: method.name,
)
def test_component_circuits_are_the_same(method):
    (here, there) = on_both(
        lambda device, model: method.discover(
            model, circuits.load_task("ioi", model, n=8, split="train")
        )
    )
    if here.kept is not None:
        assert (
            int((here.kept != there.kept).sum()) <= 2
        )  # an edge within rounding of the threshold may fall on either side
    same = ~here.scores.isnan() & ~there.scores.isnan()
    assert int(same.sum()) > 200
    torch.testing.assert_close(there.scores.cpu()[same], here.scores[same], rtol=0, atol=2e-4)


@pytest.mark.parametrize("name", ["noise", "mean"])
def test_what_replaces_outputs_and_what_is_inside_a_circuits_run_are_the_same(name):
    names = ["a2.h1", "m1", "blocks.1.attn.hook_pattern", "blocks.2.hook_q_input"]

    def found(device, model):
        task = circuits.load_task("ioi", model, n=6, split="train")
        # Prompts of another length, on the CPU.
        other = circuits.load_task("greater_than", model, n=9, split="train").to("cpu")
        ablation = circuits.Ablation("noise")
        if name == "mean":
            ablation = circuits.Ablation("mean", over=other)
        circuit = circuits.Circuit.from_edges(
            circuits.component_graph(model), ["embed->a0.h1.v", "a0.h1->m1", "m1->logits"]
        )
        inside = circuits.circuit_activations(model, circuit, task, names, ablation=ablation)
        logits = circuits.run_circuit(model, circuit, task, ablation=ablation)
        scores = circuits.EAPIG(steps=2, ablation=ablation).discover(model, task).scores
        heads = circuits.ActivationPatching(ablation=ablation).heads(model, task)
        return [*inside.values(), logits, scores, heads]

    for here, there in zip(*on_both(found), strict=True):
        torch.testing.assert_close(there.cpu(), here, rtol=1e-4, atol=2e-4)


@pytest.mark.parametrize(
    "mode",
    [
        lambda: torch.autocast("cuda", dtype=torch.bfloat16),
        lambda: torch.device("cuda"),
        torch.inference_mode,
    ],
    ids=["autocast", "default device", "inference mode"],
)
def test_results_are_those_without_the_mode(mode):
    model = circuits.load_model("toy-world", device="cuda")
    task = circuits.load_task("ioi", model, n=4)
    methods = [circuits.EAP(), circuits.ACDC(0.02), circuits.ActivationPatching()]
    plain = [method.discover(model, task).scores for method in methods]
    logits = circuits.model_logits(model, task)
    with mode():
        found = [method.discover(model, task).scores for method in methods]
        again = circuits.model_logits(model, task)
    for here, there in zip((*plain, logits), (*found, again), strict=True):
        torch.testing.assert_close(there, here, rtol=0, atol=1e-5, equal_nan=True)


def test_a_model_moved_behind_its_settings_is_refused():
    model = circuits.load_model("toy-world", device="cpu")
    task = circuits.load_task("ioi", model, n=2)
    torch.nn.Module.cuda(model)
    with pytest.raises(circuits.InputError, match=r"on cuda:0 and cfg\.device is cpu"):
        circuits.model_logits(model, task)
