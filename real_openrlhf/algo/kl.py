"""KL to a reference policy, per token: the value by the chosen estimator, the gradient unbiased."""

from __future__ import annotations

from torch import Tensor

from real_openrlhf.algo.choices import KLEstimator
from real_openrlhf.algo.dtypes import upcast

# As OpenRLHF's models/utils.py: importance weights are unbounded off-policy.
KL_IS_WEIGHT_CLIP = 10.0


def kl_per_token(
    logprobs: Tensor, ref_logprobs: Tensor, rollout_logprobs: Tensor | None = None, *, estimator: KLEstimator = "k3"
) -> Tensor:
    """[N, T] log-probs -> [N, T] estimates of KL(pi || ref), each value within [-10, 10].

    k1 as a loss has zero expected gradient on-policy, and k3's gradient is not that of the reverse
    KL. So the value comes from the chosen estimator, but the gradient is always w * k1 * grad log pi, with
    w = pi / pi_rollout clipped and detached (w = 1 on-policy): OpenRLHF's `--algo.kl.unbiased_gradient`.
    """
    log_ratio = upcast(logprobs) - upcast(ref_logprobs)
    if estimator == "k1":
        value = log_ratio
    elif estimator == "k2":
        value = log_ratio**2 / 2
    elif estimator == "k3":
        bounded = log_ratio.clamp(min=-10)
        # expm1, since near the reference exp(x) - 1 would be rounding noise in fp32.
        value = (-bounded).expm1() + bounded
    else:
        raise ValueError(f"unknown KL estimator {estimator!r}; use k1, k2 or k3")
    value = value.detach().clamp(-10, 10)
    surrogate = log_ratio**2 / 2
    if rollout_logprobs is not None:
        weight = (upcast(logprobs.detach()) - upcast(rollout_logprobs)).exp().clamp(max=KL_IS_WEIGHT_CLIP)
        surrogate = weight * surrogate
    return value + surrogate - surrogate.detach()
