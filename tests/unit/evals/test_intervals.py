"""Intervals: against scipy, against loops, coverage, missing and undefined values."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from real_openrlhf.evals import intervals
from real_openrlhf.evals.intervals import bootstrap, paired_bootstrap
from real_openrlhf.evals.metrics import METRICS


def sample(n=120, seed=0):
    rng = np.random.default_rng(seed)
    labels = rng.integers(1, 6, n).astype(float)
    return labels + 2 * rng.normal(size=n), labels + rng.normal(size=n), labels


@pytest.mark.parametrize("name", ["pearson", "spearman", "rmse", "mae"])
def test_vectorised_metrics_equal_the_plain_ones_on_every_resample(name):
    rng = np.random.default_rng(1)
    labels = rng.integers(1, 6, 30).astype(float)
    predictions = np.round(labels + rng.normal(size=30), 1)
    counts = rng.multinomial(30, np.full(30, 1 / 30), size=50)
    fast = intervals.WEIGHTED[METRICS[name]](predictions, labels, counts)
    plain = [METRICS[name](np.repeat(predictions, c), np.repeat(labels, c)) for c in counts]
    np.testing.assert_allclose(fast, plain, atol=1e-10)


@pytest.mark.parametrize("name", ["pearson", "spearman"])
def test_vectorised_correlation_of_a_constant_resample_is_undefined(name):
    x, y = np.array([0.1, 0.3, 0.7]), np.array([1.0, 2.0, 3.0])
    counts = np.array([[3, 0, 0], [0, 3, 0], [1, 1, 1]])
    values = intervals.WEIGHTED[METRICS[name]](x, y, counts)
    assert np.isnan(values).tolist() == [True, True, False]


@pytest.mark.parametrize("name", ["pearson", "kendall", "mae"])
def test_a_function_gives_the_same_interval_as_its_name(name):
    a, b, labels = sample(40)
    by_name = paired_bootstrap(name, a, b, labels, seed=3, n_resamples=100)
    by_function = paired_bootstrap(lambda x, y: METRICS[name](x, y), a, b, labels, seed=3, n_resamples=100)
    for field in ("estimate_a", "estimate_b", "difference", "low", "high"):
        assert getattr(by_name, field) == pytest.approx(getattr(by_function, field), abs=1e-10)


def test_agrees_with_scipy_up_to_resampling_noise():
    a, b, labels = sample(300)

    def difference(x, z, y):
        return np.corrcoef(z, y)[0, 1] - np.corrcoef(x, y)[0, 1]

    theirs = stats.bootstrap(
        (a, b, labels), difference, paired=True, vectorized=False, method="percentile", n_resamples=4000, rng=7
    ).confidence_interval
    ours = paired_bootstrap("pearson", a, b, labels, seed=7, n_resamples=4000)
    assert ours.difference == pytest.approx(difference(a, b, labels), abs=1e-12)
    width = theirs.high - theirs.low
    assert abs(ours.low - theirs.low) < 0.08 * width
    assert abs(ours.high - theirs.high) < 0.08 * width


def test_difference_is_b_minus_a_and_identical_judges_have_no_spread():
    a, b, labels = sample()
    got = paired_bootstrap("rmse", a, b, labels, seed=0, n_resamples=200)
    assert got.difference == pytest.approx(METRICS["rmse"](b, labels) - METRICS["rmse"](a, labels))
    assert got.high < 0  # b is better
    same = paired_bootstrap("pearson", a, a, labels, seed=0, n_resamples=200)
    assert (same.difference, same.low, same.high) == (0, 0, 0)


def test_rows_are_drawn_jointly():
    # b is a shifted: the paired difference of the MAE is exact only when both see the same rows.
    _, b, labels = sample()
    a = np.abs(b - labels) + labels
    got = paired_bootstrap("mae", a, a + 0.5, labels, seed=0, n_resamples=200)
    assert got.low == pytest.approx(0.5) and got.high == pytest.approx(0.5)


def test_coverage_of_the_mean_absolute_error():
    rng = np.random.default_rng(0)
    covered = 0
    for seed in range(200):
        errors = rng.exponential(size=100)
        got = bootstrap("mae", errors, np.zeros(100), seed=seed, n_resamples=400)
        covered += got.low <= 1.0 <= got.high
    assert 0.88 <= covered / 200 <= 0.98


def test_coverage_of_a_paired_correlation_difference():
    rng = np.random.default_rng(1)
    truth = 0.8 - 0.5
    covered = 0
    for seed in range(150):
        labels = rng.normal(size=150)
        a = 0.5 * labels + 0.75**0.5 * rng.normal(size=150)
        b = 0.8 * labels + 0.6 * rng.normal(size=150)
        got = paired_bootstrap("pearson", a, b, labels, seed=seed, n_resamples=300)
        covered += got.low <= truth <= got.high
    assert 0.88 <= covered / 150 <= 0.99


def test_confidence_widens_and_seed_repeats():
    a, b, labels = sample()
    narrow = paired_bootstrap("pearson", a, b, labels, seed=5, n_resamples=500, confidence=0.5)
    wide = paired_bootstrap("pearson", a, b, labels, seed=5, n_resamples=500, confidence=0.99)
    assert wide.low < narrow.low < narrow.high < wide.high
    assert wide == paired_bootstrap("pearson", a, b, labels, seed=5, n_resamples=500, confidence=0.99)
    assert wide != paired_bootstrap("pearson", a, b, labels, seed=6, n_resamples=500, confidence=0.99)


def test_chunks_do_not_change_the_result(monkeypatch):
    a, b, labels = sample()
    whole = paired_bootstrap("pearson", a, b, labels, seed=5, n_resamples=50)
    monkeypatch.setattr(intervals, "CHUNK", 7 * len(labels))
    cut = paired_bootstrap("pearson", a, b, labels, seed=5, n_resamples=50)
    assert (cut.low, cut.high) == (pytest.approx(whole.low), pytest.approx(whole.high))


def test_rows_with_a_missing_prediction_are_left_out_of_both():
    a, b, labels = sample(30)
    a_holes, b_holes = a.tolist(), b.tolist()
    a_holes[3], b_holes[7], b_holes[9] = None, float("nan"), None
    keep = [i for i in range(30) if i not in (3, 7, 9)]
    got = paired_bootstrap("pearson", a_holes, b_holes, labels.tolist(), seed=0, n_resamples=100)
    want = paired_bootstrap("pearson", a[keep], b[keep], labels[keep], seed=0, n_resamples=100)
    assert (got.n, got.excluded) == (27, 3)
    assert (got.estimate_a, got.estimate_b, got.low, got.high) == (
        want.estimate_a,
        want.estimate_b,
        want.low,
        want.high,
    )


def test_clusters_are_drawn_whole():
    # Twenty clusters of five equal rows hold as much as twenty rows: the interval must be that of the twenty.
    a, b, labels = sample(20, seed=2)
    clusters = np.repeat([f"c{i}" for i in range(20)], 5).tolist()
    fives = [np.repeat(v, 5) for v in (a, b, labels)]
    clustered = paired_bootstrap("pearson", *fives, seed=0, n_resamples=400, clusters=clusters)
    rows = paired_bootstrap("pearson", a, b, labels, seed=0, n_resamples=400)
    assert clustered.low == pytest.approx(rows.low, abs=1e-9)
    assert clustered.high == pytest.approx(rows.high, abs=1e-9)
    naive = paired_bootstrap("pearson", *fives, seed=0, n_resamples=400)
    assert naive.high - naive.low < 0.7 * (clustered.high - clustered.low)
    assert clustered.n == 100


def test_undefined_estimates_and_resamples():
    constant = paired_bootstrap("pearson", [3.0] * 10, list(range(10)), list(range(10)), seed=0, n_resamples=50)
    assert constant.estimate_a is None and constant.difference is None and constant.low is None
    assert constant.estimate_b == pytest.approx(1.0) and constant.undefined == 50
    # With 3 rows one resample in nine is constant: more than the tail, so there are no bounds.
    few = bootstrap("pearson", [1.0, 2.0, 4.0], [1.0, 3.0, 2.0], seed=0, n_resamples=900)
    assert few.estimate is not None and few.low is None and 60 < few.undefined < 140


@pytest.mark.parametrize("predictions", [[], [None, None], [None, 2.0]])
def test_too_few_rows(predictions):
    got = bootstrap("mae", predictions, [1.0] * len(predictions), seed=0, n_resamples=20)
    assert got.low is got.high is None
    assert got.n + got.excluded == len(predictions)
    assert got.estimate == (1.0 if got.n else None)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"metric": "pearsn"}, "no metric 'pearsn'; known are pearson"),
        ({"predictions": [1.0]}, "equally long"),
        ({"clusters": ["a"]}, "equally long"),
        ({"labels": [1.0, float("nan"), 2.0]}, r"labels\[1\]"),
        ({"predictions": [1.0, float("inf"), 2.0]}, "infinite"),
        ({"confidence": 1.0}, "confidence must"),
        ({"n_resamples": 0}, "n_resamples must"),
    ],
)
def test_bad_options(change, message):
    options = {"metric": "mae", "predictions": [1.0, 2.0, 3.0], "labels": [1.0, 2.0, 2.0], "seed": 0} | change
    with pytest.raises(ValueError, match=message):
        bootstrap(options.pop("metric"), options.pop("predictions"), options.pop("labels"), **options)
