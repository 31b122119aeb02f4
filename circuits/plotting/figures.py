"""Plotly figures of what methods achieve and of how their scores agree."""

from __future__ import annotations

import math
from collections.abc import Hashable
from html import escape
from typing import Any

import pandas
import plotly.graph_objects as go

from circuits.plotting.style import (
    BLUE,
    BROWN,
    GREEN,
    INK,
    PINK,
    QUIET,
    SANS,
    SKY,
    VERMILION,
)
from circuits.system.errors import InputError

RANDOM = "random"
# Traces also differ in their symbols, for readers and printers without colour.
COLOURS = (BLUE, VERMILION, GREEN, PINK, BROWN, SKY, INK)
SYMBOLS = ("circle", "diamond", "square", "triangle-up", "cross", "star", "x")
GREY, RULE, GRID = "#8b919c", "#d9dce2", "#eceef1"
# From this ratio of the largest to the smallest size on, a linear axis squeezes most points.
MIN_LOG_RATIO = 30
# SVG points stay sharp and need no WebGL, but tens of thousands of them are slow.
MAX_SVG_POINTS = 5000

LOG_AXIS = {
    "type": "log",
    "tickmode": "array",
    "tickvals": [digit * 10**power for power in range(7) for digit in (1, 2, 5)],
}
LINEAR_AXIS = {"type": "linear", "tickmode": "auto"}
AXIS = {
    "showgrid": True,
    "gridcolor": GRID,
    "zeroline": True,
    "zerolinecolor": RULE,
    "showline": True,
    "linecolor": RULE,
    "ticks": "outside",
    "tickcolor": RULE,
    "tickfont": {"color": QUIET, "size": 12.5},
    "tickformat": "~g",
    "automargin": True,
    "title": {"font": {"size": 14}},
}
LAYOUT = {
    "template": "none",
    "margin": {"l": 68, "r": 24, "t": 56, "b": 84},
    "font": {"family": SANS, "size": 14, "color": INK},
    "legend": {"orientation": "h", "x": 0, "xanchor": "left", "y": -0.2, "yanchor": "top"},
    "hovermode": "closest",
    "xaxis": AXIS,
    "yaxis": AXIS,
}
MENU = {
    "type": "buttons",
    "direction": "right",
    "xanchor": "left",
    "y": 1.0,
    "yanchor": "bottom",
    "bgcolor": "#ffffff",
    "bordercolor": RULE,
    "font": {"size": 12, "color": INK},
    "pad": {"t": 0, "b": 8},
}


def faithfulness_figure(curves: pandas.DataFrame) -> go.Figure:
    """Plot faithfulness against the number of edges, with one line per method.

    Methods that choose the edges themselves give points instead of a line. Methods whose name
    starts with `random` are dashed and grey. Buttons switch between a logarithmic and a linear
    size axis and, if `curves` holds `kl`, between faithfulness and KL divergence.

    Args:
        curves: one row per method and size, with the columns `method`, `edges` (how many the
            circuit keeps) and `faithfulness`; optionally `kl`, the KL divergence from the model,
            and `selected`, True where the method chose these edges itself. Without `selected`, a
            method with a single row counts as selecting.

    Returns:
        A plotly figure.

    Raises:
        InputError: a column is missing.

    >>> import pandas
    >>> from circuits.plotting.figures import faithfulness_figure
    >>> curves = pandas.DataFrame({"method": "eap", "edges": [5, 50], "faithfulness": [0.2, 0.9]})
    >>> [trace.name for trace in faithfulness_figure(curves).data]
    ['eap']
    """
    _check_columns(curves, ("method", "edges", "faithfulness"), "faithfulness curves")
    methods = curves.assign(method=curves["method"].astype(str)).sort_values("edges")
    groups = dict(list(methods.groupby("method", sort=False)))
    names = list(dict.fromkeys(curves["method"].astype(str)))
    measured = [name for name in names if not _is_random(name)]
    figure = go.Figure(layout={**LAYOUT, "height": 460})
    for name in names:
        number = measured.index(name) if name in measured else None
        figure.add_trace(_curve(groups[name], name, number))
    sizes = curves.loc[curves["edges"] > 0, "edges"]
    # Without positive sizes both are NaN, and the axis is linear.
    logarithmic = bool(sizes.max() >= MIN_LOG_RATIO * sizes.min())
    menus = [_size_menu(logarithmic)]
    if "kl" in curves and curves["kl"].notna().any():
        menus.append(_measure_menu([groups[name] for name in names]))
    figure.update_layout(updatemenus=menus)
    figure.update_xaxes(LOG_AXIS if logarithmic else LINEAR_AXIS)
    figure.update_xaxes(title_text="edges in the circuit")
    figure.update_yaxes(title_text="faithfulness")
    figure.add_hline(y=1, line={"color": GREY, "width": 1})
    return figure


def score_scatter(frame: pandas.DataFrame, *, x_name: str = "x", y_name: str = "y") -> go.Figure:
    """Plot two methods' scores of the same edges against each other.

    The title gives Pearson's and Spearman's correlation.

    Args:
        frame: one row per edge, with the columns `edge` (or an index of that name), `x` and `y`;
            optionally `group`, which gives each group its colour. Edges that lack a score are
            left out.
        x_name: the method or measure on the x axis, for example `exact patching`.
        y_name: the method or measure on the y axis, for example `EAP`.

    Returns:
        A plotly figure.

    Raises:
        InputError: a column is missing.

    >>> import pandas
    >>> from circuits.plotting.figures import score_scatter
    >>> scores = pandas.DataFrame({"edge": ["embed->m0", "m0->logits"], "x": [1, 2], "y": [3, 4]})
    >>> score_scatter(scores, x_name="exact patching", y_name="EAP").layout.title.text
    'Pearson 1.000, Spearman 1.000 (2 edges)'
    """
    frame = frame.reset_index() if frame.index.name == "edge" else frame
    _check_columns(frame, ("edge", "x", "y"), "a score scatter")
    scored = frame[frame["x"].notna() & frame["y"].notna()]
    figure = go.Figure(layout={**LAYOUT, "height": 520})
    groups = scored.groupby("group", sort=False) if "group" in scored else [("", scored)]
    for number, (name, rows) in enumerate(groups):
        figure.add_trace(_points(rows, name, COLOURS[number % len(COLOURS)]))
    _add_diagonal(figure, scored)
    title = {"text": _correlations(scored, len(frame)), "font_size": 15, "x": 0.02}
    figure.update_layout(title=title, showlegend="group" in scored)
    figure.update_xaxes(title_text=_plain(x_name))
    figure.update_yaxes(title_text=_plain(y_name))
    return figure


def figure_html(figure: go.Figure) -> str:
    """Write a figure as HTML that holds plotly's script, so that it works offline.

    Use it once per page: the script is several megabytes, and the element's id is fixed.
    """
    # Only these buttons: some of plotly's default ones can send the figure to a service.
    buttons = ["toImage", "zoom2d", "pan2d", "resetScale2d"]
    html: str = figure.to_html(
        full_html=False,
        include_plotlyjs=True,
        config={"displaylogo": False, "responsive": True, "modeBarButtons": [buttons]},
        default_height="460px",
        div_id="faithfulness",
    )
    return html


def _curve(rows: pandas.DataFrame, name: str, number: int | None) -> go.Scatter:
    """Plot one method; random baselines have no number."""
    selects = bool(rows["selected"].all()) if "selected" in rows else len(rows) == 1
    colour, symbol, dash = GREY, "circle-open", "dash"
    if number is not None:
        colour = COLOURS[number % len(COLOURS)]
        symbol = SYMBOLS[number % len(SYMBOLS)]
        dash = "solid"
    return go.Scatter(
        x=rows["edges"].tolist(),
        y=rows["faithfulness"].tolist(),
        name=_plain(name),
        mode="markers" if selects else "lines+markers",
        line={"color": colour, "width": 2, "dash": dash},
        marker={"color": colour, "symbol": symbol, "size": 10 if selects else 6},
        hovertemplate="%{fullData.name}<br>%{x:,} edges: %{y:.3f}<extra></extra>",
    )


def _size_menu(logarithmic: bool) -> dict[str, Any]:
    buttons = [
        _button("log size", "relayout", _prefixed("xaxis", LOG_AXIS)),
        _button("linear size", "relayout", _prefixed("xaxis", LINEAR_AXIS)),
    ]
    return {**MENU, "x": 0.0, "buttons": buttons, "active": 0 if logarithmic else 1}


def _measure_menu(methods: list[pandas.DataFrame]) -> dict[str, Any]:
    """Let the reader choose the y axis; each trace gets its own values."""
    buttons = []
    # The horizontal rule marks the whole model: its faithfulness is 1, its KL divergence 0.
    for column, label, rule in (
        ("faithfulness", "faithfulness", 1),
        ("kl", "KL from the model", 0),
    ):
        values = {"y": [rows[column].tolist() for rows in methods]}
        axis = {"yaxis.title.text": label, **_prefixed("shapes[0]", {"y0": rule, "y1": rule})}
        buttons.append(_button(label, "update", values, axis))
    return {**MENU, "x": 0.28, "buttons": buttons, "active": 0}


def _button(label: str, method: str, *changes: dict[str, Any]) -> dict[str, Any]:
    return {"label": label, "method": method, "args": list(changes)}


def _prefixed(prefix: str, changes: dict[str, Any]) -> dict[str, Any]:
    return {f"{prefix}.{key}": value for key, value in changes.items()}


def _points(rows: pandas.DataFrame, name: Hashable, colour: str) -> go.Scatter | go.Scattergl:
    scatter = go.Scatter if len(rows) <= MAX_SVG_POINTS else go.Scattergl
    return scatter(
        x=rows["x"].tolist(),
        y=rows["y"].tolist(),
        text=[_plain(str(edge)) for edge in rows["edge"]],
        name=_plain(str(name)),
        mode="markers",
        marker={"color": colour, "size": 6, "opacity": 0.6},
        hovertemplate="%{text}<br>(%{x:.4g}, %{y:.4g})<extra></extra>",
    )


def _add_diagonal(figure: go.Figure, scored: pandas.DataFrame) -> None:
    """Draw the line on which both methods agree."""
    values = scored[["x", "y"]].stack()
    low, high = (0.0, 1.0) if scored.empty else (float(values.min()), float(values.max()))
    line = {"color": GREY, "width": 1, "dash": "dash"}
    figure.add_shape(type="line", x0=low, y0=low, x1=high, y1=high, line=line, layer="below")


def _correlations(scored: pandas.DataFrame, n_edges: int) -> str:
    """Write the title of a score scatter."""
    pearson = _correlation(scored["x"], scored["y"])
    # Spearman's correlation is Pearson's of the ranks; pandas would need scipy for it.
    spearman = _correlation(scored["x"].rank(), scored["y"].rank())
    left_out = f" of {n_edges:,}; the rest lack a score" if len(scored) < n_edges else ""
    return f"Pearson {pearson}, Spearman {spearman} ({len(scored):,} edges{left_out})"


def _correlation(x: pandas.Series, y: pandas.Series) -> str:
    """Return Pearson's correlation, undefined for fewer than two different values."""
    if x.nunique() < 2 or y.nunique() < 2:
        return "undefined"
    value = float(x.corr(y))
    return "undefined" if math.isnan(value) else f"{value:.3f}"


def _plain(text: str) -> str:
    """Escape a text, since plotly interprets a few HTML tags."""
    return escape(text, quote=False)


def _is_random(name: str) -> bool:
    return name.lower().startswith(RANDOM)


def _check_columns(frame: pandas.DataFrame, needed: tuple[str, ...], what: str) -> None:
    missing = [name for name in needed if name not in frame]
    if missing:
        raise InputError(
            f"{what} need the columns {', '.join(needed)}; {', '.join(missing)} not found among "
            f"{', '.join(map(str, frame.columns))}."
        )
