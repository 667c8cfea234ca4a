from __future__ import annotations

import pytest

from real_openrlhf.data.judge_prompt import Rubric
from real_openrlhf.data.template import PromptError
from real_openrlhf.judge.rubrics import as_dimensions, check_weights, combine
from real_openrlhf.judge.types import JudgeError, Score

PARTS = Rubric(criteria="Polite?", descriptions={"1": "Rude.", "5": "Kind."})


@pytest.mark.parametrize(
    ("rubric", "expected"),
    [
        (None, {"": None}),
        ("be kind", {"": "be kind"}),
        (PARTS, {"": PARTS}),
        ({"criteria": "Polite?", "descriptions": {1: "Rude.", 5: "Kind."}}, {"": PARTS}),
        ({"criteria": "Polite?", "score1_description": "Rude.", "score5_description": "Kind."}, {"": PARTS}),
        ({"orig_criteria": "Polite?", "orig_score1_description": "Rude.", "score_5_description": "Kind."}, {"": PARTS}),
        ({"tone": {"criteria": "Polite?"}, "facts": "true?"}, {"tone": Rubric(criteria="Polite?"), "facts": "true?"}),
    ],
)
def test_forms_of_a_rubric(rubric, expected) -> None:
    assert as_dimensions(rubric) == expected


@pytest.mark.parametrize(
    ("rubric", "match"),
    [
        (3, "not int"),
        ({}, "no dimension"),
        ({"tone": 3}, "'tone' of the rubric must be a text"),
        ({"score1_description": {"a": "b"}}, "'criteria' is missing"),
        ({"criteria": "a", "score": "b"}, "no field 'score'"),
        ({"criteria": ""}, "needs criteria"),
        ({"criteria": "a", "score1_description": 7}, "needs a description"),
        ({" ": "a"}, "needs a name"),
    ],
)
def test_what_is_no_rubric(rubric, match: str) -> None:
    with pytest.raises((JudgeError, PromptError), match=match):
        as_dimensions(rubric)


def score(value: float | None, reason: str | None = None) -> Score:
    return Score(
        score=value,
        decoded=value,
        distribution={},
        mass=1.0,
        entropy=0.0,
        feedback="because",
        reason=reason,
        n_forced=1,
        n_invalid=int(value is None),
    )


def test_dimensions_are_averaged_by_weight() -> None:
    scores = {"tone": score(2.0), "facts": score(5.0)}
    plain, weighted = combine(scores, None), combine(scores, {"tone": 1, "facts": 3})
    assert plain.score == 3.5 and weighted.score == pytest.approx((2 + 15) / 4)
    assert plain.distribution is plain.mass is plain.entropy is plain.calibrated is plain.reason is None
    assert plain.n_forced == 2 and plain.dimensions == scores and "facts: because" in plain.feedback
    assert combine({"": scores["tone"]}, None) is scores["tone"]


def test_a_dimension_without_a_score_leaves_no_aggregate() -> None:
    got = combine({"tone": score(2.0), "facts": score(None, "truncated")}, None)
    assert got.score is None and got.decoded is None and got.reason == "facts: truncated" and got.n_invalid == 1


@pytest.mark.parametrize(
    ("weights", "names", "match"),
    [
        ({"tone": 1}, {"tone", "facts"}, r"given for \['tone'\], but the dimensions are \['facts', 'tone'\]"),
        ({"tone": 0}, {"tone"}, "positive number"),
        ({"tone": True}, {"tone"}, "positive number"),
        ({"tone": float("nan")}, {"tone"}, "positive number"),
        ({"tone": 1}, {""}, "several dimensions"),
    ],
)
def test_weights_that_do_not_fit(weights, names, match: str) -> None:
    with pytest.raises(JudgeError, match=match):
        check_weights(weights, names)
