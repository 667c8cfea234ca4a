"""Standard RL: accuracy as the reward (paper, appendix A, after Kool et al. 2019)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from real_openrlhf.algo.objectives.parts import policy_gradient
from real_openrlhf.algo.types import Coefficients, GroupScores


@dataclass(frozen=True, kw_only=True)
class StandardRlObjective:
    """r = 1 where the written score is the one nearest to y (either, half way between two), else 0.

    The gradient goes through feedback and score alike. invalid_penalty: taken off the reward of an unreadable rollout.
    """

    standardise: bool = True
    clip: float | None = 1.0
    tolerance: float = 1e-6
    invalid_penalty: float = 0.0

    trains_score_token: ClassVar[bool] = True

    def __call__(self, scores: GroupScores) -> Coefficients:
        right = torch.isin(scores.sampled, torch.tensor(scores.target.nearest))
        rewards = right.double() - self.invalid_penalty * (~scores.readable).double()
        return policy_gradient(
            rewards, score_too=True, standardise=self.standardise, clip=self.clip, tolerance=self.tolerance
        )
