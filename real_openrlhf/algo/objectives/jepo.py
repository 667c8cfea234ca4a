"""JEPO: a bound on the label's marginal log-likelihood (Tang et al., 2025), with its gradient."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch

from real_openrlhf.algo.advantages import scaled
from real_openrlhf.algo.rewards import FLOOR_PROBABILITY, real_rewards
from real_openrlhf.algo.types import Coefficients, GroupScores


@dataclass(frozen=True, kw_only=True)
class JepoObjective:
    """The multi-sample Jensen bound of a prompt: L = log (1/K) sum_i pi(y | x, c_i) <= log pi(y | x) in the mean.

    Its gradient is sum_i [(L - L_without_i) grad log pi(c_i) + w_i grad log pi(y | x, c_i)], w_i the share of
    pi(y | x, c_i) in the sum; L_without_i, the bound of the other K - 1, is a baseline that leaves the mean as it is.
    K times these weights, since the loss is a mean over rollouts and the bound belongs to their prompt. An unreadable
    rollout gives y the probability 1e-6, which does not depend on the parameters.

    standardise, clip   of the advantages, as elsewhere; without both the gradient is exact
    tolerance           a group whose likelihoods differ by less has no advantages
    """

    standardise: bool = True
    clip: float | None = 1.0
    tolerance: float = 1e-6
    renormalise: bool = False

    trains_score_token: ClassVar[bool] = False

    def __call__(self, scores: GroupScores) -> Coefficients:
        logs = real_rewards(scores, answer="logprob", invalid_penalty=0.0, renormalise=self.renormalise).answer
        k = len(logs)
        if k < 2:
            raise ValueError(f"the bound's baseline needs at least 2 rollouts per prompt, got {k}")
        bound = logs.logsumexp(0) - math.log(k)
        others = torch.stack([torch.cat([logs[:i], logs[i + 1 :]]).logsumexp(0) - math.log(k - 1) for i in range(k)])
        advantages = k * (bound - others)
        if float(logs.max() - logs.min()) < self.tolerance:
            advantages = torch.zeros_like(advantages)
        else:
            advantages = scaled(advantages, standardise=self.standardise, clip=self.clip)
        readable = scores.readable.double()
        nothing = torch.zeros_like(readable)
        return Coefficients(
            cot=advantages,
            score=nothing,
            squared_error=nothing,
            likelihood=k * logs.softmax(0) * readable,
            rewards=logs,
            advantages=advantages,
            zero_variance=bool((advantages == 0).all()),
            floored=int((logs[scores.readable] < math.log(FLOOR_PROBABILITY)).sum()),
        )
