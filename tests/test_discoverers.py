"""The contract: what holds for every registered method, shipped or a user's."""

import copy
import dataclasses
import os
import subprocess
import sys
from typing import ClassVar

import pytest
import torch
from architectures import random_model, random_task
from random_transcoders import random_transcoders

import circuits
from circuits.discovery.checkpoint import FORMAT, FORMAT_VERSION
from circuits.discovery.discoverer import CircuitDiscoverer, Resumable
from circuits.models import HAS_HOOKED_TRANSFORMER, counting_passes
from circuits.system.files import read_tensors, write_tensors

pytestmark = pytest.mark.usefixtures("unchecked_types")

REQUIRED = {
    "acdc": {"threshold": 0.02},
    "batched-acdc": {"threshold": 0.02, "verify": True},
    "attribution-graph": {"transcoders": random_transcoders(random_model("gpt2"))},
}


@dataclasses.dataclass(frozen=True)
class InputOnly(CircuitDiscoverer):
    """Keep the edges out of the embedding: a user's method in one class.

    Reference: none; an example.

    Attributes:
        floor: the score of every other edge.
    """

    name: ClassVar[str] = "input-only"
    floor: float = 0.0

    def discover(self, model, task, *, graph=None, checkpoint=None, progress=None):
        graph = circuits.component_graph(model) if graph is None else graph
        from_input = graph.source == 0
        return circuits.Circuit(
            graph, torch.where(from_input, 1.0, self.floor), from_input, record=self.record()
        )


METHODS = circuits.discoverers()
every_method = pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
MAKES_ITS_GRAPH = "attribution-graph"
ON_A_GRAPH = {name: method for name, method in METHODS.items() if name != MAKES_ITS_GRAPH}
every_method_on_a_graph = pytest.mark.parametrize("method", ON_A_GRAPH.values(), ids=ON_A_GRAPH)


def made(method: type[CircuitDiscoverer]) -> CircuitDiscoverer:
    return method(**REQUIRED.get(method.name, {}))


@pytest.fixture(scope="module")
def model():
    return random_model("gpt2")


def test_the_shipped_methods_and_a_users_class_are_registered():
    assert {
        "acdc",
        "activation-patching",
        "batched-acdc",
        "eap",
        "eap-ig",
        "random",
        "input-only",
    } <= set(METHODS)


@every_method
def test_a_method_is_a_frozen_dataclass_that_says_what_it_is_and_where_it_comes_from(method):
    discoverer = made(method)
    assert dataclasses.is_dataclass(method)
    with pytest.raises(dataclasses.FrozenInstanceError):
        discoverer.anything = 1  # type: ignore[attr-defined]
    documentation = method.__doc__ or ""
    assert "Reference:" in documentation
    for field in dataclasses.fields(method):
        assert f"{field.name}: " in documentation, (
            f"{method.__name__} does not say what {field.name} is"
        )


@every_method_on_a_graph
def test_the_result_is_over_the_given_graph_and_says_how_it_was_found(method, model):
    graph = circuits.component_graph(model, split_embed=True)
    circuit = made(method).discover(model, random_task(), graph=graph)
    assert circuit.graph == graph
    assert circuit.record["method"] == method.name
    assert set(circuit.record["settings"]) == {field.name for field in dataclasses.fields(method)}
    assert circuit.selected or len(circuit) == len(graph)


def test_a_method_that_makes_its_own_graph_says_how_it_was_found_and_takes_no_other(model):
    method = METHODS[MAKES_ITS_GRAPH]
    circuit = made(method).discover(model, random_task())
    assert circuit.record["method"] == method.name
    assert set(circuit.record["settings"]) == {field.name for field in dataclasses.fields(method)}
    with pytest.raises(circuits.InputError, match="makes its graph of features itself"):
        made(method).discover(model, random_task(), graph=circuits.component_graph(model))


@every_method_on_a_graph
def test_a_graph_split_by_position_works(method, model):
    circuit = made(method).discover(
        model, random_task(ragged=True), graph=circuits.component_graph(model, positions=8)
    )
    assert len(circuit.graph) == 8 * 110


@every_method
def test_the_same_run_twice_gives_the_same_circuit_and_leaves_seeds_alone(method, model):
    state = torch.get_rng_state()
    assert made(method).discover(model, random_task()) == made(method).discover(
        model, random_task()
    )
    assert torch.equal(torch.get_rng_state(), state)


RESUMABLE = {name: method for name, method in METHODS.items() if issubclass(method, Resumable)}
SHIPPED = {name for name, method in METHODS.items() if method.__module__.startswith("circuits.")}


@pytest.mark.parametrize("method", RESUMABLE.values(), ids=RESUMABLE)
def test_an_interrupted_run_resumed_equals_an_uninterrupted_one(method, model, tmp_path):
    task, path = random_task(), tmp_path / "checkpoint.safetensors"
    uninterrupted = made(method).discover(model, task)
    steps: list[int] = []

    def stop_now_and_then(done: int, total: int) -> None:
        steps.append(done)
        if len(steps) % 5 == 0:
            raise KeyboardInterrupt

    for _ in range(200):
        try:
            resumed = made(method).discover(
                model, task, checkpoint=path, progress=stop_now_and_then
            )
            break
        except KeyboardInterrupt:
            continue
    assert resumed == uninterrupted
    assert resumed.record == uninterrupted.record
    assert steps == sorted(set(steps)), "a step was taken twice"


@pytest.mark.parametrize("name", sorted(SHIPPED - {"random"}))
def test_progress_starts_at_zero_before_the_model_runs(name, model):
    seen: list[tuple[int, int]] = []

    def report(done: int, total: int) -> None:
        assert seen or not counts["forward_passes"]
        seen.append((done, total))

    with counting_passes(model) as counts:
        made(METHODS[name]).discover(model, random_task(), progress=report)
    assert seen[0][0] == 0 < seen[0][1]
    assert seen[-1] == (seen[0][1], seen[0][1])


@pytest.mark.parametrize("name", sorted(SHIPPED - set(RESUMABLE)))
def test_a_method_that_cannot_resume_says_so(name, model, tmp_path):
    with pytest.raises(
        circuits.InputError, match=f"{name} cannot resume .* leave the checkpoint out"
    ):
        made(METHODS[name]).discover(model, random_task(), checkpoint=tmp_path / "checkpoint")
    assert sorted(RESUMABLE) == ["acdc", "activation-patching", "attribution-graph", "batched-acdc"]


def test_a_checkpoint_of_another_run_is_refused_rather_than_continued(model, tmp_path):
    path = tmp_path / "checkpoint.safetensors"
    circuits.ACDC(0.02).discover(model, random_task(), checkpoint=path)
    for other in (
        lambda: circuits.ACDC(0.03).discover(model, random_task(), checkpoint=path),
        lambda: circuits.ACDC(0.02).discover(model, random_task(seed=9), checkpoint=path),
        lambda: circuits.ACDC(0.02).discover(
            random_model("gpt2", seed=4), random_task(), checkpoint=path
        ),
    ):
        with pytest.raises(
            circuits.InputError, match="belongs to a run with other settings, model or prompts"
        ):
            other()
    path.write_bytes(path.read_bytes()[:50])
    with pytest.raises(circuits.InputError, match="truncated"):
        circuits.ACDC(0.02).discover(model, random_task(), checkpoint=path)


@pytest.mark.filterwarnings("ignore:custom is run by the reference executor")
def test_a_checkpoint_is_refused_when_what_its_metric_reads_or_the_model_has_changed(
    model, tmp_path
):
    task, model = random_task(), copy.deepcopy(model)
    scale, weights, log = {"all": 1.0}, [1.0], []

    def scaled(logits, clean_logits, task):
        log.append(len(logits))
        difference = (logits - clean_logits).square().mean(-1)
        return difference * scale["all"] * sum(weights)

    metric = circuits.Metric("scaled", scaled, "higher_is_damage")

    def search():
        return circuits.ACDC(0.02, metric=metric).discover(model, task, checkpoint=path)

    path = tmp_path / "checkpoint.safetensors"
    found = search()
    changes = {
        "an entry": (lambda: scale.update(all=100.0), lambda: scale.update(all=1.0)),
        "one more entry": (lambda: weights.append(99.0), weights.pop),
        "a hook": (
            lambda: model.add_hook("blocks.1.attn.hook_z", lambda z, hook: z * 0.5),
            model.reset_hooks,
        ),
        "an epsilon": (
            lambda: setattr(model.blocks[1].ln1, "eps", 1.0),
            lambda: setattr(model.blocks[1].ln1, "eps", model.cfg.eps),
        ),
    }
    refusals = dict.fromkeys(changes, "belongs to a run with other settings")
    if not HAS_HOOKED_TRANSFORMER:
        # This bridge itself goes on with the old one.
        refusals["an epsilon"] = "give other logits"
    for name, (change, undo) in changes.items():
        change()
        with pytest.raises(circuits.InputError, match=refusals[name]):
            search()
        undo()
        # The metric also notes down its calls, which changes nothing.
        assert log and search() == found


def test_a_checkpoint_of_another_version_is_said_to_be_that(model, tmp_path):
    path, task = tmp_path / "checkpoint.safetensors", random_task()
    circuits.ACDC(0.02).discover(model, task, checkpoint=path)
    state, metadata = read_tensors(path, FORMAT, FORMAT_VERSION)
    write_tensors(path, {"kept_before": state["kept"]}, metadata, FORMAT, FORMAT_VERSION)
    with pytest.raises(circuits.InputError, match="written by another version of this package"):
        circuits.ACDC(0.02).discover(model, task, checkpoint=path)


def test_an_empty_checkpoint_is_none(model):
    empty = circuits.Checkpoint()
    found = circuits.EAP().discover(model, random_task(), checkpoint=empty)
    assert found == circuits.EAP().discover(model, random_task())


def test_what_a_failing_metric_leaves_is_resumed(model, tmp_path):
    """Nothing already computed is lost when a run stops with an error. What is on the disk is no
    part of a metric.
    """
    path, task, calls = tmp_path / "checkpoint.safetensors", random_task(), []
    called, mended = tmp_path / "called", tmp_path / "mended"

    def sometimes_nan(logits, clean_logits, task):
        calls.append(1)
        with called.open("a") as file:
            print(file=file)
        fails = called.stat().st_size > 30 and not mended.exists()
        return (logits - clean_logits).square().mean(-1) * (float("nan") if fails else 1.0)

    metric = circuits.Metric("sometimes", sometimes_nan, "higher_is_damage")
    with pytest.raises(circuits.InputError, match="NaN"):
        circuits.ACDC(0.002, metric=metric).discover(model, task, checkpoint=path)
    mended.touch()
    before = len(calls)
    resumed = circuits.ACDC(0.002, metric=metric).discover(model, task, checkpoint=path)
    assert len(calls) - before < resumed.record["measured"] - 10
    assert resumed.kept.equal(
        circuits.ACDC(0.002, metric="squared_error").discover(model, task).kept
    )


def test_a_guess_that_leads_where_the_metric_has_no_value_does_not_stop_the_search(model):
    task, seen, without_value = random_task(), [], []

    def recording(logits, clean_logits, task):
        seen.append(float((logits - clean_logits).square().mean()))
        return (logits - clean_logits).square().mean(-1)

    def without_value_elsewhere(logits, clean_logits, task):
        values = (logits - clean_logits).square().mean(-1)
        without_value.append(float(values.mean()) > max(seen) * 1.001)
        return values * float("nan") if without_value[-1] else values

    first, second = (
        circuits.Metric(f.__name__, f, "higher_is_damage")
        for f in (recording, without_value_elsewhere)
    )
    sequential = circuits.ACDC(0.02, metric=first, speculate=False).discover(model, task)
    assert circuits.ACDC(0.02, metric=second).discover(model, task).kept.equal(sequential.kept)
    assert any(without_value)


def test_results_and_the_text_of_tasks_do_not_depend_on_the_hash_seed(capsys):
    script = (
        "from architectures import random_model, random_task\n"
        "from circuits.tasks.families import task_families\n"
        "import circuits, torch\n"
        "torch.set_num_threads(1)\n"
        "model, task = random_model('gpt2', n_layers=1), random_task()\n"
        "for method in (circuits.ACDC(0.02), circuits.ACDC(0.02, order='original'), "
        "circuits.EAP(), circuits.RandomScores()):\n"
        "    circuit = method.discover(model, task)\n"
        "    print([str(edge) for edge in circuit.edges], circuit.scores.tolist())\n"
        "print(task.digest(), circuit.graph.model.weights)\n"
        "for family in task_families().values():\n"
        "    if family.__module__.startswith('circuits.tasks.families.'):\n"
        "        print(ascii(family().pairs(20, 7, 'test')))\n"
    )
    other_seed = "1" if os.environ.get("PYTHONHASHSEED") != "1" else "2"
    there = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", f"import sys; sys.path[:0] = {sys.path}\n{script}"],
        env={**os.environ, "PYTHONHASHSEED": other_seed},
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    exec(script, {})
    assert capsys.readouterr().out == there
    assert "->" in there


def test_methods_of_other_packages_are_found_by_their_entry_point(monkeypatch):
    loaded = []

    class Entry:
        def load(self):
            loaded.append("package")

    monkeypatch.setattr(
        "circuits.discovery.registry.entry_points",
        lambda group: [Entry()] if group == "circuits.discoverers" else [],
    )
    circuits.discoverers()
    assert loaded == ["package"]


def test_two_methods_of_one_name_are_refused():
    with pytest.raises(circuits.InputError, match="two methods are named 'eap'"):

        @dataclasses.dataclass(frozen=True)
        class Other(CircuitDiscoverer):
            name: ClassVar[str] = "eap"

            def discover(self, model, task, *, graph=None, checkpoint=None, progress=None):
                raise AssertionError("never called")


def test_random_scores_are_the_seeds_and_nothing_elses(model):
    a, b = (
        circuits.RandomScores(seed=seed).discover(model, random_task()).scores for seed in (0, 1)
    )
    assert not torch.equal(a, b)
    assert torch.equal(
        a,
        circuits.RandomScores().discover(random_model("gpt2", seed=7), random_task(seed=3)).scores,
    )
