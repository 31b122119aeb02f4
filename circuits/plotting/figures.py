"""Plotly figures of what methods achieve and of how their scores agree."""

from __future__ import annotations

import math
from html import escape
from itertools import cycle
from typing import Any

import pandas
import plotly.graph_objects as go
from pandas.api.types import is_complex_dtype, is_numeric_dtype

from circuits.plotting.style import INK, PALETTE, SANS
from circuits.system.arguments import checked_arguments
from circuits.system.errors import InputError
from circuits.system.kinds import expect
from circuits.system.numbers import shown

Frames = dict[str, pandas.DataFrame]
# What a button changes; by label, the arguments of a button's method.
Changes = dict[str, Any]
Buttons = dict[str, list[Changes]]
RANDOM = "random"
# The columns that hold numbers, and may lack some
NUMBERS = {"edges", "faithfulness", "kl", "x", "y"}
# Columns of the curves, their labels, and the values of the whole model.
MEASURES = (("faithfulness", "faithfulness", 1), ("kl", "KL from the model", 0))
# Traces also differ in their symbols, for readers and printers without colour.
COLOURS = (*PALETTE, INK)
SYMBOLS = ("circle", "diamond", "square", "triangle-up", "cross", "star", "x")
GREY = "#8b919c"
RULE = {"color": GREY, "width": 1}
RANDOM_STYLE = (GREY, "circle-open", "dash")
# From this ratio of the largest to the smallest size on, a linear axis squeezes most points.
MIN_LOG_RATIO = 30
# SVG points stay sharp and need no WebGL, but tens of thousands of them are slow.
MAX_SVG_POINTS = 5000

POWERS = [10**power for power in range(7)]
LOG_AXIS: Changes = {
    "xaxis.type": "log",
    "xaxis.tickmode": "array",
    "xaxis.tickvals": [digit * power for power in POWERS for digit in (1, 2, 5)],
}
LINEAR_AXIS: Changes = {"xaxis.type": "linear", "xaxis.tickmode": "auto"}
AXES: Buttons = {"log size": [LOG_AXIS], "linear size": [LINEAR_AXIS]}
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

    Raises:
        InputError: a column is missing.

    >>> import pandas
    >>> from circuits.plotting.figures import faithfulness_figure
    >>> curves = pandas.DataFrame({"method": "eap", "edges": [5, 50], "faithfulness": [0.2, 0.9]})
    >>> [trace.name for trace in faithfulness_figure(curves).data]
    ['eap']
    """
    _check_columns(curves, ("method", "edges", "faithfulness"), "faithfulness curves")
    by_method = {}
    for name, rows in curves.groupby(curves["method"].astype(str), sort=False):
        by_method[name] = rows.sort_values("edges")
    sizes = curves.loc[curves["edges"] > 0, "edges"]
    # Without positive sizes both are NaN, and the axis is linear.
    is_wide = sizes.max() >= MIN_LOG_RATIO * sizes.min()
    menus = [_menu(0.0, "relayout", AXES, active=int(not is_wide))]
    if "kl" in curves and curves["kl"].notna().any():
        measures = _measures(by_method)
        menu = _menu(0.28, "update", measures, active=0)
        menus.append(menu)
    figure = go.Figure(_curves(by_method), LAYOUT)
    figure.update_layout(LOG_AXIS if is_wide else LINEAR_AXIS)
    figure.update_layout(
        height=460,
        updatemenus=menus,
        xaxis_title="edges in the circuit",
        yaxis_title="faithfulness",
    )
    figure.add_hline(y=1, line=RULE)
    return figure


@checked_arguments
def score_scatter(frame: pandas.DataFrame, *, x_name: str = "x", y_name: str = "y") -> go.Figure:
    """Plot two methods' scores of the same edges against each other.

    The title gives Pearson's and Spearman's correlation.

    Args:
        frame: one row per edge, with the columns `edge` (or an index of that name), `x` and `y`;
            optionally `group`, which gives each group its colour. Edges that lack a score are
            left out.
        x_name, y_name: the method or measure on each axis, for example `exact patching`.

    Raises:
        InputError: a column is missing.

    >>> import pandas
    >>> from circuits.plotting.figures import score_scatter
    >>> scores = pandas.DataFrame({"edge": ["embed->m0", "m0->logits"], "x": [1, 2], "y": [3, 4]})
    >>> score_scatter(scores, x_name="exact patching", y_name="EAP").layout.title.text
    'Pearson 1.000, Spearman 1.000 (2 edges)'
    """
    index = getattr(frame, "index", None)
    if getattr(index, "name", None) == "edge":
        frame = frame.reset_index()
    _check_columns(frame, ("edge", "x", "y"), "a score scatter")
    scored = frame.dropna(subset=["x", "y"])
    x, y = scored["x"], scored["y"]
    figure = go.Figure(_points(scored), LAYOUT)
    figure.update_layout(
        height=520,
        showlegend="group" in scored,
        title_text=_correlations(x, y, len(frame)),
        title_font_size=15,
        xaxis_title=_plain(x_name),
        yaxis_title=_plain(y_name),
    )
    # The dashed line is where both methods agree; it needs ends even if there is no finite score.
    finite = list(filter(math.isfinite, [*x, *y])) or [0, 1]
    low, high = min(finite), max(finite)
    diagonal = {"x0": low, "y0": low, "x1": high, "y1": high}
    dashes = {**RULE, "dash": "dash"}
    figure.add_shape(type="line", **diagonal, line=dashes, layer="below")
    return figure


def figure_html(figure: go.Figure) -> str:
    """Write a figure as HTML that holds plotly's script, so that it works offline.

    Use it once per page: the script is several megabytes, and the element's id is fixed. It takes
    about a second to start, so `static/page.js` starts it when the rest of the page is there.
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
    return html.replace("<script>", '<script type="text/plain" class="late">')


def _curves(by_method: Frames) -> list[go.Scatter]:
    styles = zip(cycle(COLOURS), cycle(SYMBOLS))
    curves = []
    for name, rows in by_method.items():
        # Colours are for the methods to compare; random choices are their common background.
        is_random = name.lower().startswith(RANDOM)
        colour, symbol, dash = (*next(styles), "solid") if not is_random else RANDOM_STYLE
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


def _measures(by_method: Frames) -> Buttons:
    """For each measure, the values of every trace and the changes of the y axis."""
    buttons = {}
    # The horizontal rule marks the whole model: its faithfulness is 1, its KL divergence 0.
    for column, label, whole_model in MEASURES:
        values = {"y": [rows[column].tolist() for rows in by_method.values()]}
        rule = {"shapes[0].y0": whole_model, "shapes[0].y1": whole_model}
        axis: Changes = {"yaxis.title.text": label}
        buttons[label] = [values, axis | rule]
    return buttons


def _menu(x: float, method: str, buttons: Buttons, active: int) -> Changes:
    """Place buttons that call one of plotly's methods with their arguments."""
    entries = [
        {"label": label, "method": method, "args": arguments}
        for label, arguments in buttons.items()
    ]
    return {**MENU, "x": x, "buttons": entries, "active": active}


def _points(scored: pandas.DataFrame) -> list[go.Scatter | go.Scattergl]:
    """Return the points of each group in its colour."""
    grouped = scored.assign(group=scored.get("group", ""))
    colours = cycle(COLOURS)
    traces = []
    for name, rows in grouped.groupby("group", sort=False):
        scatter = go.Scatter if len(rows) <= MAX_SVG_POINTS else go.Scattergl
        trace = scatter(
            x=rows["x"].tolist(),
            y=rows["y"].tolist(),
            text=[_plain(str(edge)) for edge in rows["edge"]],
            name=_plain(str(name)),
            mode="markers",
            marker={"color": next(colours), "opacity": 0.6},
            hovertemplate="%{text}<br>(%{x:.4g}, %{y:.4g})<extra></extra>",
        )
        traces.append(trace)
    return traces


def _correlations(x: pandas.Series, y: pandas.Series, n_edges: int) -> str:
    """Write the title of a score scatter."""
    # Spearman's correlation is Pearson's of the ranks; pandas would need scipy for it.
    pearson = _correlation(x, y)
    spearman = _correlation(x.rank(), y.rank())
    left_out = f" of {n_edges:,}; the rest lack a score" if len(x) < n_edges else ""
    return f"Pearson {pearson}, Spearman {spearman} ({len(x):,} edges{left_out})"


def _correlation(x: pandas.Series, y: pandas.Series) -> str:
    """Write Pearson's correlation, undefined for fewer than two different values."""
    varies = min(x.nunique(), y.nunique()) > 1
    value = x.corr(y) if varies else math.nan
    return "undefined" if math.isnan(value) else f"{value:.3f}"


def _plain(text: str) -> str:
    """Escape a text, since plotly interprets a few HTML tags."""
    return escape(text, quote=False)


def _check_columns(frame: pandas.DataFrame, needed: tuple[str, ...], what: str) -> None:
    expect(frame, pandas.DataFrame, f"a data frame with {what}", "make one with pandas")
    missing = [name for name in needed if name not in frame]
    if missing:
        raise InputError(
            f"{what} need the columns {', '.join(needed)}; {', '.join(missing)} not found among "
            f"{', '.join(map(str, frame.columns))}."
        )
    for name in NUMBERS.intersection(frame):
        column = frame[name].infer_objects()
        is_real = is_numeric_dtype(column) and not is_complex_dtype(column)
        if len(column) and not is_real:
            first = shown(next(iter(column), None))
            raise InputError(f"the column {name} of {what} must hold numbers, not {first}.")
