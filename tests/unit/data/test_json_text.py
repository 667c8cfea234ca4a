"""An object that has a key twice is seen wherever it stands."""

from __future__ import annotations

import pytest

from real_openrlhf.data.json_text import Doubled, read_json


@pytest.mark.parametrize(
    "text",
    ['{"k": 1, "k": 2}', '{"a": {"k": 1, "k": 2}}', '{"a": [0, {"k": 1, "k": 1}]}', '{"a": [[{"k": 1, "k": 2}]]}'],
)
def test_a_key_that_occurs_twice(text: str) -> None:
    assert read_json(text) == Doubled("k")


def test_everything_else_is_pythons() -> None:
    assert read_json('[{"k": [[1], {"a": null}]}, {"k": 2}]') == [{"k": [[1], {"a": None}]}, {"k": 2}]
