"""What feedback repeats, copies and mentions, on token ids of which every number can be counted by hand."""

from __future__ import annotations

import random

import pytest
import torch

from real_openrlhf.algo.score_rows import ScoreRows
from real_openrlhf.algo.types import Group, Rollout, ScoreReading
from real_openrlhf.controller.feedback_stats import COPIED, REPEATED, feedback_metrics


def rollout(feedback: list[int], score: list[int] | None = None) -> Rollout:
    """score: what follows the feedback from the score position on; None: there is no score."""
    position = None if score is None else len(feedback)
    return Rollout(
        token_ids=torch.tensor([*feedback, *(score or [])], dtype=torch.int64),
        logprobs=torch.zeros(len(feedback) + len(score or [])),
        reading=ScoreReading(position=position, label_index=None, reason=None, anchor_index=0),
        score_rows=ScoreRows.empty(3),
        score_logprobs=torch.zeros(0, 3),
        finish_reason="stop",
    )


def group(prompt: list[int], *rollouts: Rollout, row: int = 0) -> Group:
    return Group(prompt_ids=torch.tensor(prompt), label=1.0, rollouts=rollouts, row=row, weight_version=0)


def test_runs_that_come_again_are_counted() -> None:
    # 1 2 3 4 5 6 7 8: 5 runs of 4, none twice. 1 2 1 2 1 2 1: 4 runs, of which 2 are new.
    one, two = group([0], rollout([1, 2, 3, 4, 5, 6, 7, 8])), group([0], rollout([1, 2, 1, 2, 1, 2, 1], score=[9, 9]))
    assert feedback_metrics([one])["feedback/repeated"] == 0
    assert feedback_metrics([two])["feedback/repeated"] == 0.5
    assert feedback_metrics([one, two])["feedback/repeated"] == pytest.approx(2 / 9)


def test_tokens_after_the_score_are_no_feedback() -> None:
    found = feedback_metrics([group([7, 8], rollout([1, 2, 3, 4], score=[1, 2, 3, 4, 1, 2, 3, 4]))])
    assert found["feedback/repeated"] == 0


def test_copied_tokens_are_those_within_a_run_of_the_prompt() -> None:
    prompt = list(range(100, 120))
    eight, seven = prompt[5:13], prompt[5:12]
    assert feedback_metrics([group(prompt, rollout([1, 2, *eight]))])["feedback/copied"] == pytest.approx(8 / 10)
    assert feedback_metrics([group(prompt, rollout([1, 2, *seven]))])["feedback/copied"] == 0
    # Two runs that overlap: each token counts once.
    assert feedback_metrics([group(prompt, rollout([*prompt[5:15], 1]))])["feedback/copied"] == pytest.approx(10 / 11)
    # Another prompt's text is no copy.
    other = group([1], rollout(eight), row=1)
    assert feedback_metrics([group(prompt, rollout([1] * 8)), other])["feedback/copied"] == 0


def test_mentions_compare_with_the_responses_of_other_prompts() -> None:
    # Feedback {1, 2, 3}: its own prompt has two of them, the others one and none.
    groups = [
        group([1, 2, 50], rollout([1, 1, 2, 3])),
        group([1, 60], rollout([60]), row=1),
        group([70], rollout([80]), row=2),
    ]
    found = feedback_metrics(groups)
    # Shares of the three feedbacks: own 2/3, 1, 0; of the other two on average 1/6, 0, 0.
    assert found["feedback/mentioned"] == pytest.approx((2 / 3 + 1 + 0) / 3)
    assert found["feedback/mentioned_other"] == pytest.approx((1 / 6 + 0 + 0) / 3)
    assert found["feedback/mentions"] == pytest.approx(5 / 9 - 1 / 18)


def test_the_judged_response_takes_the_place_of_the_prompt_where_it_is_known() -> None:
    groups = [group([1, 2], rollout([1, 9])), group([1, 3], rollout([3]), row=1)]
    known = {0: [9], 1: None}
    found = feedback_metrics(groups, known.get)
    # {1, 9} and the response {9}: 1/2; {3} and the prompt {1, 3}: 1. Of the other: {1} of the prompt; nothing.
    assert found["feedback/mentioned"] == pytest.approx((1 / 2 + 1) / 2)
    assert found["feedback/mentioned_other"] == pytest.approx((1 / 2 + 0) / 2)


def test_what_there_is_nothing_of_is_undefined() -> None:
    empty = group([1, 2], rollout([], score=[5]))
    assert set(feedback_metrics([empty]).values()) == {None}
    alone = feedback_metrics([group([1, 2], rollout([1, 2, 3]))])
    assert alone["feedback/copied"] == 0 and alone["feedback/repeated"] is None
    # With a single prompt there is nothing to compare with.
    assert alone["feedback/mentions"] is None


def test_feedback_that_does_not_depend_on_the_prompt_mentions_it_no_more_than_others() -> None:
    rng = random.Random(0)
    words = [[rng.randrange(200) for _ in range(rng.randrange(10, 60))] for _ in range(100)]
    free = [group(p, *(rollout([rng.randrange(200) for _ in range(30)]) for _ in range(4))) for p in words]
    bound = [group(p, *(rollout(rng.choices(p, k=15)) for _ in range(4))) for p in words]
    assert abs(feedback_metrics(free)["feedback/mentions"]) < 0.02
    assert feedback_metrics(bound)["feedback/mentions"] > 0.5


@pytest.mark.parametrize("seed", range(20))
def test_repeats_and_copies_are_those_of_plain_loops(seed: int) -> None:
    rng = random.Random(seed)
    groups = [
        group(
            [rng.randrange(3) for _ in range(rng.randrange(1, 40))],
            *(rollout([rng.randrange(3) for _ in range(rng.randrange(0, 40))], score=[1]) for _ in range(3)),
        )
        for _ in range(3)
    ]
    runs = repeats = copies = tokens = 0
    for item in groups:
        prompt = item.prompt_ids.tolist()
        copied = {tuple(prompt[i : i + COPIED]) for i in range(len(prompt) - COPIED + 1)}
        for one in item.rollouts:
            ids = one.token_ids.tolist()[: one.cot_length]
            found = [tuple(ids[i : i + REPEATED]) for i in range(len(ids) - REPEATED + 1)]
            runs, repeats = runs + len(found), repeats + len(found) - len(set(found))
            inside = [i for i in range(len(ids) - COPIED + 1) if tuple(ids[i : i + COPIED]) in copied]
            copies += len({i + n for i in inside for n in range(COPIED)})
            tokens += len(ids)
    metrics = feedback_metrics(groups)
    assert metrics["feedback/repeated"] == (repeats / runs if runs else None)
    assert metrics["feedback/copied"] == (copies / tokens if tokens else None)
