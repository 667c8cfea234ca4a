"""JSONL files whose lines are whole."""

from __future__ import annotations

import logging
import os
from pathlib import Path

import pytest

from real_openrlhf.common.jsonl import JsonLines, JsonLinesError, keep_lines, read_lines


def test_lines_are_in_the_file_at_once_and_come_back(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    file = JsonLines(path, append=False)
    file.write({"a": 1, "text": "zwei\nZeilen \ud800"})
    assert [number for number, _ in read_lines(path)] == [1]
    file.close()
    with pytest.raises(ValueError, match=r"a\.jsonl is closed"):
        file.write({})
    more = JsonLines(path, append=True)
    more.write({"a": 2})
    more.close()
    assert [value["a"] for _, value in read_lines(path)] == [1, 2]


def test_no_nan_gets_into_a_file(tmp_path: Path) -> None:
    file = JsonLines(tmp_path / "a.jsonl", append=False)
    with pytest.raises(ValueError, match="not JSON compliant"):
        file.write({"a": float("nan")})
    assert (tmp_path / "a.jsonl").read_bytes() == b""
    file.close()


def test_half_a_line_is_taken_back(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    file = JsonLines(path, append=False)
    file.write({"a": 1})
    real = file._file

    class HalfFull:
        closed = False
        seek, truncate = real.seek, real.truncate

        @staticmethod
        def write(data: bytes) -> int:
            return os.write(real.fileno(), data[: len(data) // 2])

    file._file = HalfFull()  # type: ignore[assignment]
    with pytest.raises(OSError, match="only a part"):
        file.write({"a": 2})
    assert path.read_text() == '{"a": 1}\n'
    real.close()


def test_a_torn_last_line_is_dropped(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"a": 1}\n{"a": 2}\n{"a": \xff')
    with caplog.at_level(logging.WARNING):
        assert [value["a"] for _, value in read_lines(path)] == [1, 2]
    assert "the last line is incomplete" in caplog.text
    keep_lines(path)
    assert path.read_bytes() == b'{"a": 1}\n{"a": 2}\n'
    assert [p.name for p in tmp_path.iterdir()] == ["a.jsonl"]


def test_lines_are_kept_by_choice_and_a_wrong_file_stays_as_it_is(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"a": 1}\n{"a": 2}\n{"a": 3}\n')
    keep_lines(path, lambda number, value: value["a"] != 2 and number != 3)
    assert path.read_text() == '{"a": 1}\n'
    text = '{"a": 1}\nhello\n{"a": 2}\n'
    path.write_text(text)
    with pytest.raises(JsonLinesError, match=r"a.jsonl, line 2 is not a record"):
        keep_lines(path)
    assert path.read_text() == text and [p.name for p in tmp_path.iterdir()] == ["a.jsonl"]
