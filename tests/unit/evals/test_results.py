"""Results against scipy and hand values, averages, pairs, and what is undefined."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
from scipy import stats

from real_openrlhf.algo.score_scale import ScoreScale
from real_openrlhf.evals.predictions import EvaluationError
from real_openrlhf.evals.results import (
    READINGS,
    SCORE_METRICS,
    Settings,
    average_metrics,
    compare,
    evaluate,
    flat_metrics,
    keys,
)
from real_openrlhf.evals.tables import csv_text, from_json, to_json
from tests.helpers.predictions import make_prediction, make_predictions

SETTINGS = Settings(scale=ScoreScale.parse("1-5"), n_resamples=60)


def test_metrics_equal_scipys() -> None:
    rows = make_predictions(80)
    (result,) = evaluate(rows, SETTINGS).benchmarks
    for reading in READINGS:
        known = [(getattr(p, reading), p.label) for p in rows if getattr(p, reading) is not None]
        x, y = (list(side) for side in zip(*known))
        want = {
            "pearson": stats.pearsonr(x, y).statistic,
            "spearman": stats.spearmanr(x, y).statistic,
            "kendall": stats.kendalltau(x, y, variant="b").statistic,
            "rmse": math.sqrt(np.square(np.subtract(x, y)).mean()),
            "mae": np.abs(np.subtract(x, y)).mean(),
        }
        for name, value in want.items():
            assert result.scores[reading][name].estimate == pytest.approx(value, abs=1e-12)
            assert result.scores[reading][name].n == len(known)
    assert result.scores["decoded"]["mae"].n < result.scores["expected"]["mae"].n == 72
    assert (result.n, result.n_groups) == (80, 40)


def test_rates_accuracy_and_ece_by_hand() -> None:
    rows = [
        make_prediction(0, 3.0, [0, 0, 1, 0, 0], 3.0),
        make_prediction(1, 3.0, [0, 0, 0, 0.5, 0.5], 4.0),  # E 4.5 decides for 4
        make_prediction(2, 2.5, [0, 0, 0.8, 0.2, 0], None, forced=True),  # E 3.2; 2.5: 2 and 3 are right
        make_prediction(3, 5.0, None, None),
    ]
    (result,) = evaluate(rows, SETTINGS).benchmarks
    assert {name: found.estimate for name, found in result.rates.items()} == {
        "invalid_rate": 0.25,
        "forced_rate": 0.25,
        "undecoded_rate": 0.5,
    }
    expected, decoded = result.scores["expected"], result.scores["decoded"]
    assert expected["accuracy"].estimate == pytest.approx(2 / 3) and expected["accuracy"].n == 3
    # Bins: 1.0 right; 0.5 wrong; 0.8 right.
    assert expected["ece"].estimate == pytest.approx((0 + 0.5 + 0.2) / 3)
    assert decoded["accuracy"].estimate == pytest.approx(1 / 2) and decoded["ece"].n == 2
    assert decoded["ece"].estimate == pytest.approx((0 + 0.5) / 2)


def test_labels_that_a_server_does_not_return_leave_no_confidence() -> None:
    rows = [make_prediction(i, 3.0 + i % 2, [None, 0.1, 0.5, 0.3, 0.1], 3.0 + i % 2) for i in range(4)]
    (result,) = evaluate(rows, SETTINGS).benchmarks
    assert result.scores["expected"]["mae"].n == 0 and result.scores["decoded"]["ece"].n == 0
    assert result.scores["decoded"]["accuracy"].estimate == 1.0
    assert result.rates["invalid_rate"].estimate == 0.0


def test_intervals_contain_the_estimate_and_clusters_widen_them() -> None:
    base = make_predictions(60, group_size=1)
    rows = [make_prediction(3 * i + k, p.label, p.distribution, p.decoded, group=str(i)) for i, p in enumerate(base)
            for k in range(3)]  # fmt: skip
    alone = [make_prediction(p.row, p.label, p.distribution, p.decoded) for p in rows]
    settings = Settings(scale=SETTINGS.scale, n_resamples=400)
    (clustered,), (independent,) = evaluate(rows, settings).benchmarks, evaluate(alone, settings).benchmarks
    for name in SCORE_METRICS:
        a, b = clustered.scores["expected"][name], independent.scores["expected"][name]
        assert a.estimate == b.estimate and a.low is not None and b.low is not None
    width = {r.n_groups: r.scores["expected"]["mae"] for r in (clustered, independent)}
    # Each row three times: the true spread is sqrt(3) times that of independent rows.
    ratio = (width[60].high - width[60].low) / (width[180].high - width[180].low)  # type: ignore[operator]
    assert 1.4 < ratio < 2.1


def test_average_over_benchmarks() -> None:
    rows = make_predictions(40, seed=1) + make_predictions(60, seed=2, benchmark="mt_bench")
    results = evaluate(rows, SETTINGS)
    assert [r.name for r in results.benchmarks] == ["flask", "mt_bench"] and results.average is not None
    for reading, metric in keys():
        parts = [r.scores[reading][metric] if reading else r.rates[metric] for r in results.benchmarks]
        found = results.average.scores[reading][metric] if reading else results.average.rates[metric]
        assert found.estimate == pytest.approx(sum(p.estimate for p in parts) / 2)  # type: ignore[misc]
        assert found.n == sum(p.n for p in parts)
    average = results.average.scores["expected"]["rmse"]
    assert average.low < average.estimate < average.high  # type: ignore[operator]
    assert evaluate(rows[:40], SETTINGS).average is None


@pytest.mark.parametrize(
    ("rows", "note"),
    [
        ([make_prediction(i, 4.0, [0, 0, 0, 1 - i / 10, i / 10], 4.0 + i % 2) for i in range(5)], "all labels are 4"),
        ([make_prediction(i, 1.0 + i) for i in range(5)], "all predictions are 3"),
        ([make_prediction(0)], "one row only"),
        ([make_prediction(i, 1.0 + i, None, None) for i in range(3)], "no row has a readable score"),
    ],
)
def test_undefined_correlations_are_said_in_words_and_null_in_json(rows, note) -> None:
    results = evaluate(rows, SETTINGS)
    for metric in ("pearson", "spearman", "kendall"):
        found = results.benchmarks[0].scores["expected"][metric]
        assert (found.estimate, found.low, found.high) == (None, None, None)
        assert found.note == f"undefined: {note}"
    text = json.dumps(to_json(results), allow_nan=False)
    assert from_json(json.loads(text)) == results
    assert "nan" not in csv_text(results).lower()


def test_one_undefined_benchmark_leaves_the_average_undefined_and_says_which() -> None:
    rows = make_predictions(20) + [make_prediction(i, 4.0, benchmark="const") for i in range(3)]
    average = evaluate(rows, SETTINGS).average
    assert average is not None
    assert average.scores["expected"]["pearson"].note == "undefined: on const all labels are 4"
    assert average.scores["expected"]["mae"].estimate is not None


def test_a_pair_is_compared_on_the_same_draws() -> None:
    a = make_predictions(60, seed=3)
    same = compare(a, list(reversed(a)), SETTINGS)["flask"]
    assert all(v.difference in (0, None) and v.low in (0, None) for v in same.values())
    better = [
        make_prediction(p.row, p.label, [float(round(p.label) == v) for v in range(1, 6)], float(round(p.label)))
        for p in a
    ]
    compared = compare(a, better, SETTINGS)["flask"]
    assert compared["expected", "mae"].n == 54  # rows that both have read
    assert compared["expected", "mae"].high < 0 < compared["expected", "pearson"].low  # type: ignore[operator]
    # Each side's ECE is held against its own decisions.
    assert compared["expected", "ece"].estimate_b == pytest.approx(
        1 - compared["expected", "accuracy"].estimate_b  # type: ignore[operator]
    )
    assert compared["", "invalid_rate"].difference == pytest.approx(-0.1)


def test_comparison_has_the_average_of_the_benchmarks() -> None:
    a = make_predictions(30, seed=1) + make_predictions(30, seed=2, benchmark="mt_bench")
    b = make_predictions(30, seed=5) + make_predictions(30, seed=6, benchmark="mt_bench")
    b = [make_prediction(q.row, p.label, q.distribution, q.decoded, benchmark=p.benchmark) for p, q in zip(a, b)]
    table = compare(a, b, SETTINGS)
    for key in (("expected", "rmse"), ("decoded", "kendall")):
        want = (table["flask"][key].difference + table["mt_bench"][key].difference) / 2  # type: ignore[operator]
        assert table["average"][key].difference == pytest.approx(want)


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (make_predictions(19), "row 19 of flask and 0 others are not in the second run"),
        (make_predictions(21), "row 20 of flask and 0 others are not in the first run"),
        ([make_prediction(i, 1.0) for i in range(20)], "the label of row 0 of flask is"),
    ],
)
def test_runs_of_other_data_are_not_paired(other, message) -> None:
    with pytest.raises(EvaluationError, match=message):
        compare(make_predictions(20), other, SETTINGS)


def test_flat_metrics_are_the_results_without_intervals() -> None:
    rows = make_predictions(50)
    flat = flat_metrics(rows, SETTINGS)
    (result,) = evaluate(rows, SETTINGS).benchmarks
    for reading, metric in keys():
        found = result.scores[reading][metric] if reading else result.rates[metric]
        assert flat[f"{reading}/{metric}" if reading else metric] == pytest.approx(found.estimate, abs=1e-12)
    assert flat["n"] == 50 and flat["expected/n"] == 45
    masses = [p.mass for p in rows if p.mass is not None]
    assert flat["mass"] == pytest.approx(sum(masses) / 45)
    assert flat_metrics([make_prediction(0, 3.0, None, None)], SETTINGS)["expected/mae"] is None


def test_average_of_flat_metrics() -> None:
    tables = [
        {"expected/mae": 1.0, "expected/n": 3, "n": 4, "mass": None},
        {"expected/mae": 2.0, "expected/n": 5, "n": 6, "mass": 0.5},
    ]
    assert average_metrics(tables) == {"expected/mae": 1.5, "expected/n": 8, "n": 10, "mass": None}


def test_nothing_to_evaluate() -> None:
    with pytest.raises(EvaluationError, match="no prediction"):
        evaluate([], SETTINGS)
