"""Feedback ends before its own first verdict: forms by hand, and no label left in the real critiques."""

from __future__ import annotations

import gzip
import json
import re
from pathlib import Path

import pytest

from real_openrlhf.data.verdict import cut

DATA = Path(__file__).parents[3].parent / "shared" / "data"
needs_data = pytest.mark.skipif(not DATA.is_dir(), reason="the real data are not at ../shared/data beside the checkout")


@pytest.mark.parametrize(
    ("text", "verdict"),
    [
        ("Clear. Rating: [[7]]", 7.0),
        ("Clear.\n\nRating: [[8.5]]\nIt could be longer.", 8.5),
        ("Clear. **Final Rating:** [[9]]", 9.0),
        ("Clear. [RESULT] 4", 4.0),
        ("Clear.\n[RESULT] (4)", 4.0),
        ("Clear. So the overall score is 4. [RESULT] 4", 4.0),
        ("Clear. so the overall score is 4", 4.0),
        ("Clear. Therefore, the final score is: 2", None),
        ("Clear. Score: 3", 3.0),
        ('Clear. "Score": "3"', 3.0),
        ("Clear. Overall score: 3/5", 3.0),
        ("Clear. I would rate the response as a [[8]].", 8.0),
    ],
)
def test_formal_verdicts(text: str, verdict: float | None) -> None:
    critique = cut(text)
    assert critique.feedback in ("Clear.", "Clear. Therefore,")
    if verdict is not None:
        assert critique.verdict == verdict


@pytest.mark.parametrize(
    "sentence",
    [
        "Therefore, I would rate this response as a 10.",
        "I rate it a 9 out of 10.",
        "It meets the criteria for a score of 5 as per the rubric.",
        "It meets the requirements of score 5.",
        "It is in line with the requirements of the rubric for a 5.",
        "This is a level 5 score.",
        "The assistant's response is rated a 4.",
        "It earns a rating of 3.",
        "It deserves a perfect score.",
        "All in all 4/5.",
    ],
)
def test_a_verdict_in_prose_goes_with_its_sentence(sentence: str) -> None:
    assert cut(f"Clear. Correct! {sentence} Well done.").feedback == "Clear. Correct!"


@pytest.mark.parametrize(
    "text",
    [
        "There are 19 integers with |x + 10| < 5, not 4.",
        "Points 3 and 9 are repeated, and the code returns dp[0][1] = 2.",
        "It kept the headline under 10 words and rated nothing.",
        "A scoring table with 5 rows is missing.",
    ],
)
def test_numbers_that_are_content_stay(text: str) -> None:
    critique = cut(f" {text}\n")
    assert critique.feedback == text and critique.verdict is None


@pytest.mark.parametrize(
    "text", ["Rating: [[9]]\n\nWell done.", "[Rating]\nRating: [[8]]", "\n[The Start of Rating]\n\n[5]\n"]
)
def test_a_verdict_at_the_start_leaves_nothing(text: str) -> None:
    assert cut(text).feedback == ""


# Written apart from the patterns that cut: words that introduce a score, soon followed by a number.
LEAK = re.compile(
    r"\[\[\s*\d+(?:\.\d+)?\s*\]\](?!\s*\*)|\[RESULT\]|overall score is|\brating:|\bscore:|\bscore of \d|"
    r"\bscore [1-5]\b|"
    r"\brating of \d|\brate (?:it|this|the)\b[^.]{0,60}\b\d|\b\d+(?:\.\d+)? out of 10\b",
    re.IGNORECASE,
)


@needs_data
def test_no_label_is_left_in_the_real_critiques() -> None:
    with gzip.open(DATA / "mtbench_judgments.jsonl.gz", "rt", encoding="utf-8") as file:
        pool = [json.loads(line) for line in file]
    single = [row for row in pool if row["n"] == 1]
    assert len(single) == 4594
    critiques = [cut(row["feedback"]) for row in single]
    # All verdicts that were found are the labels: the first verdict is the critique's own.
    assert [critique.verdict for critique in critiques] == [row["score"] for row in single]
    assert sum(not critique.feedback for critique in critiques) < 20
    vicuna = json.loads((DATA / "vicuna_eval.json").read_text(encoding="utf-8"))
    texts = [critique.feedback for critique in critiques]
    texts += [cut(text).feedback for row in vicuna for text in row["gpt4_feedback"]]
    assert [text for text in texts if LEAK.search(text)] == []
    assert all(texts[len(critiques) :])
