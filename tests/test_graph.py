"""Nodes, edges and graphs: their text, their counts, which edges exist, what reaches what."""

import pytest
import torch
from architectures import ARCHITECTURES, random_model, random_task

import circuits
from circuits.graph.nodes import check_position_name

NODES = [
    circuits.Embed(),
    circuits.TokenEmbed(position=5),
    circuits.PosEmbed("S2"),
    circuits.Head(9, 6),
    circuits.Head(9, 6, position="S1+1"),
    circuits.MLP(3, position=14),
    circuits.Feature(2, 1204, position=5),
    circuits.Error(2, position=5),
    circuits.Logits(),
    circuits.Logits(token="answer"),
    circuits.Logits(token=1534, position=11),
]


@pytest.mark.parametrize("node", NODES, ids=str)
def test_the_text_of_a_node_round_trips(node):
    assert circuits.parse_node(str(node)) == node


def test_nodes_are_written_as_the_field_writes_them():
    assert [str(node) for node in NODES] == [
        "embed",
        "tok_embed@5",
        "pos_embed@S2",
        "a9.h6",
        "a9.h6@S1+1",
        "m3@14",
        "f2.1204@5",
        "e2@5",
        "logits",
        "logits:answer",
        "logits:1534@11",
    ]


@pytest.mark.parametrize(
    "text", ["", "a9", "a9.h", "h6", "m", "mlp3", "a9.h6@", "logits:", "f2", "embedding", "a-1.h0"]
)
def test_a_text_that_names_no_node_is_refused_with_the_forms_there_are(text):
    with pytest.raises(circuits.InputError, match=r"names no node; nodes are written like embed"):
        circuits.parse_node(text)


def test_the_text_of_every_edge_round_trips():
    model = random_model("gpt2")
    for graph in (
        circuits.component_graph(model, split_embed=True),
        circuits.component_graph(model, positions=["IO", "S1+1", "END"]),
    ):
        assert tuple(circuits.parse_edge(str(edge)) for edge in graph.edges) == graph.edges


def test_edges_are_written_with_the_slot_before_the_position():
    edge = circuits.Edge(circuits.Head(5, 5, "S2"), circuits.Head(9, 9, "END"), "q")
    assert str(edge) == "a5.h5@S2->a9.h9.q@END"
    assert str(circuits.Edge(circuits.MLP(0), circuits.Logits())) == "m0->logits"


def test_a_slot_may_be_written_as_eap_ig_does():
    assert circuits.parse_edge("a5.h5->a9.h9<q>") == circuits.parse_edge("a5.h5->a9.h9.q")


@pytest.mark.parametrize(
    "text", ["a5.h5", "a5.h5->a9.h9", "m0->m1.q", "m0-logits", "a5.h5->a9.h9.x", "->m0"]
)
def test_a_text_that_names_no_edge_is_refused(text):
    with pytest.raises(circuits.InputError, match="names no"):
        circuits.parse_edge(text)


@pytest.mark.parametrize(
    ("changes", "edges", "sources"),
    [
        (
            {"n_layers": 12, "n_heads": 12, "d_head": 2},
            32_491,
            157,
        ),  # GPT-2 small, as EAP-IG and MIB count it
        (
            {"n_layers": 12, "n_heads": 12, "d_head": 2, "parallel_attn_mlp": True},
            32_347,
            157,
        ),  # Pythia-160m
        (
            {
                "n_layers": 4,
                "n_heads": 8,
                "d_head": 3,
                "attn_only": True,
                "d_mlp": None,
                "act_fn": None,
            },
            1_281,
            33,
        ),  # attn-only-4l
        ({"n_layers": 2, "n_heads": 4, "d_head": 6}, 110, 11),
    ],
)
def test_edges_are_counted_as_in_the_fields_other_tools(changes, edges, sources):
    graph = circuits.component_graph(random_model("gpt2", **changes))
    assert len(graph) == len(graph.edges) == edges
    assert len(graph.source.unique()) == sources
    assert len(graph.nodes) == sources + 1


def test_splitting_the_embedding_doubles_its_edges():
    model = random_model("gpt2")
    plain, split = (
        circuits.component_graph(model),
        circuits.component_graph(model, split_embed=True),
    )
    assert len(split) - len(plain) == sum(
        isinstance(edge.source, circuits.Embed) for edge in plain.edges
    )


def test_a_model_without_position_embedding_has_none_to_split():
    with pytest.raises(circuits.InputError, match=r"no position embedding to split off.*rotary"):
        circuits.component_graph(random_model("llama"), split_embed=True)


def test_positions_split_every_edge_and_the_rest_of_a_prompt_is_a_span():
    model = random_model("gpt2")
    plain = circuits.component_graph(model)
    named = circuits.component_graph(model, positions=["S2", "END"])
    assert named.positions == ("rest", "S2", "END")
    assert len(named) == 3 * len(plain)
    assert len(circuits.component_graph(model, positions=8)) == 8 * len(plain)
    assert all(edge.source.position == edge.target.position for edge in named.edges)


@pytest.mark.parametrize("positions", [["S 1"], ["rest"], ["END", "END"], "END", ["7"], ["a@b"], 0])
def test_spans_that_cannot_be_named_are_refused(positions):
    with pytest.raises(circuits.InputError):
        circuits.component_graph(random_model("gpt2"), positions=positions)
    check_position_name("S1+1")


def test_an_mlp_hears_the_heads_of_its_layer_unless_the_block_is_parallel():
    assert "a1.h0->m1" in map(str, circuits.component_graph(random_model("gpt2")).edges)
    assert "a1.h0->m1" not in map(str, circuits.component_graph(random_model("pythia")).edges)
    assert "a1.h0->a1.h1.q" not in map(str, circuits.component_graph(random_model("gpt2")).edges)


def test_key_and_value_slots_are_per_query_head_under_grouped_queries():
    assert {"m0->a1.h0.k", "m0->a1.h1.k"} <= set(
        map(str, circuits.component_graph(random_model("llama")).edges)
    )


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_graph_order_is_the_order_of_computation(architecture):
    graph = circuits.component_graph(random_model(architecture))
    assert bool((graph.source < graph.target).all())
    assert graph.target.tolist() == sorted(graph.target.tolist())


def test_an_edge_the_graph_lacks_is_named_with_the_reason():
    graph = circuits.component_graph(random_model("gpt2"))
    with pytest.raises(circuits.InputError, match=r"no edge m7->logits: it has no node m7"):
        graph.index("m7->logits")
    with pytest.raises(circuits.InputError, match=r"m1 does not write where m0 reads"):
        graph.mask(["m1->m0"])
    with pytest.raises(circuits.InputError, match=r"or the graph was made without this edge"):
        graph.only(["m0->logits"]).index("m0->m1")


@pytest.mark.parametrize(
    ("edges", "told"),
    [
        (3, "edges=3 must be a list"),
        ([3], "expected an edge or its text, got 3"),
        (torch.ones(109, dtype=torch.bool), r"shape \(109,\) cannot choose .* of shape \(110,\)"),
        (torch.ones(110), r"torch.float32 and shape \(110,\) cannot choose"),
    ],
)
def test_what_chooses_no_edges_is_refused(edges, told, unchecked_types):
    graph = circuits.component_graph(random_model("gpt2"))
    for choose in (graph.mask, graph.only):
        with pytest.raises(circuits.InputError, match=told):
            choose(edges)


def test_a_graph_is_cut_to_some_edges_in_its_own_order():
    graph = circuits.component_graph(random_model("gpt2"), positions=3)
    texts = ["m1@2->logits@2", "embed@0->a0.h1.k@0"]
    cut = graph.only(texts)
    assert list(map(str, cut.edges)) == texts[::-1]
    assert (cut.nodes, cut.positions, cut.model) == (graph.nodes, graph.positions, graph.model)
    mask = graph.mask(texts)
    for same in (mask, mask.numpy(), circuits.Circuit.from_edges(graph, texts)):
        assert graph.only(same) == cut


def test_edges_that_cannot_reach_the_logits_are_dropped():
    graph = circuits.component_graph(random_model("gpt2"))
    circuit = circuits.Circuit.from_edges(
        graph, ["embed->m0", "m0->m1", "a0.h1->a1.h0.q", "m1->logits", "embed->a0.h3.v"]
    )
    assert [str(edge) for edge in circuit.connected().edges] == [
        "embed->m0",
        "m0->m1",
        "m1->logits",
    ]


def test_edges_that_no_input_reaches_are_dropped_on_request():
    graph = circuits.component_graph(random_model("gpt2"))
    circuit = circuits.Circuit.from_edges(
        graph, ["embed->m0", "m0->logits", "a0.h1->m1", "m1->logits"]
    )
    assert len(circuit.connected()) == 4
    assert [str(edge) for edge in circuit.connected(from_inputs=True).edges] == [
        "embed->m0",
        "m0->logits",
    ]


def test_what_a_head_reads_through_k_or_v_feeds_its_outputs_at_that_position_and_later_ones():
    graph = circuits.component_graph(random_model("gpt2"), positions=4)
    kept = [
        "embed@0->a0.h0.k@0",
        "embed@2->a0.h0.v@2",
        "embed@3->a0.h0.v@3",
        "embed@0->a0.h0.q@0",
        "embed@2->a0.h0.q@2",
        "a0.h0@2->logits@2",
    ]
    circuit = circuits.Circuit.from_edges(graph, kept)
    expected = {
        "embed@0->a0.h0.k@0",
        "embed@2->a0.h0.v@2",
        "embed@2->a0.h0.q@2",
        "a0.h0@2->logits@2",
    }
    assert {str(edge) for edge in circuit.connected().edges} == expected
    only_later = circuits.Circuit.from_edges(graph, ["embed@3->a0.h0.v@3", "a0.h0@2->logits@2"])
    assert len(only_later.connected(from_inputs=True)) == 0
    earlier = circuits.Circuit.from_edges(graph, ["embed@1->a0.h0.v@1", "a0.h0@2->logits@2"])
    assert len(earlier.connected(from_inputs=True)) == 2


def test_under_bidirectional_attention_and_between_named_spans_every_position_feeds_every_other():
    for graph, late, early in (
        (circuits.component_graph(random_model("bidirectional"), positions=4), "3", "1"),
        (circuits.component_graph(random_model("gpt2"), positions=["S1", "IO"]), "IO", "S1"),
    ):
        circuit = circuits.Circuit.from_edges(
            graph, [f"embed@{late}->a0.h0.k@{late}", f"a0.h0@{early}->logits@{early}"]
        )
        assert len(circuit.connected(from_inputs=True)) == 2


def edges_on_paths(whole, lacking, kept, *, from_inputs):
    """The kept edges on paths, from the definition: an edge that the graph lacks is kept, and what
    a head reads through k or v at a position feeds its outputs there and later.
    """
    open_edges = lacking | kept
    by_numbers = all(isinstance(span, int) for span in whole.positions or ())

    def feeds(first, second):
        """Whether what the first edge carries is in what the second one carries."""
        read, written = first.target, second.source
        if first.slot in ("k", "v") and isinstance(written, circuits.Head):
            same_head = (read.layer, read.head) == (written.layer, written.head)
            later = read.position is None or read.position <= written.position
            return same_head and (later if by_numbers and whole.causal else True)
        return read == written

    ahead = {edge for edge in open_edges if isinstance(edge.target, circuits.Logits)}
    behind = {edge for edge in open_edges if "embed" in str(edge.source)}
    for reached, follows in ((ahead, lambda a, b: feeds(a, b)), (behind, lambda a, b: feeds(b, a))):
        new = reached
        while new:
            new = {
                edge for edge in open_edges - reached if any(follows(edge, other) for other in new)
            }
            reached |= new
    return kept & ahead & (behind if from_inputs else kept)


@pytest.mark.parametrize("from_inputs", [False, True])
@pytest.mark.parametrize("positions", [None, 3, ["S1", "END"]])
@pytest.mark.parametrize("architecture", ["gpt2", "pythia", "attention_only", "bidirectional"])
def test_paths_lead_along_edges_that_the_graph_lacks(architecture, positions, from_inputs):
    whole = circuits.component_graph(
        random_model(architecture, n_heads=2, d_head=12), positions=positions
    )
    generator = torch.Generator().manual_seed(1)
    for share in (1.0, 0.95, 0.8, 0.4):
        graph = whole.only(torch.rand(len(whole), generator=generator) < share)
        kept = torch.rand(len(graph), generator=generator) < 0.2
        circuit = circuits.Circuit.full(graph)
        circuit = circuits.Circuit(graph, circuit.scores, kept)
        lacking = set(whole.edges) - set(graph.edges)
        found = circuit.connected()
        if from_inputs:
            reached = graph.reached_from_inputs(found.kept)
            found = circuits.Circuit(graph, circuit.scores, found.kept & reached)
        expected = edges_on_paths(whole, lacking, set(circuit.edges), from_inputs=from_inputs)
        assert set(found.edges) == expected


def test_a_graph_whose_columns_do_not_fit_is_refused(unchecked_types):
    whole = circuits.component_graph(random_model("gpt2"))
    for columns in (
        (whole.nodes, whole.source[:9], whole.target, whole.slot),
        (whole.nodes[:-1], whole.source, whole.target, whole.slot),
        (whole.nodes, whole.source - 1, whole.target, whole.slot),
        (whole.nodes, whole.source, whole.target, whole.slot + 9),
    ):
        with pytest.raises(circuits.InputError, match=r"one entry per edge .*graph\.only"):
            circuits.Graph(*columns)


def test_a_graph_with_an_edge_that_no_run_can_tell_apart_is_refused():
    model, task = random_model("gpt2"), random_task()
    whole = circuits.component_graph(model, positions=8)
    twice = torch.tensor([3, 3, 5])
    columns = (whole.source[twice], whole.target[twice], whole.slot[twice])
    doubled = circuits.Graph(whole.nodes, *columns, whole.positions)
    with pytest.raises(circuits.InputError, match="1 edges of the graph come twice"):
        circuits.run_circuit(model, circuits.Circuit.full(doubled), task)
    sideways = circuits.Graph(
        whole.nodes, whole.source[:1] + 1, whole.target[:1], whole.slot[:1], whole.positions
    )
    with pytest.raises(circuits.InputError, match=r"no edge embed@1->a0\.h0\.q@0"):
        circuits.run_circuit(model, circuits.Circuit.full(sideways), task)


def test_a_graph_that_names_no_model_has_unknown_paths():
    whole = circuits.component_graph(random_model("gpt2"))
    by_hand = circuits.Graph(whole.nodes, whole.source, whole.target, whole.slot)
    circuit = circuits.Circuit.full(by_hand)
    for follow in (circuit.connected, lambda: circuit.greedy(3)):
        with pytest.raises(circuits.InputError, match=r"does not name its model.*graph\.only"):
            follow()
    backwards = circuits.Graph(
        whole.nodes, whole.target, whole.source, whole.slot, model=whole.model
    )
    with pytest.raises(circuits.InputError, match=r"the model has no edge a0\.h0->embed"):
        circuits.Circuit.full(backwards).connected()


@pytest.mark.parametrize("architecture", ["gpt2", "pythia", "attention_only"])
def test_what_connected_drops_changes_no_logit(architecture):
    model, task = random_model(architecture), random_task()
    whole, split = circuits.component_graph(model), circuits.component_graph(model, positions=8)
    generator = torch.Generator().manual_seed(3)
    cut = [each.only(torch.rand(len(each), generator=generator) < 0.8) for each in (whole, split)]
    for graph in (whole, split, *cut):
        kept = (
            torch.rand(4, len(graph), generator=torch.Generator().manual_seed(2))
            < torch.tensor([0.02, 0.05, 0.1, 0.3])[:, None]
        )
        whole = [
            circuits.Circuit(graph, torch.full((len(graph),), torch.nan), mask) for mask in kept
        ]
        pruned = torch.stack([circuit.connected(from_inputs=True).kept for circuit in whole])
        assert bool((pruned != kept).any())
        torch.testing.assert_close(
            circuits.run_circuits(model, graph, kept, task),
            circuits.run_circuits(model, graph, pruned, task, executor="hooks"),
            atol=1e-5,
            rtol=0,
        )
