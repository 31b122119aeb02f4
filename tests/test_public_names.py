"""The public surface: which names users import, and what each must have."""

import dataclasses
import inspect

import pytest

import circuits
from circuits.graph.nodes import check_position_name


def test_the_public_names_are_these():
    assert sorted(circuits.__all__) == [
        "ACDC",
        "Ablation",
        "ActivationPatching",
        "AttributionGraph",
        "BatchedACDC",
        "Checkpoint",
        "Circuit",
        "CircuitDiscoverer",
        "Coactivation",
        "Direction",
        "EAP",
        "EAPIG",
        "Edge",
        "EdgeAttribution",
        "Embed",
        "Error",
        "Evaluation",
        "ExtractedFeatures",
        "Feature",
        "FeatureGraph",
        "Graph",
        "GraphRun",
        "Head",
        "ImportedGraph",
        "InputError",
        "Intervened",
        "Intervention",
        "KnownCircuit",
        "Logits",
        "METRICS",
        "MLP",
        "Metric",
        "PosEmbed",
        "Precision",
        "PromptPair",
        "RandomScores",
        "Recovery",
        "Resumable",
        "Task",
        "TaskFamily",
        "TokenEmbed",
        "Transcoders",
        "VirtualWeights",
        "attribution_page",
        "build_model",
        "circuit_activations",
        "circuit_page",
        "compare",
        "completeness_score",
        "component_graph",
        "direct_effects",
        "discoverers",
        "draw_circuit",
        "evaluate",
        "expected_coactivation",
        "extract_features",
        "faithfulness_curve",
        "faithfulness_figure",
        "faithfulness_points",
        "generate",
        "head_shares",
        "intervene",
        "known_circuit",
        "load_eap_ig",
        "load_graph_run",
        "load_model",
        "load_neuronpedia",
        "load_run",
        "load_task",
        "load_transcoders",
        "model_logits",
        "node_influence",
        "overlap",
        "parse_edge",
        "parse_node",
        "performance",
        "prune",
        "pruned",
        "published_circuit",
        "recovery",
        "replacement_score",
        "report_page",
        "run",
        "run_circuit",
        "run_circuits",
        "run_graph",
        "save_eap_ig",
        "save_model",
        "save_neuronpedia",
        "save_transcoders",
        "score_correlation",
        "score_scatter",
        "score_table",
        "single_token_words",
        "task_names",
        "train_transcoders",
        "virtual_weights",
    ]
    for name in circuits.__all__:
        assert getattr(circuits, name) is not None
    with pytest.raises(AttributeError, match="attribute nonsense"):
        circuits.nonsense  # noqa: B018


@pytest.mark.parametrize(
    "name", [name for name in circuits.__all__ if inspect.isfunction(getattr(circuits, name))]
)
def test_public_functions_say_what_they_raise(name):
    function = getattr(circuits, name)
    if name not in {
        "attribution_page",
        "discoverers",
        "task_names",
        "save_model",
        "node_influence",
        "replacement_score",
        "completeness_score",
    }:
        assert "Raises:" in (inspect.getdoc(function) or "")


def public_methods():
    for name in circuits.__all__:
        kind = getattr(circuits, name)
        if inspect.isclass(kind):
            for method, function in inspect.getmembers(kind, inspect.isfunction):
                if not method.startswith("_") and function.__module__.startswith("circuits."):
                    yield f"{name}.{method}", function


def test_public_methods_say_what_they_raise():
    silent = []
    for name, function in public_methods():
        refuses = "raise InputError" in inspect.getsource(function)
        if refuses and "InputError" not in (inspect.getdoc(function) or ""):
            silent.append(name)
    assert not silent


@pytest.mark.parametrize(
    "function",
    [
        check_position_name,
        circuits.ACDC.search_graph,
        circuits.ACDC.meter,
        circuits.ACDC.run_settings,
        circuits.ActivationPatching.node_scores,
        circuits.ActivationPatching.heads,
        circuits.ActivationPatching.layers,
        circuits.EAP.search_graph,
        circuits.FeatureGraph.incoming,
        circuits.FeatureGraph.outgoing,
        circuits.Intervention.set,
        circuits.Intervention.scale,
        circuits.Intervention.ablate,
    ],
    ids=lambda function: function.__qualname__,
)
def test_functions_say_what_the_checks_that_they_call_raise(function):
    assert "Raises:\n    InputError: " in inspect.getdoc(function)


def test_saving_transcoders_says_what_it_returns():
    assert "Returns:\n    The folder." in inspect.getdoc(circuits.save_transcoders)


def test_values_are_frozen():
    for name in circuits.__all__:
        value = getattr(circuits, name)
        if dataclasses.is_dataclass(value):
            assert value.__dataclass_params__.frozen, name
