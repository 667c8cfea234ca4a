"""Feedback ends before its own first verdict: forms by hand, and no label left in the real critiques."""

from __future__ import annotations

import gzip
import json
import re
from pathlib import Path

import pytest

from real_openrlhf.data.verdict import closing_number, cut, without_label, without_last_sentence

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


@pytest.mark.parametrize("text", ["Rating: [[9]]", "[Rating]\nRating: [[8]]", "\n[The Start of Rating]\n\n[5]\n"])
def test_nothing_but_a_verdict_leaves_nothing(text: str) -> None:
    assert cut(text).feedback == ""


@pytest.mark.parametrize(
    "text",
    [
        "Rating: [[9]]\n\nWell done.",
        "Rating: [[9]] Well done.",
        "Score: 9/10. Well done.",
        "<score>9</score> Well done.",
        "Note: 9\nWell done.",
        "评分：9分。Well done.",
        "Rating: 9\nWell done. All in all 9/10.",
    ],
)
def test_reasons_behind_a_verdict_are_the_feedback(text: str) -> None:
    critique = cut(text)
    assert critique.feedback == "Well done." and critique.verdict == 9


@pytest.mark.parametrize(
    ("text", "feedback", "verdict"),
    [
        ("回答正确但是太短。表述清楚。总分：[[8]]", "回答正确但是太短。表述清楚。", 8),
        ("回答有错误。评分：4", "回答有错误。", 4),
        ("内容完整。{'事实正确性': 8, '综合得分': 7}", "内容完整。", 7),
        ("間違いがある。スコア：3点", "間違いがある。", 3),
        ("좋습니다. 점수: 4점", "좋습니다.", 4),
        ("Хорошо. Оценка: 5", "Хорошо.", 5),
        ("Gut. Bewertung: 4 von 5", "Gut.", 4),
        ("Too short. <score>3</score>", "Too short.", 3),
        ("Fine. Final Score → 6", "Fine.", 6),
        ("Fine. Score (out of 10): 6", "Fine.", 6),
        ("Fine. Score: four", "Fine.", 4),
        ("Fine. Overall: 6", "Fine.", 6),
        ("Gut. Bewertung: vier", "Gut.", 4),
        ("Gut. Bewertung: 8,5 von 10", "Gut.", 8.5),
        ("不错。评分：四分", "不错。", 4),
        ("Хорошо. Итоговая оценка — 4 из 5.", "Хорошо.", 4),
        ("İyi. Puan: 4, çünkü kısa", "İyi.", 4),
        ("Dobrze. Ocena: 4, bo krótko", "Dobrze.", 4),
        ("जवाब अच्छा है। अंक: ४, क्योंकि", "जवाब अच्छा है।", 4),
        ("Fine. Score: -1", "Fine.", -1),
        ("Fine. Score: −1, alas", "Fine.", -1),
        ("Fine. Quality rating: 4", "Fine.", 4),
        ("Fine. <answer>4</answer>", "Fine.", 4),
        ('Fine. ```json\n{"rating": 4}\n```', "Fine.", 4),
        ('Fine. {"overall": {"score": 4}}', "Fine.", 4),
        ("Fine. | Score | 4 |", "Fine.", 4),
        ("Fine.\n## Rating\n\n**4**\n", "Fine.", 4),
        ("Fine. Thus \\boxed{\\text{4}}", "Fine.", 4),
        ("Fine. Score: ⭐⭐⭐⭐", "Fine.", None),
        ("Fine. ★★★★☆", "Fine.", None),
        ("Fine. 4 points out of 5 for clarity.", "Fine.", None),
        ("Fine. Four out of five, all told.", "Fine.", None),
        ("不错。满分。", "不错。", None),
        ('Fine. {"feedback": "ok", "score": 2}', "Fine.", 2),
        ("Correct. Thus \\boxed{9}", "Correct.", 9),
        ("Fine. The score for this response is 6.", "Fine.", None),
        ("Fine. The response gets 6 points.", "Fine.", None),
        ("不错。我给这个回答打4分。", "不错。", None),
    ],
)
def test_verdicts_of_other_forms_and_languages(text: str, feedback: str, verdict: float | None) -> None:
    critique = cut(text)
    assert critique.feedback == feedback and critique.verdict == verdict


@pytest.mark.parametrize(
    ("text", "feedback"),
    [
        ("좋습니다. 이 응답은 4점입니다.", "좋습니다."),
        ("良い。この回答は4点です。短い。", "良い。"),
        ("不错。我认为这个回答是4分的水平。", "不错。"),
        ("Хорошо. Ставлю четыре балла этому ответу.", "Хорошо."),
        ("Gut. Ich gebe der Antwort eine 4, weil sie klar ist.", "Gut."),
        ("Bien. Le doy un 4 por su claridad.", "Bien."),
        ("İyi. Bu cevaba 4 puan veriyorum.", "İyi."),
        ("Tốt. Tôi cho 4 điểm vì rõ ràng.", "Tốt."),
        ("Fine. It's a 4 from me, sadly.", "Fine."),
        ("Fine. I'd give it four stars, I think.", "Fine."),
        ("Fine. I would go with a 4 here.", "Fine."),
        ("Fine. I'd say 4 is fair.", "Fine."),
        ("Fine. It is rated 4 by me.", "Fine."),
        ("4点です。理由は明快です。", "理由は明快です。"),
        ("4 - clear and short.", "clear and short."),
        ("Fine. Panel says 4", "Fine."),
    ],
)
def test_a_sentence_that_says_the_label_goes_and_one_with_another_number_stays(text: str, feedback: str) -> None:
    left, reasons = without_label(cut(text).feedback, 4)
    assert left == feedback and len(reasons) == 1
    assert without_label(text, 3) == (text, [])


@pytest.mark.parametrize("text", ["4/5: clear and short.", "Score 4: clear and short.", "**4/5** - clear and short."])
def test_reasons_behind_a_verdict_in_no_formal_form(text: str) -> None:
    assert cut(text).feedback == "clear and short."


@pytest.mark.parametrize(
    ("label", "text"),
    [
        (1, "1. It is short.\n2. It is clear."),
        (3, "有3点不足：太短。"),
        (4, "用时4分钟，太长。"),
        (4, "The essay makes 4 points clearly. It is good."),
        (4, "This is a 4 step process. It returned 4, which is correct."),
        (9, "It suits the grade level (9-10) well."),
        (1, "The user asked the assistant to pick one case study. It did."),
        (7, "It uses Python 3.7 properly."),
        (5, "It uses an emoji ⭐ well."),
    ],
)
def test_the_labels_number_stays_where_it_is_content(label: float, text: str) -> None:
    assert without_label(cut(text).feedback, label) == (text, [])


@pytest.mark.parametrize(
    "said", ["Overall: Good", "Rating: good.", "[[Good]]", "I rate it as good.", "Good.", "<score>Good</score>"]
)
def test_a_label_that_is_a_word(said: str) -> None:
    assert without_label(f"Clear. {said}", 3, "Good") == ("Clear.", ["a sentence said its label"])
    assert without_label("A good answer. Good grammar too.", 3, "Good") == ("A good answer. Good grammar too.", [])


def test_the_number_that_closes_a_text() -> None:
    assert closing_number("Panel says 7.") == 7 and closing_number("so: 4/5") == 4 and closing_number("7 rows") is None
    # Names and formulas end in digits that judge nothing.
    for text in ("return candidate1\n```", "So, z - x = - (y / 2).", "x = 4", "It costs 1,004.", "rows 3-4."):
        assert closing_number(text) is None
    assert closing_number("It says -1.") == -1
    assert without_last_sentence("Clear. Panel says 7.") == "Clear." and without_last_sentence("Panel 7") == ""


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
