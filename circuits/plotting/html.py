"""Sections of the HTML pages about circuits, which `static/page.js` makes interactive."""

from __future__ import annotations

import math
import numbers
from collections.abc import Iterable, Mapping
from html import escape
from typing import Any

import pandas
from pandas.api.types import is_bool_dtype, is_numeric_dtype

from circuits.graph.circuit import Circuit
from circuits.plotting.circuit_drawing.draw import draw
from circuits.plotting.circuit_drawing.node_types import TypeNames
from circuits.plotting.circuit_drawing.ranking import edge_limit, ranked_edges
from circuits.plotting.markup import Details, details_list, fill_template, static_file
from circuits.system.numbers import WholeNumber

MISSING = "&ndash;"
# A scored graph can have hundreds of thousands of edges; the table lists the strongest of them.
MAX_TABLE_ROWS = 1000


def page(*, title: str, details: Details, body: str) -> str:
    """Write a self-contained page around `body`, which must be HTML; the other texts are plain."""
    return fill_template(
        "page.html",
        title=escape(title),
        details=details_list(details),
        body=body,
        style=static_file("style.css"),
        script=static_file("page.js"),
    )


def circuit_panel(
    circuit: Circuit, *, label: str, max_edges: WholeNumber | None, types: TypeNames = None
) -> str:
    """Write a drawing with its slider and a table of the kept edges."""
    drawing = draw(circuit, title=None, max_edges=max_edges, types=types)
    n_kept = len(circuit)
    if n_kept == 0:
        return f'<div class="drawing">{drawing}</div>'
    n_drawn = min(n_kept, edge_limit(circuit, max_edges))
    listed = f"All {n_kept:,} edges"
    if n_kept > MAX_TABLE_ROWS:
        listed = f"The {MAX_TABLE_ROWS:,} strongest of {n_kept:,} edges"
    return fill_template(
        "circuit.html",
        label=escape(label),
        drawn=str(n_drawn),
        drawing=drawing,
        caption=f"{listed}, by score",
        table=_edge_table(circuit),
    )


def methods_panel(circuits: Mapping[str, Circuit], *, max_edges: WholeNumber | None) -> str:
    """Write the circuits of several methods: one at a time behind buttons, or side by side."""
    panels = []
    buttons = []
    for number, name in enumerate(circuits):
        circuit = circuits[name]
        panel = circuit_panel(circuit, label=name, max_edges=max_edges)
        heading = f"<h3>{escape(name)}</h3>"
        panels.append(f'<div class="method" data-method="{number}">{heading}{panel}</div>')
        buttons.append(f'<button type="button" data-show="{number}">{escape(name)}</button>')
    if len(circuits) > 1:
        buttons.append('<button type="button" data-show="all">Side by side</button>')
    # The buttons need the script, which unhides them; without it all methods are visible.
    attributes = 'class="tabs" role="group" aria-label="Method" hidden'
    return f"<div {attributes}>{''.join(buttons)}</div><div>{''.join(panels)}</div>"


def data_table(frame: pandas.DataFrame) -> str:
    """Write the columns of a data frame, and its index if that has a name, as a sortable table."""
    if set(frame.index.names) != {None}:
        frame = frame.reset_index()
    header = []
    for name, dtype in frame.dtypes.items():
        is_number = is_numeric_dtype(dtype) and not is_bool_dtype(dtype)
        header.append(_header_cell(str(name), is_number))
    rows = []
    for _, *values in frame.itertuples():
        cells = map(_value_cell, values)
        rows.append(f"<tr>{''.join(cells)}</tr>")
    return _table(header, rows)


def _edge_table(circuit: Circuit) -> str:
    header = [
        _header_cell("edge", numeric=False),
        _header_cell("score", numeric=True),
        _header_cell("rank by |score|", numeric=True),
    ]
    rows = []
    for one in ranked_edges(circuit, MAX_TABLE_ROWS):
        name = f"<td>{escape(str(one.edge))}</td>"
        score = _number_cell(one.score, one.score_text)
        rank = _number_cell(one.rank, f"{one.rank:,}")
        rows.append(f'<tr data-rank="{one.rank}">{name}{score}{rank}</tr>')
    return _table(header, rows, css_class="edges")


def _table(header: Iterable[str], rows: Iterable[str], css_class: str = "") -> str:
    head = f"<thead><tr>{''.join(header)}</tr></thead>"
    body = "<tbody>\n" + "\n".join(rows) + "\n</tbody>"
    table = f'<table class="{css_class}">{head}{body}</table>'
    return f'<div class="scroll" tabindex="0">{table}</div>'


def _header_cell(name: str, numeric: bool) -> str:
    css_class = "number" if numeric else ""
    button = f'<button type="button">{escape(name)}</button>'
    return f'<th scope="col" class="{css_class}">{button}</th>'


def _value_cell(value: Any) -> str:
    if value is None or value is pandas.NA:
        return f"<td>{MISSING}</td>"
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        return f"<td>{escape(str(value))}</td>"
    if isinstance(value, numbers.Integral):
        return _number_cell(value, f"{int(value):,}")
    text = MISSING if math.isnan(value) else f"{float(value):,.4g}"
    return _number_cell(value, text)


def _number_cell(value: numbers.Real | float, text: str) -> str:
    """Write a cell that sorts by the exact value; NaN has none and sorts last."""
    exact = "" if math.isnan(value) else repr(float(value))
    return f'<td class="number" data-value="{exact}">{text}</td>'
