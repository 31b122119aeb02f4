"""Models of TransformerLens' two classes, made from the same weights, and Hugging Face's own."""

from functools import cache, partial

import pytest
import torch
from finite_differences import differentiated_by_hand
from random_transcoders import random_transcoders
from zoo import READ, REFUSED, SINCE_4, bridge_to, config_of, hugging_face_model, word_tokenizer

import circuits
from circuits.attribution.local_model import freeze
from circuits.models import (
    HAS_HOOKED_TRANSFORMER,
    residual_hook,
    run_to_logits,
    run_to_residual,
    shape_of,
    unembed,
    weights_of,
)
from circuits.models.component_graph import component_nodes
from circuits.models.identity import identity
from circuits.models.source_outputs import keepers, source_outputs
from circuits.transcoders.training.train import Training, train_transcoders

# Many models and methods: types are checked where each is tested.
pytestmark = pytest.mark.usefixtures("unchecked_types")

VOCAB = 96
# Both classes have these.
IN_BOTH = (
    "toy-world", "gpt2", "llama", "qwen2", "qwen3", "pythia", "mistral", "mixtral", "opt", "phi3",
    "gpt-oss", "gptj", "bloom",
)  # fmt: skip
# Without and with a scale or a bound of the logits.
OF_LOGITS = ("llama", "granite", "cohere", "cohere2", "gemma2")
# A norm after attention and MLP.
AFTER = ("gemma2", "gemma3", "glm4")
ALL = [*READ, *([] if HAS_HOOKED_TRANSFORMER else SINCE_4)]


@pytest.fixture(scope="session")
def folder_of(tmp_path_factory):
    """A folder with a small random model, saved once."""

    @cache
    def saved(name: str) -> str:
        folder = tmp_path_factory.mktemp("model") / name
        hugging_face_model(config_of(name)).save_pretrained(folder)
        word_tokenizer(config_of(name).vocab_size).save_pretrained(folder)
        return str(folder)

    return saved


@pytest.fixture(scope="session")
def place_of(folder_of):
    """What `load_model` takes."""
    return lambda name: name if name == "toy-world" else folder_of(name)


@pytest.fixture(scope="session")
def load(place_of):
    """A model, loaded once."""

    @cache
    def loaded(name: str, backend: str = "bridge"):
        return circuits.load_model(place_of(name), device="cpu", backend=backend)

    return loaded


def task_of(model, *, batch: int = 3, length: int = 10) -> circuits.Task:
    generator = torch.Generator().manual_seed(5)
    drawn = partial(torch.randint, 1, min(VOCAB, shape_of(model).d_vocab), generator=generator)
    clean = drawn((batch, length))
    corrupted = clean.clone()
    corrupted[:, 2], corrupted[:, 5] = drawn((batch,)), drawn((batch,))
    return circuits.Task.from_tokens(clean, corrupted, drawn((batch,)), drawn((batch,)))


def random_circuits(graph, n: int = 4) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    shares = torch.linspace(0.95, 0.3, n)[:, None]
    return torch.rand(n, len(graph), generator=generator) < shares


def assert_same(found, expected, share: float = 1e-5) -> None:
    largest = float(expected.abs().max())
    torch.testing.assert_close(found, expected, rtol=0, atol=share * largest)


# The two classes


METHODS = {
    "eap": circuits.EAP(),
    "eap at both ends": circuits.EAP(gradient_at="both"),
    "eap-ig along inputs": circuits.EAPIG(steps=2),
    "eap-ig along activations": circuits.EAPIG(steps=2, along="activations"),
}
both_classes = pytest.mark.skipif(not HAS_HOOKED_TRANSFORMER, reason="one class only")


@both_classes
@pytest.mark.parametrize("name", IN_BOTH)
def test_both_classes_give_every_edge_the_same_score(name, place_of):
    # In float32 scores that cancel to a hundredth of their terms differ by more than this.
    hooked, bridge = (
        circuits.load_model(place_of(name), device="cpu", dtype=torch.float64, backend=backend)
        for backend in ("hooked_transformer", "bridge")
    )
    task = task_of(bridge)
    for method in METHODS.values():
        expected = method.discover(hooked, task).scores
        assert_same(method.discover(bridge, task).scores, expected)


@both_classes
@pytest.mark.parametrize("name", IN_BOTH)
def test_both_classes_run_circuits_to_the_same_logits_and_have_the_same_circuit(name, load):
    hooked, bridge = load(name, "hooked_transformer"), load(name)
    task = task_of(bridge)
    graph = circuits.component_graph(bridge)
    kept = random_circuits(graph)
    assert graph.edges == circuits.component_graph(hooked).edges
    for executor in ("hooks", "incremental"):
        found, expected = (
            circuits.run_circuits(model, graph, kept, task, executor=executor)
            for model in (bridge, hooked)
        )
        assert_same(found, expected)
    patching = circuits.ActivationPatching(metric="kl")
    ours, effects = (patching.discover(each, task).scores for each in (bridge, hooked))
    assert_same(ours, effects)
    # Not the effect of any edge, which rounding would decide.
    method = circuits.ACDC(1.05 * float(effects.quantile(0.8)), metric="kl")
    found, expected = (method.discover(each, task) for each in (bridge, hooked))
    assert torch.equal(found.kept, expected.kept) and 0 < len(found) < len(graph)


@both_classes
@pytest.mark.parametrize("name", IN_BOTH)
def test_a_fingerprint_does_not_depend_on_the_class(name, load):
    found, expected = (identity(load(name, each)) for each in ("bridge", "hooked_transformer"))
    assert (found.weights, found.shape) == (expected.weights, expected.shape)


@both_classes
def test_a_weight_that_no_run_reads_need_not_be_finite(place_of):
    # BLOOM has no position embedding. TransformerLens makes one, of memory as it happens to be.
    model = circuits.load_model(place_of("bloom"), device="cpu", backend="hooked_transformer")
    task = task_of(model)
    expected = circuits.model_logits(model, task)
    with torch.no_grad():
        model.pos_embed.W_pos.fill_(torch.nan)
    assert torch.equal(circuits.model_logits(model, task), expected)


@both_classes
@pytest.mark.parametrize("name", ["llama rope linear", "qwen3 biases", "gemma"])
def test_what_would_be_another_model_as_a_hooked_transformer_becomes_a_bridge(name, folder_of):
    with pytest.raises(circuits.InputError, match=r"is no HookedTransformer: .*backend='bridge'"):
        circuits.load_model(folder_of(name), device="cpu", backend="hooked_transformer")
    with pytest.warns(UserWarning, match="is loaded as a TransformerBridge, as its Hooked"):
        model = circuits.load_model(folder_of(name), device="cpu")
    assert type(model).__name__ == "TransformerBridge"


# What version 1 of the package wrote for toy-world.
FIRST_FINGERPRINT = "7f59289a6e3195fc61f351fb05c91ab1"
CLASSES = ["bridge", "hooked_transformer"] if HAS_HOOKED_TRANSFORMER else ["bridge"]


@pytest.mark.parametrize("backend", CLASSES)
def test_a_circuit_that_the_first_version_saved_fits_both_classes(backend, load, tmp_path):
    model = load("toy-world", backend)
    task = circuits.load_task("ioi", model, n=2)
    circuit = circuits.EAP().discover(model, task)
    old = circuits.graph.identity.ModelIdentity(
        "toy-world", circuit.graph.model.shape, FIRST_FINGERPRINT
    )
    object.__setattr__(circuit.graph, "model", old)
    circuit.top(20).save(tmp_path)
    loaded = circuits.Circuit.load(tmp_path)
    assert loaded.graph.model.weights == FIRST_FINGERPRINT
    # A warning would be an error.
    circuits.evaluate(model, loaded, task)


@both_classes
def test_a_first_fingerprint_of_other_weights_is_told(load):
    model = load("toy-world", "hooked_transformer")
    whole = circuits.Circuit.full(circuits.component_graph(model))
    other = circuits.graph.identity.ModelIdentity("other", whole.graph.model.shape, "0" * 32)
    object.__setattr__(whole.graph, "model", other)
    with pytest.warns(UserWarning, match="'other' with other weights"):
        circuits.evaluate(model, whole, circuits.load_task("ioi", model, n=2))


def test_a_model_of_transformer_lens_own_format_is_saved_and_loaded(load, tmp_path):
    model = load("toy-world")
    circuits.save_model(model, tmp_path)
    loaded = circuits.load_model(tmp_path, device="cpu", backend="bridge")
    assert identity(loaded) == identity(model)
    assert loaded.tokenizer.encode("Mary went") == model.tokenizer.encode("Mary went")


# Hugging Face


@pytest.mark.parametrize("name", ALL)
@torch.no_grad()
def test_the_residual_streams_and_logits_are_hugging_faces(name, load):
    model = load(name)
    source = hugging_face_model(config_of(name))
    tokens = torch.randint(1, VOCAB, (2, 20), generator=torch.Generator().manual_seed(1))
    expected = source(input_ids=tokens, output_hidden_states=True, use_cache=False)
    streams: dict[str, torch.Tensor] = {}
    names = [residual_hook(layer) for layer in range(shape_of(model).n_layers)]
    mask = torch.ones_like(tokens).bool()
    last = run_to_residual(model, tokens, mask, keepers(streams, names))
    for name_of_stream, stream in zip(names, expected.hidden_states[:-1], strict=True):
        assert_same(streams[name_of_stream], stream)
    assert_same(unembed(model, last), expected.logits)
    assert_same(run_to_logits(model, tokens, mask), expected.logits)


@pytest.mark.parametrize("name", ALL)
@torch.no_grad()
def test_what_nodes_write_and_biases_sum_to_the_residual_stream(name, load):
    model = load(name)
    task = task_of(model)
    shape, weights = shape_of(model), weights_of(model)
    nodes = component_nodes(model, split_embed=False)
    outputs = source_outputs(model, nodes, task.clean, task.mask).sum(0)
    # With norms after attention there are none.
    biases = sum(weights.output_bias(layer) for layer in range(shape.n_layers))
    assert_same(outputs + biases, run_to_residual(model, task.clean, task.mask))


@pytest.mark.parametrize("name", ALL)
def test_circuits_are_run_incrementally_as_by_hooks_between_both_runs(name, load):
    model = load(name)
    task = task_of(model)
    graph = circuits.component_graph(model)
    kept = torch.cat([~graph.mask([])[None], graph.mask([])[None], random_circuits(graph)])
    reference = circuits.run_circuits(model, graph, kept, task, executor="hooks")
    assert_same(circuits.run_circuits(model, graph, kept, task, executor="incremental"), reference)
    for found, prompts in zip(reference, ("clean", "corrupted"), strict=False):
        assert_same(found, circuits.model_logits(model, task, prompts))
    # Where something is cut, something changes.
    assert not torch.allclose(reference[0], reference[2], atol=1e-4)


@pytest.mark.parametrize(
    "name", ["phi3", "granite", "mpt", "falcon", "olmo clip", "opt", "glm", *AFTER]
)
def test_eap_is_the_derivative_of_exact_patching(name):
    model = bridge_to(hugging_face_model(config_of(name), dtype=torch.float64))
    task = task_of(model, batch=2, length=6)
    graph = circuits.component_graph(model)
    some = torch.arange(0, len(graph), 17)
    few = circuits.Graph(graph.nodes, graph.source[some], graph.target[some], graph.slot[some])
    expected = differentiated_by_hand(model, few, task, "logit_difference").float()
    scores = circuits.EAP().discover(model, task, graph=few).scores
    assert_same(scores, expected, 1e-4)


@pytest.mark.parametrize("name", REFUSED)
def test_what_no_circuit_is_found_in_is_refused_by_its_property(name, folder_of):
    *_, told = REFUSED[name]
    with pytest.raises(circuits.InputError, match=told) as error:
        circuits.load_model(folder_of(name), device="cpu", backend="bridge")
    assert "\n" not in str(error.value) and len(str(error.value)) <= 500


@both_classes
@pytest.mark.parametrize("name", SINCE_4)
def test_bridges_that_compute_something_else_than_their_source_are_refused(name, folder_of):
    with pytest.raises(circuits.InputError, match=r"computes other logits .*newer transformer"):
        circuits.load_model(folder_of(name), device="cpu")


@pytest.mark.parametrize("name", [each for each in ALL if each in OF_LOGITS])
@torch.no_grad()
def test_attribution_graphs_have_the_models_logits(name, load):
    model = load(name)
    prompt = task_of(model).clean[0]
    [local] = freeze(model, random_transcoders(model), [prompt])
    expected = run_to_logits(model, prompt[None], torch.ones_like(prompt[None]).bool())
    assert_same(local.logits(slice(None)), expected[0])


@pytest.mark.parametrize("name", ["llama", "granite", "gemma2", "gemma3", "bloom"])
@torch.no_grad()
def test_noise_is_in_proportion_to_what_embeddings_write(name, load):
    model = load(name)
    written = run_to_residual(model, torch.arange(96)[None], torch.ones(1, 96).bool(), layers=0)
    deviation = weights_of(model).embedding_deviation()
    assert deviation == pytest.approx(float(written.std()), rel=1e-3)


# Heads that share a norm


@pytest.mark.parametrize("name", AFTER)
def test_an_edge_into_a_head_that_is_cut_off_counts_where_heads_share_a_norm(name, load):
    """What the head writes reaches nothing, but it is in the divisor of the heads beside it."""
    model = load(name)
    task, graph = task_of(model), circuits.component_graph(model)
    head = circuits.Head(1, 1)
    cut = torch.tensor([edge.source != head for edge in graph.edges])
    into = torch.tensor([edge.target == head for edge in graph.edges])
    kept = torch.stack([cut, cut & ~into])
    for executor in ("hooks", "incremental"):
        with_edges, without = circuits.run_circuits(model, graph, kept, task, executor=executor)
        assert float((with_edges - without).abs().max()) > 1e-4
    circuit = circuits.Circuit.from_edges(graph, [e for e in graph.edges if e.source != head])
    assert circuit.connected() == circuit
    assert torch.equal(graph.reaching_logits(cut), cut)


def test_an_edge_into_a_head_that_is_cut_off_counts_nowhere_else(load):
    graph = circuits.component_graph(load("llama"))
    head = circuits.Head(1, 1)
    cut = torch.tensor([edge.source != head for edge in graph.edges])
    into = torch.tensor([edge.target == head for edge in graph.edges])
    assert torch.equal(graph.reaching_logits(cut), cut & ~into)


@pytest.mark.parametrize("name", AFTER)
def test_what_a_search_removes_untried_changes_nothing_where_heads_share_a_norm(name, load):
    model = load(name)
    task = task_of(model, batch=2, length=6)
    effects = circuits.ActivationPatching(metric="kl").discover(model, task).scores
    threshold = float(effects.abs().quantile(0.98))
    found = circuits.ACDC(threshold).discover(model, task)
    untried = found.scores.isnan()
    assert bool(untried.any()) and 0 < len(found) < len(found.graph)
    kept = torch.stack([found.kept, found.kept | untried])
    without, with_them = circuits.run_circuits(model, found.graph, kept, task, executor="hooks")
    assert_same(with_them, without)


# Toy-world, whose attribution graphs and transcoders are computed from weights


@both_classes
def test_attribution_graphs_and_interventions_do_not_depend_on_the_class(load):
    method = circuits.AttributionGraph("toy-world-plt", budget=60)
    prompt = "Dallas is in"
    graphs = [method.attribute(load("toy-world", each), prompt) for each in CLASSES]
    assert torch.equal(graphs[0].source, graphs[1].source)
    assert_same(graphs[0].weight, graphs[1].weight)
    assert_same(graphs[0].nodes.activation.nan_to_num(), graphs[1].nodes.activation.nan_to_num())


@both_classes
def test_training_of_transcoders_does_not_depend_on_the_class(load):
    def batches(step: int) -> tuple[torch.Tensor, torch.Tensor]:
        tokens = torch.randint(600, (8, 12), generator=torch.Generator().manual_seed(step))
        return tokens, torch.ones_like(tokens).bool()

    settings = Training(n_features=32, k=(6,), steps=4)
    first, second = (
        train_transcoders(load("toy-world", each), batches, settings) for each in CLASSES
    )
    for one, other in zip(first.encoders, second.encoders, strict=True):
        assert_same(one.weight, other.weight, 1e-3)
