"""Metrics of pairs by hand, on judgements made here; intervals against the formula of a bootstrap's own draws."""

from __future__ import annotations

import json

import numpy as np
import pytest

from real_openrlhf.algo.score_scale import ScoreScale
from real_openrlhf.evals.pair_results import (
    compare_pairs,
    evaluate_pairs,
    pair_up,
    pairs_from_json,
    pairs_to_json,
)
from real_openrlhf.evals.pair_tables import pair_csv_lines, pair_table
from real_openrlhf.evals.predictions import EvaluationError, Prediction
from real_openrlhf.evals.results import Settings
from tests.helpers.predictions import make_prediction

SCALE = ScoreScale.parse("1-5")


def settings(mode: str = "scores", margin: float = 0.0, names: tuple[str, ...] = ("p",)) -> Settings:
    return Settings(
        scale=SCALE, n_resamples=200, pair_modes=dict.fromkeys(names, mode), tie_margin=margin, confidence=0.9
    )


def pair(
    index: int, label: float, first: float | None, second: float | None, *, group: str | None = None, name: str = "p"
) -> list[Prediction]:
    """Both readings alike: a score is written, and all the mass is on it."""

    def one(row: int, score: float | None, label: float) -> Prediction:
        changes = {"expected": score, "decoded": score}
        return make_prediction(row, label, benchmark=name, group=group or str(index), **changes)

    return [one(2 * index, first, label), one(2 * index + 1, second, 0.0 - label)]


# label, score of a, score of b
ROWS = [
    (1, 5, 2),  # right
    (1, 2, 4),  # wrong
    (-1, 1, 3),  # right
    (-1, 3, 3),  # tied scores: wrong, and one half
    (1, 4, 4),  # the same
    (0, 2, 2),  # a tie, and scores that tie
    (0, 2, 3),  # a tie, and scores that do not
    (1, None, 3),  # no score
]
PREDICTIONS = [p for i, row in enumerate(ROWS) for p in pair(i, *row)]


def estimates(predictions: list[Prediction], options: Settings) -> dict[str, float | None]:
    (result,) = evaluate_pairs(predictions, options)
    return {metric: found.estimate for metric, found in result.scores["expected"].items()}


def test_each_response_by_itself() -> None:
    (result,) = evaluate_pairs(PREDICTIONS, settings())
    assert (result.n, result.n_groups, result.n_ties, result.mode) == (8, 8, 2, "scores")
    assert estimates(PREDICTIONS, settings()) == pytest.approx(
        {
            "accuracy": 2 / 5,
            "accuracy_half_ties": 3 / 5,
            "accuracy_three_way": 3 / 7,
            "tie_rate": 3 / 7,
            "unscored_rate": 1 / 8,
        }
    )
    assert result.scores["expected"]["accuracy"].n == 5 and result.scores["expected"]["tie_rate"].n == 7
    assert result.scores["decoded"] == result.scores["expected"]


def test_the_tie_margin_makes_ties() -> None:
    # Differences: 3, -2, -2, 0, 0, 0, -1.
    found = estimates(PREDICTIONS, settings(margin=1.0))
    assert (found["tie_rate"], found["accuracy_three_way"]) == (4 / 7, 4 / 7) and found["accuracy"] == 2 / 5
    found = estimates(PREDICTIONS, settings(margin=2.0))
    assert (found["accuracy"], found["accuracy_half_ties"]) == (1 / 5, 3 / 5)


def test_both_in_one_prompt() -> None:
    # label, score with a first, score with b first; the middle is 3.
    rows = [
        (1, 5, 1),  # right in both orders
        (1, 4, 4),  # the first wins twice: a tie of both, not consistent
        (-1, 4, 5),  # the first wins twice, b by more: right, not consistent
        (0, 3, 3),  # a tie in both orders
        (-1, 1, 3),  # b, then a tie: right, not consistent
    ]
    found = estimates([p for i, row in enumerate(rows) for p in pair(i, *row)], settings("one_prompt"))
    assert found == pytest.approx(
        {
            "accuracy": 3 / 4,
            "accuracy_half_ties": 3.5 / 4,
            "accuracy_three_way": 4 / 5,
            "tie_rate": 2 / 5,
            "swap_consistency": 2 / 5,
            # In the ten prompts the first wins: yes no | yes yes | yes yes | half half | no half.
            "first_rate": 6.5 / 10,
            "unscored_rate": 0.0,
        }
    )


def test_a_judge_of_places_alone_is_never_consistent_and_always_tied() -> None:
    found = estimates([p for i in range(6) for p in pair(i, (-1) ** i, 5, 5)], settings("one_prompt"))
    assert (found["accuracy"], found["accuracy_half_ties"], found["first_rate"]) == (0.0, 0.5, 1.0)
    assert (found["swap_consistency"], found["tie_rate"]) == (0.0, 1.0)


def test_intervals_draw_groups_of_pairs() -> None:
    rng = np.random.default_rng(1)
    right = rng.random(60) < 0.7
    predictions = [p for i, good in enumerate(right) for p in pair(i, 1, 5 if good else 1, 3, group=str(i // 3))]
    options = settings()
    (result,) = evaluate_pairs(predictions, options)
    found = result.scores["expected"]["accuracy"]
    means = right.reshape(20, 3).mean(axis=1)
    draws = np.random.default_rng(7).integers(0, 20, size=(20_000, 20))
    low, high = np.quantile(means[draws].mean(axis=1), [0.05, 0.95])
    assert found.estimate == pytest.approx(right.mean()) and result.n_groups == 20
    assert found.low == pytest.approx(low, abs=0.03) and found.high == pytest.approx(high, abs=0.03)
    assert high - low > 0.1


def test_several_benchmarks_have_a_mean_of_their_own() -> None:
    predictions = [
        *pair(0, 1, 5, 1, name="p"),
        *(p for i in range(3) for p in pair(i, 1, 1, 5, name="q")),
    ]
    results = evaluate_pairs(predictions, settings(names=("p", "q")))
    assert [(r.name, r.n, r.scores["expected"]["accuracy"].estimate) for r in results] == [
        ("p", 1, 1.0),
        ("q", 3, 0.0),
        ("average", 4, 0.5),
    ]


def test_what_is_undefined_is_said_in_words() -> None:
    (result,) = evaluate_pairs([*pair(0, 0, 3, 2), *pair(1, 0, 3, 3)], settings())
    assert result.scores["expected"]["accuracy"].estimate is None
    assert result.scores["expected"]["accuracy"].note == "undefined: no pair has a preferred response"
    (result,) = evaluate_pairs(pair(0, 1, None, 2), settings())
    found = result.scores["expected"]
    assert found["tie_rate"].note == "undefined: no pair has both scores" and found["unscored_rate"].estimate == 1.0
    (result,) = evaluate_pairs([*pair(0, 1, None, 2), *pair(1, 0, 2, 2)], settings())
    assert result.scores["expected"]["accuracy"].note == "undefined: no scored pair has a preferred response"
    assert evaluate_pairs([], settings()) == []
    with pytest.raises(EvaluationError, match="of the pair in row 1 one judgement is missing"):
        pair_up([*pair(0, 1, 2, 1), pair(1, 1, 2, 1)[1]])


def test_tables_and_json() -> None:
    results = evaluate_pairs(PREDICTIONS, settings(margin=0.25))
    text = pair_table(results, tie_margin=0.25)
    assert "| p | RAIL | 8 | 8 | 2 | 0.400 [" in text and "no further apart than 0.25" in text
    assert "both orders agree" not in text and "each by itself" in text
    assert "pairs/p,expected,accuracy,0.4," in pair_csv_lines(results)
    content = json.loads(json.dumps(pairs_to_json(results), allow_nan=False))
    assert pairs_from_json(content) == results
    with pytest.raises(EvaluationError, match="no results of pairs"):
        pairs_from_json({"p": {"mode": "scores"}})


def test_two_runs_are_compared_on_the_same_pairs() -> None:
    better = [p for i, (label, *_) in enumerate(ROWS) for p in pair(i, label, 3 + label, 3)]
    found = compare_pairs(PREDICTIONS, better, settings())["p"]["expected", "accuracy"]
    # The pair without a score in the first run is left out of both.
    assert (found.estimate_a, found.estimate_b, found.n, found.excluded) == (0.4, 1.0, 5, 3)
    assert found.difference == pytest.approx(0.6) and found.low is not None and 0 < found.low <= 0.6
    assert compare_pairs([], [], settings()) == {}
    with pytest.raises(EvaluationError, match="the label of row 0 of p is 1 in the first and -1"):
        compare_pairs(PREDICTIONS, [*pair(0, -1, 3, 3), *PREDICTIONS[2:]], settings())
