__version__: str

from .attribution.build import Direction as Direction
from .attribution.feature_graph import FeatureGraph as FeatureGraph
from .attribution.head_shares import head_shares as head_shares
from .attribution.influence import (
    completeness_score as completeness_score,
    node_influence as node_influence,
    prune as prune,
    pruned as pruned,
    replacement_score as replacement_score,
)
from .attribution.interventions import (
    Intervened as Intervened,
    Intervention as Intervention,
    direct_effects as direct_effects,
    generate as generate,
    intervene as intervene,
)
from .attribution.virtual_weights import (
    Coactivation as Coactivation,
    VirtualWeights as VirtualWeights,
    expected_coactivation as expected_coactivation,
    virtual_weights as virtual_weights,
)
from .discovery.checkpoint import Checkpoint as Checkpoint
from .discovery.discoverer import CircuitDiscoverer as CircuitDiscoverer, Resumable as Resumable
from .discovery.gradients.edge_attribution import EdgeAttribution as EdgeAttribution
from .discovery.methods.acdc import ACDC as ACDC
from .discovery.methods.activation_patching import ActivationPatching as ActivationPatching
from .discovery.methods.attribution_graph import AttributionGraph as AttributionGraph
from .discovery.methods.batched_acdc import BatchedACDC as BatchedACDC
from .discovery.methods.eap import EAP as EAP, EAPIG as EAPIG
from .discovery.methods.random_scores import RandomScores as RandomScores
from .discovery.registry import discoverers as discoverers
from .evaluation.compare import compare as compare
from .evaluation.evaluate import (
    Evaluation as Evaluation,
    evaluate as evaluate,
    faithfulness_curve as faithfulness_curve,
    faithfulness_points as faithfulness_points,
)
from .evaluation.performance import performance as performance
from .evaluation.recovery import Recovery as Recovery, recovery as recovery
from .evaluation.similarity import (
    overlap as overlap,
    score_correlation as score_correlation,
    score_table as score_table,
)
from .formats.eap_ig import load_eap_ig as load_eap_ig, save_eap_ig as save_eap_ig
from .formats.neuronpedia import (
    ImportedGraph as ImportedGraph,
    load_neuronpedia as load_neuronpedia,
    save_neuronpedia as save_neuronpedia,
)
from .graph.circuit import Circuit as Circuit
from .graph.edges import Edge as Edge, parse_edge as parse_edge
from .graph.graph import Graph as Graph
from .graph.nodes import (
    MLP as MLP,
    Embed as Embed,
    Error as Error,
    Feature as Feature,
    Head as Head,
    Logits as Logits,
    PosEmbed as PosEmbed,
    TokenEmbed as TokenEmbed,
    parse_node as parse_node,
)
from .models import build_model as build_model, load_model as load_model, save_model as save_model
from .models.component_graph import component_graph as component_graph
from .plotting.figures import (
    faithfulness_figure as faithfulness_figure,
    score_scatter as score_scatter,
)
from .plotting.pages import (
    attribution_page as attribution_page,
    circuit_page as circuit_page,
    draw_circuit as draw_circuit,
    report_page as report_page,
)
from .running.ablation import Ablation as Ablation
from .running.activations import circuit_activations as circuit_activations
from .running.precision import Precision as Precision
from .running.run import (
    model_logits as model_logits,
    run_circuit as run_circuit,
    run_circuits as run_circuits,
)
from .runs.circuit_run import load_run as load_run, run as run
from .runs.graph_run import (
    GraphRun as GraphRun,
    load_graph_run as load_graph_run,
    run_graph as run_graph,
)
from .system.errors import InputError as InputError
from .tasks.family import TaskFamily as TaskFamily
from .tasks.known_circuits.circuits import (
    KnownCircuit as KnownCircuit,
    known_circuit as known_circuit,
)
from .tasks.known_circuits.published import published_circuit as published_circuit
from .tasks.metrics import METRICS as METRICS, Metric as Metric
from .tasks.registry import load_task as load_task, task_names as task_names
from .tasks.task import PromptPair as PromptPair, Task as Task
from .tasks.tokenization import single_token_words as single_token_words
from .transcoders.extraction import (
    ExtractedFeatures as ExtractedFeatures,
    extract_features as extract_features,
)
from .transcoders.io.load import load_transcoders as load_transcoders
from .transcoders.io.save import save_transcoders as save_transcoders
from .transcoders.training.train import train_transcoders as train_transcoders
from .transcoders.transcoder import Transcoders as Transcoders
