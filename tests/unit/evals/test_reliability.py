"""Accuracy, confidence and ECE by hand."""

from __future__ import annotations

import numpy as np
import pytest

from real_openrlhf.algo.score_scale import ScaleError, ScoreScale
from real_openrlhf.evals import reliability
from real_openrlhf.evals.reliability import confidence, decide, ece, is_right, reliability_bins, share

SCALE = ScoreScale.parse("1-5")


@pytest.mark.parametrize(
    ("score", "label"), [(1.0, 1), (1.49, 1), (1.5, 1), (1.51, 2), (4.9, 5), (0.2, 1), (5.3, 5), (3.5, 3)]
)
def test_a_score_decides_for_the_nearest_label(score: float, label: int) -> None:
    assert SCALE.values[decide(score, SCALE)] == label


def test_decisions_on_an_uneven_scale() -> None:
    scale = ScoreScale.parse("0=bad,1=poor,5=good")
    assert [decide(s, scale) for s in (-3.0, 0.6, 2.9, 3.1)] == [0, 1, 1, 2]


@pytest.mark.parametrize(
    ("score", "label", "right"),
    [
        (3.2, 3.0, True),
        (3.6, 3.0, False),
        (3.2, 10 / 3, True),
        (3.6, 10 / 3, False),
        # y half way: either neighbour is right, no other label.
        (3.2, 3.5, True),
        (4.4, 3.5, True),
        (2.4, 3.5, False),
    ],
)
def test_right_is_the_label_nearest_to_the_human_score(score: float, label: float, right: bool) -> None:
    assert is_right(score, label, SCALE) is right


def test_labels_off_the_scale_are_errors() -> None:
    with pytest.raises(ScaleError, match="off the scale"):
        is_right(3.0, 6.0, SCALE)


def test_confidence_is_the_probability_of_the_decision() -> None:
    probs = [0.1, 0.1, 0.2, 0.3, 0.1]  # mass 0.8
    assert confidence(3.6, probs, SCALE) == 0.3
    assert confidence(3.6, probs, SCALE, renormalise=True) == pytest.approx(0.3 / 0.8)
    assert confidence(3.6, [0.0] * 5, SCALE, renormalise=True) == 0.0


def test_ece_by_hand() -> None:
    # (0.1, 0.2]: 0.15 and 0.2, one right of two; (0.8, 0.9]: 0.9, right; (0, 0.1]: 0, wrong.
    confidences, right = np.array([0.15, 0.2, 0.9, 0.0]), np.array([1.0, 0.0, 1.0, 0.0])
    want = 2 / 4 * abs(0.175 - 0.5) + 1 / 4 * abs(0.9 - 1) + 1 / 4 * 0
    assert ece(confidences, right) == pytest.approx(want)
    bins = reliability_bins(confidences, right)
    assert [(b.low, b.high, b.n) for b in bins] == [(0.0, 0.1, 1), (0.1, 0.2, 2), (0.8, 0.9, 1)]
    assert bins[1].confidence == pytest.approx(0.175) and bins[1].accuracy == 0.5
    assert ece(np.empty(0), np.empty(0)) is None and share(np.empty(0), np.empty(0)) is None


def test_a_calibrated_judge_has_a_small_ece_and_an_overconfident_one_a_large() -> None:
    rng = np.random.default_rng(0)
    confidences = rng.uniform(0.2, 1, 20_000)
    right = (rng.uniform(size=20_000) < confidences).astype(float)
    assert ece(confidences, right) < 0.02
    sure = ece(np.full(20_000, 1.0 + 1e-15), right)
    assert sure == pytest.approx(1 - right.mean())


@pytest.mark.parametrize("name", ["ece", "share"])
def test_weighted_forms_equal_the_plain_ones_on_every_resample(name: str) -> None:
    rng = np.random.default_rng(1)
    confidences, right = rng.uniform(size=40), rng.integers(0, 2, 40).astype(float)
    counts = rng.multinomial(40, np.full(40, 1 / 40), size=30)
    fast = getattr(reliability, f"weighted_{name}")(confidences, right, counts)
    plain = [getattr(reliability, name)(np.repeat(confidences, c), np.repeat(right, c)) for c in counts]
    np.testing.assert_allclose(fast, plain, atol=1e-12)
