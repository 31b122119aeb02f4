"""The page of an attribution graph: what it holds, checked on its text, and what a reader sees and
does, in a real browser.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import time
import tracemalloc
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from browser import READY, Browser, wait_for
from random_transcoders import model_of, random_transcoders
from synthetic_feature_graph import SENTENCE, synthetic_graph

from circuits.attribution.feature_graph import EMBEDDING, FEATURE, TARGET, FeatureGraph, LogitTarget
from circuits.attribution.influence import edge_influence, node_influence, prune
from circuits.discovery.methods.attribution_graph import AttributionGraph
from circuits.plotting.graph_page.data import GraphData
from circuits.plotting.graph_page.page import (
    SCRIPTS,
    SERVED_SCRIPT,
    STYLES,
    graph_page,
    served_page,
)
from circuits.system.errors import InputError

STATIC = Path(__file__).parents[1] / "circuits" / "plotting" / "static"
HOSTILE = "</script><b>"


@pytest.fixture(scope="module")
def graph() -> FeatureGraph:
    return synthetic_graph()


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    started = Browser()
    yield started
    started.close()


def held(page: str, what: str) -> Any:
    return json.loads(
        re.findall(rf'<script type="application/json" id="{what}">(.*?)</script>', page)[0]
    )


def with_text(graph: FeatureGraph, text: str) -> FeatureGraph:
    """The graph with one token and one target of that text."""
    return replace(
        graph,
        words=(*graph.words[:3], text, *graph.words[4:]),
        targets=(LogitTarget(text, 1), *graph.targets[1:]),
    )


# What is in the page


def test_the_page_holds_every_node_and_edge_of_a_small_graph(graph: FeatureGraph) -> None:
    page = graph_page(graph, title="a graph", details={"model": "toy"})
    nodes, edges = held(page, "held")["nodes"], held(page, "held")["edges"]
    assert nodes["name"] == [str(graph.node(number)) for number in range(len(graph.nodes))]
    assert edges["source"] == graph.source.tolist() and edges["target"] == graph.target.tolist()
    for name, column in (
        ("weight", graph.weight),
        ("direct", graph.direct),
        ("influence", edge_influence(graph)),
    ):
        torch.testing.assert_close(
            torch.tensor(edges[name], dtype=torch.float64), column.double(), rtol=1e-6, atol=0
        )
    assert "<dt>model</dt><dd>toy</dd>" in page and "This page holds" not in page


def test_of_a_large_graph_the_page_holds_the_most_influential_and_says_so(
    graph: FeatureGraph,
) -> None:
    page = graph_page(graph, title="cut", max_nodes=50, max_edges=100)
    assert (
        "the 50 most influential of 168 nodes and, between them, the 100 most influential of 2,000 "
        "edges; circuits view has all" in page
    )
    kept = torch.tensor(held(page, "held")["nodes"]["id"])
    always = graph.is_kind(EMBEDDING, TARGET)
    assert always[kept].sum() == always.sum()
    assert "holds all 168 nodes and, between them, the 100 most" in graph_page(
        graph, title="cut", max_edges=100
    )
    reached = node_influence(graph)
    left = torch.ones(len(graph.nodes), dtype=torch.bool).index_fill(0, kept, False)
    assert reached[left].max() <= reached[kept[~always[kept]]].min()


def test_the_page_loads_nothing_and_only_its_own_script_and_style_may_run(
    graph: FeatureGraph,
) -> None:
    page = graph_page(graph, title="alone")
    loads = re.findall(
        r"(?:\bsrc|\bhref)\s*=\s*\"[^\"]+\"|url\([^)]*\)|@import|<iframe\b|\bfetch\(|XMLHttpRequest|https?://[^\s\"'`]+",
        page,
    )
    assert set(loads) == {'href="data:,"', "http://www.w3.org/2000/svg"}
    policy = re.findall(r'Content-Security-Policy" content="([^"]+)"', page)[0]
    assert (
        policy.startswith("default-src 'none'")
        and "unsafe" not in policy
        and "connect-src" not in policy
    )
    for element, content in (
        ("script", re.findall("<script>(.*?)</script>", page, re.S)),
        ("style", re.findall("<style>(.*?)</style>", page, re.S)),
    ):
        digest = base64.b64encode(hashlib.sha256(content[0].encode()).digest()).decode()
        assert len(content) == 1 and f"{element}-src 'sha256-{digest}'" in policy


def test_text_is_escaped_everywhere(graph: FeatureGraph) -> None:
    page = graph_page(with_text(graph, HOSTILE), title=HOSTILE, details={HOSTILE: HOSTILE})
    assert HOSTILE not in page and "<b>" not in page
    assert page.count("</script>") == 3
    blocks = re.findall(r'<script type="application/json" id="\w+">(.*)</script>', page)
    assert len(blocks) == 2 and not set("<>&") & set("".join(blocks))
    assert held(page, "about")["words"][3] == held(page, "about")["title"] == HOSTILE


def test_the_parts_of_the_page_can_stand_inside_it() -> None:
    for name in (*SCRIPTS, SERVED_SCRIPT, *STYLES):
        text = (STATIC / name).read_text()
        assert not re.search("</script|</style|<!--", text, re.I), name
        assert name == "style.css" or len(text.splitlines()) <= 300, name
        assert all(ord(character) < 128 for character in text), name


def test_numbers_that_json_does_not_have_are_left_out(graph: FeatureGraph) -> None:
    odd = replace(graph, weight=graph.weight.clone().index_fill_(0, torch.tensor([0]), torch.inf))
    assert held(graph_page(odd, title="odd"), "held")["edges"]["weight"][0] is None


def test_a_weight_that_is_nan_gives_null_not_zero(graph: FeatureGraph) -> None:
    target = len(graph.nodes) - 1
    into = (graph.target == target).nonzero().flatten()
    odd = replace(graph, weight=graph.weight.index_fill(0, into[:1], torch.nan))
    data = GraphData.of(odd)
    assert data.about()["total"]["influence"] is None
    source = int(graph.source[into[0]])
    for numbers in ([target], [target, target - 1]):
        incoming = data.around(numbers, len(graph.nodes))["incoming"]
        weights = dict(zip(incoming["node"], incoming["weight"], strict=True))
        assert weights.pop(source) is None and None not in weights.values()


@pytest.mark.parametrize("limit", ["max_nodes", "max_edges"])
def test_a_negative_limit_is_refused(graph: FeatureGraph, limit: str) -> None:
    with pytest.raises(InputError, match=f"{limit}=-1"):
        graph_page(graph, title="", **{limit: -1})


def test_the_served_page_is_small_and_may_ask_its_server_only(graph: FeatureGraph) -> None:
    page, policy = served_page(GraphData.of(graph), "served")
    assert held(page, "held") is None and "connect-src 'self'" in policy
    assert len(page) < 120_000


# What pages ask for


def test_edges_around_a_node_are_the_graphs_strongest(graph: FeatureGraph) -> None:
    data = GraphData.of(graph)
    for name in ("f3.7185@12", str(graph.node(len(graph.nodes) - 1)), "tok_embed@3"):
        around = data.around([graph.find(name)], 7)
        for side, expected in (
            ("incoming", graph.incoming(name, 7)),
            ("outgoing", graph.outgoing(name, 7)),
        ):
            assert [data.names[number] for number in around[side]["node"]] == expected[
                "node"
            ].tolist()
            assert around[side]["weight"] == pytest.approx(expected["weight"].tolist(), rel=1e-6)
            assert around[side]["direct"] == pytest.approx(expected["direct"].tolist(), rel=1e-6)
        assert around["incoming"]["total"] == int((graph.target == graph.find(name)).sum())


def test_edges_around_several_nodes_are_summed_without_those_between_them(
    graph: FeatureGraph,
) -> None:
    data, dense = GraphData.of(graph), graph.adjacency()
    chosen = torch.topk(node_influence(graph) * graph.is_kind(FEATURE), 6).indices.tolist()
    around = data.around(chosen, len(graph.nodes))
    outside = torch.ones(len(graph.nodes), dtype=torch.bool).index_fill(
        0, torch.tensor(chosen), False
    )
    for side, sums in (("incoming", dense[chosen].sum(0)), ("outgoing", dense[:, chosen].sum(1))):
        found = torch.zeros(len(graph.nodes)).index_copy(
            0, torch.tensor(around[side]["node"]), torch.tensor(around[side]["weight"])
        )
        torch.testing.assert_close(found, sums * outside, rtol=1e-5, atol=1e-6)


def test_a_view_is_what_prune_keeps_and_of_that_the_most_influential(graph: FeatureGraph) -> None:
    data, kept = GraphData.of(graph), prune(graph, node_threshold=0.7, edge_threshold=0.9)
    view = data.view(0.7, 0.9, 1000, 10**6)
    assert view["nodes"]["id"] == kept.nodes.nonzero().flatten().tolist()
    assert view["edges"]["source"] == graph.source[kept.edges].tolist()
    fewer = data.view(0.7, 0.9, 40, 10)
    assert (
        len(fewer["nodes"]["id"]) == 40
        and len(fewer["edges"]["source"]) == 10
        and fewer["kept"] == view["kept"]
    )
    assert min(fewer["edges"]["influence"]) >= sorted(view["edges"]["influence"])[-30]


def test_a_request_for_edges_reads_those_of_its_nodes_only() -> None:
    data = GraphData.of(synthetic_graph(features=2000, edges=400_000))
    data.around([0], 10)
    tracemalloc.start()
    data.around([1000, 1500], 10)
    data.between([1000, 1500], 10)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    # To compare all edges with a node makes at least one byte for each.
    assert peak < len(data.graph)


def test_text_that_is_no_valid_unicode_is_shown_and_found(graph: FeatureGraph) -> None:
    half = "\ud83d"
    data = GraphData.of(
        replace(
            graph, words=(half, *graph.words[1:]), targets=(LogitTarget(half), *graph.targets[1:])
        )
    )
    assert {f"logits:{half}@20", "tok_embed@0"} <= set(data.search(half, 9)["nodes"]["name"])


def test_search_puts_names_before_tokens_and_both_before_what_stands_at_a_token(
    graph: FeatureGraph,
) -> None:
    data = GraphData.of(graph)
    assert data.search("F3.7185@12 ", 5)["nodes"]["name"] == ["f3.7185@12"]
    assert set(data.search("f2.", 50)["nodes"]["layer"]) == {2}
    found = data.search("dallas", 50)
    assert found["nodes"]["name"][0] == "tok_embed@8" and set(found["nodes"]["position"]) == {8}
    assert data.search("", 5) == {
        "nodes": data.node_table([]),
        "found": 0,
    }
    assert data.search("f", 3)["found"] > 3 == len(data.search("f", 3)["nodes"]["id"])


# In the browser


def opened(browser: Browser, folder: Path, graph: FeatureGraph, **more: Any) -> Path:
    path = folder / "graph.html"
    path.write_text(
        graph_page(graph, title="Fact: the capital of the state containing Dallas", **more),
        encoding="utf-8",
    )
    browser.open(path)
    return path


def feature(name: str) -> str:
    return f'#stage .node[aria-label^="feature {name},"]'


def drawn(browser: Browser) -> tuple[set[int], set[tuple[int, int]]]:
    """Numbers of the nodes in the picture, and the ends of the edges that are there while nothing
    is selected.
    """
    nodes = browser.js(
        "[...document.querySelectorAll('#stage .nodes:not(.guests) .node')].map((one) => "
        "Number(one.dataset.id))"
    )
    edges = browser.js(
        "[...document.querySelectorAll('#stage .edges:not(.lit) .edge')].map((one) => "
        "[Number(one.dataset.source), Number(one.dataset.target)])"
    )
    return set(nodes), {(source, target) for source, target in edges}


def settled(browser: Browser, status: str) -> None:
    browser.wait(f"document.getElementById('shown').textContent.includes({json.dumps(status)})")


def listed(browser: Browser, side: str) -> list[tuple[str, float, float, float]]:
    rows = browser.js(
        f"[...document.querySelectorAll('.edges-of[data-side={side}] tbody tr')].map((row) => "
        "[row.dataset.node, ...[...row.querySelectorAll('[data-value]')].map((cell) => "
        "Number(cell.dataset.value))])"
    )
    return [tuple(row) for row in rows]


def selected(browser: Browser, name: str) -> None:
    browser.wait(
        f"document.querySelector('#selection h2')?.textContent.startsWith({json.dumps(name)})"
    )


@pytest.mark.browser
def test_a_page_opens_from_a_file_without_errors_or_requests(
    browser: Browser, tmp_path: Path, graph: FeatureGraph
) -> None:
    path = opened(browser, tmp_path, graph)
    assert browser.errors() == []
    assert browser.requests() == [path.as_uri()]
    labels = browser.js(
        "[...document.querySelectorAll('#stage .tokens text')].map((text) => text.textContent)"
    )
    assert labels == list(graph.words)
    assert browser.js(
        "[...document.querySelectorAll('#stage .node[data-kind=target]')].map((one) => "
        "one.textContent)"
    ) == [
        "\u00b7Sacramento  60 %",
        "\u00b7Austin  24 %",
        "\u00b7the  9.6 %",
    ]


@pytest.mark.browser
def test_the_thresholds_draw_what_prune_keeps(
    browser: Browser, tmp_path: Path, graph: FeatureGraph
) -> None:
    opened(browser, tmp_path, graph)
    sizes = []
    for nodes, edges in ((0.8, 0.98), (0.5, 0.98), (0.5, 0.6), (0.95, 0.9)):
        browser.slide("#node-threshold", nodes)
        browser.slide("#edge-threshold", edges)
        kept = prune(graph, node_threshold=nodes, edge_threshold=edges)
        settled(
            browser,
            f"Drawn: {int(kept.nodes.sum())} of 168 nodes, {int(kept.edges.sum())} of 2,000 edges",
        )
        numbers, ends = drawn(browser)
        assert numbers == set(kept.nodes.nonzero().flatten().tolist())
        assert ends == set(
            zip(graph.source[kept.edges].tolist(), graph.target[kept.edges].tolist(), strict=True)
        )
        sizes.append((len(numbers), len(ends)))
    assert len(set(sizes)) == 4
    assert browser.errors() == []


@pytest.mark.browser
def test_influences_that_a_weight_makes_undefined_are_said_to_be_that(
    browser: Browser, tmp_path: Path, graph: FeatureGraph
) -> None:
    into_a_target = int((graph.target == len(graph.nodes) - 1).nonzero()[0])
    odd = replace(
        graph, weight=graph.weight.index_fill(0, torch.tensor([into_a_target]), torch.nan)
    )
    opened(browser, tmp_path, odd)
    influences = browser.js(
        "[...document.querySelectorAll('#stage .node[data-kind=feature]')].map((one) => "
        "one.getAttribute('aria-label'))"
    )
    assert influences
    assert all("influence undefined" in each for each in influences)
    assert browser.errors() == []


@pytest.mark.browser
def test_a_clicked_node_lists_and_draws_its_strongest_edges(
    browser: Browser, tmp_path: Path, graph: FeatureGraph
) -> None:
    opened(browser, tmp_path, graph)
    number = max(
        drawn(browser)[0],
        key=lambda one: float(node_influence(graph)[one]) * float(graph.nodes.kind[one] == FEATURE),
    )
    name = str(graph.node(number))
    browser.click(feature(name))
    selected(browser, name.split("@")[0])
    ends = set()
    for side, expected in (("inputs", graph.incoming(name)), ("outputs", graph.outgoing(name))):
        rows = listed(browser, side)
        assert [row[0] for row in rows] == expected["node"].tolist()
        for row, values in zip(
            rows, expected[["weight", "direct", "attention"]].itertuples(index=False), strict=True
        ):
            assert row[1:] == pytest.approx(tuple(values), rel=1e-4, abs=1e-6)
        ends |= {
            (graph.find(other), number) if side == "inputs" else (number, graph.find(other))
            for other in expected["node"]
        }
    lit = "[...document.querySelectorAll('#stage .edges.lit .edge')]"
    assert {
        tuple(edge)
        for edge in browser.js(
            f"{lit}.map((one) => [Number(one.dataset.source), Number(one.dataset.target)])"
        )
    } == ends
    colours = browser.js(
        f"{lit}.map((one) => [Number(one.dataset.weight) > 0, one.getAttribute('stroke'), "
        f"Number(one.getAttribute('stroke-width'))])"
    )
    assert {(positive, colour) for positive, colour, _ in colours} == {
        (True, "#0072b2"),
        (False, "#d55e00"),
    }
    weights = browser.js(f"{lit}.map((one) => Math.abs(Number(one.dataset.weight)))")
    assert [width for _, _, width in colours] == sorted(
        width for _, _, width in colours
    ) and weights == sorted(weights)
    browser.press("Escape")
    browser.wait(
        "document.querySelector('#selection h2').textContent === 'Most influential features'"
    )


@pytest.mark.browser
def test_lists_of_a_page_that_holds_some_edges_say_so(
    browser: Browser, tmp_path: Path, graph: FeatureGraph
) -> None:
    opened(browser, tmp_path, graph, max_edges=300)
    browser.click("#stage .node[data-kind=target]")
    browser.wait(
        "document.querySelector('.edges-of[data-side=inputs] h3')?.textContent.endsWith('in this "
        "page')"
    )
    opened(browser, tmp_path, graph)
    browser.click("#stage .node[data-kind=target]")
    browser.wait(
        r"/^Inputs the strongest 10 of "
        r"\d+$/.test(document.querySelector('.edges-of[data-side=inputs] h3')?.textContent)"
    )


@pytest.mark.browser
def test_the_picture_is_drawn_once_until_the_window_changes(
    browser: Browser, tmp_path: Path, graph: FeatureGraph
) -> None:
    path = opened(browser, tmp_path, graph)
    page = browser.another_page()
    page.add_init_script(
        "window.drawings = 0; new MutationObserver((changes) => { for (const one of changes) "
        "drawings += one.target.id === 'stage' ? one.addedNodes.length : 0; })"
        ".observe(document, {childList: true, subtree: true});"
    )
    page.goto(path.as_uri())
    page.wait_for_function(f"() => {READY}")
    page.wait_for_timeout(500)
    assert page.evaluate("drawings") == 1
    page.set_viewport_size({"width": 1000, "height": 700})
    page.wait_for_function("() => drawings === 2")
    page.close()


@pytest.mark.browser
def test_pointing_lights_up_a_node_and_says_what_it_is(
    browser: Browser, tmp_path: Path, graph: FeatureGraph
) -> None:
    opened(browser, tmp_path, graph)
    browser.point(feature("f3.7185@12"))
    browser.wait(
        "!document.querySelector('.tip').hidden && "
        "document.querySelector('.tip').textContent.startsWith('f3.7185  @12 of')"
    )
    assert browser.js("document.querySelectorAll('#stage .edges.lit .edge').length") > 3
    assert (
        browser.js(
            "document.querySelector('#stage .tokens "
            "text[data-position=\"12\"]').getAttribute('font-weight')"
        )
        == "700"
    )


@pytest.mark.browser
def test_pins_supernodes_and_thresholds_survive_a_reload(
    browser: Browser, tmp_path: Path, graph: FeatureGraph
) -> None:
    opened(browser, tmp_path, graph)
    browser.slide("#node-threshold", 0.7)
    browser.wait("document.querySelector('output[for=node-threshold]').textContent === '70 %'")
    members = sorted(number for number in drawn(browser)[0] if graph.nodes.kind[number] == FEATURE)[
        :4
    ]
    for number in members[:3]:
        browser.click(f'#stage .node[data-id="{number}"]', shift=True)
        browser.wait(
            f"document.querySelector('#stage "
            f".node[data-id=\"{number}\"]').getAttribute('aria-label').includes('marked')"
        )
    browser.click("#make-supernode")
    browser.wait("document.activeElement.matches('.supernodes input')")
    browser.write("say a capital")
    browser.press("Enter")
    browser.js("document.activeElement.blur()")
    browser.click(f'#stage .node[data-id="{members[3]}"]')
    selected(browser, str(graph.node(members[3])).split("@")[0])
    browser.press("p")
    browser.wait("document.getElementById('kept').textContent.includes('in this browser')")
    time.sleep(0.4)
    browser.reload()
    groups = browser.js(
        "[...document.querySelectorAll('.supernodes li')].map((one) => "
        "[one.querySelector('input').value, one.textContent])"
    )
    assert groups == [["say a capital", "3 nodesUngroup"]]
    assert browser.js("document.querySelector('.pinned').textContent").startswith(
        str(graph.node(members[3])).split("@")[0]
    )
    assert browser.js("document.getElementById('node-threshold').value") == "0.7"
    inside = (
        "[...document.querySelectorAll('#stage .node')].filter("
        "(one) => one.getAttribute('aria-label').includes('in say a capital'))"
    )
    marks = browser.js(f"{inside}.map((one) => Number(one.dataset.id))")
    assert sorted(marks) == members[:3]
    browser.click(".supernodes li button:last-child")
    browser.wait("!document.querySelector('.supernodes')")
    time.sleep(0.4)
    browser.reload()
    assert browser.js(
        "!document.querySelector('.supernodes') && Boolean(document.querySelector('.pinned'))"
    )
    # Another graph begins with nothing.
    opened(browser, tmp_path, synthetic_graph(edges=1999))
    assert browser.js("document.querySelector('.pinned')") is None and browser.errors() == []


@pytest.mark.browser
def test_the_subgraph_shows_pinned_nodes_and_supernodes_with_summed_weights(
    browser: Browser, tmp_path: Path, graph: FeatureGraph
) -> None:
    opened(browser, tmp_path, synthetic_graph(edges=1998))
    browser.click("#show-subgraph")
    browser.wait(
        "document.querySelector('#stage .empty')?.textContent.startsWith('Nothing is pinned yet')"
    )
    browser.click("#show-graph")
    graph, target = synthetic_graph(edges=1998), len(graph.nodes) - 3
    strongest = [
        graph.find(name)
        for name in graph.incoming(str(graph.node(target)), 40)["node"]
        if name.startswith("f")
    ]
    members = [number for number in strongest if number in drawn(browser)[0]][:2]
    for number in members:
        browser.click(f'#stage .node[data-id="{number}"]', shift=True)
    browser.press("g")
    browser.wait("document.querySelector('.supernodes')")
    browser.js("document.activeElement.blur()")
    browser.click(f'#stage .node[data-id="{target}"]')
    selected(browser, "\u00b7Sacramento")
    browser.press("p")
    browser.click("#show-subgraph")
    browser.wait("document.querySelectorAll('#stage .box').length === 2")
    total = float(graph.adjacency()[target, members].sum())
    (edge,) = browser.js(
        "[...document.querySelectorAll('#stage .edge')].map((one) => Number(one.dataset.weight))"
    )
    assert edge == pytest.approx(total, rel=1e-5)
    browser.click("#stage .box")
    selected(browser, "supernode 1")
    assert (str(graph.node(target)), pytest.approx(total, rel=1e-5)) in [
        row[:2] for row in listed(browser, "outputs")
    ]
    assert browser.errors() == []


@pytest.mark.browser
def test_search_finds_names_and_tokens_also_of_what_is_not_drawn(
    browser: Browser, tmp_path: Path, graph: FeatureGraph
) -> None:
    opened(browser, tmp_path, graph)
    found = "[...document.querySelectorAll('#found [role=option]')].map((one) => one.dataset.node)"
    hidden = next(
        str(graph.node(number)) for number in range(60) if number not in drawn(browser)[0]
    )
    browser.press("/")
    browser.wait("document.activeElement.id === 'search'")
    for text in ("dallas", hidden, "nothing of the kind"):
        browser.js("document.getElementById('search').select()")
        browser.write(text)
        expected = GraphData.of(graph).search(text, 12)["nodes"]["name"]
        browser.wait(
            f"JSON.stringify({found}) === "
            f"{json.dumps(json.dumps(expected, separators=(',', ':')))} && "
            f"!document.getElementById('found').hidden"
        )
        if text == hidden:
            browser.press("Enter")
            selected(browser, hidden.split("@")[0])
            assert (
                browser.js(
                    f"document.querySelectorAll('#stage .guests "
                    f"{feature(hidden).removeprefix('#stage ')}').length"
                )
                == 1
            )
            browser.js("document.getElementById('search').focus()")


@pytest.mark.browser
def test_hostile_text_is_shown_as_text(
    browser: Browser, tmp_path: Path, graph: FeatureGraph
) -> None:
    opened(browser, tmp_path, with_text(graph, HOSTILE), details={HOSTILE: HOSTILE})
    assert browser.js("document.querySelectorAll('#stage .tokens text')[3].textContent") == HOSTILE
    assert browser.js(
        "document.querySelector('#stage .node[data-kind=target]').textContent"
    ).startswith(HOSTILE)
    browser.js("document.getElementById('search').focus()")
    browser.write("</script>")
    browser.wait(
        f"document.querySelector('#found "
        f"[role=option]')?.textContent.startsWith({json.dumps(HOSTILE)})"
    )
    browser.press("Enter")
    selected(browser, HOSTILE)
    assert browser.js("document.querySelectorAll('b').length") == 0 and browser.errors() == []


@pytest.mark.browser
def test_tokens_without_a_shape_of_their_own_can_be_read(browser: Browser, tmp_path: Path) -> None:
    opened(
        browser,
        tmp_path,
        synthetic_graph(
            words=(" a", "\n", "\t", "", "\u202eabc", "\u65e5\u672c", "x" * 40),
            layers=2,
            features=20,
            edges=90,
        ),
    )
    labels = browser.js(
        "[...document.querySelectorAll('#stage .tokens text')].map((text) => text.textContent)"
    )
    assert labels == [
        "\u00b7a",
        "\u21b5",
        "\u21e5",
        "\u2205",
        "<202e>abc",
        "\u65e5\u672c",
        "x" * 12 + "\u2026",
    ]


@pytest.mark.browser
def test_the_picture_is_saved_as_svg_and_png(
    browser: Browser, tmp_path: Path, graph: FeatureGraph
) -> None:
    opened(browser, tmp_path, with_text(graph, HOSTILE))
    browser.downloads_into(tmp_path)
    browser.click("#save-svg")
    browser.click("#save-png")
    name = "fact-the-capital-of-the-state-containing-dallas"
    svg, png = (
        wait_for(browser, lambda ending=ending: next(tmp_path.glob(f"{name}.{ending}"), None))
        for ending in ("svg", "png")
    )  # type: ignore[misc]
    root = ElementTree.parse(svg).getroot()
    assert root.tag == "{http://www.w3.org/2000/svg}svg"
    numbers, edges = drawn(browser)
    classes = [element.get("class") for element in root.iter()]
    assert classes.count("node") == len(numbers) and classes.count("edge") == len(edges)
    assert HOSTILE in [text.text for text in root.iter("{http://www.w3.org/2000/svg}text")]
    content = wait_for(browser, lambda: png.read_bytes() if png.stat().st_size > 1000 else None)
    assert content[:8] == b"\x89PNG\r\n\x1a\n"
    assert int.from_bytes(content[16:20]) == pytest.approx(
        2 * float(root.get("width", "nan")), abs=2
    )


@pytest.mark.browser
def test_everything_can_be_done_with_keys(
    browser: Browser, tmp_path: Path, graph: FeatureGraph
) -> None:
    opened(browser, tmp_path, synthetic_graph(edges=1997))
    browser.js("document.querySelector('#stage .node[tabindex=\"0\"]').focus()")
    places = []
    for key in ("ArrowDown", "ArrowLeft", "ArrowLeft", "ArrowDown"):
        browser.press(key)
        places.append(browser.js("document.activeElement.dataset.id"))
    assert len(set(places)) == 4
    browser.press("Enter", shift=True)
    browser.wait("document.querySelector('.marked')")
    browser.press("Enter")
    browser.wait("document.querySelector('#selection .facts')")
    assert browser.js("document.activeElement.dataset.id") == places[-1]
    browser.press("p")
    browser.wait("document.querySelector('.pinned')")
    browser.press("g")
    browser.wait("document.activeElement.matches('.supernodes input')")
    unnamed = (
        "[...document.querySelectorAll('button, input, [role=button]')].filter((one) => "
        "!(one.textContent.trim() || one.getAttribute('aria-label') || one.labels?.length)).length"
    )
    assert browser.js(unnamed) == 0


@pytest.mark.browser
@pytest.mark.parametrize("layers, features, repeats", [(4, 60, 1), (26, 736, 3)])
def test_labels_and_nodes_do_not_overlap_and_everything_fits(
    browser: Browser, tmp_path: Path, layers: int, features: int, repeats: int
) -> None:
    words = (SENTENCE * repeats)[: 21 * repeats]
    opened(
        browser,
        tmp_path,
        synthetic_graph(words=words, layers=layers, features=features, edges=20_000),
    )
    overlaps = """(() => {
      const boxes = [...document.querySelectorAll('#stage .names text, #stage .node')].map((one) =>
      one.getBoundingClientRect());
      const meet = (a, b) => a.left < b.right - 2 && b.left < a.right - 2 && a.top < b.bottom - 3 &&
      b.top < a.bottom - 3;
      return boxes.reduce((sum, a, i) => sum + boxes.slice(0, i).filter((b) => meet(a, b)).length,
      0);
    })()"""
    assert browser.js(overlaps) == 0
    assert browser.js(
        "[stage.scrollWidth - stage.clientWidth, stage.scrollHeight - stage.clientHeight]"
    ) == [0, 0]
    assert browser.js(
        "document.documentElement.scrollWidth <= 1280 && document.documentElement.scrollHeight <= "
        "800"
    )


@pytest.mark.browser
def test_a_graph_of_a_real_model_is_shown(browser: Browser, tmp_path: Path) -> None:
    model = model_of("gpt2", n_layers=3)
    graph = AttributionGraph(random_transcoders(model, "clt")).attribute(
        model, [3, 14, 15, 9, 26, 5, 35, 8]
    )
    opened(browser, tmp_path, graph)
    kept = prune(graph)
    settled(browser, f"{int(kept.nodes.sum())} of {len(graph.nodes)} nodes")
    name = graph.incoming(str(graph.node(len(graph.nodes) - 1)))["node"][0]
    browser.js("document.getElementById('search').focus()")
    browser.write(name)
    browser.wait(
        f"document.querySelector('#found [role=option]')?.dataset.node === {json.dumps(name)}"
    )
    browser.press("Enter")
    browser.wait("document.querySelector('.edges-of[data-side=outputs] tbody')")
    assert [row[0] for row in listed(browser, "outputs")] == graph.outgoing(name)["node"].tolist()
    assert browser.errors() == []
