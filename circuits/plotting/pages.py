"""What users draw: circuits, attribution graphs and reports."""

from __future__ import annotations

from collections.abc import Mapping

import pandas

from circuits.attribution.feature_graph import FeatureGraph
from circuits.graph.circuit import Circuit
from circuits.graph.graph import PooledFeatureGraph
from circuits.plotting.circuit_drawing.draw import draw
from circuits.plotting.figures import FAITHFULNESS_IN_WORDS, _embedded, faithfulness_figure
from circuits.plotting.graph_page.page import graph_page
from circuits.plotting.html import circuit_panel, data_table, methods_panel, page
from circuits.system.errors import InputError

MOST_DRAWN, MOST_BETWEEN_FEATURES = 200, 50


def draw_circuit(
    circuit: Circuit, *, title: str | None = None, max_edges: int | None = None
) -> str:
    """The circuit as a standalone SVG: layers as rows, embeddings at the bottom, logits on top, positions as columns.

    Colour tells the slot an edge is read in, width its |score|, dashes a score below 0; tooltips name edges and nodes with their scores.
    When more than `max_edges` are kept (None: 200, between features 50), the strongest are drawn and the picture says so.

    Raises:
        InputError: `max_edges` is negative.
    """
    return draw(circuit, title=title, max_edges=_most(circuit, max_edges))


def circuit_page(
    circuit: Circuit,
    *,
    title: str,
    details: Mapping[str, str] | None = None,
    max_edges: int | None = None,
) -> str:
    """A self-contained HTML page: the drawing, explored by pointing and by a slider over sizes, and a table of the kept edges.

    Args:
        details: settings and results to show under the title, as text.

    Raises:
        InputError: `max_edges` is negative.
    """
    return page(
        title=title,
        details=details or {},
        body=circuit_panel(circuit, label=title, max_edges=_most(circuit, max_edges)),
    )


def attribution_page(
    graph: FeatureGraph, *, title: str, details: Mapping[str, str] | None = None
) -> str:
    """A self-contained HTML page of an attribution graph, to be explored: see `circuits.plotting.graph_page.page`.

    Args:
        details: settings and results to show under the title, as text.
    """
    return graph_page(graph, title=title, details=details)


def report_page(
    *,
    title: str,
    table: pandas.DataFrame,
    curves: pandas.DataFrame,
    circuits: Mapping[str, Circuit],
    details: Mapping[str, str] | None = None,
    max_edges: int | None = None,
) -> str:
    """The report of a comparison, self-contained: settings, table, faithfulness figure and the circuits each method drew.

    Args:
        table: one row per method, shown as it is.
        curves: what `faithfulness_figure` takes; may be empty.
        circuits: by method, in the order of the buttons.
        details: settings to show under the title, as text.

    Raises:
        InputError: `curves` lacks a column, or `max_edges` is negative.
    """
    most = {name: _most(circuit, max_edges) for name, circuit in circuits.items()}
    sections = [("Comparison", data_table(table))]
    if len(curves):
        sections.append(
            (
                "Faithfulness by size",
                f'{FAITHFULNESS_IN_WORDS}<div class="figure">{_embedded(faithfulness_figure(curves))}</div>',
            )
        )
    if circuits:
        sections.append(("Circuits", methods_panel(circuits, max_edges=most)))
    body = "\n".join(
        f"<section><h2>{heading}</h2>\n{content}\n</section>" for heading, content in sections
    )
    return page(title=title, details=details or {}, body=body)


def _most(circuit: Circuit, max_edges: int | None) -> int:
    """How many edges are drawn. Features stand side by side, so that fewer fit on a page."""
    if max_edges is None:
        return (
            MOST_BETWEEN_FEATURES if isinstance(circuit.graph, PooledFeatureGraph) else MOST_DRAWN
        )
    if max_edges < 0:
        raise InputError(
            f"max_edges={max_edges} is negative; give the number of edges to draw at most, for example {MOST_DRAWN}."
        )
    return max_edges
