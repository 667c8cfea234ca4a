"""Plots: a figure for everything, also where nothing can be shown, and the numbers that stand in them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from real_openrlhf.algo.score_scale import ScoreScale
from real_openrlhf.evals import plots
from real_openrlhf.evals.results import AVERAGE, Settings, compare, evaluate
from tests.helpers.predictions import make_prediction, make_predictions

SETTINGS = Settings(scale=ScoreScale.parse("1-5"), n_resamples=10)
NOTHING = [make_prediction(i, 4.0, None, None) for i in range(3)]


@pytest.mark.parametrize("rows", [make_predictions(30), NOTHING, [make_prediction(0)]])
def test_every_plot_is_written(tmp_path: Path, rows) -> None:
    paths = plots.write_plots(tmp_path / "plots", rows, evaluate(rows, SETTINGS), SETTINGS)
    kinds = ("flask_scatter", "flask_reliability", "flask_confusion", "error_by_benchmark")
    assert [path.stem for path in paths] == list(kinds)
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in paths)


def texts(axes) -> list[str]:
    return [text.get_text() for text in axes.texts]


def test_confusion_counts_decisions_by_label() -> None:
    rows = [
        make_prediction(0, 3.0, [0, 0, 1, 0, 0], 3.0),
        make_prediction(1, 3.0, [0, 0, 0, 1, 0], 3.0),
        make_prediction(2, 10 / 3, [0, 0, 1, 0, 0], None),
    ]
    figure = plots.confusion("flask", rows, SETTINGS.scale)
    rail, standard = figure.axes[:2]
    assert [t.get_text() for t in rail.get_xticklabels()] == ["1", "2", "3", "3.33", "4", "5"]
    at = {tuple(int(v) for v in text.get_position()): text.get_text() for text in rail.texts}
    assert at == {(2, 2): "1", (2, 3): "1", (3, 2): "1"}
    assert {tuple(int(v) for v in t.get_position()): t.get_text() for t in standard.texts} == {(2, 2): "2"}
    assert rail.images[0].get_array()[3, 2] == 0.5


def test_many_fractional_labels_are_rounded_to_the_scale() -> None:
    rng = np.random.default_rng(0)
    rows = [make_prediction(i, float(rng.uniform(1, 5))) for i in range(40)]
    axes = plots.confusion("stsb", rows, SETTINGS.scale).axes[0]
    assert [t.get_text() for t in axes.get_xticklabels()] == ["1", "2", "3", "4", "5"]
    assert "nearest on the scale" in axes.get_xlabel() and sum(int(t) for t in texts(axes)) == 40


def test_what_cannot_be_shown_is_said() -> None:
    assert texts(plots.scatter("x", NOTHING, SETTINGS.scale).axes[0]) == ["no row has a readable score"]
    assert texts(plots.reliability("x", NOTHING, SETTINGS).axes[0]) == [
        "no row has a score with its whole distribution"
    ]
    assert texts(plots.confusion("x", NOTHING, SETTINGS.scale).axes[0]) == ["no row has a score"]
    title = plots.scatter("x", make_predictions(20), SETTINGS.scale)._suptitle.get_text()
    assert title == "x: 18 rows, 2 without a score are not shown"


def test_counts_have_whole_ticks() -> None:
    rows = [make_prediction(i, 5.0) for i in range(7)]
    figures = plots.scatter("x", rows, SETTINGS.scale), plots.reliability("x", rows[:1], SETTINGS)
    for axis in (figures[0].axes[1].yaxis, figures[0].axes[2].xaxis, figures[1].axes[1].yaxis):
        assert all(tick == round(tick) for tick in axis.get_majorticklocs())


def lines_of(axes) -> dict[tuple[float, float], list[float]]:
    """Of what is drawn: (y, number of points) -> their x."""
    return {
        (round(float(line.get_ydata()[0]), 2), len(line.get_xdata())): [float(x) for x in line.get_xdata()]
        for line in axes.lines
        if line.get_linestyle() != "--" and len(line.get_xdata())
    }


def test_differences_stand_where_the_comparison_has_them(tmp_path: Path) -> None:
    a, b = (
        [p for i, name in enumerate(("flask", "own")) for p in make_predictions(30, seed=seed + i, benchmark=name)]
        for seed in (0, 0)
    )
    b = [replace(p, expected=None if p.expected is None else p.expected + 0.1 * (p.row % 3)) for p in b]
    compared = compare(a, b, SETTINGS)
    figure = plots.differences({"b less a": compared, "a less a": compare(a, a, SETTINGS)}, SETTINGS)
    panels = figure.axes
    assert len(panels) == 2 * len(plots.COMPARED) and panels[0].get_title(loc="left") == "b less a"
    assert [t.get_text() for t in panels[0].get_yticklabels()] == ["flask", "own", AVERAGE]
    for metric, axes in zip(plots.COMPARED, panels):
        drawn = lines_of(axes)
        for i, name in enumerate(compared):
            for offset, reading in ((-0.15, "expected"), (0.15, "decoded")):
                found, y = compared[name][reading, metric], round(i + offset, 2)
                assert drawn[y, 1] == [found.difference] and drawn[y, 2] == [found.low, found.high]
    # A run against itself: every difference is 0, with an interval of no width.
    assert all(set(xs) == {0.0} for axes in panels[len(plots.COMPARED) :] for xs in lines_of(axes).values())
    assert plots.write_differences(tmp_path / "c.png", {"x": compared}, SETTINGS).read_bytes().startswith(b"\x89PNG")


def test_differences_without_a_number_or_an_interval() -> None:
    compared = compare(NOTHING, NOTHING, SETTINGS)
    assert texts(plots.differences({"x": compared}, SETTINGS).axes[0]) == ["undefined"] * 2
    one_group = make_predictions(10, group_size=10)
    axes = plots.differences({"x": compare(one_group, one_group, SETTINGS)}, SETTINGS).axes[0]
    drawn = [line for line in axes.lines if len(line.get_xdata()) == 1]
    assert [line.get_markerfacecolor() for line in drawn] == ["white"] * 2 and (-0.15, 2) not in lines_of(axes)
