"""REAL without Term 1: the gradient of the reward at the score, none for exploring feedback (paper, the ablation)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from real_openrlhf.algo.rewards import real_rewards
from real_openrlhf.algo.types import Coefficients, GroupScores


@dataclass(frozen=True, kw_only=True)
class Term2OnlyObjective:
    """The squared error of E[score] less lambda times the label's log-likelihood, behind sampled feedback."""

    lam: float = 1.0
    invalid_penalty: float = 0.0
    renormalise: bool = False

    trains_score_token: ClassVar[bool] = False

    def __call__(self, scores: GroupScores) -> Coefficients:
        parts = real_rewards(
            scores, answer="logprob", invalid_penalty=self.invalid_penalty, renormalise=self.renormalise
        )
        readable = scores.readable.double()
        nothing = torch.zeros_like(readable)
        return Coefficients(
            cot=nothing,
            score=nothing,
            squared_error=readable,
            likelihood=self.lam * readable,
            rewards=parts.regression + self.lam * parts.answer,
            advantages=nothing,
            # It learns without advantages: a group is dead only where nothing can be read.
            zero_variance=not bool(scores.readable.any()),
        )
