"""The value at a key: whole names first, then the parts of a dotted one."""

from __future__ import annotations

import pytest

from real_openrlhf.data.row import lookup


class TestLookup:
    VALUES = {"a": {"b": {"c": 1}}, "a.b": "literal", "x": 5}  # noqa: RUF012

    @pytest.mark.parametrize(("key", "value"), [("x", 5), ("a.b", "literal"), ("a.b.c", 1), ("a", {"b": {"c": 1}})])
    def test_found(self, key, value):
        assert lookup(self.VALUES, key) == value

    @pytest.mark.parametrize(
        ("key", "message"),
        [
            ("X", r"the columns are \['a', 'a.b', 'x'\] \(did you mean 'x'\?\)"),
            ("a.q", r"the columns in 'a' are \['a.b'\]"),
            ("x.y", r"'x' holds 5, not an object"),
        ],
    )
    def test_missing(self, key, message):
        with pytest.raises(KeyError, match=message):
            lookup(self.VALUES, key)
