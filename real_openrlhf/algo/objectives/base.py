"""What an objective is: from a group's score distributions to detached coefficients.

A new objective is one small file beside this one, registered in `objectives/__init__.py`.
"""

from __future__ import annotations

from typing import Protocol

from real_openrlhf.algo.types import Coefficients, GroupScores


class Objective(Protocol):
    """name: for logs and the model card. trains_score_token: the sampled score is an action too."""

    @property
    def name(self) -> str: ...

    @property
    def trains_score_token(self) -> bool: ...

    def __call__(self, scores: GroupScores) -> Coefficients: ...
