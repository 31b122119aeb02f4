"""Known circuits compute what they say, and the weights bear out the edges that were recorded while they were wired.

Nothing here ablates. The files in data/known_circuits come from other code that wires induction and or; their logits and circuits are oracles.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from circuits.errors import InputError
from circuits.graph import parse_edge
from circuits.models import Model, component_graph
from circuits.nodes import MLP, Head, Logits, Node, PosEmbed, TokenEmbed
from circuits.tasks.known_circuits import known_circuit, known_circuits
from circuits.tasks.wiring import Shape, Wiring

DATA = Path(__file__).parent / "data" / "known_circuits"
NAMES = ("induction", "proportion", "and", "or")
VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {"rotate": False, "decoys": False},
    "rot": {},
    "leak": {"leak": 0.001},
    "soft": {"soft": True, "leak": 0.001},
}
FILES = [(name, variant) for name in ("induction", "or") for variant in VARIANTS]

every_name = pytest.mark.parametrize("name", NAMES)
every_file = pytest.mark.parametrize(("name", "variant"), FILES)


# What the models compute, in plain Python: logits at every position of one prompt


def induction(words: list[int]) -> list[list[float]]:
    """The mean of the tokens after earlier occurrences of each word; none, or BOS, gives zeros."""
    rows = []
    for here, word in enumerate(words):
        followers = [words[place + 1] for place in range(here) if words[place] == word and word != 0]
        rows.append([followers.count(token) / len(followers) if followers else 0.0 for token in range(9)])
    return rows


def proportion(words: list[int]) -> list[list[float]]:
    """The share of token 1 so far."""
    return [[words[: place + 1].count(1) / (place + 1)] for place in range(len(words))]


def both(words: list[int]) -> list[list[float]]:
    return [[float(words[1] == 1 and words[2] == 1)] for _ in words]


def either(words: list[int]) -> list[list[float]]:
    return [[float(words[1] == 1 or words[2] == 1)] for _ in words]


ORACLES = {"induction": induction, "proportion": proportion, "and": both, "or": either}


def every_prompt(name: str) -> Tensor:
    """The task's prompts; for the gates also every pair of words at the two positions they look at."""
    task = known_circuit(name, **VARIANTS["plain"]).task
    prompts = torch.cat([task.clean, task.corrupted])
    if name in ("and", "or"):
        pairs = torch.cartesian_prod(torch.arange(1, 6), torch.arange(1, 6))
        more = prompts[: len(pairs)].clone()
        more[:, 1:3] = pairs
        prompts = torch.cat([prompts, more])
    return prompts


def errors(model: Model, name: str) -> Tensor:
    """How far the logits are from the oracle's, at every scored position."""
    prompts = every_prompt(name)
    expected = torch.tensor([ORACLES[name](words) for words in prompts.tolist()])
    first = known_circuit(name).task.scored[0].tolist().index(True)
    return (model(prompts) - expected)[:, first:].abs()


@every_name
@pytest.mark.parametrize("seed", range(3))
def test_the_logits_are_what_plain_python_computes_for_every_prompt(name: str, seed: int) -> None:
    assert errors(known_circuit(name, seed=seed).model, name).max() < 1e-3


@every_name
def test_soft_attention_blurs_the_logits_but_little(name: str) -> None:
    blur = errors(known_circuit(name, soft=True).model, name).max()
    assert blur < 1e-6 if name == "proportion" else 1e-3 < blur < 0.25


@every_name
@pytest.mark.parametrize("seed", range(3))
def test_leaks_change_the_logits_by_thousandths(name: str, seed: int) -> None:
    prompts = every_prompt(name)
    change = known_circuit(name, leak=0.001, seed=seed).model(prompts) - known_circuit(name, seed=seed).model(prompts)
    assert 1e-5 < change.abs().max() < 1e-2


@every_file
def test_the_logits_are_those_of_the_file(name: str, variant: str) -> None:
    file = read(name, variant)
    model = known_circuit(name, **VARIANTS[variant]).model
    # Leaks are random, so with them only their size is the same.
    tolerance = 5e-5 if variant in ("plain", "rot") else 1e-2
    torch.testing.assert_close(model(torch.tensor(file["clean"])), torch.tensor(file["expected_logits"]), atol=tolerance, rtol=0)


# The edges


@every_file
def test_the_edges_are_those_of_the_file(name: str, variant: str) -> None:
    truth, known = read(name, variant)["ground_truth"], known_circuit(name, **VARIANTS[variant])
    assert set(known.edges) == our_edges(truth["by_construction"])
    assert {ablation: set(edges) for ablation, edges in known.minimal.items()} == {
        "resample": our_edges(truth["minimal_resample"]),
        "zero": our_edges(truth["minimal_zero"]),
    }


def test_the_edges_of_the_other_two_are_those_of_the_published_table() -> None:
    proportion_circuit, and_circuit, or_circuit = (known_circuit(name) for name in ("proportion", "and", "or"))
    three = ("tok_embed->m0", "m0->a1.h0.v", "a1.h0->logits")
    assert proportion_circuit.edges == proportion_circuit.minimal["resample"] == proportion_circuit.minimal["zero"] == three
    assert and_circuit.edges == and_circuit.minimal["zero"] == or_circuit.edges
    assert set(and_circuit.edges) - set(and_circuit.minimal["resample"]) == {"pos_embed->a0.h0.k", "pos_embed->a0.h3.k"}


@every_name
def test_the_edges_are_distinct_edges_of_the_component_graph_and_connected(name: str) -> None:
    known = known_circuit(name)
    graph = component_graph(known.model, split_embed=True)
    kept = graph.mask(known.edges)
    assert int(kept.sum()) == len(known.edges)
    assert torch.equal(graph.reaching_logits(kept) & graph.reached_from_inputs(kept), kept)
    assert all(set(edges) <= set(known.edges) for edges in known.minimal.values())


@pytest.mark.parametrize(("name", "size"), [("induction", 106), ("proportion", 61), ("and", 37), ("or", 37)])
def test_the_graphs_have_the_published_numbers_of_edges(name: str, size: int) -> None:
    assert len(component_graph(known_circuit(name).model, split_embed=True)) == size


@every_name
def test_rotation_and_decoys_change_neither_the_logits_nor_the_edges(name: str) -> None:
    variants = [known_circuit(name, rotate=rotate, decoys=decoys) for rotate in (False, True) for decoys in (False, True)]
    logits = [variant.model(every_prompt(name)) for variant in variants]
    for variant, found in zip(variants[1:], logits[1:], strict=True):
        assert (variant.edges, variant.minimal) == (variants[0].edges, variants[0].minimal)
        torch.testing.assert_close(found, logits[0], atol=2e-5, rtol=0)


# The weights, without running anything


@every_name
@pytest.mark.parametrize("rotate", [False, True])
@pytest.mark.parametrize("decoys", [False, True])
def test_the_circuit_reads_what_a_source_writes_exactly_along_the_true_edges(name: str, rotate: bool, decoys: bool) -> None:
    known = known_circuit(name, rotate=rotate, decoys=decoys)
    strengths = edge_weights(known.model)
    wired = {parse_edge(edge).target for edge in known.edges}
    into_circuit = {edge: strength for edge, strength in strengths.items() if parse_edge(edge).target in wired}
    assert min(into_circuit[edge] for edge in known.edges) > 0.1
    # Out of the exact basis, float32 leaves a rounding error.
    assert max(strength for edge, strength in into_circuit.items() if edge not in known.edges) <= (1e-4 if rotate else 0.0)


@every_name
def test_decoys_read_everything_that_was_written_before_them(name: str) -> None:
    known = known_circuit(name)
    wired = {parse_edge(edge).target for edge in known.edges}
    into_decoys = [strength for edge, strength in edge_weights(known.model).items() if parse_edge(edge).target not in wired]
    assert into_decoys
    assert min(into_decoys) > 0.1


@every_name
def test_without_decoys_only_true_edges_have_weight(name: str) -> None:
    known = known_circuit(name, decoys=False, rotate=False)
    assert {edge for edge, strength in edge_weights(known.model).items() if strength > 0} == set(known.edges)


@every_name
def test_with_a_leak_every_edge_from_a_decoy_has_weight(name: str) -> None:
    known = known_circuit(name, leak=0.001)
    strengths = edge_weights(known.model)
    circuit = {parse_edge(edge).source for edge in known.edges} | {TokenEmbed(), PosEmbed()}
    # Where a head attends to all alike, or with a constant query, its queries (and keys) have no weights to leak into.
    silent = {edge for edge, strength in edge_weights(known_circuit(name, **VARIANTS["plain"]).model).items() if strength == 0}
    read = {(parse_edge(edge).target, parse_edge(edge).slot) for edge in known.edges} | {(Logits(), None)}
    from_decoys = [edge for edge in silent if parse_edge(edge).source not in circuit and (parse_edge(edge).target, parse_edge(edge).slot) in read]
    assert from_decoys
    assert all(strengths[edge] > 1e-5 for edge in from_decoys)


def test_a_rotated_model_hides_its_slots() -> None:
    plain, turned = (known_circuit("induction", rotate=rotate).model.state_dict() for rotate in (False, True))
    assert (plain["embed.W_E"] == 0).float().mean() > 0.9
    assert (turned["embed.W_E"] != 0).all()
    assert (turned["unembed.W_U"] != 0).all()


# The task


@every_name
def test_the_task_runs_through_the_circuit(name: str) -> None:
    known = known_circuit(name)
    task = known.task
    clean, corrupted = known.model(task.clean)[task.scored], known.model(task.corrupted)[task.scored]
    assert (clean - corrupted).square().mean() > 0.05
    assert (task.metric, len(task), task.name) == ("squared_error", 64, f"known-{name}")
    assert (task.clean[:, 0] == 0).all() and (task.clean[:, 1:] > 0).all()


@pytest.mark.parametrize(("name", "positions"), [("induction", list(range(1, 11))), ("proportion", list(range(1, 7))), ("and", [5]), ("or", [5])])
def test_bos_is_never_scored_and_gates_are_scored_at_the_end(name: str, positions: list[int]) -> None:
    assert all(row.nonzero().flatten().tolist() == positions for row in known_circuit(name).task.scored)


@pytest.mark.parametrize("name", ["and", "or"])
def test_gates_are_fed_both_bits_or_neither(name: str) -> None:
    task = known_circuit(name).task
    assert (task.clean[:, 1:3] == 1).all()
    assert (task.corrupted[:, 1:3] == 2).all()


def test_some_word_comes_again_in_every_induction_prompt() -> None:
    assert all(any(sum(row) > 0 for row in induction(words)) for words in every_prompt("induction").tolist())


# Seeds and bad input


@every_name
def test_the_seed_decides_everything_and_nothing_global_changes(name: str) -> None:
    state = torch.get_rng_state()
    first, again, other = known_circuit(name, seed=1), known_circuit(name, seed=1), known_circuit(name, seed=2)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(tensor, again.model.state_dict()[key]) for key, tensor in first.model.state_dict().items())
    assert torch.equal(first.task.clean, again.task.clean)
    assert not torch.equal(first.task.clean, other.task.clean)
    assert not torch.equal(first.model.W_E, other.model.W_E)


def test_prompts_do_not_depend_on_the_model() -> None:
    assert torch.equal(known_circuit("or", rotate=False, decoys=False).task.clean, known_circuit("or", leak=0.01, soft=True).task.clean)


def test_there_are_as_many_prompts_as_asked_for() -> None:
    assert len(known_circuit("induction", n_prompts=3).task) == 3


def test_names_are_listed() -> None:
    assert known_circuits() == NAMES


def test_an_unknown_name_is_an_error_that_lists_the_names() -> None:
    with pytest.raises(InputError, match="no known circuit 'xor'; there are induction, proportion, and, or"):
        known_circuit("xor")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"leak": 0.1, "decoys": False}, "leak=0.1 needs decoys"),
        ({"leak": -0.1}, "leak=-0.1 is out of range"),
        ({"leak": float("nan")}, "leak=nan is out of range"),
        ({"n_prompts": 0}, "n_prompts=0"),
    ],
)
def test_options_out_of_range_are_errors(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        known_circuit("or", **options)


def test_a_slot_has_one_writer() -> None:
    wiring = Wiring(Shape(n_layers=1, n_heads=2, d_head=2, n_ctx=2, d_vocab=2, d_vocab_out=2), {"copied": 2})
    copying: dict[str, Any] = {"attends": [], "copies": "token", "matrix": torch.eye(2), "writes": "copied", "sharpness": 1.0}
    wiring.head(0, 0, **copying)
    with pytest.raises(AssertionError, match=r"slot copied is written by a0\.h0 already"):
        wiring.head(0, 1, **copying)


# Reading files and weights


def read(name: str, variant: str) -> dict[str, Any]:
    """One file; its names are ours but for `embed`, which is the token embedding alone."""
    contents: dict[str, Any] = json.loads((DATA / f"hand_{name}_{variant}.json").read_text())
    return contents


def our_edges(pairs: list[list[str]]) -> set[str]:
    return {f"{'tok_embed' if source == 'embed' else source}->{target}" for source, target in pairs}


def edge_weights(model: Model) -> dict[str, float]:
    """For every edge the graph can have, the largest entry of (what the source writes) @ (what the target reads)."""
    weights = model.state_dict()
    return {
        str(edge): (written(weights, edge.source) @ consumed(weights, edge.target, edge.slot)).abs().max().item()
        for edge in component_graph(model, split_embed=True).edges
    }


def written(weights: dict[str, Tensor], source: Node) -> Tensor:
    match source:
        case TokenEmbed():
            return weights["embed.W_E"]
        case PosEmbed():
            return weights["pos_embed.W_pos"]
        case Head(layer=layer, head=head):
            return weights[f"blocks.{layer}.attn.W_O"][head]
        case MLP(layer=layer):
            return weights[f"blocks.{layer}.mlp.W_out"]
    raise TypeError(f"{source} writes nothing.")


def consumed(weights: dict[str, Tensor], target: Node, slot: str | None) -> Tensor:
    match target:
        case Head(layer=layer, head=head):
            return weights[f"blocks.{layer}.attn.W_{str(slot).upper()}"][head]
        case MLP(layer=layer):
            return weights[f"blocks.{layer}.mlp.W_in"]
        case Logits():
            return weights["unembed.W_U"]
    raise TypeError(f"{target} reads nothing.")
