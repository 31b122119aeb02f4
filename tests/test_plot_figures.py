"""The plotly figures: which lines and points there are, and what their buttons do."""

from __future__ import annotations

import json
import math

import pandas
import pytest

from circuits.plotting import figures
from circuits.system.errors import InputError


@pytest.fixture(scope="module")
def curves() -> pandas.DataFrame:
    sizes = [5, 50, 400]
    columns = {
        "method": ["eap"] * 3 + ["random"] * 3,
        "edges": sizes * 2,
        "faithfulness": [0.2, 0.8, 1, 0, 0, 0.4],
        "kl": [2.0, 0.3, 0, 3, 3, 1],
    }
    swept = pandas.DataFrame(
        {
            "method": "acdc",
            "edges": [30, 60],
            "faithfulness": [0.8, 0.95],
            "kl": [0.3, 0.1],
            "selected": True,
        }
    )
    return pandas.concat(
        [pandas.DataFrame(columns).assign(selected=False), swept], ignore_index=True
    )


def test_faithfulness_lines_are_sorted_selecting_methods_are_points_and_random_is_dashed_grey(
    curves: pandas.DataFrame,
) -> None:
    figure = figures.faithfulness_figure(curves.sample(frac=1, random_state=0))
    traces = {trace.name: trace for trace in figure.data}
    assert traces["eap"].x == (5, 50, 400) and traces["eap"].mode == "lines+markers"
    assert traces["acdc"].mode == "markers"
    assert traces["random"].line.dash == "dash" and traces["random"].line.color == figures.GREY
    assert len({trace.line.color for trace in traces.values()}) == 3


def test_the_size_axis_can_be_logarithmic_and_starts_so_when_sizes_span_a_wide_range(
    curves: pandas.DataFrame,
) -> None:
    labels = [
        button.label
        for menu in figures.faithfulness_figure(curves).layout.updatemenus
        for button in menu.buttons
    ]
    assert labels == ["log size", "linear size", "faithfulness", "KL from the model"]
    assert figures.faithfulness_figure(curves).layout.xaxis.type == "log"
    narrow = figures.faithfulness_figure(curves[curves["edges"] >= 30].drop(columns="kl"))
    assert narrow.layout.xaxis.type == "linear" and len(narrow.layout.updatemenus) == 1


def test_the_kl_button_hands_each_line_its_own_values(curves: pandas.DataFrame) -> None:
    figure = figures.faithfulness_figure(curves)
    values, _ = figure.layout.updatemenus[1].buttons[1].args
    for trace, kl in zip(figure.data, values["y"], strict=True):
        assert kl == curves[curves["method"] == trace.name].sort_values("edges")["kl"].tolist()


def test_a_missing_column_is_named() -> None:
    with pytest.raises(InputError, match="faithfulness not found among method, edges"):
        figures.faithfulness_figure(pandas.DataFrame({"method": ["eap"], "edges": [3]}))


def test_a_score_scatter_names_both_correlations_and_leaves_out_what_was_not_scored() -> None:
    x = [1.0, 2.0, 3.0, 4.0, float("nan")]
    frame = pandas.DataFrame(
        {
            "edge": list("abcde"),
            "x": x,
            "y": [1.0, 4.0, 9.0, 16.0, 5.0],
            "group": ["q", "q", "k", "k", "k"],
        }
    )
    figure = figures.score_scatter(frame, x_name="exact patching", y_name="EAP")
    # Pearson of 1..4 with their squares, by hand: 25 / sqrt(5 * 129); the ranks agree.
    assert (
        figure.layout.title.text
        == "Pearson 0.984, Spearman 1.000 (4 edges of 5; the rest lack a score)"
    )
    assert [(trace.name, len(trace.x)) for trace in figure.data] == [("q", 2), ("k", 2)]
    assert figure.layout.xaxis.title.text == "exact patching"
    assert figures.score_scatter(frame.set_index("edge")).data[1].text == ("c", "d")


@pytest.mark.parametrize("rows", [0, 1, 3])
def test_correlations_of_too_few_or_equal_scores_are_undefined_not_an_error(rows: int) -> None:
    frame = pandas.DataFrame({"edge": ["a"] * rows, "x": [1.0] * rows, "y": [2.0] * rows})
    assert (
        figures.score_scatter(frame).layout.title.text
        == f"Pearson undefined, Spearman undefined ({rows} edges)"
    )


@pytest.mark.parametrize(
    ("x", "low", "high"),
    [([], 0, 1), ([math.nan], 0, 1), ([math.inf], 2, 2), ([-1, math.inf], -1, 2)],
)
def test_the_line_of_agreement_has_finite_ends(x: list[float], low: float, high: float) -> None:
    frame = pandas.DataFrame({"edge": ["a"] * len(x), "x": x, "y": [2.0] * len(x)})
    (line,) = json.loads(figures.score_scatter(frame).to_json())["layout"]["shapes"]
    assert [line[end] for end in ("x0", "y0", "x1", "y1")] == [low, low, high, high]
