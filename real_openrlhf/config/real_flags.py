"""Flags of the method: REAL and its objectives, and the warm-up before it."""

# ruff: noqa: RUF009  (flag() makes a dataclass field)
from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from real_openrlhf.algo.choices import Aggregation, AnswerReward
from real_openrlhf.algo.objectives import OBJECTIVES
from real_openrlhf.algo.score_scale import DEFAULT_ANCHOR, ScaleError, ScoreScale
from real_openrlhf.config.flags import Section, flag
from real_openrlhf.config.presets import DEFAULT_PRESET

PresetName = Literal["exact", "paper", "reference", "warmup"]


@dataclass(frozen=True, kw_only=True)
class RealConfig(Section):
    prefix: ClassVar[str] = "real"
    preset: PresetName = flag(DEFAULT_PRESET, "named settings; flags and --config override single values")
    objective: str = flag("real", "what is trained; see algo/README.md", choices=tuple(OBJECTIVES))
    scale: str = flag("1-5", "the score scale: '1-5', '0,1,2' or '1=Bad,2=Good'")
    anchor: tuple[str, ...] = flag((DEFAULT_ANCHOR,), "text right before the score; the last one written counts")
    lam: float = flag(1.0, "lambda, weight of the label's likelihood in the reward", ge=0)
    beta: float = flag(1.0, "weight of Term 2, the reward's own gradient; 1 is the exact gradient", ge=0)
    answer_reward: AnswerReward = flag(
        "logprob", "label's log-prob, added to the reward, or its probability, with a separate advantage"
    )
    standardise: bool = flag(True, "divide advantages by their standard deviation within the group")
    advantage_clip: float | None = flag(1.0, "clip advantages to [-this, this]; none: off", gt=0)
    tolerance: float | None = flag(
        None, "a group whose rewards differ by less gets advantages of 0; none: 1e-6 in fp32, 0.1 in bf16", ge=0
    )
    invalid_penalty: float = flag(0.0, "subtracted from the reward of a rollout without a score", ge=0)
    renormalise: bool = flag(False, "E[score] from the probabilities on the scale alone, made to sum to 1")
    aggregation: Aggregation = flag("token_sum", "Term 1: sum over tokens per rollout, or mean over all tokens")
    ratio: Literal["auto", "clip", "none"] = flag("auto", "off-policy ratio; auto: clip, or none with a single update")
    mini_batches: int = flag(1, "updates per epoch over a step's rollouts, unless --train.batch_size says so", ge=1)
    keep_groups: Literal["partial", "some_right", "some_wrong", "all"] = flag(
        "partial", "dynamic sampling, by the share of correct scores a: 0 < a < 1, a > 0, a < 1, or off"
    )
    refill: bool = flag(True, "sample further prompts until the batch is full of kept groups")
    max_refills: int = flag(10, "further waves of generation that a step may take", ge=0)
    min_mass: float = flag(0.5, "stop after the first rollouts with less mean mass on the scale", ge=0, le=1)
    min_readable: float = flag(0.25, "stop after the first rollouts with a smaller share of scores", ge=0, le=1)
    dead_steps: int = flag(20, "stop after this many steps in a row without any advantage; 0: never", ge=0)
    max_skipped: int = flag(
        5, "stop after this many steps in a row whose update was skipped, for a number that is NaN; 0: never", ge=0
    )
    logits_mb: int | None = flag(
        None, "megabytes that logits may take in training; what does not fit is computed twice; none: by device", ge=1
    )
    device: Literal["auto", "cpu", "cuda"] = flag("auto", "where to train")

    def __post_init__(self) -> None:
        super().__post_init__()
        for anchor in self.anchor:
            if not anchor.strip():
                self.reject("anchor", f"is blank: {anchor!r}; give the text right before the score")
        try:
            ScoreScale.parse(self.scale)
        except ScaleError as error:
            self.reject("scale", f"cannot be used: {error}")

    @property
    def score_scale(self) -> ScoreScale:
        return ScoreScale.parse(self.scale)

    @property
    def filters_groups(self) -> bool:
        """Whether dynamic sampling is on."""
        return self.keep_groups != "all"


@dataclass(frozen=True, kw_only=True)
class WarmupConfig(Section):
    prefix: ClassVar[str] = "warmup"
    method: Literal["sft", "raft", "tract"] = flag(
        "raft", "train_warmup: cross-entropy; with the squared error of E[score]; or RAFT twice, on feedback of its own"
    )
    feedback: Literal["given", "missing", "sampled"] = flag(
        "given",
        "train_warmup: learn the feedback of the data; have the model write it where there is none; or everywhere",
    )
    patience: int | None = flag(
        None, "train_warmup: stop after this many evaluations in a row without a better judge; none: never", ge=1
    )
