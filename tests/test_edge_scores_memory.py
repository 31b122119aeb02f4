"""What gradient methods cost: passes of the model, and memory against `max_memory`."""

import re
from dataclasses import replace
from functools import partial

import pytest
import torch
from architectures import ARCHITECTURES, of_hooked_transformers, random_model, random_task
from test_propagation_rules import Conductance

import circuits
from circuits.discovery.gradients.edge_products import BatchProducts
from circuits.discovery.gradients.edge_scores import EdgeScoring
from circuits.discovery.gradients.memory import needed
from circuits.discovery.methods.eap import EAP, EAPIG
from circuits.runs.circuit_run import counting_passes
from circuits.tasks.metrics import METRICS

# Many models and methods: types are checked where each is tested.
pytestmark = pytest.mark.usefixtures("unchecked_types")

MODEL = {"n_layers": 4, "d_model": 48, "n_heads": 6, "d_head": 8, "d_mlp": 96}


@pytest.fixture(scope="module")
def model():
    return random_model("gpt2", **MODEL)


@pytest.fixture(scope="module")
def task():
    return random_task(batch=16, length=12, several=True)


def most_allocated(call) -> int:
    """The most bytes that torch's allocator gave out at one time, above what it had given out
    before.
    """
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as profiler:
        call()
    events = [
        event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"
    ]
    held = most = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        most = max(most, held)
    return most


def smallest_memory(method, model, task) -> int:
    """What one prompt may need, as the error says it."""
    message = r"one prompt of 12 tokens may need up to [\d,]+ bytes.*, but max_memory=1: allow more"
    with pytest.raises(circuits.InputError, match=message) as caught:
        method(max_memory=1).discover(model, task)
    return int(re.search(r"up to ([\d,]+) bytes", str(caught.value))[1].replace(",", ""))


@pytest.fixture
def batches(monkeypatch):
    """The number of prompts of each batch that is run."""
    sizes: list[int] = []
    batch = EdgeScoring.batch

    def noting(self, prompts):
        sizes.append(len(self.task[prompts]))
        return batch(self, prompts)

    monkeypatch.setattr(EdgeScoring, "batch", noting)
    return sizes


@pytest.mark.parametrize("method", [EAP, partial(EAPIG, steps=2)], ids=["eap", "eap-ig"])
def test_memory_stays_within_a_fifth_of_max_memory_and_more_of_it_means_larger_batches(
    method, model, task, batches
):
    graph = circuits.component_graph(model)
    whole = method().discover(model, task, graph=graph)
    assert batches == [len(task)]
    one = smallest_memory(method, model, task)
    largest = []
    for max_memory in (one, 3 * one, 6 * one):
        batches.clear()
        found = []
        peak = most_allocated(
            lambda: found.append(method(max_memory=max_memory).discover(model, task, graph=graph))  # noqa: B023
        )
        assert peak <= 1.2 * max_memory
        assert sum(batches) == len(task)
        largest.append(max(batches))
        torch.testing.assert_close(found[0].scores, whole.scores, atol=1e-6, rtol=1e-4)
    assert largest == sorted(set(largest)), "more memory, larger batches"


def test_details_stay_within_max_memory_and_do_not_depend_on_it(model, task):
    whole = EAP().attribute(model, task)
    max_memory = 3 * smallest_memory(EAP, model, task)
    found = []
    assert (
        most_allocated(lambda: found.append(EAP(max_memory=max_memory).attribute(model, task)))
        <= 1.2 * max_memory
    )
    for name in ("edges_by_prompt", "sources_by_position", "neurons"):
        torch.testing.assert_close(
            getattr(found[0], name), getattr(whole, name), atol=1e-5, rtol=1e-4
        )


def test_when_the_changes_of_all_sources_do_not_fit_they_come_in_pieces(model, task, monkeypatch):
    """Bounded to what the model's passes take, a prompt's products are made from some layers'
    sources at a time.
    """
    whole = EAP().discover(model, task[:1])
    pieces = []
    outputs = circuits.running.ablation.Changes.outputs

    def noting(self, rows):
        pieces.append(rows)
        return outputs(self, rows)

    monkeypatch.setattr("circuits.running.ablation.Changes.outputs", noting)
    monkeypatch.setattr(
        "circuits.discovery.gradients.edge_scores.memory_budget", lambda *_, **__: 1
    )
    torch.testing.assert_close(
        EAP().discover(model, task[:1]).scores, whole.scores, atol=1e-6, rtol=1e-4
    )
    # The embedding, and for each layer its heads together and its MLP.
    assert [(rows.start, rows.stop) for rows in pieces][:4] == [(0, 1), (1, 7), (7, 8), (8, 14)]


@pytest.mark.parametrize("method", [EAP(), EAPIG(steps=3)], ids=["eap", "eap-ig"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_bound_by_which_the_first_batch_is_chosen_is_never_too_small(
    architecture, method, monkeypatch
):
    model, task = (
        random_model(architecture, **({} if architecture == "attention_only" else {"d_mlp": 96})),
        random_task(batch=4),
    )
    bounds = []

    def noting(*arguments):
        bounds.append(needed(*arguments))
        return bounds[-1]

    monkeypatch.setattr("circuits.discovery.gradients.edge_scores.needed", noting)
    peak = most_allocated(lambda: method.attribute(model, task))
    (fixed, per_prompt), *_ = bounds
    assert peak <= fixed + per_prompt * len(task)


def test_when_memory_runs_out_batches_are_halved(model, task, batches, monkeypatch):
    whole = EAP().discover(model, task).scores
    batches.clear()
    counted = EdgeScoring.batch

    def failing(self, prompts):
        result = counted(self, prompts)
        if batches[-1] > 4:
            raise torch.OutOfMemoryError("out of memory")
        return result

    monkeypatch.setattr(EdgeScoring, "batch", failing)
    torch.testing.assert_close(EAP().discover(model, task).scores, whole, atol=1e-6, rtol=1e-4)
    assert batches == [16, 8, 4, 4, 4, 4]


@pytest.mark.parametrize(
    ("method", "passes"),
    [
        (EAP(), 2),
        (EAP(metric="kl", gradient_at="corrupted"), 2),
        (EAP(gradient_at="both"), 2),
        (EAP(ablation="zero"), 1),
        (EAPIG(steps=5), 7),
        (EAPIG(steps=5, quadrature="left"), 6),
    ],
    ids=repr,
)
def test_no_pass_is_made_twice(method, passes, model, task):
    graph = circuits.component_graph(model)
    with counting_passes(model) as counted:
        method.discover(model, task, graph=graph)
    assert counted["forward_passes"] == passes


@of_hooked_transformers
def test_a_users_flags_of_hooks_change_nothing_and_are_put_back(task):
    model = random_model("llama")
    graph, plain = circuits.component_graph(model), EAP().discover(model, random_task()).scores
    flags = (
        "use_split_qkv_input",
        "use_attn_result",
        "use_hook_mlp_in",
        "ungroup_grouped_query_attention",
    )
    for flag in flags:
        setattr(model.cfg, flag, True)
    torch.testing.assert_close(EAP().discover(model, random_task(), graph=graph).scores, plain)
    assert all(getattr(model.cfg, flag) for flag in flags)
    assert model.blocks[0].attn.repeat_kv_heads == 2


def test_memory_that_is_no_number_of_bytes_is_refused(model, task):
    with pytest.raises(circuits.InputError, match="positive number of bytes"):
        EAP(max_memory=0).discover(model, task)
    assert EAP(max_memory=1 << 30).identity() == EAP().identity()


def own_metric(task, calls):
    """Knows a token of each prompt and a weight of each row, and compares rows."""
    generator = torch.Generator().manual_seed(5)
    token = torch.randint(50, (len(task),), generator=generator)
    weight = torch.rand(len(task.row_prompt), generator=generator)

    def values(logits, clean_logits, given):
        calls.append(len(given))
        own = logits.gather(1, token[given.row_prompt][:, None])[:, 0]
        spread = (logits - logits.mean(0)) / (logits.std(0) + 0.5)
        return weight * (own + spread.square().mean(-1)) + (logits - clean_logits)[:, 0]

    return circuits.Metric("own", values, "lower_is_damage")


@pytest.mark.parametrize(
    "method",
    [
        partial(EAP),
        partial(EAP, gradient_at="both", ablation="mean"),
        partial(EAPIG, steps=6),
        partial(EAPIG, steps=2, along="activations"),
        partial(Conductance),
    ],
)
def test_a_metric_of_ones_own_gets_all_rows_however_many_prompts_are_run_together(method, batches):
    model, task = random_model("gpt2"), random_task(batch=6, length=12, several=True)
    calls: list[int] = []
    metric = own_metric(task, calls)
    whole = method(metric=metric).attribute(model, task)
    one = smallest_memory(partial(method, metric=metric), model, task)
    calls.clear()
    batches.clear()
    found = method(metric=metric, max_memory=int(1.5 * one)).attribute(model, task)
    assert max(batches) < len(task)
    assert set(calls) == {len(task)}
    for name in ("edges", "edges_by_prompt", "sources_by_position", "neurons"):
        expected = getattr(whole, name)
        torch.testing.assert_close(
            getattr(found, name), expected, atol=1e-5 * float(expected.abs().max()), rtol=1e-4
        )


def test_a_copy_of_a_shipped_metric_gives_its_scores_bit_by_bit(model, task):
    other = replace(METRICS["squared_error"], name="other")
    for method in (partial(EAP, gradient_at="both"), partial(EAPIG, steps=12)):
        expected = method(metric="squared_error").discover(model, task).scores
        assert torch.equal(method(metric=other).discover(model, task).scores, expected)


def test_the_rows_that_a_metric_of_ones_own_gets_are_part_of_the_bound(model, task):
    metric = own_metric(task, [])
    message = r"bytes, as own is given all 24 rows at once, but max_memory=1"
    with pytest.raises(circuits.InputError, match=message):
        EAP(metric=metric, max_memory=1).discover(model, task)
    max_memory = 2 * smallest_memory(partial(EAP, metric=metric), model, task)
    method = EAP(metric=metric, max_memory=max_memory)
    assert most_allocated(lambda: method.discover(model, task)) <= 1.2 * max_memory


def test_a_batch_that_shrinks_for_want_of_memory_does_not_cut_what_the_metric_gets(
    model, task, monkeypatch
):
    calls: list[int] = []
    metric = own_metric(task, calls)
    whole = EAP(metric=metric).discover(model, task).scores
    results = BatchProducts.results

    def failing(self):
        if self.positions.shape[1] > 4:
            raise torch.OutOfMemoryError("out of memory")
        return results(self)

    monkeypatch.setattr(BatchProducts, "results", failing)
    found = EAP(metric=metric).discover(model, task).scores
    torch.testing.assert_close(found, whole, atol=1e-6, rtol=1e-4)
    assert set(calls) == {len(task)}


def test_progress_of_several_rounds_goes_up(model, task):
    seen = []
    method = EAPIG(steps=12, metric=own_metric(task, []))
    method.discover(model, task, progress=lambda done, total: seen.append(done / total))
    assert seen == sorted(seen)
    assert seen[-1] == 1


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (lambda logits, clean, task: logits[:, 0].detach(), "'mine' has no gradient"),
        (lambda logits, clean, task: logits.argmax(-1), "'mine' has no gradient"),
        (lambda logits, clean, task: torch.ones(24).requires_grad_(), "'mine' has no gradient"),
        (
            lambda logits, clean, task: (logits - clean).square().sum(-1).sqrt(),
            "gradient of metric 'mine' is NaN or infinite at .* although its values are finite",
        ),
        (
            lambda logits, clean, task: (logits.exp_().log() * logits.zero_())[:, 0],
            "'mine' cannot be differentiated .* do not write to tensors",
        ),
    ],
)
def test_a_metric_without_a_usable_gradient_is_refused(model, task, function, message):
    metric = circuits.Metric("mine", function, "lower_is_damage")
    with pytest.raises(circuits.InputError, match=message):
        EAP(metric=metric).discover(model, task)


def test_a_metric_of_ones_own_is_judged_in_batches_on_a_hooked_model_with_shared_heads(task):
    model = random_model("llama")
    metric = own_metric(task, [])
    with model.hooks(fwd_hooks=[("blocks.0.attn.hook_z", lambda z, hook: z * 1.5)]):
        whole = EAPIG(steps=2, metric=metric).discover(model, task).scores
        scoring = EAPIG(steps=2, metric=metric, max_memory=2_000_000).discover(model, task).scores
    torch.testing.assert_close(scoring, whole, atol=1e-6, rtol=1e-4)
