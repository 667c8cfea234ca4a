"""REAL without Term 2: the regression-aware reward on the feedback alone (paper, the ablation of Term 2)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from real_openrlhf.algo.choices import AnswerReward
from real_openrlhf.algo.objectives.real import RealObjective
from real_openrlhf.algo.types import Coefficients, GroupScores


@dataclass(frozen=True, kw_only=True)
class Term1OnlyObjective:
    """As `RealObjective` with beta = 0."""

    lam: float = 1.0
    answer_reward: AnswerReward = "logprob"
    standardise: bool = True
    clip: float | None = 1.0
    tolerance: float = 1e-6
    invalid_penalty: float = 0.0
    renormalise: bool = False

    trains_score_token: ClassVar[bool] = False

    def __call__(self, scores: GroupScores) -> Coefficients:
        return RealObjective(beta=0.0, **vars(self))(scores)
