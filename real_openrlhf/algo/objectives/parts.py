"""What several objectives are made of."""

from __future__ import annotations

import torch
from torch import Tensor

from real_openrlhf.algo.advantages import rloo_advantages
from real_openrlhf.algo.types import Coefficients, GroupScores


def written_scores(scores: GroupScores) -> Tensor:
    """[K] float64: the value of the label that each rollout wrote; NaN where it wrote none."""
    values = scores.values.double()
    written = scores.sampled.clamp(min=0)
    return torch.where(scores.sampled >= 0, values[written], torch.nan)


def policy_gradient(
    rewards: Tensor, *, score_too: bool, standardise: bool, clip: float | None, tolerance: float
) -> Coefficients:
    """Leave-one-out advantages of these rewards [K] on the feedback, and with score_too on the score's tokens."""
    advantages = rloo_advantages(rewards, standardise=standardise, clip=clip, tolerance=tolerance)
    nothing = torch.zeros_like(advantages)
    return Coefficients(
        cot=advantages,
        score=advantages if score_too else nothing,
        squared_error=nothing,
        likelihood=nothing,
        rewards=rewards,
        advantages=advantages,
        zero_variance=bool((advantages == 0).all()),
    )
