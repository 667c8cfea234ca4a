"""E[score], the label's log-likelihood and the mass on the scale, from the labels' log-probs."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from real_openrlhf.algo.types import Targets


@dataclass(frozen=True, kw_only=True)
class ScoreStats:
    """Differentiable, all [N], in the dtype of the log-probs.

    expected    E[score] = sum_k v_k p_k, the RAIL predictor (paper, section 2.2)
    likelihood  (1 - w) log p_low + w log p_high, log pi(y | x, c) for a label between two scores
    mass        sum_k p_k over the scale, with probabilities over the full vocabulary, even with renormalise
    """

    expected: Tensor
    likelihood: Tensor
    mass: Tensor


def score_stats(
    label_logprobs: Tensor,
    values: Tensor,
    targets: Targets,
    *,
    renormalise: bool = False,
) -> ScoreStats:
    """[N, S] log-probs of the labels, [S] values, N targets -> ScoreStats.

    Full-vocabulary probabilities are the paper's definition: mass off the scale pulls E[score]
    towards 0. With renormalise=True, E[score] and likelihood use the distribution given that the
    score is on the scale.
    """
    probs = label_logprobs.exp()
    mass = probs.sum(-1)
    logprobs = label_logprobs.log_softmax(-1) if renormalise else label_logprobs
    probs = logprobs.exp() if renormalise else probs
    expected = probs @ values.to(probs)
    weight = targets.weight.to(logprobs)
    at_low = logprobs.gather(-1, targets.low[:, None])[:, 0]
    at_high = logprobs.gather(-1, targets.high[:, None])[:, 0]
    # 0 * -inf is nan, so with a weight of exactly 0 or 1 the other neighbour must not enter.
    likelihood = torch.where(weight < 1, (1 - weight) * at_low, 0.0) + torch.where(weight > 0, weight * at_high, 0.0)
    return ScoreStats(expected=expected, likelihood=likelihood, mass=mass)


def expected_score(label_logprobs: Tensor, values: Tensor, *, renormalise: bool = False) -> Tensor:
    """E[score] alone: [..., S] log-probs -> [...]."""
    logprobs = label_logprobs.log_softmax(-1) if renormalise else label_logprobs
    return logprobs.exp() @ values.to(logprobs)
