"""The REAL reward of each rollout, and the constant that an unreadable one gets."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from real_openrlhf.algo.choices import AnswerReward
from real_openrlhf.algo.score_stats import score_stats
from real_openrlhf.algo.types import GroupScores, Targets

# The likelihood of the label that an unreadable rollout's reward assumes.
FLOOR_PROBABILITY = 1e-6


@dataclass(frozen=True, kw_only=True)
class RealRewards:
    """The two parts of the reward, [K] float64 each.

    regression  -(E[score] - y)^2
    answer      log pi(y) or pi(y), not yet multiplied by lambda

    Unreadable rollouts have constants here, see `real_rewards`.
    """

    regression: Tensor
    answer: Tensor


def real_rewards(
    scores: GroupScores, *, answer: AnswerReward, invalid_penalty: float, renormalise: bool
) -> RealRewards:
    """The two parts of the paper's Eq. 5, under the weights that sampled the rollouts.

    An unreadable rollout gets -max over v in the scale and 0 of (v - y)^2 (minus the penalty)
    and the answer reward of probability 1e-6.
    """
    target = scores.target
    stats = score_stats(
        scores.label_logprobs.double(),
        scores.values.double(),
        Targets.repeat(target, len(scores.label_logprobs)),
        renormalise=renormalise,
    )
    regression = -((stats.expected - target.value) ** 2)
    worst = target.worst_squared_error(scores.values.tolist())
    log_floor = math.log(FLOOR_PROBABILITY)
    if answer == "logprob":
        answer_reward, answer_floor = stats.likelihood, log_floor
    else:
        answer_reward, answer_floor = stats.likelihood.exp(), FLOOR_PROBABILITY
    return RealRewards(
        regression=torch.where(scores.readable, regression, -worst - invalid_penalty),
        answer=torch.where(scores.readable, answer_reward, answer_floor),
    )
