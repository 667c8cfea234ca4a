from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from real_openrlhf.algo.loss import LossOptions, policy_loss
from real_openrlhf.algo.types import Denominators
from real_openrlhf.dropin.loss import RealPolicyLoss
from real_openrlhf.dropin.settings import DropInError, RealSettings
from tests.helpers.algo_factory import grad_of, make_inputs

SETTINGS = RealSettings(scale="1-3", lam=0.5)
# Two rollouts with 2 and 3 feedback tokens, the second without a score.
MASK = torch.tensor([[1.0, 1.0, 0.0], [1.0, 1.0, 1.0]])
READABLE = torch.tensor([True, False])
LABELS: list[object] = [2.5, "1"]
ADVANTAGES = torch.tensor([0.5, -1.0])


def leaves() -> tuple[Tensor, Tensor]:
    log_probs = torch.tensor([[-1.0, -2.0, -9.0], [-0.1, -0.2, -0.3]], dtype=torch.float64, requires_grad=True)
    label_logprobs = torch.tensor([[0.1, 0.2, 0.5], [1, 1, 1]], dtype=torch.float64).log().requires_grad_()
    return log_probs, label_logprobs


def call(loss: RealPolicyLoss, *rows: int, old: Tensor | None = None, **more: Any) -> Any:
    """Those rows of the example; all by default."""
    log_probs, label_logprobs = more.pop("leaves", None) or leaves()
    index = torch.tensor(rows or (0, 1))
    given: dict[str, Any] = {
        "action_mask": MASK[index],
        "label_logprobs": label_logprobs[index],
        "readable": READABLE[index],
        "labels": [LABELS[i] for i in index.tolist()],
        "advantages": ADVANTAGES[index],
    } | more
    return loss(log_probs[index], old if old is None else old[index], **given)


# E = 0.1 + 0.4 + 1.5 = 2.0 against 2.5, half way between labels of probability 0.2 and 0.5.
TERM_2 = 0.25 - 0.5 * (math.log(0.2) + math.log(0.5)) / 2


@pytest.mark.parametrize(("aggregation", "divisor"), [("token_sum", 2), ("token_mean", 5)])
def test_by_hand(aggregation: Any, divisor: int) -> None:
    loss, *logs = call(RealPolicyLoss(SETTINGS, beta=0.1, aggregation=aggregation, ratio="on_policy"))
    assert loss.item() == pytest.approx(-(0.5 * -3.0 - 1.0 * -0.6) / divisor + 0.1 * TERM_2 / 2)
    assert [None if log is None else float(log) for log in logs] == [0.0, 0.0, None, None]


def test_gradient_in_closed_form() -> None:
    log_probs, label_logprobs = leaves()
    call(RealPolicyLoss(SETTINGS, beta=0.1, ratio="on_policy"), leaves=(log_probs, label_logprobs))[0].backward()
    assert grad_of(log_probs).tolist() == [[-0.25, -0.25, 0.0], [0.5, 0.5, 0.5]]
    # d/d log p_k of (E - y)^2 = 2 (E - y) v_k p_k, and half of lambda on each neighbour; mean over two rollouts.
    probs = [0.1, 0.2, 0.5]
    wanted = [0.1 * (2 * -0.5 * v * p - 0.5 * w) / 2 for v, p, w in zip((1, 2, 3), probs, (0, 0.5, 0.5))]
    assert grad_of(label_logprobs)[0].tolist() == pytest.approx(wanted)
    assert grad_of(label_logprobs)[1].tolist() == [0, 0, 0]


def test_it_is_the_packages_loss_with_the_objectives_weights() -> None:
    """A group by way of RealObjective and policy_loss, and by way of the drop-in."""
    generator = torch.Generator().manual_seed(3)
    n, width = 4, 5
    tokens = -torch.rand(n, width, generator=generator, dtype=torch.float64)
    labels = (torch.rand(n, 3, generator=generator, dtype=torch.float64) / 3).log()
    readable = torch.tensor([True, True, False, True])
    settings = RealSettings(scale="1-3", lam=0.7, invalid_penalty=0.5, renormalise=True)
    coefficients = settings.objective(beta=0.3)(settings.group_scores(labels, readable, settings.target(2)))
    nothing = torch.zeros(n, width, dtype=torch.bool)
    inputs = make_inputs(
        tokens,
        labels,
        readable=readable,
        cot_mask=~nothing,
        score_mask=nothing,
        **{name: getattr(coefficients, name) for name in ("cot", "score", "squared_error", "likelihood")},
    )
    wanted = policy_loss(
        inputs,
        options=LossOptions(renormalise=True),
        denominators=Denominators(rollouts=n, action_tokens=n * width, response_tokens=n * width),
    ).loss
    got = RealPolicyLoss(settings, beta=0.3, ratio="on_policy")(
        tokens, None, coefficients.advantages, label_logprobs=labels, readable=readable, labels=[2] * n
    )[0]
    assert float(got) == pytest.approx(float(wanted), rel=1e-12)


@pytest.mark.parametrize("aggregation", ["token_sum", "token_mean"])
def test_micro_batches_and_ranks_add_up(aggregation: Any) -> None:
    """As OpenRLHF counts: totals over ranks divided by the accumulation steps, losses averaged over both."""
    loss = RealPolicyLoss(SETTINGS, aggregation=aggregation, ratio="on_policy")
    whole = call(loss)[0].item()
    for dp_size, steps in ((2, 1), (1, 2), (1, 4)):
        info = {"dp_size": dp_size, "batch_num_tokens": torch.tensor(5 / steps), "global_batch_size": 2 / steps}
        parts = [call(loss, row, **info)[0].item() for row in (0, 1)]
        assert sum(parts) / (dp_size * steps) == pytest.approx(whole)


def test_the_clipped_ratio_is_against_the_old_log_probs() -> None:
    log_probs, _ = leaves()
    old = log_probs.detach() - torch.tensor([[0.5, 0.1, 3.0], [-0.5, 0.5, 0.0]], dtype=torch.float64)
    loss, clip_ratio, ppo_kl, *_ = call(RealPolicyLoss(SETTINGS, beta=0.0, clip_eps_high=0.3), old=old)
    surrogate = [0.5 * 1.3, 0.5 * math.exp(0.1), *(-max(math.exp(d), 0.8) for d in (-0.5, 0.5, 0.0))]
    assert loss.item() == pytest.approx(-sum(surrogate) / 2)
    assert float(clip_ratio) == pytest.approx(2 / 5)
    assert float(ppo_kl) == pytest.approx(-(0.5 + 0.1 - 0.5 + 0.5) / 5)


def test_truncated_importance_weights_are_against_the_engines_log_probs() -> None:
    log_probs, label_logprobs = leaves()
    rollout = log_probs.detach() - torch.tensor([[0.5, 2.0, 7.0], [-0.5, 0.0, 0.0]], dtype=torch.float64)
    loss, _, _, vllm_kl, _ = call(
        RealPolicyLoss(SETTINGS, ratio="on_policy", tis_cap=2.0),
        rollout_log_probs=rollout,
        leaves=(log_probs, label_logprobs),
    )
    loss.backward()
    weights = [[math.exp(0.5), 2.0, 0.0], [math.exp(-0.5), 1.0, 1.0]]
    wanted = [[-a * w / 2 for w in row] for a, row in zip((0.5, -1.0), weights)]
    assert grad_of(log_probs).flatten().tolist() == pytest.approx([w for row in wanted for w in row])
    assert float(vllm_kl) == pytest.approx(-(0.5 + 2.0 - 0.5) / 5)
    # Term 2 by the truncated product over the feedback: min(2, exp(2.5)).
    assert float(grad_of(label_logprobs)[0, 0]) == pytest.approx(2 * 2 * -0.5 * 0.1 / 2)


def test_advantages_per_token_must_agree() -> None:
    loss = RealPolicyLoss(SETTINGS, ratio="on_policy")
    table = torch.tensor([[0.5, 0.5, 7.0], [-1.0, -1.0, -1.0]])  # padding may hold anything
    assert call(loss, advantages=table)[0].item() == call(loss)[0].item()
    with pytest.raises(DropInError, match="one advantage per rollout"):
        call(loss, advantages=table.roll(1, 1))


def test_padding_may_hold_anything() -> None:
    log_probs, label_logprobs = leaves()
    with torch.no_grad():
        log_probs[0, 2] = -math.inf
        label_logprobs[1] = math.nan
    loss = call(RealPolicyLoss(SETTINGS, ratio="on_policy"), leaves=(log_probs, label_logprobs))[0]
    loss.backward()
    assert loss.item() == pytest.approx(0.9 / 2 + TERM_2 / 2)
    assert bool(torch.isfinite(grad_of(log_probs)).all() and torch.isfinite(grad_of(label_logprobs)).all())


def test_what_is_missing_is_named() -> None:
    with pytest.raises(DropInError, match="needs old_log_probs"):
        call(RealPolicyLoss(SETTINGS))
    with pytest.raises(DropInError, match="is_correction_level token"):
        call(RealPolicyLoss(SETTINGS, ratio="on_policy", tis_cap=2.0))
    with pytest.raises(DropInError, match="tis_cap needs"):
        RealPolicyLoss(SETTINGS, tis_cap=2.0)
    loss = RealPolicyLoss(SETTINGS, ratio="on_policy")
    for wrong in ({"labels": [1]}, {"label_logprobs": torch.zeros(2, 5)}, {"readable": READABLE[:1]}):
        with pytest.raises(DropInError, match="2 rollouts on a scale of 3"):
            call(loss, **wrong)
    with pytest.raises(DropInError, match=r"\[N, A\]"):
        call(loss, action_mask=MASK[:, :2])
    with pytest.raises(ValueError, match="from 1 to 3"):
        call(loss, labels=[4, 1])
