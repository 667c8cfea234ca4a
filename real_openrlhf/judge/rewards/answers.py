"""What is answered: the judge's E[score] as a reward. Nothing is imputed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from real_openrlhf.algo.score_scale import ScoreScale
from real_openrlhf.judge.rewards.requests import RequestError
from real_openrlhf.judge.types import PromptTooLongError, Score

# What one item came to: its score, or why it has none.
Outcome = Score | Exception


@dataclass(frozen=True, kw_only=True)
class Rewarding:
    """unscored: the reward where the judge's response has no readable score, or the prompt is too long for the judge;
    None: such a request fails."""

    scale: ScoreScale
    unscored: float | None = None

    def openrlhf(self, outcomes: Sequence[Outcome]) -> dict[str, Any]:
        """OpenRLHF's answer. Raises the first outcome that is an error.

        rewards     E[score], calibrated if the judge calibrates
        scores      the same with the scale's ends at 0 and 1, for --algo.dynamic_filtering_enable
        extra_logs  means over these have the share of `judge_scored` in them: what has no score counts 0
        """
        rewards, scored, masses, forced = [], [], [], []
        for i, outcome in enumerate(outcomes):
            value = self._reward(i, outcome)
            found = isinstance(outcome, Score) and reward_of(outcome) is not None
            rewards.append(value)
            scored.append(float(found))
            masses.append(outcome.mass if isinstance(outcome, Score) and outcome.mass is not None else 0.0)
            forced.append(float(outcome.n_forced) if isinstance(outcome, Score) else 0.0)
        low, high = min(self.scale.values), max(self.scale.values)
        return {
            "rewards": rewards,
            "scores": [(value - low) / (high - low) for value in rewards],
            "extra_logs": {"judge_scored": scored, "judge_mass": masses, "judge_forced": forced},
        }

    def _reward(self, index: int, outcome: Outcome) -> float:
        if isinstance(outcome, Score):
            value = reward_of(outcome)
            reason = f"the judge's response has no readable score ({outcome.reason})"
        else:
            value, reason = None, str(outcome)
            if not isinstance(outcome, PromptTooLongError):
                raise outcome
        if value is None:
            value = self.unscored
        if value is None:
            raise RequestError(
                f"item {index}: {reason}; --unscored_reward gives such responses a reward of your choice"
            )
        return value


def reward_of(score: Score) -> float | None:
    """E[score], as the stored calibration maps it if the judge calibrates; None without a readable score."""
    return score.score if score.calibrated is None else score.calibrated
