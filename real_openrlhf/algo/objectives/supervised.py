"""The supervised objectives: they learn given feedback and scores, as a start for REAL and as its baselines."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from real_openrlhf.algo.types import Coefficients, GroupScores


@dataclass(frozen=True, kw_only=True)
class SftObjective:
    """Cross-entropy: -log pi(c*, y* | x) of the given feedback c* and the score y* as it is written."""

    trains_score_token: ClassVar[bool] = True

    def __call__(self, scores: GroupScores) -> Coefficients:
        return _supervised(scores, cross_entropy=1.0, squared_error=0.0)


@dataclass(frozen=True, kw_only=True)
class RaftObjective:
    """Regression-aware fine-tuning (paper, Eq. 3; Lukasik et al., 2025): (E[score] - y*)^2 - lambda log pi(c*, y* | x).

    y* of the squared error is the human score itself; the score that is written, and learned by its log-prob, is a
    label of the scale.
    """

    lam: float = 1.0

    trains_score_token: ClassVar[bool] = True

    def __call__(self, scores: GroupScores) -> Coefficients:
        return _supervised(scores, cross_entropy=self.lam, squared_error=1.0)


def _supervised(scores: GroupScores, *, cross_entropy: float, squared_error: float) -> Coefficients:
    readable = scores.readable.double()
    weight = torch.full_like(readable, cross_entropy)
    nothing = torch.zeros_like(readable)
    return Coefficients(
        cot=weight,
        score=weight * readable,
        squared_error=squared_error * readable,
        likelihood=nothing,
        # Nothing is rewarded: what is given is right.
        rewards=nothing,
        advantages=nothing,
        zero_variance=False,
    )
