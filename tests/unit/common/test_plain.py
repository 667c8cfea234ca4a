"""Values of any reader as JSON can hold them."""

from __future__ import annotations

import datetime
import decimal
import json
from typing import Any

import numpy as np
import pytest

from real_openrlhf.common.plain import NotPlainError, plain


@pytest.mark.parametrize(
    ("value", "made"),
    [
        (float("nan"), None),
        (-float("inf"), None),
        (1.5, 1.5),
        (True, True),
        (10**30, 10**30),
        ({"a": [float("nan"), {"b": (1, 2)}], 3: None}, {"a": [None, {"b": [1, 2]}], "3": None}),
        (datetime.date(2026, 1, 2), "2026-01-02"),
        (datetime.datetime(2026, 1, 2, 3, 4), "2026-01-02T03:04:00"),
        (decimal.Decimal("1.10"), "1.10"),
        (np.float32(0.5), 0.5),
        (np.array([1.0, np.nan]), [1.0, None]),
        (np.int64(3), 3),
    ],
)
def test_values(value: Any, made: Any) -> None:
    assert plain(value) == made
    json.dumps(plain(value), allow_nan=False)


@pytest.mark.parametrize("value", [b"raw", {1, 2}, object(), "half \ud800"])
def test_what_has_no_form_is_named(value: Any) -> None:
    with pytest.raises(NotPlainError) as caught:
        plain({"a": {"b": [0, value]}})
    assert caught.value.column == "a.b.1"


def test_values_nested_too_deeply_are_named() -> None:
    deep: list[Any] = []
    for _ in range(5000):
        deep = [deep]
    with pytest.raises(NotPlainError, match="nested too deeply") as caught:
        plain({"a": 1, "b": {"c": deep}})
    assert caught.value.column == "b"
