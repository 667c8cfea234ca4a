"""What one rollout is worth: its reward, whether its score is right, and what is logged of it."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from real_openrlhf.algo.score_stats import score_stats
from real_openrlhf.algo.target import Target
from real_openrlhf.algo.types import Rollout, Targets
from real_openrlhf.dropin.settings import DropInError, RealSettings


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """
    reward    r = -(E[score] - y)^2 + lambda log p(y), or the floor where the score cannot be read
    accuracy  1.0 where the written score is nearest to y, else 0.0
    readable  there is a score position
    expected, error, mass   E[score], |E[score] - y| and the probability on the scale; None where not readable
    """

    reward: float
    accuracy: float
    readable: bool
    expected: float | None
    error: float | None
    mass: float | None

    def logs(self) -> dict[str, float]:
        """Numbers for OpenRLHF, which logs their mean over all rollouts and cannot leave one out.

        Those that do not exist count 0, so that the mean over the readable rollouts is real_expected / real_readable,
        and so on. Every rollout has the same keys, which OpenRLHF needs.
        """
        return {
            "real_readable": float(self.readable),
            "real_accuracy": self.accuracy,
            "real_expected": self.expected or 0.0,
            "real_abs_error": self.error or 0.0,
            "real_mass": self.mass or 0.0,
        }


def outcome_of(rollout: Rollout, target: Target, settings: RealSettings) -> Outcome:
    """DropInError where the reward is not finite: the engine gave a label probability 0."""
    label_logprobs = rollout.score_rows.label_logprobs(rollout.score_logprobs).double()
    readable = rollout.reading.readable
    reward = float(settings.rewards(label_logprobs, torch.tensor([readable]), [target.value]))
    if not math.isfinite(reward):
        raise DropInError(
            f"the reward is {reward} for the label {target.value:g}: the engine's log-probs of the scale's labels are "
            f"{label_logprobs[0].tolist()}"
        )
    accuracy = float(settings.score_scale.is_correct(rollout.reading.label_index, target))
    expected = error = mass = None
    if readable:
        stats = score_stats(
            label_logprobs,
            settings.score_scale.tensor(),
            Targets.of([target]),
            renormalise=settings.renormalise,
        )
        expected, mass = float(stats.expected), float(stats.mass)
        error = abs(expected - target.value)
    return Outcome(reward=reward, accuracy=accuracy, readable=readable, expected=expected, error=error, mass=mass)
