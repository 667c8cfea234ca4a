"""Where a critique gives its score away: feedback ends before its own first verdict.

Two kinds of verdicts are known. A formal one is a mark-up of its own ("Rating: [[7]]", "[RESULT] 4", "Score: 3", "So
the overall score is 4"): the feedback ends right before it. One in prose ("I would rate this response as a 9", "it
meets the criteria for a score of 5", "8 out of 10", "a perfect score") gives the label away with its whole sentence:
the feedback ends before that sentence.

Digits that are content ("19 integers", "x < 10") stay. Where the two cannot be told apart, as in a critique that
quotes a task about ratings, the cut is made: a shorter feedback is better than a leaked label.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

_NUMBER = r"(?P<value>\d+(?:\.\d+)?)"
# What mark-up puts between a word and its number: **Score:** [4], Rating: "7".
_MARKS = r"""[\s*_"'`(\[#:=-]{0,8}"""
_FORMAL = tuple(
    re.compile(pattern, re.IGNORECASE)
    for pattern in (
        r"\[RESULT\]" + _MARKS + rf"(?:{_NUMBER})?",
        rf"(?:\bso,?\s+)?\b(?:the|my)\s+(?:overall|final)\s+(?:score|rating|grade)\s+(?:is|would\s+be|:){_MARKS}"
        rf"(?:{_NUMBER})?",
        r"(?:\b(?:final|overall)\s+)?\b(?:score|rating|grade|verdict)[*_\"'`\])]{0,3}\s?[:=]" + _MARKS + _NUMBER,
        # The same with a word or a line in between, as long as a doubled bracket holds the number.
        r"(?:\b(?:final|overall)\s+)?\brating\b[^\[\].]{0,20}\[\[\s*" + _NUMBER,
        r"(?m:^\s*\[\s*" + _NUMBER + r"\s*\]\s*$)",
    )
)
_PROSE = tuple(
    re.compile(pattern, re.IGNORECASE)
    for pattern in (
        r"\[\[\s*" + _NUMBER + r"\s*\]\]",
        r"\bscor(?:e|es|ed|ing)\b(?:\s+(?:it|this|the\s+response))?(?:\s+(?:of|as|at|is|was|with|would\s+be|level))*"
        r"(?:\s+an?)?\s+[\"'\[(]*" + _NUMBER,
        r"\b(?:rating|grade|mark)\b\s+(?:of|is|was|as|would\s+be)\s+(?:an?\s+)?[\"'\[(]*" + _NUMBER,
        r"\b(?:I|we)(?:'d|'ll|\s+would|\s+will|\s+can|\s+have)?\s+(?:\w+\s+)?(?:rate|give|score|grade|assign|award)\b"
        r"[^.\n\d]{0,100}?\b" + _NUMBER,
        r"\b(?:response|answer|performance)\b(?:\s+\w+)?\s+(?:is|was|should\s+be|would\s+be|can\s+be|deserves|earns|"
        r"receives|gets|merits)\s+(?:(?:rated|graded|given|scored)\s+)?(?:as\s+|at\s+|with\s+)?an?\s+[\"'\[(]*"
        + _NUMBER
        + r"(?=[.,;!\s]*(?:$|[A-Z\n]|out\b|for\b|on\b))",
        r"\b(?:requirements?|criteria|rubric)\b[^.\n\d]{0,30}\bfor\s+an?\s+" + _NUMBER,
        r"\b(?:level\s+)?" + _NUMBER + r"[\s-]+(?:score|rating)\b",
        r"(?P<value>)\b(?:perfect|full|maximum|highest|top)[\s-]+(?:scor(?:e|es|ing)|marks?|rating)\b",
        r"(?<![\d.,/-])" + _NUMBER + r"\s*(?:out\s+of|/)\s*(?:5|10|100)\b(?![\d.,/]*\d)",
    )
)
_SENTENCE_END = re.compile(r"[.!?][\"')\]*]*\s+|\n+")
_HEAD = re.compile(r"\[[A-Za-z ]{1,30}\]?")
_OPENING = " \t\r\n*_\"'`([#:=-"


@dataclass(frozen=True, kw_only=True)
class Critique:
    """feedback: the text before the first verdict, stripped; may be empty. verdict: the number of the first formal
    verdict; None when there is none, or when it names no number."""

    feedback: str
    verdict: float | None


def cut(text: str) -> Critique:
    """End a critique before its own first verdict; a text without one comes back whole, without space at its ends.

    >>> cut("Clear and correct. Rating: [[9]]")
    Critique(feedback='Clear and correct.', verdict=9.0)
    >>> cut("Clear. It meets the criteria for a score of 5.").feedback
    'Clear.'
    """
    formal = [match for pattern in _FORMAL for match in pattern.finditer(text)]
    bracketed = [match for match in _PROSE[0].finditer(text)]
    ends = [match.start() for match in formal]
    ends += [_sentence_start(text, match.start()) for pattern in _PROSE for match in pattern.finditer(text)]
    named = [match for match in [*formal, *bracketed] if match["value"] is not None]
    first = min(named, key=lambda match: match.start("value"), default=None)
    kept = text[: min(ends, default=len(text))]
    feedback = _without_opening(kept) if ends else kept
    return Critique(feedback=feedback.strip(), verdict=None if first is None else float(first["value"]))


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
