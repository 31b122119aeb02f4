"""Whatever an argument is: a right result, or one line that says what is wrong. Never an error of
Python's.

Each entrance is called with right arguments, of which one at a time is replaced by each of `WRONG`.
What some entrance understands of these (5 prompts, a list of layers) is tested elsewhere.
"""

import dataclasses
import math
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch
from architectures import SMALL, random_model, random_task

import circuits
from circuits import Task
from circuits.runs.circuit_run import evaluate_run

# What a user sees, who has no runtime type checks.
pytestmark = pytest.mark.usefixtures("unchecked_types")

MODEL, TASK = random_model("gpt2"), random_task(several=True)
GRAPH = circuits.component_graph(MODEL)
SCORED = circuits.EAP().discover(MODEL, TASK)
SOME = SCORED.top(20)
WHOLE = circuits.Circuit.full(GRAPH)
EVALUATION = circuits.evaluate(MODEL, SOME, TASK)
FOLDER = Path(tempfile.mkdtemp())
SOME.save(FOLDER / "circuit")
EAP_IG_FILE = circuits.save_eap_ig(SOME, FOLDER / "graph.json")
RUN = circuits.run(circuits.EAP(), MODEL, TASK, out=FOLDER / "runs")
TABLE = FOLDER / "pairs.csv"
TABLE.write_text("clean,corrupted,answer,wrong_answer\nSo Mary,So John, is, was\n")
TOY = circuits.load_model("toy-world", device="cpu")
CONFIG = {name: getattr(MODEL.cfg, name) for name in [*SMALL, "normalization_type"]}

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
# By name, a function and its right arguments.
ENTRANCES = {
    "Graph": (circuits.Graph, {**COLUMNS, "positions": None, "causal": True, "model": None}),
    "index": (GRAPH.index, {"edge": "m1->logits"}),
    "contains": (GRAPH.__contains__, {"edge": "m1->logits"}),
    "mask": (GRAPH.mask, {"edges": ["m1->logits"]}),
    "only": (GRAPH.only, {"edges": ["m1->logits"]}),
    "node_mask": (GRAPH.node_mask, {"nodes": ["m1"]}),
    "reaching": (GRAPH.reaching_logits, {"kept": SOME.kept}),
    "reached": (GRAPH.reached_from_inputs, {"kept": SOME.kept}),
    "Head": (circuits.Head, {"layer": 0, "head": 0, "position": None}),
    "Feature": (circuits.Feature, {"layer": 0, "index": 0, "position": None}),
    "Logits": (circuits.Logits, {"token": None, "position": None}),
    "Edge": (
        lambda **ends: GRAPH.index(circuits.Edge(**ends)),
        {"source": circuits.Embed(), "target": circuits.Head(0, 0), "slot": "q"},
    ),
    "parse_node": (circuits.parse_node, {"text": "m1"}),
    "parse_edge": (circuits.parse_edge, {"text": "m1->logits"}),
    "Circuit": (
        circuits.Circuit,
        {"graph": GRAPH, "scores": SOME.scores, "kept": SOME.kept, "selected": True, "record": {}},
    ),
    "full": (circuits.Circuit.full, {"graph": GRAPH, "scores": None, "record": None}),
    "from_edges": (circuits.Circuit.from_edges, {"graph": GRAPH, "edges": ["m1->logits"]}),
    "from_nodes": (circuits.Circuit.from_nodes, {"graph": GRAPH, "nodes": ["m1", "logits"]}),
    "score": (SOME.__getitem__, {"edge": "m1->logits"}),
    "top": (SOME.top, {"n": 3, "by": "signed"}),
    "greedy": (SCORED.greedy, {"n": 3, "by": "signed"}),
    "above": (SOME.above, {"threshold": 0.1, "by": "signed"}),
    "connected": (SOME.connected, {"from_inputs": True}),
    "load": (circuits.Circuit.load, {"folder": FOLDER / "circuit"}),
    "component_graph": (
        circuits.component_graph,
        {"model": MODEL, "split_embed": False, "positions": None},
    ),
    "run_circuit": (
        circuits.run_circuit,
        {"model": MODEL, "circuit": SOME, "task": TASK, "executor": "hooks", **HOW},
    ),
    "run_circuits": (
        circuits.run_circuits,
        {"model": MODEL, "graph": GRAPH, "kept": SOME.kept[None], "task": TASK, **HOW},
    ),
    "model_logits": (circuits.model_logits, {"model": MODEL, "task": TASK, "prompts": "clean"}),
    "circuit_activations": (
        circuits.circuit_activations,
        {"model": MODEL, "circuit": SOME, "task": TASK, "names": ["m1"], "ablation": "zero"},
    ),
    "evaluate": (
        circuits.evaluate,
        {"model": MODEL, "circuit": SOME, "task": TASK, "metrics": "kl", **HOW},
    ),
    "faithfulness_curve": (
        circuits.faithfulness_curve,
        {"model": MODEL, "circuit": SOME, "task": TASK, "sizes": [2], "metric": "kl", **HOW},
    ),
    "faithfulness_points": (
        circuits.faithfulness_points,
        {"model": MODEL, "circuits": [SOME], "task": TASK, "metric": "kl", **HOW},
    ),
    "compare": (
        circuits.compare,
        {"model": MODEL, "found": {"a": SCORED}, "task": TASK, "size": 3, "sizes": [2]}
        | {"metric": "kl", "ablation": "zero", "transcoders": None},
    ),
    "compare one": (
        lambda given: circuits.compare(MODEL, {"a": given}, TASK, size=3, sizes=[2]),
        {"given": SCORED},
    ),
    "metric": (EVALUATION.__getitem__, {"metric": "kl"}),
    "faithfulness": (EVALUATION.faithfulness, {"metric": "kl"}),
    "recovery": (circuits.recovery, {"circuit": SOME, "truth": ["m1->logits"]}),
    "overlap": (circuits.overlap, {"first": SOME, "second": SOME}),
    "score_correlation": (
        circuits.score_correlation,
        {"first": SOME, "second": SOME, "method": "pearson"},
    ),
    "score_table": (circuits.score_table, {"first": SOME, "second": SOME}),
    "mean": (circuits.Ablation, {"name": "mean", "over": "clean"}),
    "given": (circuits.Ablation, {"name": "given", "outputs": {"m0": torch.zeros(1)}}),
    "noise": (
        lambda **noise: circuits.run_circuit(
            MODEL, SOME, TASK, ablation=circuits.Ablation("noise", **noise)
        ),
        {"scale": 1.0, "seed": 1, "span": None},
    ),
    "Precision": (circuits.Precision, fields(circuits.Precision)),
    "ACDC": (circuits.ACDC, {**fields(circuits.ACDC), "threshold": 0.5}),
    "BatchedACDC": (circuits.BatchedACDC, {**fields(circuits.BatchedACDC), "threshold": 0.5}),
    "EAPIG": (circuits.EAPIG, fields(circuits.EAPIG)),
    "discover": (
        ACDC.discover,
        {"model": MODEL, "task": TASK, "checkpoint": None, **PART},
    ),
    "sweep": (
        ACDC.sweep,
        {"model": MODEL, "task": TASK, "thresholds": [0.5], "guess": SOME, "checkpoint": None}
        | PART,
    ),
    "scores": (
        circuits.EAP().discover,
        {"model": MODEL, "task": TASK, "graph": GRAPH, "progress": None},
    ),
    "attribute": (
        circuits.EAP().attribute,
        {"model": MODEL, "task": TASK, "graph": GRAPH, "progress": None},
    ),
    "bootstrap": (circuits.EAP().attribute(MODEL, TASK).bootstrap, {"samples": 2, "seed": 0}),
    "heads": (circuits.ActivationPatching().heads, {"model": MODEL, "task": TASK, "graph": GRAPH}),
    "layers": (circuits.ActivationPatching().layers, {"model": MODEL, "task": TASK}),
    "by_position": (
        circuits.ActivationPatching().by_position,
        {"model": MODEL, "task": TASK[:1], "of": "mlp", "graph": None},
    ),
    "run": (
        circuits.run,
        {"discoverer": circuits.EAP(), "model": MODEL, "task": TASK, "notes": None, "out": "runs"},
    ),
    "load_run": (circuits.load_run, {"folder": RUN.folder}),
    "evaluate_run": (
        evaluate_run,
        {"found": RUN, "model": MODEL, "task": TASK, "metrics": None, "size": 3},
    ),
    "load_eap_ig": (
        circuits.load_eap_ig,
        {"path": EAP_IG_FILE, "model": MODEL, "n_prompts": 1, "graph": None},
    ),
    "load_model": (circuits.load_model, {"name_or_path": "toy-world", "device": "cpu"}),
    "build_model": (
        circuits.build_model,
        {"config": CONFIG, "weights": MODEL.state_dict(), "tokenizer": None, "device": "cpu"},
    ),
    "PromptPair": (
        circuits.PromptPair,
        {"clean": "So Mary", "corrupted": "So John", "answer": " is", "wrong_answer": " was"}
        | {"spans": {"N": (3, 7)}, "corrupted_spans": {"N": (3, 7)}},
    ),
    "from_prompts": (
        Task.from_prompts,
        {"model": TOY, "pairs": [("So Mary", "So John", " is", " was")], **MADE},
    ),
    "from_file": (Task.from_file, {"path": TABLE, "model": TOY, **MADE}),
    "from_tokens": (
        Task.from_tokens,
        {"clean": [[1, 2, 3]], "corrupted": [[1, 2, 4]], "answers": [5], "wrong_answers": [6]}
        | {"attention_mask": [[1, 1, 1]], "lengths": None, "padding_side": "right"}
        | {"answer_positions": [2], "positions": {"A": [[True, False, False]]}}
        | {"metric": "kl", "name": "a"},
    ),
    "lengths": (
        lambda **given: Task.from_tokens([[1, 2, 3]], [[1, 2, 4]], **given),
        {"lengths": [2], "padding_side": "left"},
    ),
    "some prompts": (TASK.__getitem__, {"indices": [0]}),
    "task to": (TASK.to, {"device": "cpu"}),
}


@pytest.mark.parametrize("name", ENTRANCES)
def test_arguments_of_any_kind_end_in_a_result_or_in_one_line(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # some texts are names of files
    entrance, right = ENTRANCES[name]
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


def words(given: object) -> dict[str, object]:
    """Calls with a word where something else is wanted, all of which counted silently once."""
    return {
        "from_inputs": lambda: SOME.connected(from_inputs=given),
        "selected": lambda: circuits.Circuit(GRAPH, SOME.scores, SOME.kept, given),
        "record": lambda: circuits.Circuit(GRAPH, SOME.scores, SOME.kept, record=given),
        "causal": lambda: circuits.Graph(**COLUMNS, causal=given),
        "split_embed": lambda: circuits.component_graph(MODEL, split_embed=given),
        "method": lambda: circuits.score_correlation(SCORED, SCORED, given),
        "confirm": lambda: circuits.Precision("int8", confirm=given),
        "progress": lambda: circuits.RandomScores().discover(MODEL, TASK, progress=given),
        "notes": lambda: circuits.run(circuits.EAP(), MODEL, TASK, notes=given),
        "source": lambda: circuits.Edge(given, circuits.MLP(0)),
        "slot": lambda: circuits.Edge(circuits.Embed(), circuits.Head(0, 0), given),
    }


@pytest.mark.parametrize("name", words(None))
def test_a_word_is_no_yes_no_number_and_no_other_choice(name):
    with pytest.raises(circuits.InputError, match=r"'no'"):
        words("no")[name]()


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


def test_no_metrics_are_refused_where_metrics_are_asked_for():
    with pytest.raises(circuits.InputError, match=r"metrics=\[\] names no metric"):
        circuits.evaluate(MODEL, SOME, TASK, metrics=[])
