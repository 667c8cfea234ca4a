from __future__ import annotations

import statistics

import pytest
import torch

from real_openrlhf.algo.advantages import rloo_advantages


def by_hand(rewards: list[float], clip: float | None = 1.0) -> list[float]:
    k = len(rewards)
    raw = [r - sum(rewards[:i] + rewards[i + 1 :]) / (k - 1) for i, r in enumerate(rewards)]
    std = statistics.pstdev(raw)
    scaled = [a / (std + 1e-8) for a in raw]
    return scaled if clip is None else [max(-clip, min(clip, a)) for a in scaled]


def test_raw_values() -> None:
    got = rloo_advantages(torch.tensor([1.0, 2.0, 6.0]), standardise=False, clip=None)
    assert got.tolist() == [-3.0, -1.5, 4.5]
    assert got.dtype == torch.float64


@pytest.mark.parametrize("clip", [None, 1.0, 0.3])
@pytest.mark.parametrize("rewards", [[1.0, 2.0, 6.0], [0.0, 1.0], [-5.5, 0.25, 0.25, 3.0, -1.0]])
def test_standardised_and_clipped(rewards: list[float], clip: float | None) -> None:
    got = rloo_advantages(torch.tensor(rewards), clip=clip)
    assert got.tolist() == pytest.approx(by_hand(rewards, clip), abs=1e-12)


def test_population_not_sample_standard_deviation() -> None:
    # Two rewards: the population std of (-a, a) is a, so that the advantages are 1; the sample std gives 0.707.
    assert rloo_advantages(torch.tensor([0.0, 3.0]), clip=None).tolist() == pytest.approx([-1, 1], abs=1e-8)


def test_clip_without_standardising() -> None:
    got = rloo_advantages(torch.tensor([0.0, 0.2, 4.0]), standardise=False, clip=1.0)
    assert got.tolist() == pytest.approx([-1.0, -1.0, 1.0])


def test_rounding_noise_gives_exactly_zero() -> None:
    noise = torch.tensor([-3.3, -3.3, -3.3, -3.3]) + torch.tensor([0.0, 2.4e-7, 0.0, -2.4e-7])
    assert noise.dtype == torch.float32 and float(noise.max() - noise.min()) > 0
    assert rloo_advantages(noise).tolist() == [0, 0, 0, 0]
    assert rloo_advantages(noise, tolerance=0.0).abs().max() == 1  # what the tolerance is for


def test_tolerance_is_a_bound_on_the_range() -> None:
    rewards = torch.tensor([0.0, 0.05, 0.099], dtype=torch.float64)
    assert rloo_advantages(rewards, tolerance=0.1).tolist() == [0, 0, 0]
    assert rloo_advantages(rewards, tolerance=0.09).abs().min() > 0


def test_equal_rewards_without_tolerance_are_finite() -> None:
    assert rloo_advantages(torch.full((4,), 0.1), tolerance=0.0).tolist() == pytest.approx([0] * 4, abs=1e-6)


def test_computed_in_float64() -> None:
    # In fp32 the sum of these loses the differences altogether.
    rewards = torch.tensor([1e6, 1e6 + 0.25, 1e6 + 0.5], dtype=torch.float32)
    got = rloo_advantages(rewards, standardise=False, clip=None)
    assert got.tolist() == [-0.375, 0.0, 0.375]


@pytest.mark.parametrize("k", [0, 1])
def test_too_few_rollouts(k: int) -> None:
    with pytest.raises(ValueError, match=f"at least 2 rollouts per prompt, got {k}"):
        rloo_advantages(torch.zeros(k))


@pytest.mark.parametrize("bad", [float("nan"), float("-inf")])
def test_rewards_must_be_finite(bad: float) -> None:
    with pytest.raises(ValueError, match="must be finite"):
        rloo_advantages(torch.tensor([0.0, bad]))
