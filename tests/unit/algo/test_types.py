from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from real_openrlhf.algo.score_scale import ScoreScale
from real_openrlhf.algo.types import OFF_SCALE, REASONS, TRUNCATED, Coefficients, Targets, count_reasons, group_scores
from tests.helpers.algo_factory import make_group, make_rollout, make_train_group

SCALE = ScoreScale.parse("1-3")


def test_group_scores_keeps_order_and_marks_the_unreadable() -> None:
    row = torch.tensor([[-0.5, -1.5, -2.5]])
    rollouts = [
        make_rollout([7, 3, 0], position=1, label=2, score_logprobs=row),
        make_rollout([7, 7]),
        make_rollout([9], position=0, score_logprobs=row * 2),
    ]
    group = make_group([1], rollouts, label=2.5)
    scores = group_scores(group, SCALE.tensor(), SCALE.target(group.label))
    assert scores.label_logprobs.tolist() == [[-0.5, -1.5, -2.5], [0, 0, 0], [-1, -3, -5]]
    assert scores.readable.tolist() == [True, False, True]
    assert scores.sampled.tolist() == [2, -1, -1]
    assert scores.target == SCALE.target(2.5)
    assert scores.label_logprobs.dtype == torch.float32


def test_cot_length() -> None:
    assert make_rollout([7, 7, 3, 0], position=2, label=2).cot_length == 2
    assert make_rollout([3], position=0, label=2).cot_length == 0
    assert make_rollout([7, 7, 0]).cot_length == 3  # end of text included: it is what made it invalid


def test_count_reasons() -> None:
    rollouts = [make_rollout([3], position=0, label=2), make_rollout([9], position=0), make_rollout([7])]
    groups = [make_group([1], rollouts), make_group([1], [make_rollout([7], reason=TRUNCATED)])]
    counts = count_reasons(groups)
    assert counts == dict.fromkeys(REASONS, 0) | {"no_anchor": 1, TRUNCATED: 1, OFF_SCALE: 1}


def test_coefficients_of_different_lengths_are_refused() -> None:
    fields: dict[str, Any] = {
        n: torch.zeros(2) for n in ("cot", "score", "squared_error", "likelihood", "rewards", "advantages")
    }
    with pytest.raises(ValueError, match=r"likelihood has shape \(3,\), cot \(2,\)"):
        Coefficients(**fields | {"likelihood": torch.zeros(3)}, zero_variance=False)


def test_reference_logprobs_of_another_length_are_refused() -> None:
    group = make_train_group(make_group([1], [make_rollout([7, 3]), make_rollout([7])]), SCALE)
    replace(group, ref_logprobs=(torch.zeros(2), torch.zeros(1)))
    with pytest.raises(ValueError, match=r"lengths \[2, 2\], the responses \[2, 1\]"):
        replace(group, ref_logprobs=(torch.zeros(2), torch.zeros(2)))


def test_targets_are_the_labels_of_their_rollouts() -> None:
    scale = ScoreScale.parse("1-5")
    targets = Targets.of([scale.target(2.25), scale.target(4)])
    assert (targets.value.tolist(), targets.weight.tolist()) == ([2.25, 4.0], [0.25, 0.0])
    assert (targets.low.tolist(), targets.high.tolist(), len(targets)) == ([1, 3], [2, 3], 2)
    last = targets[torch.tensor([1, 1, 0])]
    assert (last.value.tolist(), last.low.tolist()) == ([4.0, 4.0, 2.25], [3, 3, 1])
    assert Targets.repeat(scale.target(3), 2).value.tolist() == [3.0, 3.0]
    assert targets.to("meta").weight.device.type == "meta"
