"""Edges split by head: against the same edge where that head is cut out of the frozen model."""

from dataclasses import replace

import pytest
import torch
from random_transcoders import model_of, random_transcoders

import circuits
from circuits.attribution.active_features import active_features, gather_sources
from circuits.attribution.edge_weights import LinearSweep, feature_targets
from circuits.attribution.feature_graph import FEATURE, TARGET
from circuits.attribution.head_shares import head_shares
from circuits.attribution.influence import pruned
from circuits.attribution.local_model import freeze

PROMPT = [3, 14, 15, 9, 26, 5]


def keys(columns) -> list[tuple[int, int, int]]:
    return list(
        zip(columns.layer.tolist(), columns.position.tolist(), columns.index.tolist(), strict=True)
    )


@pytest.mark.parametrize("kind", ["skip-plt", "clt"])
@pytest.mark.parametrize("architecture", ["gpt2", "pythia", "llama", "gemma2", "bidirectional"])
@torch.no_grad()
def test_a_heads_share_is_what_an_edge_loses_without_it(architecture, kind):
    model = model_of(architecture, n_layers=4)
    transcoders = random_transcoders(model, kind, features=24)
    graph = pruned(
        circuits.AttributionGraph(transcoders).attribute(model, PROMPT), node_threshold=0.9
    )
    shares = head_shares(model, transcoders, graph)
    (local,) = freeze(model, transcoders, [torch.tensor(PROMPT)])
    (features,) = active_features([local], transcoders)
    number = {key: place for place, key in enumerate(keys(features))}
    kinds = graph.nodes.kind
    between = (kinds[graph.source] == FEATURE) & (kinds[graph.target] == FEATURE)
    place = torch.tensor([number.get(key, -1) for key in keys(graph.nodes)])
    source, target = place[graph.source[between]], place[graph.target[between]]

    def weights() -> torch.Tensor:
        sweep = LinearSweep(local, gather_sources(local, transcoders, features))
        return sweep.rows(feature_targets(local, transcoders, features)).features[target, source]

    whole = weights()
    torch.testing.assert_close(whole, graph.weight[between], rtol=1e-4, atol=1e-5)
    for layer in range(4):
        for head in range(0, model.cfg.n_heads, 3):
            kept = local.layers[layer].mixing[head].clone()
            local.layers[layer].mixing[head] = 0
            lost = whole - weights()
            local.layers[layer].mixing[head] = kept
            torch.testing.assert_close(shares[between, layer, head], lost, rtol=1e-4, atol=1e-4)
    assert float(shares.abs().max()) > 0.01
    # An edge within one layer's attention: what goes around every head of all layers stays where it
    # is.
    no_heads = graph.weight - shares.sum((1, 2))
    once = shares.abs().sum(2).gt(1e-7).sum(1) <= 1
    torch.testing.assert_close(no_heads[once], graph.direct[once], rtol=1e-4, atol=1e-4)


def test_a_graph_without_edges_has_no_shares():
    model = model_of("gpt2", n_layers=4)
    transcoders = random_transcoders(model)
    graph = circuits.AttributionGraph(transcoders).attribute(model, PROMPT)
    no_edges = graph.subgraph(graph.is_kind(FEATURE, TARGET), torch.zeros(len(graph)).bool())
    assert head_shares(model, transcoders, no_edges).shape == (0, 4, model.cfg.n_heads)


def test_a_graph_of_another_model_is_refused():
    model = model_of("gpt2")
    transcoders = random_transcoders(model)
    graph = pruned(circuits.AttributionGraph(transcoders).attribute(model, PROMPT))
    with pytest.raises(circuits.InputError, match="made with a model of other weights"):
        head_shares(model_of("gpt2", seed=5), transcoders, graph)
    with pytest.raises(circuits.InputError, match="made with transcoders of other weights"):
        head_shares(model, random_transcoders(model, seed=5), graph)
    imported = replace(graph, model=None, transcoders=None)
    assert torch.equal(
        head_shares(model, transcoders, imported), head_shares(model, transcoders, graph)
    )
    with pytest.raises(circuits.InputError, match="does not fire in this model"):
        head_shares(model_of("gpt2", seed=5), transcoders, imported)
