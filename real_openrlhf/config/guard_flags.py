"""Flags of the watches over a run (`controller.guards`)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from real_openrlhf.config.flags import Section, flag

# Name of a watch -> the fault that it looks for. `controller.guards` has one rule for each.
WATCHES = {
    "mass": "the score distribution leaves the scale",
    "reward": "the reward falls",
    "evaluation": "held-out prompts are judged worse than at the start",
    "scores": "E[score] is nearly the same for everything",
    "length": "responses are truncated, or there is no feedback",
    "entropy": "rollouts do not explore any more",
    "invalid": "too many rollouts have no score",
    "gap": "engine and policy compute different log-probs",
    "still": "the weights do not move",
    "dead": "nearly all groups have equal rewards",
    "repeated": "feedback repeats itself",
    "copied": "feedback copies the prompt",
    "mentions": "feedback no longer speaks of the response that it judges",
    "labels": "scores are no longer distributed as the labels",
    "terms": "one term's gradient is much larger than the other's",
}
# Signs, not damage itself: they only warn.
SIGNS = ("terms", "repeated", "copied", "mentions", "labels")
STOPPING = tuple(name for name in WATCHES if name not in SIGNS)


@dataclass(frozen=True, kw_only=True)
class GuardConfig(Section):
    prefix: ClassVar[str] = "guard"
    stop: tuple[str, ...] = flag(STOPPING, "watches that may stop the run, or none", choices=(*WATCHES, "none"))
    window: int = flag(10, "steps of a moving average, which is compared with that of the first so many steps", ge=1)
    warn_steps: int = flag(10, "warn when a watch has seen the same fault this many steps in a row", ge=1)
    stop_steps: int = flag(50, "stop when a watch has seen the same fault this many steps in a row", ge=1)
    stop_evaluations: int = flag(3, "the same for faults in evaluations, of which the first warns", ge=1)
    mass_drop: float | None = flag(0.05, "mass: fault when the mean mass is this far below its start; none: off", gt=0)
    reward_errors: float | None = flag(
        3.0, "reward: fault when its average is so many standard errors below its start; none: off", gt=0
    )
    evaluation: bool = flag(
        True, "evaluation: fault when reward or Pearson are below the start's, with the whole paired interval"
    )
    min_spread: float | None = flag(
        0.02, "scores: fault when the standard deviation of E[score] is below this share of the scale; none: off", gt=0
    )
    max_truncated: float | None = flag(
        0.5, "length: fault when more than this share of the responses is truncated; none: off", gt=0
    )
    min_cot: float | None = flag(1.0, "length: fault when feedback has fewer tokens on average; none: off", gt=0)
    min_entropy: float | None = flag(0.1, "entropy: fault when it is below this share of its start; none: off", gt=0)
    max_invalid: float | None = flag(
        0.75, "invalid: fault when more than this share of the rollouts has no score; none: off", gt=0
    )
    max_gap: float | None = flag(
        0.2, "gap: fault when rollout_gap/logprob_mean is above this, in nats per token; none: off", gt=0
    )
    min_move: float | None = flag(
        0.0, "still: fault when a step changes the policy's log-probs by no more than this; none: off", ge=0
    )
    max_dead: float | None = flag(
        0.9, "dead: fault when more than this share of the groups has equal rewards; none: off", gt=0, lt=1
    )
    repeated_rise: float | None = flag(
        0.3, "repeated: fault when feedback/repeated is this far above its start; none: off", gt=0
    )
    copied_rise: float | None = flag(
        0.3, "copied: fault when feedback/copied is this far above its start; none: off", gt=0
    )
    min_mentions: float | None = flag(
        0.25, "mentions: fault when feedback/mentions is below this share of its start; none: off", gt=0
    )
    label_distance_rise: float | None = flag(
        0.1, "labels: fault when score/label_distance is above its start by this share of the scale; none: off", gt=0
    )
    max_term_ratio: float | None = flag(
        100.0, "terms: fault when one gradient norm is this many times the other; none: off", gt=1
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if "none" in self.stop and len(self.stop) > 1:
            self.reject("stop", f"is none or a list of watches, not both, got {' '.join(self.stop)}")
        if self.stop_steps < self.warn_steps:
            self.reject("stop_steps", f"must be at least --guard.warn_steps {self.warn_steps}, got {self.stop_steps}")
