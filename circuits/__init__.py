"""Finds, runs and compares circuits in transformer language models.

    model = circuits.load_model("toy-world")
    task = circuits.load_task("ioi", model, n=64, seed=0, split="test")
    circuit = circuits.ACDC(threshold=0.01).discover(model, task)
    circuits.evaluate(model, circuit, task)

Names are imported when they are first used, so that `circuits --help` need not wait for torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from circuits.ablation import Ablation
    from circuits.algorithms.acdc import ACDC
    from circuits.algorithms.activation_patching import ActivationPatching
    from circuits.algorithms.attribution_graph import AttributionGraph
    from circuits.algorithms.batched_acdc import BatchedACDC
    from circuits.algorithms.eap import EAP, EAPIG
    from circuits.algorithms.random_scores import RandomScores
    from circuits.attribution import Direction
    from circuits.by_head import head_shares
    from circuits.circuit import Circuit
    from circuits.components import component_graph
    from circuits.discoverer import Checkpoint, CircuitDiscoverer, discoverers
    from circuits.edge_scores import EdgeAttribution
    from circuits.errors import InputError
    from circuits.evaluation import Evaluation, Recovery, evaluate, faithfulness_curve, faithfulness_points, recovery
    from circuits.execution import model_logits, run_circuit, run_circuits
    from circuits.feature_graph import FeatureGraph
    from circuits.global_graph import Coactivation, VirtualWeights, expected_coactivation, virtual_weights
    from circuits.graph import Edge, Graph, parse_edge
    from circuits.graph_run import GraphRun, load_graph_run, run_graph
    from circuits.influence import completeness_score, node_influence, prune, pruned, replacement_score
    from circuits.interchange import load_eap_ig, save_eap_ig
    from circuits.interventions import Intervened, Intervention, direct_effects, generate, intervene
    from circuits.metrics import METRICS, Metric
    from circuits.models import build_model, load_model, save_model
    from circuits.neuronpedia import ImportedGraph, load_neuronpedia, save_neuronpedia
    from circuits.nodes import MLP, Embed, Error, Feature, Head, Logits, PosEmbed, TokenEmbed, parse_node
    from circuits.precision import Precision
    from circuits.tasks import load_task, task_names
    from circuits.tasks.base import PromptPair, Task, TaskFamily
    from circuits.tasks.known_circuits import KnownCircuit, known_circuit
    from circuits.transcoders.base import Transcoders
    from circuits.transcoders.extraction import ExtractedFeatures, extract_features
    from circuits.transcoders.loading import load_transcoders
    from circuits.transcoders.saving import save_transcoders

_MODULES = {
    "ablation": ["Ablation"],
    "algorithms.acdc": ["ACDC"],
    "algorithms.activation_patching": ["ActivationPatching"],
    "algorithms.attribution_graph": ["AttributionGraph"],
    "attribution": ["Direction"],
    "feature_graph": ["FeatureGraph"],
    "interventions": ["Intervened", "Intervention", "direct_effects", "generate", "intervene"],
    "neuronpedia": ["ImportedGraph", "load_neuronpedia", "save_neuronpedia"],
    "global_graph": ["Coactivation", "VirtualWeights", "expected_coactivation", "virtual_weights"],
    "transcoders.extraction": ["ExtractedFeatures", "extract_features"],
    "graph_run": ["GraphRun", "load_graph_run", "run_graph"],
    "by_head": ["head_shares"],
    "influence": ["completeness_score", "node_influence", "prune", "pruned", "replacement_score"],
    "transcoders.base": ["Transcoders"],
    "transcoders.loading": ["load_transcoders"],
    "transcoders.saving": ["save_transcoders"],
    "algorithms.batched_acdc": ["BatchedACDC"],
    "algorithms.eap": ["EAP", "EAPIG"],
    "algorithms.random_scores": ["RandomScores"],
    "circuit": ["Circuit"],
    "discoverer": ["Checkpoint", "CircuitDiscoverer", "discoverers"],
    "edge_scores": ["EdgeAttribution"],
    "errors": ["InputError"],
    "evaluation": ["Evaluation", "Recovery", "evaluate", "faithfulness_curve", "faithfulness_points", "recovery"],
    "execution": ["model_logits", "run_circuit", "run_circuits"],
    "graph": ["Edge", "Graph", "parse_edge"],
    "interchange": ["load_eap_ig", "save_eap_ig"],
    "metrics": ["METRICS", "Metric"],
    "components": ["component_graph"],
    "models": ["build_model", "load_model", "save_model"],
    "nodes": ["MLP", "Embed", "Error", "Feature", "Head", "Logits", "PosEmbed", "TokenEmbed", "parse_node"],
    "precision": ["Precision"],
    "tasks": ["load_task", "task_names"],
    "tasks.base": ["PromptPair", "Task", "TaskFamily"],
    "tasks.known_circuits": ["KnownCircuit", "known_circuit"],
}
_HOME = {name: module for module, names in _MODULES.items() for name in names}

__all__ = sorted(_HOME)


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'circuits' has no attribute {name!r}")
    return getattr(import_module(f"circuits.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return __all__
