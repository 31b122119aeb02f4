"""EAP-IG's graph JSON: import and export."""

import json

import pytest
import torch
from architectures import random_model
from published import DATA, case, case_model

import circuits
from circuits.formats.eap_ig import edge_from_eap_ig, edge_to_eap_ig, load_eap_ig, save_eap_ig

PUBLISHED = case("eap_case/case")


@pytest.fixture(scope="module")
def model():
    return case_model(PUBLISHED["config"], "eap_case/model")


def test_edge_names_convert_both_ways(model):
    assert edge_to_eap_ig(circuits.parse_edge("a5.h5->a9.h9.q")) == "a5.h5->a9.h9<q>"
    assert edge_to_eap_ig(circuits.parse_edge("embed->m0")) == "input->m0"
    assert str(edge_from_eap_ig("input->a0.h1<v>")) == "embed->a0.h1.v"
    for edge in circuits.component_graph(model).edges:
        assert edge_from_eap_ig(edge_to_eap_ig(edge)) == edge


def test_a_graph_that_their_package_wrote_is_read(model):
    """tests/data/eap_case/graph.json: EAP scores, the top 60 edges by magnitude, pruned; written by
    EAP-IG's Graph.to_json.
    """
    content = json.loads((DATA / "eap_case" / "graph.json").read_text())
    circuit = load_eap_ig(DATA / "eap_case" / "graph.json", model, n_prompts=8)
    assert len(circuit) == sum(edge["in_graph"] for edge in content["edges"].values()) == 50
    assert len(circuit.graph) == len(content["edges"])
    for name, entry in content["edges"].items():
        index = circuit.graph.index(edge_from_eap_ig(name))
        assert float(circuit.scores[index]) == pytest.approx(entry["score"] * 8)
        assert bool(circuit.kept[index]) == entry["in_graph"]
    split = load_eap_ig(
        DATA / "eap_case" / "graph.json",
        model,
        graph=circuits.component_graph(model, split_embed=True),
    )
    assert len(split) == 50
    assert int(split.scores.isnan().sum()) == len(split.graph) - len(circuit.graph)


def test_what_is_written_is_of_their_form_and_read_back_the_same(model, tmp_path):
    graph = circuits.component_graph(model)
    scores = torch.randn(len(graph), generator=torch.Generator().manual_seed(0))
    circuit = circuits.Circuit.full(graph, scores).top(30)
    path = save_eap_ig(circuit, tmp_path / "graph.json", n_prompts=4)
    theirs, ours = (
        json.loads((DATA / "eap_case" / "graph.json").read_text()),
        json.loads(path.read_text()),
    )
    assert set(ours["edges"]) == set(theirs["edges"])
    assert set(ours["nodes"]) == set(theirs["nodes"])
    assert ours["cfg"] == theirs["cfg"]
    read = load_eap_ig(path, model, n_prompts=4)
    assert torch.equal(read.kept, circuit.kept)
    torch.testing.assert_close(read.scores, circuit.scores)


def test_what_their_files_cannot_hold_is_refused(model, tmp_path):
    for graph in (
        circuits.component_graph(model, split_embed=True),
        circuits.component_graph(model, positions=3),
    ):
        with pytest.raises(circuits.InputError, match="EAP-IG's files cannot hold"):
            save_eap_ig(circuits.Circuit.full(graph), tmp_path / "graph.json")


def test_files_that_do_not_fit_are_one_clear_line(model, tmp_path):
    with pytest.raises(circuits.InputError, match="does not fit"):
        load_eap_ig(DATA / "eap_case" / "graph.json", random_model("gpt2"))
    for content, told in (
        ("{", "truncated or not JSON"),
        ('{"nodes": {}}', "edges is missing; it is required"),
        ('{"edges": {"input->m0": {}}}', "edges.input->m0.score is missing; it is required"),
        (
            '{"edges": {"input->m0": {"score": 1e300, "in_graph": true}}}',
            r"the score of input->m0 is 1e\+300, which is too large for float32",
        ),
    ):
        (tmp_path / "broken.json").write_text(content)
        with pytest.raises(circuits.InputError, match=told):
            load_eap_ig(tmp_path / "broken.json", model)
