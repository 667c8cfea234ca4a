"""Calibration against values worked out by hand and against a brute-force fit."""

from __future__ import annotations

import json
from itertools import pairwise

import numpy as np
import pytest
from scipy.optimize import minimize

from real_openrlhf.algo.score_scale import ScoreScale
from real_openrlhf.judge.calibration import FILE, MIN_ROWS, Calibration, CalibrationError

SCALE = ScoreScale.parse("1-5")
RNG = np.random.default_rng(0)
X = np.sort(RNG.uniform(1, 5, 40))
Y = np.clip(np.round(0.7 * X + 1.2 + RNG.normal(0, 0.8, 40)), 1, 5)


def test_isotonic_is_the_least_squares_fit_that_never_falls() -> None:
    made = Calibration.fit(X, Y, scale=SCALE)
    fitted = np.array([made(x) for x in X])
    assert all(b >= a - 1e-12 for a, b in pairwise(fitted))
    # The same problem for a general optimiser: the first value and steps that are not negative.
    found = minimize(
        lambda s: np.sum((np.cumsum(s) - Y) ** 2),
        x0=np.r_[Y.mean(), np.zeros(39)],
        jac=lambda s: np.cumsum((2 * (np.cumsum(s) - Y))[::-1])[::-1],
        bounds=[(None, None)] + [(0, None)] * 39,
        method="L-BFGS-B",
        options={"maxiter": 20000, "ftol": 1e-15, "gtol": 1e-10},
    )
    assert float(np.sum((fitted - Y) ** 2)) == pytest.approx(found.fun, abs=1e-4)
    assert made.rmse_after == pytest.approx(np.sqrt(np.mean((fitted - Y) ** 2))) and made.rmse_after < made.rmse_before
    assert made.rmse_before == pytest.approx(np.sqrt(np.mean((X - Y) ** 2)))


def test_isotonic_pools_equal_scores_and_is_constant_outside() -> None:
    scores, labels = [1.0] * 10 + [2.0] * 10 + [4.0] * 10, [1, 3] * 5 + [5] * 10 + [4] * 10
    made = Calibration.fit(scores, labels, scale=SCALE)
    assert [made(x) for x in (0.0, 1.0, 2.0, 3.0, 4.0, 9.0)] == pytest.approx([2, 2, 4.5, 4.5, 4.5, 4.5])
    assert made(1.5) == pytest.approx(3.25)  # between blocks: a straight line


def test_linear_is_the_least_squares_line_cut_at_the_scale() -> None:
    made = Calibration.fit(X, Y, scale=SCALE, method="linear")
    slope, intercept = np.polyfit(X, Y, 1)
    for x in (2.0, 3.1):
        assert made(x) == pytest.approx(slope * x + intercept)
    assert (made(-100.0), made(100.0)) == (1.0, 5.0)


@pytest.mark.parametrize("method", ["isotonic", "linear"])
def test_it_round_trips_beside_the_model(tmp_path, method: str) -> None:
    made = Calibration.fit(X, Y, scale=SCALE, method=method)
    assert made.save(tmp_path) == tmp_path / FILE
    assert Calibration.load(tmp_path, scale=SCALE, renormalise=False) == made


@pytest.mark.parametrize(
    ("scores", "labels", "method", "match"),
    [
        (X[: MIN_ROWS - 1], Y[: MIN_ROWS - 1], "isotonic", "at least 20 labelled rows, got 19"),
        (X, [3.0] * 40, "isotonic", "all labels are 3"),
        ([2.5] * 40, Y, "linear", "all scores are 2.5"),
        (-X, X, "linear", "do not rise"),
        (-X, X, "isotonic", "do not rise"),
        (X, [6.0, *Y[1:]], "isotonic", "label 0 is 6.0, not a number on the scale"),
        (X, Y[:-1], "isotonic", "40 scores, but 39 labels"),
        ([float("nan"), *X[1:]], Y, "isotonic", "finite"),
        (X, Y, "cubic", "isotonic, linear"),
    ],
)
def test_what_cannot_be_fitted(scores, labels, method: str, match: str) -> None:
    with pytest.raises(CalibrationError, match=match):
        Calibration.fit(list(scores), list(labels), scale=SCALE, method=method)


def test_a_calibration_of_another_judge_is_refused(tmp_path) -> None:
    with pytest.raises(CalibrationError, match="calibration fit"):
        Calibration.load(tmp_path, scale=SCALE, renormalise=False)
    path = Calibration.fit(X, Y, scale=SCALE).save(tmp_path)
    for scale, renormalise in ((ScoreScale.parse("0-9"), False), (SCALE, True)):
        with pytest.raises(CalibrationError, match="fit it again"):
            Calibration.load(tmp_path, scale=scale, renormalise=renormalise)
    content = json.loads(path.read_text())
    for change in ({"y": content["y"][::-1]}, {"x": [1, "a"], "y": [1, 2]}, {"extra": 1}, {"version": 2}):
        path.write_text(json.dumps({**content, **change}))
        with pytest.raises(CalibrationError, match=FILE):
            Calibration.load(tmp_path, scale=SCALE, renormalise=False)
