from __future__ import annotations

import math

import pytest
import torch

from real_openrlhf.algo.choices import KLEstimator
from real_openrlhf.algo.kl import KL_IS_WEIGHT_CLIP, kl_per_token
from tests.helpers.algo_factory import grad_of

ESTIMATORS = pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])


def distributions() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Logits of the policy [4 states, 5 tokens] with grad, of the reference and of the sampler."""
    torch.manual_seed(0)
    theta = torch.randn(4, 5, dtype=torch.float64, requires_grad=True)
    return theta, torch.randn(4, 5, dtype=torch.float64), torch.randn(4, 5, dtype=torch.float64) * 0.5


def exact_kl(theta: torch.Tensor, ref: torch.Tensor) -> torch.Tensor:
    log_p, log_q = theta.log_softmax(-1), ref.log_softmax(-1)
    return (log_p.exp() * (log_p - log_q)).sum()


@pytest.mark.parametrize(("estimator", "value"), [("k1", 0.7), ("k2", 0.245), ("k3", math.exp(-0.7) - 1 + 0.7)])
def test_value(estimator: KLEstimator, value: float) -> None:
    got = kl_per_token(torch.tensor([[-1.0]]), torch.tensor([[-1.7]]), estimator=estimator)
    assert got.item() == pytest.approx(value)


@ESTIMATORS
def test_values_are_bounded(estimator: KLEstimator) -> None:
    logprobs = torch.tensor([[-1.0, -90.0]], requires_grad=True)
    got = kl_per_token(logprobs, torch.tensor([[-90.0, -1.0]]), estimator=estimator)
    got.sum().backward()
    assert got.abs().max() <= 10 and torch.isfinite(grad_of(logprobs)).all()


def test_unknown_estimator() -> None:
    with pytest.raises(ValueError, match="'k4'; use k1, k2 or k3"):
        kl_per_token(torch.zeros(1, 1), torch.zeros(1, 1), estimator="k4")  # type: ignore[arg-type]


@ESTIMATORS
def test_mean_value_on_policy(estimator: KLEstimator) -> None:
    theta, ref, _ = distributions()
    log_p = theta.detach().log_softmax(-1)
    mean = (log_p.exp() * kl_per_token(log_p, ref.log_softmax(-1), estimator=estimator)).sum()
    if estimator == "k2":  # biased: half the mean square of the log-ratio
        assert mean.item() == pytest.approx((log_p.exp() * (log_p - ref.log_softmax(-1)) ** 2 / 2).sum().item())
    else:
        assert mean.item() == pytest.approx(exact_kl(theta, ref).item())


@ESTIMATORS
def test_mean_gradient_on_policy_is_that_of_the_kl(estimator: KLEstimator) -> None:
    theta, ref, _ = distributions()
    log_p = theta.log_softmax(-1)
    mean = (log_p.detach().exp() * kl_per_token(log_p, ref.log_softmax(-1), estimator=estimator)).sum()
    (got,) = torch.autograd.grad(mean, theta)
    (truth,) = torch.autograd.grad(exact_kl(theta, ref), theta)
    assert truth.abs().max() > 0.1
    assert torch.allclose(got, truth, atol=1e-12)


@ESTIMATORS
def test_mean_gradient_off_policy_is_that_of_the_kl(estimator: KLEstimator) -> None:
    theta, ref, sampler = distributions()
    log_p, log_s = theta.log_softmax(-1), sampler.log_softmax(-1)
    assert (log_p - log_s).exp().max() < KL_IS_WEIGHT_CLIP
    mean = (log_s.exp() * kl_per_token(log_p, ref.log_softmax(-1), log_s, estimator=estimator)).sum()
    (got,) = torch.autograd.grad(mean, theta, retain_graph=True)
    (truth,) = torch.autograd.grad(exact_kl(theta, ref), theta)
    assert torch.allclose(got, truth, atol=1e-12)
    unweighted = (log_s.exp() * kl_per_token(log_p, ref.log_softmax(-1), estimator=estimator)).sum()
    assert not torch.allclose(torch.autograd.grad(unweighted, theta)[0], truth, atol=1e-3)


def test_naive_estimators_have_the_wrong_gradient() -> None:
    """Why the gradient is not taken through the value."""
    theta, ref, _ = distributions()
    log_p, log_q = theta.log_softmax(-1), ref.log_softmax(-1)
    p = log_p.detach().exp()
    (k1,) = torch.autograd.grad((p * (log_p - log_q)).sum(), theta, retain_graph=True)
    assert torch.allclose(k1, torch.zeros_like(k1), atol=1e-12)
    (k3,) = torch.autograd.grad((p * ((log_q - log_p).exp() - 1 + log_p - log_q)).sum(), theta, retain_graph=True)
    assert not torch.allclose(k3, torch.autograd.grad(exact_kl(theta, ref), theta)[0], atol=1e-3)


def test_importance_weights_are_clipped_and_detached() -> None:
    logprobs = torch.tensor([[-1.0, -1.0]], dtype=torch.float64, requires_grad=True)
    old = torch.tensor([[-1.5, -9.0]], dtype=torch.float64)
    kl_per_token(logprobs, torch.full((1, 2), -3.0), old).sum().backward()
    assert grad_of(logprobs)[0].tolist() == pytest.approx([2.0 * math.exp(0.5), 2.0 * 10.0])
    assert KL_IS_WEIGHT_CLIP == 10.0


def test_dtype() -> None:
    half = torch.full((1, 1), -1.0, dtype=torch.bfloat16)
    assert kl_per_token(half, half).dtype == torch.float32
    assert kl_per_token(half.double(), half.double()).dtype == torch.float64


def test_k3_near_the_reference_is_not_rounding_noise() -> None:
    gap = 1e-4
    ref = torch.full((1, 1000), -3.0)
    value = kl_per_token((ref.double() + gap).float(), ref, estimator="k3")
    exact = (ref.double() + gap).float().double() - ref.double()
    torch.testing.assert_close(value.double(), exact**2 / 2, rtol=5e-3, atol=0)
