"""What users type first works, or says what to do."""

import importlib.metadata
from dataclasses import replace

import networkx
import pytest
import torch
from hypothesis import given, settings, strategies as st

import circuits

GRAPH_EDGES = 479


@pytest.fixture(scope="module")
def task(toy_world):
    return circuits.load_task("ioi", toy_world, n=4)


@pytest.fixture(scope="module")
def scored(toy_world, task):
    return circuits.EAP().discover(toy_world, task)


def test_the_version_is_that_of_the_installed_distribution():
    assert circuits.__version__ == importlib.metadata.version("transformer-circuits")


def test_a_circuit_is_a_collection_of_its_edges(scored):
    circuit = scored.top(5)
    first = circuit.edges[0]
    assert list(circuit) == list(circuit.edges) and len(list(circuit)) == 5
    assert first in circuit and str(first) in circuit
    assert "m0->m0" not in circuit and "a9.h9->logits" not in circuit
    left_out = next(edge for edge in scored if edge not in circuit)
    assert (
        circuit[left_out]
        == scored[left_out]
        == pytest.approx(float(scored.scores[scored.graph.index(left_out)]))
    )
    with pytest.raises(circuits.InputError, match="the graph has no edge a9"):
        circuit["a9.h9->logits"]


def test_the_nodes_of_a_circuit_are_the_ends_of_its_edges_in_order(scored):
    circuit = scored.top(5)
    ends = {node for edge in circuit for node in (edge.source, edge.target)}
    assert set(circuit.nodes) == ends
    assert list(circuit.nodes) == [node for node in scored.graph.nodes if node in ends]


def test_a_dataframe_has_a_row_per_kept_edge(scored):
    table = scored.top(5).to_dataframe()
    assert table.columns.tolist() == ["edge", "source", "target", "slot", "score"]
    assert table["edge"].tolist() == [str(edge) for edge in scored.top(5)]
    assert table["score"].tolist() == [scored[edge] for edge in scored.top(5)]
    assert len(circuits.Circuit.from_edges(scored.graph, []).to_dataframe()) == 0


@pytest.mark.parametrize("kind", ["scored", "unscored"])
def test_a_networkx_graph_can_be_written_to_graphml_gml_and_dot_and_read_back(
    scored, kind, tmp_path
):
    circuit = scored.top(30)
    if kind == "unscored":
        circuit = circuits.Circuit.from_edges(scored.graph, list(circuit))
    exported = circuit.to_networkx()
    networkx.write_graphml(exported, tmp_path / "circuit.graphml")
    networkx.write_gml(exported, tmp_path / "circuit.gml")
    networkx.nx_pydot.write_dot(exported, tmp_path / "circuit.dot")
    for read, file in ((networkx.read_graphml, "graphml"), (networkx.read_gml, "gml")):
        back = read(tmp_path / f"circuit.{file}")
        assert set(back.nodes) == set(exported.nodes)
        assert back.number_of_edges() == 30
    assert (tmp_path / "circuit.dot").read_text().count("->") == 30


@pytest.mark.parametrize("metric", ["logit_diff", "logit_difference", "kl"])
def test_an_evaluation_answers_by_attribute_and_by_name(toy_world, task, scored, metric):
    evaluation = circuits.evaluate(toy_world, scored.top(50), task)
    values = evaluation.values[values_name(metric)]
    assert getattr(evaluation, metric) == evaluation[metric] == float(values.mean())
    assert evaluation.faithfulness(metric) == evaluation.faithfulness(values_name(metric))


def values_name(metric: str) -> str:
    return "kl" if metric == "kl" else "logit_difference"


def test_an_evaluation_lists_its_metrics_and_refuses_others(toy_world, task, scored):
    evaluation = circuits.evaluate(toy_world, scored.top(50), task, metrics=["kl", "logit_diff"])
    assert {"kl", "logit_difference"} <= set(dir(evaluation)) and "accuracy" not in dir(evaluation)
    with pytest.raises(AttributeError, match="no metric 'kll'; it has kl, logit_difference"):
        evaluation.kll  # noqa: B018
    with pytest.raises(circuits.InputError, match="no metric 'kll'"):
        evaluation["kll"]


def test_values_show_themselves_in_a_notebook(toy_world, task, scored):
    evaluation = circuits.evaluate(toy_world, scored.top(50), task)
    comparison = circuits.compare(toy_world, {"eap": scored}, task, size=20)
    for value in (scored.top(20), scored.graph, evaluation, comparison):
        html = value._repr_html_()
        assert html.startswith("<") and "<script" not in html
    strongest = max(scored, key=lambda edge: abs(scored[edge]))
    assert str(strongest).replace(">", "&gt;") in scored._repr_html_()


def test_the_notes_of_a_comparison_are_escaped(toy_world, task, scored):
    comparison = circuits.compare(toy_world, {"eap": scored}, task, size=20)
    noted = replace(comparison, notes=("1 < 2 <script>",))
    assert "<p>1 &lt; 2 &lt;script&gt;</p>" in noted._repr_html_()


def test_functions_are_not_hidden_by_modules_of_their_name(toy_world, task, scored, tmp_path):
    import circuits.evaluation.compare
    import circuits.runs.circuit_run

    assert callable(circuits.compare) and callable(circuits.run)
    found = circuits.run(circuits.EAP(), toy_world, task, out=tmp_path)
    assert found.circuit == scored
    assert circuits.load_run(found.folder).circuit == scored
    assert circuits.draw_circuit(scored.top(5)).startswith("<svg")


EDGES = st.sets(st.integers(0, GRAPH_EDGES - 1))


@given(EDGES, EDGES)
@settings(max_examples=50, deadline=None)
def test_circuits_over_one_graph_are_sets_of_edges(scored, first, second):
    def keeping(edges):
        kept = torch.zeros(GRAPH_EDGES, dtype=torch.bool)
        kept[list(edges)] = True
        return circuits.Circuit(scored.graph, scored.scores, kept)

    def indices(circuit):
        return set(circuit.kept.nonzero().flatten().tolist())

    a, b = keeping(first), keeping(second)
    assert indices(a & b) == first & second
    assert indices(a | b) == first | second
    assert indices(a - b) == first - second
    assert (a | b) - (a & b) == (a - b) | (b - a)
    assert len(a) == len(first)


LAYER, INDEX = st.integers(0, 99), st.integers(0, 99_999)
POSITION = st.none() | st.integers(0, 999) | st.from_regex(r"[A-Z][A-Z0-9+_]{0,5}", fullmatch=True)
HEADS = st.builds(circuits.Head, LAYER, LAYER, POSITION)
SOURCES = st.one_of(
    st.builds(circuits.Embed, POSITION),
    st.builds(circuits.TokenEmbed, POSITION),
    st.builds(circuits.PosEmbed, POSITION),
    st.builds(circuits.MLP, LAYER, POSITION),
    st.builds(circuits.Feature, LAYER, INDEX, POSITION),
    st.builds(circuits.Error, LAYER, POSITION),
    HEADS,
)
TARGETS = st.one_of(
    st.builds(circuits.MLP, LAYER, POSITION),
    st.builds(circuits.Logits, st.none() | INDEX | st.just("answer"), POSITION),
)


@given(st.one_of(SOURCES, TARGETS))
@settings(max_examples=200, deadline=None)
def test_the_text_of_every_node_names_it(node):
    assert circuits.parse_node(str(node)) == node


@given(
    st.one_of(
        st.builds(circuits.Edge, SOURCES, TARGETS),
        st.builds(circuits.Edge, SOURCES, HEADS, st.sampled_from("qkv")),
    )
)
@settings(max_examples=200, deadline=None)
def test_the_text_of_every_edge_names_it(edge):
    assert circuits.parse_edge(str(edge)) == edge
