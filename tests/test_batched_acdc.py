"""Batched-edge ACDC against ACDC, against its own definition, and where edges depend on each
other.
"""

import pytest
import torch
import tyro
from architectures import random_model, random_task
from meters import damage_meter

import circuits
from circuits.cli.parsing.methods import options_of
from circuits.discovery.search.edge_order import edge_groups, edge_order

# Whole methods run: types are checked where each is tested.
pytestmark = pytest.mark.usefixtures("unchecked_types")

# Batch sizes change the last bits.
ROUNDING = 1e-5
GROUPS = ["target", "layer", 7]
SHAPES = {"llama": {"n_key_value_heads": 1}, "qwen3": {"n_key_value_heads": 1}}


def small_model(architecture: str):
    return random_model(architecture, n_heads=2, d_head=12, **SHAPES.get(architecture, {}))


def reference_meter(model, task, graph, metric="kl", ablation="resample"):
    return damage_meter(model, graph, task, metric=metric, ablation=ablation, executor="hooks")


class Definition:
    """Batched-edge ACDC from its definition, one group at a time, with the reference executor;
    nothing measured is ever reused.
    """

    def __init__(self, model, task, graph, threshold: float, group, verify: bool):
        self.graph, self.threshold, self.verify, self.group = graph, threshold, verify, group
        self.meter = reference_meter(model, task, graph)
        self.kept = torch.ones(len(graph), dtype=torch.bool)
        self.closest = float("inf")  # to the threshold that any comparison came

    def run(self):
        for edges in cut_from_definition(self.graph, self.group):
            reaching = self.meter.reaching_logits(self.kept)
            live = [edge for edge in edges if reaching[edge]]
            self.kept[edges] = False
            self.kept[live] = True
            start, *found = self.meter(
                torch.stack([self.kept, *(self.without([edge]) for edge in live)])
            ).tolist()
            self.alone = {edge: damage - start for edge, damage in zip(live, found, strict=True)}
            self.spent = 0.0
            harmless = [edge for edge in live if self.below(self.alone[edge])]
            if harmless:
                self.remove(harmless)
            self.kept[edges] &= self.meter.reaching_logits(self.kept)[list(edges)]
        return self.kept

    def remove(self, edges):
        increase = self.damage(self.without(edges)) - self.damage(self.kept)
        excess = increase - sum(self.alone[edge] for edge in edges)
        if len(edges) == 1 and self.verify:
            goes, excess = self.below(increase), 0.0
        else:
            goes = not self.verify or self.below(self.spent + excess, equal=True)
        if goes:
            self.kept, self.spent = self.without(edges), self.spent + excess
        elif len(edges) > 1:
            for half in (edges[: len(edges) // 2], edges[len(edges) // 2 :]):
                self.remove(half)

    def below(self, value, equal=False):
        self.closest = min(self.closest, abs(value - self.threshold))
        return value <= self.threshold if equal else value < self.threshold

    def without(self, edges):
        kept = self.kept.clone()
        kept[edges] = False
        return kept

    def damage(self, kept) -> float:
        return float(self.meter(kept[None])[0])


def cut_from_definition(graph, group):
    """Groups of the topological order, from the edges' names."""
    order = [edge for trial in edge_order(graph, "topological") for edge in trial.edges]
    if isinstance(group, int):
        return [order[start : start + group] for start in range(0, len(order), group)]
    groups: dict[str, list[int]] = {}
    for edge in order:
        target = str(graph.edges[edge].target)
        groups.setdefault(target.split(".")[0] if group == "layer" else target, []).append(edge)
    return list(groups.values())


def test_groups_are_cut_from_the_topological_order():
    graph = circuits.component_graph(small_model("gpt2"))
    names = {
        group: [[str(graph.edges[edge]) for edge in part] for part in edge_groups(graph, group)]
        for group in ("target", "layer", 4)
    }
    assert [len(part) for part in names["layer"]] == [7, 6, 4 * 6, 3, 6]
    assert [len(part) for part in names["target"]] == [7, 6, 12, 12, 3, 3, 3]
    assert names["target"][6] == ["embed->a0.h0.v", "embed->a0.h0.k", "embed->a0.h0.q"]
    assert names[4][1] == ["a0.h1->logits", "a0.h0->logits", "embed->logits", "a1.h1->m1"]
    for group in ("target", "layer", 4):
        assert edge_groups(graph, group) == [
            tuple(part) for part in cut_from_definition(graph, group)
        ]


def test_split_by_position_a_target_is_a_node_at_one_position():
    graph = circuits.component_graph(small_model("gpt2"), positions=3)
    assert [len(part) for part in edge_groups(graph, "target")][:3] == [7, 7, 7]
    assert [len(part) for part in edge_groups(graph, "layer")] == [21, 18, 72, 9, 18]


@pytest.mark.parametrize("verify", [False, True])
@pytest.mark.parametrize("architecture", ["gpt2", "pythia", "bidirectional"])
def test_groups_of_one_edge_are_acdc(architecture, verify):
    model, task = small_model(architecture), random_task(batch=4)
    exact, batched = (
        circuits.ACDC(0.01).discover(model, task),
        circuits.BatchedACDC(0.01, group=1, verify=verify).discover(model, task),
    )
    assert torch.equal(batched.kept, exact.kept)
    torch.testing.assert_close(batched.scores, exact.scores, atol=ROUNDING, rtol=0, equal_nan=True)
    assert batched.record["evaluations"] == exact.record["evaluations"]
    assert (
        batched.record["joint_measurements"]
        == batched.record["bisections"]
        == batched.record["largest_excess"]
        == 0
    )


def test_groups_of_one_edge_are_acdc_on_toy_world(toy_world):
    task = circuits.load_task("ioi", toy_world, n=8, split="train")
    exact, batched = (
        circuits.ACDC(0.01).discover(toy_world, task),
        circuits.BatchedACDC(0.01, group=1).discover(toy_world, task),
    )
    assert torch.equal(batched.kept, exact.kept)
    assert batched.record["damage"] == pytest.approx(exact.record["damage"], abs=ROUNDING)


@pytest.mark.parametrize("verify", [False, True])
@pytest.mark.parametrize("group", GROUPS)
@pytest.mark.parametrize("architecture", ["gpt2", "llama"])
def test_the_circuit_is_that_of_the_definition(architecture, group, verify):
    model, task = small_model(architecture), random_task(batch=4, ragged=True)
    graph = circuits.component_graph(model)
    definition = Definition(model, task, graph, 0.005, group, verify)
    expected = definition.run()
    assert definition.closest > ROUNDING, (
        "a decision too close to the threshold to be compared; choose another seed"
    )
    circuit = circuits.BatchedACDC(0.005, group=group, verify=verify).discover(
        model, task, graph=graph
    )
    assert torch.equal(circuit.kept, expected)
    assert 0 < len(circuit) < len(graph)
    assert circuit.record["damage"] == pytest.approx(definition.damage(expected), abs=ROUNDING)
    assert circuit.connected() == circuit  # nothing dangling is left


def test_an_edge_into_a_target_that_went_with_its_own_group_goes_too_whatever_its_score():
    """Alone it does damage; without the edges out of its target, removed in the same batch, nobody
    reads what it brings.
    """
    model, task, threshold, size = small_model("gpt2"), random_task(batch=4), 0.02, 25
    circuit = circuits.BatchedACDC(threshold, group=size).discover(model, task)
    graph, kept = circuit.graph, circuit.kept
    harmful_but_gone = (~kept & (circuit.scores >= threshold)).nonzero().flatten().tolist()
    assert [str(graph.edges[edge]) for edge in harmful_but_gone] == ["a0.h0->a1.h1.v"]
    (edge,) = harmful_but_gone
    (group,) = (set(part) for part in edge_groups(graph, size) if edge in part)
    onward = [
        out for out in range(len(graph)) if graph.edges[out].source == graph.edges[edge].target
    ]
    assert not kept[onward].any()
    assert any(out in group and circuit.scores[out] < threshold for out in onward)
    assert torch.equal(graph.reaching_logits(kept), kept), (
        "an edge is left that cannot reach the logits"
    )
    with_it = kept.clone()
    with_it[edge] = True
    without, restored = reference_meter(model, task, graph)(torch.stack([kept, with_it])).tolist()
    assert restored == pytest.approx(without, abs=ROUNDING) == circuit.record["damage"]


def excesses(circuit, meter, threshold: float) -> list[float]:
    """By group, the joint increase of what was removed for being harmless minus the sum of the
    scores, measured anew.
    """
    groups, states = (
        edge_groups(circuit.graph, group_of(circuit)),
        [torch.ones(len(circuit.graph), dtype=torch.bool)],
    )
    for part in map(list, groups):
        states.append(states[-1].clone())
        states[-1][part] = circuit.kept[part]
    removed = [
        [edge for edge in part if circuit.scores[edge] < threshold and not circuit.kept[edge]]
        for part in groups
    ]
    together = [number for number, edges in enumerate(removed) if len(edges) > 1]
    before, after = (
        meter(torch.stack([states[number + later] for number in together])) for later in (0, 1)
    )
    alone = torch.stack([circuit.scores[removed[number]].double().sum() for number in together])
    return (after - before - alone).tolist()


def group_of(circuit):
    return circuit.record["settings"]["group"]


@pytest.mark.parametrize(
    ("name", "group"),
    [
        ("docstring", "layer"),
        ("docstring", 64),
        ("docstring", "target"),
        ("ioi", "layer"),
        ("two_hop", 64),
    ],
)
def test_verified_no_group_does_more_damage_than_its_edges_alone_and_the_threshold(
    toy_world, name, group
):
    threshold, task = 0.005, circuits.load_task(name, toy_world, n=4, split="train")
    graph = circuits.component_graph(toy_world)
    meter = reference_meter(toy_world, task, graph)
    trusted, verified = (
        circuits.BatchedACDC(threshold, group=group, verify=verify).discover(
            toy_world, task, graph=graph
        )
        for verify in (False, True)
    )
    assert max(excesses(verified, meter, threshold)) <= threshold + ROUNDING
    assert verified.record["excess_left"] <= threshold
    assert max(0, *excesses(verified, meter, threshold)) == pytest.approx(
        verified.record["excess_left"], abs=ROUNDING
    )
    assert max(0, *excesses(trusted, meter, threshold)) == pytest.approx(
        trusted.record["excess_left"], abs=ROUNDING
    )
    assert trusted.record["largest_excess"] == trusted.record["excess_left"]
    assert trusted.record["bisections"] == 0
    assert (verified.record["bisections"] > 0) == (verified.record["largest_excess"] > threshold)
    assert trusted.record["largest_excess"] > threshold, "nothing was put to the test"
    assert verified.record["damage"] < trusted.record["damage"]


@pytest.mark.parametrize("group", ["layer", 1000])
def test_of_two_edges_that_do_the_same_work_one_stays_when_verified(group):
    """An OR gate: either head is enough, so that each of the edges into the MLP, and each of those
    into the heads, is harmless alone.
    """
    known = circuits.known_circuit("or", n_prompts=16)
    graph = circuits.component_graph(known.model, split_embed=True)
    options = {"metric": "squared_error", "ablation": "zero", "group": group}
    trusted, verified = (
        circuits.BatchedACDC(1e-3, verify=verify, **options).discover(
            known.model, known.task, graph=graph
        )
        for verify in (False, True)
    )
    exact = circuits.ACDC(1e-3, metric="squared_error", ablation="zero").discover(
        known.model, known.task, graph=graph
    )
    assert verified.record["bisections"] > 0
    assert verified.record["damage"] < 1e-3 < trusted.record["largest_excess"]
    assert trusted.record["damage"] > 0.01
    if group == "layer":
        assert len(verified) == len(exact)


@pytest.mark.parametrize("group", ["target", 7])
def test_interrupted_after_any_group_the_run_goes_on_bit_for_bit(group, tmp_path):
    model, task, path = (
        small_model("gpt2"),
        random_task(batch=4, ragged=True),
        tmp_path / "checkpoint.safetensors",
    )
    method = circuits.BatchedACDC(0.005, group=group, verify=True)
    uninterrupted = method.discover(model, task)
    assert uninterrupted.record["bisections"] > 0

    def stop(done: int, total: int) -> None:
        if 0 < done < total:
            raise KeyboardInterrupt

    for _ in range(len(edge_groups(uninterrupted.graph, group))):
        try:
            resumed = method.discover(model, task, checkpoint=path, progress=stop)
            break
        except KeyboardInterrupt:
            continue
    assert resumed == uninterrupted
    assert resumed.record == uninterrupted.record


def test_a_checkpoint_of_another_group_is_refused(tmp_path):
    model, task, path = small_model("gpt2"), random_task(), tmp_path / "checkpoint.safetensors"
    circuits.BatchedACDC(0.02, group="layer").discover(model, task, checkpoint=path)
    with pytest.raises(circuits.InputError, match="belongs to a run with other settings"):
        circuits.BatchedACDC(0.02, group="target").discover(model, task, checkpoint=path)


def test_the_record_counts_what_was_done(toy_world):
    task = circuits.load_task("ioi", toy_world, n=8, split="train")
    circuit = circuits.BatchedACDC(0.01, group="layer").discover(toy_world, task)
    record = circuit.record
    assert record["evaluations"] == int((~circuit.scores.isnan()).sum())
    assert record["joint_measurements"] <= len(edge_groups(circuit.graph, "layer"))
    assert record["batches"] < circuits.ACDC(0.01).discover(toy_world, task).record["batches"]
    assert circuits.evaluate(toy_world, circuit, task).kl == pytest.approx(
        record["damage"], abs=ROUNDING
    )


def test_only_measurements_are_counted_not_what_getting_near_a_circuit_computes(toy_world):
    task = circuits.load_task("ioi", toy_world, n=16, split="train")
    record = circuits.BatchedACDC(0.01).discover(toy_world, task).record
    assert record["node_evaluations"] == 1060
    assert record["batches"] == 29


def test_memory_changes_the_batches_and_not_the_circuit(toy_world):
    task = circuits.load_task("ioi", toy_world, n=8, split="train")
    free, bounded = (
        circuits.BatchedACDC(0.05, group="layer", max_memory=bound).discover(toy_world, task)
        for bound in (None, 8_000_000)
    )
    assert torch.equal(free.kept, bounded.kept)
    assert free.record["evaluations"] == bounded.record["evaluations"]
    assert free.record["batches"] < bounded.record["batches"]


@pytest.mark.parametrize("group", ["node", 0, -3, True, 2.5, None])
def test_what_names_no_group_is_refused(group, unchecked_types):
    with pytest.raises(
        circuits.InputError,
        match=rf"group={group!r} is no way to group edges; choose 'target', 'layer' or a number",
    ):
        circuits.BatchedACDC(0.01, group=group)


@pytest.mark.parametrize("threshold", [-0.1, float("nan")])
def test_a_threshold_that_is_no_number_is_refused(threshold):
    with pytest.raises(circuits.InputError, match=f"threshold={threshold} must be"):
        circuits.BatchedACDC(threshold)


@pytest.mark.parametrize(("word", "group"), [("layer", "layer"), ("target", "target"), ("16", 16)])
def test_the_group_is_an_option_of_the_command(word, group):
    words = ["--threshold", "0.01", "--group", word, "--verify"]
    options = tyro.cli(options_of(circuits.BatchedACDC), args=words)
    assert (options.group, options.verify) == (group, True)
