"""The incremental executor against the reference, and what it does when it cannot go on."""

import math
import warnings
from dataclasses import replace

import pytest
import torch
from architectures import ARCHITECTURES, random_model, random_task

import circuits
from circuits.models.backend import backend
from circuits.models.layers.functional import multiply
from circuits.models.layers.packed import CALLS_BEFORE, PackedProduct, packed
from circuits.running.ablation import get_ablation
from circuits.running.hooked import HookedExecutor
from circuits.running.incremental.batch import VariantRun
from circuits.running.incremental.executor import IncrementalExecutor
from circuits.running.incremental.rates import measured
from circuits.running.incremental.shared_inputs import DistinctHeads
from circuits.running.incremental.sublayer_run import TaskModel
from circuits.running.variants import Variants
from circuits.system.messages import warn_once

ABLATIONS = ["resample", "zero", "mean"]


def executors(model, graph, task, ablation="resample"):
    chosen = get_ablation(ablation)
    return HookedExecutor.prepare(model, graph, task, chosen), IncrementalExecutor.prepare(
        model, graph, task, chosen
    )


def random_masks(graph, *shares: float, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.stack([torch.rand(len(graph), generator=generator) < share for share in shares])


def assert_equal(reference, incremental, kept) -> None:
    torch.testing.assert_close(incremental.logits(kept), reference.logits(kept), atol=1e-4, rtol=0)


@pytest.mark.usefixtures("unchecked_types")
@pytest.mark.parametrize("ablation", ABLATIONS)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_random_circuits_are_those_of_the_reference(architecture, ablation):
    # Where zeros leave nothing to read, RMSNorm divides what rounding leaves of it by 0.001.
    model = random_model(architecture, dtype=torch.float64)
    task = random_task(ragged=True, several=True)
    for graph in (circuits.component_graph(model), circuits.component_graph(model, positions=8)):
        reference, incremental = executors(model, graph, task, ablation)
        assert_equal(reference, incremental, random_masks(graph, 1, 0.97, 0.8, 0.6))
        assert_equal(reference, incremental, random_masks(graph, 0.4, 0.2, 0.05, 0))


@pytest.mark.usefixtures("unchecked_types")
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_candidates_near_a_circuit_are_those_of_the_reference(architecture):
    model, task = random_model(architecture), random_task(ragged=True)
    graph = circuits.component_graph(model)
    reference, incremental = executors(model, graph, task)
    kept = torch.ones(len(graph), dtype=torch.bool)
    for round_number in range(4):  # smaller and smaller, as in a search
        kept = kept & random_masks(graph, 0.7, seed=round_number)[0]
        incremental.near(kept)
        assert_equal(
            reference,
            incremental,
            kept & random_masks(graph, 1, 0.98, 0.9, 0.5, seed=10 + round_number),
        )
    # What lies elsewhere is right as well, and nothing of it is kept.
    assert_equal(reference, incremental, random_masks(graph, 0.9, 0.3, seed=20))
    assert_equal(reference, incremental, kept[None])


@pytest.mark.parametrize("architecture", ["gpt2", "pythia", "qwen3"])
def test_every_edge_alone_is_as_in_the_reference(architecture):
    model, task = random_model(architecture), random_task()
    graph = circuits.component_graph(model)
    reference, incremental = executors(model, graph, task)
    assert_equal(reference, incremental, ~torch.eye(len(graph), dtype=torch.bool))


@pytest.mark.usefixtures("unchecked_types")
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_circuits_that_share_what_heads_read_are_those_of_the_reference(architecture, monkeypatch):
    whole, used = DistinctHeads.write_changes, []
    monkeypatch.setattr(DistinctHeads, "worthwhile", lambda heads, n_variants: True)
    monkeypatch.setattr(
        DistinctHeads,
        "write_changes",
        lambda heads, *arguments: used.append(heads) or whole(heads, *arguments),
    )
    model, task = random_model(architecture), random_task(ragged=True, several=True)
    for graph in (circuits.component_graph(model), circuits.component_graph(model, positions=8)):
        into_heads = torch.tensor(
            [isinstance(node, circuits.Head) and node.layer == 1 for node in graph.nodes]
        )[graph.target]
        base = random_masks(graph, 0.9)[0]
        few = random_masks(graph, 0.8, 0.8, 0.5) | ~into_heads
        of_one_slot = [base & (few[0] | (graph.slot != slot)) for slot in range(3)]
        kept = torch.stack([base, *(base & few), base & few[0] & few[1], *of_one_slot, base])
        reference, incremental = executors(model, graph, task)
        incremental.near(base)
        assert_equal(reference, incremental, kept)
    assert any(len(heads.step.numbers) > 1 for heads in used)


def test_a_head_that_reads_the_same_in_many_circuits_is_computed_once():
    model, task = random_model("gpt2"), random_task()
    graph = circuits.component_graph(model)
    _, incremental = executors(model, graph, task)
    kept = torch.ones(len(graph), dtype=torch.bool)
    incremental.near(kept)
    kept = kept.repeat(10, 1)
    kept[:5, graph.index("embed->a1.h0.q")] = False
    kept[5:, graph.index("embed->a1.h1.v")] = False
    kept[:, graph.index("embed->a1.h2.k")] = kept[:, graph.index("embed->a1.h3.v")] = False
    without_mlp = kept & ~graph.mask([f"a1.h{head}->m1" for head in range(4)])
    incremental.near(without_mlp.any(0))
    before = incremental.counts["node_evaluations"]
    incremental.logits(without_mlp)
    assert incremental.counts["node_evaluations"] - before == 2


def test_edges_between_named_spans_and_split_embeddings_are_ablated_as_in_the_reference(toy_world):
    task = circuits.load_task("ioi", toy_world, n=6)
    for options in ({"positions": ["S1", "S2", "END"]}, {"split_embed": True}):
        graph = circuits.component_graph(toy_world, **options)
        reference, incremental = executors(toy_world, graph, task)
        assert_equal(reference, incremental, random_masks(graph, 0.95, 0.6, 0.2))


def test_a_graph_that_lacks_edges_leaves_them_alone():
    model, task = random_model("gpt2"), random_task()
    whole = circuits.component_graph(model)
    some = torch.arange(0, len(whole), 3)
    graph = circuits.Graph(
        whole.nodes, whole.source[some], whole.target[some], whole.slot[some], model=whole.model
    )
    reference, incremental = executors(model, graph, task)
    assert_equal(reference, incremental, random_masks(graph, 0.7, 0.1))


def test_prompts_scored_before_they_differ_and_prompts_that_do_not_differ_are_as_in_the_reference():
    model, task = random_model("gpt2"), random_task(batch=3)
    scored = torch.zeros_like(task.clean, dtype=torch.bool)
    scored[:, 0] = scored[:, 5] = True
    corrupted = task.corrupted.clone()
    corrupted[1] = task.clean[1]
    same = circuits.Task.from_tokens(task.clean, corrupted, answer_positions=scored)
    graph = circuits.component_graph(model)
    reference, incremental = executors(model, graph, same)
    assert_equal(reference, incremental, random_masks(graph, 0.9, 0.5, 0.1))


def test_a_double_precision_model_is_computed_in_double_precision():
    model, task = random_model("llama", dtype=torch.float64), random_task()
    graph = circuits.component_graph(model)
    reference, incremental = executors(model, graph, task)
    kept = random_masks(graph, 0.8, 0.3)
    torch.testing.assert_close(incremental.logits(kept), reference.logits(kept), atol=1e-12, rtol=0)


def test_the_work_falls_with_the_circuit():
    model, task = random_model("gpt2", n_layers=4), random_task()
    graph = circuits.component_graph(model)
    _, incremental = executors(model, graph, task)

    def work(kept) -> int:
        before = incremental.counts["node_evaluations"]
        incremental.near(kept)
        without = kept.clone()
        without[int(kept.nonzero()[-1])] = False
        incremental.logits(without[None])
        return incremental.counts["node_evaluations"] - before

    path = graph.mask(["embed->m0", "m0->a3.h0.v", "a3.h0->m3", "m3->logits"])
    assert work(torch.ones(len(graph), dtype=torch.bool)) == 0  # only the logits read the last edge
    incremental.near(path)
    before = incremental.counts["node_evaluations"]
    incremental.logits((path & ~graph.mask(["embed->m0"]))[None])
    assert incremental.counts["node_evaluations"] - before == 3  # m0, a3.h0, m3


class TestWhatCannotBeRunIncrementally:
    @pytest.fixture(autouse=True)
    def nothing_said_yet(self):
        warn_once.cache_clear()

    def changed(self):
        """A model with a hook of the user's that changes what heads write: no node computes what
        its weights say.
        """
        model = random_model("gpt2")
        model.add_hook("blocks.0.attn.hook_z", lambda activation, hook: activation * 1.5)
        return model

    def test_falls_back_to_the_reference_and_says_so(self):
        model, task = self.changed(), random_task()
        graph = circuits.component_graph(model)
        kept = random_masks(graph, 0.5)
        with pytest.warns(UserWarning, match=r"run by the reference executor.*outputs differ"):
            found = circuits.run_circuits(model, graph, kept, task)
        torch.testing.assert_close(
            found, circuits.run_circuits(model, graph, kept, task, executor="hooks")
        )

    def test_is_said_once(self):
        model, task = self.changed(), random_task()
        whole = circuits.Circuit.full(circuits.component_graph(model))
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("default")
            for _ in range(3):
                circuits.run_circuit(model, whole, task)
        assert (
            len([warning for warning in caught if "reference executor" in str(warning.message)])
            == 1
        )

    def test_is_refused_where_the_incremental_executor_is_asked_for(self):
        model, task = self.changed(), random_task()
        with pytest.raises(
            circuits.InputError, match=r"cannot be run incrementally.*executor='auto'"
        ):
            circuits.run_circuit(
                model,
                circuits.Circuit.full(circuits.component_graph(model)),
                task,
                executor="incremental",
            )

    def test_a_last_step_that_is_not_what_it_is_said_to_be_is_found_by_its_logits(
        self, monkeypatch
    ):
        model, task = random_model("gpt2"), random_task()
        whole = circuits.Circuit.full(circuits.component_graph(model))
        # Where nothing looks for changes, so that the model looks like any other.
        kind = type(backend(model))
        plain = kind.last_step
        monkeypatch.setattr(kind, "last_step", lambda self, x: plain(self, x) * 0.5)
        with pytest.warns(UserWarning, match="last norm or unembedding"):
            found = circuits.run_circuit(model, whole, task)
        torch.testing.assert_close(
            found, model(task.clean)[task.scored].detach() * 0.5, atol=1e-4, rtol=0
        )

    def test_positions_that_depend_on_the_length_of_the_prompt_are_left_to_the_reference(self):
        model, task = random_model("gpt2", use_logn_attn=True), random_task()
        with pytest.warns(UserWarning, match="positions enter its attention"):
            circuits.run_circuit(
                model, circuits.Circuit.full(circuits.component_graph(model)), task
            )


class TestMemory:
    def test_a_smaller_budget_takes_smaller_steps_to_the_same_logits(self):
        model, task = random_model("gpt2"), random_task()
        graph = circuits.component_graph(model)
        kept = random_masks(graph, *[0.9] * 12)
        roomy, tight = (
            IncrementalExecutor.prepare(
                model, graph, task, get_ablation("resample"), max_memory=bytes_
            )
            for bytes_ in (1 << 30, 1 << 20)
        )
        torch.testing.assert_close(tight.logits(kept), roomy.logits(kept), atol=1e-5, rtol=0)
        assert roomy.counts["batches"] == 1 < tight.counts["batches"]

    def test_running_out_of_memory_makes_steps_smaller_and_loses_nothing(self, monkeypatch):
        model, task = random_model("gpt2"), random_task()
        graph = circuits.component_graph(model)
        kept = random_masks(graph, *[0.9] * 8)
        executor = IncrementalExecutor.prepare(model, graph, task, get_ablation("resample"))
        expected, whole, sizes = executor.logits(kept), VariantRun.execute, []

        def failing(run):
            sizes.append(run.n_variants)
            if run.n_variants > 2:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")
            return whole(run)

        monkeypatch.setattr(VariantRun, "execute", failing)
        torch.testing.assert_close(executor.logits(kept), expected, atol=1e-5, rtol=0)
        assert sizes == [8, 4, 2, 2, 2, 2]

    @pytest.mark.parametrize(
        ("owner", "step", "message"),
        [
            (VariantRun, "execute", "memory runs out even with one circuit"),
            (VariantRun, "commit", "memory runs out even with one circuit"),
            (TaskModel, "run", "memory runs out even with one run of the prompts"),
        ],
    )
    def test_memory_that_is_too_small_for_one_circuit_is_an_error_of_the_user(
        self, monkeypatch, owner, step, message
    ):
        def failing(*arguments):
            raise RuntimeError(
                "[enforce fail at alloc_cpu.cpp:127] . DefaultCPUAllocator: can't allocate memory"
            )

        monkeypatch.setattr(owner, step, failing)
        with pytest.raises(circuits.InputError, match=message):
            circuits.ACDC(0.02).discover(random_model("gpt2"), random_task())

    def test_a_budget_that_is_no_number_of_bytes_is_refused(self):
        model, task = random_model("gpt2"), random_task()
        with pytest.raises(circuits.InputError, match="max_memory=0"):
            circuits.run_circuit(
                model, circuits.Circuit.full(circuits.component_graph(model)), task, max_memory=0
            )


class TestTheLogits:
    """They are computed a few circuits at a time, and of few tokens if no others are read."""

    @pytest.fixture
    def executor(self):
        model, task = random_model("gpt2"), random_task()
        graph = circuits.component_graph(model)
        return IncrementalExecutor.prepare(model, graph, task, get_ablation("resample"))

    @pytest.fixture
    def kept(self, executor):
        return torch.rand(7, len(executor.whole.kept)) < 0.9

    def test_are_the_same_in_pieces(self, executor, kept, monkeypatch):
        expected = executor.logits(kept)
        monkeypatch.setitem(vars(executor.model), "unembedded_together", 2)
        torch.testing.assert_close(executor.logits(kept), expected, atol=1e-5, rtol=0)

    def test_are_those_of_some_tokens(self, executor, kept):
        tokens = torch.tensor([5, 2])
        expected = executor.logits(kept)[..., tokens]
        found = executor.at_tokens(tokens).logits(kept)
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)

    def test_of_some_tokens_do_not_depend_on_what_is_computed_with_them(self, executor):
        # Else edges without any effect would not score exactly 0.
        few = executor.model.unembedding.at_tokens(torch.tensor([5, 2]))
        stream = torch.randn(64, executor.model.shape.d_model)
        together = few(stream, multiply)
        alone = [few(row[None], multiply) for row in stream]
        assert torch.equal(together, torch.cat(alone))

    def test_take_no_more_memory_than_the_user_allows(self, executor, kept):
        model = replace(executor.model, max_memory=1 << 14)
        assert 1 <= model.unembedded_together < executor.model.unembedded_together
        assert model.wide_product.most_bytes == 1 << 14
        assert replace(model, max_memory=1).unembedded_together == 1

    def test_of_a_wide_vocabulary_are_products_with_a_copy(self, copies):
        weight, rows, bias = torch.randn(64, 70_000), torch.randn(5, 64), torch.randn(70_000)
        expected = rows.double() @ weight.double() + bias
        product = PackedProduct(most_bytes=1 << 30)
        for _ in range(CALLS_BEFORE + 1):
            found = product(rows, weight, bias)
            torch.testing.assert_close(found.double(), expected, atol=1e-3, rtol=1e-4)
        (copy,) = copies
        assert copy is not None

    @pytest.mark.parametrize(
        ("size", "dtype", "most_bytes"),
        [
            (70_000, torch.float64, 1 << 30),
            (100, torch.float32, 1 << 30),
            (70_000, torch.float32, 9),
        ],
        ids=["float64", "small", "too large"],
    )
    def test_are_plain_products_otherwise(self, copies, size, dtype, most_bytes):
        weight, rows = torch.randn(64, size, dtype=dtype), torch.randn(5, 64, dtype=dtype)
        product = PackedProduct(most_bytes)
        for _ in range(CALLS_BEFORE + 1):
            torch.testing.assert_close(product(rows, weight), rows @ weight)
        assert not any(copies)


@pytest.fixture
def copies(monkeypatch):
    """What tries to copy a matrix gave: a product, or None."""
    tries = []

    def recording(weight):
        tries.append(packed(weight))
        return tries[-1]

    monkeypatch.setattr("circuits.models.layers.packed.packed", recording)
    return tries


class TestVariants:
    def test_are_what_masks_say(self):
        kept = torch.rand(6, 40) < 0.8
        kept[:, :10] = True
        variants = Variants.of(kept)
        assert len(variants.edges) <= 30
        assert torch.equal(variants.dense(), kept)
        assert torch.equal(variants.union, kept.any(0))
        assert variants.n_kept == int(kept.sum())
        assert torch.equal(variants[2:4].dense(), kept[2:4])
        other = torch.rand(40) < 0.5
        differing, stays = variants.differing_from(other)
        assert differing.tolist() == (kept != other).any(0).nonzero()[:, 0].tolist()
        assert torch.equal(torch.from_numpy(stays), kept[:, differing])

    def test_can_include_the_circuit_itself(self):
        circuit = torch.tensor([True, False, True, True])
        without = Variants.without_each(circuit, [0, 3])
        expected = [[False, False, True, True], [True, False, True, False], circuit.tolist()]
        assert without.with_circuit().dense().tolist() == expected

    def test_that_are_the_other_circuit_differ_nowhere(self):
        circuit = torch.tensor([True, False, True, True])
        without = Variants.without_each(circuit, [2])
        differing, stays = without.differing_from(without.dense()[0])
        assert differing.tolist() == []
        assert stays.shape == (1, 0)


def test_rates_of_a_device_are_measured_to_a_power_of_two():
    rates = measured(torch.device("cpu"))
    for overhead in (rates.step, rates.weight):
        assert overhead > 0
        assert math.log2(overhead).is_integer()
    # A step is no product of large matrices, and no row of a product takes as long as reading one.
    assert 1e4 < rates.step < 1e11
    assert rates.weight < 1e3
