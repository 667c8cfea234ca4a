"""Writes feedback on two sentences by rules: shared and differing words, numbers, negation, length.

The rules do not see the human score, and the feedback has no digits, so that no label can leak before the verdict.
"""

from __future__ import annotations

import random
import re

_WORD = re.compile(r"[^\W_]+(?:['-][^\W_]+)*")
_STOP = frozenset(
    """
    a an the this that these those it its it's i i'm you you're he she we they me him her us them my your his our
    their who which what and or but if as of in on at to by for from with into over up down out off about than then
    so is are was were be been being am do does did done has have had having will would can could may might shall
    should must there here just also very too some any all one s t
    """.split()  # noqa: SIM905  (a list of 112 strings is not easier to read)
)
_NEGATIONS = frozenset(("no", "not", "never", "none", "nobody", "nothing", "without", "cannot", "neither", "nor"))
MAX_SHARED, MAX_OWN = 4, 3


def write_feedback(first: str, second: str, rng: random.Random) -> str:
    """A few short sentences. If there are too many words, `rng` picks those that are named; their order stays.

    >>> write_feedback("A man plays a guitar.", "A man is playing the flute.", random.Random(0))
    'Both mention man, plays. Only the first has guitar. Only the second has flute. Most words agree.'
    """
    words_1, words_2 = content_words(first), content_words(second)
    shared = [word for stem, word in words_1.items() if stem in words_2]
    own_1 = [word for stem, word in words_1.items() if stem not in words_2]
    own_2 = [word for stem, word in words_2.items() if stem not in words_1]
    clauses = [
        f"Both mention {_list(shared, MAX_SHARED, rng)}." if shared else "They share no content word.",
        f"Only the first has {_list(own_1, MAX_OWN, rng)}." if own_1 else "",
        f"Only the second has {_list(own_2, MAX_OWN, rng)}." if own_2 else "",
        _numbers(first, second),
        _negation(first, second),
        _length(len(words_1), len(words_2)),
        _agreement(len(shared), len(words_1), len(words_2)),
    ]
    return " ".join(clause for clause in clauses if clause)


def content_words(sentence: str) -> dict[str, str]:
    """{stem: word as first written, in lower case}, in order; no function words, no numbers, no negations."""
    words: dict[str, str] = {}
    for match in _WORD.finditer(_plain(sentence)):
        word = match.group().removesuffix("'s")
        negated = word in _NEGATIONS or word.endswith("n't")
        if len(word) > 1 and word not in _STOP and not negated and not any(char.isdigit() for char in word):
            words.setdefault(stem(word), word)
    return words


def _plain(sentence: str) -> str:
    return sentence.lower().replace("\u2019", "'")  # typographic apostrophe


def stem(word: str) -> str:
    """A crude stem: enough to see that "plays", "played" and "playing" are one word."""
    for suffix in ("ing", "ies", "ied", "es", "ed", "s"):
        if word.endswith(suffix) and len(word) - len(suffix) >= 3 and not word.endswith("ss"):
            word = word[: -len(suffix)] + ("y" if suffix in ("ies", "ied") else "")
            break
    if len(word) > 3 and word[-1] == word[-2] and word[-1] not in "sl":
        word = word[:-1]  # running -> runn -> run
    return word.removesuffix("e") if len(word) > 3 else word


def _list(words: list[str], limit: int, rng: random.Random) -> str:
    if len(words) > limit:
        words = [words[index] for index in sorted(rng.sample(range(len(words)), limit))]
    return ", ".join(words)


def _numbers(first: str, second: str) -> str:
    one, two = (set(re.findall(r"\d+(?:[.,]\d+)*", text)) for text in (first, second))
    if not one and not two:
        return ""
    return "The numbers agree." if one == two else "The numbers differ."


def _negation(first: str, second: str) -> str:
    one, two = _negated(first), _negated(second)
    if one == two:
        return ""
    return f"Only the {'first' if one else 'second'} is negated."


def _negated(sentence: str) -> bool:
    words = [match.group() for match in _WORD.finditer(_plain(sentence))]
    return any(word in _NEGATIONS or word.endswith("n't") for word in words)


def _length(count_1: int, count_2: int) -> str:
    if max(count_1, count_2) < 1.5 * min(count_1, count_2) + 1:
        return ""
    return f"The {'first' if count_1 > count_2 else 'second'} says more."


def _agreement(shared: int, count_1: int, count_2: int) -> str:
    total = count_1 + count_2
    share = 2 * shared / total if total else 0.0
    if share == 1:
        return "All words agree."
    if share == 0:
        return ""  # the first clause has said it
    return f"{'Most' if share >= 0.6 else 'Some' if share >= 0.35 else 'Few'} words agree."
