"""Running circuits of features: all kept is the model, nothing kept is the corrupted prompt, and in
between what the definition says.
"""

from dataclasses import replace
from functools import partial

import pytest
import torch
from architectures import random_task
from random_transcoders import KINDS, WITH_MLPS, model_of, random_transcoders

import circuits
from circuits.attribution.interventions import Intervention, direct_effects
from circuits.attribution.pooling import effects
from circuits.evaluation.compare import compare
from circuits.evaluation.similarity import coarse_overlap, coarsened
from circuits.graph.nodes import Feature
from circuits.models import weights_of
from circuits.running.noise import embedding_noise

# Many models and methods: types are checked where each is tested.
pytestmark = pytest.mark.usefixtures("unchecked_types")


def ranked(circuit: circuits.Circuit) -> circuits.Circuit:
    """Every edge of its graph, by score."""
    return circuits.Circuit.full(circuit.graph, circuit.scores)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("architecture", WITH_MLPS)
def test_everything_kept_is_the_model_and_nothing_kept_the_corrupted_prompt(architecture, kind):
    model, task = model_of(architecture), random_task(ragged=True, several=True)
    transcoders = random_transcoders(model, kind)
    circuit = circuits.AttributionGraph(transcoders).discover(model, task)
    none = replace(circuit, kept=torch.zeros_like(circuit.kept))
    everything = ranked(circuit)
    logits = [
        circuits.run_circuit(model, each, task, transcoders=transcoders)
        for each in (everything, none, circuit)
    ]
    whole, corrupted = (
        circuits.model_logits(model, task, prompts) for prompts in ("clean", "corrupted")
    )
    torch.testing.assert_close(logits[0], whole, rtol=0, atol=1e-4)
    torch.testing.assert_close(logits[1], corrupted, rtol=1e-4, atol=1e-3)
    assert not torch.allclose(logits[2], logits[0]) and not torch.allclose(logits[2], logits[1])


@torch.no_grad()
def test_with_nothing_kept_under_noise_the_logits_are_those_of_the_noised_prompts():
    model, task = model_of("gpt2"), random_task()
    transcoders = random_transcoders(model, "plt")
    circuit = circuits.AttributionGraph(transcoders).discover(model, task)
    none = replace(circuit, kept=torch.zeros_like(circuit.kept))
    noise = embedding_noise(model, task, 2.0, 1, None)
    noised = model.run_with_hooks(
        task.clean, fwd_hooks=[("hook_embed", lambda value, hook: value + noise)]
    )
    found = circuits.run_circuit(
        model,
        none,
        task,
        ablation=circuits.Ablation("noise", scale=2.0, seed=1),
        transcoders=transcoders,
        max_memory=1,
    )
    torch.testing.assert_close(found, noised[task.scored], rtol=1e-4, atol=1e-3)


class Definition:
    """y_l = MLP_l(x) + sum over nodes outside the circuit of (c - out(x)): one prompt of a
    sequential model at a time, node by node.
    """

    def __init__(self, model, transcoders, kept_nodes, ablation: str) -> None:
        self.model, self.transcoders, self.kept, self.ablation = (
            model,
            transcoders,
            kept_nodes,
            ablation,
        )
        self.layers = range(transcoders.n_layers)

    def logits(self, task, spans=None) -> torch.Tensor:
        rows = []
        for prompt, n in enumerate(task.lengths.tolist()):
            label = [None] * n if spans is None else spans[prompt]
            rows.append(
                self.prompt(task.clean[prompt, :n], task.corrupted[prompt, :n], label)[
                    task.scored[prompt, :n]
                ]
            )
        return torch.cat(rows)

    def read(self, layer, residual):
        if self.transcoders.reads != "mlp_input":
            return residual
        return weights_of(self.model).norm(layer, "ln2")(residual)

    def active(self, layer, residual):
        activations = self.transcoders.encode(layer, self.read(layer, residual[None]))[0]
        activations[0] = 0
        return activations

    def explained(self, layer, activations, inputs):
        total = self.transcoders.decoder_biases[layer] + self.transcoders.skip(layer, inputs)
        for source in self.layers:
            if layer in self.transcoders.written_by(source):
                total = (
                    total
                    + activations[source] @ self.transcoders.decoders[source][:, layer - source]
                )
        return total

    def recorded(self, tokens):
        _, cache = self.model.run_with_cache(tokens[None])
        residuals = [cache[f"blocks.{layer}.hook_resid_mid"][0] for layer in self.layers]
        activations = [self.active(layer, residuals[layer]) for layer in self.layers]
        explained = [
            self.explained(layer, activations, self.read(layer, residuals[layer]))
            for layer in self.layers
        ]
        errors = [
            cache[f"blocks.{layer}.hook_mlp_out"][0] - explained[layer] for layer in self.layers
        ]
        return activations, errors, cache["hook_embed"][0]

    def prompt(self, clean, corrupted, label):
        clean_features, _, _ = self.recorded(clean)
        features, errors, tokens = self.recorded(corrupted)
        if self.ablation == "zero":
            features, errors, tokens = (
                [0 * part for part in features],
                [0 * part for part in errors],
                0 * tokens,
            )
        now, inputs = {}, {}

        def embed(value, hook):
            return torch.stack(
                [
                    value[0, p] if circuits.TokenEmbed(label[p]) in self.kept else tokens[p]
                    for p in range(len(label))
                ]
            )[None]

        def reader(value, hook, layer):
            now[layer], inputs[layer] = self.active(layer, value[0]), self.read(layer, value)[0]

        def writer(value, hook, layer):
            result, error = value[0].clone(), value[0] - self.explained(layer, now, inputs[layer])
            for position in range(1, len(label)):
                if circuits.Error(layer, label[position]) not in self.kept:
                    result[position] += errors[layer][position] - error[position]
                for source in self.layers[: layer + 1]:
                    for index in range(
                        self.transcoders.n_features
                        if layer in self.transcoders.written_by(source)
                        else 0
                    ):
                        stays = (
                            Feature(source, index, label[position]) in self.kept
                            and clean_features[source][position, index] > 0
                        )
                        change = features[source][position, index] - now[source][position, index]
                        result[position] += (
                            0
                            if stays
                            else change * self.transcoders.decoders[source][index, layer - source]
                        )
            return result[None]

        hooks = [("hook_embed", embed)]
        hooks += [
            (f"blocks.{layer}.hook_resid_mid", partial(reader, layer=layer))
            for layer in self.layers
        ]
        hooks += [
            (f"blocks.{layer}.hook_mlp_out", partial(writer, layer=layer)) for layer in self.layers
        ]
        return self.model.run_with_hooks(clean[None], fwd_hooks=hooks)[0]


@pytest.mark.parametrize("ablation", ["resample", "zero"])
@pytest.mark.parametrize("kind", ["skip-plt", "clt"])
@torch.no_grad()
def test_a_circuit_computes_what_its_definition_says(kind, ablation):
    model, task = model_of("gpt2"), random_task(batch=2, length=6, ragged=True)
    transcoders = random_transcoders(model, kind, features=12)
    circuit = ranked(circuits.AttributionGraph(transcoders).discover(model, task)).top(12)
    kept = {node for edge in circuit.edges for node in (edge.source, edge.target)}
    found = circuits.run_circuit(model, circuit, task, ablation=ablation, transcoders=transcoders)
    torch.testing.assert_close(
        found, Definition(model, transcoders, kept, ablation).logits(task), rtol=1e-4, atol=1e-4
    )


@torch.no_grad()
def test_a_circuit_split_by_positions_keeps_its_nodes_where_they_are_named():
    model, task = model_of("gpt2"), random_task(batch=3, length=6)
    first, last = torch.zeros(3, 6, dtype=torch.bool), torch.zeros(3, 6, dtype=torch.bool)
    # Where spans overlap, the one that is named first has the position.
    first[:, 1:3], last[:, 2], last[:, 5] = True, True, True
    task = replace(task, positions={"EARLY": first, "END": last})
    transcoders = random_transcoders(model, "plt", features=12)
    circuit = circuits.AttributionGraph(transcoders).discover(model, task)
    assert circuit.graph.positions == ("rest", "EARLY", "END")
    assert (
        circuits.AttributionGraph(transcoders, by_position=False)
        .discover(model, task)
        .graph.positions
        is None
    )
    few = ranked(circuit).top(12)
    kept = {node for edge in few.edges for node in (edge.source, edge.target)}
    spans = [["rest", "EARLY", "EARLY", "rest", "rest", "END"]] * 3
    found = circuits.run_circuit(model, few, task, transcoders=transcoders)
    torch.testing.assert_close(
        found,
        Definition(model, transcoders, kept, "resample").logits(task, spans),
        rtol=1e-4,
        atol=1e-4,
    )
    with pytest.raises(
        circuits.InputError,
        match=r"split by the positions \['EARLY', 'END'\], which the task 'custom' does not name",
    ):
        circuits.run_circuit(model, few, random_task(batch=3, length=6), transcoders=transcoders)


@torch.no_grad()
def test_mean_ablation_takes_means_over_real_tokens_of_all_prompts():
    """Of the embedding alone, everything else kept: against the mean embedding put there by
    hand.
    """
    model, task = model_of("gpt2"), random_task(ragged=True)
    transcoders = random_transcoders(model, "clt")
    circuit = ranked(circuits.AttributionGraph(transcoders).discover(model, task))
    none = replace(circuit, kept=torch.zeros_like(circuit.kept))
    found = circuits.run_circuit(model, none, task, ablation="mean", transcoders=transcoders)
    torch.testing.assert_close(found, mean_by_hand(model, transcoders, task), rtol=1e-4, atol=1e-3)
    again = circuits.run_circuit(
        model, none, task, ablation="mean", transcoders=transcoders, max_memory=1
    )
    torch.testing.assert_close(again, found, rtol=1e-4, atol=1e-4)
    task_of_their_own = random_task(batch=9, length=11, seed=5, ragged=True)
    torch.testing.assert_close(
        circuits.run_circuit(
            model,
            none,
            task,
            ablation=circuits.Ablation("mean", over=task_of_their_own),
            transcoders=transcoders,
        ),
        mean_by_hand(model, transcoders, task, task_of_their_own),
        rtol=1e-4,
        atol=1e-3,
    )
    for other in (
        "mean_by_position",
        circuits.Ablation("mean", over="corrupted"),
        circuits.Ablation("mean_by_position", over=task_of_their_own),
    ):
        assert not torch.allclose(
            circuits.run_circuit(model, none, task, ablation=other, transcoders=transcoders), found
        )
    with pytest.raises(circuits.InputError, match="outputs cannot be given"):
        circuits.run_circuit(
            model,
            none,
            task,
            ablation=circuits.Ablation("given", outputs={}),
            transcoders=transcoders,
        )


def mean_by_hand(model, transcoders, task, over=None) -> torch.Tensor:
    """Nothing kept: every MLP writes its bias and the mean of what features and errors write, over
    all tokens (of another task's prompts) but pads and the first.
    """
    averaged = over or task
    definition = Definition(model, transcoders, set(), "mean")
    tokens, features, errors = [], [], []
    for prompt, n in enumerate(averaged.lengths.tolist()):
        acts, errs, embed = definition.recorded(averaged.clean[prompt, :n])
        tokens.append(embed)
        features.append([part[1:] for part in acts])
        errors.append([part[1:] for part in errs])
    mean_token = torch.cat(tokens).mean(0)
    written = []
    for layer in range(transcoders.n_layers):
        total = transcoders.decoder_biases[layer] + torch.cat(
            [part[layer] for part in errors]
        ).mean(0)
        for source in range(layer + 1):
            total = (
                total
                + torch.cat([part[source] for part in features]).mean(0)
                @ transcoders.decoders[source][:, layer - source]
            )
        written.append(total)

    def late(value, hook, layer):
        return torch.cat([value[:, :1], written[layer].expand(1, value.shape[1] - 1, -1)], 1)

    rows = []
    for prompt, n in enumerate(task.lengths.tolist()):
        hooks = [("hook_embed", lambda value, hook: mean_token.expand_as(value))]
        hooks += [
            (f"blocks.{layer}.hook_mlp_out", partial(late, layer=layer))
            for layer in range(transcoders.n_layers)
        ]
        rows.append(
            model.run_with_hooks(task.clean[prompt, :n][None], fwd_hooks=hooks)[0][
                task.scored[prompt, :n]
            ]
        )
    return torch.cat(rows)


@torch.no_grad()
def test_what_fires_in_a_prompt_does_not_depend_on_its_pads():
    model, task = model_of("gpt2"), random_task(ragged=True)
    transcoders = random_transcoders(model, "plt", activation="batch_topk")
    circuit = ranked(circuits.AttributionGraph(transcoders).discover(model, task)).top(30)
    together = circuits.run_circuit(model, circuit, task, transcoders=transcoders)
    alone = []
    for prompt, n in enumerate(task.lengths.tolist()):
        one = task[prompt : prompt + 1]
        cut = {name: getattr(one, name)[:, :n] for name in ("clean", "corrupted", "scored")}
        alone.append(
            circuits.run_circuit(model, circuit, replace(one, **cut), transcoders=transcoders)
        )
    torch.testing.assert_close(together, torch.cat(alone), rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_everything_in_a_budget_is_not_the_model():
    model, task = model_of("gpt2"), random_task()
    transcoders = random_transcoders(model)
    everything = ranked(circuits.AttributionGraph(transcoders, budget=3).discover(model, task))
    assert circuits.evaluate(model, everything, task, transcoders=transcoders).kl > 0.01


@torch.no_grad()
def test_an_edges_score_is_the_damage_of_the_linear_model_when_its_source_is_ablated():
    """Over all its outgoing edges a feature's scores sum to its direct effect on the explained
    logits, over all paths.
    """
    model = model_of("gpt2", n_layers=3)
    transcoders = random_transcoders(model, "plt", activation="relu")
    graph = circuits.AttributionGraph(transcoders).attribute(
        model, [3, 14, 15, 9, 26, 5], explain=[(7, 21)]
    )
    total, edges = effects(graph)
    last = len(graph.nodes) - 1
    direct = graph.adjacency()[last]
    late = [
        n
        for n in range(last)
        if int(graph.nodes.layer[n]) == 2 and isinstance(graph.node(n), Feature)
    ]
    torch.testing.assert_close(total[late].float(), direct[late], rtol=1e-4, atol=1e-5)
    early = next(n for n in range(last) if int(graph.nodes.layer[n]) == 0)
    paths = direct[early].double()
    for middle in range(last):
        weight = graph.adjacency()[middle, early].double()
        if weight != 0:
            paths = paths + weight / graph.nodes.activation[middle].double() * total[middle]
    assert float(total[early]) == pytest.approx(float(paths), rel=1e-4)
    assert float(edges[graph.source == early].sum()) == pytest.approx(float(total[early]), rel=1e-6)
    run = direct_effects(
        model, transcoders, graph.tokens, [[], [Intervention.ablate(graph.node(late[0]))]]
    )
    fall = (run.logits[0, -1, 7] - run.logits[0, -1, 21]) - (
        run.logits[1, -1, 7] - run.logits[1, -1, 21]
    )
    assert float(fall) == pytest.approx(float(total[late[0]]), abs=1e-4)


def test_circuits_of_features_are_evaluated_like_any_other():
    model, task = model_of("gpt2"), random_task()
    transcoders = random_transcoders(model, "plt")
    circuit = circuits.AttributionGraph(transcoders).discover(model, task)
    evaluation = circuits.evaluate(model, circuit, task, transcoders=transcoders)
    assert evaluation.kl > 0 and evaluation.faithfulness("logit_difference") != 1
    curve = circuits.faithfulness_curve(
        model, ranked(circuit), task, [0, 10, 1.0], transcoders=transcoders
    )
    assert curve["faithfulness"].iloc[0] == pytest.approx(0, abs=1e-4) and curve[
        "faithfulness"
    ].iloc[-1] == pytest.approx(1, abs=1e-4)


def test_a_circuit_finds_its_transcoders_again_and_refuses_others(tmp_path):
    model, task = model_of("gpt2"), random_task()
    transcoders = random_transcoders(model, "plt")
    circuit = circuits.AttributionGraph(transcoders).discover(model, task)
    with pytest.raises(circuits.InputError, match="not loaded from a file; hand them over"):
        circuits.run_circuit(model, circuit, task)
    with pytest.raises(circuits.InputError, match="other weights"):
        circuits.run_circuit(
            model, circuit, task, transcoders=random_transcoders(model, "plt", seed=9)
        )
    with pytest.raises(circuits.InputError, match="run by hooks"):
        circuits.run_circuit(model, circuit, task, transcoders=transcoders, executor="incremental")
    circuits.save_transcoders(transcoders, tmp_path / "plt")
    kept = circuits.AttributionGraph(tmp_path / "plt").discover(model, task)
    kept.save(tmp_path / "run")
    again = circuits.Circuit.load(tmp_path / "run")
    assert again == kept and again.graph.transcoders == kept.graph.transcoders
    torch.testing.assert_close(
        circuits.run_circuit(model, again, task),
        circuits.run_circuit(model, circuit, task, transcoders=transcoders),
        rtol=1e-5,
        atol=1e-5,
    )


def test_circuits_of_features_stand_beside_circuits_of_components():
    model, task = model_of("gpt2"), random_task()
    transcoders = random_transcoders(model)
    features = circuits.AttributionGraph(transcoders).discover(model, task)
    components = circuits.EAP().discover(model, task)
    found = {"features": features, "eap": components}
    comparison = compare(model, found, task, transcoders={"features": transcoders})
    assert comparison.notes and "features: edges between features" in comparison.notes[0]
    assert comparison.table.loc["eap", "edges"] == round(len(components) / 10)
    assert comparison.overlap.loc["features", "eap"] == pytest.approx(
        coarse_overlap(features, comparison.circuits["eap"])
    )
    shares = coarsened(features)
    assert set(shares) == {circuits.Embed(), circuits.MLP(0), circuits.MLP(1)} and sum(
        shares.values()
    ) == pytest.approx(1)
    of_errors = sum(
        float(score)
        for edge, score in zip(features.edges, features.scores[features.kept].abs(), strict=True)
        if isinstance(edge.source, circuits.Error) and edge.source.layer == 1
    )
    of_features = sum(
        float(score)
        for edge, score in zip(features.edges, features.scores[features.kept].abs(), strict=True)
        if isinstance(edge.source, Feature) and edge.source.layer == 1
    )
    assert shares[circuits.MLP(1)] == pytest.approx(
        (of_errors + of_features) / float(features.scores[features.kept].abs().sum()), rel=1e-4
    )
    assert of_errors > 0 and coarse_overlap(features, features) == pytest.approx(1)
    notes = compare(model, {"eap": components}, task).notes
    assert not any("edges between features" in note for note in notes)


def test_each_token_of_an_answer_is_explained_where_it_is_scored(toy_world):
    pairs = [
        circuits.PromptPair("So Mary", "So John", " is a", " he is"),
        circuits.PromptPair("So Anna and Mary", "So John and Mary", " is a", " he is"),
    ]
    task = circuits.Task.from_prompts(toy_world, pairs)
    method = circuits.AttributionGraph("toy-world-plt", by_position=False)

    def scores(task: circuits.Task) -> dict[str, float]:
        found = method.discover(toy_world, task)
        edges = map(str, found.graph.edges)
        return dict(zip(edges, found.scores.tolist(), strict=True))

    together = scores(task)
    rows = task.scored.nonzero()[:, 1].view(2, 2)
    alone = [
        scores(
            circuits.Task.from_tokens(
                task.clean,
                task.corrupted,
                task.row_answers.view(2, 2)[:, row],
                task.row_wrong_answers.view(2, 2)[:, row],
                lengths=task.lengths,
                answer_positions=rows[:, row],
            )
        )
        for row in (0, 1)
    ]
    for edge, score in together.items():
        expected = (alone[0].get(edge, 0.0) + alone[1].get(edge, 0.0)) / 2
        assert score == pytest.approx(expected, abs=1e-4)
