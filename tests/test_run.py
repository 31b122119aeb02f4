"""Runs: folders that are found again, resumed after being killed, and shared by processes."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from architectures import random_model, random_task

import circuits
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
from circuits.system.files import read_json, read_tensors, write_json

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


def command(*words: str, folder: Path) -> subprocess.Popen:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    words = (sys.executable, "-m", "circuits", *words, "--out", str(folder))
    return subprocess.Popen(
        words, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def answer(process: subprocess.Popen) -> dict:
    output, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors
    return json.loads(output)


def tried(checkpoint: Path) -> int:
    """How many decisions a run has made."""
    return int(read_tensors(checkpoint, "circuits.checkpoint", 1)[0]["evaluations"])


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
    assert torch.equal(capped.W_E, model.W_E)
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


def test_killed_in_the_middle_of_acdc_and_started_again_the_circuit_is_the_same(tmp_path):
    process = command(*DISCOVER, folder=tmp_path / "killed")
    while process.poll() is None and not any(
        tried(path) >= 10 for path in (tmp_path / "killed").rglob(CHECKPOINT)
    ):
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    (found,) = (tmp_path / "killed").rglob(CHECKPOINT)
    assert 10 <= tried(found) < 200
    assert not (found.parent / RECORD).exists()
    resumed = answer(command(*DISCOVER, folder=tmp_path / "killed"))
    whole = answer(command(*DISCOVER, folder=tmp_path / "whole"))
    a, b = (load_run(Path(each["folder"])) for each in (resumed, whole))
    assert a.circuit == b.circuit
    assert a.record["resumed"]
    assert a.record["evaluations"] == b.record["evaluations"]
    # What had been tried before was not tried again.
    assert a.record["measured"] == b.record["measured"]  # nothing was measured twice
    assert not list(tmp_path.rglob(CHECKPOINT))


def test_two_processes_on_one_run_folder_take_turns(tmp_path):
    answers = [
        answer(process) for process in [command(*DISCOVER, folder=tmp_path) for _ in range(2)]
    ]
    assert answers[0]["folder"] == answers[1]["folder"]
    assert answers[0]["values"] == answers[1]["values"]
    assert sorted(each["reused"] for each in answers) == [False, True]
    assert load_run(Path(answers[0]["folder"])).record["edges"] == answers[0]["edges"]
