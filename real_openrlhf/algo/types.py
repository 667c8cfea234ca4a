"""The data classes of the algorithm: a rollout, a group of rollouts, and what goes into and comes out of the loss.

Axis letters, used in names and shapes throughout the package:

    K  rollouts of one prompt (a group)      S  labels on the score scale
    N  rollouts of a batch or micro-batch    M  inner nodes of the label trie
    P  prompt tokens                         C  children of one trie node
    T  response tokens                       R  score rows
    V  vocabulary                            L  tokens of a packed row

Other letters are explained where they are used. Two words have two uses. A group's "label" is the human score y, any
number within the scale; everywhere else (label_logprobs, label_index, S) a label is one of the strings that may be
written as a score, and a Target is y by its two neighbours on the scale. "Feedback" and "chain of thought" (cot) are
the same; the loss term "cot" is Term 1, with the sampled score's part where an objective trains it.

Torch is the only import here and in all of `real_openrlhf.algo`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from real_openrlhf.algo.dtypes import upcast
from real_openrlhf.algo.score_rows import ScoreRows
from real_openrlhf.algo.target import Target

# Why a rollout has no score, or has one that cannot be decoded. Kept as words: they go to logs.
NO_ANCHOR = "no_anchor"  # the answer anchor was never written
TRUNCATED = "truncated"  # the response ended inside or right after the anchor, before a score token
SPLIT_ANCHOR = "split_anchor"  # the anchor ends in the middle of a token: no position predicts the score's first token
OFF_SCALE = "off_scale"  # a score was written that is not a label; the score position still exists
REASONS = (NO_ANCHOR, TRUNCATED, SPLIT_ANCHOR, OFF_SCALE)


@dataclass(frozen=True, kw_only=True)
class ScoreReading:
    """Where in a response the score is, and what was written there.

    position     index into the response of the (first) score token; None: the rollout is invalid
    label_index  index of the written label on the scale; None: what was written is not a label
    reason       one of REASONS when position or label_index is None, else None
    anchor_index which of the template's anchors was found; None without one

    A position without a label (reason "off_scale") is readable: the score distribution exists,
    and REAL's reward is a function of that distribution, not of the sampled token. Only the
    decoded score is missing.
    """

    position: int | None
    label_index: int | None
    reason: str | None
    anchor_index: int | None

    @property
    def readable(self) -> bool:
        return self.position is not None


@dataclass(frozen=True, kw_only=True)
class Rollout:
    """One response: sampled, exactly as the engine produced it (token in, token out), or given by a data set.

    token_ids       [T] int64, the sampled ids, a final end-of-text token included if it was sampled
    logprobs        [T] float32, log-prob of each sampled id under the engine's weights, over the full vocabulary at
                    the sampling temperature; None: the response was given
    reading         where the score stands
    score_rows      R = 0 rows for an unreadable rollout; else one per inner node of the label trie, so one where every
                    label is a single token
    score_logprobs  [R, C] float32, log-probs of the candidate tokens at each score row, at the same temperature; NaN
                    where the response was given
    finish_reason   "stop" or "length"
    text            the decoded response, for logs only

    Example, scale "1".."3", response "ok Score: 2<eos>" with ids [7, 9, 4, 0]: logprobs has 4
    entries, reading.position == 2, score_rows.position == [2], score_logprobs [[-2.1, -0.3, -2.0]].
    """

    token_ids: Tensor
    logprobs: Tensor | None
    reading: ScoreReading
    score_rows: ScoreRows
    score_logprobs: Tensor
    finish_reason: str
    text: str = ""

    @property
    def cot_length(self) -> int:
        """Tokens of the chain of thought: all before the score; without a score, the whole response.

        The whole response, end of text included, is the reason why a rollout has no score, so Term 1
        applies to all of it.
        """
        return int(self.token_ids.numel()) if self.reading.position is None else self.reading.position

    @property
    def feedback_mask(self) -> Tensor:
        """[T] bool: the tokens that are learned as feedback.

        Of a sampled response the first `cot_length`: tokens after the score did not influence it. Of a given response
        (warm-up) all but the score's, the end of text included.
        """
        n = self.token_ids.numel()
        mask = torch.arange(n) < self.cot_length
        if self.logprobs is None and self.reading.position is not None:
            mask[self.reading.position + self.score_length :] = True
        return mask

    @property
    def score_length(self) -> int:
        """Number of tokens that were sampled as the score: those at the trie's inner nodes, from the score position on.

        They decide which label was written. On "1".."10", "10" has two of them, and so has "1": the next
        token, which did not continue it to "10", decided too. 0 for a rollout without a score.
        """
        return int((self.score_rows.sequence < self.score_rows.n_rollouts).sum())


@dataclass(frozen=True, kw_only=True)
class Group:
    """One prompt with its K rollouts: the unit that travels from the engines to the policy.

    prompt_ids      [P] int64
    label           the human score y, possibly between two labels of the scale
    rollouts        K of them
    row             index of the prompt in its data set
    weight_version  version of the weights that sampled the rollouts
    """

    prompt_ids: Tensor
    label: float
    rollouts: tuple[Rollout, ...]
    row: int
    weight_version: int

    def __len__(self) -> int:
        return len(self.rollouts)


@dataclass(frozen=True, kw_only=True)
class Targets:
    """The targets of N rollouts (see `Target`).

    value, weight  [N] float64, or narrower
    low, high      [N] int64
    """

    value: Tensor
    low: Tensor
    high: Tensor
    weight: Tensor

    @classmethod
    def of(cls, targets: Sequence[Target]) -> Targets:
        return cls(
            value=torch.tensor([t.value for t in targets], dtype=torch.float64),
            low=torch.tensor([t.low for t in targets], dtype=torch.int64),
            high=torch.tensor([t.high for t in targets], dtype=torch.int64),
            weight=torch.tensor([t.weight for t in targets], dtype=torch.float64),
        )

    @classmethod
    def repeat(cls, target: Target, n: int) -> Targets:
        """One label for all n rollouts of a group."""
        return cls.of([target] * n)

    def __len__(self) -> int:
        return len(self.value)

    def __getitem__(self, rows: Any) -> Targets:
        """The targets of some rollouts. rows: whatever indexes a tensor's first axis and keeps it, such as a slice."""
        return Targets(value=self.value[rows], low=self.low[rows], high=self.high[rows], weight=self.weight[rows])

    def to(self, device: torch.device | str) -> Targets:
        return Targets(**{name: tensor.to(device) for name, tensor in vars(self).items()})


@dataclass(frozen=True, kw_only=True)
class GroupScores:
    """What an objective sees of one group.

    values          [S] float64, the scale's values, ascending
    label_logprobs  [K, S] float32, log-probs of the labels at each score position; 0 where not readable
    readable        [K] bool, a score position exists
    sampled         [K] int64, index of the written label, -1 where none was written
    target          the group's label
    """

    values: Tensor
    label_logprobs: Tensor
    readable: Tensor
    sampled: Tensor
    target: Target


@dataclass(frozen=True, kw_only=True)
class Coefficients:
    """The weights of each rollout's loss terms, [K] float64 each, without gradients, and what they were computed from.

    The loss of one rollout is, before aggregation,

        - cot * sum_t log pi(c_t) - score * log pi(sampled score)
        + squared_error * (E[score] - y)^2 - likelihood * log pi(y)

    rewards and advantages ([K] float64) are for logs. zero_variance: all rewards of the group are equal.
    floored: number of readable rollouts with a lower reward than an unreadable rollout gets.
    """

    cot: Tensor
    score: Tensor
    squared_error: Tensor
    likelihood: Tensor
    rewards: Tensor
    advantages: Tensor
    zero_variance: bool
    floored: int = 0

    def __post_init__(self) -> None:
        shape = self.cot.shape
        for name in ("score", "squared_error", "likelihood", "rewards", "advantages"):
            if getattr(self, name).shape != shape:
                raise ValueError(
                    f"Coefficients.{name} has shape {tuple(getattr(self, name).shape)}, cot {tuple(shape)}"
                )


@dataclass(frozen=True, kw_only=True)
class TrainGroup:
    """A group with the coefficients that the objective gave it: what the policy trains on.

    ref_logprobs  one [T] float32 per rollout, log-probs of its tokens under the reference policy; None without a KL
    """

    group: Group
    target: Target
    coefficients: Coefficients
    ref_logprobs: tuple[Tensor, ...] | None = None

    def __post_init__(self) -> None:
        if self.ref_logprobs is None:
            return
        lengths = [r.token_ids.numel() for r in self.group.rollouts]
        found = [r.numel() for r in self.ref_logprobs]
        if found != lengths:
            raise ValueError(f"TrainGroup.ref_logprobs has lengths {found}, the responses {lengths}")


@dataclass(frozen=True, kw_only=True)
class Denominators:
    """What sums are divided by, over all ranks and micro-batches of one optimizer step.

    rollouts         number of rollouts, the invalid included
    action_tokens    number of tokens that carry a policy-gradient coefficient (Term 1)
    response_tokens  number of response tokens
    """

    rollouts: float
    action_tokens: float
    response_tokens: float


@dataclass(frozen=True, kw_only=True)
class LossInputs:
    """Everything the fused loss reads for N rollouts. See `real_openrlhf.algo.loss`.

    float32 here means float32 or wider; narrower tensors are cast up. Padding may hold anything.

    token_logprobs    [N, T] float32 with grad: log pi of the sampled ids at the sampling temperature
    label_logprobs    [N, S] float32 with grad: log pi of the labels at the score positions
    readable          [N] bool: the rollout has a score position
    cot_mask          [N, T] bool: the tokens that cot weighs, see `Rollout.feedback_mask`
    score_mask        [N, T] bool: the tokens sampled as the score (all False where not readable)
    response_mask     [N, T] bool
    cot, score, squared_error, likelihood   [N] float32: the coefficients
    targets           the N labels
    values            [S] the scale's values
    rollout_logprobs  [N, T] float32: log-probs at sampling time; needed for ratio and importance weights
    ref_logprobs      [N, T] float32: log-probs under the reference policy; needed for KL
    entropy           [N, T] float32 with grad: entropy of each row; needed for the bonus
    """

    token_logprobs: Tensor
    label_logprobs: Tensor
    readable: Tensor
    cot_mask: Tensor
    score_mask: Tensor
    response_mask: Tensor
    cot: Tensor
    score: Tensor
    squared_error: Tensor
    likelihood: Tensor
    targets: Targets
    values: Tensor
    rollout_logprobs: Tensor | None = None
    ref_logprobs: Tensor | None = None
    entropy: Tensor | None = None


@dataclass(frozen=True, kw_only=True)
class LossOutputs:
    """
    loss   scalar with grad
    terms  each summand of the loss, with grad, before loss_scale
    sums   sums for metrics over this micro-batch, without grad. They are added up over micro-batches and ranks
           before they are divided (metrics never average averages)
    """

    loss: Tensor
    terms: dict[str, Tensor]
    sums: dict[str, float] = field(default_factory=dict)


def group_scores(group: Group, values: Tensor, target: Target) -> GroupScores:
    """What an objective needs of a group, from the log-probs that came back with the rollouts."""
    label_logprobs = torch.stack([r.score_rows.label_logprobs(r.score_logprobs)[0] for r in group.rollouts])
    sampled = [-1 if r.reading.label_index is None else r.reading.label_index for r in group.rollouts]
    return GroupScores(
        values=values,
        label_logprobs=upcast(label_logprobs),
        readable=torch.tensor([r.reading.readable for r in group.rollouts], dtype=torch.bool),
        sampled=torch.tensor(sampled, dtype=torch.int64),
        target=target,
    )


def count_reasons(groups: Sequence[Group]) -> dict[str, int]:
    """How many rollouts have each reason in REASONS (also the readable ones that are off the scale)."""
    counts = dict.fromkeys(REASONS, 0)
    for group in groups:
        for rollout in group.rollouts:
            if rollout.reading.reason is not None:
                counts[rollout.reading.reason] += 1
    return counts
