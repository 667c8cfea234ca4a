"""The benchmark's synthetic rollouts."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from examples.benchmark.protocol import Case
from examples.benchmark.rollouts import END_ID, SCALE, SCORE_IDS, make_group
from real_openrlhf.algo.objectives.real import RealObjective
from real_openrlhf.algo.types import group_scores

CASE = Case(prompt=12, response=7, samples=6, micro_batch=3)


def test_lengths_are_exact_and_every_score_is_readable_near_the_end() -> None:
    group = make_group(CASE, seed=1, vocabulary=50)
    assert group.prompt_ids.shape == (12,)
    assert len(group) == 6
    for rollout in group.rollouts:
        ids = rollout.token_ids.tolist()
        assert len(ids) == 7 and rollout.logprobs.shape == (7,)
        assert rollout.reading.readable and rollout.reading.position == rollout.cot_length == 5
        assert ids[5] == SCORE_IDS[rollout.reading.label_index or 0] and ids[6] == END_ID
        assert max(ids) < 50 and not set(ids[:5]) & {*SCORE_IDS, END_ID}
        assert torch.allclose(rollout.score_logprobs.exp().sum(), torch.tensor(1.0))


def test_the_same_ids_for_every_contestant_and_micro_batch() -> None:
    one = make_group(CASE, seed=1, vocabulary=50)
    two = make_group(replace(CASE, micro_batch=1, gradient_checkpointing=True), seed=1, vocabulary=50)
    assert one.prompt_ids.equal(two.prompt_ids) and one.label == two.label
    for a, b in zip(one.rollouts, two.rollouts, strict=True):
        assert a.token_ids.equal(b.token_ids) and a.score_logprobs.equal(b.score_logprobs)
    other = make_group(CASE, seed=2, vocabulary=50)
    assert not one.prompt_ids.equal(other.prompt_ids)


def test_rewards_differ_so_that_advantages_are_not_zero() -> None:
    for seed in range(20):
        group = make_group(CASE, seed=seed, vocabulary=50)
        coefficients = RealObjective()(group_scores(group, SCALE.tensor(), SCALE.target(group.label)))
        assert len(set(coefficients.rewards.tolist())) == len(group)
        assert bool((coefficients.advantages != 0).all()) and bool((coefficients.squared_error > 0).all())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"micro_batch": 4}, "micro_batch must divide"),
        ({"micro_batch": 0}, "micro_batch must divide"),
        ({"samples": 1, "micro_batch": 1}, "2 rollouts"),
        ({"response": 2}, "responses of 3"),
        ({"prompt": 0}, "prompt of 1"),
    ],
)
def test_cases_that_cannot_be_run_are_refused(change: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_group(replace(CASE, **change), seed=0, vocabulary=50)


def test_a_vocabulary_of_scores_alone_is_refused() -> None:
    with pytest.raises(ValueError, match="vocabulary of 8"):
        make_group(CASE, seed=0, vocabulary=8)
    assert make_group(CASE, seed=0, vocabulary=10)
