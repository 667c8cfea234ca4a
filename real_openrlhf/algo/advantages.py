"""Leave-one-out advantages, standardised and clipped within a group (paper, section 4.3)."""

from __future__ import annotations

import torch
from torch import Tensor

EPSILON = 1e-8


def rloo_advantages(
    rewards: Tensor, *, standardise: bool = True, clip: float | None = 1.0, tolerance: float = 1e-6
) -> Tensor:
    """[K] rewards -> [K] float64 advantages.

    A_i = r_i - mean of the other K - 1; A / (std(A) + 1e-8) with the population std; clipped to
    [-clip, clip]. A group whose rewards differ by less than `tolerance` gets exactly 0: there,
    standardisation would turn rounding errors into advantages of 1. Raises ValueError for fewer
    than two rewards and for rewards that are not finite.
    """
    k = rewards.numel()
    if k < 2:
        raise ValueError(f"leave-one-out advantages need at least 2 rollouts per prompt, got {k}")
    rewards = rewards.double()
    if not bool(torch.isfinite(rewards).all()):
        raise ValueError(f"rewards must be finite, got {rewards.tolist()}")
    if float(rewards.max() - rewards.min()) < tolerance:
        return rewards.new_zeros(k)
    return scaled(rewards - (rewards.sum() - rewards) / (k - 1), standardise=standardise, clip=clip)


def scaled(advantages: Tensor, *, standardise: bool, clip: float | None) -> Tensor:
    """[K] advantages divided by their population std + 1e-8 (if `standardise`), then clipped to [-clip, clip]."""
    if standardise:
        advantages = advantages / (advantages.std(correction=0) + EPSILON)
    if clip is not None:
        advantages = advantages.clamp(-clip, clip)
    return advantages
