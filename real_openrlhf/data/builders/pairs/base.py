"""What a builder of pairs is: a function from one row of a source to a pair of responses with votes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from real_openrlhf.data.row import BadRow, Row
from real_openrlhf.data.sources import read_rows


@dataclass(frozen=True, kw_only=True)
class Pair:
    """One pair. votes: rater -> "a", "b" or "tie". The other fields are as in the table of
    `real_openrlhf.data.pairs`."""

    id: str | None = None
    instruction: str
    response_a: str
    response_b: str
    votes: Mapping[str, str]
    group: str
    reference: str | None = None
    subset: str | None = None
    meta: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class PairBuilder:
    """A data set of pairs.

    about    one line for --help
    read     one row to a pair; raises FieldError
    sources  where it is read from unless told otherwise
    rows     the rows of a source; `read_rows` unless the data set has a form of its own
    """

    name: str
    about: str
    read: Callable[[Mapping[str, Any]], Pair]
    sources: Sequence[str] = ()
    rows: Callable[[str], Iterator[Row | BadRow]] = read_rows
