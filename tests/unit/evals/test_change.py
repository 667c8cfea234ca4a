"""A run's held-out metrics against its first evaluation."""

from __future__ import annotations

import json

import numpy as np
import pytest
from scipy import stats

from real_openrlhf.evals.change import Judged, changes, from_json, to_json
from real_openrlhf.evals.intervals import paired_bootstrap

RNG = np.random.default_rng(3)
N = 400
LABELS = RNG.integers(1, 6, N).astype(float)
BEFORE = LABELS + RNG.normal(0, 2.0, N)
AFTER = LABELS + RNG.normal(0, 1.0, N)


def judged(expected: np.ndarray, labels: np.ndarray = LABELS) -> list[Judged]:
    rewards = -((expected - labels) ** 2)
    return [
        Judged(i, str(i), float(y), float(e), float(r)) for i, (e, y, r) in enumerate(zip(expected, labels, rewards))
    ]


def test_estimates_and_intervals() -> None:
    found = changes({"a": judged(BEFORE)}, {"a": judged(AFTER)})
    gain = (BEFORE - LABELS) ** 2 - (AFTER - LABELS) ** 2
    assert found["reward"].difference == pytest.approx(gain.mean())
    # The bootstrap of a mean of paired differences, by scipy.
    interval = stats.bootstrap((gain,), np.mean, method="percentile", rng=1, n_resamples=4000).confidence_interval
    assert found["reward"].low == pytest.approx(interval.low, abs=0.05)
    assert found["reward"].high == pytest.approx(interval.high, abs=0.05)
    pearson = stats.pearsonr(AFTER, LABELS)[0] - stats.pearsonr(BEFORE, LABELS)[0]
    assert found["expected/pearson"].difference == pytest.approx(pearson)
    other = paired_bootstrap("pearson", list(BEFORE), list(AFTER), list(LABELS), seed=9)
    assert other.low is not None and found["expected/pearson"].low == pytest.approx(other.low, abs=0.01)
    back = changes({"a": judged(AFTER)}, {"a": judged(BEFORE)})
    assert back["reward"].high == pytest.approx(-found["reward"].low)


def test_prompts_of_one_group_are_drawn_together() -> None:
    def grouped(expected: np.ndarray) -> list[Judged]:
        rows = judged(np.repeat(expected[:20], 20), np.repeat(LABELS[:20], 20))
        return [Judged(j.row, str(j.row // 20), j.label, j.expected, j.reward) for j in rows]

    tied = changes({"a": grouped(BEFORE)}, {"a": grouped(AFTER)})["reward"]
    loose = changes({"a": judged(BEFORE)}, {"a": judged(AFTER)})["reward"]
    assert tied.high - tied.low > 2 * (loose.high - loose.low)


def test_several_benchmarks_are_averaged() -> None:
    labels = LABELS[:50]
    start = {"a": judged(BEFORE), "b": judged(BEFORE[:50], labels)}
    now = {"a": judged(AFTER), "b": judged(BEFORE[:50], labels)}
    one = changes({"a": start["a"]}, {"a": now["a"]})
    both = changes(start, now)
    for name in ("reward", "expected/pearson"):
        assert both[name].difference == pytest.approx(one[name].difference / 2)


def test_what_is_undefined_is_left_out() -> None:
    constant = judged(np.full(N, 3.0))
    assert set(changes({"a": constant}, {"a": constant})) == {"reward"}
    unread = [Judged(j.row, j.group, j.label, None, -9.0) for j in constant]
    assert set(changes({"a": unread}, {"a": unread})) == {"reward"}


def test_other_prompts_cannot_be_compared() -> None:
    with pytest.raises(ValueError, match="benchmark a: the two evaluations judged different prompts"):
        changes({"a": judged(BEFORE)}, {"a": judged(AFTER)[:-1]})
    with pytest.raises(ValueError, match="benchmark b"):
        changes({"a": judged(BEFORE)}, {"a": judged(AFTER), "b": judged(AFTER)})


def test_json_round_trip() -> None:
    rows = {"a": [*judged(BEFORE)[:3], Judged(3, "g", 2.0, None, -9.5)]}
    assert from_json(json.loads(json.dumps(to_json(rows)))) == rows
