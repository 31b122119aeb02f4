"""Whatever mode of torch a call is made in, its results are the plain ones."""

import contextlib
from collections.abc import Iterator

import pytest
import torch
from architectures import random_model, random_task
from random_transcoders import random_transcoders

import circuits

pytestmark = pytest.mark.usefixtures("unchecked_types")

PROMPT = [3, 14, 15, 9, 26, 5, 35, 8]


@contextlib.contextmanager
def default_dtype() -> Iterator[None]:
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


@contextlib.contextmanager
def default_device() -> Iterator[None]:
    torch.set_default_device("meta")
    try:
        yield
    finally:
        torch.set_default_device(None)


@contextlib.contextmanager
def deterministic_algorithms() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


@contextlib.contextmanager
def inference_mode_and_autocast() -> Iterator[None]:
    with torch.inference_mode(), torch.autocast("cpu", dtype=torch.bfloat16):
        yield


MODES = {
    "inference_mode": torch.inference_mode,
    "no_grad": torch.no_grad,
    "autocast": lambda: torch.autocast("cpu", dtype=torch.bfloat16),
    "inference_mode and autocast": inference_mode_and_autocast,
    "default dtype": default_dtype,
    "default device": default_device,
    "a device as a context": lambda: torch.device("meta"),
    "deterministic algorithms": deterministic_algorithms,
    "anomaly detection": lambda: torch.autograd.detect_anomaly(check_nan=True),
}
COMPUTED = {
    "loading": lambda model, task, transcoders: circuits.load_model(
        "toy-world", device="cpu"
    ).unembed.W_U.detach(),
    "logits": lambda model, task, transcoders: circuits.model_logits(model, task),
    "activations": lambda model, task, transcoders: circuits.circuit_activations(
        model, half(model), task, ["m1"], ablation="mean"
    )["m1"],
    "heads": lambda model, task, transcoders: circuits.ActivationPatching().heads(model, task),
    "incremental": lambda model, task, transcoders: run(model, task, executor="incremental"),
    "hooks": lambda model, task, transcoders: run(model, task, executor="hooks"),
    "means": lambda model, task, transcoders: run(model, task, ablation="mean"),
    "acdc": lambda model, task, transcoders: circuits.ACDC(0.05).discover(model, task).scores,
    "patching": lambda model, task, transcoders: (
        circuits.ActivationPatching().discover(model, task[:2]).scores
    ),
    "eap": lambda model, task, transcoders: circuits.EAP().discover(model, task).scores,
    "eap-ig": lambda model, task, transcoders: (
        circuits.EAPIG(along="activations", steps=1).discover(model, task).scores
    ),
    "attribution": lambda model, task, transcoders: circuits.EAP().attribute(model, task).heads(),
    "bootstrap": lambda model, task, transcoders: (
        circuits.EAP().attribute(model, task).bootstrap(3)
    ),
    "random": lambda model, task, transcoders: circuits.RandomScores().discover(model, task).scores,
    "evaluation": lambda model, task, transcoders: (
        circuits.evaluate(model, half(model), task).table().to_numpy(copy=True)
    ),
    "attribution graph": lambda model, task, transcoders: (
        circuits.AttributionGraph(transcoders).attribute(model, PROMPT).weight
    ),
    "features": lambda model, task, transcoders: (
        circuits.AttributionGraph(transcoders).discover(model, task[:2]).scores
    ),
    "interventions": lambda model, task, transcoders: (
        circuits.intervene(
            model, transcoders, PROMPT, [[circuits.Intervention.ablate("f0.5")]]
        ).logits
    ),
}


def half(model):
    graph = circuits.component_graph(model)
    return circuits.Circuit.from_edges(graph, graph.edges[::2])


def run(model, task, **options):
    return circuits.run_circuit(model, half(model), task, **options)


@pytest.fixture(scope="module")
def parts():
    model = random_model("gpt2")
    return model, random_task(ragged=True), random_transcoders(model)


@pytest.fixture(scope="module")
def plain(parts):
    return {name: compute(*parts) for name, compute in COMPUTED.items()}


@pytest.mark.filterwarnings("ignore:Anomaly Detection")
@pytest.mark.parametrize("name", COMPUTED)
@pytest.mark.parametrize("mode", MODES)
def test_results_are_those_without_the_mode(parts, plain, mode, name):
    with MODES[mode]():
        found = COMPUTED[name](*parts)
    found, expected = map(torch.as_tensor, (found, plain[name]))
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-6, equal_nan=True)
    assert found.dtype == expected.dtype
    assert not found.is_inference()


def test_a_model_and_a_task_made_in_inference_mode_serve_every_method():
    with torch.inference_mode():
        model = circuits.load_model("toy-world", device="cpu")
        made = circuits.load_task("ioi", model, n=3)
        tokens = circuits.Task.from_tokens(
            made.clean.clone(), made.corrupted.clone(), made.answers.clone()
        )
    for task in (made, tokens):
        assert circuits.EAP(metric="negative_log_probability").discover(model, task).scores.any()


def test_weights_that_no_gradient_passes_are_refused_where_gradients_are_taken():
    with torch.inference_mode():
        model = random_model("gpt2")
    task = random_task()
    with pytest.raises(circuits.InputError, match=r"made inside torch\.inference_mode"):
        circuits.EAP().discover(model, task)
    expected = circuits.model_logits(random_model("gpt2"), task)
    assert torch.equal(circuits.model_logits(model, task), expected)
    assert len(circuits.ACDC(0.05).discover(model, task))


def test_the_mode_is_there_again_after_a_call(parts):
    model, task, _ = parts
    with torch.autocast("cpu", dtype=torch.bfloat16), torch.inference_mode():
        circuits.model_logits(model, task)
        assert torch.is_autocast_enabled("cpu")
        assert torch.is_inference_mode_enabled()
    assert torch.is_grad_enabled()
