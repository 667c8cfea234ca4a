from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from real_openrlhf.algo.batch import RealBatch, collate, denominators_of, rows_of
from real_openrlhf.algo.label_trie import TokenTrie
from real_openrlhf.algo.packing import PackedGroup, n_tokens
from real_openrlhf.algo.score_rows import ScoreRows
from real_openrlhf.algo.score_scale import ScoreScale
from real_openrlhf.algo.types import Rollout, TrainGroup
from tests.helpers.algo_factory import TinyPolicy, make_group, make_rollout, make_train_group, random_groups

SCALE = ScoreScale.parse("1-3")


def docstring_groups() -> list[TrainGroup]:
    """Prompts of 3 and 2 tokens, responses of 2 and 1."""
    first = make_group([5, 6, 7], [make_rollout([4, 2], position=1, label=1)], label=2.25)
    second = make_group([6, 5], [make_rollout([4])], label=3)
    return [
        make_train_group(first, SCALE, cot=[0.5], score=[0.25], squared_error=[2.0], likelihood=[3.0]),
        make_train_group(second, SCALE, cot=[-0.5]),
    ]


def test_worked_example() -> None:
    batch = collate(rows_of(docstring_groups()))
    assert batch.token_ids.tolist() == [5, 6, 7, 4, 2, 6, 5, 4]
    assert batch.position_ids.tolist() == [0, 1, 2, 3, 4, 0, 1, 2]
    assert batch.layout.groups == (
        PackedGroup(start=0, prompt=3, responses=(2,)),
        PackedGroup(start=5, prompt=2, responses=(1,)),
    )
    assert batch.logit_index.tolist() == [2, 3, 6] and batch.logit_row.tolist() == [[0, 1], [2, 0]]
    assert batch.score_row.tolist() == [1] and len(batch) == 2
    assert batch.response_ids.tolist() == [[4, 2], [4, 0]]
    assert batch.response_mask.int().tolist() == [[1, 1], [1, 0]]
    assert batch.cot_mask.int().tolist() == [[1, 0], [1, 0]]  # unreadable: the whole response
    assert batch.score_mask.int().tolist() == [[0, 1], [0, 0]]
    assert batch.readable.tolist() == [True, False]
    assert batch.rollout_logprobs.tolist() == [pytest.approx([-0.1, -0.2]), pytest.approx([-0.1, 0])]
    assert batch.score_rows.rollout.tolist() == [0] and batch.score_rows.position.tolist() == [1]
    assert batch.score_rows.n_rollouts == 2
    assert (batch.cot.tolist(), batch.score.tolist()) == ([0.5, -0.5], [0.25, 0.0])
    assert (batch.squared_error.tolist(), batch.likelihood.tolist()) == ([2.0, 0.0], [3.0, 0.0])
    assert (batch.targets.value.tolist(), batch.targets.weight.tolist()) == ([2.25, 3.0], [0.25, 0.0])
    assert (batch.targets.low.tolist(), batch.targets.high.tolist()) == ([1, 2], [2, 2])


def test_dtypes() -> None:
    batch = collate(rows_of(docstring_groups()))
    floats = ("cot", "score", "squared_error", "likelihood", "rollout_logprobs")
    masks = ("response_mask", "cot_mask", "score_mask", "readable")
    assert all(getattr(batch, name).dtype == torch.float32 for name in floats)
    assert all(getattr(batch, name).dtype == torch.bool for name in masks)
    indices = ("token_ids", "position_ids", "logit_index", "logit_row", "score_row", "response_ids")
    assert all(getattr(batch, name).dtype == torch.int64 for name in indices)


def test_a_group_shares_its_prompt_and_its_first_row_of_logits() -> None:
    group = make_group([5, 6, 7], [make_rollout([4, 2], position=1, label=1), make_rollout([3]), make_rollout([8, 9])])
    other = make_group([5, 6, 7], [make_rollout([1])])  # equal tokens, yet another group
    batch = collate(rows_of([make_train_group(group, SCALE), make_train_group(other, SCALE)]))
    assert batch.token_ids.tolist() == [5, 6, 7, 4, 2, 3, 8, 9, 5, 6, 7, 1]
    assert batch.position_ids.tolist() == [0, 1, 2, 3, 4, 3, 3, 4, 0, 1, 2, 3]
    assert [g.responses for g in batch.layout.groups] == [(2, 1, 2), (1,)]
    assert batch.layout.n_tokens == 12
    assert batch.logit_index.tolist() == [2, 3, 6, 10]
    assert batch.logit_row.tolist() == [[0, 1], [0, 0], [0, 2], [3, 0]]


def test_rollouts_of_a_group_that_are_not_neighbours_pay_for_the_prompt_again() -> None:
    group, other = (make_train_group(make_group([5, 6], [make_rollout([4]), make_rollout([3])]), SCALE) for _ in "ab")
    a, b = rows_of([group])
    batch = collate([a, rows_of([other])[0], b])
    assert batch.token_ids.tolist() == [5, 6, 4, 5, 6, 4, 5, 6, 3]


def test_several_score_rows_per_rollout_also_behind_its_last_token() -> None:
    """A label in which the response ends is continued by one token."""
    rollout = make_rollout([4, 2], position=1, label=1)
    rows = replace(
        rollout.score_rows,
        rollout=torch.zeros(2, dtype=torch.int64),
        sequence=torch.zeros(2, dtype=torch.int64),
        node=torch.tensor([0, 1]),
        position=torch.tensor([1, 2]),
        token_ids=torch.tensor([[1, 2, 3], [7, -1, -1]]),
    )
    group = make_group([5, 6], [make_rollout([9]), replace(rollout, score_rows=rows)])
    batch = collate(rows_of([make_train_group(group, SCALE)]))
    assert batch.token_ids.tolist() == [5, 6, 9, 4, 2]
    assert batch.logit_index.tolist() == [1, 3, 4]  # the prompt's end, "4", and the last token
    assert batch.score_row.tolist() == [1, 2]


def test_log_probs_are_those_of_each_rollout_alone() -> None:
    """Each row's log-probs equal those of the same rollout alone, without any padding."""
    groups = docstring_groups()
    policy = TinyPolicy()
    together = policy(collate(rows_of(groups)))
    for i, row in enumerate(rows_of(groups)):
        prompt, response = row.group.group.prompt_ids, row.rollout.token_ids
        ids = torch.cat([prompt, response])
        for t in range(len(response)):
            context = policy.embed[ids[: len(prompt) + t]].mean(0)
            expected = (torch.tanh(context) @ policy.head).log_softmax(-1)
            assert together[0][i, t].item() == pytest.approx(expected[response[t]].item())
            if row.rollout.reading.position == t:
                assert together[1][i].tolist() == pytest.approx(expected[[1, 2, 3]].tolist())
    assert together[1][1].tolist() == [0, 0, 0]


def test_rows_keep_groups_together_and_index_them() -> None:
    groups = [
        make_train_group(make_group([1], [make_rollout([i, 2]) for i in (3, 4)], row=r), SCALE, cot=[r, r + 0.5])
        for r in (10, 20)
    ]
    rows = rows_of(groups)
    assert [(r.group.group.row, r.index) for r in rows] == [(10, 0), (10, 1), (20, 0), (20, 1)]
    picked = collate([rows[3], rows[0]])
    assert picked.cot.tolist() == [20.5, 10.0]
    assert picked.response_ids[:, 0].tolist() == [4, 3]


@pytest.mark.parametrize(("trains_score_token", "actions"), [(False, 1 + 1 + 3), (True, 2 + 1 + 3)])
def test_denominators(trains_score_token: bool, actions: int) -> None:
    groups = docstring_groups()
    groups.append(make_train_group(make_group([1], [make_rollout([1, 1, 1])]), SCALE))
    got = denominators_of(rows_of(groups), trains_score_token=trains_score_token)
    assert (got.rollouts, got.action_tokens, got.response_tokens) == (3, actions, 2 + 1 + 3)


def test_denominators_count_what_the_masks_hold() -> None:
    groups = docstring_groups()
    batch = collate(rows_of(groups))
    got = denominators_of(rows_of(groups), trains_score_token=True)
    assert got.action_tokens == int((batch.cot_mask | batch.score_mask).sum())
    assert got.response_tokens == int(batch.response_mask.sum())
    assert denominators_of([], trains_score_token=True).rollouts == 0


def labels_rollout(token_ids: list[int], position: int) -> Rollout:
    """On the scale "1", "2", "10" as tokens [1], [2], [1, 0]."""
    rows = ScoreRows.of(TokenTrie(((1,), (2,), (1, 0))), token_ids, position)
    return replace(make_rollout(token_ids, position=position, label=0), score_rows=rows)


def test_branches_follow_the_rollouts() -> None:
    """A rollout that did not write "1" has its chain of thought once more, followed by "1", "0"."""
    first = make_group([5, 6, 7], [labels_rollout([4, 2, 9], 1), labels_rollout([4, 4, 1, 0], 2)])
    second = make_group([6], [make_rollout([4]), labels_rollout([8, 1], 1)])
    rows = rows_of([make_train_group(first, SCALE), make_train_group(second, SCALE)])
    batch = collate(rows)
    prompts = [[5, 6, 7], [6]]
    assert batch.token_ids.tolist() == [
        *[*prompts[0], *[4, 2, 9], *[4, 4, 1, 0], *[4, 1, 0]],  # the last of them for the first rollout
        *[*prompts[1], *[4], *[8, 1], *[8, 1, 0]],  # for the last, which ended after its "1"
    ]
    assert [g.responses for g in batch.layout.groups] == [(3, 4, 3), (1, 2, 3)]
    assert n_tokens(rows) == batch.layout.n_tokens == 20
    assert batch.response_ids.shape == batch.cot_mask.shape == (4, 4)
    assert batch.score_mask.int().tolist() == [[0, 1, 0, 0], [0, 0, 1, 1], [0, 0, 0, 0], [0, 1, 0, 0]]
    assert batch.score_rows.sequence.tolist() == [0, 4, 1, 1, 3, 5]
    assert batch.score_rows.position.tolist() == [1, 2, 2, 3, 1, 2]
    counted = denominators_of(rows, trains_score_token=True)
    assert counted.action_tokens == int((batch.cot_mask | batch.score_mask).sum())
    assert counted.response_tokens == int(batch.response_mask.sum()) == 3 + 4 + 1 + 2


def test_tokens_and_score_rows_are_predicted_by_the_token_before_them_also_in_branches() -> None:
    first = make_group([5, 6, 7], [labels_rollout([4, 2, 9], 1), labels_rollout([4, 4, 1, 0], 2)])
    second = make_group([6], [make_rollout([4]), labels_rollout([8, 1], 1)])
    batch = collate(rows_of([make_train_group(first, SCALE), make_train_group(second, SCALE)]))
    # In the row: 0-2 prompt, 3-5, 6-9, branch 10-12; 13 prompt, 14, 15-16, branch 17-19.
    by_token = batch.logit_index[batch.logit_row]
    tokens = [by_token[i, batch.response_mask[i]].tolist() for i in range(4)]
    assert tokens == [[2, 3, 4], [2, 6, 7, 8], [13], [13, 15]]
    # Node 0 is read in the responses; node 1, after "1", is read in branches for rollouts 0 and 3.
    assert batch.logit_index[batch.score_row].tolist() == [3, 11, 7, 8, 15, 18]


def test_labels_of_the_branches_are_those_of_the_policy() -> None:
    groups = [make_train_group(make_group([5, 6], [labels_rollout([4, 2], 1), labels_rollout([1, 0], 0)]), SCALE)]
    policy = TinyPolicy()
    got = policy(collate(rows_of(groups)))[1]

    def probs(ids: list[int]) -> torch.Tensor:
        return (torch.tanh(policy.embed[torch.tensor(ids)].mean(0)) @ policy.head).softmax(-1)

    for i, cot in enumerate(([5, 6, 4], [5, 6])):
        at, after = probs(cot), probs([*cot, 1])
        expected = torch.stack([at[1] * (1 - after[0]), at[2], at[1] * after[0]])
        torch.testing.assert_close(got[i].exp(), expected, rtol=0, atol=1e-12)


def test_a_scale_of_single_tokens_adds_nothing_to_what_the_network_reads() -> None:
    groups = random_groups(seed=1, n_groups=3, k=4, scale=SCALE)
    rows = rows_of(groups)
    batch = collate(rows)
    assert not batch.score_rows.branches
    assert len(batch.token_ids) == n_tokens(rows)
    assert n_tokens(rows) == sum(g.group.prompt_ids.numel() for g in groups) + sum(row.length for row in rows)
    assert len(batch.score_rows.node) == int(batch.readable.sum())


def test_tokens_after_the_score_are_neither_chain_of_thought_nor_score() -> None:
    group = make_group([1], [make_rollout([5, 2, 6, 0], position=1, label=1)])
    batch = collate(rows_of([make_train_group(group, SCALE)]))
    assert batch.cot_mask.int().tolist() == [[1, 0, 0, 0]]
    assert batch.score_mask.int().tolist() == [[0, 1, 0, 0]]
    assert batch.response_mask.int().tolist() == [[1, 1, 1, 1]]


def test_empty_responses_still_have_a_column() -> None:
    group = make_group([1, 2], [make_rollout([]), make_rollout([3])])
    batch = collate(rows_of([make_train_group(group, SCALE)]))
    assert batch.response_mask.tolist() == [[False], [True]] and batch.logit_index.tolist() == [1]
    empty = collate(rows_of([make_train_group(group, SCALE)])[:1])
    assert empty.response_mask.tolist() == [[False]] and empty.logit_index.tolist() == []


def test_to_keeps_every_field() -> None:
    batch = collate(rows_of(docstring_groups()))
    moved = batch.to("meta")
    assert isinstance(moved, RealBatch)
    assert (
        moved.layout == batch.layout
        and moved.token_ids.is_meta
        and moved.score_rows.token_ids.is_meta
        and moved.score_rows.trie.path.is_meta
    )
    assert math.prod(moved.token_ids.shape) == math.prod(batch.token_ids.shape)


def test_reference_logprobs_stand_where_the_response_stands() -> None:
    first, second = docstring_groups()
    both = [
        replace(first, ref_logprobs=(torch.tensor([-0.5, -0.25]),)),
        replace(second, ref_logprobs=(torch.tensor([-1.5]),)),
    ]
    batch = collate(rows_of(both))
    assert batch.ref_logprobs is not None and batch.ref_logprobs.tolist() == [[-0.5, -0.25], [-1.5, 0.0]]
    assert batch.to("cpu").ref_logprobs is not None
    without = collate(rows_of([first, second]))
    assert without.ref_logprobs is None and without.to("cpu").ref_logprobs is None
    with pytest.raises(ValueError, match="others have none"):
        collate(rows_of([both[0], second]))
