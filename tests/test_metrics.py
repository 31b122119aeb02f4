"""Metrics: one number per scored row, never averaged, with a direction."""

from dataclasses import replace

import pytest
import torch
from architectures import random_model, random_task

import circuits
from circuits.tasks.metrics import ALIASES, METRICS, get_metric
from circuits.tasks.task import Task

VOCAB = 7


@pytest.fixture
def task() -> Task:
    """Three prompts, four scored rows: the first prompt has two."""
    scored = torch.tensor([[False, True, True], [False, False, True], [False, False, True]])
    tokens = torch.tensor([[1, 2, 3], [1, 2, 3], [4, 5, 6]])
    answers, wrong = (
        torch.tensor([[0, 1], [2, -1], [3, -1]]),
        torch.tensor([[2, -1], [0, 1], [5, 6]]),
    )
    return Task.from_tokens(tokens, tokens.flip(0), answers, wrong, answer_positions=scored)


@pytest.fixture
def logits() -> torch.Tensor:
    return torch.randn(4, VOCAB, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def clean() -> torch.Tensor:
    return torch.randn(4, VOCAB, generator=torch.Generator().manual_seed(1))


ANSWERS = [[0, 1], [0, 1], [2], [3]]
WRONG = [[2], [2], [0, 1], [5, 6]]


def test_kl_is_from_the_model_to_the_circuit_summed_over_the_vocabulary_in_nats(
    task, logits, clean
):
    p, q = clean.softmax(-1), logits.softmax(-1)
    by_hand = torch.tensor(
        [sum(float(p[i, v] * (p[i, v] / q[i, v]).log()) for v in range(VOCAB)) for i in range(4)]
    )
    torch.testing.assert_close(METRICS["kl"](logits, clean, task), by_hand)
    torch.testing.assert_close(METRICS["kl"](clean, clean, task), torch.zeros(4), atol=1e-6, rtol=0)


def test_a_set_of_answers_counts_by_its_mean_logit_and_its_summed_probability(task, logits, clean):
    p = logits.softmax(-1)
    difference = torch.stack(
        [logits[i, ANSWERS[i]].mean() - logits[i, WRONG[i]].mean() for i in range(4)]
    )
    torch.testing.assert_close(METRICS["logit_difference"](logits, clean, task), difference)
    probability = torch.stack([p[i, ANSWERS[i]].sum() - p[i, WRONG[i]].sum() for i in range(4)])
    torch.testing.assert_close(METRICS["probability_difference"](logits, clean, task), probability)
    surprise = torch.stack([-p[i, ANSWERS[i]].sum().log() for i in range(4)])
    torch.testing.assert_close(METRICS["negative_log_probability"](logits, clean, task), surprise)


def test_accuracy_asks_whether_the_most_likely_token_is_an_answer(task, clean):
    logits = torch.zeros(4, VOCAB)
    logits[torch.arange(4), torch.tensor([1, 2, 2, 6])] = 1
    assert METRICS["accuracy"](logits, clean, task).tolist() == [1, 0, 1, 0]


def test_squared_error_is_the_mean_over_the_vocabulary(task, logits, clean):
    torch.testing.assert_close(
        METRICS["squared_error"](logits, clean, task), ((logits - clean) ** 2).mean(-1)
    )


def test_damage_is_larger_when_the_metric_gets_worse(task, logits, clean):
    for metric in METRICS.values():
        value, damage = metric(logits, clean, task), metric.damage(logits, clean, task)
        torch.testing.assert_close(
            damage, value if metric.direction == "higher_is_damage" else -value
        )
    assert {name for name, metric in METRICS.items() if metric.direction == "higher_is_damage"} == {
        "kl",
        "negative_log_probability",
        "squared_error",
    }


def test_half_precision_logits_are_judged_in_float32(task, logits, clean):
    for dtype in (torch.bfloat16, torch.float16):
        assert METRICS["kl"](logits.to(dtype), clean.to(dtype), task).dtype == torch.float32


@pytest.mark.parametrize("name", ["logit_difference", "accuracy"])
def test_a_metric_that_needs_answers_says_so_when_there_are_none(name, logits, clean):
    tokens = torch.tensor([[1, 2, 3]] * 4)
    with pytest.raises(circuits.InputError, match="has no answers"):
        METRICS[name](logits, clean, Task.from_tokens(tokens, tokens, name="mine"))


def test_a_metric_that_returns_a_scalar_is_refused(task, logits, clean):
    metric = circuits.Metric(
        "mine", lambda logits, clean_logits, task: logits.mean(), "higher_is_damage"
    )
    with pytest.raises(
        circuits.InputError,
        match=r"'mine' returned shape \(\); it must return one number per scored row, shape \(4,\)",
    ):
        metric(logits, clean, task)


def test_a_metric_that_returns_nan_is_refused(task, logits, clean):
    metric = circuits.Metric(
        "mine", lambda logits, clean_logits, task: (logits[:, 0] - 100).log(), "higher_is_damage"
    )
    with pytest.raises(
        circuits.InputError, match="'mine' is NaN or infinite on 4 of 4 scored rows"
    ):
        metric(logits, clean, task)


def test_values_so_large_that_their_sum_overflows_are_finite_all_the_same(task, logits, clean):
    metric = circuits.Metric(
        "mine",
        lambda logits, clean_logits, task: torch.full_like(logits[:, 0], 3e38),
        "higher_is_damage",
    )
    values = metric(logits, clean, task)
    assert values.isfinite().all()
    assert values.sum().isinf()


def test_a_direction_that_does_not_exist_is_refused(unchecked_types):
    with pytest.raises(circuits.InputError, match="direction='higher_is_worse': choose"):
        circuits.Metric("mine", lambda logits, clean_logits, task: logits[:, 0], "higher_is_worse")


def test_one_metric_may_be_given_without_a_list():
    model, task = random_model("gpt2"), random_task()
    assert set(
        circuits.evaluate(
            model, circuits.Circuit.full(circuits.component_graph(model)), task, metrics="kl"
        ).values
    ) == {"kl"}


def test_an_unknown_metric_is_named_with_those_there_are():
    model, task = random_model("gpt2"), random_task()
    with pytest.raises(
        circuits.InputError, match=r"no metric 'kld'; did you mean 'kl'\? there are kl, logit_dif"
    ):
        circuits.evaluate(
            model, circuits.Circuit.full(circuits.component_graph(model)), task, metrics=["kld"]
        )


def test_a_shipped_metric_with_another_function_is_ones_own(task, logits, clean):
    def of_one_circuit(logits, clean_logits, task):
        assert logits.ndim == 2
        return logits.max(-1).values

    changed = replace(circuits.METRICS["kl"], function=of_one_circuit)
    assert circuits.METRICS["kl"].shipped
    assert not changed.shipped
    assert str(changed) != "kl"
    both = changed(torch.stack([logits, logits + 1]), clean, task)
    torch.testing.assert_close(both[1], both[0] + 1)


def test_a_metric_that_is_added_to_the_list_is_ones_own(task, logits, clean, monkeypatch):
    def over_all(logits, clean_logits, task):
        return (logits / logits.std()).max(-1).values

    own = circuits.Metric("own", over_all, "lower_is_damage")
    monkeypatch.setitem(circuits.METRICS, "own", own)
    assert not own.shipped
    assert str(own) != "own"
    both = torch.stack([logits, 100 * clean])
    torch.testing.assert_close(own(both, clean, task)[0], own(logits, clean, task))


def test_a_task_may_bring_its_own_metric(task, unchecked_types):
    own = circuits.Metric("own", lambda logits, clean, task: logits[:, 0], "lower_is_damage")
    assert get_metric(None, replace(task, metric=own)) is own


def test_a_metric_of_ones_own_works_in_every_method():
    model, task = random_model("gpt2"), random_task()
    margin = circuits.Metric(
        "margin",
        lambda logits, clean_logits, task: logits.max(-1).values - logits.mean(-1),
        "lower_is_damage",
    )
    assert len(circuits.ACDC(0.05, metric=margin).discover(model, task).edges) < 110
    assert circuits.EAP(metric=margin).discover(model, task).scores.isfinite().all()
    assert (
        circuits.evaluate(
            model, circuits.EAP(metric=margin).discover(model, task).top(10), task, metrics=[margin]
        ).margin
        > 0
    )


def failing(logits, clean_logits, task):
    raise KeyError("no such column")


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (lambda logits, clean, task: logits[None], r"returned shape \(1, 4, 7\); it must return"),
        (lambda logits, clean, task: logits[:, -1, 0], r"fails with IndexError: too many indices"),
        (lambda logits, clean, task: logits[:, :0].sum(1).view(2, 3), "fails with RuntimeError"),
        (lambda logits, clean: logits[:, 0], "fails with TypeError: .*takes 2 positional"),
        (lambda logits, clean, task: logits[:, 0].numpy(), "returned ndarray; .* as a tensor"),
        (lambda logits, clean, task: [1.0] * 4, "returned list"),
        (lambda logits, clean, task: logits[:, 0] * 1j, "returned torch.complex64"),
        (lambda logits, clean, task: logits[:, 0].to_sparse(), "returned torch.float32, .*sparse"),
        (lambda logits, clean, task: logits[:, 0].to("meta"), "fails with NotImplementedError"),
        (
            failing,
            "fails with KeyError: 'no such column'. It gets logits ",
        ),
    ],
)
def test_what_a_function_does_wrong_is_told_in_a_line_that_names_the_metric(
    task, logits, clean, function, message
):
    metric = circuits.Metric("mine", function, "lower_is_damage")
    with pytest.raises(circuits.InputError, match=f"^metric 'mine' {message}") as caught:
        metric(logits, clean, task)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) <= 500


def test_memory_that_runs_out_in_a_metric_is_no_fault_of_the_metric(task, logits, clean):
    def too_large(logits, clean_logits, task):
        raise torch.OutOfMemoryError("CUDA out of memory")

    metric = circuits.Metric("mine", too_large, "lower_is_damage")
    with pytest.raises(torch.OutOfMemoryError):
        metric(logits, clean, task)


def test_whole_numbers_booleans_and_double_precision_are_numbers(task, logits, clean):
    for values in (torch.tensor([0, 1, 2, 3]), torch.tensor([True] * 4), torch.ones(4).double()):
        metric = circuits.Metric("mine", lambda *_, values=values: values, "lower_is_damage")
        found = metric(logits, clean, task)
        assert torch.equal(found, values.float())
        assert found.dtype == torch.float32


def test_a_metric_that_writes_to_its_logits_changes_them_for_nobody_else(task, logits, clean):
    def centred(logits, clean_logits, task):
        logits -= logits.mean(-1, keepdim=True)
        clean_logits.zero_()
        return logits[..., 0]

    before = logits.clone(), clean.clone()
    for vectorised in (False, True):
        metric = circuits.Metric("centred", centred, "lower_is_damage", vectorised)
        both = metric(torch.stack([logits, logits]), clean, task)
        torch.testing.assert_close(both[0], logits[:, 0] - logits.mean(-1))
    assert torch.equal(logits, before[0])
    assert torch.equal(clean, before[1])


def no_metric(logits, clean_logits, task):
    return logits[:, 0]


@pytest.mark.parametrize(
    ("metric", "message"),
    [
        (no_metric, r"is a function, .* give circuits.Metric\('no_metric', function, "),
        ("added", r"metric 'added' is a function, .* or 'lower_is_damage'"),
        ("Logit_diference", "no metric 'Logit_diference'; did you mean 'logit_difference'"),
        (["kl"], r"metric=\['kl'\] must be the name of a metric, or a circuits.Metric"),
        (3, "metric=3 must be the name"),
    ],
)
def test_what_is_no_metric_is_refused_with_how_to_make_one(
    task, monkeypatch, unchecked_types, metric, message
):
    monkeypatch.setitem(circuits.METRICS, "added", no_metric)
    with pytest.raises(circuits.InputError, match=message):
        get_metric(metric, task)


def test_name_and_function_of_a_metric_are_checked(unchecked_types):
    for name, function, told in (
        ("mine", "kl", "'mine' with function='kl': give a function of"),
        (no_metric, "mine", "name=<function no_metric.* must be a text"),
    ):
        with pytest.raises(circuits.InputError, match=told):
            circuits.Metric(name, function, "lower_is_damage")


@pytest.mark.parametrize(("name", "shipped"), ALIASES.items())
def test_metrics_are_known_by_the_names_of_other_programs_too(task, name, shipped):
    assert get_metric(name, task) is circuits.METRICS[shipped]


def test_a_metric_in_the_list_under_another_name_is_refused(task, monkeypatch):
    metric = circuits.Metric(
        "largest", lambda logits, clean, task: logits.amax(-1), "lower_is_damage"
    )
    monkeypatch.setitem(circuits.METRICS, "mine", metric)
    with pytest.raises(
        circuits.InputError, match=r"METRICS\['mine'\] holds a metric called 'largest'"
    ):
        get_metric("mine", task)


def test_a_vectorised_metric_that_is_none_is_told_what_it_gets(task, logits, clean):
    metric = circuits.Metric(
        "mine",
        lambda logits, clean, task: logits[:, 0].amax(-1),
        "lower_is_damage",
        vectorised=True,
    )
    with pytest.raises(circuits.InputError, match=r"scored row and circuit, as it is vectorised"):
        metric(torch.stack([logits, logits]), clean, task)


def test_a_vectorised_metric_that_mixes_circuits_is_refused(task, logits, clean):
    def above_average(logits, clean_logits, task):
        return logits.amax(-1) - logits.mean()

    metric = circuits.Metric("mine", above_average, "lower_is_damage", vectorised=True)
    alone = metric(logits, clean, task)
    assert torch.equal(metric(logits[None], clean, task), alone[None])
    with pytest.raises(circuits.InputError, match=r"among others and .* alone; reduce over the"):
        metric(torch.stack([logits, clean]), clean, task)


def test_a_vectorised_metric_that_compares_with_the_largest_circuit_is_refused(task, logits, clean):
    def of_the_largest(logits, clean_logits, task):
        largest = logits[..., 0]
        return largest / (largest.amax(0, keepdim=True) if logits.ndim == 3 else largest)

    metric = circuits.Metric("mine", of_the_largest, "lower_is_damage", vectorised=True)
    several = torch.stack([logits, clean, logits]).abs()
    for place in range(3):
        several[place] += 5
        with pytest.raises(
            circuits.InputError, match=r"among others and .* alone; reduce over the"
        ):
            metric(several, clean, task)
        several[place] -= 5


def test_values_of_no_circuits_are_as_precise_as_others(task, logits, clean):
    half = torch.bfloat16
    several = logits[None].to(half)
    for n in (0, 1):
        assert METRICS["kl"](several[:n], clean.to(half), task).dtype == torch.float32


def test_an_answer_counts_once_however_often_it_is_given(task, logits, clean):
    answers = torch.cat([task.answers, task.answers], 1)
    wrong = torch.cat([task.wrong_answers.flip(1), task.wrong_answers, task.wrong_answers], 1)
    repeated = Task.from_tokens(
        task.clean, task.corrupted, answers, wrong, answer_positions=task.scored
    )
    assert torch.equal(repeated.answers, task.answers)
    for metric in METRICS.values():
        expected = metric(logits, clean, task)
        torch.testing.assert_close(metric(logits, clean, repeated), expected)
    weighted = Task.from_tokens([[1]], answers=[[5, -1, 3, 5, 3, 4]])
    assert weighted.answers.tolist() == [[5, 3, 4]]


def answers_only(logits, clean_logits, task):
    """Twice the logit difference, from no other logits than those of answers."""
    return 2 * METRICS["logit_difference"].function(logits, clean_logits, task)


def test_a_metric_that_reads_answers_only_is_given_these_and_finds_the_same_circuit():
    model, task = random_model("gpt2"), random_task()
    widths = set()

    def recording(logits, clean_logits, task):
        widths.add(logits.shape[-1])
        return answers_only(logits, clean_logits, task)

    full, few = (
        circuits.ACDC(
            0.01, metric=circuits.Metric("mine", function, "lower_is_damage", reads=reads)
        ).discover(model, task)
        for function, reads in ((answers_only, "vocabulary"), (recording, "answers"))
    )
    tokens = {*task.answers.flatten().tolist(), *task.wrong_answers.flatten().tolist()} - {-1}
    assert widths == {len(tokens)}
    assert torch.equal(few.kept, full.kept)
    torch.testing.assert_close(few.scores, full.scores, atol=1e-5, rtol=0, equal_nan=True)


def test_answers_are_numbered_among_themselves_and_padding_stays(task):
    tokens, numbered = task.numbering_answers()
    assert tokens.tolist() == [0, 1, 2, 3, 5, 6]
    assert numbered.answers.tolist() == [[0, 1], [2, -1], [3, -1]]
    assert numbered.wrong_answers.tolist() == [[2, -1], [0, 1], [4, 5]]
    assert torch.equal(numbered.clean, task.clean)


def test_a_metric_that_reads_something_else_is_refused(unchecked_types):
    with pytest.raises(circuits.InputError, match="reads='answer': choose"):
        circuits.Metric("mine", answers_only, "lower_is_damage", reads="answer")
