"""Metrics against independent formulas, and what is undefined or missing."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
from scipy import stats

from real_openrlhf.evals.metrics import judge_metrics, score_metrics


def tau_b_by_counting(x, y):
    """Concordant minus discordant pairs over the geometric mean of the untied pairs, pair by pair."""
    concordant = discordant = untied_x = untied_y = 0
    for i in range(len(x)):
        for j in range(i):
            dx, dy = x[i] - x[j], y[i] - y[j]
            untied_x += dx != 0
            untied_y += dy != 0
            concordant += dx * dy > 0
            discordant += dx * dy < 0
    return (concordant - discordant) / (untied_x * untied_y) ** 0.5


def mean_ranks(x):
    """1 + values below + half of the other ties."""
    return [1 + sum(v < u for v in x) + (sum(v == u for v in x) - 1) / 2 for u in x]


def pearson_by_hand(x, y):
    mx, my = sum(x) / len(x), sum(y) / len(y)
    cov = sum((a - mx) * (b - my) for a, b in zip(x, y))
    return cov / (sum((a - mx) ** 2 for a in x) * sum((b - my) ** 2 for b in y)) ** 0.5


@pytest.mark.parametrize("seed", range(5))
def test_metrics_equal_independent_formulas_with_ties(seed):
    rng = np.random.default_rng(seed)
    labels = rng.integers(1, 6, 40).astype(float)
    predictions = np.round(labels + rng.normal(size=40), 0 if seed % 2 else 3)
    got = score_metrics(predictions, labels)
    x, y = predictions.tolist(), labels.tolist()
    assert got["pearson"] == pytest.approx(pearson_by_hand(x, y), abs=1e-12)
    assert got["spearman"] == pytest.approx(pearson_by_hand(mean_ranks(x), mean_ranks(y)), abs=1e-12)
    assert got["spearman"] == pytest.approx(stats.spearmanr(x, y).statistic, abs=1e-12)
    assert got["kendall"] == pytest.approx(tau_b_by_counting(x, y), abs=1e-12)
    assert got["rmse"] == pytest.approx((sum((a - b) ** 2 for a, b in zip(x, y)) / 40) ** 0.5, abs=1e-12)
    assert got["mae"] == pytest.approx(sum(abs(a - b) for a, b in zip(x, y)) / 40, abs=1e-12)
    assert got["n"] == 40


def test_hand_values():
    # deviations (-1, 0, 1) and (-2/3, -2/3, 4/3): r = 2 / sqrt(2 * 8/3) = sqrt(3)/2
    got = score_metrics([1, 2, 3], [1, 1, 3])
    assert got["pearson"] == pytest.approx(3**0.5 / 2)
    assert got["kendall"] == pytest.approx(2 / 6**0.5)
    assert got["rmse"] == pytest.approx((1 / 3) ** 0.5)
    assert got["mae"] == pytest.approx(1 / 3)


@pytest.mark.parametrize(
    ("predictions", "labels"),
    [
        ([3, 3, 3], [1, 2, 3]),
        ([1, 2, 3], [4, 4, 4]),
        ([2], [4]),
        ([0.1 + 0.2, 0.3, 0.3], [1, 2, 3]),
    ],
)
def test_undefined_correlation_is_none_and_the_errors_are_still_there(predictions, labels):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        got = score_metrics(predictions, labels)
    assert got["pearson"] is got["spearman"] is got["kendall"] is None
    differences = np.subtract(predictions, labels)
    assert got["mae"] == pytest.approx(np.abs(differences).mean())
    assert got["rmse"] == pytest.approx(np.sqrt((differences**2).mean()))


def test_no_rows():
    assert score_metrics([], []) == {
        "pearson": None,
        "spearman": None,
        "kendall": None,
        "rmse": None,
        "mae": None,
        "n": 0,
    }


@pytest.mark.parametrize(
    ("predictions", "labels", "message"),
    [
        ([1, 2], [1], "2 predictions, but 1 labels"),
        ([1, float("nan")], [1, 2], r"predictions\[1\] is nan"),
        ([1, 2], [float("inf"), 2], r"labels\[0\] is inf"),
        ([1, None], [1, 2], r"predictions\[1\] is nan"),
        ([[1, 2]], [1, 2], "shape"),
    ],
)
def test_bad_input(predictions, labels, message):
    with pytest.raises(ValueError, match=message):
        score_metrics(predictions, labels)


def test_judge_metrics_use_only_the_rows_there_are():
    expected = [1.5, None, 3.0, 4.5, 2.0]
    decoded = [1.0, None, None, 5.0, 2.0]
    labels = [1, 5, 3, 4, 2]
    got = judge_metrics(expected, decoded, labels)
    for key, value in score_metrics([1.5, 3.0, 4.5, 2.0], [1, 3, 4, 2]).items():
        assert got[f"expected/{key}"] == value
    for key, value in score_metrics([1, 5, 2], [1, 4, 2]).items():
        assert got[f"decoded/{key}"] == value
    assert (got["invalid_rate"], got["undecoded_rate"], got["n"]) == (0.2, 0.4, 5)
    assert (got["expected/n"], got["decoded/n"]) == (4, 3)


def test_judge_metrics_all_invalid_and_empty():
    got = judge_metrics([None, None], [None, None], [1, 2])
    assert got["expected/rmse"] is None and got["expected/n"] == 0
    assert got["invalid_rate"] == got["undecoded_rate"] == 1.0
    assert judge_metrics([], [], [])["invalid_rate"] is None


@pytest.mark.parametrize(
    ("args", "message"),
    [(([1.0], [1.0, 2.0], [1]), "1 expected scores, 2 decoded"), (([float("nan")], [1.0], [1]), "not a finite number")],
)
def test_judge_metrics_bad_input(args, message):
    with pytest.raises(ValueError, match=message):
        judge_metrics(*args)
