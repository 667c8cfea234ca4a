"""REAL: regression-aware policy gradient (paper, Eq. 8 and Algorithm 2)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from real_openrlhf.algo.advantages import rloo_advantages
from real_openrlhf.algo.choices import AnswerReward
from real_openrlhf.algo.rewards import real_rewards
from real_openrlhf.algo.types import Coefficients, GroupScores


@dataclass(frozen=True, kw_only=True)
class RealObjective:
    """Term 1: the advantage on the chain of thought. Term 2: beta on the gradient of the reward.

    lam                 lambda, the weight of the answer's likelihood
    beta                the weight of Term 2; 1 is the exact gradient but for standardise and clip
    answer_reward       "logprob" (paper): one joint reward r = -(E - y)^2 + lambda log pi(y);
                        "prob" (authors' scripts): pi(y), standardised and clipped on its own,
                        then added with weight lambda
    standardise, clip   of the advantages
    tolerance           rewards closer than this count as equal
    invalid_penalty     subtracted from the reward of an unreadable rollout
    renormalise         the distribution given that the score is on the scale
    """

    lam: float = 1.0
    beta: float = 0.01
    answer_reward: AnswerReward = "logprob"
    standardise: bool = True
    clip: float | None = 1.0
    tolerance: float = 1e-6
    invalid_penalty: float = 0.0
    renormalise: bool = False

    trains_score_token: ClassVar[bool] = False

    def __call__(self, scores: GroupScores) -> Coefficients:
        parts = real_rewards(
            scores, answer=self.answer_reward, invalid_penalty=self.invalid_penalty, renormalise=self.renormalise
        )
        rewards = parts.regression + self.lam * parts.answer

        def advantages_of(r: torch.Tensor) -> torch.Tensor:
            return rloo_advantages(r, standardise=self.standardise, clip=self.clip, tolerance=self.tolerance)

        if self.answer_reward == "logprob":
            advantages = advantages_of(rewards)
        else:
            advantages = advantages_of(parts.regression) + self.lam * advantages_of(parts.answer)
        readable = scores.readable.double()
        return Coefficients(
            cot=advantages,
            score=torch.zeros_like(readable),
            squared_error=self.beta * readable,
            likelihood=self.beta * self.lam * readable,
            rewards=rewards,
            advantages=advantages,
            zero_variance=bool((advantages == 0).all()),
            floored=int((rewards[scores.readable] < self._floor(scores)).sum()),
        )

    def _floor(self, scores: GroupScores) -> float:
        """The reward of an unreadable rollout with this target."""
        nothing = GroupScores(
            values=scores.values,
            label_logprobs=torch.zeros_like(scores.label_logprobs[:1]),
            readable=torch.zeros(1, dtype=torch.bool),
            sampled=torch.full((1,), -1),
            target=scores.target,
        )
        parts = real_rewards(
            nothing, answer=self.answer_reward, invalid_penalty=self.invalid_penalty, renormalise=self.renormalise
        )
        return float(parts.regression + self.lam * parts.answer)
