"""A row of a data set with its place in the source, what is wrong with one, and the value at a key."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


class DataError(ValueError):
    """The data cannot be used; the message names file, row and column as far as they are known."""


@dataclass(frozen=True, kw_only=True)
class Place:
    """A row's place. unit "line": counted from 1, as in editors (jsonl, csv); "row": counted from 0."""

    file: str
    index: int
    unit: str

    def __str__(self) -> str:
        return f"{self.file}, {self.unit} {self.index}" + (" (counted from 0)" if self.unit == "row" else "")


@dataclass(frozen=True, kw_only=True)
class Row:
    """One row as read: column name to value."""

    place: Place
    values: Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class BadRow:
    """A row that cannot be used. row: its number, see Place. column: None when the whole row is wrong."""

    place: Place
    column: str | None
    reason: str

    @property
    def row(self) -> int:
        return self.place.index

    def __str__(self) -> str:
        column = "" if self.column is None else f", column {self.column!r}"
        return f"{self.place}{column}: {self.reason}"


def shorten(value: object, limit: int = 80) -> str:
    """The value's repr, shortened to `limit` characters, for messages."""
    text = repr(value)
    return text if len(text) <= limit else text[: limit - 3] + "..."


def nearest(name: str, known: list[str]) -> str:
    """The end of a message: " (did you mean 'x'?)", or nothing if no known name is similar."""
    close = difflib.get_close_matches(name.lower(), {k.lower(): k for k in known}, n=1, cutoff=0.6)
    match = next((k for k in known if close and k.lower() == close[0]), None)
    return f" (did you mean {match!r}?)" if match else ""


def lookup(values: Mapping[str, Any], key: str) -> Any:
    """The value of a column. A dotted name also reaches into nested objects, unless a column has this very name.

    Raises KeyError with the whole message when there is no such column.

    >>> lookup({"reward_model": {"ground_truth": 4}}, "reward_model.ground_truth")
    4
    """
    if key in values:
        return values[key]
    node: Any = values
    path = ""
    for part in key.split("."):
        if not isinstance(node, Mapping) or part not in node:
            columns = [path + name for name in node] if isinstance(node, Mapping) else []
            inside = f" in {path[:-1]!r}" if path else ""
            if not isinstance(node, Mapping):
                raise KeyError(f"no such column: {path[:-1]!r} holds {shorten(node)}, not an object")
            raise KeyError(f"no such column; the columns{inside} are {columns}{nearest(path + part, columns)}")
        node, path = node[part], f"{path}{part}."
    return node
