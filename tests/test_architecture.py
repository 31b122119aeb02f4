"""The shape of the package itself: what may import what, and what every public name must have."""

import ast
import dataclasses
import inspect
from pathlib import Path

import pytest

import circuits

PACKAGE = Path(circuits.__file__).parent

# A module imports only from entries above its own; modules of one entry do not import each other unless listed in ONE_CONCEPT.
ORDER = (
    "errors", "distributed", "memory", "files", "nodes", "graph", "circuit", "sublayers", "precision", "models", "components", "tasks",
    "metrics", "spans", "outputs", "transcoders", "ablation", "patching", "window", "propagation", "base_run", "cost", "flips", "cases",
    "incremental_run", "incremental", "replacement", "active_features", "linear_sweep", "feature_graph", "influence", "attribution",
    "by_head", "feature_pooling", "feature_circuits", "interventions", "execution", "gradients", "edge_products", "edge_scores", "edge_order",
    "discoverer", "confirmation", "algorithms", "evaluation", "compare", "interchange", "neuronpedia", "global_graph", "viewer", "plot",
    "run", "graph_run", "commands", "cli",
)  # fmt: skip
ONE_CONCEPT = ("models", "tasks", "transcoders", "neuronpedia", "viewer", "commands")
ENTRANCES = ("__init__", "__main__")
MODULES = sorted(path.relative_to(PACKAGE).with_suffix("") for path in PACKAGE.rglob("*.py"))


def entry(module: str) -> str:
    return module.split(".")[1] if "." in module else "__init__"


def imported(tree: ast.Module) -> set[str]:
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)} if node.module == "circuits" else {node.module}
        elif isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
    return names


def source(path: Path) -> ast.Module:
    return ast.parse((PACKAGE / path).with_suffix(".py").read_text())


def test_every_module_has_a_place_in_the_order():
    assert {path.parts[0] for path in MODULES} - set(ENTRANCES) == set(ORDER)


@pytest.mark.parametrize("path", [path for path in MODULES if path.parts[0] not in ENTRANCES], ids=str)
def test_a_module_imports_only_from_modules_above_it(path):
    own = path.parts[0]
    for name in imported(source(path)):
        if name == "circuits" or not name.startswith("circuits."):
            continue
        other = entry(name)
        if other == own:
            assert own in ONE_CONCEPT, f"{path} imports {name}: methods do not import each other"
        else:
            assert ORDER.index(other) < ORDER.index(own), f"{path} imports {name}, which stands below it"


@pytest.mark.parametrize("path", MODULES, ids=str)
def test_only_models_knows_transformer_lens_and_a_models_modules(path):
    if path.parts[0] == "models":
        return
    tree = source(path)
    assert not any(name.split(".")[0] == "transformer_lens" for name in imported(tree))
    assert not [node.lineno for node in ast.walk(tree) if isinstance(node, ast.Attribute) and node.attr == "blocks"]


@pytest.mark.parametrize("path", MODULES, ids=str)
def test_nothing_global_is_changed_and_no_pickle_is_read(path):
    tree = source(path)
    called = {ast.unparse(node.func) for node in ast.walk(tree) if isinstance(node, ast.Call)}
    forbidden = {
        "torch.load",
        "eval",
        "exec",
        "torch.manual_seed",
        "random.seed",
        "torch.set_default_dtype",
        "torch.set_grad_enabled",
        "hash",
    }
    assert not called & forbidden
    assert not {"pickle", "dill", "joblib"} & {name.split(".")[0] for name in imported(tree)}


@pytest.mark.parametrize("path", MODULES, ids=str)
def test_functions_stay_short(path):
    for node in ast.walk(source(path)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            body = node.body[1:] if ast.get_docstring(node) else node.body
            length = node.body[-1].end_lineno - body[0].lineno + 1 if body else 0
            assert length <= 60, f"{path}: {node.name} has {length} lines"


def test_the_public_names_are_these():
    assert circuits.__all__ == [
        "ACDC", "Ablation", "ActivationPatching", "AttributionGraph", "BatchedACDC", "Checkpoint", "Circuit", "CircuitDiscoverer",
        "Coactivation", "Direction", "EAP", "EAPIG", "Edge", "EdgeAttribution", "Embed", "Error", "Evaluation", "ExtractedFeatures",
        "Feature", "FeatureGraph", "Graph", "GraphRun", "Head", "ImportedGraph", "InputError", "Intervened", "Intervention",
        "KnownCircuit", "Logits", "METRICS", "MLP", "Metric", "PosEmbed", "Precision", "PromptPair", "RandomScores", "Recovery", "Task",
        "TaskFamily", "TokenEmbed", "Transcoders", "VirtualWeights", "build_model", "completeness_score", "component_graph",
        "direct_effects", "discoverers", "evaluate", "expected_coactivation", "extract_features", "faithfulness_curve",
        "faithfulness_points", "generate", "head_shares", "intervene", "known_circuit", "load_eap_ig", "load_graph_run", "load_model",
        "load_neuronpedia", "load_task", "load_transcoders", "model_logits", "node_influence", "parse_edge", "parse_node", "prune",
        "pruned", "recovery", "replacement_score", "run_circuit", "run_circuits", "run_graph", "save_eap_ig", "save_model",
        "save_neuronpedia", "save_transcoders", "task_names", "virtual_weights",
    ]  # fmt: skip
    for name in circuits.__all__:
        assert getattr(circuits, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        circuits.nonsense  # noqa: B018


def test_type_checkers_see_the_same_names():
    tree = ast.parse((PACKAGE / "__init__.py").read_text())
    block = next(node for node in tree.body if isinstance(node, ast.If))
    assert sorted(alias.name for node in block.body for alias in node.names) == circuits.__all__


def public_definitions(path: Path) -> list[ast.FunctionDef | ast.ClassDef]:
    top = [node for node in source(path).body if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_")]
    methods = [part for node in top if isinstance(node, ast.ClassDef) for part in node.body if isinstance(part, ast.FunctionDef)]
    return [*top, *(method for method in methods if not method.name.startswith("_"))]


@pytest.mark.parametrize("path", [path for path in MODULES if path.parts[0] not in ENTRANCES], ids=str)
def test_every_public_function_and_class_has_a_docstring(path):
    overriding = {"discover", "points", "draw", "render", "label"}  # said once, where the method is declared
    assert [node.name for node in public_definitions(path) if not ast.get_docstring(node) and node.name not in overriding] == []


@pytest.mark.parametrize("name", [name for name in circuits.__all__ if inspect.isfunction(getattr(circuits, name))])
def test_public_functions_say_what_they_raise(name):
    function = getattr(circuits, name)
    if name not in {"discoverers", "task_names", "save_model", "node_influence", "replacement_score", "completeness_score"}:
        assert "Raises:" in (inspect.getdoc(function) or "")


def test_values_are_frozen():
    for name in circuits.__all__:
        value = getattr(circuits, name)
        if dataclasses.is_dataclass(value):
            assert value.__dataclass_params__.frozen, name
