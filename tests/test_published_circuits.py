"""Published circuits have the edges of the ACDC repository's functions (data/canonical)."""

import json
import re
import warnings
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
import torch
from architectures import random_model, random_task

import circuits
from circuits.graph.nodes import Head

DATA = Path(__file__).parent / "data" / "canonical"
TINY = {"d_model": 24, "d_head": 2, "d_mlp": 16}
GPT2_SMALL = {"n_layers": 12, "n_heads": 12, **TINY}
MODELS = {
    "ioi": ("gpt2", GPT2_SMALL),
    "greater_than": ("gpt2", GPT2_SMALL),
    "docstring": ("attention_only", {"n_layers": 4, "n_heads": 8, **TINY, "d_mlp": None}),
}
# Edges of the circuit and of its graph, and the edges of the circuit as the ACDC repository counts
# them: one more for each slot of a head.
SIZES = {
    "ioi": (963, 32_491, 1041),
    "greater_than": (235, 32_491, 262),
    "docstring": (24, 1281, 37),
}
every_circuit = pytest.mark.parametrize("name", MODELS)

# Made once for all tests: large graphs take a second under the suite's type checks.
published = cache(circuits.published_circuit)


@every_circuit
def test_the_edges_are_the_published_ones(name):
    circuit = published(name)
    expected = json.loads((DATA / f"canonical_{name.replace('_', '')}.json").read_text())
    assert {str(edge) for edge in circuit} == {"->".join(edge) for edge in expected}
    slots = {(edge.target, edge.slot) for edge in circuit if edge.slot}
    assert (len(circuit), len(circuit.graph), len(circuit) + len(slots)) == SIZES[name]
    assert circuit.connected(from_inputs=True) == circuit
    assert circuit.selected and circuit.scores.isnan().all()


def test_the_groups_are_the_heads_that_the_papers_name():
    def heads(name):
        return {node.label for node in published(name).nodes if type(node) is Head}

    groups = published("ioi").record["groups"]
    assert {name: len(nodes) for name, nodes in groups.items()} == {
        "name mover": 3,
        "backup name mover": 8,
        "negative": 2,
        "s2 inhibition": 4,
        "induction": 4,
        "duplicate token": 3,
        "previous token": 2,
    }
    assert groups["s2 inhibition"] == ["a7.h3", "a7.h9", "a8.h6", "a8.h10"]
    assert sorted(head for group in groups.values() for head in group) == sorted(heads("ioi"))
    groups = published("greater_than").record["groups"]
    assert groups["AMID"] == ["a5.h5", "a6.h1", "a6.h9", "a7.h10", "a8.h11", "a9.h1"]
    assert heads("greater_than") == {*groups["01"], *groups["0305"], *groups["AMID"]}
    assert heads("docstring") == {"a0.h5", "a1.h2", "a1.h4", "a2.h0", "a3.h0", "a3.h6"}


@pytest.mark.parametrize("name", ["ioi", "docstring"])
def test_a_circuit_runs_in_any_model_of_its_shape_without_a_warning(name):
    architecture, sizes = MODELS[name]
    model, task = random_model(architecture, **sizes), random_task(batch=2)
    without = published(name)
    circuit = circuits.published_circuit(name, model)
    assert circuit == without
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        by_hooks = circuits.run_circuit(model, circuit, task, executor="hooks")
        fast = circuits.run_circuit(model, without, task, executor="incremental")
    torch.testing.assert_close(fast, by_hooks, atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    ("architecture", "changes", "told"),
    [
        ("gpt2", {"n_layers": 13}, "n_layers 12 there, 13 here"),
        ("gpt2", {"n_heads": 16}, "n_heads 12 there, 16 here"),
        ("pythia", {}, "parallel_attn_mlp False there, True here"),
    ],
)
def test_a_model_of_another_shape_is_refused(architecture, changes, told):
    model = random_model(architecture, **{**GPT2_SMALL, **changes})
    with pytest.raises(circuits.InputError, match=told):
        circuits.published_circuit("ioi", model)
    with pytest.raises(circuits.InputError, match=told):
        circuits.run_circuit(model, published("ioi"), random_task(batch=1))


def test_saving_keeps_the_groups_and_the_source(tmp_path):
    circuit = published("docstring")
    circuit.save(tmp_path)
    loaded = circuits.Circuit.load(tmp_path)
    assert loaded == circuit and loaded.record == circuit.record
    assert "Heimersheim" in loaded.record["paper"] and "github.com" in loaded.record["code"]


def test_an_unknown_name_is_answered_with_the_nearest_one():
    with pytest.raises(circuits.InputError, match=r"'greaterthan'; did you mean 'greater_than'\?"):
        circuits.published_circuit("greaterthan")


def test_a_published_circuit_is_drawn_with_its_groups_as_types():
    circuit = published("greater_than")
    svg = circuits.draw_circuit(circuit, max_edges=len(circuit))
    shown = re.findall(r'<g class="type">.*?<text [^>]*>. (.*?)</text>', svg)
    assert shown == list(circuit.record["groups"])
    for group, nodes in circuit.record["groups"].items():
        assert all(f"<title>{node}\n{group}\n" in svg for node in nodes)
    assert 'class="type"' not in circuits.draw_circuit(circuit, types={})
    # Under that name, the record of another method may hold anything.
    other = replace(circuit, record={"method": "mine", "groups": 3})
    assert 'class="type"' not in circuits.draw_circuit(other)
