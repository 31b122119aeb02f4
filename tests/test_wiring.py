"""Wiring: the weights bear out the edges that were recorded while they were set. Nothing here runs
a model.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from circuits.graph.edges import Edge, parse_edge
from circuits.graph.nodes import MLP, Head, Logits, Node, PosEmbed, TokenEmbed
from circuits.models import Model
from circuits.models.component_graph import component_graph
from circuits.models.loading.saved import parts_of
from circuits.tasks.known_circuits.circuits import known_circuit, known_circuits
from circuits.tasks.known_circuits.wiring import Wiring

on_cpu = partial(known_circuit, device="cpu")
every_name = pytest.mark.parametrize("name", known_circuits())


@every_name
@pytest.mark.parametrize("rotate", [False, True])
@pytest.mark.parametrize("decoys", [False, True])
def test_the_circuit_reads_what_a_source_writes_exactly_along_the_true_edges(
    name: str, rotate: bool, decoys: bool
) -> None:
    model, true = wired(name, rotate=rotate, decoys=decoys)
    weights = edge_weights(model)
    others = [
        weight
        for edge, weight in weights.items()
        if edge not in true and edge.target in {edge.target for edge in true}
    ]
    assert min(weights[edge] for edge in true) > 0.1
    # A rotation in float32 leaves a rounding error.
    assert max(others) <= (1e-4 if rotate else 0.0)


@every_name
def test_decoys_read_everything_that_was_written_before_them(name: str) -> None:
    model, true = wired(name)
    into_decoys = [
        weight
        for edge, weight in edge_weights(model).items()
        if edge.target not in {edge.target for edge in true}
    ]
    assert into_decoys
    assert min(into_decoys) > 0.1


@every_name
def test_without_decoys_only_true_edges_have_weight(name: str) -> None:
    model, true = wired(name, decoys=False, rotate=False)
    assert {edge for edge, weight in edge_weights(model).items() if weight > 0} == true


@every_name
def test_with_a_leak_every_decoy_writes_a_little_where_the_circuit_reads(name: str) -> None:
    model, true = wired(name, leak=0.001)
    sources, reads = (
        {edge.source for edge in true} | {PosEmbed()},
        {(edge.target, edge.slot) for edge in true},
    )
    leaks = [
        weight
        for edge, weight in edge_weights(model).items()
        if edge.source not in sources and (edge.target, edge.slot) in reads
    ]
    assert leaks
    assert 1e-5 < min(leaks) <= max(leaks) < 0.2


def test_a_rotated_model_hides_its_subspaces() -> None:
    plain, turned = (
        parts_of(on_cpu("induction", rotate=rotate).model)[1] for rotate in (False, True)
    )
    assert (plain["embed.W_E"] == 0).float().mean() > 0.9
    assert (turned["embed.W_E"] != 0).all()
    assert (turned["unembed.W_U"] != 0).all()


SIZES = {"n_layers": 1, "d_head": 4, "n_ctx": 2, "d_vocab": 2, "d_vocab_out": 2}


def test_a_subspace_has_one_writer() -> None:
    wiring = Wiring({**SIZES, "n_heads": 2}, {"copied": 2})
    copying: dict[str, Any] = {"q": {}, "k": {}, "v": {"token": torch.eye(2)}, "writes": "copied"}
    wiring.head(Head(0, 0), **copying)
    with pytest.raises(AssertionError, match=r"subspace copied is already written by a0\.h0"):
        wiring.head(Head(0, 1), **copying)


def test_a_subspace_read_twice_is_one_edge() -> None:
    wiring = Wiring({**SIZES, "n_heads": 1}, {"copied": 2})
    tokens = {"token": torch.eye(2)}
    twice = {"token": torch.eye(2, 3) + torch.tensor([[0, 0, 1.0], [0, 0, 1.0]])}
    wiring.head(
        Head(0, 0), q=tokens, b_q=torch.tensor([0, 0, 1.0]), k=twice, v=tokens, writes="copied"
    )
    assert [str(edge) for edge in wiring.edges] == [
        "tok_embed->a0.h0.q",
        "tok_embed->a0.h0.k",
        "tok_embed->a0.h0.v",
    ]


def wired(name: str, **options: Any) -> tuple[Model, set[Edge]]:
    """The model and its true edges."""
    known = on_cpu(name, **options)
    return known.model, {parse_edge(edge) for edge in known.edges}


def edge_weights(model: Model) -> dict[Edge, float]:
    """For every edge the graph can have, the largest entry of (what the source writes) @ (what the
    target reads).
    """
    weights = parts_of(model)[1]
    return {
        edge: (written(weights, edge.source) @ consumed(weights, edge.target, edge.slot))
        .abs()
        .max()
        .item()
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
