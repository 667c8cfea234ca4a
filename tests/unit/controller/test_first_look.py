"""The first rollouts: what is shown, and below which thresholds the run stops."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch

from real_openrlhf.algo.score_scale import ScoreScale
from real_openrlhf.algo.types import Group
from real_openrlhf.controller.first_look import ScoresNotThere, check_first_rollouts
from tests.helpers.algo_factory import make_group, make_rollout

SCALE = ScoreScale.parse("1-3")


def group(*rows: Sequence[float] | None, label: float = 2.0) -> Group:
    """One rollout per row of probabilities; None: without a score."""
    rollouts = []
    for i, row in enumerate(rows):
        if row is None:
            rollouts.append(replace(make_rollout([4, 4]), text=f"no score {i}"))
        else:
            scores = torch.tensor([row]).log()
            rollouts.append(make_rollout([4, 3], position=1, label=2, score_logprobs=scores))
    return make_group([1, 2], rollouts, label=label)


def look(groups: Sequence[Group], **changes: Any) -> str:
    options: dict[str, Any] = {"min_mass": 0.05, "min_readable": 0.02, "top_p": 1.0}
    return check_first_rollouts(groups, SCALE, **(options | changes))


def test_what_is_shown() -> None:
    text = look([group([0.1, 0.2, 0.5], None), group([0.2, 0.2, 0.2], [0.0, 0.0, 1.0], label=2.5)])
    assert text.splitlines() == [
        "first rollouts: 75% readable, mean mass on the scale 0.800, reasons {'no_anchor': 1}",
        "  label 2  E[score] 2.000  written 3  mass 0.800",
        "  label 2.5  E[score] 1.200  written 3  mass 0.600",
        "  label 2.5  E[score] 3.000  written 3  mass 1.000",
    ]


def test_renormalised_expectations_are_those_that_the_run_uses() -> None:
    text = look([group([0.1, 0.2, 0.5])], renormalise=True)
    assert "E[score] 2.500  written 3  mass 0.800" in text


def test_no_more_than_a_few_are_shown_and_all_are_counted() -> None:
    text = look([group([0.0, 0.0, 1.0]) for _ in range(3)] + [group([0.0, 0.0, 0.2])], shown=2)
    assert len(text.splitlines()) == 3 and "mean mass on the scale 0.800" in text


def test_a_score_off_the_scale_is_readable_and_shown_as_written_none() -> None:
    rollout = make_rollout([4, 7], position=1)
    text = look([make_group([1], [rollout])])
    assert "100% readable" in text and "written None" in text and "{'off_scale': 1}" in text


@pytest.mark.parametrize(("mass", "stops"), [(0.0499, True), (0.0501, False)])
def test_the_mass_threshold_is_on_the_mean(mass: float, stops: bool) -> None:
    groups = [group([mass * 2, 1e-9, 1e-9], [1e-9, 1e-9, 1e-9])]
    if not stops:
        look(groups)
        return
    with pytest.raises(ScoresNotThere, match=r"--real.min_mass asks for 0.05") as caught:
        look(groups)
    message = str(caught.value)
    assert "mean mass on the scale 0.050" in message and "1,2,3:" in message
    assert all(advice in message for advice in ("--real.scale", "--real.anchor", "train_warmup"))


@pytest.mark.parametrize(("readable", "stops"), [(1, True), (2, False)])
def test_the_readable_threshold_is_on_the_share(readable: int, stops: bool) -> None:
    groups = [group(*[[0.1, 0.2, 0.7]] * readable, *[None] * (8 - readable))]
    if not stops:
        assert "25% readable" in look(groups, min_readable=0.25)
        return
    with pytest.raises(ScoresNotThere, match="only 1 of the first 8 rollouts") as caught:
        look(groups, min_readable=0.25)
    message = str(caught.value)
    assert "{'no_anchor': 7}" in message and "asks for a share of 0.25" in message
    assert "'no score 1'" in message and "no score 6" not in message
    assert all(advice in message for advice in ("--real.anchor", "--rollout.max_new_tokens", "train_warmup"))


def test_long_texts_are_shown_by_their_ends() -> None:
    rollout = replace(make_rollout([4]), text="x" * 500 + "the end")
    with pytest.raises(ScoresNotThere) as caught:
        look([make_group([1], [rollout])])
    assert "the end'" in str(caught.value) and "x" * 121 not in str(caught.value)


def test_thresholds_of_0_let_everything_pass() -> None:
    assert look([group(None, None)], min_readable=0.0, min_mass=0.0) == (
        "first rollouts: none of 2 is readable, reasons {'no_anchor': 2}"
    )
    look([group([1e-9, 1e-9, 1e-9])], min_readable=0.0, min_mass=0.0)


def test_top_p_below_1_is_noted() -> None:
    assert "top_p" not in look([group([0.1, 0.2, 0.7])])
    assert look([group([0.1, 0.2, 0.7])], top_p=0.9).splitlines()[-1] == (
        "  top_p 0.9: log-probs are over the full vocabulary, the rollouts were drawn from its nucleus"
    )
