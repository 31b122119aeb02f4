"""Finds, runs and compares circuits in transformer language models.

    model = circuits.load_model("toy-world")
    task = circuits.load_task("ioi", model, n=64, seed=0, split="test")
    circuit = circuits.ACDC(threshold=0.01).discover(model, task)
    circuits.evaluate(model, circuit, task)

Names are imported when they are first used, so that `circuits --help` need not wait for torch.
"""

from __future__ import annotations

from importlib import import_module
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from circuits.attribution.build import Direction
    from circuits.attribution.feature_graph import FeatureGraph
    from circuits.attribution.head_shares import head_shares
    from circuits.attribution.influence import (
        completeness_score,
        node_influence,
        prune,
        pruned,
        replacement_score,
    )
    from circuits.attribution.interventions import (
        Intervened,
        Intervention,
        direct_effects,
        generate,
        intervene,
    )
    from circuits.attribution.virtual_weights import (
        Coactivation,
        VirtualWeights,
        expected_coactivation,
        virtual_weights,
    )
    from circuits.discovery.checkpoint import Checkpoint
    from circuits.discovery.discoverer import CircuitDiscoverer
    from circuits.discovery.gradients.edge_scores import EdgeAttribution
    from circuits.discovery.methods.acdc import ACDC
    from circuits.discovery.methods.activation_patching import ActivationPatching
    from circuits.discovery.methods.attribution_graph import AttributionGraph
    from circuits.discovery.methods.batched_acdc import BatchedACDC
    from circuits.discovery.methods.eap import EAP, EAPIG
    from circuits.discovery.methods.random_scores import RandomScores
    from circuits.discovery.registry import discoverers
    from circuits.evaluation.evaluate import (
        Evaluation,
        evaluate,
        faithfulness_curve,
        faithfulness_points,
    )
    from circuits.evaluation.recovery import Recovery, recovery
    from circuits.formats.eap_ig import load_eap_ig, save_eap_ig
    from circuits.formats.neuronpedia import ImportedGraph, load_neuronpedia, save_neuronpedia
    from circuits.graph.circuit import Circuit
    from circuits.graph.edges import Edge, parse_edge
    from circuits.graph.graph import Graph
    from circuits.graph.nodes import (
        MLP,
        Embed,
        Error,
        Feature,
        Head,
        Logits,
        PosEmbed,
        TokenEmbed,
        parse_node,
    )
    from circuits.models import build_model, load_model, save_model
    from circuits.models.component_graph import component_graph
    from circuits.running.ablation import Ablation
    from circuits.running.precision import Precision
    from circuits.running.run import model_logits, run_circuit, run_circuits
    from circuits.runs.graph_run import GraphRun, load_graph_run, run_graph
    from circuits.system.errors import InputError
    from circuits.tasks.family import TaskFamily
    from circuits.tasks.known_circuits.circuits import KnownCircuit, known_circuit
    from circuits.tasks.metrics import METRICS, Metric
    from circuits.tasks.registry import load_task, task_names
    from circuits.tasks.task import PromptPair, Task
    from circuits.transcoders.extraction import ExtractedFeatures, extract_features
    from circuits.transcoders.io.load import load_transcoders
    from circuits.transcoders.io.save import save_transcoders
    from circuits.transcoders.transcoder import Transcoders

_MODULES = {
    "system.errors": ["InputError"],
    "graph.circuit": ["Circuit"],
    "graph.edges": ["Edge", "parse_edge"],
    "graph.graph": ["Graph"],
    "graph.nodes": [
        "Embed",
        "Error",
        "Feature",
        "Head",
        "Logits",
        "MLP",
        "PosEmbed",
        "TokenEmbed",
        "parse_node",
    ],
    "models": ["build_model", "load_model", "save_model"],
    "models.component_graph": ["component_graph"],
    "tasks.family": ["TaskFamily"],
    "tasks.known_circuits.circuits": ["KnownCircuit", "known_circuit"],
    "tasks.metrics": ["METRICS", "Metric"],
    "tasks.registry": ["load_task", "task_names"],
    "tasks.task": ["PromptPair", "Task"],
    "transcoders.extraction": ["ExtractedFeatures", "extract_features"],
    "transcoders.io.load": ["load_transcoders"],
    "transcoders.io.save": ["save_transcoders"],
    "transcoders.transcoder": ["Transcoders"],
    "attribution.build": ["Direction"],
    "attribution.feature_graph": ["FeatureGraph"],
    "attribution.head_shares": ["head_shares"],
    "attribution.influence": [
        "completeness_score",
        "node_influence",
        "prune",
        "pruned",
        "replacement_score",
    ],
    "attribution.interventions": [
        "Intervened",
        "Intervention",
        "direct_effects",
        "generate",
        "intervene",
    ],
    "attribution.virtual_weights": [
        "Coactivation",
        "VirtualWeights",
        "expected_coactivation",
        "virtual_weights",
    ],
    "running.ablation": ["Ablation"],
    "running.precision": ["Precision"],
    "running.run": ["model_logits", "run_circuit", "run_circuits"],
    "discovery.checkpoint": ["Checkpoint"],
    "discovery.discoverer": ["CircuitDiscoverer"],
    "discovery.gradients.edge_scores": ["EdgeAttribution"],
    "discovery.methods.acdc": ["ACDC"],
    "discovery.methods.activation_patching": ["ActivationPatching"],
    "discovery.methods.attribution_graph": ["AttributionGraph"],
    "discovery.methods.batched_acdc": ["BatchedACDC"],
    "discovery.methods.eap": ["EAP", "EAPIG"],
    "discovery.methods.random_scores": ["RandomScores"],
    "discovery.registry": ["discoverers"],
    "evaluation.evaluate": ["Evaluation", "evaluate", "faithfulness_curve", "faithfulness_points"],
    "evaluation.recovery": ["Recovery", "recovery"],
    "formats.eap_ig": ["load_eap_ig", "save_eap_ig"],
    "formats.neuronpedia": ["ImportedGraph", "load_neuronpedia", "save_neuronpedia"],
    "runs.graph_run": ["GraphRun", "load_graph_run", "run_graph"],
}
_HOME = {name: module for module, names in _MODULES.items() for name in names}

__all__ = sorted(_HOME)


def __getattr__(name: str) -> Any:
    if name == "__version__":
        return version("circuits")
    if name not in _HOME:
        raise AttributeError(f"module 'circuits' has no attribute {name!r}")
    return getattr(import_module(f"circuits.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return __all__
