"""Finds the verdicts in a critique, so that feedback does not tell its own score.

Two kinds of verdicts are known. A formal verdict has its own mark-up ("Rating: [[7]]", "[RESULT] 4", "Score: 3",
"评分：4", "<score>3</score>", "{'score': 7}"): the feedback ends right before it. A verdict in prose ("I would rate
this response as a 9", "it meets the criteria for a score of 5", "8 out of 10", "a perfect score", "Thus \\boxed{9}")
tells the label with its whole sentence: the feedback ends before that sentence. If the verdict comes first and the
reasons after it, the reasons are the feedback.

Digits that are content ("19 integers", "x < 10") stay. If verdict and content cannot be told apart, as in a critique
that quotes a task about ratings, the feedback ends there too: a shorter feedback is better than a leaked label.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

# A number: with a decimal comma or a minus sign too, and in digits of any script.
_NUMBER = r"(?P<value>[-−]?\d+(?:[.．٫]\d+|,\d{1,2}(?!\d))?)"
_CHINESE = "零一二三四五六七八九十"
# Number words, each language ordered by value from 0. Words with other meanings ("un", "due", "null") are left out.
_WORDS = {
    word: value
    for words in (
        "zero one two three four five six seven eight nine ten",
        "- eins zwei drei vier fünf sechs sieben acht neun zehn",
        "zéro - deux trois quatre cinq - sept huit neuf dix",
        "cero uno dos tres cuatro cinco seis siete ocho nueve diez",
        "- - - tre quattro cinque sei sette otto - dieci",
        "- - dois três - - - sete oito nove dez",
        "ноль один два три четыре пять шесть семь восемь девять десять",
        " ".join(_CHINESE),
    )
    for value, word in enumerate(words.split())
    if word != "-"
}
_SPELT = "|".join(word for word in _WORDS if word not in _CHINESE)
_COUNTED = rf"(?:{_NUMBER}|(?P<word>(?:{_SPELT})(?![^\W\d_])|[{_CHINESE}](?=[分点點星\W\d_]|$)))"
# Mark-up between a word and its number: **Score:** [4], Rating: "7". A minus right before the number is its sign.
_MARKS = r"""(?:[\s*_"'`(\[#:=：＝→>]|-(?!\d)){0,8}"""
# Words that mean a score and little else, in languages that judges write in.
_SCORE = (
    r"(?:score|rating|grade|verdict|punktzahl|bewertung|wertung|puntuación|puntuacion|puntaje|calificación|pontuação|"
    r"punteggio|valutazione|ocena|oceny|punktacja|betyg|poäng|cijfer|beoordeling|karakter|arvosana|pisteet|hodnocení|"
    r"pontszám|scor|puan|оценка|балл|оцінка|бал|βαθμολογία|评分|得分|总分|分数|評分|總分|分數|评级|スコア|評価|採点|点数|"
    r"점수|평점|총점|skor|nilai|điểm(?:\s+số)?|คะแนน|स्कोर|अंक|ציון|الدرجة|التقييم)"
)
# Words that may mean a score: they count only if the number ends the sentence.
_VAGUE = (
    r"(?:overall|total|result|judge?ment|evaluation|assessment|mark|note|nota|noten?|итог|总体|總體|综合|"
    r"結果|合計|종합|総合)"
)
_SEPARATOR = r"\s?(?:[:：=＝→|]|->|=>|–|—)"
_UNIT = (
    r"(?:\s*(?:/|out\s+of|of|von|sur|de|su|из)\s*\d+)?\s*(?:points?|pts?|stars?|marks?|punkte?n?|分|点|點|점|балл\w*)?"
)
_FORMAL = tuple(
    re.compile(pattern, re.IGNORECASE)
    for pattern in (
        r"\[RESULT\]" + _MARKS + rf"(?:{_NUMBER})?",
        rf"(?:\bso,?\s+)?\b(?:the|my)\s+(?:overall|final)\s+(?:score|rating|grade)\s+(?:is|would\s+be|:){_MARKS}"
        rf"(?:{_NUMBER})?",
        rf"(?:\b(?:final|overall|total|quality|итоговая|note|puntuación)\s+)?\b{_SCORE}[*_\"'`\])]{{0,3}}(?:\s?\([^()\n]{{0,20}}\))?{_SEPARATOR}{_MARKS}{_COUNTED}",
        # Scripts without spaces between words: the word may be the end of a longer one.
        rf"[\u3040-\u9fff\uac00-\ud7a3]{{0,6}}(?<=[\u3040-\u9fff\uac00-\ud7a3]){_SCORE}{_SEPARATOR}{_MARKS}{_COUNTED}",
        rf"(?:\b(?:final|overall|total)\s+)?\b{_VAGUE}[*_\"'`\])]{{0,3}}(?:\s?\([^()\n]{{0,20}}\))?{_SEPARATOR}{_MARKS}{_COUNTED}{_UNIT}"
        r"[\s*_\"'`)\]]*(?=[.!。！]|\n|$)",
        # The same with a word or a line in between, as long as a doubled bracket holds the number.
        r"(?:\b(?:final|overall)\s+)?\brating\b[^\[\].]{0,20}\[\[\s*" + _NUMBER,
        r"(?m:^\s*\[\s*" + _NUMBER + r"\s*\]\s*$)",
        # A heading, and the number alone on the next line.
        rf"(?m:^[#*\s]{{0,8}}(?:(?:final|overall)\s+)?{_SCORE}[*_]{{0,3}}[ \t]*\n\s*[*_\[(]{{0,3}}{_NUMBER}{_UNIT}"
        r"[*_\])]{0,3}\s*$)",
        rf"<\s*(?:final_|overall_)?(?:{_SCORE}|answer|result|verdict)\b[^<>]{{0,20}}>\s*{_COUNTED}",
        rf"(?:\b{_SCORE}{_SEPARATOR}\s*)?(?:[★⭐🌟]️?){{2,}}[☆✩]*|\b{_SCORE}{_SEPARATOR}\s*[★⭐🌟]️?[☆✩]*|[★⭐][☆✩]+",
        rf"\{{[^}}]{{0,400}}?{_SCORE}[\"'\w]{{0,10}}\s*[:：]\s*[\"']?{_NUMBER}",
    )
)
_BRACKETED = re.compile(r"\[\[\s*" + _NUMBER + r"\s*\]\]")
_BOXED = re.compile(r"\\boxed\s*\{\s*(?:\\text\s*\{\s*)?" + _NUMBER)
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
        r"满分|滿分|満点|만점",
        r"(?P<value>)\b(?:perfect|full|maximum|highest|top)[\s-]+(?:scor(?:e|es|ing)|marks?|rating)\b",
        r"(?<![\d.,/-])" + _NUMBER + r"\s*(?:out\s+of|/)\s*(?:5|10|100)\b(?![\d.,/]*\d)",
        rf"\b{_COUNTED}\s+(?:(?:points?|stars?|marks?)\s+)?out\s+of\s+(?:(?:an?|the)\s+)?(?:possible\s+)?"
        r"(?:five|ten|hundred|5|10|100)\b",
        # "I give it 4 points", as said in Chinese and Japanese.
        r"(?:给|給|打|得|评为|評為|评)[^。！？\n\d]{0,10}" + _NUMBER + r"\s*[分点點]",
    )
)
# Scripts without spaces between sentences end them with their own marks.
_SENTENCE_END = re.compile(r"[.!?؟][\"')\]*]*\s+|[。！？｡।॥][\"')\]*”’」』）】]*\s*|\n+")
_HEAD = re.compile(r"\[[A-Za-z ]{1,30}\]?")
_OPENING = " \t\r\n*_\"'`([{<#:=-：→【「|"
_FENCE = re.compile(r"```[a-z]*\s*\Z")
# A number alone: not part of a name (candidate1) or a formula (y / 2).
_CLOSING = re.compile(
    rf"(?<![\w.,/^*+%=<>-])(?<![/^*+%=<>-]\s){_NUMBER}{_UNIT}[\s.!。！*_\"'`)\]}}>】」|]*$", re.IGNORECASE
)
# How a sentence gives a number as a score. It only counts if the number is the label: most such numbers are content.
_POINT = (
    r"(?:점|[点點](?=[でだとをがにの、。！\s]|$)|分(?![钟鐘之别別析为為段割享开開成布发発解类数])|星|балл\w*|puan\w*|puntos?|"
    r"pontos?|punt[oi]|punten|punkte?n?|poäng|điểm|คะแนน|अंक|نقاط|درجات|נקודות|stars?|marks?|étoiles?|sterne?|"
    r"estrell?as?|stell[ae]|points?\s+(?:for|because|since|as|due|overall|from|to|in\s+total))(?![A-Za-z])"
)
_WHY = (
    r"(?:because|since|as|for|here|overall|from|given|at|in\s+my|then|but|weil|da|denn|für|von|por|porque|car|pour|parce|"
    r"perché|per|omdat|want)"
)
_SAID = tuple(
    re.compile(pattern, re.IGNORECASE)
    for pattern in (
        rf"(?<![A-Za-z\d.,/^-]){_COUNTED}\s*{_POINT}",
        rf"\b(?:an?|eine?r?|un[ea]?|uma?|een|en|ett)\s+[\"'*\[(]*{_NUMBER}[\"'*\])]*(?=\s*(?:[.,;:!?)]|$)|\s+{_WHY}\b)",
        r"\b(?:say|go(?:ing)?\s+with|settled?\s+on|vote\s+for|choose|chose|pick(?:ed)?|assign|merits?|deserves?|gets|"
        rf"rated|rating|graded|grade|scored?|scores|level|mark|note|nota)\s+(?:it\s+)?(?:an?\s+)?[\"'*\[(]*{_COUNTED}"
        rf"[\"'*\])]*{_UNIT}(?=\s*(?:[.,;:!?)]|$)|\s+(?:is|by|{_WHY})\b)",
    )
)
_OPENS = re.compile(rf"\W*?(?:{_SCORE}\s+)?{_NUMBER}{_UNIT}\W{{0,3}}(?:\s*[-–—:|]\s|[.)]\s|\n)\s*", re.IGNORECASE)


@dataclass(frozen=True, kw_only=True)
class Critique:
    """feedback: the text without its verdict, stripped; may be empty. verdict: the number of the first formal
    verdict; None when there is none, or when it has no number."""

    feedback: str
    verdict: float | None


def cut(text: str) -> Critique:
    """End a critique before its own first verdict; a text without one stays as it is, without space at its ends.

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
        # The verdict comes first, then the reasons for it.
        feedback = cut(_after(text, first.end())).feedback
    elif not feedback and (opening := _OPENS.match(text)):
        feedback = cut(text[opening.end() :]).feedback
    return Critique(feedback=feedback, verdict=None if first is None else _number(first))


def closing_number(text: str) -> float | None:
    """The number that a text ends with, whatever it means."""
    match = _CLOSING.search(text)
    return None if match is None else _number(match)


def until_last_sentence(text: str) -> str:
    """The text up to the end of its last whole sentence; all of it where no sentence ends.

    >>> until_last_sentence("Clear and correct. But it does n")
    'Clear and correct.'
    """
    text = text.strip()
    whole = text[: max((match.end() for match in _SENTENCE_END.finditer(text + " ")), default=0)].strip()
    return whole or text


def without_last_sentence(text: str) -> str:
    """The text before its last sentence; empty for a single one."""
    text = text.rstrip()
    return text[: _sentence_start(text, len(text) - 1)].rstrip()


def without_label(text: str, label: float, name: str | None = None) -> tuple[str, list[str]]:
    """A feedback without the sentences that say its label in no known form of verdict, and why they were removed.

    name: the label's text, on a scale of words.

    >>> without_label("Clear. For me it is a 4 because of its length. Well done.", 4)
    ('Clear.', ['a sentence said its label'])
    """
    reasons = []
    opening = _OPENS.match(text)
    # "1. ... 2. ..." is a list.
    if opening and _number(opening) == label and not re.search(rf"(?:^|\s){label + 1:g}[.)]\s", text):
        text = text[opening.end() :]
        reasons.append("it began with its label")
    while (place := _says(text, label, name)) is not None:
        reasons.append("a sentence said its label")
        start, following = _sentence_start(text, place), _SENTENCE_END.search(text, place)
        # Keep the text before that sentence; if there is none, the text after it.
        text = text[:start].rstrip() or (text[following.end() :].lstrip() if following else "")
    if text and closing_number(text) == label:
        reasons.append("its last sentence ended with its label")
        text = without_last_sentence(text)
    return text, list(dict.fromkeys(reasons))


def _says(text: str, label: float, name: str | None) -> int | None:
    """Where a text first says its label."""
    places = [match.start() for pattern in _SAID for match in pattern.finditer(text) if _number(match) == label]
    if name is not None:
        word = rf"[\s*_\"'`(\[]{{0,6}}{re.escape(name)}(?!\w)"
        heads = rf"(?:{_SCORE}|{_VAGUE})[*_\"'`\])]{{0,3}}(?:{_SEPARATOR}|\s+(?:is|as|of)\b)"
        marks = rf"\[\[|\\boxed\s*\{{(?:\\text\s*\{{)?|<\s*(?:{_SCORE}|answer|result)\s*>"
        for pattern in (
            rf"(?:\b{heads}|{marks}){word}",
            rf"\b(?:rate|grade|judge)d?\b[^.\n]{{0,60}}?\bas{word}",
            rf"(?-i:{re.escape(name)})(?=[\s.!。！*_\"'`)\]}}>】」]*\Z)(?<!\w{re.escape(name)})",
        ):
            places += [match.start() for match in re.finditer(pattern, text, re.IGNORECASE)]
    return min(places, default=None)


def _number(match: re.Match[str]) -> float | None:
    found = match.groupdict()
    if found.get("value"):
        return float(re.sub("[,．٫]", ".", found["value"]).replace("−", "-"))
    word = (found.get("word") or "").lower()
    return float(_WORDS[word]) if word else None


def _after(text: str, position: int) -> str:
    """The text after a verdict, without the verdict's unit and closing marks."""
    rest = re.sub(rf"^{_UNIT}", "", text[position:], flags=re.IGNORECASE)
    return re.sub(r"^(?:\[/?\w+\]|</\w+>|[^\w\[<])*", "", rest)


def _sentence_start(text: str, position: int) -> int:
    return max((match.end() for match in _SENTENCE_END.finditer(text, 0, position)), default=0)


def _without_opening(text: str) -> str:
    """The text without mark-up and headings at its end ("[Rating]" on a line) that belong to the verdict after it."""
    while True:
        # A closing code fence belongs to the feedback, an opening one to the verdict.
        fence = _FENCE.search(text)
        if fence and text.count("```") % 2:
            text = text[: fence.start()]
        kept = text.rstrip() if text.rstrip().endswith("```") else text.rstrip(_OPENING)
        before, _, line = kept.rpartition("\n")
        if not _HEAD.fullmatch(line):
            return kept
        text = before
