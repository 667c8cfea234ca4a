"""What an objective is: from a group's score distributions to detached coefficients.

A new objective is one frozen dataclass in a file beside this one, and a line in `objectives.OBJECTIVES`.
"""

from __future__ import annotations

from typing import Protocol

from real_openrlhf.algo.types import Coefficients, GroupScores


class Objective(Protocol):
    """trains_score_token: the sampled score is an action too."""

    @property
    def trains_score_token(self) -> bool: ...

    def __call__(self, scores: GroupScores) -> Coefficients: ...
