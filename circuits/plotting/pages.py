"""Drawings of circuits, and HTML pages that work offline.

Drawings are SVG text and pages are HTML text that loads nothing; the caller writes them to files.
"""

from __future__ import annotations

from collections.abc import Mapping

import pandas

from circuits.attribution.feature_graph import FeatureGraph
from circuits.graph.circuit import Circuit
from circuits.plotting.circuit_drawing.draw import draw
from circuits.plotting.circuit_drawing.node_types import TypeNames
from circuits.plotting.figures import faithfulness_figure, figure_html
from circuits.plotting.graph_page.page import graph_page
from circuits.plotting.html import circuit_panel, data_table, methods_panel, page
from circuits.plotting.markup import Details
from circuits.system.arguments import checked_arguments
from circuits.system.kinds import expect
from circuits.system.numbers import WholeNumber

FAITHFULNESS_EXPLAINED = (
    "Faithfulness is the share of the model's metric that a circuit keeps when every other edge "
    "is ablated: 1 is the whole model, 0 the model with every edge ablated. A method whose curve "
    "rises further left needs fewer edges."
)


@checked_arguments
def draw_circuit(
    circuit: Circuit,
    *,
    title: str | None = None,
    max_edges: WholeNumber | None = None,
    types: TypeNames = None,
) -> str:
    """Draw a circuit as a standalone SVG.

    Layers are rows, with the embeddings at the bottom and the logits on top; positions are columns.
    Layers without an edge are folded into a thin mark. The colour of an edge shows its slot, its
    width the |score|; edges with a negative score are dashed. Tooltips give names and scores; that
    of a node lists its strongest edges. A head in two columns can read at one position and write at
    the other.

    Args:
        title: a heading inside the picture.
        max_edges: largest number of edges to draw. If the circuit keeps more, the strongest are
            drawn and the picture says so. None: 200, or 50 in a graph of transcoder features.
        types: what nodes are known to do, by node or its text, such as `{"a9.h9": "name mover"}`.
            Each type has a colour and a symbol, in the order in which types first appear. A node
            without a position stands for it at every position. None: those of a published circuit.

    Raises:
        InputError: `max_edges` is negative, or the graph lacks a node of `types`.

    >>> import circuits
    >>> from circuits.plotting.pages import draw_circuit
    >>> graph = circuits.component_graph(circuits.load_model("toy-world"))
    >>> circuit = circuits.Circuit.from_edges(graph, ["embed->a0.h0.q", "a0.h0->logits"])
    >>> draw_circuit(circuit, title="Two edges").count('class="edge"')
    2
    >>> "\u25cf a0.h0" in draw_circuit(circuit, types={"a0.h0": "previous token"})
    True
    """
    return draw(circuit, title=title, max_edges=max_edges, types=types)


@checked_arguments
def circuit_page(
    circuit: Circuit,
    *,
    title: str,
    details: Details = None,
    max_edges: WholeNumber | None = None,
    types: TypeNames = None,
) -> str:
    """Write a self-contained HTML page about a circuit.

    The page holds the drawing, where pointing at an edge shows its score, pointing at a node lists
    its strongest edges and a slider hides weak edges, and a sortable table of the kept edges.

    Args:
        details: settings and results to list under the title, as plain text.
        max_edges: largest number of edges to draw, as in `draw_circuit`.
        types: what nodes are known to do, as in `draw_circuit`.

    Raises:
        InputError: `max_edges` is negative, or the graph lacks a node of `types`.

    >>> import circuits
    >>> from circuits.plotting.pages import circuit_page
    >>> graph = circuits.component_graph(circuits.load_model("toy-world"))
    >>> circuit = circuits.Circuit.from_edges(graph, ["embed->a0.h0.q", "a0.h0->logits"])
    >>> "All 2 edges" in circuit_page(circuit, title="Two edges", details={"task": "none"})
    True
    """
    panel = circuit_panel(circuit, label=title, max_edges=max_edges, types=types)
    return page(title=title, details=details, body=panel)


@checked_arguments
def attribution_page(graph: FeatureGraph, *, title: str, details: Details = None) -> str:
    """Write a self-contained HTML page to explore an attribution graph.

    The reader points, searches, prunes with two thresholds, pins nodes, groups them into
    supernodes and saves the picture. For a large graph the page holds the most influential nodes
    and edges, and says so; `circuits view` serves all of them.

    Args:
        details: settings and results to list under the title, as plain text.

    >>> import circuits
    >>> from circuits.plotting.pages import attribution_page
    >>> method = circuits.AttributionGraph(circuits.load_transcoders("toy-world-plt"))
    >>> graph = method.attribute(circuits.load_model("toy-world"), "The capital of Texas is")
    >>> "<title>Texas</title>" in attribution_page(graph, title="Texas")
    True
    """
    return graph_page(graph, title=title, details=details)


@checked_arguments
def report_page(
    *,
    title: str,
    table: pandas.DataFrame,
    curves: pandas.DataFrame,
    circuits: Mapping[str, Circuit],
    details: Details = None,
    max_edges: WholeNumber | None = None,
) -> str:
    """Write a self-contained HTML report of a comparison of methods.

    The report holds the settings, the table, the faithfulness figure and the circuit of each
    method.

    Args:
        table: one row per method, shown as it is.
        curves: the columns that `faithfulness_figure` takes; if empty, there is no figure.
        circuits: circuits by name of the method, in the order of the buttons.
        details: settings to list under the title, as plain text.
        max_edges: largest number of edges to draw per circuit, as in `draw_circuit`.

    Raises:
        InputError: `curves` lacks a column, or `max_edges` is negative.

    >>> import pandas
    >>> from circuits.plotting.pages import report_page
    >>> curves = pandas.DataFrame({"method": "eap", "edges": [5, 50], "faithfulness": [0.2, 0.9]})
    >>> report = report_page(title="IOI", table=curves.tail(1), curves=curves, circuits={})
    >>> "Faithfulness by size" in report
    True
    """
    remedy = "make one with pandas"
    for frame in (table, curves):
        expect(frame, pandas.DataFrame, "a data frame", remedy)
    expect(circuits, Mapping, "circuits by name", "give a dictionary")
    sections = {"Comparison": data_table(table)}
    if len(curves):
        figure = figure_html(faithfulness_figure(curves))
        explanation = f"<p>{FAITHFULNESS_EXPLAINED}</p>"
        sections["Faithfulness by size"] = f'{explanation}<div class="figure">{figure}</div>'
    if circuits:
        sections["Circuits"] = methods_panel(circuits, max_edges=max_edges)
    body = "\n".join(
        f"<section><h2>{heading}</h2>\n{content}\n</section>"
        for heading, content in sections.items()
    )
    return page(title=title, details=details, body=body)
