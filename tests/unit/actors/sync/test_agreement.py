"""The agreement check on numbers worked out by hand."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from real_openrlhf.actors.sync.agreement import StaleWeights, check_agreement, mean_change, sync_ranks, timed

POLICY = [torch.tensor([-1.0, -2.0, -3.0]), torch.tensor([-0.5])]


def moved(*by: float) -> list[Tensor]:
    """The policy's log-probs, each moved by the given number."""
    return [POLICY[0] + torch.tensor(by[:3]), POLICY[1] + torch.tensor(by[3:])]


def test_one_engine() -> None:
    mean, largest, n_tokens = check_agreement(POLICY, [moved(0.01, -0.02, 0.0, 0.05)], 3, 0.1)
    assert (mean, largest, n_tokens) == (pytest.approx(0.02, rel=1e-5), pytest.approx(0.05, rel=1e-5), 4)


def test_equal_log_probs_differ_by_exactly_0() -> None:
    assert check_agreement(POLICY, [POLICY], 0, 1e-9) == (0.0, 0.0, 4)


def test_the_worst_engine_counts_and_tokens_add_up() -> None:
    # Means 0.01, 0.03, 0.02: the mean over engines would be 0.02, that over tokens too.
    engines = [moved(0.01, 0.01, -0.01, -0.01), moved(0.0, 0.06, 0.0, -0.06), moved(0.08, 0.0, 0.0, 0.0)]
    mean, largest, n_tokens = check_agreement(POLICY, engines, 1, 0.05)
    assert (mean, largest, n_tokens) == (pytest.approx(0.03, rel=1e-5), pytest.approx(0.08, rel=1e-5), 12)


def test_the_mean_is_over_tokens_not_over_sequences() -> None:
    # Over tokens 0.4 / 4, over sequences (0 + 0.4) / 2.
    assert check_agreement(POLICY, [moved(0, 0, 0, 0.4)], 1, 0.11)[0] == pytest.approx(0.1, rel=1e-5)


def test_a_single_stale_engine_stops_the_run() -> None:
    with pytest.raises(StaleWeights) as caught:
        check_agreement(POLICY, [POLICY, moved(0.1, 0.1, 0.1, 0.5)], 7, 0.05)
    message = str(caught.value)
    assert "after weight sync 7, log-probs of engine 1 " in message and "over 4 tokens" in message
    assert "2.00e-01" in message and "5.00e-01" in message and "5.00e-02 (--sync.max_mean_difference)" in message


def test_the_threshold_itself_passes() -> None:
    policy, engine = [torch.tensor([-1.0, -2.0])], [torch.tensor([-1.25, -2.25])]
    assert check_agreement(policy, [engine], 0, 0.25)[0] == 0.25
    with pytest.raises(StaleWeights):
        check_agreement(policy, [engine], 0, math.nextafter(0.25, 0))


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("side", ["policy", "engine", "both"])
def test_what_is_not_finite_fails(value: float, side: str) -> None:
    bad, good = [torch.tensor([-1.0, value])], [torch.tensor([-1.0, -2.0])]
    policy, engine = (good if side == "engine" else bad), (good if side == "policy" else bad)
    says = "log-probs of engine 0 differ" if side == "engine" else "the policy's own log-probs are NaN or infinite"
    with pytest.raises(StaleWeights, match=says):
        check_agreement(policy, [engine], 0, 1e9)


@pytest.mark.parametrize(
    "engine",
    [
        [POLICY[0]],
        [POLICY[0][:2], POLICY[1]],
        [POLICY[0][:1], torch.zeros(3)],  # as many tokens, of other sequences
        [*POLICY, torch.zeros(1)],
        [],
    ],
)
def test_a_wrong_number_of_log_probs_fails(engine: list[Tensor]) -> None:
    with pytest.raises(StaleWeights, match=r"engine 1 returned \[.*\] log-probs for probes of \[3, 1\] tokens"):
        check_agreement(POLICY, [POLICY, engine], 0, 1e9)


def test_no_tokens_prove_nothing() -> None:
    with pytest.raises(StaleWeights):
        check_agreement([torch.zeros(0)], [[torch.zeros(0)]], 0, 1.0)


def test_low_precision_is_compared_in_float64() -> None:
    policy = [torch.tensor([-1.0, -2.0], dtype=torch.bfloat16)]
    engine = [torch.tensor([-1.001, -2.001])]
    assert check_agreement(policy, [engine], 0, 0.01)[0] == pytest.approx(1e-3, rel=1e-3)


def test_timed_fills_in_the_seconds_at_the_end() -> None:
    with timed() as clock:
        assert clock.seconds == 0.0
    assert clock.seconds > 0.0


@pytest.mark.parametrize(
    ("widths", "offsets", "world"),
    [([1], [1], 2), ([1, 1, 1], [1, 2, 3], 4), ([4, 4], [1, 5], 9), ([2, 2, 1], [1, 3, 5], 6)],
)
def test_ranks_of_the_sync_group(widths: list[int], offsets: list[int], world: int) -> None:
    assert sync_ranks(widths) == (offsets, world)
    workers = [offset + worker for offset, width in zip(offsets, widths) for worker in range(width)]
    assert [0, *workers] == list(range(world))  # rank 0 is the policy's


def test_the_change_since_the_last_sync_is_a_mean_over_tokens() -> None:
    before = [torch.tensor([-1.0, -2.0, -3.0]), torch.tensor([-4.0])]
    after = [torch.tensor([-1.5, -2.0, -2.5]), torch.tensor([-4.0])]
    assert mean_change(None, before) is None
    assert mean_change(before, before) == 0.0
    assert mean_change(before, after) == 0.25  # (0.5 + 0 + 0.5 + 0) / 4
