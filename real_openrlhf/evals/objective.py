"""REAL's objective on held-out prompts: the mean of its reward, whatever a run maximises."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from real_openrlhf.algo.choices import AnswerReward
from real_openrlhf.algo.rewards import real_rewards
from real_openrlhf.algo.score_scale import ScoreScale
from real_openrlhf.algo.types import GroupScores
from real_openrlhf.evals.predictions import Prediction

# Log-probs were float32, so probabilities below its smallest normal number may have become 0.
SMALLEST = torch.finfo(torch.float32).tiny


@dataclass(frozen=True, kw_only=True)
class RewardSettings:
    """The flags of a run that its reward depends on; see `RealObjective`."""

    lam: float
    answer_reward: AnswerReward
    invalid_penalty: float
    renormalise: bool


def mean_reward(predictions: Sequence[Prediction], scale: ScoreScale, settings: RewardSettings) -> float | None:
    """Mean of r = -(E - y)^2 + lambda log p(y) (paper, Eq. 5): over each prompt's generations, then over prompts.

    A generation without a score counts with the reward that it would get in training. None without predictions.
    """
    rewards = [prompt_reward(prediction, scale, settings) for prediction in predictions]
    return sum(rewards) / len(rewards) if rewards else None


def prompt_reward(prediction: Prediction, scale: ScoreScale, settings: RewardSettings) -> float:
    """Mean reward of the generations of one prompt."""
    distributions = [
        None if s.distribution is None or None in s.distribution else s.distribution for s in prediction.samples
    ]
    unread = (1.0,) * len(scale)  # any value: `readable` is False there
    probs = torch.tensor([d or unread for d in distributions], dtype=torch.float64)
    parts = real_rewards(
        GroupScores(
            values=scale.tensor(),
            label_logprobs=probs.clamp(min=SMALLEST).log(),
            readable=torch.tensor([d is not None for d in distributions]),
            sampled=torch.full((len(distributions),), -1),
            target=scale.target(prediction.label),
        ),
        answer=settings.answer_reward,
        invalid_penalty=settings.invalid_penalty,
        renormalise=settings.renormalise,
    )
    return float((parts.regression + settings.lam * parts.answer).mean())
