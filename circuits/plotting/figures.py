"""Pictures of circuits and of what methods achieve, and pages that work offline from a file.

Drawings are SVG text, figures are plotly's, pages are HTML text that loads nothing. Writing them to disk is the caller's business.
"""

from __future__ import annotations

import math
from html import escape
from typing import Any

import pandas
import plotly.graph_objects as go

from circuits.plotting.circuit_drawing.svg_marks import INK, QUIET, SANS
from circuits.system.errors import InputError

RANDOM = "random"
# Okabe and Ito's colours again; the symbols differ as well, for readers and printers without colour.
LINE_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#8a6d00", "#56b4e9", "#1f2430")
SYMBOLS = ("circle", "diamond", "square", "triangle-up", "cross", "star", "x")
GREY, RULE = "#8b919c", "#d9dce2"
LOG_FROM = (
    30  # largest size over smallest, from which a linear axis would squeeze most points together
)


LOG_TICKS = [digit * 10**power for power in range(7) for digit in (1, 2, 5)]


LOG_AXIS: dict[str, Any] = {"type": "log", "tickmode": "array", "tickvals": LOG_TICKS}


LINEAR_AXIS: dict[str, Any] = {"type": "linear", "tickmode": "auto"}


MOST_SVG_POINTS = 5000
FAITHFULNESS_IN_WORDS = (
    "<p>Faithfulness is the share of the model's metric that a circuit keeps when every other edge is ablated: "
    "1 is the whole model, 0 the model with every edge ablated. A method whose curve rises further left needs fewer edges.</p>"
)


def faithfulness_figure(curves: pandas.DataFrame) -> go.Figure:
    """Faithfulness against the number of edges, a line per method; methods that select give points; the random baseline is dashed grey.

    Args:
        curves: columns `method`, `edges`, `faithfulness`; optionally `kl`, which a menu then offers on the y axis, and `selected`,
            True where a method chose these edges itself (a method with a single row counts as selecting).

    Raises:
        InputError: a column is missing.
    """
    _check_columns(curves, ("method", "edges", "faithfulness"), "faithfulness curves")
    names = list(dict.fromkeys(curves["method"].astype(str)))
    measured = [name for name in names if not _is_random(name)]
    traces = [
        _curve(_of_method(curves, name), name, measured.index(name) if name in measured else None)
        for name in names
    ]
    sizes = curves.loc[curves["edges"] > 0, "edges"]
    logarithmic = bool(
        sizes.max() >= LOG_FROM * sizes.min()
    )  # False without sizes: NaN compares so
    figure = go.Figure(traces)
    figure.update_layout(
        _look(height=460), updatemenus=_menus(curves, names, logarithmic), hovermode="closest"
    )
    figure.update_xaxes(_axis("edges in the circuit"), **(LOG_AXIS if logarithmic else LINEAR_AXIS))
    figure.update_yaxes(_axis("faithfulness"))
    figure.add_hline(y=1, line={"color": GREY, "width": 1})
    return figure


def score_scatter(frame: pandas.DataFrame, *, x_name: str = "x", y_name: str = "y") -> go.Figure:
    """Two methods' scores of the same edges against each other, with their correlations in the title.

    Args:
        frame: columns `edge` (or an index of that name), `x`, `y`; optionally `group`, which gives each group its
            colour. Edges without both scores are left out.
        x_name: what `x` is, for example `exact patching`.
        y_name: what `y` is, for example `EAP`.

    Raises:
        InputError: a column is missing.
    """
    frame = frame.reset_index() if frame.index.name == "edge" else frame
    _check_columns(frame, ("edge", "x", "y"), "a score scatter")
    scored = frame[frame["x"].notna() & frame["y"].notna()]
    groups = scored.groupby("group", sort=False) if "group" in scored else [("", scored)]
    figure = go.Figure(
        [_points(part, str(name), place) for place, (name, part) in enumerate(groups)]
    )
    low, high = (
        (0.0, 1.0)
        if scored.empty
        else (float(scored[["x", "y"]].min().min()), float(scored[["x", "y"]].max().max()))
    )
    figure.add_shape(
        type="line",
        x0=low,
        y0=low,
        x1=high,
        y1=high,
        line={"color": GREY, "width": 1, "dash": "dash"},
        layer="below",
    )
    title = {
        "text": _agreement(scored, len(frame)),
        "font": {"size": 15},
        "x": 0.02,
        "xanchor": "left",
    }
    figure.update_layout(_look(height=520), title=title, showlegend="group" in scored)
    figure.update_xaxes(_axis(_plain(x_name)))
    figure.update_yaxes(_axis(_plain(y_name)))
    return figure


def _of_method(curves: pandas.DataFrame, name: str) -> pandas.DataFrame:
    return curves[curves["method"].astype(str) == name].sort_values("edges")


def _curve(rows: pandas.DataFrame, name: str, place: int | None) -> go.Scatter:
    colour, symbol = (
        (GREY, "circle-open")
        if place is None
        else (LINE_COLOURS[place % len(LINE_COLOURS)], SYMBOLS[place % len(SYMBOLS)])
    )
    selects = bool(rows["selected"].all()) if "selected" in rows else len(rows) == 1
    return go.Scatter(
        x=rows["edges"].tolist(),
        y=rows["faithfulness"].tolist(),
        name=_plain(name),
        mode="markers" if selects else "lines+markers",
        line={"color": colour, "width": 2, "dash": "dash" if place is None else "solid"},
        marker={"color": colour, "symbol": symbol, "size": 10 if selects else 6},
        hovertemplate="%{fullData.name}<br>%{x:,} edges: %{y:.3f}<extra></extra>",
    )


def _menus(curves: pandas.DataFrame, names: list[str], logarithmic: bool) -> list[dict[str, Any]]:
    """Buttons over the figure: the x axis, and what the y axis shows where there is a choice."""
    axes = {"log size": LOG_AXIS, "linear size": LINEAR_AXIS}
    sizes = [
        _button(label, "relayout", {f"xaxis.{key}": value for key, value in axis.items()})
        for label, axis in axes.items()
    ]
    menus = [_menu(sizes, x=0.0, active=0 if logarithmic else 1)]
    if "kl" in curves and curves["kl"].notna().any():
        values = {
            column: {"y": [_of_method(curves, name)[column].tolist() for name in names]}
            for column in ("faithfulness", "kl")
        }
        # The rule marks the whole model: its faithfulness is 1, its KL 0.
        faithfulness = _button(
            "faithfulness", "update", values["faithfulness"], _y_axis("faithfulness", rule=1)
        )
        kl = _button(
            "KL from the model", "update", values["kl"], _y_axis("KL from the model", rule=0)
        )
        menus.append(_menu([faithfulness, kl], x=0.28, active=0))
    return menus


def _button(label: str, method: str, *changes: dict[str, Any]) -> dict[str, Any]:
    return {"label": label, "method": method, "args": list(changes)}


def _y_axis(title: str, *, rule: int) -> dict[str, Any]:
    return {"yaxis.title.text": title, "shapes[0].y0": rule, "shapes[0].y1": rule}


def _menu(buttons: list[dict[str, Any]], *, x: float, active: int) -> dict[str, Any]:
    look = {
        "bgcolor": "#ffffff",
        "bordercolor": RULE,
        "font": {"size": 12, "color": INK},
        "pad": {"t": 0, "b": 8},
    }
    place = {"x": x, "xanchor": "left", "y": 1.0, "yanchor": "bottom", "direction": "right"}
    return {**look, **place, "type": "buttons", "buttons": buttons, "active": active}


def _points(rows: pandas.DataFrame, name: str, place: int) -> go.Scatter | go.Scattergl:
    # SVG points stay sharp and need no WebGL, but tens of thousands are slow.
    kind = go.Scatter if len(rows) <= MOST_SVG_POINTS else go.Scattergl
    return kind(
        x=rows["x"].tolist(),
        y=rows["y"].tolist(),
        text=[_plain(str(edge)) for edge in rows["edge"]],
        name=_plain(name),
        mode="markers",
        marker={"color": LINE_COLOURS[place % len(LINE_COLOURS)], "size": 6, "opacity": 0.6},
        hovertemplate="%{text}<br>(%{x:.4g}, %{y:.4g})<extra></extra>",
    )


def _agreement(scored: pandas.DataFrame, total: int) -> str:
    # Spearman's is Pearson's of the ranks; asking pandas for it would need scipy.
    kinds = {
        "Pearson": _correlation(scored["x"], scored["y"]),
        "Spearman": _correlation(scored["x"].rank(), scored["y"].rank()),
    }
    values = ", ".join(
        f"{name} {'undefined' if math.isnan(value) else f'{value:.3f}'}"
        for name, value in kinds.items()
    )
    left_out = f" of {total:,}; the rest lack a score" if len(scored) < total else ""
    return f"{values} ({len(scored):,} edges{left_out})"


def _correlation(x: pandas.Series, y: pandas.Series) -> float:
    """NaN where it is undefined: fewer than two edges, or no spread."""
    return float(x.corr(y)) if x.nunique() > 1 and y.nunique() > 1 else math.nan


def _look(height: int) -> dict[str, Any]:
    return {
        "height": height,
        "margin": {"l": 68, "r": 24, "t": 56, "b": 84},
        "template": "none",
        "paper_bgcolor": "#ffffff",
        "plot_bgcolor": "#ffffff",
        "font": {"family": SANS, "size": 14, "color": INK},
        "legend": {"orientation": "h", "x": 0, "xanchor": "left", "y": -0.2, "yanchor": "top"},
    }


def _axis(title: str) -> dict[str, Any]:
    lines = {
        "showgrid": True,
        "gridcolor": "#eceef1",
        "zeroline": True,
        "zerolinecolor": RULE,
        "linecolor": RULE,
        "showline": True,
    }
    ticks = {
        "ticks": "outside",
        "tickcolor": RULE,
        "tickfont": {"color": QUIET, "size": 12.5},
        "tickformat": "~g",
        "automargin": True,
    }
    return {**lines, **ticks, "title": {"text": title, "font": {"size": 14}}}


def _embedded(figure: go.Figure) -> str:
    """The figure as HTML with plotly's script inside, so that the page works offline. Once per page."""
    # Named buttons only: plotly's default ones can send the figure to a service.
    config = {
        "displaylogo": False,
        "responsive": True,
        "modeBarButtons": [["toImage", "zoom2d", "pan2d", "resetScale2d"]],
    }
    text: str = figure.to_html(
        full_html=False,
        include_plotlyjs=True,
        config=config,
        default_height="460px",
        div_id="faithfulness",
    )
    return text


def _plain(text: str) -> str:
    """Text that plotly shows as written: it reads a few HTML tags otherwise."""
    return escape(text, quote=False)


def _is_random(name: str) -> bool:
    return name.lower().startswith(RANDOM)


def _check_columns(frame: pandas.DataFrame, needed: tuple[str, ...], what: str) -> None:
    if missing := [name for name in needed if name not in frame]:
        found = ", ".join(map(str, frame.columns))
        raise InputError(
            f"{what} need the columns {', '.join(needed)}; {', '.join(missing)} not found among {found}."
        )
