from __future__ import annotations

import math

import pytest
import torch

from real_openrlhf.algo.score_stats import ScoreStats, expected_score, score_stats
from real_openrlhf.algo.target import Target
from real_openrlhf.algo.types import Targets
from tests.helpers.algo_factory import grad_of

VALUES = torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64)


def target_of(low: int, high: int, weight: float) -> Targets:
    """One target; what its value is, nothing here looks at."""
    return Targets.of([Target(value=0.0, low=low, high=high, weight=weight)])


def stats_of(probs: list[float], low: int, high: int, weight: float, **kwargs: bool) -> ScoreStats:
    logprobs = torch.tensor([probs], dtype=torch.float64).log()
    return score_stats(
        logprobs,
        VALUES,
        target_of(low, high, weight),
        **kwargs,
    )


def test_full_vocabulary_by_hand() -> None:
    stats = stats_of([0.1, 0.2, 0.5], 1, 2, 0.25)
    assert float(stats.expected) == pytest.approx(0.1 + 0.4 + 1.5)  # a fifth of the mass pulls towards 0
    assert float(stats.mass) == pytest.approx(0.8)
    assert float(stats.likelihood) == pytest.approx(0.75 * math.log(0.2) + 0.25 * math.log(0.5))


def test_renormalised_by_hand() -> None:
    stats = stats_of([0.1, 0.2, 0.5], 1, 2, 0.25, renormalise=True)
    assert float(stats.expected) == pytest.approx(2.0 / 0.8)
    assert float(stats.mass) == pytest.approx(0.8)  # always of the full vocabulary
    assert float(stats.likelihood) == pytest.approx(0.75 * math.log(0.25) + 0.25 * math.log(0.625))


def test_whole_label_reads_one_neighbour() -> None:
    assert float(stats_of([0.1, 0.2, 0.5], 1, 1, 0.0).likelihood) == pytest.approx(math.log(0.2))
    assert float(stats_of([0.1, 0.2, 0.5], 1, 2, 1.0).likelihood) == pytest.approx(math.log(0.5))


def test_dtype_and_shapes() -> None:
    logprobs = torch.randn(4, 3).log_softmax(-1)
    whole = Targets.of([Target(value=float(VALUES[i]), low=i, high=i, weight=0.0) for i in (0, 1, 2, 0)])
    stats = score_stats(logprobs, VALUES, whole)
    assert all(v.shape == (4,) and v.dtype == torch.float32 for v in (stats.expected, stats.likelihood, stats.mass))
    assert torch.equal(expected_score(logprobs, VALUES), stats.expected)
    both = expected_score(torch.stack([logprobs, logprobs]), VALUES, renormalise=True)
    assert both.shape == (2, 4)
    assert torch.allclose(both[0], logprobs.softmax(-1) @ VALUES.float())


@pytest.mark.parametrize("renormalise", [False, True])
@pytest.mark.parametrize(("low", "high", "weight"), [(0, 2, 0.0), (2, 0, 1.0), (0, 0, 0.0)])
def test_impossible_neighbour_of_weight_zero(low: int, high: int, weight: float, renormalise: bool) -> None:
    logits = torch.tensor([[1.0, 0.5, -math.inf, 0.2]], dtype=torch.float64, requires_grad=True)
    stats = score_stats(
        logits.log_softmax(-1)[:, :3],
        VALUES,
        target_of(low, high, weight),
        renormalise=renormalise,
    )
    (stats.likelihood + stats.expected).sum().backward()
    assert torch.isfinite(stats.likelihood).all() and torch.isfinite(stats.expected).all()
    assert torch.isfinite(grad_of(logits)).all()
    assert float(grad_of(logits)[0, 0]) != 0


def gradients(weight: float, renormalise: bool) -> tuple[list[torch.Tensor], torch.Tensor, float]:
    """Autograd of E, (E - y)^2 and the likelihood with respect to 5 logits; labels are tokens 3, 0, 2."""
    torch.manual_seed(1)
    logits = torch.randn(5, dtype=torch.float64, requires_grad=True)
    stats = score_stats(
        logits.log_softmax(-1)[None, [3, 0, 2]],
        VALUES,
        target_of(0, 1, weight),
        renormalise=renormalise,
    )
    y = 1 + weight
    targets = [stats.expected.sum(), ((stats.expected - y) ** 2).sum(), stats.likelihood.sum()]
    return (
        [torch.autograd.grad(t, logits, retain_graph=True)[0] for t in targets],
        logits.detach(),
        float(stats.expected.detach()),
    )


@pytest.mark.parametrize("weight", [0.0, 0.3, 1.0])
def test_gradients_in_closed_form(weight: float) -> None:
    (expected, squared, likelihood), logits, value = gradients(weight, renormalise=False)
    p = logits.softmax(-1)
    v = torch.tensor([2.0, 0.0, 3.0, 1.0, 0.0], dtype=torch.float64)  # value of each token, 0 off the scale
    onehot = torch.zeros(5, dtype=torch.float64)
    onehot[3], onehot[0] = 1 - weight, weight
    assert torch.allclose(expected, p * (v - value), atol=1e-14)
    assert torch.allclose(squared, 2 * (value - 1 - weight) * p * (v - value), atol=1e-14)
    assert torch.allclose(likelihood, onehot - p, atol=1e-14)


@pytest.mark.parametrize("weight", [0.0, 0.3])
def test_gradients_in_closed_form_renormalised(weight: float) -> None:
    (expected, squared, likelihood), logits, value = gradients(weight, renormalise=True)
    q = torch.zeros(5, dtype=torch.float64)
    q[[3, 0, 2]] = logits[[3, 0, 2]].softmax(-1)
    v = torch.tensor([2.0, 0.0, 3.0, 1.0, 0.0], dtype=torch.float64)
    onehot = torch.zeros(5, dtype=torch.float64)
    onehot[3], onehot[0] = 1 - weight, weight
    assert torch.allclose(expected, q * (v - value), atol=1e-14)
    assert torch.allclose(squared, 2 * (value - 1 - weight) * q * (v - value), atol=1e-14)
    assert torch.allclose(likelihood, onehot - q, atol=1e-14)
