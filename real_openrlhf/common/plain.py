"""Converts values to what JSON can hold."""

from __future__ import annotations

import datetime
import decimal
import math
import uuid
from collections.abc import Mapping
from typing import Any

HALF_CHARACTER = "not valid Unicode: half of a surrogate pair is missing"


class NotPlainError(ValueError):
    """A value that JSON cannot hold. column: the dotted name of the value's column."""

    def __init__(self, column: str, reason: str) -> None:
        super().__init__(reason)
        self.column = column


def plain(value: Any) -> Any:
    """NaN and infinities become None, dates ISO text, decimals and UUIDs text, numpy's numbers and arrays Python's.

    Raises NotPlainError for bytes, half characters, values nested too deeply, and other values that JSON cannot hold.
    """
    if not isinstance(value, Mapping):
        return _whole(value, "")
    return {_text(str(key), ""): _whole(item, str(key)) for key, item in value.items()}


def _whole(value: Any, column: str) -> Any:
    try:
        return _plain(value, column)
    except RecursionError:
        raise NotPlainError(column, "its values are nested too deeply") from None


def _plain(value: Any, column: str) -> Any:
    if value is None or isinstance(value, bool | int):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, str):
        return _text(value, column)
    if isinstance(value, Mapping):
        return {_text(str(key), column): _plain(item, _inside(column, key)) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item, _inside(column, i)) for i, item in enumerate(value)]
    if isinstance(value, datetime.date | datetime.time):
        return value.isoformat()
    if isinstance(value, decimal.Decimal | uuid.UUID | datetime.timedelta):
        return str(value)
    if type(value).__module__ == "numpy" and hasattr(value, "tolist"):
        return _plain(value.tolist(), column)
    raise NotPlainError(column, f"JSON has no form for a {type(value).__name__}")


def has_half_character(text: str) -> bool:
    """Whether the text has half of a surrogate pair alone: JSON's escapes can spell it, no encoding can write it."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return True
    return False


def _inside(column: str, key: Any) -> str:
    return f"{column}.{key}" if column else str(key)


def _text(value: str, column: str) -> str:
    if has_half_character(value):
        raise NotPlainError(column, HALF_CHARACTER)
    return value
