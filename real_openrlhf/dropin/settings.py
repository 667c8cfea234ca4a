"""What the drop-ins need to know of a judge, in one place: the same for the reward, the loss and the logs."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from real_openrlhf.algo.bound_scale import Tokenizer, bind_scale
from real_openrlhf.algo.objectives.real import RealObjective
from real_openrlhf.algo.rewards import real_rewards
from real_openrlhf.algo.score_position import ScoreReader
from real_openrlhf.algo.score_scale import DEFAULT_ANCHOR, ScoreScale
from real_openrlhf.algo.target import Target
from real_openrlhf.algo.types import GroupScores
from real_openrlhf.data.dataset import read_label


class DropInError(ValueError):
    """A setting, a label or a rollout that the drop-ins cannot use; the message says what would work."""


@dataclass(frozen=True, kw_only=True)
class RealSettings:
    """
    scale            the score scale, as in `ScoreScale.parse`: "1-5", "0,1,2", "1=Bad,2=Good"
    anchors          texts after which the score stands; the first that is found counts
    lam              lambda, the weight of log p(y) in the reward
    invalid_penalty  subtracted from the reward of a rollout without a readable score
    renormalise      E[score] and log p(y) from the distribution given that the score is on the scale
    """

    scale: str = "1-5"
    anchors: tuple[str, ...] = (DEFAULT_ANCHOR,)
    lam: float = 1.0
    invalid_penalty: float = 0.0
    renormalise: bool = False

    def __post_init__(self) -> None:
        for name in ("lam", "invalid_penalty"):
            value = getattr(self, name)
            if not math.isfinite(value) or value < 0:
                raise DropInError(f"RealSettings.{name} must be a number >= 0, got {value!r}")
        if isinstance(self.anchors, str) or not self.anchors:
            raise DropInError(f"RealSettings.anchors must be a tuple of texts, got {self.anchors!r}")
        _ = self.score_scale  # ScaleError now and not in the first rollout

    @cached_property
    def score_scale(self) -> ScoreScale:
        return ScoreScale.parse(self.scale)

    def reader(self, tokenizer: Tokenizer, end_ids: Collection[int]) -> ScoreReader:
        """Finds scores in token ids. end_ids: those that end a response. ScaleError for labels without own tokens."""
        return ScoreReader.build(bind_scale(self.score_scale, tokenizer, self.anchors), tokenizer, end_ids)

    def target(self, label: object) -> Target:
        """A label, a number or a numeric text, as the formulas need it. ValueError, with the scale, for all else."""
        return self.score_scale.target(read_label(label, self.score_scale))

    def rewards(self, label_logprobs: Tensor, readable: Tensor, labels: Sequence[object]) -> Tensor:
        """r = -(E[score] - y)^2 + lam log p(y) of N rollouts, float64; what `RealObjective` gives a group.

        label_logprobs  [N, S] log p of the scale's labels at the score position; anything where not readable
        readable        [N] bool: a rollout without a score gets the floor of `algo.rewards.real_rewards`
        labels          N human scores; the prompts of a batch may differ
        """
        if label_logprobs.shape != (len(labels), len(self.score_scale)) or readable.shape != (len(labels),):
            raise DropInError(
                f"{len(labels)} labels on a scale of {len(self.score_scale)} need label_logprobs [N, S] and readable "
                f"[N], got {tuple(label_logprobs.shape)} and {tuple(readable.shape)}"
            )
        rewards = []
        for row, label in enumerate(labels):
            parts = real_rewards(
                self.group_scores(label_logprobs[row : row + 1], readable[row : row + 1], self.target(label)),
                answer="logprob",
                invalid_penalty=self.invalid_penalty,
                renormalise=self.renormalise,
            )
            rewards.append(parts.regression + self.lam * parts.answer)
        return torch.cat(rewards) if rewards else torch.zeros(0, dtype=torch.float64)

    def objective(self, *, beta: float = 1.0, tolerance: float = 1e-6) -> RealObjective:
        """The same settings as an objective: rewards, advantages and the weights of both terms of a whole group."""
        return RealObjective(
            lam=self.lam,
            beta=beta,
            tolerance=tolerance,
            invalid_penalty=self.invalid_penalty,
            renormalise=self.renormalise,
        )

    def group_scores(self, label_logprobs: Tensor, readable: Tensor, target: Target) -> GroupScores:
        """Rollouts of one prompt as objectives see them. REAL does not look at the sampled score: -1 throughout."""
        label_logprobs, readable = label_logprobs.detach().cpu(), readable.cpu()
        return GroupScores(
            values=self.score_scale.tensor(),
            label_logprobs=torch.where(readable[:, None], label_logprobs, 0.0),
            readable=readable,
            sampled=torch.full((len(readable),), -1),
            target=target,
        )
