"""Turns groups into the tensors of a batch: the packed row, masks by position, targets, denominators."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from real_openrlhf.algo.packing import PromptLayout, Row, layout_of, rows_of, shared
from real_openrlhf.algo.score_rows import ScoreRows
from real_openrlhf.algo.types import Denominators, Targets

__all__ = ["Packed", "RealBatch", "Row", "collate", "denominators_of", "pack", "rows_of"]


@dataclass(frozen=True, kw_only=True)
class RealBatch:
    """N rollouts. The network's inputs are packed into one row (see `packing`); the loss's are [N, T], right-padded.

    The packed row is the micro-batch's one sequence of L tokens. A row of logits is one position of it, and a score row
    is a row of logits from which labels are read. M here: rows of logits that are computed.

    token_ids, position_ids   [L] int64, the packed row
    layout          where in it prompts and rollouts begin and end
    logit_index     [M] int64, ascending: positions in the row at which logits are needed, each once
    logit_row       [N, T] int64: which of these M predicts each token of the response, 0 at padding
    score_row       [R] int64: which of these M each score row is read from
    response_ids    [N, T] int64, 0 at padding
    response_mask, cot_mask, score_mask   [N, T] bool
    score_rows      the rows of all N rollouts
    readable        [N] bool
    cot, score, squared_error, likelihood   [N] float32
    targets            the N labels
    rollout_logprobs   [N, T] float32, 0 at padding; None where any response was given
    ref_logprobs       the same under the reference policy; None without a KL

    Example: a prompt of 3 tokens with rollouts of 2 and 1: L = 6, N = 2, T = 2. Token 2, the
    prompt's last, predicts the first token of both rollouts, token 3 the second of the first one:
    logit_index [2, 3], logit_row [[0, 1], [0, 0]].
    """

    token_ids: Tensor
    position_ids: Tensor
    layout: PromptLayout
    logit_index: Tensor
    logit_row: Tensor
    score_row: Tensor
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
    targets: Targets
    rollout_logprobs: Tensor | None
    ref_logprobs: Tensor | None = None

    def __len__(self) -> int:
        return len(self.response_ids)

    def to(self, device: torch.device | str) -> RealBatch:
        moved: dict[str, Any] = {
            name: value.to(device) if isinstance(value, Tensor | ScoreRows | Targets) else value
            for name, value in vars(self).items()
        }
        return RealBatch(**moved)


def denominators_of(rows: Sequence[Row], *, trains_score_token: bool) -> Denominators:
    """This rank's part of the denominators of an optimizer step."""
    scored = sum(r.rollout.score_length for r in rows) if trains_score_token else 0
    return Denominators(
        rollouts=float(len(rows)),
        action_tokens=float(sum(int(r.rollout.feedback_mask.sum()) for r in rows) + scored),
        response_tokens=float(sum(r.length for r in rows)),
    )


def collate(rows: Sequence[Row]) -> RealBatch:
    """One batch of these rollouts, in their order. Neighbours of one group share its prompt in the packed row."""
    n, width = len(rows), max(1, max(r.length for r in rows))
    response_ids = torch.zeros(n, width, dtype=torch.int64)
    response_mask = torch.zeros(n, width, dtype=torch.bool)
    cot_mask = torch.zeros(n, width, dtype=torch.bool)
    score_mask = torch.zeros(n, width, dtype=torch.bool)
    given = any(r.rollout.logprobs is None for r in rows)
    rollout_logprobs = None if given else torch.zeros(n, width)
    for i, row in enumerate(rows):
        rollout = row.rollout
        length, position = row.length, rollout.reading.position
        response_ids[i, :length] = rollout.token_ids
        response_mask[i, :length] = True
        cot_mask[i, :length] = rollout.feedback_mask
        if position is not None:
            score_mask[i, position : position + rollout.score_length] = True
        if rollout_logprobs is not None:
            assert rollout.logprobs is not None
            rollout_logprobs[i, :length] = rollout.logprobs

    def per_row(name: str) -> Tensor:
        return torch.stack([getattr(r.group.coefficients, name)[r.index] for r in rows]).float()

    score_rows = ScoreRows.cat([r.rollout.score_rows for r in rows])
    return RealBatch(
        **_packed(rows, score_rows, response_mask),
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
        targets=Targets.of([r.group.target for r in rows]),
        rollout_logprobs=rollout_logprobs,
        ref_logprobs=_ref_logprobs(rows, width),
    )


@dataclass(frozen=True, kw_only=True)
class Packed:
    """A packed row (see `packing`) and, for each rollout, the indices of the T + 1 tokens that predict a next token.

    The first T predict the rollout's own tokens; the last, its final token, predicts what would come next.
    """

    token_ids: Tensor
    position_ids: Tensor
    layout: PromptLayout
    predictors: list[Tensor]


def pack(groups: Sequence[tuple[Tensor, Sequence[Tensor]]]) -> Packed:
    """Pack groups, each a prompt [P] and its responses [T], into one row."""
    layout = layout_of([(len(prompt), [len(r) for r in responses]) for prompt, responses in groups])
    positions, predictors = [], []
    for group in layout.groups:
        positions.append(torch.arange(group.prompt))
        start = group.end_of_prompt
        for length in group.responses:
            positions.append(torch.arange(group.prompt, group.prompt + length))
            own = torch.arange(start, start + length)
            predictors.append(torch.cat([torch.tensor([group.end_of_prompt - 1]), own]))
            start += length
    return Packed(
        token_ids=torch.cat([ids for prompt, responses in groups for ids in (prompt, *responses)]),
        position_ids=torch.cat(positions),
        layout=layout,
        predictors=predictors,
    )


def _packed(rows: Sequence[Row], score_rows: ScoreRows, response_mask: Tensor) -> dict[str, Any]:
    """The fields of the packed row, and where in it each response token and score row is predicted."""
    n = len(rows)
    # Sequences in the order in which score rows number them: the responses, then the branches with forced labels.
    sequences = [r.rollout.token_ids for r in rows]
    sequences += [branch.sequence(sequences[branch.rollout]) for branch in score_rows.branches]
    groups, order, start = [], [], 0
    for part in shared(rows):
        own = range(start, start + len(part))
        here = [*own, *(n + b for b, branch in enumerate(score_rows.branches) if branch.rollout in own)]
        groups.append((part[0].group.group.prompt_ids, [sequences[i] for i in here]))
        order += here
        start += len(part)
    packed = pack(groups)
    predictors = dict(zip(order, packed.predictors, strict=True))
    table = torch.nn.utils.rnn.pad_sequence([predictors[i] for i in range(len(sequences))], batch_first=True)
    width = min(table.shape[1], response_mask.shape[1])
    token_index = table[:n, :width][response_mask[:, :width]]
    score_index = table[score_rows.sequence, score_rows.position]
    logit_index, row = torch.cat([token_index, score_index]).unique(return_inverse=True)
    token_row, score_row = row.split([len(token_index), len(score_index)])
    return {
        "token_ids": packed.token_ids,
        "position_ids": packed.position_ids,
        "layout": packed.layout,
        "logit_index": logit_index,
        "logit_row": torch.zeros_like(response_mask, dtype=torch.int64).masked_scatter(response_mask, token_row),
        "score_row": score_row,
    }


def _ref_logprobs(rows: Sequence[Row], width: int) -> Tensor | None:
    """[N, T], 0 at padding; None when no row has any."""
    if all(r.group.ref_logprobs is None for r in rows):
        return None
    table = torch.zeros(len(rows), width)
    for i, row in enumerate(rows):
        if row.group.ref_logprobs is None:
            raise ValueError("some groups of the batch have log-probs of the reference policy, others have none")
        logprobs = row.group.ref_logprobs[row.index]
        table[i, : logprobs.numel()] = logprobs
    return table
