"""SFT and RAFT: coefficients by hand, and the loss and its gradient against the paper's equation in float64."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from real_openrlhf.algo.batch import collate, denominators_of, rows_of
from real_openrlhf.algo.label_trie import TokenTrie
from real_openrlhf.algo.loss import LossOptions, policy_loss
from real_openrlhf.algo.objectives.supervised import RaftObjective, SftObjective
from real_openrlhf.algo.score_rows import ScoreRows
from real_openrlhf.algo.score_scale import ScoreScale
from real_openrlhf.algo.types import Group, LossInputs, Rollout, ScoreReading, TrainGroup, group_scores

VOCABULARY = 8
SCALE = ScoreScale.parse("1-3")


def given(token_ids: list[int], position: int, trie: TokenTrie, label: int) -> Rollout:
    rows = ScoreRows.of(trie, token_ids, position)
    return Rollout(
        token_ids=torch.tensor(token_ids),
        logprobs=None,
        reading=ScoreReading(position=position, label_index=label, reason=None, anchor_index=0),
        score_rows=rows,
        score_logprobs=torch.full(rows.token_ids.shape, math.nan),
        finish_reason="stop",
    )


def train_group(
    rollout: Rollout, label: float, objective: SftObjective | RaftObjective, scale: ScoreScale
) -> TrainGroup:
    group = Group(prompt_ids=torch.tensor([4, 4]), label=label, rollouts=(rollout,), row=0, weight_version=0)
    target = scale.target(label)
    return TrainGroup(group=group, target=target, coefficients=objective(group_scores(group, scale.tensor(), target)))


def test_coefficients() -> None:
    rollout = given([5, 6, 2, 0], 2, TokenTrie(((1,), (2,), (3,))), 1)
    sft = train_group(rollout, 2.25, SftObjective(), SCALE).coefficients
    assert (sft.cot.tolist(), sft.score.tolist(), sft.squared_error.tolist()) == ([1], [1], [0])
    raft = train_group(rollout, 2.25, RaftObjective(lam=0.5), SCALE).coefficients
    assert (raft.cot.tolist(), raft.score.tolist(), raft.squared_error.tolist()) == ([0.5], [0.5], [1])
    for found in (sft, raft):
        # The score's cross-entropy is that of the token as it is written; nothing else asks for its likelihood.
        assert found.likelihood.tolist() == [0] and not found.zero_variance


def test_what_follows_the_score_is_learned_too_and_each_token_once() -> None:
    rollout = given([5, 6, 2, 0], 2, TokenTrie(((1,), (2,), (3,))), 1)
    assert rollout.feedback_mask.tolist() == [True, True, False, True]
    # The token after a "1" that is no "10" decides that it is a "1": it is of the score.
    tens = given([5, 1, 0], 1, TokenTrie(((1,), (2,), (1, 7))), 0)
    assert tens.feedback_mask.tolist() == [True, False, False] and tens.score_length == 2
    sampled = replace(rollout, logprobs=torch.zeros(4))
    assert sampled.feedback_mask.tolist() == [True, True, False, False]


@pytest.mark.parametrize("aggregation", ["token_mean", "token_sum"])
@pytest.mark.parametrize(
    ("scale", "trie", "rows"),
    [
        ("1-3", ((1,), (2,), (3,)), [([5, 6, 2, 0], 2, 1, 2.25), ([3, 0], 0, 2, 3.0)]),
        ("1,2,10", ((1,), (2,), (1, 7)), [([5, 1, 7, 0], 1, 2, 10.0), ([6, 6, 1, 0], 2, 0, 1.0), ([2, 0], 0, 1, 4.0)]),
    ],
    ids=["1-3", "1,2,10"],
)
def test_the_loss_is_the_papers(scale: str, trie: tuple, rows: list, aggregation: str) -> None:
    """(E[score] - y)^2 - lambda log pi(c, y | x), with every probability written out from the logits."""
    lam, space, tree = 0.7, ScoreScale.parse(scale), TokenTrie(trie)
    groups = [train_group(given(ids, at, tree, label), y, RaftObjective(lam=lam), space) for ids, at, label, y in rows]
    flat = rows_of(groups)
    batch = collate(flat)
    assert batch.rollout_logprobs is None
    torch.manual_seed(0)
    # A network without context: one row of logits per row and position of the response.
    logits = torch.randn(len(rows), 6, VOCABULARY, dtype=torch.float64, requires_grad=True)
    logprobs = logits.log_softmax(-1)
    tokens = logprobs[:, : batch.response_ids.shape[1]].gather(2, batch.response_ids[..., None])[..., 0]
    read = torch.stack([logprobs[int(r), int(p)] for r, p in zip(batch.score_rows.rollout, batch.score_rows.position)])
    candidates = read.gather(1, batch.score_rows.token_ids.clamp(min=0)).masked_fill(
        batch.score_rows.token_ids < 0, -math.inf
    )
    inputs = LossInputs(
        token_logprobs=tokens,
        label_logprobs=batch.score_rows.label_logprobs(candidates),
        readable=batch.readable,
        cot_mask=batch.cot_mask,
        score_mask=batch.score_mask,
        response_mask=batch.response_mask,
        cot=batch.cot,
        score=batch.score,
        squared_error=batch.squared_error,
        likelihood=batch.likelihood,
        targets=batch.targets,
        values=space.tensor(),
    )
    denominators = denominators_of(flat, trains_score_token=True)
    n_tokens = sum(len(ids) for ids, *_ in rows)
    assert (denominators.action_tokens, denominators.response_tokens) == (n_tokens, n_tokens)
    result = policy_loss(
        inputs,
        options=LossOptions(aggregation=aggregation),
        denominators=denominators,  # type: ignore[arg-type]
    )

    def expected(row: int, at: int) -> Tensor:
        probs = logprobs[row].exp()
        if scale == "1-3":
            p = [probs[at, token] for (token,) in trie]
        else:
            ten = probs[at, 1] * probs[at + 1, 7]
            p = [probs[at, 1] - ten, probs[at, 2], ten]
        return torch.stack([v * q for v, q in zip(space.values, p)]).sum()

    squared = sum((expected(i, at) - y) ** 2 for i, (_, at, _, y) in enumerate(rows)) / len(rows)
    entropy = -sum(logprobs[i, t, token] for i, (ids, *_) in enumerate(rows) for t, token in enumerate(ids))
    entropy = entropy / (n_tokens if aggregation == "token_mean" else len(rows))
    truth = squared + lam * entropy
    # Coefficients are held in float32.
    torch.testing.assert_close(result.loss, truth, rtol=1e-6, atol=1e-6)
    got, want = (torch.autograd.grad(x, logits, retain_graph=True)[0] for x in (result.loss, truth))
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-7)
