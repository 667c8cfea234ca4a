"""Synthetic rollouts of one prompt, with the same token ids for every contestant."""

from __future__ import annotations

import math

import torch

from examples.benchmark.protocol import Case
from real_openrlhf.algo.score_rows import ScoreRows
from real_openrlhf.algo.score_scale import ScoreScale
from real_openrlhf.algo.types import Group, Rollout, ScoreReading

SCALE = ScoreScale.parse("1-5")
# Ids of the scores "1" to "5"; smaller ids are padding and end of text.
SCORE_IDS = (3, 4, 5, 6, 7)
END_ID = 1
# A response ends in a score and the end of text.
SHORTEST_RESPONSE = 3


def make_group(case: Case, *, seed: int, vocabulary: int) -> Group:
    """case.samples rollouts of exactly case.response random ids on a prompt of case.prompt; all scores readable.

    The scores are written in turn, and every rollout has another score distribution, so that rewards differ.
    ValueError for a case that cannot be run.
    """
    if case.response < SHORTEST_RESPONSE or case.prompt < 1 or case.samples < 2:
        raise ValueError(
            f"a case needs a prompt of 1 token, 2 rollouts and responses of {SHORTEST_RESPONSE}, got {case}"
        )
    if case.micro_batch < 1 or case.samples % case.micro_batch:
        raise ValueError(f"micro_batch must divide samples, got {case}")
    if vocabulary <= SCORE_IDS[-1] + 1:
        raise ValueError(f"the vocabulary of {vocabulary} tokens has none besides the scores")
    generator = torch.Generator().manual_seed(seed)

    def ids(n: int) -> torch.Tensor:
        return torch.randint(SCORE_IDS[-1] + 1, vocabulary, (n,), generator=generator)

    prompt = ids(case.prompt)
    position = case.response - 2
    rollouts = []
    for k in range(case.samples):
        label = k % len(SCORE_IDS)
        end = torch.tensor([SCORE_IDS[label], END_ID])
        rollouts.append(
            Rollout(
                token_ids=torch.cat([ids(position), end]),
                # An on-policy step does not read them; they have the size of an untrained model's.
                logprobs=torch.full((case.response,), -math.log(vocabulary)),
                reading=ScoreReading(position=position, label_index=label, reason=None, anchor_index=0),
                score_rows=ScoreRows.single(position, SCORE_IDS),
                score_logprobs=torch.randn(1, len(SCORE_IDS), generator=generator).log_softmax(-1),
                finish_reason="stop",
            )
        )
    target = float(torch.randint(1, len(SCORE_IDS) + 1, (), generator=generator))
    return Group(prompt_ids=prompt, label=target, rollouts=tuple(rollouts), row=0, weight_version=0)
