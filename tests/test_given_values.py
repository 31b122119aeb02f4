"""Values of ordinary types other than the expected ones: read as meant, or refused in one line."""

import dataclasses
import math
from typing import ClassVar, Literal, get_type_hints

import numpy as np
import pandas as pd
import pytest
import torch
from architectures import weight

import circuits
from circuits.attribution.feature_graph import FEATURE
from circuits.discovery.discoverer import CircuitDiscoverer
from circuits.plotting.graph_page.server import open_server
from circuits.system.numbers import real, truth, whole
from circuits.transcoders.training.train import Training

# What a user sees, who has no runtime type checks.
pytestmark = pytest.mark.usefixtures("unchecked_types")

SHIPPED = {
    name: method
    for name, method in circuits.discoverers().items()
    if method.__module__.startswith("circuits.")
}
REQUIRED = {
    "acdc": {"threshold": 0.1},
    "batched-acdc": {"threshold": 0.1},
    "attribution-graph": {"transcoders": "toy-world-plt"},
}
NUMERIC = {int, float, bool, int | None, float | None, bool | None}
NUMBER_FIELDS = [
    (name, field.name, hint)
    for name, method in SHIPPED.items()
    for field in dataclasses.fields(method)
    if (hint := get_type_hints(method)[field.name]) in NUMERIC
]
NO_NUMBERS = ["0.01", True, math.nan, [1, 2], torch.tensor([1, 2]), np.array([1, 2]), {}, 1j]


def made(name: str, **given: object) -> CircuitDiscoverer:
    return SHIPPED[name](**{**REQUIRED.get(name, {}), **given})


def refused(call, message: str = "") -> str:
    """The error of a call, which must be one line that holds the message."""
    with pytest.raises(circuits.InputError) as caught:
        call()
    text = str(caught.value)
    assert "\n" not in text and len(text) <= 500 and message in text, text
    return text


@pytest.mark.parametrize(
    "three", [3, 3.0, np.int64(3), np.uint8(3), np.array([3]), torch.tensor(3), torch.tensor([3])]
)
def test_three_is_three_whichever_library_it_is_from(three):
    assert whole(three, "n") == 3 and type(whole(three, "n")) is int
    assert real(three, "x") == 3 and type(real(three, "x")) is float


@pytest.mark.parametrize("value", [*NO_NUMBERS, None, 1.5, np.float32(1.5), torch.tensor(0.5)])
def test_what_is_no_whole_number_is_refused(value):
    refused(lambda: whole(value, "n"), "give a whole number")


def test_a_number_of_thousands_of_digits_is_told_in_one_line():
    refused(lambda: real(10**400, "x"), "too large")
    refused(lambda: real(10**5000, "x"), "too large")
    refused(lambda: truth(10**5000, "x"), "must be True or False")
    for long in (10**30, 10**5000, -(10**30), 1e300):
        refused(lambda long=long: whole(long, "x"), "is too long")


def test_no_number_is_too_long_for_an_entrance(toy_world, scores):
    for long in (10**30, 10**400, 10**5000):
        for call in (
            lambda long: scores.top(long),
            lambda long: scores.greedy(long),
            lambda long: circuits.component_graph(toy_world, positions=long),
        ):
            refused(lambda call=call, long=long: call(long), "is too long; give at most 18 digits")
    for long in (10**400, 10**5000):
        refused(lambda long=long: circuits.Intervention(0, 1, value=long), "a finite number")
        refused(lambda long=long: circuits.Intervention(0, 1, factor=-long), "a finite number")
    for text in ("m" + "9" * 5000, "a0.h" + "9" * 30, "m0@" + "9" * 5000):
        refused(
            lambda text=text: circuits.parse_node(text), "names no node; give at most 18 digits"
        )
    refused(lambda: circuits.component_graph(toy_world, positions=65), "the model reads up to 64")


@pytest.mark.parametrize("value", [*NO_NUMBERS, None])
def test_what_is_no_number_is_refused(value):
    refused(lambda: real(value, "x"), "must be a number")


def test_only_true_and_false_are_truths():
    assert truth(np.bool_(True), "x") is True and truth(torch.tensor(False), "x") is False
    for value in ("False", 1, None):
        refused(lambda value=value: truth(value, "x"), "must be True or False")


@pytest.mark.parametrize(("name", "field", "hint"), NUMBER_FIELDS)
def test_no_method_takes_what_is_no_number_for_one(name, field, hint):
    for value in [*NO_NUMBERS, None]:
        is_bool = hint in (bool, bool | None) and isinstance(value, bool)
        is_default = value is None and hint in (int | None, float | None, bool | None)
        if not (is_bool or is_default):
            refused(lambda value=value: made(name, **{field: value}), f"{field}=")


@pytest.mark.parametrize(("name", "field", "hint"), NUMBER_FIELDS)
def test_a_methods_settings_do_not_depend_on_the_library_of_a_number(name, field, hint):
    plain = {int: 2, int | None: 2, float: 0.5, float | None: 0.5}.get(hint, True)
    kind = {int: np.int64, float: np.float64, bool: np.bool_}[type(plain)]
    expected = made(name, **{field: plain})
    for given in (kind(plain), torch.tensor(plain, dtype=torch.float64 if plain == 0.5 else None)):
        method = made(name, **{field: given})
        assert method == expected and method.identity() == expected.identity()
        assert type(getattr(method, field)) is type(plain)


def test_a_users_method_is_protected_as_well():
    @dataclasses.dataclass(frozen=True)
    class Mine(CircuitDiscoverer):
        width: int
        rate: float | None = None
        mode: Literal["a", "b"] = "a"
        size: int | str = "all"
        seen: ClassVar[list] = []

        def __post_init__(self):
            self.seen.append(self.width + 1)

    method = Mine(np.int64(3), torch.tensor(0.25), size=np.int32(7))
    assert (method.width, method.rate, method.size, Mine.seen) == (3, 0.25, 7, [4])
    assert Mine(3, size="all").size == "all"
    refused(lambda: Mine("3"), "width='3': give a whole number")
    refused(lambda: Mine(3, mode="c"), "mode='c': choose 'a' or 'b'")


@pytest.mark.parametrize("option", ["gradient_at", "along", "quadrature", "order", "guess"])
def test_a_word_that_is_no_choice_is_refused_with_the_choices(option):
    [name] = [
        name
        for name, method in SHIPPED.items()
        if option in {field.name for field in dataclasses.fields(method)}
    ]
    for value in ("clear", None, 1, ["clean"]):
        text = refused(lambda value=value: made(name, **{option: value}), f"{option}=")
        assert "choose '" in text


@pytest.fixture(scope="module")
def task(toy_world):
    return circuits.load_task("ioi", toy_world, n=4)


@pytest.fixture(scope="module")
def scores(toy_world, task):
    return circuits.EAP().discover(toy_world, task)


NUMBERS_TAKEN = {
    "top": lambda model, task, scores, n: scores.top(n).kept,
    "above": lambda model, task, scores, n: scores.above(n).kept,
    "n": lambda model, task, scores, n: circuits.load_task("ioi", model, n=n).clean,
    "seed": lambda model, task, scores, n: circuits.load_task("ioi", model, n=2, seed=n).clean,
    "positions": lambda model, task, scores, n: circuits.component_graph(model, positions=n).source,
    "size": lambda model, task, scores, n: torch.tensor(
        circuits.faithfulness_curve(model, scores, task, [n])["edges"].tolist()
    ),
    "option": lambda model, task, scores, n: (
        circuits.load_task("docstring", model, n=2, before=n).clean
    ),
    "random": lambda model, task, scores, n: (
        circuits.RandomScores(seed=n).discover(model, task).scores
    ),
    "max_edges": lambda model, task, scores, n: torch.tensor(
        len(circuits.draw_circuit(scores, max_edges=n))
    ),
}


@pytest.mark.parametrize("take", NUMBERS_TAKEN.values(), ids=NUMBERS_TAKEN)
def test_a_number_may_be_of_any_library_wherever_one_is_taken(take, toy_world, task, scores):
    expected = take(toy_world, task, scores, 5)
    for five in (np.int64(5), np.int32(5), torch.tensor(5), torch.tensor([5])):
        assert torch.equal(take(toy_world, task, scores, five), expected)
    for value in ("5", True, math.nan):
        refused(lambda value=value: take(toy_world, task, scores, value))


def test_sizes_and_thresholds_may_be_arrays(toy_world, task, scores):
    curve = circuits.faithfulness_curve(toy_world, scores, task, np.array([5, 10]))
    assert curve["edges"].tolist() == [5, 10]
    fractions = circuits.faithfulness_curve(toy_world, scores, task, torch.tensor([0.5, 1.0]))
    assert fractions["edges"].tolist() == [240, 479]
    found = circuits.ACDC(1.0).sweep(toy_world, task, np.array([1.0, 3.0]))
    assert found == circuits.ACDC(1.0).sweep(toy_world, task, [1.0, 3.0])


def test_a_fraction_is_no_number_of_edges(scores):
    # A user who means the whole circuit would get a single edge.
    refused(lambda: scores.top(1.0), "give a number of edges")


def test_a_seed_that_is_too_long_is_refused(toy_world, task):
    refused(lambda: circuits.RandomScores(seed=2**70).discover(toy_world, task), "too long")


def test_scores_and_kept_edges_may_be_arrays_or_lists(toy_world, scores):
    graph = scores.graph
    same = circuits.Circuit(graph, scores.scores.tolist(), scores.kept.numpy(), selected=False)
    assert same == scores
    assert circuits.Circuit.full(graph, scores.scores.numpy()) == scores


def test_kept_edges_and_given_outputs_may_be_arrays(toy_world, task, scores):
    few = scores.top(20)
    outputs = {str(node): np.ones(128, dtype=np.float32) for node in scores.graph.nodes[:-1]}
    given = circuits.Ablation("given", outputs=outputs)
    tensors = {name: torch.ones(128) for name in outputs}
    logits = circuits.run_circuits(
        toy_world, few.graph, few.kept[None].numpy(), task, ablation=given
    )
    expected = circuits.run_circuit(
        toy_world, few, task, ablation=circuits.Ablation("given", outputs=tensors)
    )
    assert torch.equal(logits[0], expected)


ENTRANCES_OF_TASKS = {
    **{name: lambda model, task, name=name: made(name).discover(model, task) for name in SHIPPED},
    "attribute": lambda model, task: circuits.EAPIG().attribute(model, task),
    "sweep": lambda model, task: circuits.ACDC(0.1).sweep(model, task, [0.1]),
    "run": lambda model, task: circuits.run(circuits.EAP(), model, task),
    "logits": lambda model, task: circuits.model_logits(model, task),
    "evaluate": lambda model, task: circuits.evaluate(model, full(), task),
    "run_circuit": lambda model, task: circuits.run_circuit(model, full(), task),
    "curve": lambda model, task: circuits.faithfulness_curve(model, full(), task),
    "points": lambda model, task: circuits.faithfulness_points(model, [full()], task),
    "compare": lambda model, task: circuits.compare(model, {"full": full()}, task),
}


def full() -> circuits.Circuit:
    return circuits.Circuit.full(circuits.component_graph(circuits.load_model("toy-world")))


@pytest.mark.parametrize("use", ENTRANCES_OF_TASKS.values(), ids=ENTRANCES_OF_TASKS)
def test_what_is_no_task_or_model_is_refused_with_the_remedy(use, toy_world, task):
    for no_task in (["Julia gave it to"], "ioi", None, toy_world):
        refused(lambda no_task=no_task: use(toy_world, no_task), "circuits.load_task")
    for no_model in ("gpt2", None, torch.nn.Linear(2, 2), task):
        refused(lambda no_model=no_model: use(no_model, task), "circuits.load_model")


ENTRANCES_OF_MODELS = {
    "load_task": lambda model: circuits.load_task("ioi", model, n=2),
    "from_prompts": lambda model: circuits.Task.from_prompts(model, [("a", "b")]),
    "component_graph": circuits.component_graph,
    "attribute": lambda model: circuits.AttributionGraph("toy-world-plt").attribute(model, "Texas"),
    "intervene": lambda model: circuits.intervene(model, None, "Texas", [[]]),
    "save_model": lambda model: circuits.save_model(model, "nowhere"),
}


@pytest.mark.parametrize("use", ENTRANCES_OF_MODELS.values(), ids=ENTRANCES_OF_MODELS)
def test_what_is_no_model_is_refused_with_the_remedy(use):
    for no_model in ("gpt2", None, torch.nn.Linear(2, 2)):
        refused(lambda no_model=no_model: use(no_model), "circuits.load_model")


ENTRANCES_OF_CIRCUITS = {
    "evaluate": lambda model, task, circuit: circuits.evaluate(model, circuit, task),
    "run_circuit": lambda model, task, circuit: circuits.run_circuit(model, circuit, task),
    "curve": lambda model, task, circuit: circuits.faithfulness_curve(model, circuit, task),
    "overlap": lambda model, task, circuit: circuits.overlap(full(), circuit),
    "correlation": lambda model, task, circuit: circuits.score_correlation(circuit, full()),
    "recovery": lambda model, task, circuit: circuits.recovery(circuit, ["m3->logits"]),
    "draw": lambda model, task, circuit: circuits.draw_circuit(circuit),
    "eap-ig": lambda model, task, circuit: circuits.save_eap_ig(circuit, "nowhere"),
}


@pytest.mark.parametrize("use", ENTRANCES_OF_CIRCUITS.values(), ids=ENTRANCES_OF_CIRCUITS)
def test_what_is_no_circuit_is_refused(use, toy_world, task, scores):
    for no_circuit in (scores.graph, "runs/ioi", None):
        refused(lambda no=no_circuit: use(toy_world, task, no), "expected a Circuit")


def test_what_is_no_graph_is_refused(toy_world, task, scores):
    for no_graph in (scores, "graph"):
        for use in (
            lambda graph: circuits.EAP().discover(toy_world, task, graph=graph),
            lambda graph: circuits.ACDC(0.1).discover(toy_world, task, graph=graph),
            lambda graph: circuits.run_circuits(toy_world, graph, scores.kept[None], task),
            circuits.Circuit.full,
        ):
            refused(lambda use=use, graph=no_graph: use(graph), "expected a Graph")
        for use in (circuits.pruned, circuits.node_influence, circuits.completeness_score):
            refused(lambda use=use, graph=no_graph: use(graph), "expected a FeatureGraph")


def test_what_are_no_transcoders_metric_or_ablation_is_refused(toy_world, task, scores):
    for value in (5, [1], "none of these", len):
        refused(lambda value=value: circuits.EAP(metric=value).discover(toy_world, task), "metric")
        refused(lambda value=value: circuits.EAP(ablation=value).discover(toy_world, task), "abl")
        refused(
            lambda value=value: circuits.run_circuit(toy_world, scores, task, transcoders=value),
            "circuits.load_transcoders",
        )
        refused(lambda value=value: circuits.virtual_weights(value), "circuits.load_transcoders")
    refused(lambda: circuits.Metric("mine", "logits", "lower_is_damage"), "give a function")


def test_a_metric_that_fails_is_said_to_with_what_it_gets(toy_world, task):
    metric = circuits.Metric(
        "mine", lambda logits, clean, task: logits[:, -1, 0], "lower_is_damage"
    )
    text = refused(lambda: circuits.EAP(metric=metric).discover(toy_world, task), "'mine'")
    assert "IndexError" in text and "[scored, vocab], here (4, 673)" in text


PROMPT = "The capital of Texas is"


@pytest.fixture(scope="module")
def transcoders():
    return circuits.load_transcoders("toy-world-clt")


@pytest.mark.parametrize(
    "position", [[3, 4], (3, 4), np.array([3, 4]), torch.tensor([3, 4]), range(3, 5), slice(3, 5)]
)
def test_an_intervention_at_several_positions_is_one_at_each(position, toy_world, transcoders):
    together = [circuits.Intervention(0, 48, position, factor=2.0)]
    single = [circuits.Intervention(0, 48, each, factor=2.0) for each in (3, 4)]
    runs = circuits.intervene(toy_world, transcoders, PROMPT, [together, single]).logits
    assert torch.equal(runs[0], runs[1])


def test_numbers_of_a_graph_make_an_intervention(toy_world, transcoders):
    graph = circuits.AttributionGraph(transcoders).attribute(toy_world, PROMPT)
    nodes, number = graph.nodes, int(graph.is_kind(FEATURE).nonzero()[0])
    given = circuits.Intervention(
        nodes.layer[number],
        np.int64(nodes.index[number]),
        nodes.position[number],
        value=2 * nodes.activation[number],
    )
    assert given == circuits.Intervention(
        int(nodes.layer[number]),
        int(nodes.index[number]),
        int(nodes.position[number]),
        value=2 * float(nodes.activation[number]),
    )


@pytest.mark.parametrize("layers", [np.array([0, 2]), torch.tensor([0, 2]), {0, 2}, iter([0, 2])])
def test_frozen_layers_may_be_in_any_series(layers, toy_world, transcoders):
    change = [circuits.Intervention.ablate("f0.475@3")]
    runs = [
        circuits.intervene(toy_world, transcoders, PROMPT, [change], frozen_layers=each).logits
        for each in (layers, [0, 2])
    ]
    assert torch.equal(*runs)


def test_parts_of_transcoders_are_not_counted_from_the_end(transcoders):
    states = torch.randn(1, 2, transcoders.d_model)
    for call in (
        lambda: transcoders.encode(-1, states),
        lambda: transcoders.decoder_rows(1, torch.tensor([0]), 0, states),
        lambda: transcoders.encoder_rows(0, torch.tensor([-1]), states),
    ):
        with pytest.raises(IndexError):
            call()
        refused(call)


def test_firings_are_taken_by_slices_without_steps(transcoders):
    fired = circuits.expected_coactivation(
        {layer: torch.randn(1, 4, transcoders.d_model) for layer in range(4)}, transcoders
    )
    refused(lambda: fired.mean(0, slice(0, 8, 2)), "without a step")
    refused(lambda: fired.mean(-1, slice(0, 8)), "there is no layer -1")


def test_explained_words_that_are_not_one_token_are_told_as_such(toy_world, transcoders):
    method = circuits.AttributionGraph(transcoders)
    told = refused(lambda: method.attribute(toy_world, PROMPT, explain=["Austin and"]), "explain")
    assert "must be one token after" in told and "answers" not in told


def test_one_text_encoded_is_no_list_of_prompts(toy_world, transcoders):
    method, encoded = circuits.AttributionGraph(transcoders), toy_world.tokenizer(PROMPT)
    refused(lambda: method.attribute_all(toy_world, encoded), "or one to attribute")
    encoded = toy_world.tokenizer([PROMPT, PROMPT])
    assert len(method.attribute_all(toy_world, encoded)) == 2
    assert len(method.attribute_all(toy_world, (each for each in (PROMPT, PROMPT)))) == 2


def test_a_graph_run_explains_what_a_generator_or_a_list_of_numbers_says(
    toy_world, transcoders, tmp_path
):
    method = circuits.AttributionGraph(transcoders)
    unembedding = weight(toy_world, "unembed.W_U")
    vector = (unembedding[:, 7] - unembedding[:, 21]).tolist()
    for explain in ([128, 7], [circuits.Direction("7 against 21", vector)]):
        expected = method.attribute(toy_world, PROMPT, explain=explain)
        run = circuits.run_graph(method, toy_world, PROMPT, explain=iter(explain), out=tmp_path)
        assert not run.reused and torch.equal(run.graph.weight, expected.weight)
        again = circuits.run_graph(method, toy_world, PROMPT, explain=explain, out=tmp_path)
        assert again.reused


def test_positions_that_are_none_are_refused():
    for position in ("3", True, 1.5, [], [1.5], {}):
        refused(lambda position=position: circuits.Intervention(0, 1, position, factor=0.0), "posi")


@pytest.mark.parametrize(
    "explain", [[128], [np.int64(128)], torch.tensor([128]), np.array([128]), [torch.tensor(128)]]
)
def test_explained_tokens_may_be_of_any_library(explain, toy_world, transcoders):
    method = circuits.AttributionGraph(transcoders)
    graph = method.attribute(toy_world, PROMPT, explain=explain)
    expected = method.attribute(toy_world, PROMPT, explain=[128])
    assert len(graph) == len(expected) and torch.equal(graph.weight, expected.weight)


@pytest.mark.parametrize("kind", ["tensor", "array", "list", "encoding", "padded"])
def test_a_prompt_may_be_a_tokenizers_output_an_array_or_a_list(kind, toy_world, transcoders):
    tokenizer = toy_world.tokenizer
    ids = toy_world.to_tokens(PROMPT)
    given = {
        "tensor": ids,
        "array": ids[0].numpy(),
        "list": ids[0].tolist(),
        "encoding": tokenizer(PROMPT),
        "padded": tokenizer([PROMPT], padding="max_length", max_length=9, return_tensors="pt"),
    }[kind]
    run = circuits.intervene(toy_world, transcoders, given, [[]])
    assert torch.equal(run.logits, circuits.intervene(toy_world, transcoders, PROMPT, [[]]).logits)


class AnyPath:
    """A path of another library, as `py.path.local` or a folder in a notebook is."""

    def __init__(self, path) -> None:
        self.path = path

    def __fspath__(self):
        return self.path


def test_paths_of_other_libraries_are_taken(tmp_path, toy_world, task, transcoders):
    folder = AnyPath(str(tmp_path))
    circuits.save_transcoders(transcoders, folder, model_name="toy-world")
    assert circuits.load_transcoders(folder).n_features == transcoders.n_features
    assert circuits.AttributionGraph(folder).transcoders == tmp_path
    circuits.save_model(toy_world, AnyPath(str(tmp_path / "model")))
    loaded = circuits.load_model(AnyPath(str(tmp_path / "model")))
    assert torch.equal(loaded(task.clean), toy_world(task.clean))
    found = circuits.run(circuits.EAP(), toy_world, task, out=AnyPath(str(tmp_path / "runs")))
    assert circuits.load_run(AnyPath(str(found.folder))).folder == found.folder
    refused(lambda: circuits.load_run(AnyPath(b"runs")), "=b'runs': give a text or a pathlib.Path")
    refused(lambda: circuits.save_model(toy_world, 3), "path=3: give a text or a pathlib.Path")


ENTRANCES_OF_PATHS = {
    "Circuit.load": lambda path, have: circuits.Circuit.load(path),
    "Circuit.save": lambda path, have: have["scores"].save(path),
    "load_model": lambda path, have: circuits.load_model(path),
    "save_model": lambda path, have: circuits.save_model(have["model"], path),
    "run": lambda path, have: circuits.run(circuits.RandomScores(), *have["of run"], out=path),
    "load_run": lambda path, have: circuits.load_run(path),
    "checkpoint": lambda path, have: circuits.ACDC(9).discover(*have["of run"], checkpoint=path),
    "Checkpoint": lambda path, have: circuits.ACDC(9).discover(
        *have["of run"], checkpoint=circuits.Checkpoint(path)
    ),
    "Task.from_file": lambda path, have: circuits.Task.from_file(path, have["model"]),
    "load_eap_ig": lambda path, have: circuits.load_eap_ig(path, have["model"]),
    "save_eap_ig": lambda path, have: circuits.save_eap_ig(have["scores"], path),
    "load_neuronpedia": lambda path, have: circuits.load_neuronpedia(path),
    "save_neuronpedia": lambda path, have: circuits.save_neuronpedia(have["graph"], path, slug="a"),
    "load_transcoders": lambda path, have: circuits.load_transcoders(path),
    "save_transcoders": lambda path, have: circuits.save_transcoders(have["transcoders"], path),
    "train_transcoders": lambda path, have: circuits.train_transcoders(
        have["model"],
        lambda step: (torch.ones(1, 4, dtype=torch.long), torch.ones(1, 4, dtype=torch.bool)),
        Training(n_features=4, k=(2,), steps=1),
        checkpoint=path,
    ),
    "AttributionGraph": lambda path, have: circuits.AttributionGraph(path).loaded,
    "FeatureGraph.load": lambda path, have: circuits.FeatureGraph.load(path),
    "FeatureGraph.save": lambda path, have: have["graph"].save(path),
    "run_graph": lambda path, have: circuits.run_graph(
        circuits.AttributionGraph(have["transcoders"]), have["model"], PROMPT, out=path
    ),
    "load_graph_run": lambda path, have: circuits.load_graph_run(path),
    "view": lambda path, have: open_server(path, 0),
}


@pytest.mark.parametrize("entrance", ENTRANCES_OF_PATHS)
def test_what_no_disk_holds_under_such_a_name_is_refused_wherever_a_path_is_taken(
    entrance, toy_world, task, scores, transcoders, feature_graph, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    have = {
        "model": toy_world,
        "of run": (toy_world, task),
        "scores": scores,
        "transcoders": transcoders,
        "graph": feature_graph,
    }
    for name in ("x" * 300, "a" * 5000, "a\0b", "half \ud83d", f"{tmp_path}/{'x' * 300}", ""):
        text = refused(lambda name=name: ENTRANCES_OF_PATHS[entrance](name, have))
        assert text.isprintable()
    assert not [*tmp_path.iterdir()]


@pytest.fixture(scope="module")
def feature_graph(toy_world, transcoders):
    return circuits.AttributionGraph(transcoders).attribute(toy_world, PROMPT)


def test_an_empty_list_of_features_gives_no_rows(transcoders):
    like = torch.randn(1, 2, transcoders.d_model)
    for none in ([], np.array([]), torch.tensor([])):
        assert transcoders.encoder_rows(0, none, like).shape == (0, transcoders.d_model)
    refused(lambda: transcoders.encoder_rows(0, [[]], like), "has shape (1, 0)")


TOKENS, ANSWERS = [[5, 6], [5, 7], [5, 8]], [9, 10, 11]
PAIR = circuits.PromptPair("So Mary", "So John", " is")


def from_tokens(**given):
    return circuits.Task.from_tokens(**{"clean": TOKENS, "answers": ANSWERS, **given})


IN_A_SET = {
    "answers": lambda model: from_tokens(answers={9, 10, 11}),
    "answers that never change": lambda model: from_tokens(answers=frozenset({9, 10, 11})),
    "lengths": lambda model: from_tokens(clean=TOKENS[:2], answers=None, lengths={1, 2}),
    "answer positions": lambda model: from_tokens(
        clean=[[5, 6]], answers=None, answer_positions={1}
    ),
    "tokens": lambda model: from_tokens(clean=[{5, 6}, {5, 7}, {5, 8}]),
    "scores": lambda model: circuits.Circuit.full(circuits.component_graph(model), set(range(479))),
    "prompt pairs": lambda model: circuits.Task.from_prompts(model, {PAIR}),
    "a span": lambda model: circuits.PromptPair("So Mary", spans={"A": {3, 7}}),
    "positions": lambda model: circuits.component_graph(model, positions={"S1", "END"}),
    "a prompt": lambda model: circuits.AttributionGraph("toy-world-plt").attribute(model, {5, 6}),
    "prompts": lambda model: circuits.AttributionGraph("toy-world-plt").attribute_all(
        model, {"So Mary", "So John"}
    ),
    "thresholds": lambda model: circuits.ACDC(0.1).sweep(
        model, circuits.load_task("ioi", model, n=1), {0.1, 0.2}
    ),
}


@pytest.mark.parametrize("name", IN_A_SET)
def test_a_set_is_refused_where_order_matters(name, toy_world):
    refused(lambda: IN_A_SET[name](toy_world))


def test_a_set_is_taken_where_order_does_not_matter(toy_world):
    task = from_tokens(answers=[{9, 12}, [10], {11}])
    assert task.answers.tolist() == [[9, 12], [10, -1], [11, -1]]
    spans = {"S1": 1, "END": 2}.keys()
    graph = circuits.component_graph(toy_world, positions=spans)
    assert graph.positions == ("rest", "S1", "END")


def test_what_an_array_masks_is_no_value(scores):
    masked = np.ma.array
    task = from_tokens(answers=masked([[9, 12], [10, 0], [11, 0]], mask=[[0, 0], [0, 1], [0, 1]]))
    assert task.answers.tolist() == [[9, 12], [10, -1], [11, -1]]
    assert from_tokens(clean=masked(TOKENS)).clean.tolist() == TOKENS
    hidden = masked(TOKENS, mask=[[0, 0], [0, 1], [0, 0]])
    refused(lambda: from_tokens(clean=hidden), "clean is an array that masks 1 of its 6 entries")
    damage = masked(scores.scores.numpy(), mask=scores.scores.numpy() > 0)
    refused(lambda: circuits.Circuit.full(scores.graph, damage), "scores is an array that masks")
    refused(
        lambda: circuits.Ablation("given", outputs={"m0": hidden}),
        "m0 is a MaskedArray: it is an array that",
    )
    for number in (np.ma.masked, masked([3], mask=[True])):
        refused(lambda number=number: whole(number, "n"), "give a whole number")


LACKING = {
    "meta": lambda: torch.ones(479, device="meta"),
    "nested": lambda: torch.nested.nested_tensor([torch.ones(3), torch.ones(2)]),
    "masked": lambda: torch.masked.masked_tensor(torch.ones(479), torch.arange(479) > 3),
}


@pytest.mark.parametrize("kind", LACKING)
@pytest.mark.filterwarnings("ignore")
def test_a_tensor_without_a_value_at_each_place_is_refused(kind, scores, toy_world, task):
    given = LACKING[kind]()
    refused(lambda: circuits.Circuit.full(scores.graph, given), f"scores is a {kind} tensor")
    refused(lambda: from_tokens(clean=given), f"clean is a {kind} tensor")
    refused(lambda: from_tokens(answers=given), f"answers is a {kind} tensor")
    refused(lambda: circuits.run_circuits(toy_world, scores.graph, given, task), "kept is a")


def test_a_sparse_tensor_holds_what_a_dense_one_does(scores, toy_world, task):
    assert circuits.Circuit.full(scores.graph, scores.scores.to_sparse()) == scores
    kept = scores.top(20).kept[None]
    sparse, dense = [
        circuits.run_circuits(toy_world, scores.graph, each, task)
        for each in (kept.to_sparse(), kept)
    ]
    assert torch.equal(sparse, dense)
    clean = torch.tensor(TOKENS)
    given = from_tokens(clean=clean.to_sparse(), answers=torch.tensor(ANSWERS).to_sparse())
    assert given.digest() == from_tokens().digest()


def test_scores_are_real_numbers_that_single_precision_holds(scores):
    graph, n = scores.graph, len(scores)
    refused(lambda: circuits.Circuit.full(graph, torch.arange(n) * 1j), "holds torch.complex64")
    refused(
        lambda: circuits.Circuit.full(graph, [1e39] * n), "scores holds 1e+39 for embed->a0.h0.q"
    )
    assert circuits.Circuit.full(graph, [math.inf] * n).scores.isinf().all()


def test_numbers_of_edges_are_checked_wherever_they_are_given(scores):
    assert len(scores.strongest(3)) == len(scores.strongest(np.float64(3.0))) == 3
    for n in (-1, True, "3", 0.5):
        refused(lambda n=n: scores.strongest(n), f"n={n!r}")
    for choose in (scores.top, scores.greedy):
        refused(lambda choose=choose: choose(10**5000), "a value of int")


def test_no_circuits_have_no_logits(scores, toy_world, task):
    none = scores.kept[None][:0]
    for executor in ("incremental", "hooks"):
        logits = circuits.run_circuits(toy_world, scores.graph, none, task, executor=executor)
        assert logits.shape == (0, 4, toy_world.cfg.d_vocab)


def test_a_series_that_is_labelled_by_edges_is_read_by_its_labels(scores, toy_world, task):
    graph, table = scores.graph, scores.to_dataframe()
    by_score = table.sort_values("score")
    by_edge = by_score.set_index("edge")["score"]
    assert circuits.Circuit.full(graph, by_edge) == scores
    by_value = by_edge.set_axis([circuits.parse_edge(edge) for edge in by_edge.index])
    assert circuits.Circuit.full(graph, by_value) == scores
    assert circuits.Circuit(graph, by_edge, by_edge > 0).kept.equal(scores.scores > 0)
    kept = pd.DataFrame([by_edge > 0.1])
    expected = circuits.run_circuits(toy_world, graph, (scores.scores > 0.1)[None], task)
    assert torch.equal(circuits.run_circuits(toy_world, graph, kept, task), expected)
    reached = graph.reaching_logits(kept.iloc[0])
    assert torch.equal(reached, graph.reaching_logits(scores.scores > 0.1))


def test_labels_in_another_order_are_refused_and_others_do_not_matter(scores):
    graph, table = scores.graph, scores.to_dataframe()
    by_score = table.sort_values("score")
    twice = table.set_index("edge")["score"].rename({"m3->logits": "m2->logits"})
    for given, told in (
        (by_score["score"], "scores has the labels"),
        (table["score"][::-1], "give a list"),
        (by_score.set_index(["source", "target"])["score"], "scores has the labels"),
        (twice, "which name 478 of the graph's 479 edges"),
        (twice.rename({"m2->logits": "m9->logits"}), "the graph has no edge m9->logits"),
    ):
        refused(lambda given=given: circuits.Circuit.full(graph, given), told)
    for labels in (range(9, 488), [f"row {number}" for number in range(479)]):
        labelled = table["score"].set_axis(labels)
        assert circuits.Circuit.full(graph, labelled) == scores


def test_tokens_and_answers_in_series_belong_together_by_order_and_by_label():
    labels = [7, 3, 5]
    frame = pd.DataFrame(TOKENS, index=labels)
    answers = pd.Series(ANSWERS, index=labels)
    assert from_tokens(clean=frame, answers=answers).digest() == from_tokens().digest()
    for given in (
        {"answers": answers.sort_index()},
        {"corrupted": frame[::-1]},
        {"corrupted": frame[[1, 0]]},
        {"lengths": pd.Series([2, 2, 1])},
        {"positions": {"A": (frame > 5)[::-1]}},
    ):
        call = {"clean": frame, "answers": answers} | given
        refused(lambda call=call: from_tokens(**call), "have different labels")
    # Prompts are chosen by order, as the frame that they came from may have any labels.
    for labels in ([2, 1, 0], [0, 1, 0]):
        mask = pd.Series([False, False, True], index=labels)
        assert from_tokens()[mask].answers.tolist() == [[11]]


@pytest.mark.parametrize("kind", ["Int64", "object", "int32"])
def test_token_ids_may_be_a_frame_or_an_array_of_objects(kind):
    clean = pd.DataFrame(TOKENS).astype(kind)
    task = from_tokens(clean=clean, answers=np.array(ANSWERS, dtype=object))
    assert task.digest() == from_tokens().digest()


def test_a_name_is_made_of_whole_characters(toy_world):
    half = "\ud83d"
    refused(lambda: circuits.Metric(half, len, "lower_is_damage"), "whole characters")
    refused(lambda: from_tokens(positions={half: torch.ones(3, 2) > 0}), "half of a character")
    pair = circuits.PromptPair("So Mary", "So John", spans={half: (3, 7)})
    refused(lambda: circuits.Task.from_prompts(toy_world, [pair]), "half of a character")


def test_a_class_is_no_metric(toy_world):
    refused(
        lambda: circuits.Task.from_prompts(toy_world, [PAIR], metric=circuits.Metric), "or a Metric"
    )
