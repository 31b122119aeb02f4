__version__: str

from .attribution.build import Direction as Direction
from .attribution.feature_graph import FeatureGraph as FeatureGraph
from .attribution.head_shares import head_shares as head_shares
from .attribution.influence import (
    completeness_score as completeness_score,
)
from .attribution.influence import (
    node_influence as node_influence,
)
from .attribution.influence import (
    prune as prune,
)
from .attribution.influence import (
    pruned as pruned,
)
from .attribution.influence import (
    replacement_score as replacement_score,
)
from .attribution.interventions import (
    Intervened as Intervened,
)
from .attribution.interventions import (
    Intervention as Intervention,
)
from .attribution.interventions import (
    direct_effects as direct_effects,
)
from .attribution.interventions import (
    generate as generate,
)
from .attribution.interventions import (
    intervene as intervene,
)
from .attribution.virtual_weights import (
    Coactivation as Coactivation,
)
from .attribution.virtual_weights import (
    VirtualWeights as VirtualWeights,
)
from .attribution.virtual_weights import (
    expected_coactivation as expected_coactivation,
)
from .attribution.virtual_weights import (
    virtual_weights as virtual_weights,
)
from .discovery.checkpoint import Checkpoint as Checkpoint
from .discovery.discoverer import CircuitDiscoverer as CircuitDiscoverer
from .discovery.discoverer import Resumable as Resumable
from .discovery.gradients.edge_attribution import EdgeAttribution as EdgeAttribution
from .discovery.methods.acdc import ACDC as ACDC
from .discovery.methods.activation_patching import ActivationPatching as ActivationPatching
from .discovery.methods.attribution_graph import AttributionGraph as AttributionGraph
from .discovery.methods.batched_acdc import BatchedACDC as BatchedACDC
from .discovery.methods.eap import EAP as EAP
from .discovery.methods.eap import EAPIG as EAPIG
from .discovery.methods.random_scores import RandomScores as RandomScores
from .discovery.registry import discoverers as discoverers
from .evaluation.compare import compare as compare
from .evaluation.evaluate import (
    Evaluation as Evaluation,
)
from .evaluation.evaluate import (
    evaluate as evaluate,
)
from .evaluation.evaluate import (
    faithfulness_curve as faithfulness_curve,
)
from .evaluation.evaluate import (
    faithfulness_points as faithfulness_points,
)
from .evaluation.recovery import Recovery as Recovery
from .evaluation.recovery import recovery as recovery
from .evaluation.similarity import (
    overlap as overlap,
)
from .evaluation.similarity import (
    score_correlation as score_correlation,
)
from .evaluation.similarity import (
    score_table as score_table,
)
from .formats.eap_ig import load_eap_ig as load_eap_ig
from .formats.eap_ig import save_eap_ig as save_eap_ig
from .formats.neuronpedia import (
    ImportedGraph as ImportedGraph,
)
from .formats.neuronpedia import (
    load_neuronpedia as load_neuronpedia,
)
from .formats.neuronpedia import (
    save_neuronpedia as save_neuronpedia,
)
from .graph.circuit import Circuit as Circuit
from .graph.edges import Edge as Edge
from .graph.edges import parse_edge as parse_edge
from .graph.graph import Graph as Graph
from .graph.nodes import (
    MLP as MLP,
)
from .graph.nodes import (
    Embed as Embed,
)
from .graph.nodes import (
    Error as Error,
)
from .graph.nodes import (
    Feature as Feature,
)
from .graph.nodes import (
    Head as Head,
)
from .graph.nodes import (
    Logits as Logits,
)
from .graph.nodes import (
    PosEmbed as PosEmbed,
)
from .graph.nodes import (
    TokenEmbed as TokenEmbed,
)
from .graph.nodes import (
    parse_node as parse_node,
)
from .models import build_model as build_model
from .models import load_model as load_model
from .models import save_model as save_model
from .models.component_graph import component_graph as component_graph
from .plotting.figures import (
    faithfulness_figure as faithfulness_figure,
)
from .plotting.figures import (
    score_scatter as score_scatter,
)
from .plotting.pages import (
    attribution_page as attribution_page,
)
from .plotting.pages import (
    circuit_page as circuit_page,
)
from .plotting.pages import (
    draw_circuit as draw_circuit,
)
from .plotting.pages import (
    report_page as report_page,
)
from .running.ablation import Ablation as Ablation
from .running.activations import circuit_activations as circuit_activations
from .running.precision import Precision as Precision
from .running.run import (
    model_logits as model_logits,
)
from .running.run import (
    run_circuit as run_circuit,
)
from .running.run import (
    run_circuits as run_circuits,
)
from .runs.circuit_run import load_run as load_run
from .runs.circuit_run import run as run
from .runs.graph_run import (
    GraphRun as GraphRun,
)
from .runs.graph_run import (
    load_graph_run as load_graph_run,
)
from .runs.graph_run import (
    run_graph as run_graph,
)
from .system.errors import InputError as InputError
from .tasks.family import TaskFamily as TaskFamily
from .tasks.known_circuits.circuits import (
    KnownCircuit as KnownCircuit,
)
from .tasks.known_circuits.circuits import (
    known_circuit as known_circuit,
)
from .tasks.known_circuits.published import published_circuit as published_circuit
from .tasks.metrics import METRICS as METRICS
from .tasks.metrics import Metric as Metric
from .tasks.registry import load_task as load_task
from .tasks.registry import task_names as task_names
from .tasks.task import PromptPair as PromptPair
from .tasks.task import Task as Task
from .transcoders.extraction import (
    ExtractedFeatures as ExtractedFeatures,
)
from .transcoders.extraction import (
    extract_features as extract_features,
)
from .transcoders.io.load import load_transcoders as load_transcoders
from .transcoders.io.save import save_transcoders as save_transcoders
from .transcoders.training.train import train_transcoders as train_transcoders
from .transcoders.transcoder import Transcoders as Transcoders
