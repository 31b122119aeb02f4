"""Attribution graphs: circuit-tracer's numbers, and what holds of any graph because the local model
is linear.
"""

import json
from dataclasses import replace
from xml.etree import ElementTree

import pytest
import torch
from architectures import random_model, random_task, weight as model_weight
from attribution_case import RUNS, Run, case_model, case_tokens, case_transcoders
from random_transcoders import KINDS, WITH_MLPS, model_of, random_transcoders
from safetensors import safe_open
from safetensors.torch import save_file

import circuits
from circuits.attribution.active_features import active_features, gather_sources
from circuits.attribution.build import Direction
from circuits.attribution.edge_weights import LinearSweep, feature_targets
from circuits.attribution.feature_graph import ERROR, FEATURE, FeatureGraph, LogitTarget
from circuits.attribution.influence import (
    completeness_score,
    node_influence,
    prune,
    pruned,
    replacement_score,
)
from circuits.attribution.interventions import Intervention, direct_effects
from circuits.attribution.local_model import freeze
from circuits.attribution.pooling import effects
from circuits.graph.nodes import at_position
from circuits.models import run_to_residual, weights_of

PROMPT = [3, 14, 15, 9, 26, 5, 35, 8]


@pytest.fixture(scope="module", params=RUNS, ids=lambda run: f"{run[0]}-{run[1]}")
def published(request) -> tuple[Run, FeatureGraph]:
    run = Run(*request.param)
    budget, at_a_time = run.budget
    method = circuits.AttributionGraph(
        case_transcoders(run.case, run.kind), budget=budget, at_a_time=at_a_time
    )
    return run, method.attribute(case_model(run.case), case_tokens(run.case))


def test_features_logits_and_adjacency_are_circuit_tracers(published):
    run, graph = published
    features = graph.nodes[graph.is_kind(FEATURE)]
    chosen = run.expected("selected_features").long()
    assert torch.equal(
        torch.stack([features.layer, features.position, features.index], 1),
        run.expected("active_features")[chosen].long(),
    )
    torch.testing.assert_close(
        features.activation, run.expected("activation_values")[chosen], rtol=0, atol=1e-5
    )
    assert [target.token for target in graph.targets] == run.expected("logit_tokens").tolist()
    torch.testing.assert_close(
        graph.nodes.probability[-len(graph.targets) :],
        run.expected("logit_probs"),
        rtol=0,
        atol=1e-6,
    )
    torch.testing.assert_close(graph.adjacency(), run.adjacency(), rtol=0, atol=1e-5)


def test_influence_masks_and_scores_are_circuit_tracers(published):
    run, graph = published
    torch.testing.assert_close(
        node_influence(graph).float(), run.expected("node_influence"), rtol=0, atol=1e-6
    )
    kept = prune(graph)
    assert torch.equal(kept.nodes, run.expected("node_mask").bool())
    if run.name.endswith("full"):
        assert int(kept.edges.sum()) == run.settings["kept_edges"]
    else:
        edges = torch.zeros(len(graph.nodes), len(graph.nodes), dtype=torch.bool)
        edges[graph.target[kept.edges], graph.source[kept.edges]] = True
        assert torch.equal(edges, run.expected("edge_mask").bool())
    if "replacement_score" in run.settings:
        assert replacement_score(graph) == pytest.approx(
            run.settings["replacement_score"], abs=1e-4
        )
        assert completeness_score(graph) == pytest.approx(
            run.settings["completeness_score"], abs=1e-4
        )


def preactivations(model, transcoders, graph: FeatureGraph) -> torch.Tensor:
    """Of the graph's features, from what they read when the model runs; and each target's logit
    less the mean.
    """
    (local,) = freeze(model, transcoders, [graph.tokens])
    pre = [
        transcoders.preactivations(layer, frozen.feature_input)
        for layer, frozen in enumerate(local.layers)
    ]
    of_features = [
        pre[layer][position, index]
        for layer, position, index in zip(
            graph.nodes.layer.tolist(),
            graph.nodes.position.tolist(),
            graph.nodes.index.tolist(),
            strict=True,
        )
        if 0 <= layer < len(pre)
    ]
    # Before a soft cap on the logits.
    logits = logits_of(model, local_residual(model, graph))[-1]
    return torch.stack(of_features[: int(graph.is_kind(FEATURE).sum())]), torch.stack(
        [logits[t.token] - logits.mean() for t in graph.targets]
    )


def logits_of(model, residual: torch.Tensor) -> torch.Tensor:
    last = weights_of(model).unembedding()
    return last.norm(residual) @ last.weight + last.bias


def local_residual(model, graph: FeatureGraph) -> torch.Tensor:
    tokens = graph.tokens[None]
    return run_to_residual(model, tokens, torch.ones_like(tokens).bool())[0]


@pytest.mark.usefixtures("unchecked_types")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("architecture", WITH_MLPS)
@torch.no_grad()
def test_the_edges_into_a_node_and_its_constants_sum_to_its_preactivation(architecture, kind):
    model = model_of(architecture, n_layers=3)
    transcoders = random_transcoders(model, kind)
    graph = circuits.AttributionGraph(transcoders).attribute(model, PROMPT)
    sums = torch.zeros(len(graph.nodes)).index_add_(
        0, graph.target, graph.weight
    ) + graph.constants.sum(1)
    features, targets = preactivations(model, transcoders, graph)
    assert len(features) > 50
    for found, expected in ((sums[: len(features)], features), (sums[-len(targets) :], targets)):
        assert float(((found - expected).abs() / expected.abs().clamp(min=1.0)).max()) < 1e-4


@pytest.mark.parametrize("reads", ["residual", "normalized", "mlp_input"])
@torch.no_grad()
def test_it_holds_wherever_features_read_and_however_they_fire(reads):
    for architecture, activation in (("gpt2", "relu"), ("llama", "topk"), ("gemma2", "batch_topk")):
        model = model_of(architecture, n_layers=3)
        transcoders = random_transcoders(model, "skip-plt", activation=activation, reads=reads)
        graph = circuits.AttributionGraph(transcoders).attribute(model, PROMPT)
        sums = torch.zeros(len(graph.nodes)).index_add_(
            0, graph.target, graph.weight
        ) + graph.constants.sum(1)
        features, _ = preactivations(model, transcoders, graph)
        assert (
            float(((sums[: len(features)] - features).abs() / features.abs().clamp(min=1.0)).max())
            < 1e-4
        )


@torch.no_grad()
def test_edges_out_of_a_budget_are_a_constant_of_what_they_lead_to():
    model = model_of("gpt2", n_layers=3)
    transcoders = random_transcoders(model)
    whole = circuits.AttributionGraph(transcoders).attribute(model, PROMPT)
    some = circuits.AttributionGraph(transcoders, budget=30, at_a_time=7).attribute(model, PROMPT)
    assert int(some.is_kind(FEATURE).sum()) == 30
    sums = torch.zeros(len(some.nodes)).index_add_(
        0, some.target, some.weight
    ) + some.constants.sum(1)
    everything = torch.zeros(len(whole.nodes)).index_add_(
        0, whole.target, whole.weight
    ) + whole.constants.sum(1)
    for number in range(30):
        assert float(sums[number]) == pytest.approx(
            float(everything[whole.find(some.node(number))]), rel=1e-4, abs=1e-4
        )
    names = {str(some.node(number)) for number in range(len(some.nodes))}
    for edge in range(0, len(some), 17):
        source, target = (
            str(some.node(int(some.source[edge]))),
            str(some.node(int(some.target[edge]))),
        )
        same = (whole.source == whole.find(source)) & (whole.target == whole.find(target))
        assert float(whole.weight[same]) == pytest.approx(float(some.weight[edge]), abs=1e-5)
    assert len(names) == len(some.nodes)


@torch.no_grad()
def test_a_budget_of_all_features_is_no_budget_and_blocks_do_not_matter():
    model = model_of("llama", n_layers=3)
    transcoders = random_transcoders(model, "clt")
    whole = circuits.AttributionGraph(transcoders).attribute(model, PROMPT)
    n = int(whole.is_kind(FEATURE).sum())
    for method in (
        circuits.AttributionGraph(transcoders, budget=n + 5),
        circuits.AttributionGraph(transcoders, max_memory=1),
    ):
        torch.testing.assert_close(
            method.attribute(model, PROMPT).adjacency(), whole.adjacency(), rtol=1e-5, atol=1e-5
        )


@torch.no_grad()
@pytest.mark.parametrize("kind", ["skip-plt", "clt"])
def test_the_direct_part_is_what_is_left_where_attention_writes_nothing(kind):
    """W_O = 0 with the same active features would change them; so the attention of the frozen model
    is cut instead.
    """
    model = model_of("gpt2", n_layers=3)
    transcoders = random_transcoders(model, kind)
    graph = circuits.AttributionGraph(transcoders).attribute(model, PROMPT)
    (local,) = freeze(model, transcoders, [torch.tensor(PROMPT)])
    for layer in local.layers:
        layer.mixing.zero_()
    (features,) = active_features([local], transcoders)
    rows = LinearSweep(local, gather_sources(local, transcoders, features)).rows(
        feature_targets(local, transcoders, features)
    )
    n = len(features)
    dense = torch.zeros(len(graph.nodes), len(graph.nodes))
    dense[graph.target, graph.source] = graph.direct
    torch.testing.assert_close(dense[:n, :n], rows.features, rtol=0, atol=1e-5)
    torch.testing.assert_close(
        dense[:n, n : n + rows.errors[0].numel()], rows.errors.flatten(1), rtol=0, atol=1e-5
    )
    assert 0 < int((dense[:n] != 0).sum()) < int((graph.adjacency()[:n] != 0).sum())


@torch.no_grad()
@pytest.mark.parametrize("kind", ["skip-plt", "clt"])
@pytest.mark.parametrize("prompt", [PROMPT, [3, 14]], ids=["prompt", "two tokens"])
def test_reading_all_positions_in_one_call_as_on_a_gpu_changes_nothing(kind, prompt, monkeypatch):
    model = model_of("gpt2", n_layers=3)
    method = circuits.AttributionGraph(random_transcoders(model, kind))
    expected = method.attribute(model, prompt)
    monkeypatch.setattr("circuits.attribution.edge_weights.PADDED_ON", {"cpu"})
    found = method.attribute(model, prompt)
    assert torch.equal(found.source, expected.source) and torch.equal(found.target, expected.target)
    torch.testing.assert_close(found.weight, expected.weight, rtol=0, atol=1e-5)
    torch.testing.assert_close(found.direct, expected.direct, rtol=0, atol=1e-5)
    torch.testing.assert_close(found.constants, expected.constants, rtol=0, atol=1e-5)


@torch.no_grad()
def test_prompts_of_different_lengths_run_together_give_what_each_gives_alone():
    model = model_of("gpt2")
    method = circuits.AttributionGraph(random_transcoders(model, "clt"))
    prompts = [PROMPT, PROMPT[:5], PROMPT[3:]]
    for together, prompt in zip(method.attribute_all(model, prompts), prompts, strict=True):
        alone = method.attribute(model, prompt)
        assert together.tokens.tolist() == prompt
        torch.testing.assert_close(together.adjacency(), alone.adjacency(), rtol=0, atol=1e-5)


@torch.no_grad()
def test_a_graph_explains_given_tokens_differences_and_directions():
    model = model_of("gpt2")
    method = circuits.AttributionGraph(random_transcoders(model))
    one, other = (method.attribute(model, PROMPT, explain=[token]) for token in (7, 21))
    both = method.attribute(model, PROMPT, explain=[(7, 21)])
    rows = [graph.adjacency()[-1, :-1] for graph in (one, other, both)]
    torch.testing.assert_close(rows[0] - rows[1], rows[2], rtol=0, atol=1e-5)
    assert (str(one.node(len(one.nodes) - 1)), both.targets[0].label) == ("logits:7@7", "#7 - #21")
    direction = circuits.Direction(
        "mine",
        model_weight(model, "unembed.W_U")[:, 7] - model_weight(model, "unembed.W_U")[:, 21],
        position=4,
    )
    earlier = method.attribute(model, PROMPT, explain=[direction])
    assert (
        int(earlier.nodes.position[earlier.source[earlier.target == len(earlier.nodes) - 1]].max())
        <= 4
    )


@torch.no_grad()
def test_directions_at_several_positions_keep_their_rows_and_constants_in_any_order():
    model = model_of("gpt2")
    method = circuits.AttributionGraph(random_transcoders(model, "skip-plt"))
    unembedding = model_weight(model, "unembed.W_U")
    directions = [
        circuits.Direction(f"at {position}", unembedding[:, token], position=position)
        for position, token in ((5, 7), (3, 21), (7, 2))
    ]
    graph = method.attribute(model, PROMPT, explain=directions)
    assert bool((graph.target.diff() >= 0).all())
    normed = weights_of(model).unembedding().norm(local_residual(model, graph))
    sums = torch.zeros(len(graph.nodes)).index_add_(
        0, graph.target, graph.weight
    ) + graph.constants.sum(1)
    expected = torch.stack([normed[one.position] @ one.vector for one in directions])
    torch.testing.assert_close(sums[-3:], expected, rtol=1e-4, atol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("leading", [0, 3])
def test_as_many_leading_positions_as_asked_have_no_features_and_all_else_adds_up(leading):
    model = model_of("gpt2", n_layers=3)
    transcoders = random_transcoders(model, "skip-plt")
    graph = circuits.AttributionGraph(transcoders, leading=leading).attribute(model, PROMPT)
    assert int(graph.nodes.position[graph.is_kind(FEATURE)].min()) == leading
    from_errors = graph.is_kind(ERROR)[graph.source]
    assert int(graph.nodes.position[graph.source[from_errors]].min()) == leading
    sums = torch.zeros(len(graph.nodes)).index_add_(
        0, graph.target, graph.weight
    ) + graph.constants.sum(1)
    features, _ = preactivations(model, transcoders, graph)
    assert (
        float(((sums[: len(features)] - features).abs() / features.abs().clamp(min=1.0)).max())
        < 1e-4
    )
    between = graph.is_kind(FEATURE)[graph.source] & graph.is_kind(FEATURE)[graph.target]
    edge = int((graph.weight.abs() * between).argmax())
    source, target = (graph.node(int(column[edge])) for column in (graph.source, graph.target))
    run = direct_effects(
        model, transcoders, PROMPT, [[], [Intervention.scale(source, 2.0)]], leading=leading
    )
    before, after = run.preactivations[target.layer][:, target.position, target.index].tolist()
    assert after - before == pytest.approx(float(graph.weight[edge]), rel=1e-3)


def test_what_would_give_a_wrong_graph_is_refused(unchecked_types):
    model = model_of("gpt2")
    transcoders = random_transcoders(model, "plt")
    nans = replace(transcoders, decoders=[decoder * torch.nan for decoder in transcoders.decoders])
    method, vector = circuits.AttributionGraph(transcoders), torch.ones(model.cfg.d_model)
    for run, message in (
        (
            lambda: circuits.AttributionGraph(nans).attribute(model, PROMPT),
            "edges are not finite.*check the decoders",
        ),
        (
            lambda: circuits.AttributionGraph(replace(transcoders, reads="resid")).attribute(
                model, PROMPT
            ),
            "reads='resid': choose",
        ),
        (
            lambda: circuits.AttributionGraph(replace(transcoders, writes="resid")).attribute(
                model, PROMPT
            ),
            "writes='resid': choose",
        ),
        (lambda: method.attribute(model, torch.tensor([PROMPT, PROMPT])), "are no prompt"),
        (
            lambda: method.attribute_all(model, "some text"),
            "must be a list; for one, give",
        ),
        (
            lambda: method.attribute_all(model, PROMPT),
            "3 is no prompt, .*give a list of prompts",
        ),
        *(
            (
                lambda weight=weight: method.attribute(
                    model, PROMPT, explain=[Direction("x", vector, weight=weight)]
                ),
                "the weight above 0",
            )
            for weight in (0.0, -1.0, torch.nan, torch.inf)
        ),
        (
            lambda: method.attribute(model, PROMPT, explain=[Direction("x", [1.0] * 16)]),
            "give a tensor of",
        ),
        (
            lambda: circuits.AttributionGraph(transcoders, budget=2.5),
            "budget=2.5: give a whole number",
        ),
        (lambda: circuits.AttributionGraph(transcoders, node_threshold="a"), "node_threshold='a'"),
        (lambda: circuits.AttributionGraph(None), "transcoders=None"),
    ):
        with pytest.raises(circuits.InputError, match=message):
            run()
    graph = method.attribute(model, torch.tensor([PROMPT]))
    assert torch.equal(graph.adjacency(), method.attribute(model, PROMPT).adjacency())
    with pytest.raises(circuits.InputError, match=r"no node f9\.1@7; it has .*, such as .*logits:"):
        graph.find("f9.1@7")


@torch.no_grad()
@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_precisions_give_graphs_and_pages_too(dtype, architecture):
    model = random_model(architecture, dtype=dtype)
    transcoders = random_transcoders(model, "clt")
    graph = circuits.AttributionGraph(transcoders).attribute(model, PROMPT)
    assert graph.weight.dtype == graph.direct.dtype == torch.promote_types(dtype, torch.float32)
    assert len(graph.incoming(graph.node(len(graph.nodes) - 1), 5)) == 5
    assert (
        int(
            circuits.AttributionGraph(transcoders, budget=20)
            .attribute(model, PROMPT)
            .is_kind(FEATURE)
            .sum()
        )
        == 20
    )
    if dtype == torch.float64:
        narrow = random_model(architecture)
        single = circuits.AttributionGraph(transcoders).attribute(narrow, PROMPT)
        torch.testing.assert_close(graph.weight.float(), single.weight, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("architecture", ["gpt2", "pythia", "gemma"])
def test_hooks_that_only_look_do_not_disturb_a_graph(architecture):
    model, seen = model_of(architecture), []
    method = circuits.AttributionGraph(random_transcoders(model))
    expected = method.attribute(model, PROMPT)
    with model.hooks(fwd_hooks=[("blocks.0.attn.hook_z", lambda z, hook: seen.append(z.shape))]):
        found = method.attribute(model, PROMPT)
    assert seen
    torch.testing.assert_close(found.weight, expected.weight, rtol=0, atol=0)


def test_a_last_norm_of_another_kind_is_taken_as_it_is():
    for kind in ("LN", "RMS"):
        model = model_of("gpt2", normalization_type=kind, final_rms=True)
        transcoders = random_transcoders(model)
        graph = circuits.AttributionGraph(transcoders).attribute(model, PROMPT)
        sums = torch.zeros(len(graph.nodes)).index_add_(
            0, graph.target, graph.weight
        ) + graph.constants.sum(1)
        _, targets = preactivations(model, transcoders, graph)
        torch.testing.assert_close(sums[-len(targets) :], targets, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_pruning_keeps_what_lies_on_paths_and_more_with_higher_thresholds():
    model = model_of("gpt2", n_layers=3)
    graph = circuits.AttributionGraph(random_transcoders(model)).attribute(model, PROMPT)
    sizes = [
        len(pruned(graph, node_threshold=share, edge_threshold=0.98).nodes)
        for share in (0.3, 0.6, 0.9)
    ]
    assert sizes == sorted(sizes) and sizes[0] < sizes[-1]
    small = pruned(graph)
    into, out = (
        torch.bincount(column, minlength=len(small.nodes))
        for column in (small.target, small.source)
    )
    features = small.is_kind(FEATURE)
    assert bool((into[features] > 0).all()) and bool((out[features] > 0).all())
    assert 0 < replacement_score(small) <= 1 and 0 < completeness_score(small) <= 1
    with pytest.raises(circuits.InputError, match=r"node_threshold=1.5: choose the share"):
        prune(graph, node_threshold=1.5)


@torch.no_grad()
def test_a_graph_survives_saving(tmp_path):
    model = model_of("gpt2")
    graph = circuits.AttributionGraph(random_transcoders(model)).attribute(model, PROMPT)
    path = graph.save(tmp_path)
    again = FeatureGraph.load(tmp_path)
    for name, column in vars(graph.nodes).items():
        torch.testing.assert_close(
            getattr(again.nodes, name), column, rtol=0, atol=0, equal_nan=True
        )
    for name in ("source", "target", "weight", "direct", "constants", "tokens"):
        assert torch.equal(getattr(again, name), getattr(graph, name))
    assert (again.words, again.targets, again.model, again.transcoders) == (
        graph.words,
        graph.targets,
        graph.model,
        graph.transcoders,
    )
    assert again.settings == graph.settings and again.settings["leading"] == 1
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])
    with pytest.raises(circuits.InputError, match="truncated"):
        FeatureGraph.load(tmp_path)
    path.write_bytes(content.replace(b'"format_version":"1"', b'"format_version":"9"'))
    with pytest.raises(circuits.InputError, match="format version 9"):
        FeatureGraph.load(tmp_path)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        ({"source": lambda t: t + 10_000}, "an edge's source is outside 0 to"),
        ({"source": lambda t: t.flip(0)}, "not in order"),
        ({"weight": lambda t: t * float("nan")}, "a weight is not finite"),
        ({"weight": lambda t: t[1:]}, "differ in length"),
        ({"nodes.kind": lambda t: t + 4}, "kind is outside 0 to 3"),
        ({"nodes.position": lambda t: t + 100}, "position is outside 0 to 7"),
        ({"nodes.probability": lambda t: t - 1}, "probability is negative or not finite"),
        ({"nodes.index": lambda t: t * 0}, "a node appears twice"),
        ({"constants": lambda t: t[:, 1:]}, "constants are incomplete"),
        ({"n_layers": 10**9}, "it has 1000000000 layers"),
        ({"words": [1] * 8}, "words are incomplete"),
        ({"settings": "[" * 100_000}, "is damaged"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else None,
)
@torch.no_grad()
def test_a_graph_whose_contents_do_not_fit_together_is_refused_in_one_line(
    tmp_path, unchecked_types, damage, message
):
    model = model_of("gpt2")
    path = (
        circuits.AttributionGraph(random_transcoders(model)).attribute(model, PROMPT).save(tmp_path)
    )
    with safe_open(path, "pt") as file:
        tensors, metadata = {name: file.get_tensor(name) for name in file.keys()}, file.metadata()
    description = json.loads(metadata["description"])
    for name, change in damage.items():
        if name in tensors:
            tensors[name] = change(tensors[name]).contiguous()
        else:
            description[name] = change
    text = (
        metadata["description"]
        if isinstance(damage.get("settings"), str)
        else json.dumps(description)
    )
    metadata["description"] = (
        damage["settings"] if isinstance(damage.get("settings"), str) else text
    )
    del metadata["digest"]  # which would tell any change
    save_file(tensors, path, metadata)
    with pytest.raises(circuits.InputError, match=message) as refused:
        FeatureGraph.load(tmp_path)
    assert "\n" not in str(refused.value)


@torch.no_grad()
def test_a_graph_whose_nodes_are_not_in_order_is_refused(tmp_path):
    """Influence visits them layer by layer, so it would be wrong without a word."""
    model = model_of("gpt2")
    graph = circuits.AttributionGraph(random_transcoders(model)).attribute(model, PROMPT)
    swapped = torch.arange(len(graph.nodes))
    swapped[[0, 1]] = torch.tensor([len(graph.nodes) - 2, 0])
    swapped[2:-1] = torch.arange(1, len(graph.nodes) - 2)
    none = graph.subgraph(torch.ones(len(graph.nodes), dtype=torch.bool), graph.weight.isnan())
    replace(none, nodes=graph.nodes[swapped]).save(tmp_path)
    with pytest.raises(circuits.InputError, match="its nodes are not in order"):
        FeatureGraph.load(tmp_path)


def test_transcoders_in_a_folder_that_changes_are_read_anew(tmp_path):
    model = model_of("gpt2")
    method = circuits.AttributionGraph(tmp_path)
    seen = set()
    for seed in (3, 4):
        transcoders = random_transcoders(model, seed=seed)
        circuits.save_transcoders(transcoders, tmp_path)
        graph = method.attribute(model, PROMPT)
        assert graph.transcoders.weights == transcoders.identity.weights
        seen.add(graph.transcoders.weights)
    assert len(seen) == 2


@torch.no_grad()
def test_a_notebook_shows_a_small_table_with_escaped_text():
    model = model_of("gpt2")
    graph = circuits.AttributionGraph(random_transcoders(model)).attribute(model, PROMPT)
    words = ("<bos>", *("a & b" * 9, *graph.words[2:]))
    targets = (LogitTarget("<script>"), *graph.targets[1:])
    html = replace(graph, words=words, targets=targets)._repr_html_()
    assert "<script>" not in html and "<bos>" not in html
    table = {row[0].text: row[1].text for row in ElementTree.fromstring(html).iter("tr")}
    counts = torch.bincount(graph.nodes.kind).tolist()
    assert table["prompt"] == " ".join(words)
    highest = float(graph.nodes.probability.max())
    assert table["top logits"].startswith(f"<script> ({highest:.2f}), ")
    assert table["top logits"].count("(") == min(5, len(targets))
    names = ("features", "errors", "tokens", "targets", "edges")
    assert {name: int(table[name].replace(",", "")) for name in names} == dict(
        zip(names, (*counts, len(graph)), strict=True)
    )


def test_what_cannot_be_explained_is_said_in_one_line(unchecked_types):
    model = model_of("gpt2")
    transcoders = random_transcoders(model)
    method = circuits.AttributionGraph(transcoders)
    for prompt, message in (
        ([], "a prompt is empty"),
        (list(range(17)), "a prompt has 17 tokens"),
        ([1, 99], "a token outside 0 to 49"),
        ([1], "no feature of 'random plt' is active"),
        ("text", "has no tokenizer"),
    ):
        with pytest.raises(circuits.InputError, match=message):
            method.attribute(model, prompt)
    with pytest.raises(
        circuits.InputError, match="for 2 layers of width 24, and custom has 3 of width 24"
    ):
        method.attribute(model_of("gpt2", n_layers=3), PROMPT)
    with pytest.raises(circuits.InputError, match="no MLPs"):
        method.attribute(model_of("attention_only"), PROMPT)
    vector = model_weight(model, "unembed.W_U")[:, 7]
    for explain, message in (
        ([77], "holds 77, which is no token of this model's"),
        ([], "give a list of tokens"),
        (7, r"explain=7 must be a list; for one, give \[7\]"),
        (" Austin", "explain=' Austin' must be a list"),
        (circuits.Direction("mine", vector), "must be a list"),
        ((7, 21), r"may be a pair or two tokens; give \[\(7, 21\)\] .*, or \[7, 21\]"),
        ([[7, 21]], "a pair of tokens is a tuple"),
        ([circuits.Direction(7, vector)], "a text as a Direction's label"),
        ([circuits.Direction("mine", vector, token=50)], "which is no token of this model's"),
        ([None], "holds None, which is no token"),
        ([(7,)], "a pair is"),
        ([7, 7], "explain holds 7 twice"),
        (
            [circuits.Direction("mine", vector[:5])],
            r"a vector of shape \(5,\); it must be 24 finite numbers",
        ),
        ([circuits.Direction("mine", vector * float("nan"))], "24 finite numbers"),
        ([circuits.Direction("mine", vector * 0)], "not all zero"),
        ([circuits.Direction("mine", vector, position=8)], "at position 8 of a prompt of 8 tokens"),
        ([circuits.Direction("7", vector)], "cannot be called '7'"),
        ([circuits.Direction("a@b", vector)], "cannot be called 'a@b'"),
    ):
        with pytest.raises(circuits.InputError, match=message):
            method.attribute(model, PROMPT, explain=explain)
    for settings in ({"budget": 0}, {"probability": 0.0}, {"node_threshold": 1.2}, {"leading": -1}):
        with pytest.raises(circuits.InputError, match=next(iter(settings))):
            circuits.AttributionGraph(transcoders, **settings)
    overflowing = random_transcoders(model)
    overflowing.encoders[1].weight[3] = float("inf")
    with pytest.raises(
        circuits.InputError,
        match="features of 'random plt' have pre-activations that are not finite",
    ):
        circuits.AttributionGraph(overflowing).attribute(model, PROMPT)
    misshapen = replace(
        transcoders, decoders=[decoder[:, :, :5] for decoder in transcoders.decoders]
    )
    with pytest.raises(
        circuits.InputError,
        match=r"layer 0: the decoder has shape \(40, 1, 5\).*it must be \(40, 1, 24\)",
    ):
        circuits.AttributionGraph(misshapen).attribute(model, PROMPT)
    broken = model_of("gpt2")
    model_weight(broken, "blocks.1.mlp.W_out")[0, 0] = float("nan")
    with pytest.raises(circuits.InputError, match="not finite"):
        method.attribute(broken, PROMPT)


@torch.no_grad()
def test_the_graphs_of_a_task_become_one_circuit_scored_by_predicted_damage():
    """Scores are those of each prompt's graph of what it is judged by, where it is judged, summed
    and divided by the scored rows.
    """
    model, task = model_of("gpt2"), random_task(ragged=True, several=True)
    method = circuits.AttributionGraph(random_transcoders(model))
    circuit = method.discover(model, task)
    assert circuit.selected and 0 < len(circuit) < len(circuit.graph)
    assert (
        str(circuit.graph.nodes[-1]) == "logits:answer"
        and circuit.graph.transcoders.name == "random plt"
    )
    expected, keeping = {}, {}
    for prompt in range(len(task)):
        right, wrong = (
            model_weight(model, "unembed.W_U")[:, part[prompt]].mean(1)
            for part in (task.answers, task.wrong_answers)
        )
        positions = task.scored[prompt].nonzero().flatten().tolist()
        directions = [
            circuits.Direction(f"answer {p}", right - wrong, position=p) for p in positions
        ]
        graph = method.attribute(
            model, task.clean[prompt, : int(task.lengths[prompt])], explain=directions
        )
        kept, here = prune(graph).edges, set()
        for number, score in enumerate(effects(graph)[1].tolist()):
            ends = [
                at_position(graph.node(int(column[number])), None)
                for column in (graph.source, graph.target)
            ]
            name = "->".join(
                "logits:answer" if isinstance(end, circuits.Logits) else str(end) for end in ends
            )
            expected[name] = expected.get(name, 0.0) + score / int(task.scored.sum())
            here |= {name} if kept[number] else set()
        keeping = {name: keeping.get(name, 0) + (name in here) for name in keeping.keys() | here}
    found = dict(zip(map(str, circuit.graph.edges), circuit.scores.tolist(), strict=True))
    assert found.keys() == expected.keys()
    assert max(abs(found[name] - expected[name]) for name in found) < 1e-5
    assert {
        str(edge): n
        for edge, n in zip(circuit.edges, circuit.record["kept_by_prompts"], strict=True)
    } == {k: n for k, n in keeping.items() if n}


def test_a_search_over_many_prompts_is_resumed_where_it_stopped(tmp_path):
    model, task, path = (
        model_of("gpt2", n_layers=1),
        random_task(batch=40, length=5),
        tmp_path / "checkpoint.safetensors",
    )
    method = circuits.AttributionGraph(random_transcoders(model, features=10))
    seen = []

    def stop(done: int, total: int) -> None:
        seen.append(done)
        if 0 < done < 40:
            raise KeyboardInterrupt

    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            method.discover(model, task, checkpoint=path, progress=stop)
    assert method.discover(model, task, checkpoint=path, progress=stop) == method.discover(
        model, task
    )
    assert seen == [0, 16, 32, 40]


def test_only_what_pruning_keeps_can_be_pooled():
    model, task = model_of("gpt2"), random_task()
    transcoders = random_transcoders(model)
    whole, small = (
        circuits.AttributionGraph(transcoders, kept_only=kept).discover(model, task)
        for kept in (False, True)
    )
    assert [str(edge) for edge in small.edges] == [str(edge) for edge in whole.edges] and len(
        small
    ) == len(small.graph)
    assert whole.graph.transcoders.whole and not small.graph.transcoders.whole
