from __future__ import annotations

import math

import pytest
import torch

from real_openrlhf.algo.rewards import real_rewards
from real_openrlhf.algo.score_scale import ScoreScale
from real_openrlhf.algo.types import GroupScores


def scores(probs: list[list[float]], label: float, readable: list[bool], scale: str = "1-3") -> GroupScores:
    parsed = ScoreScale.parse(scale)
    return GroupScores(
        values=parsed.tensor(),
        label_logprobs=torch.tensor(probs, dtype=torch.float64).log(),
        readable=torch.tensor(readable),
        sampled=torch.full((len(probs),), -1),
        target=parsed.target(label),
    )


def test_joint_reward_by_hand() -> None:
    group = scores([[0.2, 0.3, 0.4], [0.0001, 0.0001, 0.9], [1, 1, 1]], 2.5, [True, True, False])
    got = real_rewards(group, answer="logprob", invalid_penalty=0.0, renormalise=False)
    assert got.regression.dtype == got.answer.dtype == torch.float64
    assert got.regression.tolist() == pytest.approx([-((2.0 - 2.5) ** 2), -((2.7003 - 2.5) ** 2), -(2.5**2)])
    assert got.answer.tolist() == pytest.approx(
        [0.5 * math.log(0.3) + 0.5 * math.log(0.4), 0.5 * math.log(0.0001) + 0.5 * math.log(0.9), math.log(1e-6)]
    )


def test_probability_as_answer_reward() -> None:
    group = scores([[0.2, 0.3, 0.4], [1, 1, 1]], 2, [True, False])
    got = real_rewards(group, answer="prob", invalid_penalty=0.5, renormalise=False)
    assert got.answer.tolist() == pytest.approx([0.3, 1e-6])
    assert got.regression.tolist() == pytest.approx([0.0, -4.5])


def test_renormalised() -> None:
    group = scores([[0.1, 0.2, 0.5]], 2, [True])
    got = real_rewards(group, answer="prob", invalid_penalty=0.0, renormalise=True)
    assert float(got.regression) == pytest.approx(-(0.5**2))
    assert float(got.answer) == pytest.approx(0.25)


@pytest.mark.parametrize(
    ("scale", "label", "worst"), [("1-5", 4, 16), ("1-5", 1, 16), ("0-9", 2, 49), ("-4,-2", -3, 9), ("-4,4", 1, 25)]
)
@pytest.mark.parametrize("penalty", [0.0, 2.0])
def test_floor(scale: str, label: float, worst: float, penalty: float) -> None:
    n = len(ScoreScale.parse(scale))
    group = scores([[0.0] * n], label, [False], scale)
    got = real_rewards(group, answer="logprob", invalid_penalty=penalty, renormalise=False)
    assert float(got.regression) == pytest.approx(-worst - penalty)
    assert float(got.answer) == pytest.approx(math.log(1e-6))
    assert worst == group.target.worst_squared_error(ScoreScale.parse(scale).values)
