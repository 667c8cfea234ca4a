"""Judgements and scores, and the Protocol of the backends that generate."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

from real_openrlhf.algo.sampling import Sampling
from real_openrlhf.data.prompt import Prompt

if TYPE_CHECKING:  # it needs torch, which command lines do without until their flags are parsed
    from real_openrlhf.algo.types import Group

# Key of a judgement in an output row.
RESULT = "judgement"
# Room for the prompt in an engine of the judge's own.
MAX_PROMPT_TOKENS = 3072
CALIBRATION_METHODS = ("isotonic", "linear")
# What a policy's labels are to a judge that rewards it: a reference answer, a JSON object of parts, nothing.
LABELS = ("reference", "parts", "unused")


class JudgeError(ValueError):
    """The judge cannot do what it was asked for; the message says what would work."""


class PromptTooLongError(JudgeError):
    """The prompt leaves no room for the judge's response."""


class JudgeBackend(Protocol):
    """Turns prompts into scored rollouts.

    The in-process engine and the server fit this Protocol, and so do the rollout engines of a training run
    (`controller.protocols.RolloutGroup`). A rollout's `score_logprobs` are NaN where the backend did not
    return a label's log-prob.

    The response to a prompt with `given_ids` has already begun with these ids: the backend continues it, and
    reads the score in the given and the generated ids together. Rollout.token_ids then holds both.
    """

    def generate(self, prompts: Sequence[Prompt], sampling: Sampling) -> list[Group]:
        """One group of sampling.n rollouts per prompt, in the prompts' order."""
        ...


@dataclass(frozen=True, kw_only=True)
class Judgement:
    """One response of the judge, with its score read. Scores are in units of the scale; nothing is imputed.

    token_ids       the whole response: generated ids, and those of a forced anchor
    text            token_ids decoded, with special tokens
    feedback        the text before the answer anchor, without special tokens
    position        index of the score token in token_ids; None: no score, `reason` says why
    reason          one of `algo.types.REASONS`, or None. "off_scale": there is a distribution, but no decoded score
    forced          no score was written, so the anchor was appended to the response
    label_logprobs  [S] log-probs of the labels over the full vocabulary; None without a position; an
                    entry is None where the server did not return it
    expected        E[score], the RAIL prediction; None without a position or with a missing label
    decoded         value of the written label ("Standard"); None where none was written
    mass            probability on the scale; None if `expected` is
    entropy         of the distribution given that the score is on the scale, in nats; None if `expected` is
    finish_reason   why generation ended before any forced anchor: "stop" or "length"
    n_generated     number of tokens that the model wrote, without the forced anchor

    Example, scale "1".."3", greedy "fine, So the overall score is 3": position 7, decoded 3.0,
    label_logprobs (-4.6, -1.6, -0.25), expected 2.75, mass 0.99.
    """

    token_ids: tuple[int, ...]
    text: str
    feedback: str
    position: int | None
    reason: str | None
    forced: bool
    label_logprobs: tuple[float | None, ...] | None
    expected: float | None
    decoded: float | None
    mass: float | None
    entropy: float | None
    finish_reason: str
    n_generated: int

    @property
    def feedback_ids(self) -> tuple[int, ...]:
        """All ids before the score token; `scoring.score_given` can read the score again after these."""
        return self.token_ids[: self.position]

    @property
    def complete(self) -> bool:
        """Whether there is a score position, and the backend returned every label's log-prob."""
        return self.expected is not None

    @property
    def missing(self) -> int:
        """Number of labels whose log-prob the backend did not return."""
        return sum(value is None for value in self.label_logprobs or ())


@dataclass(frozen=True, kw_only=True)
class Score:
    """The score of one response: n judgements averaged (average-of-N).

    score         mean E[score] over the samples that have one; None when none has
    decoded       mean decoded score over the samples that have one; None when none has
    distribution  label -> probability, mean over the samples with a score position. A label's value is None if it is
                  missing for one of these samples; the whole is None without such a sample. Probabilities are over
                  the full vocabulary, so they need not add up to 1.
    mass          mean probability on the scale
    entropy       in nats, of `distribution` given that the score is on the scale
    feedback      of the first sample
    reason        why there is no score: the first sample's reason, or "missing_labels"
    n_forced      number of samples with a forced anchor
    n_invalid     number of samples without a readable score, even with a forced anchor
    samples       all n
    calibrated    `score` after calibration, if the judge calibrates
    dimensions    name -> Score for a rubric of several dimensions. score, decoded and calibrated are then means over
                  them; distribution, mass, entropy and samples are found in the dimensions only
    """

    score: float | None
    decoded: float | None
    distribution: dict[str, float | None] | None
    mass: float | None
    entropy: float | None
    feedback: str
    reason: str | None
    n_forced: int
    n_invalid: int
    samples: tuple[Judgement, ...] = ()
    calibrated: float | None = None
    dimensions: dict[str, Score] = field(default_factory=dict)
