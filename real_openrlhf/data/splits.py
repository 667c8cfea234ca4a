"""Splits by group (a question, a pair), never by row: decided by a hash of seed and group, or named by the source."""

from __future__ import annotations

import hashlib
from collections.abc import Hashable, Mapping, Sequence

from real_openrlhf.data.row import DataError, nearest
from real_openrlhf.data.sources import SPLIT_WORDS

# If a group occurs in several named splits, the first of these keeps it, so that evaluation data stay complete.
PRECEDENCE = ("test", "eval", "validation", "valid", "val", "dev", "train")
assert set(PRECEDENCE) == set(SPLIT_WORDS)


def check_split(name: str) -> str:
    """Raises DataError unless `name` is a split name that data sets can be read by ("FOLDER@test")."""
    if name not in SPLIT_WORDS:
        raise DataError(f"there is no split {name!r}{nearest(name, list(SPLIT_WORDS))}; use {', '.join(SPLIT_WORDS)}")
    return name


def parse_fractions(text: str) -> dict[str, float]:
    """The shares of the splits, from a flag's text.

    >>> parse_fractions("train=0.8,dev=0.2")
    {'train': 0.8, 'dev': 0.2}
    """
    fractions: dict[str, float] = {}
    for part in text.split(","):
        name, _, value = (word.strip() for word in part.partition("="))
        try:
            fractions[check_split(name)] = float(value)
        except ValueError as error:
            reason = error if isinstance(error, DataError) else f"{value!r} is not a number"
            raise DataError(f"--split {text!r}: {reason}; write it as train=0.8,dev=0.1,test=0.1") from None
    if any(not 0 < value <= 1 for value in fractions.values()) or abs(sum(fractions.values()) - 1) > 1e-6:
        raise DataError(f"--split {text!r}: the shares must be above 0 and sum to 1, got {sum(fractions.values()):g}")
    return fractions


def split_of(group: str, fractions: Mapping[str, float], seed: int) -> str:
    """The split of a group. It depends only on these arguments: new rows or another order do not change it.

    The shares hold on average over groups; with few groups the splits may differ from them.
    """
    digest = hashlib.sha256(f"{seed}|{group}".encode("utf-8", "surrogatepass")).digest()
    place = int.from_bytes(digest[:8], "big") / 2**64
    total = 0.0
    for name, share in fractions.items():
        total += share
        if place < total:
            return name
    return list(fractions)[-1]


def keep_one_split(rows: Sequence[tuple[str, Hashable]]) -> list[str | None]:
    """For each (split, group): None if the row stays, else the other split that keeps its group."""
    home: dict[Hashable, str] = {}
    for split, group in sorted(rows, key=lambda row: PRECEDENCE.index(row[0])):
        home.setdefault(group, split)
    return [None if home[group] == split else home[group] for split, group in rows]
