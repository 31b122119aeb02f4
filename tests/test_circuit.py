"""Circuits as values: ranking, thresholds, set algebra, saving and loading."""

import dataclasses
import json

import numpy as np
import pytest
import torch
from architectures import random_model, random_task, weight

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


def test_where_no_edge_has_a_score_none_is_chosen(circuit):
    graph = circuit.graph
    unscored = circuits.Circuit.from_edges(graph, graph.edges)
    for choose in (unscored.top, unscored.greedy):
        with pytest.raises(circuits.InputError, match=r"\(5\): none of the 110 edges has a score"):
            choose(5)
        assert len(choose(0)) == 0 and len(choose(len(graph))) == len(graph)
    with pytest.raises(circuits.InputError, match=r"above\(0.5\): none of the 110 edges has"):
        unscored.above(0.5)


def test_unscored_edges_are_shown_last_in_graph_order(circuit):
    shown = circuit.strongest(len(circuit))["edge"].tolist()
    assert shown[-4:] == [str(edge) for edge in circuit.graph.edges[5:9]]
    sizes = [abs(circuit[edge]) for edge in shown[:-4]]
    assert sizes == sorted(sizes, reverse=True)
    assert "and 100 more edges" in circuits.Circuit.full(circuit.graph)._repr_html_()


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


def test_above_by_magnitude_keeps_what_helps_or_hurts_that_much(circuit):
    assert torch.equal(circuit.above(0.5, by="magnitude").kept, circuit.scores.abs() > 0.5)
    with pytest.raises(circuits.InputError, match="threshold=nan must be a number"):
        circuit.above(float("nan"))


def test_there_are_two_ways_to_rank_edges(circuit, unchecked_types):
    for choose in (circuit.top, circuit.greedy, circuit.above):
        with pytest.raises(circuits.InputError, match=r"by='size': choose 'magnitude' or 'signed'"):
            choose(1, by="size")


def greedy_from_definition(circuit, n, rank):
    """Add, n times, the edge of highest rank that reaches the logits once it is added."""
    chosen = torch.zeros_like(circuit.kept)
    for _ in range(n):
        best = None
        for edge in circuit.kept.nonzero().flatten().tolist():
            if not chosen[edge] and (best is None or rank[edge] > rank[best]):
                added = chosen.clone()
                added[edge] = True
                if circuit.graph.reaching_logits(added)[edge]:
                    best = edge
        chosen[best] = True
    return chosen


@pytest.mark.parametrize("by", ["magnitude", "signed"])
@pytest.mark.parametrize(("positions", "share"), [(None, 1), (None, 0.8), (3, 1), (3, 0.9)])
def test_greedy_adds_the_best_edge_whose_target_reaches_the_logits(positions, share, by):
    whole = circuits.component_graph(
        random_model("gpt2", n_heads=2, d_head=12), positions=positions
    )
    generator = torch.Generator().manual_seed(4)
    graph = whole.only(torch.rand(len(whole), generator=generator) < share)
    scores = torch.randn(len(graph), generator=generator)
    scores[3:6], scores[20:24] = torch.nan, 0.5
    kept = torch.rand(len(graph), generator=generator) < 0.8
    some = circuits.Circuit(graph, scores, kept)
    rank = (scores.abs() if by == "magnitude" else scores).nan_to_num(nan=-torch.inf)
    found = some.greedy(12, by=by)
    assert torch.equal(found.kept, greedy_from_definition(some, 12, rank))
    if share == 1:
        assert not torch.equal(found.kept, some.top(12, by=by).kept)
    assert found.connected() == found
    reaching = some.connected()
    assert torch.equal(some.greedy(len(reaching), by=by).kept, reaching.kept)


def test_a_greedy_size_out_of_range_is_refused(model, circuit):
    some = circuits.Circuit.from_edges(circuit.graph, ["m1->logits", "embed->m0"])
    assert [str(edge) for edge in some.greedy(1)] == ["m1->logits"]
    for n in (-1, 2):
        with pytest.raises(
            circuits.InputError, match=rf"greedy\({n}\) .* 1 edges reach .* between 0 and 1"
        ):
            some.greedy(n)


def test_the_circuit_of_some_nodes_has_all_edges_between_them(model):
    graph = circuits.component_graph(model, positions=["IO", "END"])
    nodes = ["embed", circuits.Head(0, 1), "m1@END", "logits@END"]
    wanted = {"embed@rest", "embed@IO", "embed@END", "a0.h1@rest", "a0.h1@IO", "a0.h1@END"}
    wanted |= {"m1@END", "logits@END"}
    circuit = circuits.Circuit.from_nodes(graph, nodes)
    assert set(circuit.edges) == {
        edge for edge in graph.edges if {str(edge.source), str(edge.target)} <= wanted
    }
    assert set(map(str, circuit.nodes)) == wanted
    assert circuits.Circuit.from_nodes(graph, circuit.nodes) == circuit
    assert len(circuits.Circuit.from_nodes(graph, [])) == 0


@pytest.mark.parametrize(
    ("nodes", "told"),
    [
        (["m0", "m9"], "the graph has no node m9; it has embed, a0.h0"),
        (3, "nodes=3 must be a list; for one, give"),
        (["m0.q"], "names no node"),
        ([7], "the graph has no node 7"),
    ],
)
def test_what_names_no_nodes_is_refused(circuit, nodes, told, unchecked_types):
    with pytest.raises(circuits.InputError, match=told):
        circuits.Circuit.from_nodes(circuit.graph, nodes)


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
    weight(model, "blocks.1.attn.W_V")[2, 3, 4] += 1e-3
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
