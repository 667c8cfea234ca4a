"""Groups become tensors here: masks by position, padding, targets, denominators."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from real_openrlhf.algo.score_rows import ScoreRows
from real_openrlhf.algo.types import Denominators, Rollout, TrainGroup


@dataclass(frozen=True, kw_only=True)
class RealBatch:
    """N rollouts as rows [left-padded prompt | right-padded response]; all responses start at column P.

    input_ids       [N + B, P + T] int64; the last B rows are the branches of score_rows, in their order
    attention_mask  [N + B, P + T] bool, by position (the padding id may be the end of text)
    response_ids    [N, T] int64, 0 at padding
    response_mask, cot_mask, score_mask   [N, T] bool
    score_rows      the rows of all N rollouts
    readable        [N] bool
    cot, score, squared_error, likelihood, target_value, target_weight   [N] float32
    target_low, target_high   [N] int64
    rollout_logprobs   [N, T] float32, 0 at padding

    Logits are needed at columns P - 1 .. P + T - 2, which predict the response: `logit_columns`.

    Example: prompts of 3 and 2 tokens, responses of 2 and 1: P = 3, T = 2, N = 2,
    attention_mask [[1,1,1,1,1],[0,1,1,1,0]].
    """

    input_ids: Tensor
    attention_mask: Tensor
    response_ids: Tensor
    response_mask: Tensor
    cot_mask: Tensor
    score_mask: Tensor
    score_rows: ScoreRows
    readable: Tensor
    cot: Tensor
    score: Tensor
    squared_error: Tensor
    likelihood: Tensor
    target_value: Tensor
    target_low: Tensor
    target_high: Tensor
    target_weight: Tensor
    rollout_logprobs: Tensor

    @property
    def logit_columns(self) -> Tensor:
        """[T] int64, the columns whose logits predict the response tokens."""
        length, width = self.input_ids.shape[1], self.response_ids.shape[1]
        return torch.arange(length - width - 1, length - 1, device=self.input_ids.device)

    def to(self, device: torch.device | str) -> RealBatch:
        return RealBatch(**{name: value.to(device) for name, value in vars(self).items()})


@dataclass(frozen=True, kw_only=True)
class Row:
    """One rollout with its prompt and coefficients: an index into a TrainGroup, not a copy."""

    group: TrainGroup
    index: int

    @property
    def rollout(self) -> Rollout:
        return self.group.group.rollouts[self.index]


def rows_of(groups: Sequence[TrainGroup]) -> list[Row]:
    """The rollouts of all groups, groups in order, so that a micro-batch holds neighbours."""
    return [Row(group=g, index=i) for g in groups for i in range(len(g.group))]


def denominators_of(rows: Sequence[Row], *, trains_score_token: bool) -> Denominators:
    """What this rank adds to the denominators of an optimizer step."""
    scored = sum(r.rollout.score_length for r in rows) if trains_score_token else 0
    return Denominators(
        rollouts=float(len(rows)),
        action_tokens=float(sum(r.rollout.cot_length for r in rows) + scored),
        response_tokens=float(sum(r.rollout.token_ids.numel() for r in rows)),
    )


def collate(rows: Sequence[Row], *, pad_id: int) -> RealBatch:
    """Rows -> one padded batch."""
    n = len(rows)
    score_rows = ScoreRows.cat([r.rollout.score_rows for r in rows])
    # What the network reads: the responses, and behind them the labels that are written by force.
    owners = [*rows, *(rows[branch.rollout] for branch in score_rows.branches)]
    sequences = [r.rollout.token_ids for r in rows]
    sequences += [branch.sequence(rows[branch.rollout].rollout.token_ids) for branch in score_rows.branches]
    prompt_width = max(r.group.group.prompt_ids.numel() for r in rows)
    width = max(1, max(s.numel() for s in sequences))
    input_ids = torch.full((len(sequences), prompt_width + width), pad_id, dtype=torch.int64)
    attention_mask = torch.zeros(len(sequences), prompt_width + width, dtype=torch.bool)
    for i, (owner, sequence) in enumerate(zip(owners, sequences)):
        prompt = owner.group.group.prompt_ids
        start, end = prompt_width - prompt.numel(), prompt_width + sequence.numel()
        input_ids[i, start:end] = torch.cat([prompt, sequence])
        attention_mask[i, start:end] = True
    response_ids = torch.zeros(n, width, dtype=torch.int64)
    response_mask = torch.zeros(n, width, dtype=torch.bool)
    cot_mask = torch.zeros(n, width, dtype=torch.bool)
    score_mask = torch.zeros(n, width, dtype=torch.bool)
    rollout_logprobs = torch.zeros(n, width)
    for i, row in enumerate(rows):
        rollout = row.rollout
        length, position = rollout.token_ids.numel(), rollout.reading.position
        response_ids[i, :length] = rollout.token_ids
        response_mask[i, :length] = True
        cot_mask[i, : rollout.cot_length] = True
        if position is not None:
            score_mask[i, position : position + rollout.score_length] = True
        rollout_logprobs[i, :length] = rollout.logprobs

    def per_row(name: str) -> Tensor:
        return torch.stack([getattr(r.group.coefficients, name)[r.index] for r in rows]).float()

    targets = [r.group.target for r in rows]
    return RealBatch(
        input_ids=input_ids,
        attention_mask=attention_mask,
        response_ids=response_ids,
        response_mask=response_mask,
        cot_mask=cot_mask,
        score_mask=score_mask,
        score_rows=score_rows,
        readable=torch.tensor([r.rollout.reading.readable for r in rows]),
        cot=per_row("cot"),
        score=per_row("score"),
        squared_error=per_row("squared_error"),
        likelihood=per_row("likelihood"),
        target_value=torch.tensor([t.value for t in targets], dtype=torch.float32),
        target_low=torch.tensor([t.low for t in targets]),
        target_high=torch.tensor([t.high for t in targets]),
        target_weight=torch.tensor([t.weight for t in targets], dtype=torch.float32),
        rollout_logprobs=rollout_logprobs,
    )
