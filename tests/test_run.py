"""Runs: folders that are found again, resumed after being killed, and shared by processes."""

import contextlib
import copy
import dataclasses
import errno
import functools
import importlib
import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy
import pytest
import torch
from architectures import of_hooked_transformers, random_model, random_task, weight
from safetensors import safe_open

import circuits
from circuits.cli.main import main
from circuits.discovery.discoverer import CircuitDiscoverer
from circuits.runs.circuit_run import (
    CHECKPOINT,
    METRICS,
    PAGE,
    RECORD,
    counting_passes,
    evaluate_run,
    load_run,
    run,
)
from circuits.system.code_digest import code_digest
from circuits.system.files import read_json, read_tensors, write_json, write_tensors

# Whole methods run: types are checked where each is tested.
pytestmark = pytest.mark.usefixtures("unchecked_types")

DISCOVER = [
    "discover",
    "--method",
    "acdc",
    "--threshold",
    "0.03",
    "--task",
    "ioi",
    "--n",
    "4",
    "--n-eval",
    "4",
    "--json",
]


@pytest.fixture(scope="module")
def model():
    return random_model("gpt2")


def discover(folder: Path, answer: Path) -> None:
    """Run the command, and write what it answers into a file."""
    torch.set_num_threads(1)
    with answer.open("w") as file, contextlib.redirect_stdout(file):
        assert main([*DISCOVER, "--out", str(folder)]) == 0


def discovered(folder: Path) -> dict:
    """What the command answers in this process."""
    answer = folder.with_suffix(".json")
    discover(folder, answer)
    return json.loads(answer.read_text())


def tried(checkpoint: Path) -> int:
    """How many decisions a run has made; 0 where it has just ended, without its checkpoint."""
    try:
        return int(read_tensors(checkpoint, "circuits.checkpoint", 1)[0]["evaluations"])
    except circuits.InputError:
        return 0


def test_a_run_leaves_circuit_record_and_picture(model, tmp_path):
    found = run(circuits.ACDC(0.02), model, random_task(), out=tmp_path, notes={"seed": 3})
    assert {path.name for path in found.folder.iterdir()} == {
        "circuit.safetensors",
        RECORD,
        PAGE,
        ".lock",
    }
    assert found.folder.parent == tmp_path / "custom"
    record = read_json(found.folder / RECORD, "circuits.run", 1)
    assert record["method"] == "acdc"
    settings = {
        "threshold": 0.02,
        "metric": "kl",
        "ablation": "resample",
        "order": "topological",
        "absolute": False,
    }
    assert record["settings"] == {
        **settings,
        "precision": None,
        "speculate": True,
        "guess": "own",
        "max_memory": None,
    }
    assert record["versions"]["torch"] == torch.__version__
    assert record["notes"] == {"seed": 3}
    assert record["evaluations"] > 0
    assert record["edges"] == len(found.circuit)
    assert str(found.circuit.edges[0]) in (found.folder / PAGE).read_text().replace("&gt;", ">")


def test_a_finished_run_is_found_again_and_not_computed_again(model, tmp_path):
    first = run(circuits.EAP(), model, random_task(), out=tmp_path)
    with counting_passes(model) as passes:
        second = run(circuits.EAP(), model, random_task(), out=tmp_path)
    assert passes["forward_passes"] == 0
    assert (first.reused, second.reused) == (False, True)
    assert second.circuit == first.circuit
    assert second.record == first.record


def test_other_settings_prompts_weights_or_graphs_are_other_runs(model, tmp_path):
    task = random_task()
    folders = {
        run(circuits.EAP(), model, task, out=tmp_path).folder,
        run(circuits.EAP(gradient_at="both"), model, task, out=tmp_path).folder,
        run(circuits.EAP(), model, random_task(seed=5), out=tmp_path).folder,
        run(circuits.EAP(), random_model("gpt2", seed=2), task, out=tmp_path).folder,
        run(
            circuits.EAP(),
            model,
            task,
            out=tmp_path,
            graph=circuits.component_graph(model, split_embed=True),
        ).folder,
        run(
            circuits.EAP(),
            model,
            task,
            out=tmp_path,
            graph=circuits.component_graph(model, positions=8),
        ).folder,
    }
    assert len(folders) == 6


def test_what_only_shares_a_name_is_another_run(model, tmp_path):
    """Given outputs, means over other prompts, noise, a metric of one's own, and an architecture
    that differs in more than its weights' shapes.
    """
    graph, task = circuits.component_graph(model), random_task()
    given = [
        circuits.Ablation(
            "given", outputs={node: torch.full((24,), float(value)) for node in graph.nodes[:-1]}
        )
        for value in (0, 1)
    ]
    means = [
        circuits.Ablation("mean", over=random_task(seed=seed, length=length))
        for seed, length in ((1, 8), (2, 8), (2, 9))
    ]
    noise = [
        circuits.Ablation("noise"),
        circuits.Ablation("noise", scale=1.0),
        circuits.Ablation("noise", seed=1),
    ]
    own = [
        circuits.Metric(
            "mine", lambda logits, clean_logits, task: logits[:, 0], "higher_is_damage"
        ),
        circuits.Metric(
            "mine", lambda logits, clean_logits, task: logits[:, 1], "higher_is_damage"
        ),
    ]
    capped = random_model("gpt2", output_logits_soft_cap=1.0)
    assert torch.equal(weight(capped, "embed.W_E"), weight(model, "embed.W_E"))
    runs = [
        *(
            run(circuits.EAP(ablation=ablation), model, task, out=tmp_path)
            for ablation in (*given, *means, *noise)
        ),
        *(run(circuits.EAP(metric=metric), model, task, out=tmp_path) for metric in own),
        *(run(circuits.EAP(), each, task, out=tmp_path) for each in (model, capped)),
    ]
    assert not any(found.reused for found in runs)
    assert len({found.folder for found in runs}) == 12


def test_passes_and_prompts_are_counted(model):
    with counting_passes(model) as passes:
        model(torch.zeros(3, 5, dtype=torch.long))
        model(torch.zeros(2, 5, dtype=torch.long))
    assert passes == {"forward_passes": 2, "prompts_run": 5}
    model(torch.zeros(2, 5, dtype=torch.long))
    assert passes["forward_passes"] == 2


def test_a_model_run_is_a_forward_pass_or_as_many_node_evaluations_as_the_model_has_heads_and_mlps(
    model, tmp_path
):
    graph = circuits.component_graph(model, positions=8)
    eap, acdc = (
        run(method, model, random_task(), out=tmp_path, graph=graph)
        for method in (circuits.EAP(), circuits.ACDC(0.02))
    )
    assert eap.model_runs == eap.record["forward_passes"] > 0
    assert (
        acdc.model_runs == acdc.record["node_evaluations"] / (2 * 5) > acdc.record["forward_passes"]
    )
    assert f"{acdc.model_runs:,.0f}" in (acdc.folder / PAGE).read_text()


def test_an_evaluation_is_kept_by_what_it_depends_on(model, tmp_path):
    found = run(circuits.EAP(), model, random_task(), out=tmp_path)
    first = evaluate_run(found, model, random_task(seed=2), size=20)
    with counting_passes(model) as passes:
        again = evaluate_run(found, model, random_task(seed=2), size=20)
    assert again == first
    assert passes["forward_passes"] == 0
    assert first["values"]["kl"]["circuit"] == pytest.approx(
        circuits.evaluate(model, found.circuit.top(20), random_task(seed=2)).kl
    )
    evaluate_run(found, model, random_task(seed=2), size=30)
    evaluate_run(found, model, random_task(seed=2), size=30, ablation="zero")
    assert len(read_json(found.folder / METRICS, "circuits.metrics", 1)["evaluations"]) == 3


def test_folders_without_a_finished_run_say_so(model, tmp_path):
    with pytest.raises(circuits.InputError, match="holds no finished run"):
        load_run(tmp_path)
    (tmp_path / CHECKPOINT).write_bytes(b"")
    with pytest.raises(
        circuits.InputError, match=r"unfinished: give the same discover command again"
    ):
        load_run(tmp_path)


def test_damaged_and_newer_run_folders_are_one_clear_line(model, tmp_path):
    found = run(circuits.EAP(), model, random_task(), out=tmp_path)
    record = (found.folder / RECORD).read_text()
    (found.folder / RECORD).write_text(record[:100])
    with pytest.raises(circuits.InputError, match=r"record\.json is truncated"):
        load_run(found.folder)
    write_json(found.folder / RECORD, {}, "circuits.run", 2)
    with pytest.raises(circuits.InputError, match=r"format version 2.*upgrade"):
        load_run(found.folder)
    write_json(found.folder / RECORD, {"method": "eap"}, "circuits.run", 1)
    with pytest.raises(circuits.InputError, match=r"record\.json is damaged: it has no settings"):
        load_run(found.folder)
    (found.folder / RECORD).write_text(record)
    evaluate_run(load_run(found.folder), model, random_task(), size=5)
    metrics = found.folder / METRICS
    metrics.write_text(metrics.read_text()[:40])
    with pytest.raises(circuits.InputError, match=r"metrics\.json is truncated"):
        evaluate_run(load_run(found.folder), model, random_task(), size=5)
    circuit = found.folder / "circuit.safetensors"
    circuit.write_bytes(circuit.read_bytes()[:-5])
    with pytest.raises(circuits.InputError, match="truncated"):
        run(circuits.EAP(), model, random_task(), out=tmp_path)


def test_killed_in_the_middle_of_acdc_and_started_again_the_circuit_is_the_same(
    new_process, tmp_path
):
    process = new_process(target=discover, args=(tmp_path / "killed", tmp_path / "answer"))
    process.start()
    while process.is_alive() and not any(
        tried(path) >= 10 for path in (tmp_path / "killed").rglob(CHECKPOINT)
    ):
        time.sleep(0.005)
    process.kill()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    (found,) = (tmp_path / "killed").rglob(CHECKPOINT)
    assert 10 <= tried(found) < 200
    assert not (found.parent / RECORD).exists()
    resumed, whole = (discovered(tmp_path / name) for name in ("killed", "whole"))
    a, b = (load_run(Path(each["folder"])) for each in (resumed, whole))
    assert a.circuit == b.circuit
    assert a.record["resumed"]
    assert a.record["evaluations"] == b.record["evaluations"]
    # What had been tried before was not tried again.
    assert a.record["measured"] == b.record["measured"]  # nothing was measured twice
    assert not list(tmp_path.rglob(CHECKPOINT))


def test_two_processes_on_one_run_folder_take_turns(new_process, tmp_path):
    files = [tmp_path / name for name in ("first", "second")]
    processes = [new_process(target=discover, args=(tmp_path / "runs", file)) for file in files]
    for process in processes:
        process.start()
    for process in processes:
        process.join(timeout=300)
        assert process.exitcode == 0
    answers = [json.loads(file.read_text()) for file in files]
    assert answers[0]["folder"] == answers[1]["folder"]
    assert answers[0]["values"] == answers[1]["values"]
    assert sorted(each["reused"] for each in answers) == [False, True]
    assert load_run(Path(answers[0]["folder"])).record["edges"] == answers[0]["edges"]


# What the code of a method or metric depends on

METHOD = '''
from dataclasses import dataclass
from typing import ClassVar

import torch

import circuits
import {helper}


@dataclass(frozen=True)
class Mine(circuits.CircuitDiscoverer):
    """A method of one's own."""

    name: ClassVar[str] = "{helper} mine"

    def find(self, model, task, graph, saved, progress):
        scores = torch.full((len(graph),), {helper}.value())
        return circuits.Circuit.full(graph, scores, record=self.record())
'''


@pytest.fixture
def loaded(tmp_path, monkeypatch):
    """Write a method's file, with one beside it that it imports, and load both."""
    monkeypatch.syspath_prepend(tmp_path)

    def write_and_load(helper: str, *, extra: str = "") -> CircuitDiscoverer:
        name = f"helper_{tmp_path.name}"
        for module, source in (
            (name, f"def value():\n    return {helper}\n"),
            (f"method_{tmp_path.name}", METHOD.format(helper=name) + extra),
        ):
            (tmp_path / f"{module}.py").write_text(source)
            importlib.invalidate_caches()
            sys.modules.pop(module, None)
            # Two edits within a second have one time stamp.
            shutil.rmtree(tmp_path / "__pycache__", ignore_errors=True)
            method = importlib.import_module(module)
        return method.Mine()

    return write_and_load


def test_an_edited_method_or_an_edited_file_that_it_imports_is_another_run(loaded, model, tmp_path):
    found = []
    for arguments in ({"helper": "1.0"}, {"helper": "2.0"}, {"helper": "2.0", "extra": "x = 1\n"}):
        found.append(run(loaded(**arguments), model, random_task(), out=tmp_path / "runs"))
    assert [float(one.circuit.scores[0]) for one in found] == [1.0, 2.0, 2.0]
    assert not any(one.reused for one in found)
    again = run(loaded("1.0"), model, random_task(), out=tmp_path / "runs")
    assert again.reused and again.circuit == found[0].circuit


def test_a_file_that_was_edited_but_not_loaded_again_does_not_store_the_old_result_as_the_new(
    loaded, model, tmp_path
):
    old = loaded("1.0")
    (tmp_path / f"helper_{tmp_path.name}.py").write_text("def value():\n    return 2.0\n")
    assert run(old, model, random_task(), out=tmp_path / "runs").circuit.scores[0] == 1
    found = run(loaded("2.0"), model, random_task(), out=tmp_path / "runs")
    assert not found.reused
    assert found.circuit.scores[0] == 2


SCALE = 1.0


class Scaled:
    """A metric that is an object."""

    def __init__(self, scale):
        self.scale = scale

    def __call__(self, logits, clean_logits, task):
        return logits[:, 0] * self.scale


def scaled(logits, clean_logits, task, scale=1.0):
    return logits[:, 0] * scale


def by_global(logits, clean_logits, task):
    return logits[:, 0] * SCALE


def by_closure(scale):
    return lambda logits, clean_logits, task: logits[:, 0] * scale


HELD = {
    "a closure": by_closure,
    "a tensor in a closure": lambda scale: by_closure(torch.tensor(scale)),
    "a partial function": lambda scale: functools.partial(scaled, scale=scale),
    "an attribute": Scaled,
    "a bound method": lambda scale: Scaled(scale).__call__,
    "a decorated function": lambda scale: functools.wraps(scaled)(by_closure(scale)),
    "code without a file": lambda scale: eval(
        f"lambda logits, clean, task: logits[:, 0] * {scale}"
    ),
}


@pytest.mark.parametrize("held", HELD)
def test_metrics_of_one_name_that_hold_other_data_are_other_runs_and_evaluations(
    held, model, tmp_path
):
    task = random_task()
    metrics = [circuits.Metric("m", HELD[held](scale), "lower_is_damage") for scale in (1.0, 2.0)]
    runs = [run(circuits.EAP(metric=metric), model, task, out=tmp_path) for metric in metrics]
    assert [found.reused for found in runs] == [False, False]
    assert str(metrics[0]) != str(metrics[1])
    values = [
        evaluate_run(runs[0], model, task, metrics=[metric])["values"]["m"]["circuit"]
        for metric in metrics
    ]
    assert values[1] == pytest.approx(2 * values[0])
    same = circuits.Metric("m", HELD[held](1.0), "lower_is_damage")
    assert run(circuits.EAP(metric=same), model, task, out=tmp_path).reused


@pytest.mark.parametrize("name", ["mine", "kl", "logit_difference"])
def test_a_metric_told_by_its_name_is_the_one_that_is_registered_under_it_now(
    name, model, tmp_path, monkeypatch
):
    task = random_task()
    own = dataclasses.replace(task, metric=name)

    @dataclasses.dataclass(frozen=True)
    class Holding(circuits.EAP):
        held: Any = None

    holding = [Holding(held=held) for held in ((name,), {"by": name}, circuits.EAP(metric=name))]
    methods = (circuits.EAP(metric=name), task), (circuits.EAP(metric=None), own)
    found, identities = [], []
    for scale in (1.0, 2.0):
        metric = circuits.Metric(name, by_closure(scale), "lower_is_damage")
        monkeypatch.setitem(circuits.METRICS, name, metric)
        for method, each in methods:
            circuit = run(method, model, each, out=tmp_path / each.metric)
            assert not circuit.reused
            assert circuit.circuit.scores.equal(method.discover(model, each).scores)
            assert run(method, model, each, out=tmp_path / each.metric).reused
        found.append(evaluate_run(circuit, model, task, metrics=name)["values"][name]["circuit"])
        identities.append([str(method.identity()) for method in holding])
    assert found[1] == pytest.approx(2 * found[0])
    assert not {*identities[0]} & {*identities[1]}


@dataclasses.dataclass
class OneLogit:
    """Dataclasses that can be changed have no hash."""

    token: int

    def __call__(self, logits, clean_logits, task):
        return logits[:, self.token]


def test_the_metric_of_a_task_may_be_any_object_that_can_be_called(
    model, tmp_path, unchecked_types
):
    reused = []
    for token in (0, 0, 1):
        metric = circuits.Metric("mine", OneLogit(token), "lower_is_damage")
        task = dataclasses.replace(random_task(), metric=metric)
        reused.append(run(circuits.EAP(metric=None), model, task, out=tmp_path).reused)
    assert reused == [False, True, False]


def test_a_method_adds_to_what_its_runs_are_found_by(model, tmp_path):
    @dataclasses.dataclass(frozen=True)
    class ByVersion(circuits.EAP):
        def identity(self):
            return {**super().identity(), "version": version}

    reused = []
    for version in (1, 1, 2):  # noqa: B007
        reused.append(run(ByVersion(), model, random_task(), out=tmp_path).reused)
    assert reused == [False, True, False]


def test_graphs_of_other_nodes_are_other_runs(model, tmp_path):
    """With one node more in front, the edges of another pair of heads have the same numbers."""
    for split_embed, name in ((False, "a0.h1->a1.h1.q"), (True, "a0.h0->a1.h0.q")):
        graph = circuits.component_graph(model, split_embed=split_embed).only([name])
        found = run(circuits.EAP(), model, random_task(), graph=graph, out=tmp_path)
        assert not found.reused and list(map(str, found.circuit.graph.edges)) == [name]


def test_tokens_that_were_appended_and_tokens_that_were_given_are_two_tasks(toy_world):
    """Noise goes to the prompt only."""
    prompts = ("So Mary and John went to", "So Kate and John went to", " the store in")
    task = circuits.Task.from_prompts(toy_world, [prompts])
    given = dataclasses.replace(task, prompts=None)
    assert given.clean.equal(task.clean) and given.digest() != task.digest()
    noise = circuits.EAP(ablation="noise", metric="kl", gradient_at="corrupted")
    scores = [noise.discover(toy_world, each).scores for each in (task, given)]
    assert not scores[0].allclose(scores[1])


def test_weights_of_which_only_the_order_differs_are_two_models():
    model = random_model("gpt2", d_vocab=128, d_model=128)
    digests = []
    for order in (range(128), reversed(range(128))):
        weight(model, "unembed.W_U").copy_(torch.eye(128)[list(order)])
        digests.append(code_digest(model))
    assert digests[0] != digests[1]


def test_a_checkpoint_belongs_to_the_metric_that_a_name_means_now(model, tmp_path, monkeypatch):
    def stop(done, total):
        if done > 1:
            raise KeyboardInterrupt

    options = {"checkpoint": tmp_path / "checkpoint.safetensors", "progress": stop}
    for scale, expected in ((1.0, KeyboardInterrupt), (2.0, circuits.InputError)):
        metric = circuits.Metric("mine", by_closure(scale), "lower_is_damage")
        monkeypatch.setitem(circuits.METRICS, "mine", metric)
        with pytest.raises(expected):
            circuits.ACDC(0.02, metric="mine").discover(model, random_task(), **options)


def test_two_names_of_a_metric_make_one_run_and_one_evaluation(model, tmp_path):
    task = random_task()
    names = "logit_difference", "logit_diff", circuits.METRICS["logit_difference"]
    runs = [run(circuits.EAP(metric=name), model, task, out=tmp_path) for name in names]
    assert [found.reused for found in runs] == [False, True, True]
    for name in names:
        evaluate_run(runs[0], model, task, metrics=name)
    assert len(read_json(runs[0].folder / METRICS, "circuits.metrics", 1)["evaluations"]) == 1


def test_a_global_that_a_metric_reads_is_part_of_it(model, tmp_path, monkeypatch):
    metric = circuits.Metric("m", by_global, "lower_is_damage")
    first = run(circuits.EAP(metric=metric), model, random_task(), out=tmp_path)
    monkeypatch.setitem(globals(), "SCALE", 2.0)
    second = run(circuits.EAP(metric=metric), model, random_task(), out=tmp_path)
    assert not second.reused
    assert second.circuit.scores.allclose(2 * first.circuit.scores)


def test_a_value_in_a_module_in_a_package_that_a_metric_reads_is_part_of_it(tmp_path, monkeypatch):
    name = f"package_{tmp_path.name}"
    for file, source in {
        f"{name}/__init__.py": "",
        f"{name}/inner/__init__.py": "",
        f"{name}/inner/constants.py": "SCALE = 1.0\n",
        f"use_{name}.py": f"import {name}.inner.constants\n"
        f"def metric(logits, clean, task):\n    return logits * {name}.inner.constants.SCALE\n",
    }.items():
        (tmp_path / file).parent.mkdir(exist_ok=True)
        (tmp_path / file).write_text(source)
    monkeypatch.syspath_prepend(tmp_path)
    metric = importlib.import_module(f"use_{name}").metric
    before = code_digest(metric)
    monkeypatch.setattr(sys.modules[f"{name}.inner.constants"], "SCALE", 2.0)
    assert code_digest(metric) != before


def test_a_value_in_a_module_that_a_metric_imports_itself_is_part_of_it(tmp_path, monkeypatch):
    name = f"constants_{tmp_path.name}"
    (tmp_path / f"{name}.py").write_text("SCALE = 1.0\n")
    metrics = f"use_{name}"
    (tmp_path / f"{metrics}.py").write_text(
        f"def whole(logits, clean, task):\n    import {name}\n    return logits * {name}.SCALE\n"
        f"def part(logits, clean, task):\n    from {name} import SCALE\n    return logits * SCALE\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    module, constants = map(importlib.import_module, (metrics, name))
    before = code_digest(module.whole), code_digest(module.part)
    monkeypatch.setattr(constants, "SCALE", 2.0)
    after = code_digest(module.whole), code_digest(module.part)
    assert before[0] != after[0] and before[1] != after[1]


def test_what_is_copied_by_a_name_that_no_module_has_is_named():
    digest = code_digest(numpy.frompyfunc(lambda x: 2 * x, 1, 1))
    assert "numpy.ufunc" in digest.unknown
    assert not code_digest(numpy.add).unknown


def test_only_globals_that_code_names_as_such_are_part_of_it(monkeypatch):
    def by_mean(logits, clean_logits, task):
        return logits.mean(-1) * max(SCALE for _ in "1")

    before = code_digest(by_mean)
    monkeypatch.setitem(globals(), "mean", 3.0)
    assert code_digest(by_mean) == before
    monkeypatch.setitem(globals(), "SCALE", 2.0)
    assert code_digest(by_mean) != before


class Hidden:
    """What it holds is not in its copies; a lock in it changes nothing."""

    def __init__(self, scale):
        self.scale, self.lock = scale, threading.Lock()

    def __getstate__(self):
        return {}


class WithoutCopies(Hidden):
    def __reduce__(self):
        return Hidden, (1.0,)


class WithSlots:
    __slots__ = ("scale",)

    def __init__(self, scale):
        self.scale = scale

    def __reduce__(self):
        return WithSlots, (1.0,)


class Labelled(set):
    """A set with a name."""


def labelled(value, scale):
    value.scale = scale
    return value


COMPILED = torch.compile(scaled, backend="eager")
PAIRS = {
    "what a copy leaves out": lambda scale: Hidden(scale),
    "what makes no part of a copy": lambda scale: WithoutCopies(scale),
    "the scale of a quantised tensor": lambda scale: torch.quantize_per_tensor(
        torch.full((4,), 10 * scale), scale, 0, torch.qint8
    ),
    "a sparse tensor": lambda scale: (scale * torch.eye(3)).to_sparse(),
    "a sparse tensor by rows": lambda scale: (scale * torch.eye(3)).to_sparse_csr(),
    "a complex tensor": lambda scale: torch.full((3,), scale * 1j, dtype=torch.complex128),
    "a conjugate": lambda scale: torch.full((3,), scale * 1j).conj(),
    "a slot that makes no part of a copy": lambda scale: WithSlots(scale),
    "an attribute of a tensor": lambda scale: labelled(torch.ones(2), scale),
    "an attribute of a set": lambda scale: labelled(Labelled("ab"), scale),
    "the mask of an array": lambda scale: numpy.ma.masked_array([1, 2], [True, scale == 1]),
    "a single number of a table": lambda scale: torch.full((3, 3), scale)[:1, 0],
    "a compiled function": lambda scale: torch.compile(by_closure(scale), backend="eager"),
    "a decorated compiled function": lambda scale: functools.wraps(COMPILED)(by_closure(scale)),
    "a compiled module": lambda scale: torch.compile(Filled(scale), backend="eager"),
    "a scripted function": lambda scale: torch.jit.trace(
        lambda x: x + torch.full((500,), scale), torch.ones(500)
    ),
}  # fmt: skip


class Filled(torch.nn.Module):
    def __init__(self, value):
        super().__init__()
        value = value if isinstance(value, torch.Tensor) else torch.tensor(value)
        self.register_buffer("table", value)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", PAIRS)
def test_what_differs_in_value_differs_in_digest_and_what_is_made_alike_does_not(name):
    one, two, same = (code_digest(PAIRS[name](scale)) for scale in (1.0, 2.0, 1.0))
    assert not one.unknown
    assert one == same != two


@of_hooked_transformers
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "name", ["the scale of a quantised tensor", "a sparse tensor", "a complex tensor"]
)
def test_a_buffer_of_any_kind_is_part_of_a_model(name, model):
    digests = []
    for scale in (1.0, 2.0):
        changed = copy.deepcopy(model)
        changed.blocks[0].mlp.extra = Filled(PAIRS[name](scale))
        digests.append(code_digest(changed))
    assert digests[0] != digests[1] and not digests[0].unknown


@of_hooked_transformers
def test_a_buffer_without_values_is_named(model):
    changed = copy.deepcopy(model)
    changed.blocks[0].mlp.extra = Filled(torch.empty(2, device="meta"))
    assert "blocks.0.mlp.extra.table holds a" in code_digest(changed).unknown


def test_a_tokenizer_that_was_used_counts_as_before(toy_world):
    tokenizer = copy.deepcopy(toy_world.tokenizer)
    before = code_digest(tokenizer)
    tokenizer(["a", "a a"], padding=True, truncation=True, max_length=4, return_tensors="pt")
    assert code_digest(tokenizer) == before and not before.unknown
    changes = {
        "split_special_tokens": lambda: setattr(tokenizer, "split_special_tokens", True),
        "a word": lambda: tokenizer.add_tokens(["another"]),
        "an attribute of one's own": lambda: setattr(tokenizer, "scale", 2.0),
    }
    digests = [before]
    for change in changes.values():
        change()
        digests.append(code_digest(tokenizer))
    assert len({digest.text for digest in digests}) == len(digests)


class Table(dict):
    """A metric that is a dictionary with more to it."""

    def __call__(self, logits, clean_logits, task):
        return logits[:, 0] * self.scale


def test_an_attribute_of_a_dictionary_or_tuple_of_ones_own_class_is_part_of_it():
    tables = [Table(a=1), Table(a=1)]
    for scale, table in enumerate(tables):
        table.scale = scale
    assert code_digest(tables[0]) != code_digest(tables[1])
    assert code_digest(tables[1]) == code_digest(copy.deepcopy(tables[1]))


def test_a_metric_that_notes_down_its_calls_is_found_again_and_one_that_reads_its_notes_is_not(
    model, tmp_path
):
    calls, times = [], []

    def noting(logits, clean_logits, task):
        calls.append(len(logits))
        return logits[:, 0]

    def reading(logits, clean_logits, task):
        times.append(1)
        return logits[:, 0] * len(times)

    for function, is_found in ((noting, True), (reading, False)):
        metric = circuits.Metric("m", function, "lower_is_damage")
        found = [run(circuits.EAP(metric=metric), model, random_task(), out=tmp_path) for _ in "12"]
        assert [each.reused for each in found] == [False, is_found]
    assert calls and times


ACTIVATIONS, TIMES, SEEN, PAIR = {}, Counter(), [], [1, 2]


def counting():
    n = 0

    def count(x, hook):
        nonlocal n
        n += 1

    return count


def keeping(x, hook):
    ACTIVATIONS[hook.name] = x.detach()
    ACTIVATIONS[hook.name + str(len(hook.name))] = None


def counting_by_point(x, hook):
    TIMES[hook.name] += 1


def listing(x, hook):
    SEEN.append(x)


def unpacking(x, hook):
    PAIR[0] += 1
    TIMES[hook.name], _ = PAIR


def in_context(x, hook):
    hook.ctx["n"] = hook.ctx.get("n", 0) + 1


def accumulating(x, hook):
    ACTIVATIONS[hook.name] = ACTIVATIONS.get(hook.name, 0) + x


POINT = "blocks.0.hook_mlp_out"
LOGGING = {
    "a dictionary": (lambda model: model.add_hook(POINT, keeping), True),
    "a method of a dictionary": (
        lambda model: model.add_hook(POINT, lambda x, hook: ACTIVATIONS.__setitem__(hook.name, x)),
        True,
    ),
    "a list": (lambda model: model.add_hook(POINT, listing), True),
    "a context that it reads": (lambda model: model.add_hook(POINT, in_context), False),
    "TransformerLens' cache": (lambda model: model.add_caching_hooks([POINT]), True),
    "a dictionary that is read": (
        lambda model: model.add_hook(POINT, accumulating),
        False,
    ),
    "a number": (lambda model: model.add_hook(POINT, counting()), False),
    "numbers by name": (lambda model: model.add_hook(POINT, counting_by_point), False),
    "a list that is unpacked": (lambda model: model.add_hook(POINT, unpacking), False),
}


@pytest.mark.parametrize("log", LOGGING)
def test_a_hook_that_only_notes_down_what_it_sees_is_the_same_afterwards(log, model):
    change, is_same = LOGGING[log]
    model = copy.deepcopy(model)
    change(model)
    for notes in (ACTIVATIONS, TIMES, SEEN):
        notes.clear()
    before = code_digest(model)
    with torch.no_grad():
        model(random_task().clean)
    assert (code_digest(model) == before) == is_same


# Models that a user has changed


SLOWER = "ignore:.*is run by the reference executor:UserWarning"


@of_hooked_transformers
@pytest.mark.filterwarnings(SLOWER)
def test_a_changed_model_is_another_run_and_another_evaluation(model, tmp_path):
    model, task = copy.deepcopy(model), random_task()
    plain = run(circuits.EAP(), model, task, out=tmp_path)
    value = evaluate_run(plain, model, task, size=20)
    scores = [plain.circuit.scores]
    norm, mlp = model.blocks[1].ln1, model.blocks[1].mlp
    halved, act_fn = lambda z, hook: z * 0.5, mlp.act_fn
    for change, undo in (
        (lambda: model.add_hook("blocks.1.attn.hook_z", halved), model.reset_hooks),
        (lambda: setattr(norm, "eps", 1.0), lambda: setattr(norm, "eps", model.cfg.eps)),
        (lambda: setattr(mlp, "act_fn", torch.relu), lambda: setattr(mlp, "act_fn", act_fn)),
    ):
        change()
        found = run(circuits.EAP(), model, task, out=tmp_path)
        assert not found.reused
        assert found.circuit.scores.equal(circuits.EAP().discover(model, task).scores)
        assert not any(found.circuit.scores.equal(other) for other in scores)
        scores.append(found.circuit.scores)
        changed = evaluate_run(plain, model, task, size=20)
        assert changed["values"]["kl"]["circuit"] == pytest.approx(
            circuits.evaluate(model, plain.circuit.top(20), task).kl
        )
        assert changed != value
        assert run(circuits.EAP(), model, task, out=tmp_path).reused
        undo()
        assert run(circuits.EAP(), model, task, out=tmp_path).folder == plain.folder


@of_hooked_transformers
def test_a_stored_graph_is_not_that_of_a_changed_model(toy_world, tmp_path):
    model, method = copy.deepcopy(toy_world), circuits.AttributionGraph("toy-world-plt")
    circuits.run_graph(method, model, "Dallas is in", out=tmp_path)
    assert circuits.run_graph(method, model, "Dallas is in", out=tmp_path).reused
    model.blocks[1].attn.attn_scale *= 2
    found = circuits.run_graph(method, model, "Dallas is in", out=tmp_path)
    assert not found.reused
    expected = method.attribute(model, "Dallas is in")
    assert found.graph.nodes.activation.allclose(expected.nodes.activation, equal_nan=True)


@of_hooked_transformers
def test_a_method_that_is_put_into_a_class_of_another_package_changes_the_digest(
    model, monkeypatch
):
    plain, kind = code_digest(model), type(model.blocks[0].mlp)
    forward = kind.forward
    halved = functools.partialmethod(lambda self, by, x: forward(self, x) * by, 0.5)
    for put in (
        lambda self, x: forward(self, x) * 0.5, halved, staticmethod(torch.relu),
        staticmethod(lambda x: x), property(lambda self: torch.relu), Scaled(0.5),
    ):  # fmt: skip
        monkeypatch.setattr(kind, "forward", put)
        assert code_digest(model) != plain
    monkeypatch.setattr(kind, "forward", forward)
    assert code_digest(model) == plain


@pytest.mark.filterwarnings(SLOWER)
def test_a_hook_that_cannot_be_hashed_is_said_and_nothing_is_found_again(model, tmp_path):
    model, lock = copy.deepcopy(model), threading.Lock()

    def with_lock(z, hook):
        with lock:
            return z * 0.5

    model.add_hook("blocks.1.attn.hook_z", with_lock)
    for _ in range(2):
        with pytest.warns(UserWarning, match=r"cannot be found again.*with_lock.lock holds a"):
            found = run(circuits.EAP(), model, random_task(), out=tmp_path)
        assert not found.reused
        with pytest.warns(UserWarning, match=r"cannot be found again.*with_lock.lock holds a"):
            evaluate_run(found, model, random_task(), size=5)


def test_an_interrupted_run_whose_metric_holds_the_model_is_resumed(model, tmp_path):
    def by_layers(logits, clean_logits, task):
        return (logits - clean_logits).square().mean(-1) / model.cfg.n_layers

    def stop(done, total):
        if done > 1:
            raise KeyboardInterrupt

    method = circuits.ACDC(0.02, metric=circuits.Metric("m", by_layers, "higher_is_damage"))
    with pytest.raises(KeyboardInterrupt):
        run(method, model, random_task(), out=tmp_path, progress=stop)
    found = run(method, model, random_task(), out=tmp_path)
    assert found.record["resumed"]
    assert found.circuit.kept.equal(method.discover(model, random_task()).kept)


def test_what_cannot_be_hashed_is_said_and_never_found_again(model, tmp_path):
    lock = threading.Lock()

    def with_lock(logits, clean_logits, task):
        with lock:
            return logits[:, 0]

    method = circuits.EAP(metric=circuits.Metric("m", with_lock, "lower_is_damage"))
    for _ in range(2):
        with pytest.warns(
            UserWarning, match=r"cannot be found again.*with_lock.*lock holds a.*lock"
        ):
            assert not run(method, model, random_task(), out=tmp_path).reused


VALUES = """
import dataclasses, functools
import circuits, numpy, torch
from architectures import random_model

NAMES = {'a', 'b', 'c'}

def f():
    return NAMES, {'x', 'y'}, 'z' in {'p', 'q'}

@dataclasses.dataclass
class Scale:
    values: numpy.ndarray

    def __call__(self, z, hook):
        return z * torch.tensor(self.values)

    def method(self, z, hook):
        return z * float(self.values.sum())

def scaled(z, hook, by):
    return by(z, hook)

scale = Scale(numpy.arange(3.0))
probe = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.BatchNorm1d(2))
torch.nn.init.ones_(probe[0].weight), torch.nn.init.ones_(probe[0].bias)
probe.register_forward_hook(lambda module, given, output: output + 1)
model = random_model()
for hook in (scale, scale.method, functools.partial(scaled, by=lambda z, hook: z * len(NAMES))):
    model.add_hook("blocks.1.attn.hook_z", hook)
    model.add_hook("blocks.1.attn.hook_z", hook, dir="bwd")
model.blocks[1].mlp.register_forward_pre_hook(lambda module, given: (probe(given[0]),))
metric = circuits.Metric("m", f, "lower_is_damage")
values = f, {'x', 'y', 'z'}, scale, probe, model, circuits.EAP(metric=metric)
"""


def write_digests(folder: Path) -> list[str]:
    sys.path.insert(0, str(folder))
    values = importlib.import_module("values_to_hash").values
    digests = list(map(code_digest, values))
    assert not any(digest.unknown for digest in digests)
    texts = [digest.text for digest in digests]
    (folder / "digests.json").write_text(json.dumps(texts))
    return texts


def test_a_digest_does_not_depend_on_what_was_compiled_before(model):
    """Compiling puts other methods into `torch.nn.Module`."""
    before = code_digest(model).text
    torch.compile(lambda x: x + 1, backend="eager")(torch.ones(2))
    assert code_digest(model).text == before


def test_a_digest_does_not_depend_on_the_process(new_process, tmp_path, monkeypatch):
    """Sets are in another order in each process, and hooks have other numbers."""
    (tmp_path / "values_to_hash.py").write_text(VALUES)
    other = new_process(target=write_digests, args=(tmp_path,))
    other.start()
    other.join()
    elsewhere = json.loads((tmp_path / "digests.json").read_text())
    monkeypatch.syspath_prepend(tmp_path)
    assert write_digests(tmp_path) == elsewhere


NAME_OF_A_METRIC = """
import circuits

def metric_of(model):
    return circuits.Metric("mine", lambda logits, *_: model.unembed(logits), "lower_is_damage")

file.write_text(str(metric_of(circuits.load_model("toy-world", device="cpu"))))
"""


def test_a_metric_that_holds_a_model_has_one_digest_before_and_after_anything_was_run(
    new_process, tmp_path
):
    texts = []
    for name in "ab":
        arguments = NAME_OF_A_METRIC, {"file": tmp_path / name}
        if name == "a":
            other = new_process(target=exec, args=arguments)
            other.start()
            other.join()
        else:
            exec(*arguments)
        texts.append((tmp_path / name).read_text())
    assert texts[0] == texts[1]


# Disks that are full, read-only or without locks


@pytest.fixture
def full_disk(monkeypatch):
    def fsync(descriptor):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    return lambda: monkeypatch.setattr(os, "fsync", fsync)


def test_a_full_disk_is_one_line_and_leaves_what_is_finished(model, tmp_path, full_disk):
    found = run(circuits.EAP(), model, random_task(), out=tmp_path)
    kept = evaluate_run(found, model, random_task(), size=5)
    full_disk()
    with pytest.raises(
        circuits.InputError, match=r"circuit\.safetensors cannot be written \(No sp"
    ):
        run(circuits.EAPIG(), model, random_task(), out=tmp_path)
    assert run(circuits.EAP(), model, random_task(), out=tmp_path).circuit == found.circuit
    assert evaluate_run(found, model, random_task(), size=5) == kept
    with pytest.warns(UserWarning, match="the evaluation is not kept: .*No space left"):
        new = evaluate_run(found, model, random_task(seed=2), size=5)
    expected = circuits.evaluate(model, found.circuit.top(5), random_task(seed=2))
    assert new["values"]["kl"]["circuit"] == pytest.approx(expected.kl)
    assert not [path for path in tmp_path.rglob(".*") if len(path.name) > 32]


@pytest.mark.parametrize("code", [errno.EACCES, errno.ENOLCK, errno.ENOSYS, errno.EROFS])
def test_without_a_lock_what_is_finished_is_used_and_a_new_run_is_refused_in_one_line(
    code, model, tmp_path, monkeypatch
):
    found = run(circuits.EAP(), model, random_task(), out=tmp_path)

    def no_lock(*arguments, **options):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr("circuits.runs.run_folder.FileLock.acquire", no_lock)
    assert run(circuits.EAP(), model, random_task(), out=tmp_path).reused
    assert load_run(found.folder).circuit == found.circuit
    assert evaluate_run(found, model, random_task(), size=5)["edges"] == 5
    with pytest.raises(circuits.InputError, match=f"cannot be made or locked .{os.strerror(code)}"):
        run(circuits.EAPIG(), model, random_task(), out=tmp_path)


def test_temporary_files_of_killed_processes_are_removed_and_those_of_running_ones_kept(
    model, tmp_path
):
    found = run(circuits.EAP(), model, random_task(), out=tmp_path)
    dead, running, foreign = (
        found.folder / name
        for name in (f".{RECORD}.{'0' * 32}", f".{METRICS}.{'1' * 32}", ".note.txt")
    )
    for path in (dead, foreign):
        path.write_bytes(b"x")
    holder = "import fcntl, sys, time; f = open(sys.argv[1], 'wb'); fcntl.flock(f, fcntl.LOCK_EX);"
    holder += "f.write(b'x'); f.flush(); print('locked', flush=True); time.sleep(60)"
    process = subprocess.Popen(
        [sys.executable, "-c", holder, str(running)], stdout=subprocess.PIPE, text=True
    )
    try:
        assert process.stdout is not None and process.stdout.readline() == "locked\n"
        evaluate_run(found, model, random_task(), size=5)
        assert (dead.exists(), running.exists(), foreign.exists()) == (False, True, True)
    finally:
        process.kill()
        process.communicate()
    evaluate_run(found, model, random_task(), size=6)
    assert not running.exists()


def test_a_note_that_has_no_form_in_json_is_told_before_the_search(model, tmp_path):
    with counting_passes(model) as passes:
        with pytest.raises(circuits.InputError, match="saved as JSON"):
            run(circuits.EAP(), model, random_task(), out=tmp_path, notes={"x": torch.ones(1)})
    assert passes["forward_passes"] == 0


def test_a_file_that_is_replaced_while_it_is_read_is_read_again(tmp_path, monkeypatch):
    """safetensors opens a file once for its header and once for its tensors."""
    path = tmp_path / "file.safetensors"

    def write(value: float) -> None:
        write_tensors(path, {"x": torch.tensor(value)}, {"value": str(value)}, "kind", 1)

    write(0.0)
    values = iter((1.0, 2.0))

    @contextlib.contextmanager
    def replaced(path, **options):
        with safe_open(path, **options) as file:
            header = file.metadata()
        for value in itertools.islice(values, 1):
            write(value)
        with safe_open(path, **options) as file:
            yield SimpleNamespace(
                metadata=lambda: header, keys=file.keys, get_tensor=file.get_tensor
            )

    monkeypatch.setattr("circuits.system.files.safe_open", replaced)
    tensors, metadata = read_tensors(path, "kind", 1)
    assert (float(tensors["x"]), metadata["value"]) == (2.0, "2.0")


def test_a_change_to_json_is_noticed_and_accepted_once_its_digest_is_deleted(model, tmp_path):
    found = run(circuits.EAP(), model, random_task(), out=tmp_path, notes={"seed": 3})
    path = found.folder / RECORD
    path.write_text(path.read_text().replace('"seed": 3', '"seed": 4'))
    with pytest.raises(
        circuits.InputError, match=r'changed after it was written.*delete the line "d'
    ):
        load_run(found.folder)
    lines = path.read_text().splitlines()
    path.write_text("\n".join(line for line in lines if '"digest": "circuits-sha256' not in line))
    assert load_run(found.folder).record["notes"] == {"seed": 4}
