"""EAP, EAP-IG and exact patching against EAP-IG's package, compiled models, finite differences and
each other.
"""

from functools import partial
from itertools import product

import numpy as np
import pytest
import torch
from architectures import ARCHITECTURES, random_model, random_task
from finite_differences import differentiated_by_hand
from published import COMPILED, case, case_model, our_edge, scored_everywhere_task

import circuits
from circuits.discovery.gradients.edge_scores import EdgeScoring, GradientPoint
from circuits.discovery.methods.eap import EAP, EAPIG, _sub_layers as sub_layers
from circuits.models.component_graph import component_nodes
from circuits.models.source_outputs import source_outputs
from circuits.running.ablation import Counterfactuals, get_ablation
from circuits.running.settings import RunSettings
from circuits.runs.circuit_run import counting_passes
from circuits.tasks.metrics import METRICS

PUBLISHED = case("eap_case/case")
PROMPTS = len(PUBLISHED["clean"])


@pytest.fixture(scope="module")
def published_case():
    model = case_model(PUBLISHED["config"], "eap_case/model")
    labels = torch.tensor(PUBLISHED["labels"])
    task = circuits.Task.from_tokens(
        torch.tensor(PUBLISHED["clean"]),
        torch.tensor(PUBLISHED["corrupt"]),
        labels[:, 0],
        labels[:, 1],
    )
    return model, task, circuits.component_graph(model, split_embed=True)


def assert_scores_are_published(scores, graph, name: str) -> None:
    """Their scores are divided by the number of prompts once more than ours, those of exact
    patching are not.
    """
    scale = 1 if name == "exact" else PROMPTS
    theirs = {
        our_edge(source, target): score * scale
        for source, target, score in PUBLISHED["scores"][name]
    }
    ours = dict(zip(map(str, graph.edges), scores.tolist(), strict=True))
    assert set(theirs) == {edge for edge in ours if not edge.startswith("pos_embed")}
    largest = max(map(abs, theirs.values()))
    assert max(abs(ours[edge] - score) for edge, score in theirs.items()) <= 1e-5 * largest


@pytest.mark.parametrize(
    ("method", "name"),
    [
        (EAP(), "EAP"),
        (EAP(ablation="zero"), "EAP-zero"),
        (EAP(gradient_at="both"), "clean-corrupted"),
        (EAPIG(quadrature="left"), "EAP-IG-inputs"),
        (EAPIG(quadrature="left", metric="kl"), "EAP-IG-inputs-KL"),
        (circuits.ActivationPatching(), "exact"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_scores_are_those_of_the_eap_ig_package_on_every_edge(published_case, method, name):
    model, task, graph = published_case
    assert_scores_are_published(method.discover(model, task, graph=graph).scores, graph, name)


def test_activation_lines_are_those_of_the_eap_ig_package_at_its_points(published_case):
    """There, points along activations are k/m, k = 1..m: the other end than along inputs."""
    model, task, graph = published_case
    lines = sub_layers(component_nodes(model, split_embed=True))
    points = [GradientPoint(step / 5, line) for line in lines for step in range(1, 6)]
    settings = RunSettings.parse(task, metric="logit_difference")
    scoring = EdgeScoring(model, graph, task, settings, points, details=True)
    scores = scoring.attribution().edges
    assert_scores_are_published(scores, graph, "EAP-IG-activations")


@pytest.mark.parametrize("mode", ["resample", "resample_pad", "zero"])
@pytest.mark.parametrize("name", COMPILED)
def test_exact_patching_gives_the_effect_tables_of_compiled_programs(name, mode):
    content = case(f"tracr/{name}")
    model, task = (
        case_model(content["config"], f"tracr/{name}"),
        scored_everywhere_task(content, mode),
    )
    graph = circuits.component_graph(model, split_embed=True)
    method = circuits.ActivationPatching(
        metric="squared_error", ablation="zero" if mode == "zero" else "resample"
    )
    scores = dict(
        zip(
            map(str, graph.edges),
            method.discover(model, task, graph=graph).scores.tolist(),
            strict=True,
        )
    )
    column = content["edge_table"]["columns"].index(f"{mode}_l2")
    table = {our_edge(*row[:2]): row[column] for row in content["edge_table"]["rows"]}
    assert set(table) == set(scores)
    for edge, effect in table.items():
        # The tables hold four decimals.
        assert scores[edge] == pytest.approx(effect, abs=1e-4 * abs(effect) + 5e-5), edge


@pytest.mark.usefixtures("unchecked_types")
@pytest.mark.parametrize(
    "architecture", [name for name in ARCHITECTURES if name != "bidirectional"]
)
def test_eap_is_the_derivative_of_the_damage_with_respect_to_ablating_an_edge(architecture):
    model, task = (
        random_model(architecture, dtype=torch.float64, n_layers=2),
        random_task(several=True),
    )
    graph = circuits.component_graph(model)
    expected = differentiated_by_hand(model, graph, task, "logit_difference")
    scores = EAP().discover(model, task, graph=graph).scores
    torch.testing.assert_close(
        scores, expected.float(), atol=2e-6 * float(expected.abs().max()), rtol=1e-4
    )


def test_a_nodes_score_is_the_sum_of_its_edges_scores():
    model, task = random_model("gpt2"), random_task(several=True)
    attribution = EAP().attribute(model, task)
    of_node = attribution.node_scores()
    sums: dict[circuits.graph.nodes.Node, float] = {}
    for edge, score in zip(attribution.graph.edges, attribution.edges.tolist(), strict=True):
        sums[edge.source] = sums.get(edge.source, 0.0) + score
    assert of_node == pytest.approx(sums, abs=1e-5)
    # The same number by another way: the change of the node's output times the gradient there.
    by_position = torch.tensordot(
        attribution.rows / attribution.rows.sum(), attribution.sources_by_position, dims=1
    ).sum(-1)
    for node, score, neurons in zip(
        attribution.nodes, by_position.tolist(), attribution.neurons.sum(-1).tolist(), strict=True
    ):
        assert of_node[node] == pytest.approx(score, abs=1e-5)
        assert of_node[node] == pytest.approx(neurons, abs=1e-5)
    assert attribution.heads()[1, 2] == pytest.approx(of_node[circuits.Head(1, 2)], abs=1e-5)
    assert attribution.layers()[0, 1] == pytest.approx(of_node[circuits.MLP(0)], abs=1e-5)


@pytest.mark.usefixtures("unchecked_types")
@pytest.mark.parametrize(
    "method", [EAP(), EAPIG(), EAPIG(along="activations", steps=2), EAP(ablation="mean")], ids=repr
)
def test_scores_depend_neither_on_the_batch_size_nor_on_the_order_of_prompts(method, monkeypatch):
    model, task = random_model("llama"), random_task(ragged=True, several=True)
    together = method.attribute(model, task)
    order = torch.tensor([3, 1, 5, 0, 2, 4])
    shuffled = method.attribute(model, task[order])
    torch.testing.assert_close(shuffled.edges, together.edges, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(
        shuffled.edges_by_prompt, together.edges_by_prompt[order], atol=1e-5, rtol=1e-4
    )
    doubled = method.attribute(model, task[torch.cat([order, order])])
    torch.testing.assert_close(doubled.edges, together.edges, atol=1e-5, rtol=1e-4)
    monkeypatch.setattr(
        "circuits.discovery.gradients.edge_scores.memory_budget", lambda *_, **__: 1
    )
    one_by_one = method.attribute(model, task)
    torch.testing.assert_close(one_by_one.edges, together.edges, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(one_by_one.neurons, together.neurons, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("architecture", ["gpt2", "bidirectional"])
def test_scores_of_an_edge_split_by_position_sum_to_its_score(architecture):
    model, task = random_model(architecture), random_task(ragged=True)
    plain = EAP().discover(model, task)
    split = EAP().discover(model, task, graph=circuits.component_graph(model, positions=8))
    sums = dict.fromkeys(map(str, plain.graph.edges), 0.0)
    for edge, score in zip(split.graph.edges, split.scores.tolist(), strict=True):
        sums["->".join(part.split("@")[0] for part in str(edge).split("->"))] += score
    torch.testing.assert_close(
        torch.tensor(list(sums.values())), plain.scores, atol=1e-5, rtol=1e-4
    )


def test_midpoint_integration_adds_up_to_the_whole_effect_of_the_embedding():
    """Completeness of integrated gradients: the embedding's edges sum to damage(corrupted) -
    damage(clean).
    """
    model, task = random_model("gpt2", dtype=torch.float64), random_task()
    scores = EAPIG(steps=50).attribute(model, task)
    metric, whole = METRICS["logit_difference"], circuits.model_logits(model, task)
    ends = [
        float(metric.damage(circuits.model_logits(model, task, prompts), whole, task).mean())
        for prompts in ("clean", "corrupted")
    ]
    # Only the direct paths from the embedding see the whole change of their own source: compare
    # through the embedding's total gradient.
    embed = float(
        torch.tensordot(
            scores.rows / scores.rows.sum(), scores.sources_by_position[:, 0].sum(-1), dims=1
        )
    )
    assert embed == pytest.approx(ends[1] - ends[0], rel=1e-2)


def test_a_bootstrap_over_prompts_runs_no_model():
    model, task = random_model("gpt2"), random_task(several=True)
    attribution = EAP().attribute(model, task)
    with counting_passes(model) as passes:
        samples = attribution.bootstrap(500, seed=1)
    assert passes["forward_passes"] == 0
    assert torch.equal(samples, attribution.bootstrap(500, seed=1))
    spread = samples.std(0)
    assert ((samples.mean(0) - attribution.edges).abs() < 0.3 * spread + 1e-3).float().mean() > 0.95


@pytest.mark.parametrize("metric", ["kl", "squared_error"])
def test_a_metric_whose_gradient_vanishes_at_the_clean_run_is_refused_there(metric):
    model, task = random_model("gpt2"), random_task()
    with pytest.raises(circuits.InputError, match=r"vanishes.*gradient_at='corrupted'.*EAPIG"):
        EAP(metric=metric).discover(model, task)
    for method in (
        EAP(metric=metric, gradient_at="corrupted"),
        EAP(metric=metric, gradient_at="both"),
        EAPIG(metric=metric),
    ):
        assert method.discover(model, task).scores.abs().max() > 1e-3


def test_whether_a_gradient_vanishes_does_not_depend_on_the_batch_size(monkeypatch):
    """A prompt that is not corrupted has no gradient of KL anywhere; the others of its task
    have.
    """
    model, task = random_model("gpt2"), random_task()
    task.corrupted[0] = task.clean[0]
    together = EAP(metric="kl", gradient_at="corrupted").discover(model, task).scores
    monkeypatch.setattr(
        "circuits.discovery.gradients.edge_scores.memory_budget", lambda *_, **__: 1
    )
    torch.testing.assert_close(
        EAP(metric="kl", gradient_at="corrupted").discover(model, task).scores,
        together,
        atol=1e-6,
        rtol=1e-4,
    )
    with pytest.raises(circuits.InputError, match="vanishes"):
        EAP(metric="kl").discover(model, task)


def test_gradients_at_zero_embeddings_are_taken_with_a_warning():
    model, task = random_model("gpt2"), random_task()
    for method in (
        EAP(ablation="zero", gradient_at="corrupted"),
        EAPIG(ablation="zero", quadrature="left"),
    ):
        with pytest.warns(UserWarning, match="gradients are taken at zero embeddings"):
            method.discover(model, task)
    EAPIG(ablation="zero").discover(model, task)
    EAP(ablation="zero", gradient_at="both").discover(random_model("no_norms"), task)


@pytest.mark.parametrize(
    "ablation",
    [
        "zero",
        "mean",
        "mean_by_position",
        "noise",
        circuits.Ablation("mean_by_position", over=random_task(length=9, seed=5)),
    ],
    ids=str,
)
def test_eap_predicts_small_changes_under_every_ablation(ablation):
    """Mixed in by a thousandth, the ablated outputs do a thousandth of the predicted damage."""
    model, task = random_model("gpt2", dtype=torch.float64), random_task(ragged=True)
    graph = circuits.component_graph(model)
    scores = EAP(ablation=ablation).discover(model, task, graph=graph).scores
    nodes = component_nodes(model, split_embed=False)
    clean = source_outputs(model, nodes, task.clean, task.mask)
    replaced = Counterfactuals.prepare(model, nodes, task, get_ablation(ablation)).on(task)
    mixed = circuits.Ablation(
        "given",
        outputs={node: torch.lerp(clean[i], replaced[i], 1e-3) for i, node in enumerate(nodes)},
    )
    exact = circuits.ActivationPatching(ablation=mixed).discover(model, task, graph=graph).scores
    torch.testing.assert_close(1e-3 * scores, exact, atol=2e-6, rtol=2e-2)


def test_a_metric_without_a_gradient_is_refused():
    model, task = random_model("gpt2"), random_task()
    with pytest.raises(circuits.InputError, match=r"'accuracy' has no gradient"):
        EAP(metric="accuracy").discover(model, task)


class TestExactPatchingOfHeadsLayersAndPositions:
    """Against hooks of TransformerLens that put in what the corrupted run writes."""

    @pytest.fixture(params=["gpt2", "pythia", "llama"])
    def model(self, request):
        return random_model(request.param)

    @staticmethod
    def damage(model, task, name, where):
        """Of corrupted values at `where` of one activation: the mean over prompts."""
        corrupted = model.run_with_cache(task.corrupted)[1][name]

        def patch(value, hook):
            value = value.clone()
            value[where] = corrupted[where]
            return value

        found = []
        with torch.no_grad():
            patched = model.run_with_hooks(task.clean, fwd_hooks=[(name, patch)])
            for logits in (model(task.clean), patched):
                last = logits[torch.arange(len(task)), task.lengths - 1]
                right = last.gather(1, task.answers).mean(1)
                found.append(right - last.gather(1, task.wrong_answers)[:, 0])
        return float((found[0] - found[1]).mean())

    def test_heads_and_layers(self, model):
        task = random_task(ragged=True)
        method = circuits.ActivationPatching()
        damage = partial(self.damage, model, task)
        every = slice(None)
        heads = [
            [damage(f"blocks.{i}.attn.hook_z", (every, every, head)) for head in range(4)]
            for i in range(2)
        ]
        layers = [
            [damage(f"blocks.{i}.{name}", every) for name in ("hook_attn_out", "hook_mlp_out")]
            for i in range(2)
        ]
        found = method.heads(model, task)
        torch.testing.assert_close(found, torch.tensor(heads), atol=2e-5, rtol=0)
        torch.testing.assert_close(
            method.layers(model, task), torch.tensor(layers), atol=2e-5, rtol=0
        )
        details = EAP().attribute(model, task)
        assert details.heads().shape == found.shape
        assert details.layers().shape == method.layers(model, task).shape
        nodes = method.node_scores(model, task)
        for (layer, head), score in np.ndenumerate(found.numpy()):
            assert nodes[circuits.Head(layer, head)] == pytest.approx(score, abs=1e-6)
        by_position = circuits.component_graph(model, positions=8)
        torch.testing.assert_close(
            method.heads(model, task, graph=by_position), found, atol=2e-5, rtol=0
        )

    @pytest.mark.parametrize(
        ("of", "name"),
        [("residual", "hook_resid_pre"), ("heads", "hook_attn_out"), ("mlp", "hook_mlp_out")],
    )
    def test_every_position_of_every_layer(self, model, of, name):
        task = random_task(batch=3, length=6)
        table = circuits.ActivationPatching().by_position(model, task, of)
        assert table.shape == (6, 2) and table.index.name == "position"
        for position, layer in product(range(6), range(2)):
            expected = self.damage(
                model, task, f"blocks.{layer}.{name}", (slice(None), slice(position, position + 1))
            )
            assert table.loc[position, layer] == pytest.approx(expected, abs=2e-5)


def test_a_table_by_position_has_a_row_for_each_span(toy_world):
    task = circuits.load_task("ioi", toy_world, n=3)
    graph = circuits.component_graph(toy_world, positions=["S1", "S2", "END"])
    method = circuits.ActivationPatching()
    table = method.by_position(toy_world, task, "mlp", graph=graph)
    nodes = method.node_scores(toy_world, task, graph=graph)
    assert list(table.index) == ["rest", "S1", "S2", "END"]
    for span, layer in product(table.index, range(4)):
        assert table.loc[span, layer] == pytest.approx(nodes[circuits.MLP(layer, span)], abs=1e-6)
    with pytest.raises(circuits.InputError, match="not split by position"):
        method.by_position(toy_world, task, graph=circuits.component_graph(toy_world))


@pytest.mark.usefixtures("unchecked_types")
def test_what_a_table_by_position_cannot_be_of_is_refused():
    with pytest.raises(circuits.InputError, match=r"of='resid': choose 'residual', 'heads'"):
        circuits.ActivationPatching().by_position(random_model("gpt2"), random_task(), "resid")


def test_patching_a_whole_node_is_not_the_sum_of_its_edges():
    model, task = random_model("gpt2"), random_task()
    method = circuits.ActivationPatching()
    whole = method.node_scores(model, task)
    edges = method.discover(model, task)
    graph = edges.graph
    kept = torch.stack(
        [
            graph.source != graph.node_index[circuits.MLP(0)],
            torch.ones(len(graph), dtype=torch.bool),
        ]
    )
    patched, unharmed = circuits.run_circuits(model, graph, kept, task)
    metric, clean = METRICS["logit_difference"], circuits.model_logits(model, task)
    expected = float(
        (metric.damage(patched, clean, task) - metric.damage(unharmed, clean, task)).mean()
    )
    assert whole[circuits.MLP(0)] == pytest.approx(expected, abs=1e-5)
    assert abs(whole[circuits.MLP(0)] - float(edges.scores[~kept[0]].sum())) > 1e-3


def test_patching_takes_a_step_for_each_component_and_no_more_memory_than_it_may(toy_world):
    task = circuits.load_task("ioi", toy_world, n=4, split="train")
    steps: list[int] = []
    free = circuits.ActivationPatching().discover(
        toy_world, task, progress=lambda done, total: steps.append(done)
    )
    targets = free.graph.target.tolist()
    assert steps == [0] + [
        index + 1 for index in range(479) if index == 478 or targets[index] != targets[index + 1]
    ]
    bounded = circuits.ActivationPatching(max_memory=1_000_000).discover(toy_world, task)
    torch.testing.assert_close(bounded.scores, free.scores, atol=1e-5, rtol=0)
    # Each edge changes its target and what is downstream of it, and nothing else is computed.
    assert bounded.record["node_evaluations"] == free.record["node_evaluations"] < 479 * 20 / 3


@pytest.mark.parametrize(
    "make",
    [
        lambda: EAP(gradient_at="middle"),
        lambda: EAPIG(steps=0),
        lambda: EAPIG(along="weights"),
        lambda: EAPIG(quadrature="right"),
        lambda: circuits.ACDC(0.1, order="random").discover(random_model("gpt2"), random_task()),
    ],
)
def test_settings_that_do_not_exist_are_refused_with_those_that_do(make, unchecked_types):
    with pytest.raises(circuits.InputError, match=r"choose|at least one"):
        make()
