"""Searches that are told where to start, and which edges to try."""

import dataclasses
from typing import ClassVar

import pytest
import torch
from architectures import random_model, random_task
from replay import assert_sequential

import circuits
from circuits.discovery.discoverer import REGISTRY, CircuitDiscoverer
from circuits.discovery.search_space import SearchSpace

# Many models and methods: types are checked where each is tested.
pytestmark = pytest.mark.usefixtures("unchecked_types")

THRESHOLD = 0.02


@pytest.fixture(scope="module")
def model():
    return random_model("gpt2")


@pytest.fixture(scope="module")
def task():
    return random_task(batch=4)


@pytest.fixture(scope="module")
def scores(model, task):
    return circuits.EAPIG().discover(model, task)


SPACES = {
    "start": lambda scores: {"start": scores.greedy(50)},
    "frozen": lambda scores: {
        "frozen_in": ["m1->logits", "embed->a0.h0.q"],
        "frozen_out": scores.top(100) - scores.top(60),
    },
    "masks": lambda scores: {"frozen_in": scores.scores > 0.1, "frozen_out": scores.scores < -0.1},
    "layers": lambda scores: {"layers": [1]},
    "nodes": lambda scores: {"nodes": ["a0.h1", circuits.Logits()]},
    "all": lambda scores: {
        "start": scores.greedy(70),
        "layers": range(1, 2),
        "nodes": ["a1.h0", "m1"],
        "frozen_in": scores.top(5),
    },
}
every_space = pytest.mark.parametrize("part", SPACES.values(), ids=SPACES)


@every_space
def test_a_search_decides_as_the_sequential_one_on_the_edges_to_try(model, task, scores, part):
    options = part(scores)
    space = SearchSpace.parse(scores.graph, **options)
    found = circuits.ACDC(THRESHOLD).discover(model, task, **options)
    n_tried = assert_sequential(found, model, task, THRESHOLD, space=space)
    assert found.scores[~space.tried].isnan().all()
    assert found.record["evaluations"] == int(found.scores.isfinite().sum()) == n_tried
    evaluation = circuits.evaluate(model, found, task)
    assert found.record["damage"] == pytest.approx(evaluation.kl, abs=1e-5)
    for method in (
        circuits.ACDC(THRESHOLD, speculate=False),
        circuits.ACDC(THRESHOLD, guess="eap"),
        circuits.BatchedACDC(THRESHOLD, group=1),
    ):
        circuit = method.discover(model, task, **options)
        assert torch.equal(circuit.kept, found.kept)
        torch.testing.assert_close(circuit.scores, found.scores, atol=1e-5, rtol=0, equal_nan=True)


@every_space
def test_group_tests_and_batches_leave_alone_what_is_not_tried(model, task, scores, part):
    options = part(scores)
    space = SearchSpace.parse(scores.graph, **options)
    original = circuits.ACDC(THRESHOLD, order="original").discover(model, task, **options)
    assert_sequential(original, model, task, THRESHOLD, order="original", space=space)
    batched = circuits.BatchedACDC(THRESHOLD, group="layer", verify=True)
    circuit = batched.discover(model, task, **options)
    untried = ~space.tried
    assert torch.equal(circuit.kept[untried], space.kept[untried])
    assert circuit.scores[untried].isnan().all()


def test_split_by_position_and_in_a_graph_that_lacks_edges_too(task):
    model = random_model("gpt2", n_heads=2, d_head=12)
    whole = circuits.component_graph(model, positions=8)
    generator = torch.Generator().manual_seed(0)
    graph = whole.only(torch.rand(len(whole), generator=generator) < 0.5)
    start = circuits.Circuit.full(graph, torch.rand(len(graph), generator=generator)).greedy(60)
    options = {"start": start, "nodes": ["a0.h1", "m1@7", "logits"]}
    circuit = circuits.ACDC(THRESHOLD).discover(model, task, **options)
    space = SearchSpace.parse(graph, **options)
    assert_sequential(circuit, model, task, THRESHOLD, space=space)
    assert circuit.graph == graph


def test_which_edges_are_tried_and_what_becomes_of_the_others():
    graph = circuits.component_graph(random_model("gpt2", n_heads=2, d_head=12))
    start = circuits.Circuit.full(graph) - circuits.Circuit.from_edges(graph, ["m0->m1"])

    def space(**part):
        parsed = SearchSpace.parse(graph, **part)
        kept, tried = (
            {str(edge) for edge, chosen in zip(graph.edges, mask.tolist(), strict=True) if chosen}
            for mask in (parsed.kept, parsed.tried)
        )
        return kept, tried

    everything = set(map(str, graph.edges))
    assert space() == (everything, everything)
    assert space(start=start) == (everything - {"m0->m1"},) * 2
    assert space(start=start, frozen_in=["m0->m1"]) == (everything, everything - {"m0->m1"})
    assert space(frozen_out=["m0->m1"]) == (everything - {"m0->m1"},) * 2
    kept, tried = space(layers=[0])
    assert kept == everything
    assert tried == {edge for edge in everything if "->a0." in edge or "->m0" in edge}
    _, tried = space(nodes=["a1.h0", "logits"])
    assert tried == {edge for edge in everything if "a1.h0" in edge or "logits" in edge}
    _, both = space(nodes=["a1.h0", "logits"], layers=1)
    assert both == {edge for edge in tried if "->a1." in edge or "->m1" in edge}


def test_started_from_the_whole_graph_a_search_is_the_plain_one(model, task):
    whole = circuits.Circuit.full(circuits.component_graph(model))
    for method in (circuits.ACDC(THRESHOLD), circuits.BatchedACDC(THRESHOLD)):
        plain, started = method.discover(model, task), method.discover(model, task, start=whole)
        assert started == plain
        assert started.record == plain.record
        assert plain.record["search_space"] == {"tried": 110, "frozen_in": 0, "frozen_out": 0}


def test_edges_outside_the_start_are_ablated_and_edges_outside_the_graph_are_kept(
    model, task, scores
):
    some = scores.greedy(50)
    started = circuits.ACDC(THRESHOLD).discover(model, task, start=some)
    cut = circuits.ACDC(THRESHOLD).discover(model, task, graph=some.graph.only(some))
    whole = some.graph
    assert len(started - some) == 0
    kept = ~some.kept
    kept[whole.mask(cut.edges)] = True
    again = circuits.Circuit(whole, scores.scores, kept)
    assert circuits.evaluate(model, again, task).kl == pytest.approx(cut.record["damage"], abs=1e-5)
    assert cut.record["damage"] < started.record["damage"]


def test_a_sweep_searches_where_it_is_told(model, task, scores):
    options = {"start": scores.greedy(60), "frozen_in": ["m1->logits"]}
    swept = circuits.ACDC(1.0).sweep(model, task, [0.005, 0.03], **options)
    for threshold, found in zip([0.005, 0.03], swept, strict=True):
        alone = circuits.ACDC(threshold).discover(model, task, **options)
        assert torch.equal(found.kept, alone.kept)
        assert found.record["search_space"] == {"tried": 59, "frozen_in": 1, "frozen_out": 50}


def interrupted(method, model, task, path, **options):
    """The circuit, found with an interruption after every few steps."""
    steps = []

    def stop_now_and_then(done, total):
        steps.append(done)
        if len(steps) % 2 == 0:
            raise KeyboardInterrupt

    while True:
        try:
            return method.discover(
                model, task, checkpoint=path, progress=stop_now_and_then, **options
            )
        except KeyboardInterrupt:
            continue


@pytest.mark.parametrize("method", [circuits.ACDC(THRESHOLD), circuits.BatchedACDC(THRESHOLD)])
def test_an_interrupted_search_goes_on_in_its_space_and_in_no_other(
    method, model, task, scores, tmp_path
):
    options = {"start": scores.greedy(50), "frozen_in": scores.top(9)}
    resumed = interrupted(method, model, task, tmp_path / "state", **options)
    uninterrupted = method.discover(model, task, **options)
    assert resumed == uninterrupted
    assert resumed.record == uninterrupted.record
    for other in ({}, {"start": scores.greedy(49)}, {"start": scores.greedy(50)}):
        with pytest.raises(circuits.InputError, match="belongs to a run with other settings"):
            method.discover(model, task, checkpoint=tmp_path / "state", **other)


def test_a_run_folder_is_that_of_the_space(model, task, scores, tmp_path):
    def run(**part):
        return circuits.run(circuits.ACDC(THRESHOLD), model, task, out=tmp_path, **part)

    plain, started = run(), run(start=scores.greedy(50))
    assert plain.folder != started.folder != run(start=scores.greedy(40)).folder
    assert started.record["search_space"] == {"tried": 50, "frozen_in": 0, "frozen_out": 60}
    assert run(start=scores.greedy(50)).reused
    assert run(start=circuits.Circuit.full(scores.graph), layers=None).reused


REFUSED = {
    "both in and out": (
        {"frozen_in": ["m0->m1"], "frozen_out": ["m0->m1"]},
        r"frozen_in and frozen_out both hold m0->m1 \(1 edges in all\)",
    ),
    "unknown edge": ({"frozen_out": ["m7->m9"]}, "^frozen_out: the graph has no edge m7->m9"),
    "no list": ({"frozen_in": 3}, "^frozen_in: edges=3 must be a list"),
    "mask": ({"frozen_in": torch.ones(7, dtype=torch.bool)}, r"frozen_in: .* shape \(7,\)"),
    "start of edges": ({"start": ["m0->m1"]}, "is no circuit; give one"),
    "no layer": ({"layers": [0, 2]}, r"layers=\[0, 2\]: give layers .* from 0 to 1"),
    "layers in words": ({"layers": "1-2"}, "layers='1-2' must be a list"),
    "half a layer": ({"layers": 0.5}, "layers=0.5: give layers"),
    "unknown node": ({"nodes": ["m9"]}, "the graph has no node m9"),
    "no nodes": ({"nodes": []}, "no edge is left to try: of 110 edges, 110 are kept"),
    "nothing tried": ({"frozen_out": ~torch.zeros(110, dtype=torch.bool)}, "no edge is left"),
}


@pytest.mark.parametrize(("part", "told"), REFUSED.values(), ids=REFUSED)
def test_a_space_that_cannot_be_is_refused(model, task, part, told, unchecked_types):
    with pytest.raises(circuits.InputError, match=told):
        circuits.ACDC(THRESHOLD).discover(model, task, **part)


@pytest.mark.parametrize("name", ["start", "frozen_in", "frozen_out"])
def test_a_circuit_over_another_graph_is_refused(model, task, name):
    split = circuits.Circuit.full(circuits.component_graph(model, split_embed=True))
    graph = circuits.component_graph(model)
    with pytest.raises(circuits.InputError, match=rf"{name} is a circuit over another graph"):
        circuits.ACDC(THRESHOLD).discover(model, task, graph=graph, **{name: split})


@pytest.mark.parametrize("method", [circuits.ACDC(THRESHOLD), circuits.BatchedACDC(THRESHOLD)])
def test_a_search_whose_edges_cannot_reach_the_logits_is_refused(method, model, task):
    graph = circuits.component_graph(model)
    cut_off = circuits.Circuit.from_edges(graph, ["embed->m0"])
    with pytest.raises(circuits.InputError, match="none of the 1 edges to try reaches the logits"):
        method.discover(model, task, start=cut_off)
    with pytest.raises(circuits.InputError, match="none of the 0 edges to try"):
        method.discover(model, task, graph=graph.only([]))


@pytest.mark.parametrize("method", [circuits.EAP(), circuits.ActivationPatching()])
def test_methods_that_do_not_search_cannot_be_told_where(method, model, task, scores):
    with pytest.raises(
        circuits.InputError, match=rf"^{method.name} does not search.*start=, layers="
    ):
        method.discover(model, task, start=scores.greedy(5), layers=[1])


def test_a_users_method_with_a_find_goes_on_working_and_refuses_a_space(model, task):
    class FromTheEnd(CircuitDiscoverer):
        name: ClassVar[str] = "from-the-end"

        def find(self, model, task, graph, saved, progress):
            scores = torch.arange(len(graph)).float()
            return circuits.Circuit.full(graph, scores, record=self.record())

    class ConnectedACDC(circuits.ACDC):
        name: ClassVar[str] = "connected-acdc"

        def find(self, model, task, graph, saved, progress):
            found = super().find(model, task, graph, saved, progress)
            return dataclasses.replace(found.connected(), record={"by": "a user"})

    assert len(FromTheEnd().discover(model, task)) == 110
    over = ConnectedACDC(THRESHOLD).discover(model, task)
    assert over.record == {"by": "a user"}
    assert over == circuits.ACDC(THRESHOLD).discover(model, task)
    for method in (FromTheEnd(), ConnectedACDC(THRESHOLD)):
        with pytest.raises(circuits.InputError, match=f"^{method.name} does not search"):
            method.discover(model, task, nodes=["m0"])
    for name in ("from-the-end", "connected-acdc"):
        del REGISTRY[name]


def test_edges_from_a_generator_are_frozen_in_a_run_too(model, task, tmp_path):
    edges = ["m0->logits", "m1->logits", "embed->m0"]
    method = circuits.ACDC(THRESHOLD)
    listed = circuits.run(method, model, task, out=tmp_path / "listed", frozen_in=edges)
    generated = circuits.run(
        method, model, task, out=tmp_path / "generated", frozen_in=(each for each in edges)
    )
    assert generated.circuit == listed.circuit
    assert generated.record["search_space"] == listed.record["search_space"]
