"""Things of a wrong kind, given to what makes, changes, trains, draws and stores attribution graphs
and transcoders: each is read as meant, or refused in one line.
"""

import math
import tempfile
import warnings
from collections.abc import Callable, Mapping
from dataclasses import fields, replace
from typing import Any

import numpy as np
import pandas
import pytest
import torch
from architectures import random_model
from random_transcoders import random_transcoders

import circuits
from circuits.transcoders.activations import TopK
from circuits.transcoders.training.quality import quality
from circuits.transcoders.training.train import Training

pytestmark = pytest.mark.usefixtures("unchecked_types")


class Unfinished:
    """A class where one of its values is meant."""


# Made anew for each call, as a generator gives its items once.
WRONG: dict[str, Callable[[], Any]] = {
    "None": lambda: None,
    "True": lambda: True,
    "-1": lambda: -1,
    "nan": lambda: math.nan,
    "text": lambda: "x",
    "list": list,
    "dictionary": dict,
    "objects": lambda: np.array([None, "a"], dtype=object),
    "number tensor": lambda: torch.tensor(0.5),
    "tensor": lambda: torch.arange(3),
    "generator": lambda: (number for number in range(2)),
    "class": lambda: Unfinished,
    "slice": lambda: slice(0, 4, 2),
    "data frame": lambda: pandas.DataFrame({"a": [1]}),
}
Arguments = Mapping[str, Any]
Entrance = tuple[Callable[..., Any], Arguments]


@pytest.fixture(scope="module")
def entrances(toy_world) -> dict[str, Entrance]:
    """Functions with arguments that are right."""
    model = random_model("gpt2")
    transcoders = random_transcoders(model, "plt")
    method = circuits.AttributionGraph(transcoders, most_logits=2)
    prompt = [3, 14, 15, 9]
    graph = method.attribute(model, prompt)
    few = circuits.pruned(graph, node_threshold=0.5)
    states = {layer: torch.randn(2, 3, transcoders.d_model) for layer in range(2)}
    fired = circuits.expected_coactivation(states, transcoders)
    features = {layer: transcoders.encode(layer, states[layer]) for layer in states}
    change = circuits.Intervention.ablate("f0.1@2")
    circuit = circuits.Circuit.from_edges(circuits.component_graph(model), ["embed->m0"])
    task = circuits.Task.from_tokens([prompt], [[3, 15, 14, 9]], answers=[1], wrong_answers=[2])
    tokens = torch.tensor([prompt, prompt[::-1]])
    real = torch.ones_like(tokens, dtype=torch.bool)

    def batches(step: int) -> Any:
        return tokens, real

    settings = Training(n_features=4, k=(2,), steps=1)
    curves = pandas.DataFrame({"method": "eap", "edges": [5, 50], "faithfulness": [0.2, 0.9]})
    scores = pandas.DataFrame({"edge": ["embed->m0", "m0->logits"], "x": [1, 2], "y": [3, 4]})
    logits = torch.zeros(1, 7)
    metric = circuits.Metric("mine", lambda logits, clean, task: logits[:, 0], "lower_is_damage")
    folder = tempfile.mkdtemp()
    vector = torch.ones(transcoders.d_model)

    def attribute(**direction: Any) -> Any:
        return method.attribute(model, prompt, explain=[circuits.Direction(**direction)])

    def intervene(**change: Any) -> Any:
        return circuits.intervene(model, transcoders, prompt, [[circuits.Intervention(**change)]])

    run_graph = {"method": method, "model": model, "prompt": prompt, "explain": [1]}
    common = {"model": model, "transcoders": transcoders, "prompt": prompt}
    frozen = {"frozen_layers": [1], "freeze_attention": True, "freeze_norms": False}
    thresholds = {"node_threshold": 0.5, "edge_threshold": 0.5}
    save = {"slug": "a", "scan": "b", "source_set": "c", "prune": False, "groups": {}}
    ids = {"n_prompts": 1}
    return {
        "attribute": (method.attribute, {"model": model, "prompt": prompt, "explain": [1]}),
        "attribute_all": (
            method.attribute_all,
            {"model": model, "prompts": [prompt], "explain": [[1]]},
        ),
        "one token": (lambda e: method.attribute(model, prompt, explain=[e]), {"e": 1}),
        "pair": (lambda e: method.attribute(model, prompt, explain=[(1, e)]), {"e": 2}),
        "Direction": (
            attribute,
            {"label": "d", "vector": vector, "bias": 0.0, "weight": 1.0, "position": 1, "token": 1},
        ),
        "run_graph": (circuits.run_graph, {**run_graph, "notes": {}}),
        "node_influence": (circuits.node_influence, {"graph": graph}),
        "completeness_score": (circuits.completeness_score, {"graph": graph}),
        "replacement_score": (circuits.replacement_score, {"graph": graph}),
        "prune": (circuits.prune, {"graph": graph, **thresholds}),
        "pruned": (circuits.pruned, {"graph": graph, **thresholds}),
        "head_shares": (
            circuits.head_shares,
            {"model": model, "transcoders": transcoders, "graph": few},
        ),
        "node": (graph.node, {"number": 0}),
        "find": (graph.find, {"node": graph.node(0)}),
        "incoming": (graph.incoming, {"node": graph.node(-1), "n": 2}),
        "outgoing": (graph.outgoing, {"node": graph.node(0), "n": 2}),
        "subgraph": (graph.subgraph, {"nodes": graph.is_kind(0), "edges": None}),
        "graph to": (graph.to, {"device": "cpu"}),
        "Intervention": (intervene, {"layer": 0, "index": 1, "position": 1, "value": 1.0}),
        "set": (circuits.Intervention.set, {"feature": "f0.1", "value": 1.0}),
        "scale": (circuits.Intervention.scale, {"feature": "f0.1", "factor": 1.0}),
        "intervene": (circuits.intervene, {**common, "variants": [[change]], **frozen}),
        "one variant": (
            lambda v: circuits.intervene(model, transcoders, prompt, [v]),
            {"v": [change]},
        ),
        "direct_effects": (
            circuits.direct_effects,
            {**common, "variants": [[change]], "leading": 1},
        ),
        "generate": (
            circuits.generate,
            {**common, "interventions": [change], "new_tokens": 1, "temperature": 1.0, "seed": 0},
        ),
        "expected_coactivation": (
            circuits.expected_coactivation,
            {"batches": states, "transcoders": transcoders, "top_k": 3, "threshold": 0.0},
        ),
        "virtual_weights": (
            circuits.virtual_weights,
            {"transcoders": transcoders, "top_k": 2, "model": model, "coactivation": fired},
        ),
        "mean": (fired.mean, {"layer": 0, "features": slice(0, 4)}),
        "together": (
            fired.together,
            {"layer": 0, "features": slice(0, 4), "others": torch.ones(4, 1)},
        ),
        "coactivation to": (fired.to, {"device": "cpu", "dtype": torch.float64}),
        "extract_features": (
            circuits.extract_features,
            {"hidden_states": states, "transcoders": transcoders, "top_k": 3, "threshold": 0.0},
        ),
        "hidden states": (
            lambda h: circuits.extract_features({0: h}, transcoders),
            {"h": states[0]},
        ),
        "load_transcoders": (
            circuits.load_transcoders,
            {"where": "toy-world-plt", "device": "cpu", "dtype": None, "mapped": False},
        ),
        "save_transcoders": (
            circuits.save_transcoders,
            {"transcoders": transcoders, "folder": folder, "model_name": "a", "dtype": None},
        ),
        "train_transcoders": (
            circuits.train_transcoders,
            {"model": model, "batches": batches, "config": settings},
        ),
        "batch": (
            lambda b: circuits.train_transcoders(model, lambda _: b, settings),
            {"b": (tokens, real)},
        ),
        "Training": (Training, {"kind": "plt", "k": (2,), "penalty": 0.1, "steps": 1, "seed": 0}),
        "quality": (
            quality,
            {"model": model, "transcoders": transcoders, "tokens": tokens, "mask": real},
        ),
        "Transcoders": (
            lambda **parts: replace(transcoders, **parts).check(),
            {field.name: getattr(transcoders, field.name) for field in fields(transcoders)},
        ),
        "Encoder": (
            lambda **parts: circuits.AttributionGraph(
                replace(
                    transcoders,
                    encoders=[replace(transcoders.encoders[0], **parts), transcoders.encoders[1]],
                )
            ).attribute(model, prompt),
            vars(transcoders.encoders[0]),
        ),
        "TopK": (TopK, {"k": 3}),
        "encode": (transcoders.encode, {"layer": 0, "inputs": states[0]}),
        "decode": (transcoders.decode, {"activations": features, "target_layer": 1}),
        "decoder_rows": (
            transcoders.decoder_rows,
            {"layer": 0, "features": torch.tensor([1]), "target_layer": 0, "like": vector},
        ),
        "skip": (transcoders.skip, {"layer": 0, "inputs": states[0]}),
        "reconstruct": (transcoders.reconstruct, {"inputs": states}),
        "transcoders to": (transcoders.to, {"device": "cpu", "dtype": torch.float64}),
        "save_eap_ig": (
            circuits.save_eap_ig,
            {"circuit": circuit, "path": f"{folder}/eap.json", **ids},
        ),
        "load_eap_ig": (
            circuits.load_eap_ig,
            {"path": circuits.save_eap_ig(circuit, f"{folder}/a.json"), "model": model, **ids},
        ),
        "save_neuronpedia": (
            circuits.save_neuronpedia,
            {"graph": few, "path": f"{folder}/graph.json", **save, **thresholds, "labels": {}},
        ),
        "group": (
            lambda g: circuits.save_neuronpedia(few, f"{folder}/g.json", slug="a", groups={"a": g}),
            {"g": [few.node(-1)]},
        ),
        "label": (
            lambda g: circuits.save_neuronpedia(
                few, f"{folder}/l.json", slug="a", labels={"f0.1": g}
            ),
            {"g": "a"},
        ),
        "load_neuronpedia": (
            circuits.load_neuronpedia,
            {"path": circuits.save_neuronpedia(few, f"{folder}/n.json", slug="a")},
        ),
        "faithfulness_figure": (circuits.faithfulness_figure, {"curves": curves}),
        "sizes": (lambda v: circuits.faithfulness_figure(curves.assign(edges=[v, v])), {"v": 3}),
        "score_scatter": (circuits.score_scatter, {"frame": scores, "x_name": "x", "y_name": "y"}),
        "scores": (lambda v: circuits.score_scatter(scores.assign(x=[v, v])), {"v": 3}),
        "attribution_page": (
            circuits.attribution_page,
            {"graph": few, "title": "a", "details": {"a": "b"}},
        ),
        "circuit_page": (
            circuits.circuit_page,
            {"circuit": circuit, "title": "a", "details": {}, "max_edges": 3, "types": {}},
        ),
        "draw_circuit": (
            circuits.draw_circuit,
            {"circuit": circuit, "title": "a", "max_edges": 3, "types": {"m0": "a"}},
        ),
        "report_page": (
            circuits.report_page,
            {"title": "a", "table": curves, "curves": curves, "circuits": {"eap": circuit}},
        ),
        "known_circuit": (
            circuits.known_circuit,
            {
                "name": "and",
                "rotate": True,
                "leak": 0.0,
                "seed": 0,
                "n_prompts": 2,
                "device": "cpu",
            },
        ),
        "published_circuit": (circuits.published_circuit, {"name": "docstring", "model": None}),
        "load_task": (
            circuits.load_task,
            {"name": "ioi", "model": toy_world, "n": 2, "seed": 0, "split": "test"},
        ),
        "Metric": (
            circuits.Metric,
            {"name": "a", "function": metric.function, "direction": "lower_is_damage"},
        ),
        "metric": (metric, {"logits": logits, "clean_logits": logits, "task": task}),
        "kl": (
            circuits.METRICS["kl"],
            {"logits": logits, "clean_logits": logits, "task": task},
        ),
    }


def test_every_argument_of_a_wrong_kind_is_read_as_meant_or_refused_in_one_line(
    entrances, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)  # a text is a path, too
    amiss = []
    for name, (function, right) in entrances.items():
        for argument in right:
            for kind, make in WRONG.items():
                given = {**right, argument: make()}
                try:
                    with warnings.catch_warnings():
                        warnings.simplefilter("ignore")
                        function(**given)
                except circuits.InputError as error:
                    if "\n" in str(error) or len(str(error)) > 500:
                        amiss.append(f"{name}({argument}: {kind}): {error}")
                except Exception as error:
                    amiss.append(f"{name}({argument}: {kind}) ends in {error!r:.99}")
    assert not amiss, "\n".join(amiss)


@pytest.mark.parametrize(
    "name", ["attribute", "intervene", "encode", "together", "load_transcoders"]
)
def test_what_is_right_is_not_refused(entrances, name):
    function, right = entrances[name]
    function(**right)
