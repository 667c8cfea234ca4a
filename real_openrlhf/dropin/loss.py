"""REAL's loss with the call shape of OpenRLHF's `PolicyLoss`."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from real_openrlhf.algo.choices import Aggregation, Ratio
from real_openrlhf.algo.loss import LossOptions, policy_loss
from real_openrlhf.algo.types import Denominators, LossInputs, Targets
from real_openrlhf.dropin.settings import DropInError, RealSettings

# A power of two, so that it changes no bit: `policy_loss` takes no denominator below 1, and OpenRLHF divides its
# counts by the accumulation steps.
_SCALE = 1024.0


class RealPolicyLoss(nn.Module):
    """Term 1 with the advantages that it is given, Term 2 with weight beta. It holds no parameters.

    aggregation  of Term 1: "token_sum" (paper, Eq. 8) divides by the number of rollouts, "token_mean" by that of
                 feedback tokens; Term 2 is always divided by the number of rollouts
    ratio        "clip": the clipped ratio against old_log_probs, as PolicyLoss; "on_policy": one update per batch, no
                 ratio; "none": several updates without correction
    tis_cap      with "on_policy": truncated importance weights against rollout_log_probs; None: off

    KL and entropy stay with the caller, as they do with PolicyLoss.
    """

    def __init__(
        self,
        settings: RealSettings,
        *,
        beta: float = 1.0,
        aggregation: Aggregation = "token_sum",
        ratio: Ratio = "clip",
        clip_eps_low: float = 0.2,
        clip_eps_high: float = 0.2,
        tis_cap: float | None = None,
    ) -> None:
        super().__init__()
        if tis_cap is not None and ratio != "on_policy":
            raise DropInError(f"tis_cap needs ratio='on_policy', got ratio={ratio!r}")
        self.settings = settings
        self.beta = beta
        self.options = LossOptions(
            aggregation=aggregation,
            ratio=ratio,
            clip_low=clip_eps_low,
            clip_high=clip_eps_high,
            tis_cap=tis_cap,
            renormalise=settings.renormalise,
        )

    def forward(
        self,
        log_probs: Tensor,
        old_log_probs: Tensor | None,
        advantages: Tensor,
        action_mask: Tensor | None = None,
        rollout_log_probs: Tensor | None = None,
        dp_size: int = 1,
        batch_num_tokens: float | Tensor | None = None,
        global_batch_size: float | Tensor | None = None,
        *,
        label_logprobs: Tensor,
        readable: Tensor,
        labels: Sequence[object],
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
        """The loss and PolicyLoss's logs: (loss, clip_ratio, ppo_kl, vllm_kl, 0); the last two None without tis_cap.

        log_probs          [N, A] with grad, at the sampling temperature
        old_log_probs      [N, A] or None: what "clip" takes the ratio against
        advantages         [N], or [N, A] with one value over all of a rollout's actions
        action_mask        [N, A] of any dtype: the feedback's tokens, none of the score; None: all
        rollout_log_probs  [N, A] or None: the engine's, for tis_cap
        dp_size, batch_num_tokens, global_batch_size   as OpenRLHF's `get_loss_batch_info` gives them; None: this call's
        label_logprobs     [N, S] with grad, see `tensors.label_logprobs`
        readable           [N] bool
        labels             N human scores, numbers or numeric texts
        """
        mask = torch.ones_like(log_probs, dtype=torch.bool) if action_mask is None else action_mask.bool()
        n, clips = len(log_probs), self.options.ratio == "clip"
        self._check(log_probs, mask, label_logprobs, readable, labels)
        base = old_log_probs if clips else rollout_log_probs
        if base is None and self.options.needs_rollout_logprobs:
            raise DropInError(_NEEDS_OLD if clips else _NEEDS_ROLLOUT)
        tokens = float(mask.sum() if batch_num_tokens is None else batch_num_tokens) * _SCALE
        weight = self.beta * readable.double()
        inputs = LossInputs(
            token_logprobs=log_probs,
            label_logprobs=label_logprobs,
            readable=readable,
            cot_mask=mask,
            score_mask=torch.zeros_like(mask),
            response_mask=mask,
            cot=_per_rollout(advantages, mask),
            score=torch.zeros_like(weight),
            squared_error=weight,
            likelihood=self.settings.lam * weight,
            targets=Targets.of([self.settings.target(label) for label in labels]).to(log_probs.device),
            values=self.settings.score_scale.tensor().to(log_probs.device),
            rollout_logprobs=base,
        )
        rollouts = float(n if global_batch_size is None else global_batch_size) * _SCALE
        denominators = Denominators(rollouts=rollouts, action_tokens=tokens, response_tokens=tokens)
        outputs = policy_loss(inputs, options=self.options, denominators=denominators, loss_scale=dp_size * _SCALE)
        count = mask.sum().clamp(min=1)
        now = log_probs.detach()
        ppo_kl = _mean(None if old_log_probs is None else old_log_probs - now, mask)
        vllm_kl = None
        if self.options.tis_cap is not None and rollout_log_probs is not None:
            vllm_kl = _mean(rollout_log_probs - now, mask)
        dropped = None if vllm_kl is None else torch.zeros_like(vllm_kl)  # truncation drops no token
        return outputs.loss, outputs.sums["clipped"] / count, ppo_kl, vllm_kl, dropped

    def _check(
        self, log_probs: Tensor, mask: Tensor, label_logprobs: Tensor, readable: Tensor, labels: Sequence[object]
    ) -> None:
        n, n_labels = len(log_probs), len(self.settings.score_scale)
        if log_probs.dim() != 2 or mask.shape != log_probs.shape:
            raise DropInError(
                f"log_probs and action_mask must both be [N, A], got {tuple(log_probs.shape)} and {tuple(mask.shape)}"
            )
        if label_logprobs.shape != (n, n_labels) or readable.shape != (n,) or len(labels) != n:
            raise DropInError(
                f"{n} rollouts on a scale of {n_labels} need label_logprobs [N, S], readable [N] and N labels, got "
                f"{tuple(label_logprobs.shape)}, {tuple(readable.shape)} and {len(labels)}"
            )


_NEEDS_OLD = "ratio='clip' needs old_log_probs; with one update per batch, ratio='on_policy' needs none"
_NEEDS_ROLLOUT = (
    "tis_cap needs rollout_log_probs, which OpenRLHF returns with --algo.advantage.is_correction_level token"
)


def _mean(values: Tensor | None, mask: Tensor) -> Tensor:
    """Over the mask; 0 without values or with an empty mask."""
    if values is None:
        return torch.zeros((), device=mask.device)
    return torch.where(mask, values, 0.0).sum() / mask.sum().clamp(min=1)


def _per_rollout(advantages: Tensor, mask: Tensor) -> Tensor:
    """[N] or [N, A] -> [N]. REAL's advantage is one number per rollout."""
    if advantages.dim() == 1:
        return advantages
    first = advantages.gather(1, mask.int().argmax(1, keepdim=True))
    if not bool(((advantages == first) | ~mask).all()):
        raise DropInError(
            "REAL has one advantage per rollout, but these differ between its tokens; in OpenRLHF use "
            "--algo.advantage.estimator rloo or group_norm with --algo.kl.init_coef 0, or the KL as a loss "
            "(--algo.kl.use_loss)"
        )
    return first[:, 0]
