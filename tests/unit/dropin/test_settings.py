from __future__ import annotations

import math

import pytest
import torch

from real_openrlhf.algo.score_scale import ScaleError
from real_openrlhf.dropin.settings import DropInError, RealSettings
from tests.helpers.algo_factory import merged_tokenizer


def logs(*rows: list[float]) -> torch.Tensor:
    return torch.tensor(rows, dtype=torch.float64).log()


def test_rewards_by_hand() -> None:
    settings = RealSettings(scale="1-3", lam=2.0, invalid_penalty=1.5)
    # E = 2.0 with y = 2.5 between two labels; E = 1.4 with y = 1; no score with y = 3 (worst: 0, 9 away in squares).
    got = settings.rewards(
        logs([0.2, 0.3, 0.4], [0.7, 0.2, 0.1], [1, 1, 1]), torch.tensor([True, True, False]), [2.5, "1", 3]
    )
    by_hand = [
        -0.25 + 2 * (math.log(0.3) + math.log(0.4)) / 2,
        -(0.4**2) + 2 * math.log(0.7),
        -9.0 - 1.5 + 2 * math.log(1e-6),
    ]
    assert got.dtype == torch.float64 and got.tolist() == pytest.approx(by_hand)


def test_what_stands_at_unreadable_rows_plays_no_part() -> None:
    settings = RealSettings(scale="1-3")
    readable = torch.tensor([False])
    nothing = settings.rewards(torch.full((1, 3), float("nan")), readable, [2])
    assert nothing.tolist() == settings.rewards(torch.zeros(1, 3), readable, [2]).tolist() == [-4 + math.log(1e-6)]


def test_a_groups_rewards_are_those_of_the_objective() -> None:
    settings = RealSettings(scale="1-3", lam=0.5, invalid_penalty=0.25, renormalise=True)
    probs = logs([0.2, 0.3, 0.4], [0.1, 0.1, 0.1], [1, 1, 1], [0.5, 0.2, 0.1])
    readable = torch.tensor([True, True, False, True])
    coefficients = settings.objective()(settings.group_scores(probs, readable, settings.target(1.5)))
    assert settings.rewards(probs, readable, [1.5] * 4).tolist() == pytest.approx(coefficients.rewards.tolist())


def test_labels() -> None:
    settings = RealSettings(scale="1=Bad,2=Fair,4=Good")
    assert settings.target(" 3 ").weight == 0.5
    for wrong in ("good", None, "", True, 5, float("nan"), [1]):
        with pytest.raises(ValueError, match="from 1 to 4"):
            settings.target(wrong)


@pytest.mark.parametrize("wrong", [{"lam": -1.0}, {"lam": math.nan}, {"invalid_penalty": -0.1}, {"anchors": "So "}])
def test_wrong_settings(wrong: dict[str, object]) -> None:
    with pytest.raises(DropInError, match=rf"RealSettings.{next(iter(wrong))}"):
        RealSettings(**wrong)  # type: ignore[arg-type]


def test_a_wrong_scale_is_refused_at_once() -> None:
    with pytest.raises(ScaleError, match="does not ascend"):
        RealSettings(scale="5-1")


def test_shapes() -> None:
    settings = RealSettings(scale="1-3")
    for logprobs, readable in ((torch.zeros(2, 3), [True]), (torch.zeros(1, 5), [True]), (torch.zeros(3), [True])):
        with pytest.raises(DropInError, match="on a scale of 3"):
            settings.rewards(logprobs, torch.tensor(readable), [1])


def test_the_reader_is_the_packages() -> None:
    tokenizer = merged_tokenizer()
    ids = tokenizer.encode("a. So the overall score is 4", add_special_tokens=False)
    reading = RealSettings().reader(tokenizer, {0}).read([*ids, 0])
    assert (reading.position, reading.label_index) == (len(ids) - 1, 3)
