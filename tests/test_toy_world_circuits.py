"""The main job on the embedded model: an IOI circuit found on training prompts and judged on
held-out ones.
"""

import re
from pathlib import Path

import pytest

import circuits

# What is found, and not its types, is in question here; checking them takes most of the time.
pytestmark = pytest.mark.usefixtures("unchecked_types")


PICTURE = Path(circuits.__file__).parent / "assets" / "ioi-circuit.svg"
EDGE_NAMES = re.compile(r"<title>(\S+-&gt;\S+)  ")


@pytest.fixture(scope="module")
def train(toy_world):
    return circuits.load_task("ioi", toy_world, n=16, split="train")


@pytest.fixture(scope="module")
def held_out(toy_world):
    return circuits.load_task("ioi", toy_world, n=64, split="test")


def test_acdc_keeps_few_edges_and_the_models_predictions(toy_world, train, held_out):
    circuit = circuits.ACDC(threshold=0.002).discover(toy_world, train)
    assert len(circuit.graph) == 479
    assert len(circuit) <= 0.15 * 479
    assert circuits.evaluate(toy_world, circuit, held_out).kl <= 0.15
    # The picture in the README; the numbers can differ a little from machine to machine.
    title = "IOI in toy-world, found by ACDC (threshold 0.002)"
    drawn, shown = circuits.draw_circuit(circuit, title=title), PICTURE.read_text()
    names, names_shown = (set(EDGE_NAMES.findall(svg)) for svg in (drawn, shown))
    assert names == names_shown and len(names) == len(circuit)


def test_eap_ig_is_more_faithful_than_chance_at_every_size(toy_world, train, held_out):
    sizes = [0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.5, 0.7, 0.9, 1.0]
    ranked = circuits.faithfulness_curve(
        toy_world, circuits.EAPIG().discover(toy_world, train), held_out, sizes
    )
    chance = [
        circuits.faithfulness_curve(
            toy_world, circuits.RandomScores(seed).discover(toy_world, train), held_out, sizes
        )["faithfulness"]
        for seed in range(5)
    ]
    by_chance = sum(chance) / 5
    rounding = 1e-5
    assert bool((ranked["faithfulness"] >= by_chance - rounding).all())
    between = ranked["fraction"].between(0.05, 0.5)
    assert between.sum() >= 4
    assert bool((ranked["faithfulness"] > by_chance + 0.01)[between].all())


def test_spans_of_real_prompts_split_the_graph(toy_world, train, held_out):
    graph = circuits.component_graph(toy_world, positions=["IO", "S1", "S1+1", "S2", "END"])
    circuit = circuits.EAPIG().discover(toy_world, train, graph=graph).top(150)
    named = {edge.source.position for edge in circuit.edges}
    assert {"IO", "S2", "END"} <= named
    assert circuits.evaluate(toy_world, circuit, held_out).faithfulness("logit_difference") > 0.3


@pytest.mark.parametrize("ablation", ["resample", "zero", "mean", "mean_by_position"])
def test_every_ablation_runs_on_real_prompts(toy_world, train, held_out, ablation):
    circuit = circuits.EAP(ablation=ablation).discover(toy_world, train).top(200)
    evaluation = circuits.evaluate(toy_world, circuit, held_out, ablation=ablation)
    assert evaluation.kl < float(evaluation.empty_values["kl"].mean())
