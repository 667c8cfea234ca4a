"""Where a critique gives its score away: feedback holds none of its own verdicts.

Two kinds of verdicts are known. A formal one is a mark-up of its own ("Rating: [[7]]", "[RESULT] 4", "Score: 3",
"评分：4", "<score>3</score>", "{'score': 7}"): the feedback ends right before it. One in prose ("I would rate this
response as a 9", "it meets the criteria for a score of 5", "8 out of 10", "a perfect score", "Thus \\boxed{9}") gives
the label away with its whole sentence: the feedback ends before that sentence. Where a verdict comes first and the
reasons after it, the reasons are the feedback.

Digits that are content ("19 integers", "x < 10") stay. Where the two cannot be told apart, as in a critique that
quotes a task about ratings, the cut is made: a shorter feedback is better than a leaked label.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

_NUMBER = r"(?P<value>\d+(?:\.\d+)?)"
_WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
_COUNTED = rf"(?:{_NUMBER}|(?P<word>{'|'.join(_WORDS)}|[零一二三四五六七八九十])(?![^\W\d_]))"
# What mark-up puts between a word and its number: **Score:** [4], Rating: "7".
_MARKS = r"""[\s*_"'`(\[#:=：＝→>-]{0,8}"""
# Words that mean a score and little else, in languages that judges write in.
_SCORE = (
    r"(?:score|rating|grade|verdict|punktzahl|bewertung|wertung|puntuación|puntuacion|puntaje|calificación|pontuação|"
    r"punteggio|оценка|балл|评分|得分|总分|分数|評分|總分|分數|评级|スコア|評価|採点|点数|점수|평점|총점|skor|điểm|คะแนน|"
    r"स्कोर|अंक|الدرجة|التقييم)"
)
# Words that may mean one: only where the number ends the sentence.
_VAGUE = r"(?:overall|total|result|mark|note|nota|noten?|итог|总体|總體|综合|結果|合計|종합|総合)"
_SEPARATOR = r"\s?(?:[:：=＝→]|->|=>|–|—)"
_UNIT = (
    r"(?:\s*(?:/|out\s+of|of|von|sur|de|su|из)\s*\d+)?\s*(?:points?|pts?|stars?|marks?|punkte?n?|分|点|點|점|балл\w*)?"
)
_FORMAL = tuple(
    re.compile(pattern, re.IGNORECASE)
    for pattern in (
        r"\[RESULT\]" + _MARKS + rf"(?:{_NUMBER})?",
        rf"(?:\bso,?\s+)?\b(?:the|my)\s+(?:overall|final)\s+(?:score|rating|grade)\s+(?:is|would\s+be|:){_MARKS}"
        rf"(?:{_NUMBER})?",
        rf"(?:\b(?:final|overall)\s+)?\b{_SCORE}[*_\"'`\])]{{0,3}}(?:\s?\([^()\n]{{0,20}}\))?{_SEPARATOR}{_MARKS}{_COUNTED}",
        # Scripts without spaces between words: the word may be the end of a longer one.
        rf"[\u3040-\u9fff\uac00-\ud7a3]{{0,6}}(?<=[\u3040-\u9fff\uac00-\ud7a3]){_SCORE}{_SEPARATOR}{_MARKS}{_COUNTED}",
        rf"\b{_VAGUE}[*_\"'`\])]{{0,3}}(?:\s?\([^()\n]{{0,20}}\))?{_SEPARATOR}{_MARKS}{_COUNTED}{_UNIT}"
        r"[\s*_\"'`)\]]*(?=[.!。！]|\n|$)",
        # The same with a word or a line in between, as long as a doubled bracket holds the number.
        r"(?:\b(?:final|overall)\s+)?\brating\b[^\[\].]{0,20}\[\[\s*" + _NUMBER,
        r"(?m:^\s*\[\s*" + _NUMBER + r"\s*\]\s*$)",
        rf"<\s*(?:final_|overall_)?{_SCORE}\b[^<>]{{0,20}}>\s*{_COUNTED}",
        rf"\{{[^{{}}]{{0,400}}?{_SCORE}[\"'\w]{{0,10}}\s*[:：]\s*[\"']?{_NUMBER}",
    )
)
_BRACKETED = re.compile(r"\[\[\s*" + _NUMBER + r"\s*\]\]")
_BOXED = re.compile(r"\\boxed\s*\{\s*" + _NUMBER)
_PROSE = tuple(
    re.compile(pattern, re.IGNORECASE)
    for pattern in (
        r"\bscor(?:e|es|ed|ing)\b(?:\s+(?:it|this|the\s+response))?(?:\s+(?:of|as|at|is|was|with|would\s+be|level))*"
        r"(?:\s+an?)?\s+[\"'\[(]*" + _NUMBER,
        r"\b(?:score|rating|grade)\b[^.\n\d]{0,60}?\b(?:is|was|would\s+be|should\s+be)\s+(?:an?\s+)?[\"'\[(*]*"
        + _COUNTED,
        r"\b(?:rating|grade|mark)\b\s+(?:of|is|was|as|would\s+be)\s+(?:an?\s+)?[\"'\[(]*" + _NUMBER,
        r"\b(?:I|we)(?:'d|'ll|\s+would|\s+will|\s+can|\s+have)?\s+(?:\w+\s+)?(?:rate|give|score|grade|assign|award)\b"
        r"[^.\n\d]{0,100}?\b" + _NUMBER,
        r"\b(?:response|answer|performance)\b(?:\s+\w+)?\s+(?:is|was|should\s+be|would\s+be|can\s+be|deserves|earns|"
        r"receives|gets|merits)\s+(?:(?:rated|graded|given|scored)\s+)?(?:as\s+|at\s+|with\s+)?an?\s+[\"'\[(]*"
        + _NUMBER
        + r"(?=[.,;!\s]*(?:$|[A-Z\n]|out\b|for\b|on\b))",
        r"\b(?:gets?|got|receives?|earns?|deserves?|merits?|awarded|given)\b[^.\n\d]{0,40}?\b"
        + _COUNTED
        + r"\s*(?:points?|pts|marks?|stars?)\b",
        r"\b(?:requirements?|criteria|rubric)\b[^.\n\d]{0,30}\bfor\s+an?\s+" + _NUMBER,
        r"\b(?:level\s+)?" + _NUMBER + r"[\s-]+(?:score|rating)\b",
        r"(?P<value>)\b(?:perfect|full|maximum|highest|top)[\s-]+(?:scor(?:e|es|ing)|marks?|rating)\b",
        r"(?<![\d.,/-])" + _NUMBER + r"\s*(?:out\s+of|/)\s*(?:5|10|100)\b(?![\d.,/]*\d)",
        # "I give it 4 points", as said in Chinese and Japanese.
        r"(?:给|給|打|得|评为|評為|评)[^。！？\n\d]{0,10}" + _NUMBER + r"\s*[分点點]",
    )
)
# Scripts without spaces between sentences end them with marks of their own.
_SENTENCE_END = re.compile(r"[.!?؟][\"')\]*]*\s+|[。！？｡।॥][\"')\]*”’」』）】]*\s*|\n+")
_HEAD = re.compile(r"\[[A-Za-z ]{1,30}\]?")
_OPENING = " \t\r\n*_\"'`([{<#:=-：→【「"
# A number by itself: no part of a name (candidate1) or a formula (y / 2).
_CLOSING = re.compile(
    rf"(?<![\w.,/^*+%=<>-])(?<![/^*+%=<>-]\s){_NUMBER}{_UNIT}[\s.!。！*_\"'`)\]}}>】」]*$", re.IGNORECASE
)


@dataclass(frozen=True, kw_only=True)
class Critique:
    """feedback: the text beside its verdict, stripped; may be empty. verdict: the number of the first formal
    verdict; None when there is none, or when it names no number."""

    feedback: str
    verdict: float | None


def cut(text: str) -> Critique:
    """End a critique before its own first verdict; a text without one comes back whole, without space at its ends.

    >>> cut("Clear and correct. Rating: [[9]]")
    Critique(feedback='Clear and correct.', verdict=9.0)
    >>> cut("Clear. It meets the criteria for a score of 5.").feedback
    'Clear.'
    >>> cut("Score: 4\\nClear, but short.")
    Critique(feedback='Clear, but short.', verdict=4.0)
    """
    formal = [match for pattern in _FORMAL for match in pattern.finditer(text)]
    formal_like = [match for pattern in (_BRACKETED, _BOXED) for match in pattern.finditer(text)]
    prose = [*formal_like, *(match for pattern in _PROSE for match in pattern.finditer(text))]
    starts = [match.start() for match in formal] + [_sentence_start(text, match.start()) for match in prose]
    named = [match for match in [*formal, *formal_like] if _number(match) is not None]
    first = min(named, key=lambda match: match.start(), default=None)
    kept = text[: min(starts, default=len(text))]
    feedback = (_without_opening(kept) if starts else kept).strip()
    if not feedback and first is not None:
        # The verdict first, then the reasons for it.
        feedback = cut(_behind(text, first.end())).feedback
    return Critique(feedback=feedback, verdict=None if first is None else _number(first))


def closing_number(text: str) -> float | None:
    """The number that a text ends with, whatever it means."""
    match = _CLOSING.search(text)
    return None if match is None else float(match["value"])


def without_last_sentence(text: str) -> str:
    """The text before its last sentence; empty for a single one."""
    text = text.rstrip()
    return text[: _sentence_start(text, len(text) - 1)].rstrip()


def _number(match: re.Match[str]) -> float | None:
    found = match.groupdict()
    if found.get("value"):
        return float(found["value"])
    word = (found.get("word") or "").lower()
    if word in _WORDS:
        return float(_WORDS.index(word))
    return float("零一二三四五六七八九十".index(word)) if word else None


def _behind(text: str, position: int) -> str:
    """What stands after a verdict, without its unit and the marks that close it."""
    rest = re.sub(rf"^{_UNIT}", "", text[position:], flags=re.IGNORECASE)
    return re.sub(r"^(?:\[/?\w+\]|</\w+>|[^\w\[<])*", "", rest)


def _sentence_start(text: str, position: int) -> int:
    return max((match.end() for match in _SENTENCE_END.finditer(text, 0, position)), default=0)


def _without_opening(text: str) -> str:
    """Without the mark-up and the heads ("[Rating]" on a line) that were opened for the verdict behind it."""
    while True:
        # A closing code fence belongs to the feedback.
        kept = text.rstrip() if text.rstrip().endswith("```") else text.rstrip(_OPENING)
        before, _, line = kept.rpartition("\n")
        if not _HEAD.fullmatch(line):
            return kept
        text = before
