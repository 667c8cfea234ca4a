"""JSON as data files hold it. An object that has a key twice is seen: Python's `json` would keep the last value."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Doubled:
    """Stands for an object with a key that occurs twice, in it or further inside."""

    key: str


def read_json(text: str) -> Any:
    """The value of a JSON text. Raises ValueError or RecursionError as `json.loads` does.

    >>> read_json('[{"score": 1, "score": 5}, {"score": 2}]')
    [Doubled(key='score'), {'score': 2}]
    >>> read_json('{"a": [[{"score": 1, "score": 5}]]}')
    Doubled(key='score')
    """
    return json.loads(text, object_pairs_hook=_object)


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any] | Doubled:
    made = dict(pairs)
    if len(made) < len(pairs):
        names = [name for name, _ in pairs]
        return Doubled(next(name for name in names if names.count(name) > 1))
    inside = list(made.values())
    while inside:  # A stack of our own: lists may lie deeper than Python's calls go.
        value = inside.pop()
        if isinstance(value, Doubled):
            return value
        if isinstance(value, list):
            inside += value
    return made
