"""Whatever an argument is: a right result, or one line that says what is wrong. Never an error of
Python's.

Each entrance is called with right arguments, of which one at a time is replaced by each of `WRONG`.
What some entrance understands of these (5 prompts, a list of layers) is tested elsewhere.
"""

import dataclasses
import math
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from architectures import SMALL, random_model, random_task

import circuits
from circuits import Task
from circuits.models.loading.saved import parts_of
from circuits.runs.circuit_run import evaluate_run

# What a user sees, who has no runtime type checks.
pytestmark = pytest.mark.usefixtures("unchecked_types")

MODEL, TASK = random_model("gpt2"), random_task(several=True)
GRAPH = circuits.component_graph(MODEL)
WHOLE = circuits.Circuit.full(GRAPH)
CONFIG = {**SMALL, "normalization_type": "LN"}


@pytest.fixture(scope="module")
def made(tmp_path_factory, toy_world):
    folder = tmp_path_factory.mktemp("made")
    scored = circuits.EAP().discover(MODEL, TASK)
    some = scored.top(20)
    some.save(folder / "circuit")
    table = folder / "pairs.csv"
    table.write_text("clean,corrupted,answer,wrong_answer\nSo Mary,So John, is, was\n")
    return SimpleNamespace(
        scored=scored,
        some=some,
        evaluation=circuits.evaluate(MODEL, some, TASK),
        folder=folder,
        eap_ig_file=circuits.save_eap_ig(some, folder / "graph.json"),
        run=circuits.run(circuits.EAP(), MODEL, TASK, out=folder / "runs"),
        table=table,
        toy=toy_world,
    )


WRONG = {
    "nothing": None,
    "true": True,
    "five": 5,
    "half": 0.5,
    "less": -1,
    "nan": math.nan,
    "imaginary": 1j,
    "text": "x",
    "empty text": "",
    "bytes": b"x",
    "empty list": [],
    "dict": {"x": 1},
    "object": object(),
    "class": circuits.EAP,
    "nested": [[1], [2, 3]],
    "nested texts": [["x"]],
    "list of None": [None],
    "set": {1, 2},
    "function": lambda *given: None,
    "path": Path("/dev/null/x"),
    "numpy number": np.float32(1.5),
    "numpy scalar": np.array(3),
    "array": np.array([1, 2]),
    "array of texts": np.array(["a", "b"]),
    "square": np.ones((2, 2)),
    "text in an array": np.array("a"),
    "objects": np.array([None, "a"], dtype=object),
    "kind of numbers": torch.int32,
    "tensor of one": torch.tensor(5),
    "tensor": torch.tensor([1.0, 2.0]),
    "booleans": torch.ones(2, 2, dtype=torch.bool),
}


def fields(kind: type) -> dict[str, object]:
    return {each.name: each.default for each in dataclasses.fields(kind) if each.name != "over"}


HOW = {"ablation": "zero", "max_memory": None, "transcoders": None}
PART = {"start": WHOLE, "frozen_in": ["m1->logits"], "frozen_out": ["m0->m1"], "layers": [0, 1]}
PART |= {"nodes": ["m1"], "graph": GRAPH, "progress": None}
COLUMNS = {name: getattr(GRAPH, name) for name in ("nodes", "source", "target", "slot")}
ACDC = circuits.ACDC(0.5)
MADE = {"name": "a", "metric": "kl", "prepend_bos": None, "skip_misfits": False}
# By name, a function and its right arguments, of what `made` holds.
ENTRANCES = {
    "Graph": lambda a: (
        circuits.Graph,
        {**COLUMNS, "positions": None, "causal": True, "model": None},
    ),
    "index": lambda a: (GRAPH.index, {"edge": "m1->logits"}),
    "contains": lambda a: (GRAPH.__contains__, {"edge": "m1->logits"}),
    "mask": lambda a: (GRAPH.mask, {"edges": ["m1->logits"]}),
    "only": lambda a: (GRAPH.only, {"edges": ["m1->logits"]}),
    "node_mask": lambda a: (GRAPH.node_mask, {"nodes": ["m1"]}),
    "reaching": lambda a: (GRAPH.reaching_logits, {"kept": a.some.kept}),
    "reached": lambda a: (GRAPH.reached_from_inputs, {"kept": a.some.kept}),
    "Head": lambda a: (circuits.Head, {"layer": 0, "head": 0, "position": None}),
    "Feature": lambda a: (circuits.Feature, {"layer": 0, "index": 0, "position": None}),
    "Logits": lambda a: (circuits.Logits, {"token": None, "position": None}),
    "Edge": lambda a: (
        lambda **ends: GRAPH.index(circuits.Edge(**ends)),
        {"source": circuits.Embed(), "target": circuits.Head(0, 0), "slot": "q"},
    ),
    "parse_node": lambda a: (circuits.parse_node, {"text": "m1"}),
    "parse_edge": lambda a: (circuits.parse_edge, {"text": "m1->logits"}),
    "Circuit": lambda a: (
        circuits.Circuit,
        {
            "graph": GRAPH,
            "scores": a.some.scores,
            "kept": a.some.kept,
            "selected": True,
            "record": {},
        },
    ),
    "full": lambda a: (circuits.Circuit.full, {"graph": GRAPH, "scores": None, "record": None}),
    "from_edges": lambda a: (
        circuits.Circuit.from_edges,
        {"graph": GRAPH, "edges": ["m1->logits"]},
    ),
    "from_nodes": lambda a: (
        circuits.Circuit.from_nodes,
        {"graph": GRAPH, "nodes": ["m1", "logits"]},
    ),
    "score": lambda a: (a.some.__getitem__, {"edge": "m1->logits"}),
    "top": lambda a: (a.some.top, {"n": 3, "by": "signed"}),
    "greedy": lambda a: (a.scored.greedy, {"n": 3, "by": "signed"}),
    "above": lambda a: (a.some.above, {"threshold": 0.1, "by": "signed"}),
    "connected": lambda a: (a.some.connected, {"from_inputs": True}),
    "load": lambda a: (circuits.Circuit.load, {"folder": a.folder / "circuit"}),
    "component_graph": lambda a: (
        circuits.component_graph,
        {"model": MODEL, "split_embed": False, "positions": None},
    ),
    "run_circuit": lambda a: (
        circuits.run_circuit,
        {"model": MODEL, "circuit": a.some, "task": TASK, "executor": "hooks", **HOW},
    ),
    "run_circuits": lambda a: (
        circuits.run_circuits,
        {"model": MODEL, "graph": GRAPH, "kept": a.some.kept[None], "task": TASK, **HOW},
    ),
    "model_logits": lambda a: (
        circuits.model_logits,
        {"model": MODEL, "task": TASK, "prompts": "clean"},
    ),
    "circuit_activations": lambda a: (
        circuits.circuit_activations,
        {"model": MODEL, "circuit": a.some, "task": TASK, "names": ["m1"], "ablation": "zero"},
    ),
    "evaluate": lambda a: (
        circuits.evaluate,
        {"model": MODEL, "circuit": a.some, "task": TASK, "metrics": "kl", **HOW},
    ),
    "faithfulness_curve": lambda a: (
        circuits.faithfulness_curve,
        {"model": MODEL, "circuit": a.some, "task": TASK, "sizes": [2], "metric": "kl", **HOW},
    ),
    "faithfulness_points": lambda a: (
        circuits.faithfulness_points,
        {"model": MODEL, "circuits": [a.some], "task": TASK, "metric": "kl", **HOW},
    ),
    "compare": lambda a: (
        circuits.compare,
        {"model": MODEL, "found": {"a": a.scored}, "task": TASK, "size": 3, "sizes": [2]}
        | {"metric": "kl", "ablation": "zero", "transcoders": None},
    ),
    "compare one": lambda a: (
        lambda given: circuits.compare(MODEL, {"a": given}, TASK, size=3, sizes=[2]),
        {"given": a.scored},
    ),
    "metric": lambda a: (a.evaluation.__getitem__, {"metric": "kl"}),
    "faithfulness": lambda a: (a.evaluation.faithfulness, {"metric": "kl"}),
    "recovery": lambda a: (circuits.recovery, {"circuit": a.some, "truth": ["m1->logits"]}),
    "overlap": lambda a: (circuits.overlap, {"first": a.some, "second": a.some}),
    "score_correlation": lambda a: (
        circuits.score_correlation,
        {"first": a.some, "second": a.some, "method": "pearson"},
    ),
    "score_table": lambda a: (circuits.score_table, {"first": a.some, "second": a.some}),
    "mean": lambda a: (circuits.Ablation, {"name": "mean", "over": "clean"}),
    "given": lambda a: (circuits.Ablation, {"name": "given", "outputs": {"m0": torch.zeros(1)}}),
    "noise": lambda a: (
        lambda **noise: circuits.run_circuit(
            MODEL, a.some, TASK, ablation=circuits.Ablation("noise", **noise)
        ),
        {"scale": 1.0, "seed": 1, "span": None},
    ),
    "Precision": lambda a: (circuits.Precision, fields(circuits.Precision)),
    "ACDC": lambda a: (circuits.ACDC, {**fields(circuits.ACDC), "threshold": 0.5}),
    "BatchedACDC": lambda a: (
        circuits.BatchedACDC,
        {**fields(circuits.BatchedACDC), "threshold": 0.5},
    ),
    "EAPIG": lambda a: (circuits.EAPIG, fields(circuits.EAPIG)),
    "discover": lambda a: (
        ACDC.discover,
        {"model": MODEL, "task": TASK, "checkpoint": None, **PART},
    ),
    "sweep": lambda a: (
        ACDC.sweep,
        {"model": MODEL, "task": TASK, "thresholds": [0.5], "guess": a.some, "checkpoint": None}
        | PART,
    ),
    "scores": lambda a: (
        circuits.EAP().discover,
        {"model": MODEL, "task": TASK, "graph": GRAPH, "progress": None},
    ),
    "attribute": lambda a: (
        circuits.EAP().attribute,
        {"model": MODEL, "task": TASK, "graph": GRAPH, "progress": None},
    ),
    "bootstrap": lambda a: (
        circuits.EAP().attribute(MODEL, TASK).bootstrap,
        {"samples": 2, "seed": 0},
    ),
    "heads": lambda a: (
        circuits.ActivationPatching().heads,
        {"model": MODEL, "task": TASK, "graph": GRAPH},
    ),
    "layers": lambda a: (circuits.ActivationPatching().layers, {"model": MODEL, "task": TASK}),
    "by_position": lambda a: (
        circuits.ActivationPatching().by_position,
        {"model": MODEL, "task": TASK[:1], "of": "mlp", "graph": None},
    ),
    "run": lambda a: (
        circuits.run,
        {"discoverer": circuits.EAP(), "model": MODEL, "task": TASK, "notes": None, "out": "runs"},
    ),
    "load_run": lambda a: (circuits.load_run, {"folder": a.run.folder}),
    "evaluate_run": lambda a: (
        evaluate_run,
        {"found": a.run, "model": MODEL, "task": TASK, "metrics": None, "size": 3},
    ),
    "load_eap_ig": lambda a: (
        circuits.load_eap_ig,
        {"path": a.eap_ig_file, "model": MODEL, "n_prompts": 1, "graph": None},
    ),
    "load_model": lambda a: (circuits.load_model, {"name_or_path": "toy-world", "device": "cpu"}),
    "build_model": lambda a: (
        circuits.build_model,
        {"config": CONFIG, "weights": parts_of(MODEL)[1], "tokenizer": None, "device": "cpu"},
    ),
    "PromptPair": lambda a: (
        circuits.PromptPair,
        {"clean": "So Mary", "corrupted": "So John", "answer": " is", "wrong_answer": " was"}
        | {"spans": {"N": (3, 7)}, "corrupted_spans": {"N": (3, 7)}},
    ),
    "from_prompts": lambda a: (
        Task.from_prompts,
        {"model": a.toy, "pairs": [("So Mary", "So John", " is", " was")], **MADE},
    ),
    "from_file": lambda a: (Task.from_file, {"path": a.table, "model": a.toy, **MADE}),
    "from_tokens": lambda a: (
        Task.from_tokens,
        {"clean": [[1, 2, 3]], "corrupted": [[1, 2, 4]], "answers": [5], "wrong_answers": [6]}
        | {"attention_mask": [[1, 1, 1]], "lengths": None, "padding_side": "right"}
        | {"answer_positions": [2], "positions": {"A": [[True, False, False]]}}
        | {"metric": "kl", "name": "a"},
    ),
    "lengths": lambda a: (
        lambda **given: Task.from_tokens([[1, 2, 3]], [[1, 2, 4]], **given),
        {"lengths": [2], "padding_side": "left"},
    ),
    "some prompts": lambda a: (TASK.__getitem__, {"indices": [0]}),
    "task to": lambda a: (TASK.to, {"device": "cpu"}),
}


@pytest.mark.parametrize("name", ENTRANCES)
def test_arguments_of_any_kind_end_in_a_result_or_in_one_line(name, made, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # some texts are names of files
    entrance, right = ENTRANCES[name](made)
    entrance(**right)
    failed = {}
    for argument in right:
        for kind, wrong in WRONG.items():
            try:
                entrance(**{**right, argument: wrong})
            except circuits.InputError as error:
                if "\n" in str(error) or len(str(error)) > 500:
                    failed[argument, kind] = str(error)
            except Exception as error:
                failed[argument, kind] = repr(error)
    assert not failed


def words(a: SimpleNamespace | None, given: object) -> dict[str, object]:
    """Calls with a word where something else is wanted, all of which counted silently once."""
    return {
        "from_inputs": lambda: a.some.connected(from_inputs=given),
        "selected": lambda: circuits.Circuit(GRAPH, a.some.scores, a.some.kept, given),
        "record": lambda: circuits.Circuit(GRAPH, a.some.scores, a.some.kept, record=given),
        "causal": lambda: circuits.Graph(**COLUMNS, causal=given),
        "split_embed": lambda: circuits.component_graph(MODEL, split_embed=given),
        "method": lambda: circuits.score_correlation(a.scored, a.scored, given),
        "confirm": lambda: circuits.Precision("int8", confirm=given),
        "progress": lambda: circuits.RandomScores().discover(MODEL, TASK, progress=given),
        "notes": lambda: circuits.run(circuits.EAP(), MODEL, TASK, notes=given),
        "source": lambda: circuits.Edge(given, circuits.MLP(0)),
        "slot": lambda: circuits.Edge(circuits.Embed(), circuits.Head(0, 0), given),
    }


@pytest.mark.parametrize("name", words(None, None))
def test_a_word_is_no_yes_no_number_and_no_other_choice(name, made):
    with pytest.raises(circuits.InputError, match=r"'no'"):
        words(made, "no")[name]()


def test_nodes_are_at_no_position_that_only_looks_like_one():
    assert circuits.MLP(0, np.int64(1)) == circuits.MLP(0, 1)
    for wrong in (True, 1.5, ["S1"], b"S1"):
        with pytest.raises(circuits.InputError, match="position="):
            circuits.MLP(0, wrong)


def test_a_head_is_read_in_a_slot():
    edge = circuits.Edge(circuits.Embed(), circuits.Head(0, 0))
    with pytest.raises(circuits.InputError, match=r"no edge embed->a0\.h0: a head is read in a sl"):
        GRAPH.index(edge)


def test_an_argument_that_no_method_has_is_named_with_its_neighbour():
    for method in (circuits.EAP(), ACDC):
        with pytest.raises(circuits.InputError, match="no argument 'lairs'; did you mean 'layers'"):
            circuits.run(method, MODEL, TASK, lairs=[1])


def test_lists_and_numbers_of_other_libraries_say_the_same(tmp_path):
    expected = ACDC.discover(MODEL, TASK, layers=[0, 1])
    for layers in (np.array([0, 1]), torch.tensor([0, 1]), (0, np.int64(1)), range(2), {0, 1}):
        assert ACDC.discover(MODEL, TASK, layers=layers) == expected
    one = ACDC.discover(MODEL, TASK, layers=[1])
    for layers in (torch.tensor(1), np.array(1), 1.0):
        assert ACDC.discover(MODEL, TASK, layers=layers) == one
    given = circuits.Ablation("noise", scale=torch.tensor(2.0), seed=np.int64(3))
    assert str(given) == str(circuits.Ablation("noise", scale=2, seed=3))
    names = np.array(["m1->logits", "m0->m1"])
    assert torch.equal(GRAPH.mask(names), GRAPH.mask(["m1->logits", "m0->m1"]))
    found = circuits.run(circuits.EAP(), MODEL, TASK, out=tmp_path)
    values = evaluate_run(found, MODEL, TASK, metrics=["kl"])["values"]
    metrics = (each for each in ["kl"])
    assert evaluate_run(found, MODEL, TASK, metrics="kl")["values"] == values
    assert evaluate_run(found, MODEL, TASK, metrics=metrics)["values"] == values


def test_no_metrics_are_refused_where_metrics_are_asked_for(made):
    with pytest.raises(circuits.InputError, match=r"metrics=\[\] names no metric"):
        circuits.evaluate(MODEL, made.some, TASK, metrics=[])
