"""From a trainer's plain tensors to REAL's: where each score stands, and the labels' log-probs there.

Letters: N rollouts, L columns of [prompt | response | padding], S labels of the scale, V vocabulary. Column t of a
[N, L - 1] mask is about the token in column t + 1, which the logits of column t predict; this is OpenRLHF's and TRL's
way of counting.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from real_openrlhf.algo.score_position import ScoreReader
from real_openrlhf.algo.score_rows import ScoreRows
from real_openrlhf.dropin.settings import DropInError


@dataclass(frozen=True, kw_only=True)
class Scores:
    """Where the scores of N rollouts stand.

    readable      [N] bool: there is a score position
    column        [N] int64: the column of the score's token, 0 where not readable
    sampled       [N] int64: index of the written label, -1 where none was written
    feedback_mask [N, L - 1] bool: the tokens that carry Term 1: the feedback up to the score, or the whole response
                  of a rollout that is not readable
    rows          the labels' tokens of each readable rollout
    """

    readable: Tensor
    column: Tensor
    sampled: Tensor
    feedback_mask: Tensor
    rows: ScoreRows


def read_scores(sequences: Tensor, attention_mask: Tensor, action_mask: Tensor, reader: ScoreReader) -> Scores:
    """Find the scores in token ids; text is never tokenized again.

    sequences       [N, L] int64: prompt, response, then padding
    attention_mask  [N, L] of any dtype: 0 at padding
    action_mask     [N, L - 1] of any dtype: not 0 from the response's first token on; where it ends plays no part
    reader          `RealSettings.reader`; ScaleError for scales with labels of several tokens

    Everything comes back on the device of `sequences`. DropInError for shapes that do not belong together and for a
    rollout without a response.
    """
    n, width = sequences.shape
    if attention_mask.shape != (n, width) or action_mask.shape != (n, width - 1):
        raise DropInError(
            f"sequences [N, L] are {(n, width)}; attention_mask must be [N, L] and action_mask [N, L - 1], got "
            f"{tuple(attention_mask.shape)} and {tuple(action_mask.shape)}"
        )
    labels = [anchor.token_ids for anchor in reader.bound.anchors]
    masks = attention_mask.bool().cpu(), action_mask.bool().cpu()
    feedback = torch.zeros(n, width - 1, dtype=torch.bool)
    column, sampled, rows = [0] * n, [-1] * n, []
    for i, (ids, is_text, is_action) in enumerate(zip(sequences.cpu(), *masks)):
        if not bool(is_action.any()):
            raise DropInError(f"rollout {i} has no response: its action_mask is 0 throughout")
        start = int(is_action.int().argmax()) + 1
        end = int(is_text.nonzero()[-1]) + 1
        reading = reader.read(ids[start:end].tolist())
        until = end
        if reading.position is None or reading.anchor_index is None:
            rows.append(ScoreRows.empty(len(reader.bound.scale)))
        else:
            until = column[i] = start + reading.position
            sampled[i] = -1 if reading.label_index is None else reading.label_index
            rows.append(ScoreRows.single(reading.position, labels[reading.anchor_index]))
        feedback[i, start - 1 : until - 1] = True
    device = sequences.device
    return Scores(
        readable=torch.tensor(column, device=device) > 0,
        column=torch.tensor(column, device=device),
        sampled=torch.tensor(sampled, device=device),
        feedback_mask=feedback.to(device),
        rows=ScoreRows.cat(rows).to(device),
    )


def label_logprobs(
    logits: Tensor, scores: Scores, *, attention_mask: Tensor | None = None, temperature: float = 1.0
) -> Tensor:
    """[N, S] log-probs of the scale's labels at the score positions, float32 or wider, with grad; 0 where unreadable.

    logits          [N, L, V] of any float dtype; or packed, [1, tokens, V] of the rows without their padding, one
                    after another (OpenRLHF's --ds.packing_samples), for which attention_mask [N, L] is needed
    temperature     that the logits have not been divided by yet; OpenRLHF's Actor returns them divided
    """
    n, width = len(scores.readable), scores.feedback_mask.shape[1] + 1
    row = scores.readable.nonzero()[:, 0]
    column = scores.column[row] - 1
    if logits.dim() == 3 and logits.shape[:2] == (n, width):
        picked = logits[row, column]
    elif attention_mask is not None and logits.dim() == 3 and logits.shape[:2] == (1, int(attention_mask.sum())):
        packed = attention_mask.long().flatten().cumsum(0) - 1
        picked = logits[0, packed[row * width + column]]
    else:
        raise DropInError(
            f"logits must be [N, L, V] with N = {n} and L = {width}, or packed [1, tokens, V] with their "
            f"attention_mask, got {tuple(logits.shape)}; sequences that are split over ranks (--ds.ring_attn_size) "
            "cannot be read"
        )
    return scores.rows.label_logprobs(scores.rows.gather(picked, temperature))
