"""What several objectives are made of."""

from __future__ import annotations

import torch
from torch import Tensor

from real_openrlhf.algo.advantages import rloo_advantages
from real_openrlhf.algo.types import Coefficients, GroupScores

# Scores this close to equally far from the label are; on a scale like 0.1, 0.2 the middle is not exact in floats.
TIE = 1e-9


def written_scores(scores: GroupScores) -> Tensor:
    """[K] float64: the value of the label that each rollout wrote; NaN where it wrote none."""
    values = scores.values.double()
    written = scores.sampled.clamp(min=0)
    return torch.where(scores.sampled >= 0, values[written], torch.nan)


def worst_error(scores: GroupScores) -> float:
    """max over v in the scale and 0 of (v - y)^2: what a rollout without a score is charged with."""
    y = scores.target.value
    return max((v - y) ** 2 for v in (0.0, float(scores.values[0]), float(scores.values[-1])))


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
