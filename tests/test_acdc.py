"""ACDC against the original code, compiled and hand-wired models, and its own definition."""

import pytest
import torch
from architectures import random_model, random_task
from meters import damage_meter
from published import COMPILED, HAND_WIRED, case, case_model, our_edge, scored_everywhere_task
from replay import assert_sequential

import circuits
from circuits.discovery.methods.acdc import ACDC
from circuits.discovery.search.edge_order import Trial, edge_order

# Many models and methods: types are checked where each is tested.
pytestmark = pytest.mark.usefixtures("unchecked_types")

ORIGINAL = case("acdc_case/case")
# toy-world does not know the words of ordinary prose.
TASKS = sorted({*circuits.task_names()} - {"induction_prose"})
RUNS = [pytest.param(run, id=f"{run['ablation']}-{run['threshold']}") for run in ORIGINAL["runs"]]


@pytest.fixture(scope="module")
def original_case():
    model = case_model(ORIGINAL["config"], "acdc_case/model")
    return model, circuits.Task.from_tokens(
        torch.tensor(ORIGINAL["clean"]), torch.tensor(ORIGINAL["corrupted"])
    )


@pytest.mark.parametrize("run", RUNS)
def test_the_original_order_gives_the_original_codes_circuit_edge_for_edge(original_case, run):
    model, task = original_case
    ablation = {"corrupted": "resample", "zero": "zero"}[run["ablation"]]
    circuit = ACDC(run["threshold"], order="original", ablation=ablation).discover(model, task)
    # Edges inside a head (its input to its q, k or v) are the original's group tests, not edges of
    # our graph.
    expected = {
        our_edge(source, target, embed="embed")
        for source, target in run["kept_edges"]
        if not source.endswith("_input")
    }
    assert {str(edge) for edge in circuit.edges} == expected
    assert circuit.record["evaluations"] == run["edge_evaluations"]
    assert circuit.record["damage"] == pytest.approx(run["final_metric"], abs=1e-4)
    assert circuits.evaluate(model, circuit, task, ablation=ablation).kl == pytest.approx(
        run["final_metric"], abs=1e-4
    )


@pytest.mark.parametrize("run", RUNS[1:3])
def test_the_original_order_measures_what_the_original_code_measured(original_case, run):
    model, task = original_case
    circuit = ACDC(run["threshold"], order="original").discover(model, task)
    single = [
        (our_edge(source, target, embed="embed"), effect)
        for source, target, effect, _ in run["evaluations"]
        if not source.endswith("_input")
    ]
    measured = {
        str(edge): score
        for edge, score in zip(circuit.graph.edges, circuit.scores.tolist(), strict=True)
    }
    for edge, effect in single:
        assert measured[edge] == pytest.approx(effect, abs=1e-4), edge


@pytest.mark.parametrize("mode", ["resample", "resample_pad", "zero"])
@pytest.mark.parametrize("name", COMPILED)
def test_a_tiny_threshold_keeps_exactly_the_minimal_circuit_of_a_compiled_program(name, mode):
    content = case(f"tracr/{name}")
    model, task = (
        case_model(content["config"], f"tracr/{name}"),
        scored_everywhere_task(content, mode),
    )
    graph = circuits.component_graph(model, split_embed=True)
    circuit = ACDC(
        1e-3, metric="squared_error", ablation="zero" if mode == "zero" else "resample"
    ).discover(model, task, graph=graph)
    assert {str(edge) for edge in circuit.edges} == {
        our_edge(*edge) for edge in content["minimal"][mode]
    }


@pytest.mark.parametrize("mode", ["resample", "zero"])
@pytest.mark.parametrize("name", HAND_WIRED)
def test_a_tiny_threshold_keeps_exactly_the_minimal_circuit_of_a_hand_wired_model_rotated_or_not(
    name, mode
):
    content = case(f"known_circuits/{name}")
    model, task = (
        case_model(content["config"], f"known_circuits/{name}"),
        scored_everywhere_task(content, mode),
    )
    graph = circuits.component_graph(model, split_embed=True)
    circuit = ACDC(1e-3, metric="squared_error", ablation=mode).discover(model, task, graph=graph)
    assert {str(edge) for edge in circuit.edges} == {
        our_edge(*edge) for edge in content["ground_truth"][f"minimal_{mode}"]
    }


@pytest.mark.parametrize("ablation", ["resample", "zero"])
@pytest.mark.parametrize("name", ["induction", "proportion", "and", "or"])
def test_known_circuits_are_recovered_as_far_as_their_ablation_can_find_them(name, ablation):
    known = circuits.known_circuit(name, n_prompts=16)
    graph = circuits.component_graph(known.model, split_embed=True)
    circuit = ACDC(1e-3, metric="squared_error", ablation=ablation).discover(
        known.model, known.task, graph=graph
    )
    assert {str(edge) for edge in circuit.edges} == set(known.minimal[ablation])
    recovered = circuits.recovery(circuit, known.edges)
    assert recovered.precision == recovered.node_precision == 1
    assert recovered.recall == len(known.minimal[ablation]) / len(known.edges)


def assert_same(found: circuits.Circuit, expected: circuits.Circuit) -> None:
    """The same edges kept, and the same increases measured, but for rounding, which depends on what
    is measured together.
    """
    assert torch.equal(found.kept, expected.kept)
    torch.testing.assert_close(found.scores, expected.scores, atol=1e-5, rtol=0, equal_nan=True)


def replayed(model, task, graph, threshold: float, absolute: bool = False) -> set[str]:
    """ACDC from its definition: one evaluation per edge from the logits up, dead targets
    included.
    """
    damage = damage_meter(model, graph, task, metric="kl", ablation="resample")
    kept = torch.ones(len(graph), dtype=torch.bool)
    current = float(damage(kept[None])[0])
    for trial in edge_order(graph, "topological"):
        for edge in trial.edges:
            without = kept.clone()
            without[edge] = False
            increase = float(damage(without[None])[0]) - current
            if (abs(increase) if absolute else increase) < threshold:
                kept, current = without, current + increase
    return {
        str(edge)
        for edge in circuits.Circuit(graph, torch.full((len(graph),), torch.nan), kept).edges
    }


@pytest.mark.parametrize("absolute", [False, True])
@pytest.mark.parametrize("architecture", ["gpt2", "pythia", "attention_only"])
def test_targets_that_no_longer_reach_the_logits_could_have_been_tried_with_the_same_result(
    architecture, absolute
):
    model, task = random_model(architecture, n_heads=2, d_head=12), random_task(batch=4)
    graph = circuits.component_graph(model)
    circuit = ACDC(0.02, absolute=absolute).discover(model, task, graph=graph)
    assert {str(edge) for edge in circuit.edges} == replayed(model, task, graph, 0.02, absolute)
    assert 0 < len(circuit) < len(graph)
    assert circuit.record["evaluations"] <= len(graph)


def test_the_kept_circuit_does_the_damage_on_record():
    model, task = random_model("gpt2"), random_task()
    circuit = ACDC(0.02).discover(model, task)
    assert circuits.evaluate(model, circuit, task).kl == pytest.approx(
        circuit.record["damage"], abs=1e-5
    )
    assert circuit.selected
    assert circuit.connected() == circuit  # nothing dangling is left


def test_the_topological_order_goes_from_the_logits_up():
    graph = circuits.component_graph(random_model("gpt2", n_heads=2, d_head=12), split_embed=True)
    order = [
        str(graph.edges[edge]) for trial in edge_order(graph, "topological") for edge in trial.edges
    ]
    assert order[:4] == ["m1->logits", "a1.h1->logits", "a1.h0->logits", "m0->logits"]
    assert order[8:12] == ["a1.h1->m1", "a1.h0->m1", "m0->m1", "a0.h1->m1"]
    first = [
        order.index(edge)
        for edge in ("m0->a1.h1.v", "m0->a1.h1.k", "m0->a1.h1.q", "m0->a1.h0.v", "a0.h1->m0")
    ]
    assert first == sorted(first)
    assert order[-2:] == ["pos_embed->a0.h0.q", "tok_embed->a0.h0.q"]
    assert sorted(order) == sorted(map(str, graph.edges))


def test_with_positions_the_last_position_is_tried_first():
    graph = circuits.component_graph(random_model("gpt2", n_heads=2, d_head=12), positions=3)
    order = [
        str(graph.edges[edge]) for trial in edge_order(graph, "topological") for edge in trial.edges
    ]
    assert order[0] == "m1@2->logits@2"
    assert (
        order.index("m0@2->m1@2")
        < order.index("m0@1->m1@1")
        < order.index("m0@0->m1@0")
        < order.index("m0@2->a1.h1.v@2")
    )
    assert sorted(order) == sorted(map(str, graph.edges))


def test_a_threshold_that_is_no_number_is_refused():
    for threshold in (-0.1, float("nan")):
        with pytest.raises(circuits.InputError, match="threshold"):
            ACDC(threshold)


class TestSpeculation:
    """Whatever is guessed, every decision is the sequential loop's."""

    @pytest.mark.parametrize("threshold", [0.003, 0.05])
    @pytest.mark.parametrize("name", TASKS)
    def test_decisions_are_those_of_the_replayed_sequential_search(
        self, toy_world, name, threshold
    ):
        task = circuits.load_task(name, toy_world, n=4, split="train")
        circuit = ACDC(threshold).discover(toy_world, task)
        assert (
            assert_sequential(circuit, toy_world, task, threshold) == circuit.record["evaluations"]
        )
        assert 0 < len(circuit) < len(circuit.graph) / 2

    @pytest.mark.parametrize("architecture", ["llama", "alibi", "bidirectional"])
    def test_in_the_original_order_too(self, architecture):
        model, task = random_model(architecture), random_task(ragged=True)
        circuit = ACDC(0.02, order="original").discover(model, task)
        assert_sequential(circuit, model, task, 0.02, order="original")

    def test_on_a_model_of_gpt2_smalls_shape_and_some_of_its_edges(self):
        model = random_model(
            "gpt2", n_layers=12, d_model=768, n_heads=12, d_head=64, d_mlp=3072, act_fn="gelu_new"
        )
        task = random_task(batch=2, length=6)
        whole = circuits.component_graph(model)
        assert len(whole) == 32_491
        order = [edge for trial in edge_order(whole, "topological") for edge in trial.edges]
        some = order[:157:12] + order[1000:20_000:1500] + order[-30:]
        graph = whole.only([whole.edges[edge] for edge in some])
        circuit = ACDC(1e-4).discover(model, task, graph=graph)
        assert_sequential(circuit, model, task, 1e-4)
        assert 0 < len(circuit) < len(graph)

    def test_one_decision_at_a_time_gives_the_same_circuit(self, toy_world):
        task = circuits.load_task("docstring", toy_world, n=8, split="train")
        guessed, sequential = (
            ACDC(0.01, speculate=speculate).discover(toy_world, task) for speculate in (True, False)
        )
        assert_same(guessed, sequential)
        assert sequential.record["accepted"] == 1
        assert sequential.record["batches"] == sequential.record["evaluations"]

    def test_the_record_counts_what_was_done(self, toy_world):
        task = circuits.load_task("ioi", toy_world, n=8, split="train")
        record = ACDC(0.01).discover(toy_world, task).record
        assert record["evaluations"] <= record["measured"] < 3 * record["evaluations"]
        assert record["accepted"] == record["evaluations"] / record["measured"]
        assert record["batches"] < record["evaluations"] / 2
        assert record["saving"] == 479 * 4 * 5 / record["node_evaluations"] > 4

    @pytest.mark.parametrize("absolute", [False, True])
    def test_every_guess_gives_the_same_circuit(self, toy_world, absolute):
        task = circuits.load_task("induction", toy_world, n=8, split="train")
        own, removed, eap = (
            ACDC(0.01, absolute=absolute, guess=guess).discover(toy_world, task)
            for guess in ("own", "removed", "eap")
        )
        assert_same(own, removed)
        assert_same(own, eap)
        assert (
            len(
                {
                    (circuit.record["wrong"], circuit.record["measured"])
                    for circuit in (own, removed, eap)
                }
            )
            == 3
        )
        assert own.record["wrong"] < removed.record["wrong"]

    def test_a_wrong_setting_is_not_taken_for_a_guess_that_cannot_be(self, toy_world):
        task = circuits.load_task("ioi", toy_world, n=2)
        with pytest.raises(circuits.InputError, match=r"^no metric 'kld'"):
            ACDC(0.01, metric="kld", guess="eap").discover(toy_world, task)

    def test_a_guess_that_cannot_be_is_refused(self, toy_world, unchecked_types):
        with pytest.raises(
            circuits.InputError, match="guess='random': choose 'own', 'removed' or 'eap'"
        ):
            ACDC(0.01, guess="random")
        task = circuits.load_task("induction", toy_world, n=2, split="train")
        with pytest.raises(
            circuits.InputError, match=r"guess='eap' cannot be had: .* Or take guess='own'"
        ):
            ACDC(0.01, metric="accuracy", guess="eap").discover(toy_world, task)


THRESHOLDS = (0.01, 0.1, 0.003)


@pytest.fixture(scope="module")
def task(toy_world):
    return circuits.load_task("ioi", toy_world, n=8, split="train")


@pytest.fixture(scope="module")
def swept(toy_world, task):
    return ACDC(1.0).sweep(toy_world, task, THRESHOLDS)


@pytest.fixture(scope="module")
def alone(toy_world, task):
    return [ACDC(threshold).discover(toy_world, task) for threshold in THRESHOLDS]


class TestSweep:
    """Circuits of several thresholds, each search warm-started by the one before."""

    def test_each_circuit_is_that_of_a_search_at_its_threshold(self, swept, alone):
        for circuit, expected in zip(swept, alone, strict=True):
            assert_same(circuit, expected)
            assert circuit.record["settings"] == expected.record["settings"]
            assert circuit.record["evaluations"] == expected.record["evaluations"]
            assert circuit.record["damage"] == pytest.approx(expected.record["damage"], abs=1e-5)

    def test_after_the_first_search_fewer_guesses_are_wrong_and_fewer_edges_measured(
        self, swept, alone
    ):
        lowest_and_middle, highest = (2, 0), 1
        assert swept[highest].record == alone[highest].record, "the highest threshold comes first"
        for later in lowest_and_middle:
            for count in ("measured", "wrong", "batches"):
                assert swept[later].record[count] < alone[later].record[count]

    def test_it_does_not_matter_what_the_first_search_is_expected_to_keep(
        self, toy_world, task, swept
    ):
        for circuit, expected in zip(
            ACDC(1.0, guess="eap").sweep(toy_world, task, THRESHOLDS), swept, strict=True
        ):
            assert_same(circuit, expected)
        (again,) = ACDC(1.0).sweep(toy_world, task, [0.01], guess=swept[0])
        assert_same(again, swept[0])
        assert again.record["wrong"] == 0
        assert again.record["measured"] == again.record["evaluations"]

    def test_a_sweep_that_was_interrupted_goes_on(self, toy_world, task, swept, tmp_path):
        steps: list[tuple[int, int]] = []

        def stop_now_and_then(done: int, total: int) -> None:
            steps.append((done, total))
            if len(steps) % 11 == 0:
                raise KeyboardInterrupt

        for _ in range(100):
            try:
                resumed = ACDC(1.0).sweep(
                    toy_world, task, THRESHOLDS, checkpoint=tmp_path, progress=stop_now_and_then
                )
                break
            except KeyboardInterrupt:
                continue
        assert resumed == swept
        assert [circuit.record for circuit in resumed] == [circuit.record for circuit in swept]
        assert steps == [(done, steps[-1][0]) for done in range(1, steps[-1][0] + 1)], (
            "a step was taken twice"
        )
        # Each file is that of a search at its threshold, so that more thresholds, or one alone,
        # start from what is there.
        steps.clear()
        file = tmp_path / "0.01.safetensors"
        assert (
            ACDC(0.01).discover(toy_world, task, checkpoint=file, progress=stop_now_and_then)
            == swept[0]
        )
        assert not steps

    def test_thresholds_may_come_twice_and_in_any_order(self, toy_world, task, swept):
        lowest, middle, highest = swept[2], swept[0], swept[1]
        thresholds = (0.003, 0.01, 0.1, 0.01)
        expected = [lowest, middle, highest, middle]
        assert ACDC(1.0).sweep(toy_world, task, thresholds) == expected
        assert ACDC(1.0).sweep(toy_world, task, iter(thresholds)) == expected

    @pytest.mark.parametrize(
        ("thresholds", "told"),
        [([], "no thresholds"), ([0.01, -1.0], "threshold=-1.0"), ([float("nan")], "nan")],
    )
    def test_thresholds_that_cannot_be_are_refused(self, toy_world, task, thresholds, told):
        with pytest.raises(circuits.InputError, match=told):
            ACDC(1.0).sweep(toy_world, task, thresholds)

    def test_a_guess_over_another_graph_and_a_file_for_a_folder_are_refused(
        self, toy_world, task, swept, tmp_path
    ):
        split = circuits.component_graph(toy_world, split_embed=True)
        with pytest.raises(
            circuits.InputError, match=r"guess is a circuit over another graph \(479 edges"
        ):
            ACDC(1.0).sweep(toy_world, task, [0.01], graph=split, guess=swept[0])
        (tmp_path / "file").touch()
        with pytest.raises(
            circuits.InputError,
            match="is a file; a sweep has a file for each threshold: give a folder",
        ):
            ACDC(1.0).sweep(toy_world, task, [0.01], checkpoint=tmp_path / "file")

    def test_split_by_position_a_run_of_the_model_computes_no_more_nodes(self):
        """Against a run of the whole model for each edge: as many nodes as it has heads and MLPs,
        at however many positions edges lie.
        """
        model, task = random_model(), random_task()
        graph = circuits.component_graph(model, positions=8)
        record = ACDC(0.02).discover(model, task, graph=graph).record
        assert record["saving"] == len(graph) * 2 * 5 / record["node_evaluations"]


@pytest.mark.parametrize("speculate", [True, False])
def test_the_grouped_order_tries_slots_before_their_edges(speculate):
    model, task = random_model("gpt2"), random_task()
    circuit = ACDC(0.02, order="grouped", speculate=speculate).discover(model, task)
    assert_sequential(circuit, model, task, 0.02, order="grouped")
    every = ACDC(0.02).discover(model, task)
    assert circuit.record["evaluations"] < every.record["evaluations"]


def test_the_grouped_order_has_each_slot_once_but_the_logits_only_edge_by_edge():
    graph = circuits.component_graph(random_model("gpt2"))
    trials = edge_order(graph, "grouped")
    together, alone = (
        [trial.edges for trial in trials if trial.together == group] for group in (True, False)
    )
    assert sorted(edge for edges in alone for edge in edges) == [*range(len(graph))]
    into_logits = [edges for edges in alone if str(graph.edges[edges[0]].target) == "logits"]
    assert {*together} == {*alone} - {*into_logits}
    for edges in together:
        places = [trials.index(Trial(edges, group)) for group in (True, False)]
        assert places == sorted(places)
