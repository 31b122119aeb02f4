"""Plotly figures of what methods achieve and of how their scores agree."""

from __future__ import annotations

import math
from collections.abc import Hashable
from html import escape
from typing import Any

import pandas
import plotly.graph_objects as go

from circuits.plotting.style import BLUE, BROWN, GREEN, INK, PINK, SANS, SKY, VERMILION
from circuits.system.errors import InputError

RANDOM = "random"
# Traces also differ in their symbols, for readers and printers without colour.
COLOURS = (BLUE, VERMILION, GREEN, PINK, BROWN, SKY, INK)
SYMBOLS = ("circle", "diamond", "square", "triangle-up", "cross", "star", "x")
GREY = "#8b919c"
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
LAYOUT = {
    "template": "plotly_white",
    "margin": {"l": 68, "r": 24, "t": 56, "b": 84},
    "font": {"family": SANS, "size": 14, "color": INK},
    "legend": {"orientation": "h", "y": -0.2},
    "hovermode": "closest",
}
MENU = {
    "type": "buttons",
    "direction": "right",
    "xanchor": "left",
    "y": 1.0,
    "yanchor": "bottom",
    "font": {"size": 12},
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
    methods = curves["method"].astype(str)
    by_method = {
        name: curves[methods == name].sort_values("edges") for name in dict.fromkeys(methods)
    }
    sizes = curves.loc[curves["edges"] > 0, "edges"]
    # Without positive sizes both are NaN, and the axis is linear.
    logarithmic = bool(sizes.max() >= MIN_LOG_RATIO * sizes.min())
    menus = [_size_menu(logarithmic)]
    if "kl" in curves and curves["kl"].notna().any():
        menus.append(_measure_menu(list(by_method.values())))
    figure = go.Figure(_curves(by_method), {**LAYOUT, "height": 460, "updatemenus": menus})
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
    scored = frame.dropna(subset=["x", "y"])
    groups = scored.groupby("group", sort=False) if "group" in scored else [("", scored)]
    figure = go.Figure(layout={**LAYOUT, "height": 520, "showlegend": "group" in scored})
    for number, (name, rows) in enumerate(groups):
        figure.add_trace(_points(rows, name, COLOURS[number % len(COLOURS)]))
    _add_diagonal(figure, scored)
    figure.update_layout(title={"text": _correlations(scored, len(frame)), "font_size": 15})
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


def _curves(by_method: dict[str, pandas.DataFrame]) -> list[go.Scatter]:
    curves = []
    n_measured = 0
    for name, rows in by_method.items():
        colour, symbol, dash = GREY, "circle-open", "dash"
        if not name.lower().startswith(RANDOM):
            colour = COLOURS[n_measured % len(COLOURS)]
            symbol = SYMBOLS[n_measured % len(SYMBOLS)]
            dash = "solid"
            n_measured += 1
        selects = rows["selected"].all() if "selected" in rows else len(rows) == 1
        curve = go.Scatter(
            x=rows["edges"].tolist(),
            y=rows["faithfulness"].tolist(),
            name=_plain(name),
            mode="markers" if selects else "lines+markers",
            line={"color": colour, "dash": dash},
            marker={"symbol": symbol, "size": 10 if selects else 6},
            hovertemplate="%{fullData.name}<br>%{x:,} edges: %{y:.3f}<extra></extra>",
        )
        curves.append(curve)
    return curves


def _size_menu(logarithmic: bool) -> dict[str, Any]:
    buttons = [
        _button("log size", "relayout", _prefixed("xaxis", LOG_AXIS)),
        _button("linear size", "relayout", _prefixed("xaxis", LINEAR_AXIS)),
    ]
    return {**MENU, "x": 0.0, "buttons": buttons, "active": 0 if logarithmic else 1}


def _measure_menu(methods: list[pandas.DataFrame]) -> dict[str, Any]:
    """Let the reader choose the y axis; each trace gets its own values."""
    buttons = []
    labels = {"faithfulness": "faithfulness", "kl": "KL from the model"}
    # The horizontal rule marks the whole model: its faithfulness is 1, its KL divergence 0.
    rules = {"faithfulness": 1, "kl": 0}
    for column, label in labels.items():
        values = {"y": [rows[column].tolist() for rows in methods]}
        rule = _prefixed("shapes[0]", {"y0": rules[column], "y1": rules[column]})
        buttons.append(_button(label, "update", values, {"yaxis.title.text": label, **rule}))
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
        marker={"color": colour, "opacity": 0.6},
        hovertemplate="%{text}<br>(%{x:.4g}, %{y:.4g})<extra></extra>",
    )


def _add_diagonal(figure: go.Figure, scored: pandas.DataFrame) -> None:
    """Draw the line on which both methods agree."""
    values = [0.0, 1.0] if scored.empty else scored[["x", "y"]].to_numpy().flatten().tolist()
    ends = {"x0": min(values), "y0": min(values), "x1": max(values), "y1": max(values)}
    line = {"color": GREY, "width": 1, "dash": "dash"}
    figure.add_shape(type="line", **ends, line=line, layer="below")


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


def _check_columns(frame: pandas.DataFrame, needed: tuple[str, ...], what: str) -> None:
    missing = [name for name in needed if name not in frame]
    if missing:
        raise InputError(
            f"{what} need the columns {', '.join(needed)}; {', '.join(missing)} not found among "
            f"{', '.join(map(str, frame.columns))}."
        )
