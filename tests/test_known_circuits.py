"""Known circuits compute what they say, along the edges that other code found for them.

The files in data/known_circuits were made by other code that wires induction and or; their logits
and circuits are oracles. Nothing
here ablates, and that the weights bear out the edges is in test_wiring.py.
"""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import weight
from torch import Tensor

from circuits.models import Model
from circuits.models.component_graph import component_graph
from circuits.models.loading.saved import parts_of
from circuits.system.errors import InputError
from circuits.tasks.known_circuits.circuits import known_circuit, known_circuits

DATA = Path(__file__).parent / "data" / "known_circuits"
NAMES = ("induction", "proportion", "and", "or")
VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {"rotate": False, "decoys": False},
    "rot": {},
    "leak": {"leak": 0.001},
    "soft": {"soft": True, "leak": 0.001},
}
FILES = [(name, variant) for name in ("induction", "or") for variant in VARIANTS]

on_cpu = partial(known_circuit, device="cpu")
every_name = pytest.mark.parametrize("name", NAMES)
every_file = pytest.mark.parametrize(("name", "variant"), FILES)


# What the models compute, in plain Python: logits at every position of one prompt


def induction(words: list[int]) -> list[list[float]]:
    """The mean of the tokens after earlier occurrences of each word; none, or BOS, gives zeros."""
    rows = []
    for here, word in enumerate(words):
        followers = [
            words[place + 1] for place in range(here) if words[place] == word and word != 0
        ]
        rows.append(
            [followers.count(token) / len(followers) if followers else 0.0 for token in range(9)]
        )
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
    """The task's prompts; for the gates also every pair of words at the two positions they
    look at.
    """
    task = on_cpu(name, **VARIANTS["plain"]).task
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
    first = on_cpu(name).task.scored[0].tolist().index(True)
    return (model(prompts) - expected)[:, first:].abs()


@every_name
@pytest.mark.parametrize("seed", range(3))
def test_the_logits_are_what_plain_python_computes_for_every_prompt(name: str, seed: int) -> None:
    assert errors(on_cpu(name, seed=seed).model, name).max() < 1e-3


@every_name
def test_soft_attention_blurs_the_logits_but_little(name: str) -> None:
    blur = errors(on_cpu(name, soft=True).model, name).max()
    assert blur < 1e-6 if name == "proportion" else 1e-3 < blur < 0.25


@every_name
@pytest.mark.parametrize("seed", range(3))
def test_leaks_change_the_logits_by_thousandths(name: str, seed: int) -> None:
    prompts = every_prompt(name)
    change = on_cpu(name, leak=0.001, seed=seed).model(prompts) - on_cpu(name, seed=seed).model(
        prompts
    )
    assert 1e-5 < change.abs().max() < 1e-2


@every_file
def test_the_logits_are_those_of_the_file(name: str, variant: str) -> None:
    file = read(name, variant)
    model = on_cpu(name, **VARIANTS[variant]).model
    # Leaks are random, so with them only their size is the same.
    tolerance = 5e-5 if variant in ("plain", "rot") else 1e-2
    torch.testing.assert_close(
        model(torch.tensor(file["clean"])),
        torch.tensor(file["expected_logits"]),
        atol=tolerance,
        rtol=0,
    )


# The edges


@every_file
def test_the_edges_are_those_of_the_file(name: str, variant: str) -> None:
    truth, known = read(name, variant)["ground_truth"], on_cpu(name, **VARIANTS[variant])
    assert set(known.edges) == our_edges(truth["by_construction"])
    assert {ablation: set(edges) for ablation, edges in known.minimal.items()} == {
        "resample": our_edges(truth["minimal_resample"]),
        "zero": our_edges(truth["minimal_zero"]),
    }


def test_the_edges_of_the_other_two_are_those_of_the_published_table() -> None:
    proportion_circuit, and_circuit, or_circuit = (
        on_cpu(name) for name in ("proportion", "and", "or")
    )
    three = ("tok_embed->m0", "m0->a1.h0.v", "a1.h0->logits")
    assert (
        proportion_circuit.edges
        == proportion_circuit.minimal["resample"]
        == proportion_circuit.minimal["zero"]
        == three
    )
    assert and_circuit.edges == and_circuit.minimal["zero"] == or_circuit.edges
    assert set(and_circuit.edges) - set(and_circuit.minimal["resample"]) == {
        "pos_embed->a0.h0.k",
        "pos_embed->a0.h3.k",
    }


@every_name
def test_the_edges_are_distinct_edges_of_the_component_graph_and_connected(name: str) -> None:
    known = on_cpu(name)
    graph = component_graph(known.model, split_embed=True)
    kept = graph.mask(known.edges)
    assert int(kept.sum()) == len(known.edges)
    assert torch.equal(graph.reaching_logits(kept) & graph.reached_from_inputs(kept), kept)
    assert all(set(edges) <= set(known.edges) for edges in known.minimal.values())


@pytest.mark.parametrize(
    ("name", "size"), [("induction", 106), ("proportion", 61), ("and", 37), ("or", 37)]
)
def test_the_graphs_have_the_published_numbers_of_edges(name: str, size: int) -> None:
    assert len(component_graph(on_cpu(name).model, split_embed=True)) == size


@every_name
def test_rotation_and_decoys_change_neither_the_logits_nor_the_edges(name: str) -> None:
    variants = [
        on_cpu(name, rotate=rotate, decoys=decoys)
        for rotate in (False, True)
        for decoys in (False, True)
    ]
    logits = [variant.model(every_prompt(name)) for variant in variants]
    for variant, found in zip(variants[1:], logits[1:], strict=True):
        assert (variant.edges, variant.minimal) == (variants[0].edges, variants[0].minimal)
        torch.testing.assert_close(found, logits[0], atol=2e-5, rtol=0)


# The task


@every_name
def test_the_task_runs_through_the_circuit(name: str) -> None:
    known = on_cpu(name)
    task = known.task
    clean, corrupted = (
        known.model(task.clean)[task.scored],
        known.model(task.corrupted)[task.scored],
    )
    assert (clean - corrupted).square().mean() > 0.05
    assert (task.metric, len(task), task.name) == ("squared_error", 64, f"known-{name}")
    assert (task.clean[:, 0] == 0).all() and (task.clean[:, 1:] > 0).all()


@pytest.mark.parametrize(
    ("name", "positions"),
    [
        ("induction", list(range(1, 11))),
        ("proportion", list(range(1, 7))),
        ("and", [5]),
        ("or", [5]),
    ],
)
def test_bos_is_never_scored_and_gates_are_scored_at_the_end(
    name: str, positions: list[int]
) -> None:
    assert all(row.nonzero().flatten().tolist() == positions for row in on_cpu(name).task.scored)


@pytest.mark.parametrize("name", ["and", "or"])
def test_gates_are_fed_both_bits_or_neither(name: str) -> None:
    task = on_cpu(name).task
    assert (task.clean[:, 1:3] == 1).all()
    assert (task.corrupted[:, 1:3] == 2).all()


def test_some_word_comes_again_in_every_induction_prompt() -> None:
    assert all(
        any(sum(row) > 0 for row in induction(words))
        for words in every_prompt("induction").tolist()
    )


# Seeds and bad input


@every_name
def test_the_seed_decides_everything_and_nothing_global_changes(name: str) -> None:
    state = torch.get_rng_state()
    first, again, other = on_cpu(name, seed=1), on_cpu(name, seed=1), on_cpu(name, seed=2)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(
        torch.equal(tensor, parts_of(again.model)[1][key])
        for key, tensor in parts_of(first.model)[1].items()
    )
    assert torch.equal(first.task.clean, again.task.clean)
    assert not torch.equal(first.task.clean, other.task.clean)
    assert not torch.equal(*(weight(each.model, "embed.W_E") for each in (first, other)))


def test_prompts_do_not_depend_on_the_model() -> None:
    assert torch.equal(
        on_cpu("or", rotate=False, decoys=False).task.clean,
        on_cpu("or", leak=0.01, soft=True).task.clean,
    )


def test_there_are_as_many_prompts_as_asked_for() -> None:
    assert len(on_cpu("induction", n_prompts=3).task) == 3


def test_names_are_listed() -> None:
    assert known_circuits() == NAMES


def test_an_unknown_name_is_an_error_that_lists_the_names() -> None:
    with pytest.raises(
        InputError,
        match=r"no known circuit 'xor'; did you mean 'or'\? there are induction, proportion, and",
    ):
        on_cpu("xor")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"leak": 0.1, "decoys": False}, "leak=0.1 needs decoys"),
        ({"leak": -0.1}, "leak=-0.1 is out of range"),
        ({"leak": float("nan")}, "leak=nan must be a number"),
        ({"n_prompts": 0}, "n_prompts=0"),
    ],
)
def test_options_out_of_range_are_errors(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        on_cpu("or", **options)


# Reading files


def read(name: str, variant: str) -> dict[str, Any]:
    """One file; its names are ours but for `embed`, which is the token embedding alone."""
    contents: dict[str, Any] = json.loads((DATA / f"hand_{name}_{variant}.json").read_text())
    return contents


def our_edges(pairs: list[list[str]]) -> set[str]:
    return {f"{'tok_embed' if source == 'embed' else source}->{target}" for source, target in pairs}
