from __future__ import annotations

import math
import statistics

import pytest
import torch

from real_openrlhf.algo.objectives.real import RealObjective
from real_openrlhf.algo.score_scale import ScoreScale
from real_openrlhf.algo.types import GroupScores

SCALE = ScoreScale.parse("1-3")
PROBS = [[0.2, 0.3, 0.4], [0.7, 0.1, 0.1], [0.1, 0.1, 0.7], [1.0, 1.0, 1.0]]
READABLE = [True, True, True, False]


def scores(probs: list[list[float]], readable: list[bool], label: float) -> GroupScores:
    return GroupScores(
        values=SCALE.tensor(),
        label_logprobs=torch.tensor(probs).log(),
        readable=torch.tensor(readable),
        sampled=torch.full((len(probs),), -1),
        target=SCALE.target(label),
    )


def standardised(rewards: list[float]) -> list[float]:
    k = len(rewards)
    raw = [r - (sum(rewards) - r) / (k - 1) for r in rewards]
    std = statistics.pstdev(raw)
    return [max(-1.0, min(1.0, a / (std + 1e-8))) for a in raw]


# label 2.5: E = 2.0, 1.2, 2.4; worst of 0, 1, 3 is 0
REGRESSION = [-(0.5**2), -(1.3**2), -(0.1**2), -(2.5**2)]
LOGPROB = [0.5 * math.log(a * b) for a, b in [(0.3, 0.4), (0.1, 0.1), (0.1, 0.7)]] + [math.log(1e-6)]
PROB = [math.exp(x) for x in LOGPROB]


@pytest.mark.parametrize("lam", [1.0, 0.3])
def test_paper(lam: float) -> None:
    got = RealObjective(lam=lam, beta=0.01)(scores(PROBS, READABLE, 2.5))
    rewards = [a + lam * b for a, b in zip(REGRESSION, LOGPROB)]
    assert got.rewards.tolist() == pytest.approx(rewards, abs=1e-6)
    assert got.advantages.tolist() == pytest.approx(standardised(rewards), abs=1e-6)
    assert got.cot.tolist() == got.advantages.tolist()
    assert got.score.tolist() == [0] * 4
    assert got.squared_error.tolist() == pytest.approx([0.01] * 3 + [0])
    assert got.likelihood.tolist() == pytest.approx([0.01 * lam] * 3 + [0])
    assert not got.zero_variance and got.floored == 0


@pytest.mark.parametrize("lam", [1.0, 0.3])
def test_reference_standardises_each_part_on_its_own(lam: float) -> None:
    got = RealObjective(lam=lam, beta=0.0, answer_reward="prob")(scores(PROBS, READABLE, 2.5))
    parts = zip(standardised(REGRESSION), standardised(PROB))
    assert got.advantages.tolist() == pytest.approx([a + lam * b for a, b in parts], abs=1e-6)
    assert got.rewards.tolist() == pytest.approx([a + lam * b for a, b in zip(REGRESSION, PROB)], abs=1e-6)
    assert got.squared_error.tolist() == got.likelihood.tolist() == [0] * 4
    joint = standardised([a + lam * b for a, b in zip(REGRESSION, PROB)])
    assert got.advantages.tolist() != pytest.approx(joint, abs=0.05)


def test_invalid_penalty_lowers_only_the_unreadable() -> None:
    plain = RealObjective()(scores(PROBS, READABLE, 2.5)).rewards
    lower = RealObjective(invalid_penalty=3.0)(scores(PROBS, READABLE, 2.5)).rewards
    assert (plain - lower).tolist() == pytest.approx([0, 0, 0, 3])


def test_readable_below_the_floor_are_counted() -> None:
    # log-prob 1e-9 lies below the 1e-6 of an unreadable rollout.
    probs = [[1.0 - 1e-9, 1e-9, 1e-9], [0.1, 0.8, 0.1], [1.0, 1.0, 1.0]]
    group = scores(probs, [True, True, False], 3.0)
    got = RealObjective(lam=10.0)(group)
    assert got.floored == 1
    assert float(got.rewards[0]) < float(got.rewards[2])
    assert RealObjective(lam=10.0, invalid_penalty=1000.0)(group).floored == 0
    assert RealObjective(lam=10.0, answer_reward="prob")(group).floored == 0


def test_zero_variance() -> None:
    got = RealObjective()(scores([[0.2, 0.3, 0.4]] * 4, [True] * 4, 2.0))
    assert got.zero_variance and got.cot.tolist() == [0] * 4
    assert got.squared_error.tolist() == pytest.approx([0.01] * 4)  # Term 2 needs no variance
    assert not RealObjective()(scores(PROBS, READABLE, 2.0)).zero_variance


def test_all_invalid() -> None:
    got = RealObjective(beta=1.0)(scores([[1.0] * 3] * 3, [False] * 3, 1.0))
    assert got.zero_variance and got.floored == 0
    for name in ("cot", "score", "squared_error", "likelihood", "advantages"):
        assert getattr(got, name).tolist() == [0] * 3


def test_garbage_in_unreadable_rows_is_not_looked_at() -> None:
    clean = RealObjective()(scores(PROBS, READABLE, 2.5))
    dirty = RealObjective()(scores([*PROBS[:3], [float("nan")] * 3], READABLE, 2.5))
    assert dirty.cot.tolist() == clean.cot.tolist()


def test_options_reach_the_advantages() -> None:
    group = scores(PROBS, READABLE, 2.5)
    rewards = [a + b for a, b in zip(REGRESSION, LOGPROB)]
    raw = [r - (sum(rewards) - r) / 3 for r in rewards]
    assert RealObjective(standardise=False, clip=None)(group).cot.tolist() == pytest.approx(raw, abs=1e-6)
    assert RealObjective(clip=0.5)(group).cot.abs().max() == 0.5
    assert RealObjective(tolerance=1e3)(group).zero_variance
    renormalised = RealObjective(renormalise=True)(group).rewards[0]
    p = [0.2 / 0.9, 0.3 / 0.9, 0.4 / 0.9]
    mean = p[0] + 2 * p[1] + 3 * p[2]
    assert float(renormalised) == pytest.approx(-((mean - 2.5) ** 2) + 0.5 * math.log(p[1] * p[2]), abs=1e-6)


def test_the_score_token_is_no_action() -> None:
    assert RealObjective.trains_score_token is False
