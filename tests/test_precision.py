"""Mixed precision: products in a small type, searches whose circuit stays that of float32."""

import numpy as np
import pytest
import torch
from architectures import ARCHITECTURES, random_model, random_task
from meters import damage_meter

import circuits
from circuits.discovery.search.confirmation import Noise, confirm
from circuits.running.ablation import get_ablation
from circuits.running.incremental.executor import IncrementalExecutor
from circuits.running.precision import DTYPES, Background, Precision
from circuits.system.messages import warn_once

# The simulation says so once, in whichever test comes first.
pytestmark = pytest.mark.filterwarnings("ignore:.*simulated:UserWarning")

# What rounding to nearest may change in a number, relative to it, or to the largest in its row
# where there is a scale.
LARGEST_ERROR = {"bfloat16": 2**-9, "float16": 2**-12, "float8_e4m3": 2**-4, "int8": 1 / 254}
TYPES = tuple(DTYPES)


def tensor(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


class TestProducts:
    @pytest.mark.parametrize("name", TYPES)
    def test_a_product_is_off_by_the_rounding_of_its_operands(self, name):
        x, weight, bias = tensor(40, 24), tensor(24, 16, seed=1), tensor(16, seed=2)
        found = Background.of(Precision(name), "cpu").product(x, weight, bias)
        gap = (found - (x @ weight + bias)).abs()
        largest = x.abs().amax(1, keepdim=True) * weight.abs().amax(0, keepdim=True) * 24
        assert 0 < gap.max()
        assert (gap < 2.1 * LARGEST_ERROR[name] * largest).all()

    @pytest.mark.parametrize("name", ["float8_e4m3", "int8"])
    def test_scales_make_the_size_of_rows_and_columns_irrelevant(self, name):
        x, weight = tensor(5, 24), tensor(24, 16, seed=1)
        rows, columns = torch.tensor([1e-6, 1, 1e3, 1e6, 3])[:, None], torch.logspace(-4, 4, 16)
        background = Background.of(Precision(name), "cpu")
        found, plain = background.product(x * rows, weight * columns), background.product(x, weight)
        torch.testing.assert_close(found / rows / columns, plain, rtol=1e-3, atol=1e-4)

    @pytest.mark.parametrize("name", TYPES)
    def test_heads_are_those_asked_for(self, name):
        background = Background.of(Precision(name), "cpu")
        x, weight, bias = tensor(2, 10, 24), tensor(4, 24, 6, seed=1), tensor(4, 6, seed=2)
        found = background.product(x, weight, bias, torch.tensor([3, 1]))
        for row, head in enumerate((3, 1)):
            torch.testing.assert_close(
                found[row], background.product(x[row], weight[head], bias[head])
            )

    @pytest.mark.parametrize("name", TYPES)
    def test_increments_are_exact_at_the_base_and_round_only_what_changed(self, name):
        weight, bias, base = tensor(24, 16, seed=1), tensor(16, seed=2), tensor(1, 7, 24)
        change = 1e-4 * tensor(3, 7, 24, seed=3)
        change[1] = 0
        x = torch.cat([base, base + change]).double()
        found = (
            Background.of(Precision(name), "cpu")
            .product_of_changes(4)(x.flatten(0, 1), weight.double(), bias.double())
            .view(4, 7, 16)
        )
        exact = x @ weight.double() + bias.double()
        assert torch.equal(found[2], found[0])
        torch.testing.assert_close(found[0], exact[0])
        # As large as the rounding of the change allows, which is ten thousand times smaller than
        # that of the values.
        assert (
            0
            < (found - exact).abs().max()
            < 2.1 * LARGEST_ERROR[name] * 24 * change.abs().max() * weight.abs().max()
        )

    def test_each_weight_is_rounded_once(self):
        background, weight = Background.of(Precision("int8"), "cpu"), tensor(24, 16)
        assert background._stored_weight(weight)[0] is background._stored_weight(weight)[0]
        assert (
            background._stored_weight(weight.clone())[0] is not background._stored_weight(weight)[0]
        )


class TestRuns:
    @pytest.mark.parametrize("architecture", ARCHITECTURES)
    def test_changes_of_logits_are_those_of_float32_but_for_rounding(self, architecture):
        model, task = random_model(architecture), random_task(ragged=True)
        graph = circuits.component_graph(model)
        target = int(
            graph.target.min()
        )  # edges into one target, far up: everything downstream is in the background
        base = torch.ones(len(graph), dtype=torch.bool)
        kept = base.repeat(3, 1)
        for row, edge in enumerate((graph.target == target).nonzero()[:3, 0]):
            kept[row, edge] = False
        mixed = IncrementalExecutor.prepare(
            model, graph, task, get_ablation("resample"), precision=Precision("bfloat16")
        )
        mixed.near(base)
        exact = mixed.exact().logits(kept)
        changes = (exact - mixed.exact().logits(base[None])).abs().max()
        gap = (mixed.logits(kept) - exact).abs().max()
        assert 0 < gap < 0.02 * changes
        torch.testing.assert_close(mixed.logits(base[None]), mixed.exact().logits(base[None]))

    def test_what_is_investigated_is_in_float32(self, toy_world):
        # Nothing is downstream of edges into the logits but the unembedding, which is under test
        # itself.
        task, graph = circuits.load_task("ioi", toy_world, n=4), circuits.component_graph(toy_world)
        into_logits = [
            edge for edge in range(len(graph)) if str(graph.edges[edge]).endswith("->logits")
        ]
        kept = torch.ones(len(into_logits), len(graph), dtype=torch.bool)
        kept[torch.arange(len(into_logits)), into_logits] = False
        mixed = IncrementalExecutor.prepare(
            toy_world, graph, task, get_ablation("resample"), precision=Precision("int8")
        )
        assert torch.equal(mixed.logits(kept), mixed.exact().logits(kept))

    def test_plain_low_precision_is_a_model_of_its_own(self, toy_world):
        task, graph = circuits.load_task("ioi", toy_world, n=4), circuits.component_graph(toy_world)
        kept = torch.ones(1, len(graph), dtype=torch.bool)
        options = {"metric": "kl", "ablation": "resample"}
        plain = damage_meter(
            toy_world,
            graph,
            task,
            precision=Precision("bfloat16", "bfloat16", confirm=False),
            **options,
        )
        whole = damage_meter(toy_world, graph, task, **options)
        assert plain.exact is None
        assert float(plain(kept)[0]) == 0
        assert 1e-4 < float((plain.clean_logits - whole.clean_logits).abs().max()) < 1


class TestConfirmation:
    """Synthetic errors: `truth` is what float32 would find, `values` what low precision found."""

    def confirmed(self, truth, errors, before, threshold, *, noise=0.0, sample=True):
        truth, values = np.array(truth, dtype=float), np.add(truth, errors, dtype=float)
        increases, asked = values[:-1] - values[before], []

        def measure(states):
            asked.extend(states.tolist())
            return truth[states]

        seen = Noise(noise)
        confirm(
            increases,
            values,
            np.array(before),
            lambda found: np.abs(found - threshold),
            measure,
            seen,
            sample=sample,
        )
        assert seen.confirmed == len(asked) == len(set(asked))
        return increases, seen.noise, asked

    def test_what_is_nearest_to_the_threshold_is_measured_and_tells_the_noise(self):
        increases, noise, asked = self.confirmed(
            [9, 0.5, 0.2, 0.1, 7, 0], [0, 0, 0.01, 0, 0, 0], [5] * 5, 0.15
        )
        assert set(asked) == {1, 2, 3, 5}
        assert noise == pytest.approx(0.01)
        assert increases == pytest.approx([9, 0.5, 0.2, 0.1, 7])

    def test_an_error_makes_others_doubtful_until_none_is_left(self):
        # The nearest are off by 0.1, so that what seems to lie up to 0.5 from the threshold is
        # measured; one of them is off by 1.6, and so on.
        truth, errors = [0, 0.1, 0.2, 2, 4, 40, 0], [0, 0.1, 0, -1.6, 0, 0, 0]
        increases, noise, asked = self.confirmed(truth, errors, [6] * 6, 0.05)
        assert set(asked) == {0, 1, 2, 3, 4, 6}
        assert noise == pytest.approx(1.6)
        assert increases[:5] == pytest.approx(truth[:5])

    def test_a_state_is_compared_with_the_one_before_it_both_in_float32(self):
        increases, _, asked = self.confirmed([1, 1.2, 0], [0.5, 0.5, 0.5], [2, 0], 0.1)
        assert set(asked) == {0, 1, 2}
        assert increases == pytest.approx([1, 0.2])

    def test_beyond_the_noise_nothing_is_measured(self):
        assert self.confirmed([1, 2, 0], [0, 0, 0], [2, 2], 0.1, noise=0.01, sample=False)[2] == []

    def test_with_noise_beyond_bounds_everything_is_measured_once(self):
        assert set(
            self.confirmed([1, 2, 0], [0.1, 0, 0], [2, 2], 0.1, noise=np.inf, sample=False)[2]
        ) == {0, 1, 2}

    def test_a_measurement_that_fails_leaves_the_noise_as_it_was(self):
        def fail(states):
            raise RuntimeError

        noise = Noise(0.5)
        increases, values, before = np.array([1.0]), np.array([1.0, 0.0]), np.array([1])
        with pytest.raises(RuntimeError):
            confirm(increases, values, before, np.abs, fail, noise, sample=True)
        assert noise == Noise(0.5)


class TestSearches:
    @pytest.mark.parametrize("task", ["ioi", "docstring"])
    def test_confirmed_the_circuit_is_that_of_float32(self, toy_world, task):
        prompts = circuits.load_task(task, toy_world, n=4)
        exact = circuits.ACDC(0.03).discover(toy_world, prompts)
        for name in TYPES:
            found = circuits.ACDC(0.03, precision=name).discover(toy_world, prompts)
            assert torch.equal(found.kept, exact.kept), name
            assert found.record["damage"] == pytest.approx(exact.record["damage"], abs=1e-5)
            assert 0 < found.record["confirmed"] < found.record["measured"]
            assert 0 < found.record["noise"] < 0.05

    def test_without_confirmation_low_precision_decides_otherwise(self, toy_world):
        task = circuits.load_task("ioi", toy_world, n=8)
        exact, mixed, confirmed = (
            circuits.ACDC(0.03, precision=precision).discover(toy_world, task)
            for precision in (
                None,
                Precision("float8_e4m3", confirm=False),
                Precision("float8_e4m3"),
            )
        )
        assert not torch.equal(mixed.kept, exact.kept)
        assert torch.equal(confirmed.kept, exact.kept)

    def test_an_interrupted_search_resumed_equals_an_uninterrupted_one(self, toy_world, tmp_path):
        task, path = circuits.load_task("ioi", toy_world, n=4), tmp_path / "checkpoint.safetensors"
        method = circuits.ACDC(0.03, precision="int8")
        whole = method.discover(toy_world, task)

        def stop(done: int, total: int) -> None:
            if done == total // 2:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            method.discover(toy_world, task, checkpoint=path, progress=stop)
        resumed = method.discover(toy_world, task, checkpoint=path)
        assert resumed == whole
        assert resumed.record == whole.record

    def test_the_record_says_how_exactly_it_was_computed(self, toy_world):
        task = circuits.load_task("ioi", toy_world, n=2)
        found = circuits.ACDC(1.0, precision=Precision("float16", confirm=False)).discover(
            toy_world, task
        )
        assert found.record["settings"]["precision"] == "float16, unconfirmed"
        assert "confirmed" not in found.record

    def test_searches_of_different_precision_are_not_taken_for_each_other(self):
        methods = [
            circuits.ACDC(0.1, precision=each)
            for each in (None, "int8", Precision("int8", confirm=False), "float16")
        ]
        methods.append(circuits.ACDC(0.1, precision=Precision("int8", "int8", confirm=False)))
        assert len({str(method.identity()) for method in methods}) == len(methods)
        assert (
            circuits.ACDC(0.1, precision="int8").identity()
            == circuits.ACDC(0.1, precision=Precision("int8")).identity()
        )


class TestMistakes:
    @pytest.mark.parametrize(
        ("options", "says"),
        [
            ({"background": "float4"}, "no background precision 'float4'; choose one of bfloat16"),
            (
                {"investigated": "float16"},
                "investigated='float16' must be 'float32', or 'bfloat16'",
            ),
            ({"investigated": "bfloat16"}, "nothing in float32 to confirm with; set confirm=False"),
        ],
    )
    def test_wrong_settings_are_named(self, options, says):
        with pytest.raises(circuits.InputError, match=says):
            Precision(**options)

    def test_a_name_is_checked_before_anything_runs(self):
        with pytest.raises(circuits.InputError, match="no background precision 'double'"):
            circuits.ACDC(0.1, precision="double")

    @pytest.mark.parametrize("precision", [3, torch.bfloat16])
    def test_a_precision_is_a_name_or_a_precision(self, precision, unchecked_types):
        with pytest.raises(
            circuits.InputError, match=r"must be a name such as 'bfloat16', or a circuits.Precision"
        ):
            circuits.ACDC(0.1, precision=precision)

    def test_a_model_in_half_precision_is_refused(self):
        with pytest.raises(
            circuits.InputError, match=r"needs a model in float32, and .* is in torch.bfloat16"
        ):
            circuits.ACDC(0.1, precision="int8").discover(
                random_model("gpt2", dtype=torch.bfloat16), random_task()
            )

    def test_the_reference_executor_has_no_precision(self, toy_world):
        task, graph = circuits.load_task("ioi", toy_world, n=2), circuits.component_graph(toy_world)
        with pytest.raises(circuits.InputError, match="needs the incremental executor"):
            damage_meter(
                toy_world,
                graph,
                task,
                metric="kl",
                ablation="resample",
                executor="hooks",
                precision=Precision("bfloat16"),
            )

    def test_a_simulation_says_so_once(self):
        warn_once.cache_clear()
        with pytest.warns(UserWarning, match="int8 is simulated on this cpu"):
            Background.of(Precision("int8"), "cpu")
        Background.of(Precision("int8"), "cpu")
