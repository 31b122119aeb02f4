"""Evaluation: metrics of a circuit, faithfulness over sizes, recovery of known edges."""

import dataclasses

import pandas as pd
import pytest
import torch
from architectures import random_model, random_task, weight

import circuits
from circuits.evaluation.compare import compare
from circuits.evaluation.evaluate import doubts
from circuits.evaluation.similarity import overlap, score_correlation, score_table
from circuits.tasks.metrics import METRICS


@pytest.fixture(scope="module")
def model():
    return random_model("gpt2")


@pytest.fixture(scope="module")
def task():
    return random_task(several=True)


@pytest.fixture(scope="module")
def ranked(model, task) -> circuits.Circuit:
    return circuits.EAP().discover(model, task)


def test_an_evaluation_is_the_metrics_of_the_circuits_logits(model, task, ranked):
    circuit = ranked.top(30)
    evaluation = circuits.evaluate(model, circuit, task)
    logits, whole = circuits.run_circuit(model, circuit, task), circuits.model_logits(model, task)
    for name in ("kl", "logit_difference"):
        by_row = METRICS[name](logits, whole, task)
        torch.testing.assert_close(evaluation.values[name], by_row)
        assert getattr(evaluation, name) == pytest.approx(float(by_row.mean()))
    by_prompt = evaluation.by_prompt()
    assert by_prompt.shape == (len(task), 2)
    assert by_prompt["kl"][0] == pytest.approx(
        float(evaluation.values["kl"][task.row_prompt == 0].mean())
    )
    with pytest.raises(AttributeError, match="no metric 'accuracy'; it has kl, logit_difference"):
        evaluation.accuracy  # noqa: B018


def test_the_whole_model_is_fully_faithful_and_the_empty_circuit_not_at_all(model, task, ranked):
    whole, empty = (
        circuits.evaluate(model, ranked, task),
        circuits.evaluate(model, ranked.top(0), task),
    )
    assert whole.faithfulness("logit_difference") == pytest.approx(1, abs=1e-4)
    assert whole.kl == pytest.approx(0, abs=1e-5)
    assert empty.faithfulness("logit_difference") == pytest.approx(0, abs=1e-4)
    assert list(whole.table().columns) == ["circuit", "model", "empty", "faithfulness"]


def test_a_faithfulness_of_rounding_over_rounding_is_not_a_number_and_a_note_says_why(model, task):
    """The mean over one prompt is what is there already."""
    one = random_task(several=True)[:1]
    circuit = circuits.RandomScores().discover(model, one).top(30)
    evaluation = circuits.evaluate(model, circuit, one, ablation="mean_by_position")
    assert evaluation.table()["faithfulness"].isna().all()
    (note,) = evaluation.notes
    assert "empty circuit has the kl, logit_difference of the model up to rounding" in note
    resampled = circuits.evaluate(model, circuit, one)
    assert not resampled.table()["faithfulness"].isna().any() and resampled.notes == ()


@pytest.mark.filterwarnings("ignore:this circuit was found in")
@pytest.mark.parametrize(
    ("dtype", "mask", "tolerance"),
    [
        (torch.float32, -1e9, 1e-4),
        (torch.float16, -1e4, 0.02),
        (torch.bfloat16, -1e4, 0.1),
    ],
)
def test_tokens_that_a_bias_masks_change_neither_an_evaluation_nor_what_counts_as_rounding(
    dtype, mask, tolerance
):
    model = circuits.load_model("toy-world", dtype=dtype)
    task = circuits.load_task("ioi", model, n=4)
    circuit = circuits.EAP().discover(model, task).top(60)
    plain = circuits.evaluate(model, circuit, task, metrics="logit_difference")
    # All but the names that the task is about, so that most logits are masked.
    is_masked = torch.ones(model.cfg.d_vocab, dtype=torch.bool)
    is_masked[torch.cat([task.answers, task.wrong_answers]).unique()] = False
    weight(model, "unembed.b_U")[is_masked] = mask
    masked = circuits.evaluate(model, circuit, task)
    values = masked.table().loc["logit_difference"].tolist()
    assert values == pytest.approx(plain.table().loc["logit_difference"], abs=tolerance)
    assert masked.faithfulness("kl") > 0.5 and masked.notes == ()
    # The mean over one prompt is what is there already.
    nothing = circuits.evaluate(model, circuit, task[:1], ablation="mean_by_position")
    assert nothing.table()["faithfulness"].isna().all() and len(nothing.notes) == 1


def test_a_faithfulness_curve_has_a_row_per_size(model, task, ranked):
    curve = circuits.faithfulness_curve(model, ranked, task, [10, 50, 0, 1.0])
    assert curve["edges"].tolist() == [0, 10, 50, 110]
    assert curve["fraction"].tolist() == pytest.approx([0, 10 / 110, 50 / 110, 1])
    assert curve["faithfulness"].iloc[[0, -1]].tolist() == pytest.approx([0, 1], abs=1e-4)
    assert curve["logit_difference"][2] == pytest.approx(
        circuits.evaluate(model, ranked.top(50), task).logit_difference
    )
    assert curve["kl"][1] == pytest.approx(circuits.evaluate(model, ranked.top(10), task).kl)
    by_fraction = circuits.faithfulness_curve(model, ranked, task)
    assert len(by_fraction) <= 10
    assert by_fraction["edges"].iloc[-1] == 110


@pytest.mark.parametrize("size", [111, -1, 1.5])
def test_a_size_out_of_range_is_refused(model, task, ranked, size):
    with pytest.raises(circuits.InputError, match="out of range"):
        circuits.faithfulness_curve(model, ranked, task, [size])


def test_recovery_of_a_selected_circuit_counts_only_kept_edges_as_found(model):
    graph = circuits.component_graph(model)
    truth = ["embed->m0", "m0->m1", "m1->logits", "embed->logits"]
    found = circuits.Circuit.from_edges(graph, ["embed->m0", "m1->logits", "a0.h1->logits"])
    recovered = circuits.recovery(found, truth)
    assert (recovered.precision, recovered.recall) == (pytest.approx(2 / 3), pytest.approx(2 / 4))
    # Nodes of the truth: embed m0 m1 logits; of the circuit: those and a0.h1.
    assert (recovered.node_precision, recovered.node_recall) == (pytest.approx(4 / 5), 1)
    false_positive_rate = 1 / (110 - 4)
    assert recovered.edge_auc == pytest.approx((1 + 0.5 - false_positive_rate) / 2)
    nothing = circuits.recovery(circuits.Circuit.from_edges(graph, []), truth)
    assert nothing.recall == 0
    assert nothing.edge_auc == pytest.approx(0.5)


def test_recovery_of_a_ranking_is_its_area_under_the_curve(model):
    graph = circuits.component_graph(model)
    truth = ["embed->m0", "m0->m1"]
    scores = torch.zeros(len(graph))
    (
        scores[graph.index("embed->m0")],
        scores[graph.index("m0->m1")],
        scores[graph.index("m1->logits")],
    ) = 3.0, -1.0, 2.0
    recovered = circuits.recovery(circuits.Circuit.full(graph, scores), truth)
    assert (
        recovered.precision == recovered.recall == 0.5
    )  # the two highest |scores| hold one of the two
    assert recovered.edge_auc == pytest.approx((108 + 107) / (2 * 108))
    assert recovered.edge_roc["true_positive_rate"].tolist() == pytest.approx([0, 0.5, 0.5, 1, 1])
    assert recovered.edge_roc["false_positive_rate"].tolist() == pytest.approx(
        [0, 0, 1 / 108, 1 / 108, 1]
    )
    area = torch.trapezoid(
        torch.tensor(recovered.edge_roc["true_positive_rate"].to_numpy()),
        torch.tensor(recovered.edge_roc["false_positive_rate"].to_numpy()),
    )
    assert recovered.edge_auc == pytest.approx(float(area))


def test_rounding_noise_ranks_nothing(model):
    graph = circuits.component_graph(model)
    scores = torch.full((len(graph),), 1e-9)
    scores[graph.index("embed->m0")], scores[graph.index("m0->m1")] = 1.0, 1e-8
    recovered = circuits.recovery(circuits.Circuit.full(graph, scores), ["embed->m0", "m0->m1"])
    assert recovered.edge_auc == pytest.approx((108 + 108 / 2) / (2 * 108))


def test_overlap_and_correlation_compare_circuits_over_the_same_graph(model, task, ranked):
    a, b = ranked.top(20), ranked.top(40)
    assert overlap(a, b) == pytest.approx(0.5)
    assert overlap(ranked.top(0), ranked.top(0)) == 1
    assert score_correlation(a, b) == pytest.approx(1)
    exact = circuits.ActivationPatching().discover(model, task)
    table = score_table(ranked, exact)
    assert len(table) == 110
    assert score_correlation(ranked, exact, "pearson") == pytest.approx(table["x"].corr(table["y"]))
    assert score_correlation(ranked, exact) == pytest.approx(
        table["x"].rank().corr(table["y"].rank())
    )


def test_a_comparison_gives_rankings_the_size_of_the_selection_and_averages_seeds(
    model, task, ranked
):
    sweep = [circuits.ACDC(threshold).discover(model, task) for threshold in (0.02, 0.005)]
    seeds = [circuits.RandomScores(seed).discover(model, task) for seed in range(3)]
    comparison = compare(
        model, {"acdc": sweep, "eap": ranked, "random": seeds}, task, sizes=[5, 50, 1.0]
    )
    assert comparison.table["edges"].tolist() == [len(sweep[0])] * 3
    by_hand = sum(circuits.evaluate(model, seed.top(len(sweep[0])), task).kl for seed in seeds) / 3
    assert comparison.table.loc["random", "kl"] == pytest.approx(by_hand)
    assert comparison.curves.groupby("method").size().to_dict() == {
        "acdc": 2,
        "eap": 3,
        "random": 3,
    }
    whole = circuits.evaluate(model, circuits.Circuit.full(ranked.graph), task)
    ends = comparison.reference.loc[["whole model", "empty circuit"]]
    assert ends["edges"].tolist() == [len(ranked.graph), 0]
    assert ends["faithfulness"].tolist() == [1, 0] and ends["kl"].tolist() == pytest.approx(
        whole.table().loc["kl", ["model", "empty"]].tolist()
    )
    assert list(ends.columns) == list(comparison.table.columns)
    assert comparison.overlap.loc["acdc", "acdc"] == 1
    assert comparison.overlap.loc["acdc", "eap"] == pytest.approx(
        overlap(sweep[0], ranked.top(len(sweep[0])))
    )


def test_curves_and_tables_rank_no_edges_without_scores(model, task, ranked):
    whole = circuits.Circuit.full(ranked.graph)
    truth = ["m1->logits", "embed->m0"]
    for call in (
        lambda: circuits.faithfulness_curve(model, whole, task),
        lambda: circuits.faithfulness_curve(model, whole, task, [3, 1.0], by="signed"),
        lambda: compare(model, {"eap": ranked, "whole": whole}, task, size=5, sizes=[1.0]),
        lambda: circuits.recovery(whole, truth),
    ):
        with pytest.raises(circuits.InputError, match="none of the 110 edges has a score"):
            call()
    with pytest.raises(circuits.InputError, match=r"^other: top\(5\)"):
        compare(model, {"eap": ranked, "other": whole}, task, size=5)
    curve = circuits.faithfulness_curve(model, whole, task, [0, 1.0])
    assert curve["faithfulness"].tolist() == pytest.approx([0, 1], abs=1e-4)


def test_a_comparison_takes_circuits_of_one_kind_from_each_method(
    model, task, ranked, unchecked_types
):
    by_twos = compare(model, {"a": [ranked, ranked], "b": ranked}, task, sizes=iter([2, 4]))
    assert by_twos.curves["edges"].tolist() == [2, 4] * 2
    for found in ([], [ranked, ranked.top(5)]):
        with pytest.raises(circuits.InputError, match=r"eap=\[.*must hold circuits that all"):
            compare(model, {"eap": found}, task)


def test_metrics_are_told_apart_by_their_names(unchecked_types):
    model, task = random_model("gpt2"), random_task()
    whole = circuits.Circuit.full(circuits.component_graph(model))

    def first(logits, clean_logits, task):
        return logits[:, 0]

    def second(logits, clean_logits, task):
        return logits[:, 1]

    one, other = (circuits.Metric("own", each, "lower_is_damage") for each in (first, second))
    assert set(circuits.evaluate(model, whole, task, metrics=one).values) == {"own"}
    assert set(circuits.evaluate(model, whole, task, metrics=[one, one]).values) == {"own"}
    with pytest.raises(circuits.InputError, match="two metrics are named 'own'"):
        circuits.evaluate(model, whole, task, metrics=[one, other])
    with pytest.raises(circuits.InputError, match="is a function"):
        circuits.evaluate(model, whole, task, metrics=first)
    column = circuits.Metric("edges", first, "lower_is_damage")
    with pytest.raises(circuits.InputError, match="name of another column"):
        circuits.faithfulness_curve(model, whole, task, [3], metric=column)


def test_the_performance_of_a_model_is_that_of_its_own_logits(toy_world):
    named = circuits.performance(toy_world, "docstring", n=12)
    task = circuits.load_task("docstring", toy_world, n=12)
    given = circuits.performance(toy_world, task)
    pd.testing.assert_frame_equal(named, given)
    rows = []
    for tokens, length, (right,), wrong in zip(
        task.clean, task.lengths, task.answers, task.wrong_answers, strict=True
    ):
        logits = toy_world(tokens[None, :length])[0, -1].detach()
        probabilities, wrong = logits.softmax(0), wrong[wrong >= 0]
        rows.append(
            {
                "accuracy": float(logits.argmax() == right),
                "logit_difference": float(logits[right] - logits[wrong].mean()),
                "probability_difference": float(probabilities[right] - probabilities[wrong].sum()),
            }
        )
    expected = pd.DataFrame(rows).mean()
    for name, value in expected.items():
        assert given.loc["docstring", name] == pytest.approx(value, abs=1e-4)
    assert given.loc["docstring", ["prompts", "left_out", "note"]].tolist() == [12, 0, ""]


def test_every_task_in_every_form_has_a_performance_or_the_reason_why_not(
    toy_world, only_shipped_tasks, unchecked_types
):
    table = circuits.performance(toy_world, n=4)
    assert set(circuits.task_names()) < set(table.index)
    refused = ["greater_than:digits=1", "induction_prose", "two_hop:about=countries"]
    assert table.index[table["prompts"] == 0].tolist() == refused
    assert table["note"][refused].str.contains("only 0 of 4 prompts fit toy-world").all()
    able = table.drop(refused)
    assert (able["accuracy"] == 1).all() and (able["note"] == "").all()
    with pytest.raises(circuits.InputError, match="no task 'ioy'"):
        circuits.performance(toy_world, "ioi", "ioy")
    with pytest.raises(circuits.InputError, match="there is no task 3"):
        circuits.performance(toy_world, 3)


def test_a_task_without_answers_has_no_performance_to_doubt(model):
    task = random_task(several=True)
    without = dataclasses.replace(task, answers=None, wrong_answers=None, metric="kl")
    row = circuits.performance(model, without).iloc[0]
    assert row[["accuracy", "logit_difference"]].isna().all() and row["note"] == ""


def test_a_model_that_does_not_prefer_the_answers_is_told_wherever_it_is_judged(toy_world):
    task = circuits.load_task("ioi", toy_world, n=8)
    reversed_task = dataclasses.replace(
        task, answers=task.wrong_answers, wrong_answers=task.answers
    )
    told = "the whole model does not clearly prefer the answers, so that there is little to explain"
    circuit = circuits.RandomScores().discover(toy_world, task).top(100)
    for each, doubted in ((task, False), (reversed_task, True)):
        evaluation = circuits.evaluate(toy_world, circuit, each)
        notes = [
            evaluation.notes,
            compare(toy_world, {"random": circuit}, each).notes,
            (circuits.performance(toy_world, each)["note"].item(),),
        ]
        assert [told in " ".join(found) for found in notes] == [doubted] * 3
        assert (told in evaluation._repr_html_()) == doubted


def test_a_difference_within_two_standard_errors_of_nothing_is_doubted():
    prompts = torch.tensor([0, 0, 1, 2, 3])
    # By prompt 1, 2, 3, 6: mean 3, standard error 1.08
    sure = {"logit_difference": torch.tensor([0.0, 2, 2, 3, 6])}
    assert doubts(sure, prompts) == ()
    unsure = {"logit_difference": torch.tensor([0.0, 2, 2, 3, 12])}
    (note,) = doubts(unsure, prompts)
    assert "its logit_difference is 4.5 (standard error 2.5, 4 prompts)" in note
    assert doubts({"kl": torch.zeros(5), "accuracy": torch.zeros(5)}, prompts) == ()
    assert doubts({"probability_difference": torch.tensor([0.1])}, torch.tensor([0])) == ()
