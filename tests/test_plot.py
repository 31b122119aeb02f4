"""Pictures and pages: what they show, checked on the text that comes out."""

from __future__ import annotations

import itertools
import re
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pandas
import pytest
import torch
from browser import Browser
from plotly.offline import get_plotlyjs

from circuits.graph.circuit import Circuit
from circuits.graph.edges import SLOTS, Edge
from circuits.graph.graph import Graph
from circuits.graph.nodes import (
    MLP,
    Embed,
    Feature,
    Head,
    Logits,
    Node,
    TokenEmbed,
    at_position,
    parse_node,
)
from circuits.plotting import pages
from circuits.plotting.circuit_drawing.layout import Layout, lay_out
from circuits.plotting.circuit_drawing.relaxation import separated
from circuits.plotting.circuit_drawing.rows import NODE_HEIGHT
from circuits.system.errors import InputError

SVG = "{http://www.w3.org/2000/svg}"
SPANS = ("IO", "S1", "S1+1", "<x>&")


def graph_from_triples(nodes, edges, *, positions=None) -> Graph:
    """A graph from (source index, target index, slot or -1) triples."""
    source, target, slot = torch.tensor(edges).reshape(-1, 3).T.contiguous().unbind(0)
    return Graph(tuple(nodes), source, target, slot, positions)


def components(layers: int, heads: int, spans: Sequence[str] | None = None) -> Graph:
    """The component graph of a sequential model, written down again so that these tests need no
    model.
    """
    order: list[Node] = [Embed()]
    for layer in range(layers):
        order += [*(Head(layer, head) for head in range(heads)), MLP(layer)]
    order.append(Logits())
    copies = spans or (None,)
    # The heads of a layer read what stood before the layer; an MLP and the logits everything before
    # themselves.
    sources_of = {
        node: 1 + node.layer * (heads + 1) if isinstance(node, Head) else index
        for index, node in enumerate(order)
    }
    nodes = [at_position(node, span) for node in order for span in copies]
    edges = [
        (source * len(copies) + copy, order.index(target) * len(copies) + copy, slot)
        for target, sources in sources_of.items()
        for slot in (range(len(SLOTS)) if isinstance(target, Head) else (-1,))
        for copy in range(len(copies))
        for source in range(sources)
    ]
    return graph_from_triples(nodes, edges, positions=None if spans is None else tuple(spans))


def scored(graph: Graph, size: int, seed: int = 0) -> Circuit:
    scores = torch.randn(len(graph), generator=torch.Generator().manual_seed(seed)) ** 3
    return Circuit.full(graph, scores).top(size)


@pytest.fixture(scope="module")
def circuit() -> Circuit:
    return scored(components(4, 4), 50)


def edge_marks(svg: str) -> dict[str, ElementTree.Element]:
    """The path of each drawn edge, by the edge's name."""
    groups = [
        group
        for group in ElementTree.fromstring(svg).iter(f"{SVG}g")
        if group.get("class") == "edge"
    ]
    return {
        group.findtext(f"{SVG}title", "").split("  ")[0]: group.find(f"{SVG}path")
        for group in groups
    }  # type: ignore[misc]


def boxes(svg: str) -> dict[str, ElementTree.Element]:
    """The rectangle of each drawn node, by the node's name."""
    groups = [
        group
        for group in ElementTree.fromstring(svg).iter(f"{SVG}g")
        if group.get("class") == "node"
    ]
    return {
        group.findtext(f"{SVG}title", "").split("\n")[0]: group.find(f"{SVG}rect")
        for group in groups
    }  # type: ignore[misc]


def top_of(box: ElementTree.Element) -> float:
    return float(box.get("y", "nan"))


def lines(svg: str) -> list[str]:
    """The visible texts of a drawing."""
    return ["".join(text.itertext()) for text in ElementTree.fromstring(svg).iter(f"{SVG}text")]


def visible_text(svg: str) -> str:
    return " ".join(lines(svg))


def tooltip(svg: str, node: Node) -> list[str]:
    """The lines of a drawn node's tooltip."""
    titles = [title.text or "" for title in ElementTree.fromstring(svg).iter(f"{SVG}title")]
    (found,) = [title for title in titles if title.startswith(f"{node}\n")]
    return found.split("\n")


def loads(page: str) -> list[str]:
    """Whatever in a page could make a browser fetch something."""
    return re.findall(
        r"(?:\bsrc|\bhref)\s*=\s*[^\s>]+|url\([^)]*\)|@import|<link\b|<iframe\b|\bfetch\(|XMLHttpRequest",
        page,
    )


# The drawing


def test_every_kept_edge_is_drawn_with_its_name_and_score(circuit: Circuit) -> None:
    svg = pages.draw_circuit(circuit)
    titles = [title.text or "" for title in ElementTree.fromstring(svg).iter(f"{SVG}title")]
    for edge, score in zip(circuit.edges, circuit.scores[circuit.kept].tolist(), strict=True):
        assert f"{edge}  {score:+.4g}" in titles
    assert len(edge_marks(svg)) == len(circuit) == 50


def test_only_nodes_with_edges_are_drawn() -> None:
    circuit = scored(components(4, 4), 8)
    used = {str(node) for edge in circuit.edges for node in (edge.source, edge.target)}
    assert set(boxes(pages.draw_circuit(circuit))) == used
    assert len(used) < len(circuit.graph.nodes)


def test_logits_stand_on_top_embeddings_at_the_bottom_and_mlps_above_the_heads_of_their_layer() -> (
    None
):
    tops = {
        name: top_of(box)
        for name, box in boxes(
            pages.draw_circuit(Circuit.full(components(3, 2)), max_edges=10**6)
        ).items()
    }
    rows = ["embed", "a0.h0", "m0", "a1.h0", "m1", "a2.h0", "m2", "logits"]
    assert [tops[name] for name in rows] == sorted((tops[name] for name in rows), reverse=True)
    assert len({tops[name] for name in rows}) == len(rows)
    assert all(tops[f"a{layer}.h0"] == tops[f"a{layer}.h1"] for layer in range(3))


def test_an_edge_starts_on_its_source_and_ends_under_its_target(circuit: Circuit) -> None:
    svg = pages.draw_circuit(circuit)
    rectangles = boxes(svg)
    for edge in circuit.edges:
        numbers = [
            float(number)
            for number in re.findall(r"-?[\d.]+", edge_marks(svg)[str(edge)].get("d", ""))
        ]
        source, target = rectangles[str(edge.source)], rectangles[str(edge.target)]
        assert numbers[1] == pytest.approx(top_of(source), abs=0.1)
        assert numbers[-1] == pytest.approx(top_of(target) + NODE_HEIGHT, abs=0.1)
        assert 0 <= numbers[0] - float(source.get("x", "nan")) <= float(source.get("width", "nan"))


def test_a_head_is_entered_in_q_k_and_v_from_left_to_right_in_three_colours() -> None:
    graph = components(2, 1)
    svg = pages.draw_circuit(
        Circuit.from_edges(
            graph, ["embed->a1.h0.q", "embed->a1.h0.k", "embed->a1.h0.v", "a1.h0->logits"]
        )
    )
    marks = edge_marks(svg)
    ends = {}
    for slot in SLOTS:
        *_, x, _ = re.findall(r"-?[\d.]+", marks[f"embed->a1.h0.{slot}"].get("d", "").split("V")[0])
        ends[slot] = float(x)
    assert ends["q"] < ends["k"] < ends["v"]
    assert len({mark.get("stroke") for mark in marks.values()}) == 4


def test_stronger_edges_are_wider(circuit: Circuit) -> None:
    marks = edge_marks(pages.draw_circuit(circuit))
    pairs = sorted(
        zip(circuit.scores[circuit.kept].abs().tolist(), circuit.edges, strict=True),
        key=lambda pair: pair[0],
    )
    widths = [float(marks[str(edge)].get("stroke-width", "nan")) for _, edge in pairs]
    assert widths == sorted(widths)
    assert widths[-1] > 2 * widths[0]


def test_edges_with_a_score_below_zero_are_dashed(circuit: Circuit) -> None:
    marks = edge_marks(pages.draw_circuit(circuit))
    for edge, score in zip(circuit.edges, circuit.scores[circuit.kept].tolist(), strict=True):
        assert (marks[str(edge)].get("stroke-dasharray") is not None) == (score < 0)


def test_the_tooltip_of_a_node_lists_its_ten_strongest_edges_in_and_out_with_scores() -> None:
    graph = components(6, 1)
    circuit = Circuit.full(graph, torch.linspace(-2, 3, len(graph)))
    svg = pages.draw_circuit(circuit, max_edges=len(graph))
    strongest = sorted(circuit, key=lambda edge: -abs(circuit[edge]))
    for node in (Logits(), MLP(2), Embed()):
        expected = [str(node)]
        for direction, end in (("in", "target"), ("out", "source")):
            edges = [edge for edge in strongest if getattr(edge, end) == node]
            expected.append(f"edges drawn {direction}: {len(edges)}")
            expected += [f"  {edge}  {circuit[edge]:+.4g}" for edge in edges[:10]]
            expected += [f"  and {len(edges) - 10} more"] * (len(edges) > 10)
        assert tooltip(svg, node) == expected
    assert "  and 3 more" in tooltip(svg, Logits())


@pytest.mark.parametrize(
    ("edges", "score", "legend"),
    [
        (["embed->m0", "m0->logits"], 0.5, ["into MLPs or logits"]),
        (["embed->m0", "m0->logits"], -0.5, ["into MLPs or logits", "score below 0"]),
        (["embed->a0.h0.k", "a0.h0->a1.h0.v"], 0.5, ["k", "v"]),
    ],
)
def test_the_legend_explains_only_what_is_drawn(edges, score: float, legend) -> None:
    circuit = Circuit.from_edges(components(2, 1), edges)
    svg = pages.draw_circuit(replace(circuit, scores=torch.full_like(circuit.scores, score)))
    (line,) = [text for text in lines(svg) if "width: |score|" in text]
    explained = [entry.strip("\u25ac\u254d ") for entry in line.split("\u2003")]
    assert explained == [*legend, "width: |score|, 0.5 to 0.5"]


def test_the_legend_of_features_names_features() -> None:
    nodes = [TokenEmbed(2), Feature(0, 7, 2), Logits("answer", 2)]
    graph = graph_from_triples(nodes, [(0, 1, -1), (1, 2, -1)])
    text = visible_text(pages.draw_circuit(Circuit.full(graph)))
    assert "into features or logits" in text and "MLP" not in text


def test_the_picture_says_what_a_head_in_two_columns_does_if_there_is_one() -> None:
    graph = components(2, 2, SPANS)
    one_column = ["embed@S1->a0.h0.v@S1", "embed@IO->a0.h1.v@IO"]
    for edges, is_told in ((one_column, False), ([*one_column, "a0.h0@IO->m0@IO"], True)):
        text = visible_text(pages.draw_circuit(Circuit.from_edges(graph, edges)))
        assert ("A head in two columns can read at one position" in text) == is_told


def test_when_more_edges_are_kept_than_drawn_the_strongest_are_drawn_and_the_picture_says_so() -> (
    None
):
    circuit = scored(components(12, 12), 1204)
    svg = pages.draw_circuit(circuit, max_edges=200)
    assert set(edge_marks(svg)) == {str(edge) for edge in circuit.top(200).edges}
    assert "200 strongest of 1,204 edges" in visible_text(svg)
    assert "strongest of" not in visible_text(pages.draw_circuit(circuit.top(200)))


def test_an_empty_circuit_says_that_no_edges_are_kept() -> None:
    circuit = Circuit.from_edges(components(1, 1), [])
    assert "No edges kept" in visible_text(pages.draw_circuit(circuit, title="nothing"))
    assert "No edges kept" in pages.circuit_page(circuit, title="nothing")


@pytest.mark.parametrize("score", [float("nan"), float("inf"), 0.0], ids=str)
def test_scores_that_are_missing_infinite_or_zero_are_drawn_too(score: float) -> None:
    graph = components(2, 2)
    scores = torch.full((len(graph),), score)
    for values in (scores, torch.cat([torch.ones(1), scores[1:]])):
        svg = pages.draw_circuit(Circuit.full(graph, values), max_edges=len(graph))
        assert len(edge_marks(svg)) == len(graph)
        assert all(
            0 < float(mark.get("stroke-width", "nan")) < 20 for mark in edge_marks(svg).values()
        )
        assert ("not scored" in svg) == (score != score)
        assert "nan" not in "".join(mark.get("d", "") for mark in edge_marks(svg).values())


def test_positions_are_columns_in_the_graphs_order() -> None:
    svg = pages.draw_circuit(scored(components(2, 2, SPANS), 60))
    lefts: dict[str, list[float]] = {span: [] for span in SPANS}
    for name, box in boxes(svg).items():
        lefts[name.partition("@")[2]].append(float(box.get("x", "nan")))
    for left, right in itertools.pairwise(SPANS):
        assert max(lefts[left]) < min(lefts[right])
    assert all(f"@{span}" in visible_text(svg) for span in SPANS)


def test_columns_are_in_the_graphs_order_even_if_nodes_of_the_first_come_late() -> None:
    graph = components(2, 1, SPANS)
    edges = ["m0@IO->m1@IO", "embed@S1->m1@S1", "a0.h0@S1+1->m0@S1+1"]
    drawn = boxes(pages.draw_circuit(Circuit.from_edges(graph, edges)))
    lefts = [float(drawn[name].get("x", "nan")) for name in ("m0@IO", "embed@S1", "m0@S1+1")]
    assert lefts == sorted(lefts)


def test_stronger_edges_are_more_opaque(circuit: Circuit) -> None:
    marks = edge_marks(pages.draw_circuit(circuit))
    strongest_last = sorted(circuit, key=lambda edge: abs(circuit[edge]))
    opacities = [float(marks[str(edge)].get("stroke-opacity", "nan")) for edge in strongest_last]
    assert opacities == sorted(opacities) and opacities[0] < opacities[-1]


def test_edges_without_a_score_are_as_thin_as_the_weakest() -> None:
    marks = edge_marks(pages.draw_circuit(Circuit.full(components(2, 2))))
    assert {mark.get("stroke-width") for mark in marks.values()} == {"1.200"}


def test_numbered_positions_are_columns_in_numeric_order_whatever_the_graphs_order() -> None:
    nodes = [TokenEmbed(10), TokenEmbed(2), Feature(0, 7, 10), Logits("answer", 10)]
    graph = graph_from_triples(nodes, [(0, 2, -1), (1, 2, -1), (2, 3, -1)])
    drawn = boxes(pages.draw_circuit(Circuit.full(graph, torch.tensor([1.0, 2.0, 3.0]))))
    assert float(drawn["tok_embed@2"].get("x", "nan")) < float(
        drawn["tok_embed@10"].get("x", "nan")
    )
    assert (
        top_of(drawn["tok_embed@2"]) > top_of(drawn["f0.7@10"]) > top_of(drawn["logits:answer@10"])
    )


def test_text_is_escaped_everywhere() -> None:
    circuit = scored(components(2, 2, SPANS), 40)
    title = "<script>alert('&')</script>"
    svg = pages.draw_circuit(circuit, title=title)
    assert title in visible_text(svg)
    table = pandas.DataFrame({title: [title]})
    curves = pandas.DataFrame({"method": [title], "edges": [3], "faithfulness": [0.5]})
    drawn = [
        pages.circuit_page(circuit, title=title, details={title: title}),
        pages.report_page(
            title=title,
            table=table,
            curves=curves,
            circuits={title: circuit},
            details={title: title},
        ),
    ]
    for page in drawn:
        assert "<script>alert" not in page and "<x>" not in page


def test_the_same_circuit_gives_the_same_picture(circuit: Circuit) -> None:
    assert pages.draw_circuit(circuit) == pages.draw_circuit(scored(components(4, 4), 50))


def test_a_negative_number_of_edges_to_draw_is_refused(circuit: Circuit) -> None:
    with pytest.raises(InputError, match="max_edges=-1"):
        pages.draw_circuit(circuit, max_edges=-1)


# Types of nodes


TYPES = {"a0.h1": "previous token", "a1.h0": "induction", "a1.h2": "induction", "m1": "a < b & c"}


def type_legend(svg: str) -> dict[str, str | None]:
    """The colours in the legend, by what is written there."""
    return {
        group.findtext(f"{SVG}text", ""): group.find(f"{SVG}rect").get("fill")  # type: ignore[union-attr]
        for group in ElementTree.fromstring(svg).iter(f"{SVG}g")
        if group.get("class") == "type"
    }


def test_types_colour_their_nodes_and_the_legend_names_each_once_in_their_order() -> None:
    circuit = Circuit.full(components(2, 3))
    plain, svg = (pages.draw_circuit(circuit, max_edges=999, types=each) for each in (None, TYPES))
    legend = type_legend(svg)
    assert type_legend(plain) == {}
    assert [text.split(" ", 1)[1] for text in legend] == [
        "previous token",
        "induction",
        "a < b & c",
    ]
    fill = {name: box.get("fill") for name, box in boxes(svg).items()}
    before = {name: box.get("fill") for name, box in boxes(plain).items()}
    by_name = {text.split(" ", 1)[1]: colour for text, colour in legend.items()}
    assert fill == before | {node: by_name[name] for node, name in TYPES.items()}
    assert len(set(by_name.values())) == 3


def test_types_also_differ_in_the_symbol_before_the_label_and_the_tooltip_names_them() -> None:
    svg = pages.draw_circuit(Circuit.full(components(2, 3)), types=TYPES, title="heads")
    symbol = {name: text for text, name in (line.split(" ", 1) for line in type_legend(svg))}
    assert len(set(symbol.values())) == 3
    for node, name in TYPES.items():
        assert f"{symbol[name]} {node}" in lines(svg)
        assert tooltip(svg, parse_node(node))[1] == name
    label = ElementTree.fromstring(svg).get("aria-label")
    assert label == "heads; node types: previous token, induction, a < b & c"


def test_a_type_keeps_its_colour_whichever_nodes_are_drawn_and_the_legend_names_only_those() -> (
    None
):
    graph = components(2, 3)
    whole = type_legend(pages.draw_circuit(Circuit.full(graph), types=TYPES))
    one = type_legend(pages.draw_circuit(Circuit.from_edges(graph, ["a1.h0->logits"]), types=TYPES))
    assert [text.split(" ", 1)[1] for text in one] == ["induction"]
    assert one.items() < whole.items()


def test_the_type_of_a_head_is_that_of_the_head_at_each_position() -> None:
    graph = components(2, 2, SPANS)
    types = {"a0.h1": "previous token", "a0.h1@S1": "something else"}
    svg = pages.draw_circuit(Circuit.full(graph), max_edges=10**6, types=types)
    names = {span: tooltip(svg, Head(0, 1, span))[1] for span in SPANS}
    assert names == dict.fromkeys(SPANS, "previous token") | {"S1": "something else"}


def test_many_types_differ_in_colour_or_symbol_and_their_legend_fits_into_the_picture() -> None:
    graph = components(3, 8)
    heads = [node for node in graph.nodes if isinstance(node, Head)]
    types = {str(head): f"like {head}" for head in heads}
    svg = pages.draw_circuit(Circuit.full(graph), max_edges=10**6, types=types)
    assert len({(text[0], colour) for text, colour in type_legend(svg).items()}) == 24
    few = Circuit.from_edges(graph, [f"{head}->logits" for head in types])
    root = ElementTree.fromstring(pages.draw_circuit(few, types=types))
    width = float(root.get("width", "nan"))
    for group in root.iter(f"{SVG}g"):
        if group.get("class") == "type":
            chip = group.find(f"{SVG}rect").attrib  # type: ignore[union-attr]
            assert float(chip["x"]) + float(chip["width"]) < width - 20


@pytest.mark.parametrize(
    ("types", "message"),
    [
        ({"a9.h9": "name mover"}, "the graph has no node a9.h9"),
        ({"nine": "name mover"}, "'nine' names no node"),
        ({"a0.h0": 3}, r"types\[a0.h0\]=3"),
        ({3: "name mover"}, "no node 3"),
        (["a0.h0"], "expected types by node"),
    ],
)
def test_types_that_cannot_be_drawn_are_refused(
    circuit: Circuit, types, message: str, unchecked_types: None
) -> None:
    for draw in (pages.draw_circuit, partial(pages.circuit_page, title="types")):
        with pytest.raises(InputError, match=message):
            draw(circuit, types=types)


# The layout


def laid_out(edges: Sequence[Edge], width: float = 4.0) -> Layout:
    nodes = list(dict.fromkeys(node for edge in edges for node in (edge.source, edge.target)))
    columns = [node.position for node in nodes]  # type: ignore[attr-defined]
    return lay_out(
        node_widths=dict.fromkeys(nodes, 60.0),
        edge_widths=dict.fromkeys(edges, width),
        column_widths=dict.fromkeys(columns, 0.0),
        n_layers=5,
    )


def sampled(path: ElementTree.Element) -> np.ndarray:
    """Points along curves and vertical lines: rows of x and y."""
    shares = np.linspace(0, 1, 20)[:, None]
    points = [np.zeros((1, 2))]
    for command, numbers in re.findall(r"([MCV])([^MCV]*)", path.get("d", "")):
        values = np.array(numbers.split(), dtype=float)
        start = points[-1][-1]
        if command == "M":
            points = [values[None]]
        elif command == "V":
            points.append(start + shares * [0, values[0] - start[1]])
        else:
            first, second, end = values.reshape(3, 2)
            rest = 1 - shares
            points.append(
                rest**3 * start
                + 3 * rest**2 * shares * first
                + 3 * rest * shares**2 * second
                + shares**3 * end
            )
    return np.concatenate(points)


@pytest.mark.parametrize("spans", [None, SPANS], ids=["one column", "four columns"])
def test_edges_pass_between_boxes_and_boxes_do_not_overlap(spans: Sequence[str] | None) -> None:
    circuit = scored(components(8, 4, spans), 160)
    svg = pages.draw_circuit(circuit)
    marks = edge_marks(svg)
    places = {}
    for name, box in boxes(svg).items():
        x, y, width = (float(box.get(side, "nan")) for side in ("x", "y", "width"))
        places[name] = (x, x + width, y, y + NODE_HEIGHT)
    for (left, right, top, _), other in itertools.combinations(places.values(), 2):
        assert top != other[2] or right <= other[0] or other[1] <= left
    for edge in circuit.edges:
        x, y = sampled(marks[str(edge)]).T
        for name in places.keys() - {str(edge.source), str(edge.target)}:
            left, right, top, bottom = places[name]
            behind = (left < x) & (x < right) & (top < y) & (y < bottom)
            assert not behind.any(), f"{edge} runs behind {name}"


def test_layers_without_a_node_are_named_in_a_thin_mark_between_the_others() -> None:
    edges = ["embed->m1", "m1->a2.h0.q", "a2.h0->m6", "m6->m8"]
    svg = pages.draw_circuit(Circuit.from_edges(components(12, 1), edges))
    texts = lines(svg)
    expected = [
        *("layers 9 to 11", "layer 8", "layer 7", "layer 6"),
        *("layers 3 to 5", "layer 2", "layer 1", "layer 0", "inputs"),
    ]
    heights = {
        "".join(text.itertext()): float(text.get("y", "nan"))
        for text in ElementTree.fromstring(svg).iter(f"{SVG}text")
        if text.get("class") == "stay"
    }
    assert sorted(heights, key=heights.__getitem__) == expected
    assert "output" not in texts


def test_how_many_layers_are_left_out_does_not_change_the_height() -> None:
    heights = []
    for layers in (4, 40):
        edges = ["embed->m0", f"m{layers - 1}->logits"]
        svg = pages.draw_circuit(Circuit.from_edges(components(layers, 1), edges))
        assert f"layers 1 to {layers - 2}" in visible_text(svg)
        heights.append(float(ElementTree.fromstring(svg).get("height", "nan")))
    assert heights[0] == heights[1] < 400


def test_the_order_of_nodes_untangles_what_can_be_untangled() -> None:
    pairs = [(0, 3), (1, 2), (2, 1), (3, 0)]
    edges = [Edge(Head(0, low), Head(1, high), "q") for low, high in pairs]
    nodes = laid_out(edges).nodes
    lower = [nodes[edge.source].x for edge in edges]
    upper = [nodes[edge.target].x for edge in edges]
    for a, b in itertools.combinations(range(4), 2):
        assert (lower[a] - lower[b]) * (upper[a] - upper[b]) > 0


def test_separated_places_are_the_nearest_that_keep_their_distance() -> None:
    generator = np.random.default_rng(0)
    for _ in range(50):
        size = int(generator.integers(1, 8))
        wanted = generator.normal(0, 3, size)
        distances = generator.uniform(0.1, 2, size - 1)
        placed = separated(wanted, distances)
        assert (np.diff(placed) >= distances - 1e-9).all()
        cost = np.abs(placed - wanted).max()
        for _ in range(50):
            # Another allowed placement.
            other = separated(placed + generator.normal(0, 0.3, size), distances)
            assert cost <= np.abs(other - wanted).max() + 1e-9


# Pages


def test_a_circuit_page_is_small_loads_nothing_and_lists_every_edge(circuit: Circuit) -> None:
    page = pages.circuit_page(circuit, title="ACDC on IOI", details={"threshold": "0.01"})
    assert loads(page) == []
    assert len(page) < 100_000
    assert "<dt>threshold</dt><dd>0.01</dd>" in page
    rows = re.findall(r'<tr data-rank="(\d+)"><td>([^<]+)</td>', page)
    assert [int(rank) for rank, _ in rows] == list(range(1, len(circuit) + 1))
    assert {name.replace("&gt;", ">") for _, name in rows} == {str(edge) for edge in circuit.edges}


def test_the_rows_of_a_page_and_the_edges_of_its_drawing_have_the_same_ranks(
    circuit: Circuit,
) -> None:
    page = pages.circuit_page(circuit, title="ACDC on IOI")
    rows = dict(re.findall(r'<tr data-rank="(\d+)"><td>([^<]+)</td>', page))
    marks = dict(re.findall(r'<g class="edge" data-rank="(\d+)"[^>]*><title>([^ ]+)  ', page))
    assert rows == marks


def test_a_long_table_of_edges_is_cut_and_says_so() -> None:
    page = pages.circuit_page(scored(components(12, 12), 1500), title="many")
    assert "The 1,000 strongest of 1,500 edges" in page
    assert page.count("<tr data-rank=") == 1000


def test_a_report_works_offline_with_plotlys_script_inside_once(circuit: Circuit) -> None:
    curves = pandas.DataFrame(
        {"method": ["eap"] * 2, "edges": [5, 50], "faithfulness": [0.2, 0.8], "kl": [2.0, 0.3]}
    )
    table = pandas.DataFrame(
        {"method": ["acdc", "random"], "edges": [50, 1204], "KL": [0.0712345, float("nan")]}
    )
    report = pages.report_page(
        title="IOI",
        table=table,
        curves=curves,
        circuits={"acdc": circuit, "random": circuit.top(9)},
        details={"seed": "0"},
    )
    assert report.count(get_plotlyjs()) == 1
    ours = report.replace(get_plotlyjs(), "")
    assert loads(ours) == []
    assert "default-src 'none'" in ours
    assert ours.count("<svg ") == 2 and ours.count('class="method"') == 2
    assert ">1,204<" in ours and ">0.07123<" in ours and "nan<" not in ours


def test_a_report_without_curves_or_circuits_has_no_empty_sections() -> None:
    report = pages.report_page(
        title="IOI",
        table=pandas.DataFrame({"method": ["acdc"]}),
        curves=pandas.DataFrame(),
        circuits={},
    )
    assert re.findall("<h2>(.*?)</h2>", report) == ["Comparison"]


def test_the_page_of_a_large_scored_graph_holds_its_strongest_edges_only() -> None:
    graph = components(20, 6)
    circuit = Circuit.full(graph, torch.linspace(0, 1, len(graph)))
    page = pages.circuit_page(circuit, title="scored")
    assert "drawn: the 200 strongest of 25,911 edges kept" in page
    assert page.count("<tr data-rank=") == 1000
    assert len(page) < 450_000


# In the browser


SMALLEST_TEXT = 9  # pixels


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    started = Browser()
    yield started
    started.close()


@pytest.fixture(scope="module")
def large_page(browser: Browser, tmp_path_factory: pytest.TempPathFactory) -> Path:
    circuit = scored(components(30, 4), 500)
    heads = [node for node in circuit.graph.nodes if isinstance(node, Head)]
    types = {node: f"type {node.head}" for node in heads}
    path = tmp_path_factory.mktemp("pages") / "circuit.html"
    page = pages.circuit_page(circuit, title="30 layers", max_edges=500, types=types)
    path.write_text(page)
    return path


@pytest.fixture
def opened(browser: Browser, large_page: Path) -> Browser:
    browser.resize(1400, 900)
    browser.page.goto(large_page.as_uri())
    return browser


def places_of(browser: Browser, selector: str) -> list[dict[str, float]]:
    """Where elements are in the window, as left, right, top, bottom, width and height."""
    found: list[dict[str, float]] = browser.js(
        f"[...document.querySelectorAll('{selector}')].map(e => e.getBoundingClientRect().toJSON())"
    )
    return found


def test_labels_of_a_large_circuit_are_readable_inside_their_nodes_and_do_not_overlap(
    opened: Browser,
) -> None:
    labels, nodes = (places_of(opened, f".node {kind}") for kind in ("text", "rect"))
    assert len(labels) > 90
    for label, node in zip(labels, nodes, strict=True):
        assert label["height"] > SMALLEST_TEXT
        assert node["left"] < label["left"] and label["right"] < node["right"]
    names = places_of(opened, ".drawing text.stay")
    for group in (nodes, names, places_of(opened, ".type")):
        for a, b in itertools.combinations(group, 2):
            beside = a["right"] <= b["left"] or b["right"] <= a["left"]
            assert beside or a["bottom"] <= b["top"] + 1 or b["bottom"] <= a["top"] + 1


def test_layer_names_and_legend_stay_in_view_when_a_wide_drawing_is_scrolled(
    opened: Browser,
) -> None:
    assert opened.js("document.querySelector('.drawing').scrollWidth") > 1400
    for left in (0, 150, 600):
        opened.js(f"document.querySelector('.drawing').scrollTo({left}, 0)")
        opened.wait(f"document.querySelector('.drawing').style.cssText.includes(' {left}px')")
        (drawing,) = places_of(opened, ".drawing")
        for name in places_of(opened, ".stay"):
            assert drawing["left"] < name["left"] < drawing["left"] + 60


def test_a_drawing_that_fits_is_not_scrolled(opened: Browser) -> None:
    assert not opened.js("document.querySelector('[data-fit]').checked")
    opened.click("[data-fit]")
    (drawing,), (svg,) = (places_of(opened, name) for name in (".drawing", ".drawing svg"))
    assert svg["width"] <= drawing["width"]


@pytest.mark.parametrize("reach", ["pointer", "keyboard"])
def test_a_node_that_is_pointed_at_or_focused_lights_its_edges_and_shows_its_tooltip(
    opened: Browser, reach: str
) -> None:
    node = '.node[data-node="0"]'
    if reach == "pointer":
        opened.page.locator(node).scroll_into_view_if_needed()
        opened.point(f"{node} rect")
    else:
        opened.page.focus(".drawing")
        opened.press("Tab")
    lit = set(opened.js("[...document.querySelectorAll('.edge.lit')].map(e => e.dataset.rank)"))
    near = '.edge[data-source="0"], .edge[data-target="0"]'
    assert lit == set(
        opened.js(f"[...document.querySelectorAll('{near}')].map(e => e.dataset.rank)")
    )
    assert lit and opened.js("document.querySelector('.tip').textContent").startswith("embed")
    assert not opened.js("document.querySelector('.tip').hidden")
    assert opened.errors() == []


def test_a_report_can_be_read_before_its_figure_is_drawn(
    browser: Browser, circuit: Circuit, tmp_path: Path
) -> None:
    curves = pandas.DataFrame({"method": "eap", "edges": [5, 50], "faithfulness": [0.2, 0.8]})
    report = pages.report_page(
        title="IOI",
        table=curves,
        curves=curves,
        circuits={"acdc": circuit, "eap": circuit.top(9)},
    )
    path = tmp_path / "report.html"
    path.write_text(report)
    page = browser.another_page()
    page.add_init_script("""addEventListener("load", () => {
        const edges = document.querySelectorAll(".edge .hit").length;
        window.atLoad = [typeof Plotly, document.querySelector(".tabs").hidden, edges];
    })""")
    page.goto(path.as_uri())
    page.wait_for_selector("#faithfulness .main-svg .point")
    assert page.evaluate("atLoad") == ["undefined", False, 59]
    page.close()
