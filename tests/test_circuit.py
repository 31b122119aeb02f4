"""Circuits as values: ranking, thresholds, set algebra, saving and loading."""

import dataclasses
import json

import numpy as np
import pytest
import torch
from architectures import random_model, random_task

import circuits
from circuits.graph.circuit import FILE
from circuits.system.files import write_tensors


@pytest.fixture(scope="module")
def model():
    return random_model("gpt2")


@pytest.fixture(scope="module")
def circuit(model) -> circuits.Circuit:
    graph = circuits.component_graph(model)
    scores = torch.randn(len(graph), generator=torch.Generator().manual_seed(0))
    scores[5:9] = torch.nan
    scores[20:23] = 0.25
    return circuits.Circuit.full(graph, scores)


def test_top_keeps_the_edges_of_largest_magnitude_or_largest_score(circuit):
    known = circuit.scores.nan_to_num(nan=0.0)
    assert set(circuit.top(10).kept.nonzero().flatten().tolist()) == set(
        known.abs().topk(10).indices.tolist()
    )
    assert set(circuit.top(10, by="signed").kept.nonzero().flatten().tolist()) == set(
        known.topk(10).indices.tolist()
    )
    assert circuit.top(10).selected
    assert not circuit.selected


def test_unscored_edges_come_last_and_equal_scores_in_graph_order(circuit):
    everything_scored = circuit.top(len(circuit) - 4)
    assert not everything_scored.kept[5:9].any()
    for n in range(1, len(circuit) - 4):
        ties = circuit.top(n).kept[20:23].tolist()
        assert ties == sorted(ties, reverse=True)
    assert circuit.top(len(circuit) - 2).kept[5:9].tolist() == [True, True, False, False]


def test_top_of_a_selection_ranks_only_what_it_keeps(circuit):
    some = circuit.top(20)
    assert (some.top(7) - some).kept.sum() == 0
    assert len(some.top(20)) == 20


@pytest.mark.parametrize("n", [-1, 10_000])
def test_a_size_out_of_range_is_refused(circuit, n):
    with pytest.raises(circuits.InputError, match=r"choose n between 0 and 110"):
        circuit.top(n)


def test_above_is_signed(circuit):
    assert torch.equal(circuit.above(0.5).kept, circuit.scores > 0.5)


def test_circuits_combine_as_sets(circuit):
    a, b = circuit.top(30), circuit.top(60, by="signed")
    assert torch.equal((a & b).kept, a.kept & b.kept)
    assert torch.equal((a | b).kept, a.kept | b.kept)
    assert torch.equal((a - b).kept, a.kept & ~b.kept)
    with pytest.raises(circuits.InputError, match="different graphs"):
        a & circuits.Circuit.full(circuits.component_graph(random_model("pythia")))


def test_methods_return_new_values_and_change_nothing(circuit):
    before = (circuit.scores.clone(), circuit.kept.clone())
    (
        circuit.top(3),
        circuit.above(0.1),
        circuit.connected(from_inputs=True),
        circuit & circuit,
        circuit.to_networkx(),
    )
    torch.testing.assert_close(
        (circuit.scores, circuit.kept), before, equal_nan=True, rtol=0, atol=0
    )
    with pytest.raises(dataclasses.FrozenInstanceError):
        circuit.kept = before[1]  # type: ignore[misc]


def test_evaluating_a_circuit_changes_nothing_in_it(model, circuit):
    some = circuit.top(40)
    before = (some.scores.clone(), some.kept.clone(), some.selected, dict(some.record))
    circuits.evaluate(model, some, random_task())
    circuits.faithfulness_curve(model, some, random_task(), [5, 10])
    torch.testing.assert_close((some.scores, some.kept), before[:2], equal_nan=True, rtol=0, atol=0)
    assert (some.selected, dict(some.record)) == before[2:]


def test_networkx_gets_every_kept_edge_with_slot_and_score(circuit):
    exported = circuit.top(40).to_networkx()
    assert exported.number_of_edges() == 40
    strongest = circuit.top(1)
    edge = strongest.edges[0]
    data = exported.get_edge_data(str(edge.source), str(edge.target))[edge.slot]
    assert data["score"] == pytest.approx(float(strongest.scores[strongest.kept]))


@pytest.mark.parametrize(
    "options", [{}, {"split_embed": True}, {"positions": ["IO", "S1+1", "END"]}, {"positions": 5}]
)
def test_a_circuit_saved_and_loaded_is_the_same(model, options, tmp_path):
    graph = circuits.component_graph(model, **options)
    scores = torch.randn(len(graph), generator=torch.Generator().manual_seed(1))
    scores[3] = torch.nan
    circuit = circuits.Circuit(
        graph, scores, scores > 0, record={"method": "mine", "settings": {"threshold": 0.1}}
    )
    circuit.save(tmp_path / "deep" / "folder")
    loaded = circuits.Circuit.load(tmp_path / "deep" / "folder")
    assert loaded == circuit
    assert loaded.graph.nodes == graph.nodes
    assert loaded.graph.edges == graph.edges
    assert (loaded.graph.positions, loaded.graph.causal, loaded.graph.model) == (
        graph.positions,
        graph.causal,
        graph.model,
    )
    assert loaded.record == circuit.record


def test_a_record_that_is_not_json_is_refused_rather_than_lost(circuit, tmp_path):
    unsaved = circuits.Circuit.full(circuit.graph, record={"losses": torch.ones(3)})
    with pytest.raises(circuits.InputError, match=r"holds a Tensor\); keep only numbers"):
        unsaved.save(tmp_path)
    with pytest.raises(circuits.InputError, match="texts as keys"):
        circuits.Circuit.full(circuit.graph, record={"by": {(0, 1): 2}}).save(tmp_path)


def test_numbers_of_numpy_are_saved_as_numbers(circuit, tmp_path):
    record = {"n": np.int64(3), "share": np.float32(0.5)}
    circuits.Circuit.full(circuit.graph, record=record).save(tmp_path)
    assert circuits.Circuit.load(tmp_path).record == {"n": 3, "share": 0.5}


def test_nothing_is_left_behind_but_the_file(circuit, tmp_path):
    circuit.save(tmp_path)
    circuit.save(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [FILE]


def test_a_missing_truncated_or_foreign_file_is_one_clear_line(circuit, tmp_path):
    with pytest.raises(circuits.InputError, match="there is no file"):
        circuits.Circuit.load(tmp_path)
    path = circuit.save(tmp_path)
    whole = path.read_bytes()
    for size in (0, 4, 100, len(whole) - 10):
        path.write_bytes(whole[:size])
        with pytest.raises(circuits.InputError, match="truncated"):
            circuits.Circuit.load(tmp_path)
    write_tensors(path, {"kept": circuit.kept}, {}, "circuits.model", 1)
    with pytest.raises(circuits.InputError, match=r"is not a circuits\.circuit file"):
        circuits.Circuit.load(tmp_path)
    write_tensors(path, {"kept": circuit.kept}, {"description": "{}"}, "circuits.circuit", 1)
    with pytest.raises(circuits.InputError, match="is damaged"):
        circuits.Circuit.load(tmp_path)


def test_a_file_from_a_newer_version_says_to_upgrade(circuit, tmp_path):
    write_tensors(
        tmp_path / FILE,
        {"kept": circuit.kept},
        {"description": json.dumps({})},
        "circuits.circuit",
        2,
    )
    with pytest.raises(circuits.InputError, match=r"format version 2.*reads up to 1; upgrade"):
        circuits.Circuit.load(tmp_path)


def test_a_circuit_on_a_model_of_another_shape_is_an_error_and_with_other_weights_a_warning(
    circuit,
):
    task = random_task()
    with pytest.raises(circuits.InputError, match=r"another shape \(n_layers 2 there, 3 here"):
        circuits.run_circuit(random_model("gpt2", n_layers=3), circuit, task)
    with pytest.warns(UserWarning, match="other weights"):
        circuits.run_circuit(random_model("gpt2", seed=1), circuit, task)


def test_a_single_changed_weight_is_noticed(circuit):
    model = random_model("gpt2")
    model.blocks[1].attn.W_V.data[2, 3, 4] += 1e-3
    with pytest.warns(UserWarning, match="other weights"):
        circuits.run_circuit(model, circuit, random_task())


def test_changing_the_tensors_it_was_made_from_does_not_change_a_circuit(circuit):
    kept, scores = circuit.kept.clone(), torch.zeros(110)
    made = circuits.Circuit(circuit.graph, scores, kept)
    kept[0], scores[0] = False, 7.0
    assert len(made) == 110
    assert made.scores[0] == 0


def test_kept_must_be_boolean(circuit, unchecked_types):
    with pytest.raises(circuits.InputError, match="must be boolean"):
        circuits.Circuit(circuit.graph, circuit.scores, circuit.kept.float())
    with pytest.raises(circuits.InputError, match="it must be"):
        circuits.run_circuits(
            random_model("gpt2"), circuit.graph, circuit.kept.float()[None], random_task()
        )


def test_scores_and_kept_must_fit_the_graph(circuit):
    with pytest.raises(
        circuits.InputError, match=r"scores has shape \(3,\), but the graph has 110 edges"
    ):
        circuits.Circuit(circuit.graph, torch.zeros(3), torch.ones(3, dtype=torch.bool))
