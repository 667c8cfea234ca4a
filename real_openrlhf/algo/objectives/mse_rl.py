"""Standard RL with a regression reward: the squared error of the written score (paper, the ablation of Term 2)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from real_openrlhf.algo.objectives.parts import policy_gradient, written_scores
from real_openrlhf.algo.types import Coefficients, GroupScores


@dataclass(frozen=True, kw_only=True)
class MseRlObjective:
    """r = -(v - y)^2 of the written score v, on feedback and score alike.

    A rollout that wrote no score of the scale has the worst error there is; invalid_penalty comes on top where it has
    no readable score at all.
    """

    standardise: bool = True
    clip: float | None = 1.0
    tolerance: float = 1e-6
    invalid_penalty: float = 0.0

    trains_score_token: ClassVar[bool] = True

    def __call__(self, scores: GroupScores) -> Coefficients:
        rewards = -((written_scores(scores) - scores.target.value) ** 2)
        rewards = torch.where(scores.sampled >= 0, rewards, -scores.target.worst_squared_error(scores.values.tolist()))
        rewards = rewards - self.invalid_penalty * (~scores.readable).double()
        return policy_gradient(
            rewards, score_too=True, standardise=self.standardise, clip=self.clip, tolerance=self.tolerance
        )
