"""Statistics of a hand-made batch against values worked out by hand."""

from __future__ import annotations

import math

import pytest
import torch

from real_openrlhf.algo.score_rows import ScoreRows
from real_openrlhf.algo.score_scale import ScaleError, ScoreScale
from real_openrlhf.algo.types import (
    NO_ANCHOR,
    OFF_SCALE,
    TRUNCATED,
    Coefficients,
    Group,
    Rollout,
    ScoreReading,
    TrainGroup,
)
from real_openrlhf.controller.rollout_stats import group_accuracy, judgement_samples, rollout_metrics

SCALE = ScoreScale.parse("1-3")


def rollout(probs, *, position, label, length, reason=None, finish="stop"):
    """probs: of the labels "1".."3" at the score position; None: no score position."""
    if probs is None:
        rows, logprobs = ScoreRows.empty(3), torch.zeros(0, 3)
    else:
        rows, logprobs = ScoreRows.single(position, [11, 12, 13]), torch.tensor([[math.log(p) for p in probs]])
    return Rollout(
        token_ids=torch.arange(length),
        logprobs=torch.zeros(length),
        reading=ScoreReading(position=position, label_index=label, reason=reason, anchor_index=0),
        score_rows=rows,
        score_logprobs=logprobs,
        finish_reason=finish,
        text=f"text {length}",
    )


def group(label, rollouts, row=0):
    return Group(prompt_ids=torch.arange(100), label=label, rollouts=tuple(rollouts), row=row, weight_version=4)


def coefficients(rewards, advantages, *, zero_variance=False, floored=0):
    k = len(rewards)
    return Coefficients(
        cot=torch.tensor(advantages),
        score=torch.zeros(k),
        squared_error=torch.ones(k),
        likelihood=torch.ones(k),
        rewards=torch.tensor(rewards, dtype=torch.float64),
        advantages=torch.tensor(advantages, dtype=torch.float64),
        zero_variance=zero_variance,
        floored=floored,
    )


@pytest.fixture
def batch():
    # E = 0.1 + 2*0.2 + 3*0.7 = 2.6, mass 1;  E = 0.5 + 2*0.3 = 1.1 + 3*0.1 = 1.4, mass 0.9
    first = group(
        3.0,
        [
            rollout((0.1, 0.2, 0.7), position=4, label=2, length=6),
            rollout((0.5, 0.3, 0.1), position=6, label=0, length=8),
        ],
        row=7,
    )
    # one without an anchor, one whose score is off the scale: E = 0.4, mass 0.4
    second = group(
        1.5,
        [
            rollout(None, position=None, label=None, length=10, reason=NO_ANCHOR, finish="length"),
            rollout((0.4, 1e-30, 1e-30), position=2, label=None, length=4, reason=OFF_SCALE),
        ],
        row=9,
    )
    return [first, second]


@pytest.fixture
def train_groups(batch):
    return [
        TrainGroup(
            group=batch[0],
            target=SCALE.target(3.0),
            coefficients=coefficients([-1.0, -3.0], [1.0, -0.5], floored=1),
        )
    ]


def test_scores(batch, train_groups):
    m = rollout_metrics(batch, train_groups, SCALE)
    assert m["score/expected"] == pytest.approx((2.6 + 1.4 + 0.4) / 3)
    assert m["score/error"] == pytest.approx((-0.4 - 1.6 - 1.1) / 3)
    assert m["score/abs_error"] == pytest.approx((0.4 + 1.6 + 1.1) / 3)
    assert m["score/squared_error"] == pytest.approx((0.16 + 2.56 + 1.21) / 3)
    assert m["score/mass"] == pytest.approx((1.0 + 0.9 + 0.4) / 3)
    assert m["score/mass_min"] == pytest.approx(0.4)
    assert m["score/readable_share"] == 0.75
    assert (m["label/mean"], m["label/std"]) == pytest.approx((2.25, 0.75))
    # Sorted, 0.4, 1.4, 2.6 against the labels of the same rollouts, 1.5, 3, 3.
    assert m["score/label_distance"] == pytest.approx((1.1 + 1.6 + 0.4) / 3)


def test_renormalised(batch, train_groups):
    m = rollout_metrics(batch, train_groups, SCALE, renormalise=True)
    assert m["score/expected"] == pytest.approx((2.6 + 1.4 / 0.9 + 1.0) / 3)
    assert m["score/mass"] == pytest.approx((1.0 + 0.9 + 0.4) / 3)


def test_rewards_and_advantages_are_those_of_the_train_groups(batch, train_groups):
    m = rollout_metrics(batch, train_groups, SCALE)
    assert (m["reward/mean"], m["reward/std"], m["reward/min"], m["reward/max"]) == (-2.0, 1.0, -3.0, -1.0)
    assert (m["advantage/mean"], m["advantage/std"]) == (0.25, 0.75)
    assert (m["advantage/min"], m["advantage/max"], m["advantage/abs_mean"]) == (-0.5, 1.0, 0.75)
    assert m["advantage/zero_variance_share"] == 0.0
    assert m["reward/floored_count"] == 1.0

    flat = TrainGroup(
        group=batch[1],
        target=SCALE.target(1.5),
        coefficients=coefficients([-2.0, -2.0], [0.0, 0.0], zero_variance=True, floored=2),
    )
    m = rollout_metrics(batch, [*train_groups, flat], SCALE)
    assert m["advantage/zero_variance_share"] == 0.5
    assert m["reward/floored_count"] == 3.0


def test_invalid_by_reason(batch, train_groups):
    m = rollout_metrics(batch, train_groups, SCALE)
    # Off the scale still has a score position: not invalid, but named.
    assert (m["invalid/rate"], m["invalid/count"]) == (0.25, 1.0)
    assert (m[f"invalid/{NO_ANCHOR}"], m[f"invalid/{NO_ANCHOR}_count"]) == (0.25, 1.0)
    assert (m[f"invalid/{OFF_SCALE}"], m[f"invalid/{OFF_SCALE}_count"]) == (0.25, 1.0)
    assert (m[f"invalid/{TRUNCATED}"], m[f"invalid/{TRUNCATED}_count"]) == (0.0, 0.0)


def test_lengths(batch, train_groups):
    m = rollout_metrics(batch, train_groups, SCALE)
    # The chain of thought of the rollout without a score is all of it.
    assert (m["length/cot"], m["length/cot_min"], m["length/cot_max"]) == ((4 + 6 + 10 + 2) / 4, 2.0, 10.0)
    assert m["length/response"] == 7.0
    assert m["length/truncated_share"] == 0.25
    assert (m["rollouts/groups"], m["rollouts/count"], m["rollouts/tokens"]) == (2.0, 4.0, 28.0)


def test_accuracy(batch, train_groups):
    right = group(2.0, [rollout((0.1, 0.8, 0.1), position=1, label=1, length=2)])
    batch = [*batch, right]
    assert [group_accuracy(g, SCALE) for g in batch] == [0.5, 0.0, 1.0]
    m = rollout_metrics(batch, train_groups, SCALE)
    # Over rollouts: 2 of 5 are right, although the mean over groups is 1/2.
    assert m["accuracy/mean"] == pytest.approx(0.4)
    for name in ("none", "some", "all"):
        assert m[f"accuracy/groups_{name}"] == pytest.approx(1 / 3)


def test_undefined_is_none_not_zero():
    nothing = group(2.0, [rollout(None, position=None, label=None, length=3, reason=NO_ANCHOR)] * 2)
    m = rollout_metrics([nothing], [], SCALE)
    for name in ("score/expected", "score/mass_min", "reward/mean", "advantage/std", "advantage/zero_variance_share"):
        assert m[name] is None
    assert m["invalid/rate"] == 1.0
    assert all(value is None or math.isfinite(value) for value in m.values())


def test_refused(batch):
    with pytest.raises(ValueError, match="at least one group"):
        rollout_metrics([], [], SCALE)
    with pytest.raises(ScaleError, match="off the scale"):
        rollout_metrics([group(9.0, batch[0].rollouts)], [], SCALE)


def test_samples(batch, train_groups):
    samples = judgement_samples(batch, train_groups, 3, SCALE, decode=lambda ids: f"{ids[0]}..{ids[-1]}")
    # One of every group before the second of any.
    assert [(s["row"], s["rollout"]) for s in samples] == [(7, 0), (9, 0), (7, 1)]
    first, invalid, _ = samples
    assert first["prompt_tail"] == "36..99"
    assert (first["label"], first["decoded"], first["reward"], first["advantage"]) == (3.0, 3.0, -1.0, 1.0)
    assert first["expected"] == pytest.approx(2.6)
    assert first["distribution"] == pytest.approx({"1": 0.1, "2": 0.2, "3": 0.7})
    assert (first["text"], first["reason"], first["weight_version"]) == ("text 6", None, 4)
    assert invalid["reason"] == NO_ANCHOR
    for name in ("expected", "decoded", "distribution", "mass", "reward", "advantage"):
        assert invalid[name] is None


def test_samples_are_as_many_as_there_are(batch, train_groups):
    assert len(judgement_samples(batch, train_groups, 100, SCALE)) == 4
    assert judgement_samples(batch, train_groups, 0, SCALE) == []
    assert judgement_samples([], [], 3, SCALE) == []
    assert judgement_samples(batch, train_groups, 1, SCALE)[0]["prompt_tail"] is None
