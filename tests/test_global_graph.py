"""Virtual weights against a loop over all pairs, and against the edges of attribution graphs."""

from dataclasses import replace

import pytest
import torch
from architectures import random_model
from meters import AllocationMeter

import circuits
from circuits.attribution.feature_graph import FEATURE
from circuits.attribution.local_model import freeze
from circuits.attribution.virtual_weights import expected_coactivation, virtual_weights
from circuits.discovery.methods.attribution_graph import AttributionGraph
from circuits.transcoders.activations import JumpReLU, ReLU
from circuits.transcoders.extraction import extract_features
from circuits.transcoders.transcoder import Encoder, Transcoders

LAYERS, FEATURES, WIDTH = 4, 40, 6
KINDS = ["PLT", "PLT with skip", "CLT"]


def random_transcoders(
    kind="PLT", layers=LAYERS, features=FEATURES, width=WIDTH, dtype=torch.float32, **settings
):
    generator = torch.Generator().manual_seed(3)

    def random(*shape):
        return torch.randn(shape, generator=generator).to(dtype)

    return Transcoders(
        [Encoder(random(features, width), 0.3 * random(features), ReLU()) for _ in range(layers)],
        [
            random(features, layers - layer if kind == "CLT" else 1, width)
            for layer in range(layers)
        ],
        [random(width) for _ in range(layers)],
        [random(width, width) for _ in range(layers)] if "skip" in kind else None,
        **settings,
    )


def random_states(seed=4, batch=3, pos=5, width=WIDTH, layers=LAYERS):
    generator = torch.Generator().manual_seed(seed)
    return {layer: torch.randn(batch, pos, width, generator=generator) for layer in range(layers)}


def every_pair(transcoders, fold=lambda layer, row: row, through=lambda layer, row: row):
    """V[target layer, target, source layer, source], one pair at a time, in double precision."""
    n, features = transcoders.n_layers, transcoders.n_features
    weights = torch.zeros(n, features, n, features, dtype=torch.double)
    for target_layer in range(n):
        for target in range(features):
            row = fold(target_layer, transcoders.encoders[target_layer].weight[target].double())
            for source_layer in range(target_layer):
                decoder = transcoders.decoders[source_layer].double()
                for source in range(features):
                    weights[target_layer, target, source_layer, source] = sum(
                        row @ through(written, decoder[source, written - source_layer])
                        for written in range(source_layer, target_layer)
                        if written - source_layer < decoder.shape[1]
                    )
    return weights


def assert_strongest(found, expected, top_k):
    """Of every target the `top_k` strongest, strongest first."""
    rows = []
    for target_layer, target in torch.cartesian_prod(
        torch.arange(expected.shape[0]), torch.arange(expected.shape[1])
    ).tolist():
        into = expected[target_layer, target]
        order = into.flatten().abs().sort(descending=True, stable=True).indices[:top_k].tolist()
        pairs = [divmod(number, expected.shape[1]) for number in order]
        rows += [(*pair, target_layer, target) for pair in pairs if into[pair] != 0]
    columns = (found.source_layer, found.source_index, found.target_layer, found.target_index)
    assert list(zip(*(column.tolist() for column in columns), strict=True)) == rows
    expected_weights = torch.stack(
        [
            expected[target_layer, target, layer, index]
            for layer, index, target_layer, target in rows
        ]
    )
    torch.testing.assert_close(found.weight.double(), expected_weights, rtol=1e-4, atol=1e-5)


def as_matrix(found, n_layers, n_features):
    whole = found.weight.new_zeros(n_layers, n_features, n_layers, n_features)
    whole[found.target_layer, found.target_index, found.source_layer, found.source_index] = (
        found.weight
    )
    return whole


@pytest.mark.parametrize("kind", KINDS)
def test_the_strongest_virtual_weights_are_those_of_a_loop_over_all_pairs(kind):
    transcoders = random_transcoders(kind)
    expected = every_pair(transcoders)
    for top_k in (1, 7, 1000):
        assert_strongest(virtual_weights(transcoders, top_k=top_k), expected, top_k)


def test_a_skip_is_not_part_of_a_virtual_weight():
    transcoders = random_transcoders("PLT with skip")
    found, without = virtual_weights(transcoders), virtual_weights(replace(transcoders, skips=None))
    assert torch.equal(found.weight, without.weight)


@pytest.mark.parametrize("kind", ["PLT", "CLT"])
def test_blocks_give_what_the_whole_gives(kind):
    transcoders = random_transcoders(kind, features=12, dtype=torch.float64)
    coactivation = expected_coactivation(
        [{layer: states.double() for layer, states in random_states().items()}], transcoders
    )
    for fired in (None, coactivation):
        whole = virtual_weights(transcoders, top_k=9, coactivation=fired)
        for max_memory in (1, 3000, 10000):
            blocks = virtual_weights(
                transcoders, top_k=9, coactivation=fired, max_memory=max_memory
            )
            for name in ("source_layer", "source_index", "target_layer", "target_index"):
                assert torch.equal(getattr(blocks, name), getattr(whole, name))
            torch.testing.assert_close(blocks.weight, whole.weight)


def test_of_equal_weights_those_of_earlier_sources_are_kept_whatever_the_blocks():
    transcoders = random_transcoders()
    whole_numbers = [decoder.round().clamp(-1, 1) for decoder in transcoders.decoders]
    encoders = [
        Encoder(encoder.weight.round().clamp(-1, 1), encoder.bias, encoder.activation)
        for encoder in transcoders.encoders
    ]
    transcoders = replace(transcoders, encoders=encoders, decoders=whole_numbers)
    expected = every_pair(transcoders)
    for max_memory in (2000, 10000, None):
        assert_strongest(virtual_weights(transcoders, top_k=9, max_memory=max_memory), expected, 9)


def test_it_takes_no_more_memory_than_it_may():
    transcoders = random_transcoders("CLT", features=512, width=32, dtype=torch.bfloat16)
    for max_memory in (1 << 19, 1 << 21):
        with AllocationMeter() as meter:
            found = virtual_weights(transcoders, top_k=4, max_memory=max_memory)
        assert max_memory / 2 < meter.growing + meter.fixed <= max_memory + 60 * len(found)


def test_transcoders_in_low_precision_are_multiplied_in_float32():
    transcoders = random_transcoders(dtype=torch.bfloat16)
    found = virtual_weights(transcoders, top_k=5)
    assert found.weight.dtype == torch.float32
    assert_strongest(found, every_pair(transcoders), 5)


@pytest.mark.parametrize("reads", ["residual", "normalized", "mlp_input"])
@pytest.mark.parametrize("architecture", ["gpt2", "folded_norms", "no_norms", "pythia", "llama"])
def test_with_a_model_the_linear_part_of_its_norms_is_in_the_weights(architecture, reads):
    model = random_model(architecture, n_layers=3)
    transcoders = random_transcoders(
        layers=3, features=8, width=model.cfg.d_model, reads=reads, writes="mlp"
    )  # no norm follows the MLP
    kind = model.cfg.normalization_type

    def fold(layer, row):
        if reads == "mlp_input" and kind in ("LN", "RMS"):
            row = row * model.blocks[layer].ln2.w.double()
        return row - row.mean() if reads != "residual" and kind in ("LN", "LNPre") else row

    assert_strongest(
        virtual_weights(transcoders, model=model, top_k=6), every_pair(transcoders, fold), 6
    )


def test_a_norm_after_the_mlp_is_in_the_weights_of_features_that_write_before_it():
    model = random_model("gemma", n_layers=3, use_normalization_before_and_after=True)
    for writes in ("mlp", "residual"):
        transcoders = random_transcoders(
            "CLT", layers=3, features=8, width=model.cfg.d_model, writes=writes
        )
        weights = [
            block.ln2_post.w.detach().double() if writes == "mlp" else 1.0 for block in model.blocks
        ]
        expected = every_pair(transcoders, through=lambda layer, row: row * weights[layer])  # noqa: B023
        assert_strongest(virtual_weights(transcoders, model=model, top_k=6), expected, 6)


PROMPT = torch.tensor([7, 3, 41, 3, 20, 11])


def edges_between_features(model, transcoders):
    """Of the graph of one prompt: nodes, and the weight and its direct part of every pair of
    features [target, source].
    """
    graph = AttributionGraph(transcoders).attribute(model, PROMPT)
    n = int((graph.nodes.kind == FEATURE).sum())
    assert n > 50
    direct = torch.zeros(len(graph.nodes), len(graph.nodes))
    direct[graph.target, graph.source] = graph.direct
    return graph.nodes[torch.arange(n)], graph.adjacency()[:n, :n], direct[:n, :n]


def activation_times_virtual_weight(features, found, transcoders):
    """[target, source], zero where they fire at different positions."""
    pairs = as_matrix(found, transcoders.n_layers, transcoders.n_features)
    pairs = pairs[features.layer, features.index][:, features.layer, features.index]
    return pairs * features.activation * (features.position[:, None] == features.position)


@pytest.mark.parametrize("kind", ["PLT", "CLT"])
@pytest.mark.parametrize(
    ("architecture", "reads"),
    [("gpt2", "residual"), ("pythia", "residual"), ("gpt2", "mlp_input"), ("llama", "normalized")],
)
def test_the_direct_part_of_an_edge_is_activation_times_virtual_weight(architecture, reads, kind):
    model = random_model(architecture, n_layers=3)
    transcoders = random_transcoders(
        kind, layers=3, features=16, width=model.cfg.d_model, reads=reads
    )
    features, _, direct = edges_between_features(model, transcoders)
    expected = activation_times_virtual_weight(
        features, virtual_weights(transcoders, model=model, top_k=1000), transcoders
    )
    if reads != "residual":  # what the norm divides by varies with the prompt
        (local,) = freeze(model, transcoders, [PROMPT])
        scales = [
            local.layers[layer].reading.scale[at, 0]
            for layer, at in zip(features.layer, features.position, strict=True)
        ]
        expected /= torch.stack(scales)[:, None]
    assert (expected != 0).sum() > 100
    torch.testing.assert_close(direct, expected, rtol=1e-4, atol=1e-4)


def test_without_attention_an_attribution_graph_has_no_other_edges_between_features():
    model = random_model("gpt2", n_layers=3)
    with torch.no_grad():
        for block in model.blocks:
            block.attn.W_O.zero_()
    transcoders = random_transcoders("CLT", layers=3, features=16, width=model.cfg.d_model)
    features, weight, _ = edges_between_features(model, transcoders)
    expected = activation_times_virtual_weight(
        features, virtual_weights(transcoders, top_k=1000), transcoders
    )
    torch.testing.assert_close(weight, expected, rtol=1e-4, atol=1e-4)


def dense_activations(batches, transcoders, leading):
    """[layer, token, feature] in double precision."""

    def of_layer(layer, states):
        encoder = transcoders.encoders[layer]
        return encoder.activation(
            states.double() @ encoder.weight.T.double() + encoder.bias.double()
        )

    rows = [
        torch.stack([of_layer(layer, states[layer]) for layer in range(LAYERS)])
        for states in batches
    ]
    return torch.cat([row[:, :, leading:].flatten(1, 2) for row in rows], 1)


@pytest.mark.parametrize("leading", [0, 1])
@pytest.mark.parametrize("kind", ["PLT", "CLT"])
def test_twera_is_that_of_a_loop_over_all_pairs(kind, leading):
    transcoders = random_transcoders(kind)
    batches = [random_states(seed) for seed in (4, 5)]
    activations = dense_activations(batches, transcoders, leading)
    together = torch.einsum("lpt,mps->ltms", activations, activations) / activations.shape[1]
    mean = activations.mean(1)
    expected = (
        every_pair(transcoders) * together / torch.where(mean == 0, 1.0, mean)[:, :, None, None]
    )
    coactivation = expected_coactivation(iter(batches), transcoders, leading=leading)
    assert coactivation.n_tokens == 2 * 3 * (5 - leading)
    for top_k in (3, 1000):
        assert_strongest(
            virtual_weights(transcoders, top_k=top_k, coactivation=coactivation), expected, top_k
        )


def test_coactivation_is_of_the_features_that_were_extracted():
    transcoders, states = random_transcoders(), random_states()
    found = extract_features(states, transcoders, 5, 0.2)
    one, other = (
        expected_coactivation([states], transcoders, top_k=5, threshold=0.2),
        expected_coactivation([found], transcoders),
    )
    for name in ("token", "activation", "starts"):
        assert torch.equal(getattr(one, name), getattr(other, name))
    dense = torch.zeros(LAYERS, 3, 5, FEATURES)
    dense[found.layer, found.batch, found.position, found.index] = found.activation
    flat = dense[:, :, 1:].flatten(1, 2)
    some, others = slice(3, 20), slice(10, FEATURES)
    assert torch.equal(one.activations(1, others), flat[1][:, others])
    torch.testing.assert_close(one.mean(2, some), flat[2][:, some].mean(0))
    torch.testing.assert_close(
        one.together(2, some, one.activations(1, others)),
        flat[2][:, some].T @ flat[1][:, others] / 12,
    )


def test_hidden_states_may_be_more_precise_than_the_transcoders():
    transcoders, states = random_transcoders(), random_states()
    precise = {layer: one.double() for layer, one in states.items()}
    found, expected = (
        virtual_weights(transcoders, coactivation=expected_coactivation(given, transcoders))
        for given in (precise, states)
    )
    assert found.weight.dtype == torch.float32
    torch.testing.assert_close(found.weight, expected.weight, rtol=1e-4, atol=1e-5)


def test_features_that_never_fire_have_no_twera():
    transcoders = random_transcoders()
    never = Encoder(
        transcoders.encoders[2].weight,
        transcoders.encoders[2].bias,
        JumpReLU(torch.full((FEATURES,), 1e6)),
    )
    transcoders = replace(
        transcoders, encoders=[*transcoders.encoders[:2], never, transcoders.encoders[3]]
    )
    found = virtual_weights(
        transcoders, coactivation=expected_coactivation([random_states()], transcoders)
    )
    assert len(found) > 0
    assert torch.isfinite(found.weight).all()
    assert not ((found.target_layer == 2) | (found.source_layer == 2)).any()


def test_the_table_has_a_row_for_each():
    found = virtual_weights(random_transcoders(), top_k=3)
    table = found.table()
    assert list(table.columns) == [
        "source_layer",
        "source_index",
        "target_layer",
        "target_index",
        "weight",
    ]
    assert len(table) == len(found) == 3 * FEATURES * (LAYERS - 1)
    assert table["weight"].tolist() == found.weight.tolist()


def test_transcoders_of_one_layer_have_no_virtual_weights():
    assert len(virtual_weights(random_transcoders(layers=1))) == 0


def test_what_does_not_fit_together_is_refused_in_one_line():
    transcoders, states = random_transcoders(), random_states()
    fewer = random_transcoders(features=39)
    cases = [
        (
            lambda: virtual_weights(transcoders, top_k=0),
            "top_k=0: give a whole number, 1 or more",
        ),
        (
            lambda: virtual_weights(transcoders, model=random_model("gpt2")),
            "are for 4 layers of width 6",
        ),
        (
            lambda: virtual_weights(
                transcoders, coactivation=expected_coactivation([states], fewer)
            ),
            "4 layers of 39 features, .* has 4 of 40",
        ),
        (lambda: expected_coactivation([], transcoders), "there are no batches"),
        (
            lambda: expected_coactivation([{0: states[0]}], transcoders),
            r"has layers \[0\]; give all 4",
        ),
        (
            lambda: expected_coactivation(states, transcoders, leading=5),
            "leading=5 of 5 positions are left out",
        ),
        (
            lambda: expected_coactivation(extract_features(states, transcoders), fewer),
            "a feature 39, and 'transcoders' has 39",
        ),
    ]
    for program, message in cases:
        with pytest.raises(circuits.InputError, match=message) as raised:
            program()
        assert "\n" not in str(raised.value)
