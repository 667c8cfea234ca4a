"""Fractional labels as a warm-up writes them."""

from __future__ import annotations

import random

import pytest

from real_openrlhf.algo.score_scale import ScoreScale
from real_openrlhf.data.rounding import written_label

SCALE = ScoreScale.parse("0-5")


def test_nearest() -> None:
    scores = (0.0, 0.49, 0.5, 3.8, 4.5, 5.0)
    assert [written_label(s, SCALE, "nearest", random.Random(0)) for s in scores] == list("001455")


@pytest.mark.parametrize("score", [0.0, 2.25, 3.8, 4.909, 5.0])
def test_stochastic_keeps_the_mean(score: float) -> None:
    rng = random.Random(1)
    values = [int(written_label(score, SCALE, "stochastic", rng)) for _ in range(20_000)]
    assert set(values) <= {int(score), min(5, int(score) + 1)}
    # Four standard errors of a Bernoulli mean are at most 4 * 0.5 / sqrt(20000) = 0.0142.
    assert abs(sum(values) / len(values) - score) < 0.0142


def test_labels_are_the_scales_own() -> None:
    assert written_label(2.9, ScoreScale.parse("1=Bad,2=Fair,3=Good"), "nearest", random.Random(0)) == "Good"
