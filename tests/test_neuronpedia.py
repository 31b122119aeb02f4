"""Neuronpedia's graph JSON: what circuit-tracer wrote of a graph, the same graph written by us, and
what comes back of it.

data/attribution_graph_case/graph.json is circuit-tracer 0.5.0's export of its run clt_top128,
pruned to 0.8 and 0.98; the schema in
neuronpedia_graph.schema.json says what the format requires.
"""

from __future__ import annotations

import json
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import torch
from attribution_case import SMALL, Run, case_model, case_tokens, case_transcoders
from published import DATA

import circuits
from circuits.attribution.feature_graph import (
    EMBEDDING,
    ERROR,
    FEATURE,
    TARGET,
    FeatureGraph,
    LogitTarget,
)
from circuits.attribution.influence import node_influence, prune, pruned
from circuits.formats.neuronpedia import load_neuronpedia, save_neuronpedia
from circuits.formats.neuronpedia.format import FIRST_CUSTOM

RUN = Run(SMALL, "clt_top128", "clt")
THEIRS = DATA / SMALL / "graph.json"
SCHEMA = jsonschema.Draft202012Validator(
    json.loads((Path(__file__).parent / "neuronpedia_graph.schema.json").read_text())
)


def attribution_graph(**options: Any) -> FeatureGraph:
    budget, at_a_time = RUN.budget
    method = circuits.AttributionGraph(
        case_transcoders(SMALL, "clt"), budget=budget, at_a_time=at_a_time
    )
    return method.attribute(case_model(SMALL), case_tokens(SMALL), **options)


def theirs() -> dict[str, Any]:
    return json.loads(THEIRS.read_text())


def written(path: Path, content: Any) -> Path:
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


@pytest.fixture(scope="module")
def graph() -> FeatureGraph:
    """The graph whose export is THEIRS, with its words."""
    words = [f"w{token}" for token in case_tokens(SMALL).tolist()]
    found = attribution_graph()
    named = tuple(LogitTarget(f"w{target.token}", target.token) for target in found.targets)
    return replace(found, words=("<bos>", *words[1:]), targets=named)


@pytest.fixture(scope="module")
def differences() -> FeatureGraph:
    """A graph that explains a token and the difference of two, which is no token."""
    return attribution_graph(explain=[435, (403, 382)])


def without_error_ids(content: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Nodes by what they are, where circuit-tracer 0.5.0 has other ids for errors."""
    result = {}
    for node in content["nodes"]:
        is_error = node["feature_type"] == "mlp reconstruction error"
        name = f"error {node['layer']} {node['ctx_idx']}" if is_error else node["node_id"]
        result[name] = {
            key: value
            for key, value in node.items()
            if not is_error or key not in ("node_id", "jsNodeId")
        }
    return result


# The file of circuit-tracer


def test_circuit_tracers_file_is_the_graph_of_its_arrays():
    imported = load_neuronpedia(THEIRS)
    kept, links = RUN.expected("node_mask").bool(), RUN.expected("edge_mask").bool()
    target, source = links.nonzero().unbind(1)
    number = kept.long().cumsum(0) - 1
    graph = imported.graph
    assert len(graph.nodes) == int(kept.sum()) == RUN.settings["kept_nodes"]
    assert torch.equal(graph.source, number[source])
    assert torch.equal(graph.target, number[target])
    torch.testing.assert_close(graph.weight, RUN.adjacency()[links], rtol=0, atol=0)
    features, targets = graph.nodes[graph.is_kind(FEATURE)], graph.nodes[graph.is_kind(TARGET)]
    chosen = RUN.expected("selected_features").long()[
        kept[: len(RUN.expected("selected_features"))]
    ]
    assert torch.equal(
        torch.stack([features.layer, features.position, features.index], 1),
        RUN.expected("active_features")[chosen].long(),
    )
    torch.testing.assert_close(
        features.activation, RUN.expected("activation_values")[chosen], rtol=0, atol=0
    )
    torch.testing.assert_close(targets.probability, RUN.expected("logit_probs"), rtol=0, atol=0)
    assert [target.token for target in graph.targets] == RUN.expected("logit_tokens").tolist()
    inner = ~graph.is_kind(TARGET)
    torch.testing.assert_close(
        imported.cumulative[inner], RUN.expected("cumulative_scores")[kept][inner], rtol=0, atol=0
    )
    assert graph.n_layers == 3
    assert torch.equal(graph.tokens, case_tokens(SMALL))


def test_what_their_files_do_not_say_is_missing_by_name():
    imported = load_neuronpedia(THEIRS)
    graph = imported.graph
    assert (imported.slug, imported.scan, imported.groups, imported.pinned, imported.labels) == (
        "tiny-clt",
        "tiny/clt",
        {},
        (),
        {},
    )
    assert graph.prompt == theirs()["metadata"]["prompt"]
    assert graph.targets[0] == LogitTarget("w403", 403)
    assert graph.direct.isnan().all()
    assert (graph.constants.shape, graph.constant_names) == ((len(graph.nodes), 0), ())
    assert (graph.model, graph.transcoders) == (None, None)
    assert imported.cumulative[graph.is_kind(TARGET)].isnan().all()
    assert graph.settings == {"imported_from": "graph.json"}


def test_an_imported_graph_is_pruned_saved_and_asked_like_any_other(tmp_path):
    graph = load_neuronpedia(THEIRS).graph
    assert float(node_influence(graph).sum()) > 0
    smaller = pruned(graph, node_threshold=0.5)
    assert 0 < len(smaller) < len(graph)
    read = FeatureGraph.load(graph.save(tmp_path).parent)
    assert torch.equal(read.weight, graph.weight)
    assert read.constants.shape == graph.constants.shape
    assert (
        list(graph.incoming("logits:403@11", 3)["weight"].abs())
        == sorted(graph.incoming("logits:403@11", 3)["weight"].abs())[::-1]
    )


def test_our_file_of_the_same_graph_is_theirs(graph, tmp_path):
    path = save_neuronpedia(graph, tmp_path / "graph.json", slug="tiny-clt", scan="tiny/clt")
    ours, published = json.loads(path.read_text()), theirs()
    assert {name: ours["metadata"][name] for name in published["metadata"]} == published["metadata"]
    assert ours["qParams"] == published["qParams"]
    nodes, expected = without_error_ids(ours), without_error_ids(published)
    assert list(nodes) == list(expected)
    for name, node in expected.items():
        for field, value in node.items():
            close = {"influence": 1e-3, "activation": 1e-5, "token_prob": 1e-6}.get(field)
            assert nodes[name][field] == (
                value if close is None or value is None else pytest.approx(value, abs=close)
            ), (name, field)
    assert len(ours["links"]) == len(published["links"])
    ids = {
        old["node_id"]: new["node_id"]
        for old, new in zip(published["nodes"], ours["nodes"], strict=True)
    }
    for mine, link in zip(ours["links"], published["links"], strict=True):
        assert (mine["source"], mine["target"]) == (ids[link["source"]], ids[link["target"]])
        assert mine["weight"] == pytest.approx(link["weight"], abs=1e-5)


# Our file


def test_what_is_written_and_what_circuit_tracer_wrote_fit_the_schema(graph, differences, tmp_path):
    SCHEMA.validate(theirs())
    options: list[dict[str, Any]] = [
        {},
        {"prune": False},
        {"groups": {"say it": ["logits:403@11"]}, "source_set": "tiny", "labels": {"f0.5": "w"}},
    ]
    for number, kwargs in enumerate(options):
        SCHEMA.validate(
            json.loads(
                save_neuronpedia(graph, tmp_path / f"{number}.json", slug="a", **kwargs).read_text()
            )
        )
    SCHEMA.validate(
        json.loads(
            save_neuronpedia(differences, tmp_path / "differences.json", slug="a").read_text()
        )
    )
    for part in ("metadata", "links"):
        assert not SCHEMA.is_valid(
            {name: value for name, value in theirs().items() if name != part}
        )
    for field, value in (
        ("layer", 0),
        ("feature", None),
        ("feature_type", "lorsa"),
        ("node_id", "a0.h1"),
        ("influence", "all"),
    ):
        content = theirs()
        content["nodes"][0][field] = value
        assert not SCHEMA.is_valid(content), field


def test_a_file_is_compact_has_no_nan_and_says_how_it_was_made(graph, tmp_path):
    text = save_neuronpedia(
        graph, tmp_path / "graph.json", slug="a", source_set="tiny-set"
    ).read_text()
    assert "\n" not in text
    assert ": " not in text.replace('": "', "")
    assert len(text) < 0.65 * len(THEIRS.read_text())
    metadata = json.loads(text, parse_constant=pytest.fail)["metadata"]
    assert metadata["info"]["generator"]["name"] == "circuits"
    assert metadata["info"]["transcoder_set"] == "clt"
    assert metadata["info"]["create_time_ms"] > 1_700_000_000_000
    assert metadata["feature_details"] == {"neuronpedia_source_set": "tiny-set"}
    budget, at_a_time = RUN.budget
    assert metadata["generation_settings"] == {
        "max_n_logits": 10,
        "desired_logit_prob": 0.95,
        "max_feature_nodes": budget,
        "at_a_time": at_a_time,
    }
    assert metadata["pruning_settings"] == {"node_threshold": 0.8, "edge_threshold": 0.98}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_weights_have_no_more_digits_than_tell_them_apart(graph, tmp_path, dtype):
    weight = (graph.weight / 1000).to(dtype)
    path = save_neuronpedia(
        replace(graph, weight=weight), tmp_path / "graph.json", slug="a", prune=False
    )
    links = json.loads(path.read_text(), parse_float=str)["links"]
    digits = [link["weight"].partition("e")[0].lstrip("-0.").replace(".", "") for link in links]
    assert max(map(len, digits)) <= 9
    assert torch.equal(load_neuronpedia(path).graph.weight.to(dtype), weight)


@pytest.mark.parametrize(
    "thresholds", [{}, {"node_threshold": 0.5, "edge_threshold": 0.9}, {"prune": False}], ids=str
)
def test_what_is_written_comes_back(graph, tmp_path, thresholds):
    groups = {"say it": ("logits:403@11", "logits:382@11"), 'quoted "name"': ("tok_embed@3",)}
    label = 'w with "quotes" (p=0.5)\nand lines'
    named = replace(graph, targets=(LogitTarget(label, 403), *graph.targets[1:]))
    path = save_neuronpedia(
        named,
        tmp_path / "deep" / "graph.json",
        slug="slug",
        groups=groups,
        pinned=["tok_embed@4"],
        labels={"f0.5": "five"},
        **thresholds,
    )
    kept = prune(named, **{name: value for name, value in thresholds.items() if name != "prune"})
    expected = named if "prune" in thresholds else named.subgraph(kept.nodes, kept.edges)
    imported = load_neuronpedia(path)
    for name in ("kind", "layer", "position", "index", "activation", "probability"):
        torch.testing.assert_close(
            getattr(imported.graph.nodes, name),
            getattr(expected.nodes, name),
            rtol=0,
            atol=0,
            equal_nan=True,
        )
    for name in ("source", "target", "weight", "tokens"):
        assert torch.equal(getattr(imported.graph, name), getattr(expected, name)), name
    assert (imported.graph.words, imported.graph.targets, imported.graph.n_layers) == (
        named.words,
        named.targets,
        named.n_layers,
    )
    cumulative = kept.cumulative if "prune" in thresholds else kept.cumulative[kept.nodes]
    inner = ~expected.is_kind(TARGET)
    torch.testing.assert_close(imported.cumulative[inner], cumulative[inner].float())
    assert imported.groups == {
        name: tuple(circuits.parse_node(node) for node in nodes) for name, nodes in groups.items()
    }
    assert [str(node) for node in imported.pinned] == [
        "tok_embed@4",
        "logits:403@11",
        "logits:382@11",
        "tok_embed@3",
    ]
    fives = {
        str(node)
        for node in map(expected.node, range(len(expected.nodes)))
        if str(node).startswith("f0.5@")
    }
    assert {str(node): label for node, label in imported.labels.items()} == dict.fromkeys(
        fives, "five"
    )
    assert imported.slug == "slug"
    assert imported.graph.settings["budget"] == 128
    again = save_neuronpedia(
        imported.graph,
        tmp_path / "again.json",
        slug="slug",
        prune=False,
        groups=imported.groups,
        labels=imported.labels,
    )
    assert json.loads(again.read_text())["links"] == json.loads(path.read_text())["links"]


def test_a_label_at_a_position_comes_before_one_for_all_of_them(graph, tmp_path):
    features = [
        str(graph.node(number))
        for number in range(len(graph.nodes))
        if graph.nodes.kind[number] == FEATURE
    ]
    wherever = [name for name in features if name.split("@")[0] == features[0].split("@")[0]]
    labels = {
        features[0].split("@")[0]: "anywhere",
        circuits.parse_node(features[0]): "here",
        "f2.255": "not in the graph",
    }
    imported = load_neuronpedia(
        save_neuronpedia(graph, tmp_path / "graph.json", slug="a", prune=False, labels=labels)
    )
    assert {str(node): label for node, label in imported.labels.items()} == {
        **dict.fromkeys(wherever, "anywhere"),
        features[0]: "here",
    }


def test_errors_never_have_the_ids_of_features(graph, tmp_path):
    errors = [number for number in range(len(graph.nodes)) if graph.nodes.kind[number] == ERROR]
    # Features of layer 0 whose numbers are layers of the model: what the older ids of errors ran
    # into.
    features = graph.nodes.index.clone()
    features[:3] = torch.tensor([0, 1, 2])
    crowded = replace(graph, nodes=replace(graph.nodes, index=features))
    content = json.loads(
        save_neuronpedia(crowded, tmp_path / "graph.json", slug="a", prune=False).read_text()
    )
    for field in ("node_id", "jsNodeId"):
        of_errors = {
            node[field]
            for node in content["nodes"]
            if node["feature_type"] == "mlp reconstruction error"
        }
        assert len(of_errors) == len(errors)
        assert not of_errors & {
            node[field]
            for node in content["nodes"]
            if node["feature_type"] != "mlp reconstruction error"
        }


def test_targets_that_are_no_token_have_ids_beyond_any_vocabulary(differences, tmp_path):
    path = save_neuronpedia(differences, tmp_path / "graph.json", slug="a", prune=False)
    token, difference = (
        node for node in json.loads(path.read_text())["nodes"] if node["feature_type"] == "logit"
    )
    assert (token["node_id"], token["feature"], token["is_target_logit"]) == ("4_435_11", 435, True)
    assert (difference["node_id"], difference["feature"]) == (
        f"4_{FIRST_CUSTOM + 1}_11",
        FIRST_CUSTOM + 1,
    )
    assert difference["jsNodeId"] == f"L_{FIRST_CUSTOM + 1}-11"
    assert difference["clerp"] == 'Output "#403 - #382" (p=1.000)'
    assert (
        load_neuronpedia(path).graph.targets
        == differences.targets
        == (LogitTarget("#435", 435), LogitTarget("#403 - #382"))
    )


def test_a_feature_that_is_not_written_cannot_be_in_a_group(graph, tmp_path):
    dropped = str(graph.node(int((~prune(graph).nodes).nonzero()[0])))
    for kwargs in ({"groups": {"one": [dropped]}}, {"pinned": [dropped]}):
        with pytest.raises(
            circuits.InputError, match=f"{dropped} is not among the 52 nodes that are written"
        ):
            save_neuronpedia(graph, tmp_path / "graph.json", slug="a", **kwargs)
        save_neuronpedia(graph, tmp_path / "graph.json", slug="a", prune=False, **kwargs)
    with pytest.raises(circuits.InputError, match="names no node"):
        save_neuronpedia(graph, tmp_path / "graph.json", slug="a", groups={"one": ["nonsense"]})


def test_graphs_that_cannot_be_written_are_refused(graph, tmp_path):
    twice = replace(graph, targets=(*graph.targets[:-1], graph.targets[0]))
    infinite = replace(graph, weight=graph.weight.clone().fill_(float("inf")))
    activation = replace(graph, nodes=replace(graph.nodes, activation=graph.nodes.activation / 0))
    for broken, kwargs, told in (
        (graph, {"slug": " "}, "slug is empty"),
        (graph, {"node_threshold": 2.0}, "node_threshold=2.0"),
        (twice, {}, "logits:403@11 twice"),
        (infinite, {}, "has weight inf"),
        (activation, {}, "is not finite"),
    ):
        with pytest.raises(circuits.InputError, match=told) as raised:
            save_neuronpedia(broken, tmp_path / "graph.json", **{"slug": "a", **kwargs})
        assert "\n" not in str(raised.value)
    with pytest.raises(
        circuits.InputError, match=r"is a folder; give the file's name, such as .*a\.json"
    ):
        save_neuronpedia(graph, tmp_path, slug="a")
    assert list(tmp_path.iterdir()) == []


# Other people's files


def test_new_and_old_ids_of_errors_mean_the_same(tmp_path):
    content = theirs()
    new = {
        node["node_id"]: f"{node['layer']}_-1_{node['ctx_idx']}"
        for node in content["nodes"]
        if node["feature"] == -1
    }
    content["nodes"] = [
        {**node, "node_id": new.get(node["node_id"], node["node_id"])} for node in content["nodes"]
    ]
    content["links"] = [
        {**link, "source": new.get(link["source"], link["source"])} for link in content["links"]
    ]
    assert new
    old, recent = (
        load_neuronpedia(THEIRS).graph,
        load_neuronpedia(written(tmp_path / "new.json", content)).graph,
    )
    assert torch.equal(old.adjacency(), recent.adjacency())
    assert torch.equal(old.nodes.layer, recent.nodes.layer)
    assert int((old.nodes.kind == ERROR).sum()) == len(new)


def test_what_their_schema_leaves_open_is_read(tmp_path):
    """Numbers as layers, nodes and fields in another order or absent, outputs named otherwise,
    subgraphs that name what is not there.
    """
    content = theirs()
    content["nodes"] = [
        {
            **{
                key: node[key]
                for key in reversed(node)
                if key not in ("run_idx", "influence", "token_prob")
            },
            "extra": 1,
        }
        for node in reversed(content["nodes"])
    ]
    for node in content["nodes"]:
        node["layer"] = int(node["layer"]) if node["layer"].isdecimal() else node["layer"]
        node["clerp"] = f"say {node['feature']}" if node["feature_type"] == "logit" else ""
    content["links"].reverse()
    content["qParams"] = {
        "supernodes": [["one", "0_5_11", "9_9_9"], ["one", "E_1_0"]],
        "pinnedIds": ["E_1_0", "virtual-diff"],
    }
    del content["metadata"]["schema_version"], content["metadata"]["scan"]
    expected, imported = (
        load_neuronpedia(THEIRS).graph,
        load_neuronpedia(written(tmp_path / "graph.json", content)),
    )
    graph = imported.graph
    assert [target.label for target in graph.targets] == [
        f"say {target.token}" for target in reversed(expected.targets)
    ]
    assert graph.nodes.probability[graph.is_kind(TARGET)].unique().tolist() == [1.0]
    assert imported.cumulative.isnan().all()
    others = ~expected.is_kind(TARGET)
    torch.testing.assert_close(
        graph.nodes[others].activation, expected.nodes[others].activation, equal_nan=True
    )
    assert float(graph.adjacency().sum()) == pytest.approx(
        float(expected.adjacency().sum()), abs=1e-3
    )
    assert imported.groups == {
        "one": (circuits.Feature(0, 5, 11),),
        "one (2)": (circuits.TokenEmbed(0),),
    }
    assert imported.pinned == (circuits.TokenEmbed(0),)
    assert imported.scan is None


def test_positions_without_an_embedding_have_no_token(tmp_path):
    content = theirs()
    content["nodes"] = [node for node in content["nodes"] if node["node_id"] != "E_140_1"]
    content["links"] = [link for link in content["links"] if link["source"] != "E_140_1"]
    graph = load_neuronpedia(written(tmp_path / "graph.json", content)).graph
    assert graph.tokens[:3].tolist() == [1, -1, 252]
    assert int((graph.nodes.kind == EMBEDDING).sum()) == 11


def test_a_file_without_links_and_activations_is_read_and_written(tmp_path):
    content = theirs()
    content["links"] = []
    for node in content["nodes"]:
        del node["activation"]
    graph = load_neuronpedia(written(tmp_path / "graph.json", content)).graph
    assert (len(graph), len(graph.nodes)) == (0, len(content["nodes"]))
    path = save_neuronpedia(graph, tmp_path / "again.json", slug="a", prune=False)
    assert {node["activation"] for node in json.loads(path.read_text())["nodes"]} == {None}


FIRST_ERROR = next(index for index, node in enumerate(theirs()["nodes"]) if node["feature"] == -1)
BROKEN: list[tuple[tuple[str | int, ...], Any, str]] = [
    (
        ("metadata", "schema_version"),
        2,
        "schema_version is 2; this version of circuits reads 1; upgrade circuits",
    ),
    (
        ("metadata", "prompt_tokens"),
        "w1 w2",
        "metadata.prompt_tokens is 'w1 w2'; it should be a valid array",
    ),
    (
        ("metadata", "prompt_tokens"),
        [],
        r"metadata.prompt_tokens is \[\]; the list should have at least 1 item",
    ),
    (("metadata",), [], r"metadata is \[\]; it should be an object"),
    (("nodes",), None, "nodes is None; it should be a valid array"),
    (("nodes", 0), "0_5_11", "nodes.0 is '0_5_11'; it should be an object"),
    (("nodes", 0, "node_id"), 7, "nodes.0.node_id is 7; it should be a valid string"),
    (
        ("nodes", 0, "node_id"),
        "0_16_11",
        "two nodes are called '0_16_11', a cross layer transcoder and a cross layer transcoder",
    ),
    (
        ("nodes", FIRST_ERROR, "node_id"),
        "0_5_11",
        "a cross layer transcoder and a mlp reconstruction error; circuit-tracer before mid-2026",
    ),
    (("nodes", 0, "node_id"), "1_5_11", "its id must be 0_<number>_11"),
    (("nodes", 0, "node_id"), "5", "its id must be 0_<number>_11"),
    (
        ("nodes", 0, "feature_type"),
        "lorsa",
        "'lorsa'; graphs with Lorsa's attention features cannot be read",
    ),
    (
        ("nodes", 0, "feature_type"),
        "lorsa error",
        "'lorsa error'; graphs with Lorsa's attention features cannot be read",
    ),
    (("nodes", 0, "feature_type"), ["logit"], r"nodes.0.feature_type is \['logit'\]; it should be"),
    (("nodes", 0, "feature_type"), "neuron", "types that can be read are cross layer transcoder"),
    (
        ("nodes", 0, "ctx_idx"),
        12,
        "ctx_idx is 12; it must be a position of the prompt, from 0 to 11",
    ),
    (("nodes", 0, "ctx_idx"), True, "ctx_idx is True; it should be a valid integer"),
    (("nodes", 0, "layer"), "9" * 30, "layer is 9+; it should be less than or equal to 10000"),
    (("nodes", 0, "layer"), 10**9, "layer is 10+; it should be less than or equal to 10000"),
    (
        ("nodes", 0, "activation"),
        1e300,
        "activation is 1e\\+300; it should be less than or equal to 340282",
    ),
    (("nodes", 0, "influence"), "0.5", "influence is '0.5'; it should be a valid number"),
    (("links", 0), {"weight": 1.0}, "links.0.source is missing; it is required"),
    (("links", 0, "source"), "0_7_0", "'0_7_0' -> '0_5_11' has an end that is none of the nodes"),
    (("links", 0, "source"), "4_403_11", "does not lead from a token, feature or error up to"),
    (("links", 0, "target"), "E_1_0", "does not lead from a token, feature or error up to"),
    (("links", 0, "weight"), 10**400, "links.0.weight is 1000+...; it should be a finite number"),
    (("links", 0, "weight"), None, "links.0.weight is None; it should be a valid number"),
    (("links", 1, "source"), "E_140_1", "the link 'E_140_1' -> '0_5_11' is there twice"),
    (
        ("qParams", "supernodes"),
        [["name", 1]],
        "qParams.supernodes.0.1 is 1; it should be a valid string",
    ),
    (("qParams", "pinnedIds"), "0_5_11", "pinnedIds is '0_5_11'; it should be a valid array"),
]


@pytest.mark.parametrize(("place", "value", "told"), BROKEN, ids=lambda part: str(part)[:40])
def test_a_file_that_is_wrong_is_one_line_that_says_where(tmp_path, place, value, told):
    content = deepcopy(theirs())
    inner: Any = content
    for step in place[:-1]:
        inner = inner[step]
    inner[place[-1]] = value
    with pytest.raises(circuits.InputError, match=told) as raised:
        load_neuronpedia(written(tmp_path / "graph.json", content))
    assert str(raised.value).startswith(str(tmp_path))
    assert "\n" not in str(raised.value)
    assert len(str(raised.value)) < 400


@pytest.mark.parametrize(
    ("text", "told"),
    [
        (THEIRS.read_text()[:-100], "is truncated or not JSON"),
        ("", "is truncated or not JSON"),
        ("[" * 100_000, "is truncated or not JSON"),
        ("[1, 2]", r"the file is \[1, 2\]; it should be an object"),
        (
            THEIRS.read_text().replace("0.7927415370941162", "NaN"),
            "influence is nan; it should be a finite number",
        ),
        (
            THEIRS.read_text().replace("-0.0831870585680008", "-Infinity"),
            "weight is -inf; it should be a finite number",
        ),
        (
            THEIRS.read_text().replace("-0.0831870585680008", "-1e999"),
            "weight is -inf; it should be a finite number",
        ),
    ],
    ids=lambda part: part[:20],
)
def test_a_file_that_is_no_such_json_is_one_line(tmp_path, text, told):
    with pytest.raises(circuits.InputError, match=told) as raised:
        load_neuronpedia(written(tmp_path / "graph.json", text))
    assert "\n" not in str(raised.value)
    with pytest.raises(circuits.InputError, match="there is no file"):
        load_neuronpedia(tmp_path / "other.json")
    (tmp_path / "bytes.json").write_bytes(b"\xff\xfe{")
    with pytest.raises(circuits.InputError, match="is truncated or not JSON"):
        load_neuronpedia(tmp_path / "bytes.json")
