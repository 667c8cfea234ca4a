"""Two responses in one prompt, on a backend with a script: orders, ties, a judge that prefers a place, faults."""

from __future__ import annotations

from pathlib import Path

import pytest

from real_openrlhf.algo.score_scale import ScoreScale
from real_openrlhf.data.judge_prompt import JudgeTemplate, Rubric
from real_openrlhf.data.template import PromptError
from real_openrlhf.judge.pairs import one_prompt, verdict
from real_openrlhf.judge.types import JudgeError
from tests.unit.judge.test_judge import EXPECTED, ROWS, make

SCALE = ScoreScale.parse("1-3")


def script(scores):
    """scores: (first answer is the good one, second is) -> the label that is written."""

    def say(prompt, sample):
        words = prompt.text.split("answer :")[1]
        first, second = words.split("[End of the second")[0].split("[Second")
        label = scores["good" in first, "good" in second]
        return f"this is {label} . So the overall score is {label} <eos>", ROWS[label]

    return say


FAIR = {(True, False): "3", (False, True): "1", (True, True): "2", (False, False): "2"}


def test_both_orders_are_asked_and_agree(folder: Path) -> None:
    judge, fake = make(folder, script(FAIR))
    got = judge.compare("a", "good", "bad", mode="one_prompt")
    ((first, second), _, _) = fake.calls[0]
    assert len(fake.calls) == 1 and first.text.index("good") < first.text.index("bad")
    assert second.text.index("bad") < second.text.index("good")
    assert (got.winner, got.consistent, got.a.decoded, got.b.decoded) == ("a", True, 3.0, 1.0)
    assert got.difference == pytest.approx((EXPECTED["3"] - EXPECTED["1"]) / 2, abs=1e-6)
    turned = judge.compare("a", "bad", "good", mode="one_prompt")
    assert (turned.winner, turned.consistent) == ("b", True) and turned.difference == pytest.approx(-got.difference)
    alone, _ = make(folder)
    assert alone.compare("a", "good", "bad").consistent is None  # each by itself


def test_a_judge_that_prefers_the_first_place_is_not_consistent(folder: Path) -> None:
    judge, _ = make(folder, script(dict.fromkeys(FAIR, "3")))
    got = judge.compare("a", "good", "bad", mode="one_prompt")
    assert (got.winner, got.difference, got.consistent) == ("tie", 0.0, False)
    # It says 3 with the good answer first and 2 with it second: inconsistent, and still for the good one.
    judge, _ = make(folder, script({**FAIR, (False, True): "2"}))
    got = judge.compare("a", "good", "bad", mode="one_prompt", tie_margin=0.3)
    assert got.difference == pytest.approx((EXPECTED["3"] - EXPECTED["2"]) / 2, abs=1e-6) and got.difference < 0.5
    assert (got.winner, got.consistent) == ("a", False)


@pytest.mark.parametrize(
    ("first", "second", "margin", "difference", "winner", "in_order"),
    [
        (3.0, 1.0, 0.0, 1.0, "a", ("a", "a")),
        (1.0, 3.0, 0.0, -1.0, "b", ("b", "b")),
        (2.0, 2.0, 0.0, 0.0, "tie", ("tie", "tie")),
        (3.0, 3.0, 0.0, 0.0, "tie", ("a", "b")),
        (2.5, 2.0, 0.0, 0.25, "a", ("a", "tie")),
        (2.5, 2.0, 0.25, 0.25, "tie", ("a", "tie")),
        (2.5, 1.5, 0.5, 0.5, "tie", ("tie", "tie")),
    ],
)
def test_the_verdict_on_two_orders(
    first: float, second: float, margin: float, difference: float, winner: str, in_order: tuple[str, str]
) -> None:
    got = verdict(first, second, mode="one_prompt", scale=SCALE, tie_margin=margin)
    assert got is not None and (got.difference, got.winner, got.in_order) == (difference, winner, in_order)
    assert got.consistent is (in_order[0] == in_order[1])


def test_the_verdict_on_two_scores() -> None:
    got = verdict(1.5, 2.0, mode="scores", scale=SCALE, tie_margin=0.0)
    assert got is not None and (got.difference, got.winner, got.consistent) == (-0.5, "b", None)
    assert verdict(None, 2.0, mode="scores", scale=SCALE, tie_margin=0.0) is None
    assert verdict(2.0, None, mode="one_prompt", scale=SCALE, tie_margin=0.0) is None


def test_the_rubric_says_which_end_of_the_scale_is_whose() -> None:
    item = one_prompt(
        {"instruction": "i", "rubric": Rubric(criteria="Is it kind?", descriptions={"1": "Rude."})}, "x", "y", SCALE
    )
    assert str(item["rubric"]) == (
        "[Which of the two answers is better? Judge by this: Is it kind?]\nScore 1: The second answer is much better.\n"
        "Score 2: Both answers are equally good.\nScore 3: The first answer is much better."
    )
    assert item["response"].index("x") < item["response"].index("[Second answer]\ny")
    even = one_prompt({"instruction": "i"}, "x", "y", ScoreScale.parse("1-4"))["rubric"]
    assert list(even.descriptions) == ["1", "4"] and "Judge by" not in even.criteria  # no score is the middle
    several = one_prompt({"instruction": "i", "rubric": {"tone": "Polite?", "facts": "True?"}}, "x", "y", SCALE)
    assert set(several["rubric"]) == {"tone", "facts"}


def test_a_missing_score_is_no_verdict(folder: Path) -> None:
    mute, _ = make(folder, lambda prompt, sample: ("b c", ROWS["1"]), force=False)
    got = mute.compare("a", "good", "bad", mode="one_prompt")
    assert (got.winner, got.difference, got.consistent, got.a.reason) == (None, None, None, "no_anchor")


def test_what_cannot_be_asked(folder: Path) -> None:
    judge, fake = make(folder, script(FAIR))
    with pytest.raises(JudgeError, match="no mode 'both' of comparison; there are scores, one_prompt"):
        judge.compare("a", "b", "c", mode="both")
    with pytest.raises(JudgeError, match="a response is text, not NoneType"):
        judge.compare("a", "b", None, mode="one_prompt")  # type: ignore[arg-type]
    bare = JudgeTemplate(name="bare", text="rate : {{ instruction }} answer : {{ response }}")
    plain, _ = make(folder, script(FAIR), template=bare)
    with pytest.raises(PromptError, match="no place for the rubric"):
        plain.compare("a", "b", "c", mode="one_prompt")
    assert fake.calls == []
