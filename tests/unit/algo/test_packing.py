"""Which rollouts share a forward pass."""

from __future__ import annotations

from collections import Counter

import pytest

from real_openrlhf.algo.packing import Row, layout_of, micro_batches, n_tokens, rows_of, spread
from real_openrlhf.algo.score_scale import ScoreScale
from real_openrlhf.algo.types import TrainGroup
from tests.helpers.algo_factory import make_group, make_rollout, make_train_group, random_groups

SCALE = ScoreScale.parse("1-3")


def group(prompt: int, *lengths: int) -> TrainGroup:
    return make_train_group(make_group([5] * prompt, [make_rollout([4] * n) for n in lengths]), SCALE)


def shape(batch: list[Row]) -> list[tuple[int, int]]:
    """Prompt and response tokens of each row."""
    return [(r.group.group.prompt_ids.numel(), r.length) for r in batch]


def test_layout() -> None:
    layout = layout_of([(3, (2, 1)), (2, (1,))])
    assert [(g.start, g.end_of_prompt, g.end, g.longest) for g in layout.groups] == [(0, 3, 6, 5), (6, 8, 9, 3)]
    assert layout.n_tokens == 9


def test_small_groups_are_filled_together_and_none_is_divided() -> None:
    rows = rows_of([group(10, 1, 2), group(4, 3, 3), group(6, 1, 1), group(5, 2, 2)])
    batches = micro_batches(rows, max_rollouts=4, max_tokens=100)
    assert [shape(b) for b in batches] == [
        [(10, 2), (10, 1), (4, 3), (4, 3)],
        [(5, 2), (5, 2), (6, 1), (6, 1)],
    ]
    assert [n_tokens(b) for b in batches] == [23, 17]
    # With three rollouts at a time, two groups would mean dividing one.
    assert [len(b) for b in micro_batches(rows, max_rollouts=3, max_tokens=100)] == [2, 2, 2, 2]


def test_a_group_above_the_budget_pays_its_prompt_once_per_part() -> None:
    rows = rows_of([group(10, 4, 3, 2, 1)])
    (whole,) = micro_batches(rows, max_rollouts=8, max_tokens=20)
    assert n_tokens(whole) == 20
    parts = micro_batches(rows, max_rollouts=8, max_tokens=15)
    assert [shape(p) for p in parts] == [[(10, 4), (10, 1)], [(10, 3), (10, 2)]]
    assert [n_tokens(p) for p in parts] == [15, 15]
    assert [len(p) for p in micro_batches(rows, max_rollouts=3, max_tokens=99)] == [3, 1]


def test_a_rollout_above_the_budget_stays_alone() -> None:
    rows = rows_of([group(10, 4, 30), group(2, 1, 1)])
    assert [shape(b) for b in micro_batches(rows, max_rollouts=8, max_tokens=20)] == [
        [(10, 30)],
        [(10, 4), (2, 1), (2, 1)],
    ]


@pytest.mark.parametrize("max_rollouts", [1, 3, 5, 100])
@pytest.mark.parametrize("max_tokens", [1, 12, 40, 1000])
def test_every_row_once_within_the_bounds(max_rollouts: int, max_tokens: int) -> None:
    rows = rows_of(random_groups(1, 7, 5, SCALE))
    batches = micro_batches(rows[::2] + rows[1::2], max_rollouts=max_rollouts, max_tokens=max_tokens)
    assert Counter(id(r.rollout) for b in batches for r in b) == Counter(id(r.rollout) for r in rows)
    for batch in batches:
        assert len(batch) <= max_rollouts and (n_tokens(batch) <= max_tokens or len(batch) == 1)


def test_as_many_as_other_ranks_have() -> None:
    rows = rows_of([group(10, 1, 1, 1, 1), group(4, 3, 3), group(5, 2)])
    batches = micro_batches(rows, max_rollouts=100, max_tokens=1000)
    assert len(batches) == 1
    assert spread(batches, 1) == batches
    two = spread(batches, 2)
    assert [{r.group.group.prompt_ids.numel() for r in b} for b in two] == [{10}, {4, 5}]
    for n in (3, 5, 7):
        parts = spread(batches, n)
        assert len(parts) == n and all(parts)
        assert Counter(id(r.rollout) for b in parts for r in b) == Counter(id(r.rollout) for r in rows)
    with pytest.raises(ValueError, match="7 rollouts cannot make 8"):
        spread(batches, 8)
