"""The loss of every objective: its coefficients times the policy's log-probs. Nowhere else are they combined.

Per rollout (paper, Eq. 8; the factors in front, such as cot, are the objective's, see `Coefficients`; w and W are
importance weights, 1 unless `tis_cap` is set):

    term 1          - cot * sum_t w_t log pi(c_t) - score * w log pi(sampled score)
    squared error   + squared_error * W (E[score] - y)^2
    likelihood      - likelihood * W log pi(y)
    KL, entropy     + kl_coef * KL(pi || ref) - entropy_coef * H

Term 1 is divided by the number of rollouts ("token_sum", Eq. 8) or of action tokens
("token_mean"), Term 2 always by the number of rollouts. The denominators are arguments: they run
over all ranks and micro-batches of the optimizer step, so the loss does not depend on sharding.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import overload

import torch
from torch import Tensor

from real_openrlhf.algo.choices import Aggregation, KLEstimator, Ratio
from real_openrlhf.algo.dtypes import upcast
from real_openrlhf.algo.kl import kl_per_token
from real_openrlhf.algo.score_stats import ScoreStats, score_stats
from real_openrlhf.algo.types import Denominators, LossInputs, LossOutputs


@dataclass(frozen=True, kw_only=True)
class LossOptions:
    """
    aggregation   what Term 1, KL and entropy are divided by, see the module's docstring
    ratio         "on_policy": one update per batch, no ratio; "clip": clipped ratio against the
                  rollout's own log-probs; "none": several updates without correction
    clip_low/high bounds 1 - low and 1 + high of the clipped ratio
    tis_cap       C of the truncated importance weight min(C, pi / pi_rollout), detached: per token
                  on Term 1 (w), the truncated product over the chain of thought on Term 2 (W).
                  Not applied under "clip": there the ratio corrects Term 1, and Term 2 has no weight.
                  None: off
    kl_coef, kl_estimator, entropy_coef   weights of the KL and the entropy bonus, and the KL's estimator (`algo.kl`)
    renormalise   divide label probabilities by their sum before E[score] and likelihood are computed
    """

    aggregation: Aggregation = "token_sum"
    ratio: Ratio = "on_policy"
    clip_low: float = 0.2
    clip_high: float = 0.2
    tis_cap: float | None = None
    kl_coef: float = 0.0
    kl_estimator: KLEstimator = "k3"
    entropy_coef: float = 0.0
    renormalise: bool = False

    @property
    def needs_rollout_logprobs(self) -> bool:
        return self.ratio == "clip" or self.tis_cap is not None


def policy_loss(
    inputs: LossInputs, *, options: LossOptions, denominators: Denominators, loss_scale: float = 1.0
) -> LossOutputs:
    """The loss of N rollouts; see the module's docstring.

    loss_scale undoes what the caller's backward pass divides by: the number of ranks where gradients are averaged over
    ranks, times the accumulation steps where the loss is divided by these too (`RealTrainer`'s is not). Rollouts that
    are not readable add nothing to Term 2. Empty masks add exactly 0, and even then the loss has a gradient path, so
    that `backward` works.
    """
    if inputs.rollout_logprobs is None and options.needs_rollout_logprobs:
        raise ValueError("clipped ratios and importance weights need rollout_logprobs")
    if inputs.ref_logprobs is None and options.kl_coef:
        raise ValueError("the KL needs ref_logprobs")
    # Padding may hold anything, also inf and nan. It is masked first, else 0 * inf would make gradients nan.
    logprobs = _masked(inputs.token_logprobs, inputs.response_mask)
    rollout_logprobs = _masked(inputs.rollout_logprobs, inputs.response_mask)
    coefficient = inputs.cot.to(logprobs)[:, None] * inputs.cot_mask
    coefficient = coefficient + inputs.score.to(logprobs)[:, None] * inputs.score_mask
    action_mask = inputs.cot_mask | inputs.score_mask
    surrogate, clipped = _surrogate(logprobs, coefficient, rollout_logprobs, action_mask, options)

    stats = score_stats(
        _masked(inputs.label_logprobs, inputs.readable[:, None]),
        inputs.values,
        inputs.targets,
        renormalise=options.renormalise,
    )
    sequence_weight = _sequence_weight(logprobs, rollout_logprobs, inputs.cot_mask, options)
    squared_error = torch.where(inputs.readable, (stats.expected - inputs.targets.value.to(stats.expected)) ** 2, 0.0)
    likelihood = torch.where(inputs.readable, stats.likelihood, 0.0)

    by_sum = options.aggregation == "token_sum"
    actions = denominators.rollouts if by_sum else denominators.action_tokens
    responses = denominators.rollouts if by_sum else denominators.response_tokens
    rollouts = max(denominators.rollouts, 1.0)
    terms = {
        "cot": -surrogate.sum() / max(actions, 1.0),
        "squared_error": (inputs.squared_error.to(squared_error) * sequence_weight * squared_error).sum() / rollouts,
        "likelihood": -(inputs.likelihood.to(likelihood) * sequence_weight * likelihood).sum() / rollouts,
    }
    sums = _sums(inputs, logprobs.detach(), rollout_logprobs, stats, clipped)
    if inputs.ref_logprobs is not None:
        old = None if options.ratio == "on_policy" else rollout_logprobs
        # Masked log-probs are all 0 and their estimates exactly 0.
        ref_logprobs = _masked(inputs.ref_logprobs, inputs.response_mask)
        kl = kl_per_token(logprobs, ref_logprobs, old, estimator=options.kl_estimator).sum()
        terms["kl"] = options.kl_coef * kl / max(responses, 1.0)
        sums["kl"] = float(kl.detach())
    if inputs.entropy is not None:
        entropy = _masked(inputs.entropy, inputs.response_mask).sum()
        sums["entropy"] = float(entropy.detach())
        if options.entropy_coef:
            terms["entropy"] = -options.entropy_coef * entropy / max(responses, 1.0)
    loss = torch.stack(list(terms.values())).sum() * loss_scale
    return LossOutputs(loss=loss, terms=terms, sums=sums)


@overload
def _masked(tensor: Tensor, mask: Tensor) -> Tensor: ...
@overload
def _masked(tensor: None, mask: Tensor) -> None: ...
@overload
def _masked(tensor: Tensor | None, mask: Tensor) -> Tensor | None: ...
def _masked(tensor: Tensor | None, mask: Tensor) -> Tensor | None:
    """The tensor in fp32 or wider, with 0 where the mask is False, whatever value was there."""
    return None if tensor is None else torch.where(mask, upcast(tensor), 0.0)


def _surrogate(
    logprobs: Tensor, coefficient: Tensor, rollout_logprobs: Tensor | None, action_mask: Tensor, options: LossOptions
) -> tuple[Tensor, Tensor]:
    """[N, T] coefficient times (weighted) log-prob or clipped ratio, and the mask of clipped tokens."""
    no_clipping = torch.zeros_like(action_mask)
    if options.ratio == "clip":
        assert rollout_logprobs is not None
        log_ratio = torch.where(action_mask, logprobs - rollout_logprobs, 0.0).clamp(-20.0, 20.0)
        ratio = log_ratio.exp()
        bounded = ratio.clamp(1 - options.clip_low, 1 + options.clip_high)
        surrogate = torch.minimum(ratio * coefficient, bounded * coefficient)
        return surrogate, (bounded * coefficient < ratio * coefficient) & action_mask
    weight = coefficient
    if options.tis_cap is not None:
        assert rollout_logprobs is not None
        log_ratio = torch.where(action_mask, logprobs.detach() - rollout_logprobs, 0.0)
        weight = coefficient * log_ratio.exp().clamp(max=options.tis_cap)
    return torch.where(action_mask, weight * logprobs, 0.0), no_clipping


def _sequence_weight(
    logprobs: Tensor, rollout_logprobs: Tensor | None, cot_mask: Tensor, options: LossOptions
) -> Tensor:
    """[N] truncated product of importance weights over the chain of thought, for Term 2."""
    if options.tis_cap is None or options.ratio == "clip":
        return torch.ones_like(logprobs[:, 0])
    assert rollout_logprobs is not None
    log_ratio = torch.where(cot_mask, logprobs.detach() - rollout_logprobs, 0.0).sum(-1)
    return log_ratio.exp().clamp(max=options.tis_cap)


def _sums(
    inputs: LossInputs, logprobs: Tensor, rollout_logprobs: Tensor | None, stats: ScoreStats, clipped: Tensor
) -> dict[str, float]:
    readable = inputs.readable.float()
    expected, mass = stats.expected.detach(), stats.mass.detach()
    sums = {
        "readable": float(readable.sum()),
        "expected_score": float((expected * readable).sum()),
        "expected_error": float(((expected - inputs.targets.value).abs() * readable).sum()),
        "mass": float((mass * readable).sum()),
        "clipped": float(clipped.sum()),
    }
    if rollout_logprobs is not None:
        difference = logprobs - rollout_logprobs
        sums["logprob_difference"] = float(difference.abs().sum())
        # k3 estimate of KL(rollout || trainer), summed over tokens.
        sums["rollout_kl"] = float((difference.clamp(-10, 10).exp() - 1 - difference).sum())
        sums["logprob_difference_max"] = float(difference.abs().max()) if difference.numel() else 0.0
    return sums
