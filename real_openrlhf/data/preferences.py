"""Which of two responses is preferred: a word for each answer, and many people's words as one."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

A, B, TIE = "a", "b", "tie"
PREFERENCES = (A, B, TIE)


def majority(votes: Mapping[str, str]) -> str | None:
    """The vote that most raters gave; None where several have as many.

    >>> majority({"x": "a", "y": "a", "z": "tie"}), majority({"x": "a", "y": "b"})
    ('a', None)
    """
    (first, most), *others = Counter(votes.values()).most_common()
    return None if others and others[0][1] == most else first


def vote_agreement(votes: Sequence[Mapping[str, str]]) -> dict[str, Any] | None:
    """Of all pairs of raters of the same pair of responses, the share that gave the same vote, ties being a vote like
    others. None where no pair has two raters."""
    compared = [x == y for row in votes for x, y in itertools.combinations(row.values(), 2)]
    if not compared:
        return None
    return {
        "rows": sum(len(row) > 1 for row in votes),
        "compared": len(compared),
        "agreement": sum(compared) / len(compared),
    }
