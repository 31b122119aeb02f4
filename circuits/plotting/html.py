"""Self-contained HTML pages: one circuit, and the report of a comparison. Templates, style and script are files beside this one."""

from __future__ import annotations

import math
import numbers
from collections.abc import Mapping, Sequence
from html import escape
from importlib import resources
from string import Template
from typing import Any

import pandas

from circuits.graph.circuit import Circuit
from circuits.plotting.circuit_drawing.draw import draw, score_text, strongest_first

NOTHING = "&ndash;"
MOST_ROWS = (
    1000  # of the table under a drawing; a scored graph can have hundreds of thousands of edges
)


def page(*, title: str, details: Mapping[str, str], body: str) -> str:
    """A whole page around `body`, which is HTML already; everything else is text and is escaped."""
    return _filled(
        "page.html",
        title=escape(title),
        details=_details(details),
        body=body,
        style=_template("style.css"),
        script=_template("page.js"),
    )


def circuit_panel(circuit: Circuit, *, label: str, max_edges: int) -> str:
    """A drawing with its slider and its table of edges."""
    scores = circuit.scores[circuit.kept].tolist()
    listed = strongest_first(scores)[:MOST_ROWS]
    edges = circuit.edges
    rows = [(rank, str(edges[index]), scores[index]) for rank, index in enumerate(listed, start=1)]
    drawing = draw(circuit, title=None, max_edges=max_edges)
    if not rows:
        return f'<div class="drawing">{drawing}</div>'
    which = (
        f"The {len(rows):,} strongest of {len(edges):,} edges"
        if len(rows) < len(edges)
        else f"All {len(edges):,} edges"
    )
    return _filled(
        "circuit.html",
        label=escape(label),
        drawn=str(min(max_edges, len(edges))),
        drawing=drawing,
        caption=f"{which}, by score",
        table=_edge_table(rows),
    )


def methods_panel(circuits: Mapping[str, Circuit], *, max_edges: Mapping[str, int]) -> str:
    """The circuits of several methods: one at a time behind buttons, or all side by side."""
    panels = [
        f'<div class="method" data-method="{number}"><h3>{escape(name)}</h3>'
        f"{circuit_panel(circuit, label=name, max_edges=max_edges[name])}</div>"
        for number, (name, circuit) in enumerate(circuits.items())
    ]
    choices = [
        *((str(number), name) for number, name in enumerate(circuits)),
        *([("all", "Side by side")] if len(circuits) > 1 else []),
    ]
    buttons = "".join(
        f'<button type="button" data-show="{value}">{escape(name)}</button>'
        for value, name in choices
    )
    # Without the script every method is shown, one under the other, and there are no buttons that do nothing.
    return f'<div class="tabs" role="group" aria-label="Method" hidden>{buttons}</div><div>{"".join(panels)}</div>'


def data_table(frame: pandas.DataFrame) -> str:
    """A sortable table of a data frame's columns (and its index, if that has a name)."""
    frame = frame.reset_index() if any(name is not None for name in frame.index.names) else frame
    numeric = [
        pandas.api.types.is_numeric_dtype(kind) and not pandas.api.types.is_bool_dtype(kind)
        for kind in frame.dtypes
    ]
    head = "".join(
        _head_cell(str(name), number) for name, number in zip(frame.columns, numeric, strict=True)
    )
    rows = [
        f"<tr>{''.join(_cell(value) for value in row)}</tr>"
        for row in frame.itertuples(index=False, name=None)
    ]
    return _table(head, rows)


def _edge_table(rows: Sequence[tuple[int, str, float]]) -> str:
    head = (
        _head_cell("edge", False) + _head_cell("score", True) + _head_cell("rank by |score|", True)
    )
    body = [
        f'<tr data-rank="{rank}"><td>{escape(name)}</td><td class="number" data-value="{"" if math.isnan(score) else repr(score)}">'
        f'{score_text(score)}</td><td class="number" data-value="{rank}">{rank:,}</td></tr>'
        for rank, name, score in rows
    ]
    return _table(head, body, kind="edges")


def _table(head: str, rows: Sequence[str], *, kind: str = "") -> str:
    body = "\n".join(rows)
    return f'<div class="scroll" tabindex="0"><table class="{kind}"><thead><tr>{head}</tr></thead><tbody>\n{body}\n</tbody></table></div>'


def _head_cell(name: str, numeric: bool) -> str:
    return f'<th scope="col"{" class=number" if numeric else ""}><button type="button">{escape(name)}</button></th>'


def _cell(value: Any) -> str:
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        return f"<td>{NOTHING if value is None or value is pandas.NA else escape(str(value))}</td>"
    if math.isnan(value):
        return f'<td class="number" data-value="">{NOTHING}</td>'
    text = f"{int(value):,}" if isinstance(value, numbers.Integral) else f"{float(value):,.4g}"
    return f'<td class="number" data-value="{float(value)!r}">{text}</td>'


def _details(details: Mapping[str, str]) -> str:
    entries = "".join(
        f"<div><dt>{escape(name)}</dt><dd>{escape(text)}</dd></div>"
        for name, text in details.items()
    )
    return f"<dl>{entries}</dl>" if entries else ""


def _filled(name: str, **parts: str) -> str:
    return Template(_template(name)).substitute(parts)


def _template(name: str) -> str:
    return resources.files("circuits.plotting").joinpath("static", name).read_text(encoding="utf-8")
