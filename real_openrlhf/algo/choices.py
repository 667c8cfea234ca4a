"""The allowed values of the algorithm's settings. No torch here: flags are parsed before it is imported."""

from __future__ import annotations

from typing import Literal

Aggregation = Literal["token_sum", "token_mean"]
AnswerReward = Literal["logprob", "prob"]
KLEstimator = Literal["k1", "k2", "k3"]
Ratio = Literal["on_policy", "clip", "none"]
