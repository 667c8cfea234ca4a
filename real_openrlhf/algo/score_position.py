"""Finds the score in a response, from its token ids.

The chain of thought ends where the last answer anchor ends; the score begins with the next token. Offsets
from the end of the text are never used: a trailing newline, text after the score, a missing or an
early end of text all leave the position where it is.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Collection, Sequence
from dataclasses import dataclass

from real_openrlhf.algo.bound_scale import BoundAnchor, BoundScale, Tokenizer, decode
from real_openrlhf.algo.types import NO_ANCHOR, OFF_SCALE, SPLIT_ANCHOR, TRUNCATED, ScoreReading

# Decimal points and thousands separators: full-width, Arabic, raised and Swiss ones, and French no-break spaces. In
# Chinese and Japanese 点 is both: "4点5" is 4.5, "4点" four points.
_POINTS = frozenset(".,．，٫٬،·'’点點\u00a0\u202f")
# Units in Latin letters, in several languages; units in other scripts need no list.
_UNIT = re.compile(
    r"(?:points?|pts?|stars?|marks?|pkt|punkte?n?|puntos?|pontos?|punt[oi]|punten|puan|poin|poäng|điểm|"
    r"sterne?n?|étoiles?|estrell?as?|stell[ae]|sao)(?![^\W\d_])",
    re.IGNORECASE,
)
# "4半" and "4分半" are 4.5.
_AND_A_HALF = re.compile(r"[分点點星점]?半")
# Number of tokens tried on both sides of a bisected position: a character has at most 4 bytes, so at most 4 tokens.
_SLACK = 4


@dataclass(frozen=True)
class ScoreReader:
    """Reads score positions for one bound scale.

    end_ids: ids that end a response (end of text, end of turn). The response ends at the first one.
    """

    bound: BoundScale
    tokenizer: Tokenizer
    end_ids: frozenset[int]

    @classmethod
    def build(cls, bound: BoundScale, tokenizer: Tokenizer, end_ids: Collection[int]) -> ScoreReader:
        return cls(bound, tokenizer, frozenset(end_ids))

    def read(self, token_ids: Sequence[int]) -> ScoreReading:
        """Find the score of a response [T].

        | response                                    | result                                      |
        |---------------------------------------------|---------------------------------------------|
        | "... score is 4", then anything or nothing  | position and label of the 4                 |
        | "... score is 4分", "4점", "4pts"            | position and label of the 4: a unit         |
        | "... score is 4th", "4a", "4点5", "4分半"    | position, no label: "off_scale": another    |
        |                                             | word or number                              |
        | the anchor several times                    | the last complete one counts, whatever      |
        |                                             | comes after it                              |
        | "... score is 7" or "is 45" on "1".."5"     | position, no label: "off_scale"             |
        | "... score is 10." on "1".."10"             | the longest label that fits: "10"           |
        | ends after "1" on "1".."10", after "4." on  | position, no label: "off_scale", since a    |
        |   a scale with "4.5"                        | longer label might have followed            |
        | a label's text in other tokens than those   | position, no label: "off_scale"             |
        |   that the tokenizer gives it               |                                             |
        | end of text right after the anchor          | position, no label: "off_scale"             |
        | ends after or inside the anchor             | invalid: "truncated"                        |
        | the anchor never written                    | invalid: "no_anchor"                        |
        | one token has the anchor's end and the      | invalid: "split_anchor"                     |
        |   score's beginning                         |                                             |
        | text after the first end of text            | ignored                                     |
        """
        ids = list(token_ids)
        end = next((i for i, token in enumerate(ids) if token in self.end_ids), None)
        ended = end is not None
        body = ids if end is None else ids[:end]
        text = self._decode(body)
        truncated_at_anchor = False
        for index, anchor in enumerate(self.bound.anchors):
            # The anchor's final space may be missing: some tokenizers make it a token, others merge it into the score.
            if not ended and text.endswith((anchor.prefix, anchor.prefix.rstrip())):
                return ScoreReading(position=None, label_index=None, reason=TRUNCATED, anchor_index=index)
            if anchor.prefix in text:
                return self._read_anchor(ids, body, text, index, anchor)
            if not ended and _ends_inside(text, anchor.prefix):
                truncated_at_anchor = True
        reason = TRUNCATED if truncated_at_anchor else NO_ANCHOR
        return ScoreReading(position=None, label_index=None, reason=reason, anchor_index=None)

    def _read_anchor(self, ids: list[int], body: list[int], text: str, index: int, anchor: BoundAnchor) -> ScoreReading:
        upto = text.rindex(anchor.prefix) + len(anchor.prefix)
        position, tail = self._boundary(body, text[:upto]), text[upto:]
        if position is None:
            return ScoreReading(position=None, label_index=None, reason=SPLIT_ANCHOR, anchor_index=index)
        label = self._label_at(ids, position, tail, anchor)
        return ScoreReading(
            position=position, label_index=label, reason=OFF_SCALE if label is None else None, anchor_index=index
        )

    def _boundary(self, body: list[int], head: str) -> int | None:
        """How many tokens of `body` decode to `head`; None if `head` ends inside a token.

        Bisection takes few decodes, however long the text. It needs that decoded text grows with the number of
        tokens; characters split over several tokens break that, so tokens around the found place are tried too.
        """
        low, high = 0, len(body)
        while low < high:
            middle = (low + high) // 2
            if len(self._decode(body[:middle])) < len(head):
                low = middle + 1
            else:
                high = middle
        for position in range(max(0, low - _SLACK), min(len(body), low + _SLACK) + 1):
            if self._decode(body[:position]) == head:
                return position
        return None

    def _label_at(self, ids: list[int], position: int, tail: str, anchor: BoundAnchor) -> int | None:
        match = anchor.trie.match(ids[position:])
        if match.label is None or match.cut:
            return None
        label = self.bound.scale.labels[match.label]
        return None if _goes_on(label, tail.lstrip()[len(label) :]) else match.label

    def _decode(self, ids: Sequence[int]) -> str:
        return decode(self.tokenizer, ids)


def _goes_on(label: str, rest: str) -> bool:
    """Whether the text after a label belongs to it: "45", "4.5", "4th" and "Goodish" do not mean "4" and "Good".

    A unit is not part of the number: "4分", "4점", "4балла", "4pts". Other Latin letters right after a number make it
    another word ("4th", "4a", and also the ordinals "4º" and "4ª"). Letters of another script than the label's last
    one do not.
    """
    after = rest[:1]
    if after in _POINTS and rest[1:2].isnumeric():
        return True
    if label[-1].isnumeric() and (after in ("º", "ª") or _AND_A_HALF.match(rest)):
        return True
    if not after.isalnum() or after.isnumeric():
        return after.isnumeric()
    if label[-1].isnumeric():
        return _script(after) == "LATIN" and not _UNIT.match(rest)
    return _script(after) == _script(label[-1])


def _script(letter: str) -> str:
    """The first word of the letter's Unicode name: LATIN, CYRILLIC, CJK, HANGUL, THAI, ..."""
    return unicodedata.name(letter, "?").split()[0].removeprefix("FULLWIDTH")


def _ends_inside(text: str, anchor: str) -> bool:
    """The text ends inside the anchor, after at least the anchor's first word."""
    shortest = max(1, len(anchor.split(" ", 1)[0]))
    return any(text.endswith(anchor[:n]) for n in range(len(anchor) - 1, shortest - 1, -1))
