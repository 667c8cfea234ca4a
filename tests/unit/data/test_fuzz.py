"""The data reader on whatever hypothesis comes up with: rows, bad rows or a DataError, and nothing else."""

from __future__ import annotations

import csv
import gzip
import io
import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

pytest.importorskip("hypothesis", reason="hypothesis is in the extra dev; bash examples/install/cpu.sh installs it")

from hypothesis import example, given, settings
from hypothesis import strategies as st

from real_openrlhf.algo.score_scale import ScaleError, ScoreScale
from real_openrlhf.data.dataset import read_label
from real_openrlhf.data.row import BadRow, DataError, Row
from real_openrlhf.data.sources import read_rows

FUZZ = settings(max_examples=80, deadline=None, derandomize=True, database=None)
NAMES = ("d.jsonl", "d.json", "d.csv", "d.jsonl.gz", "d.parquet")
# Of all that a row may hold: no lone surrogates, which no encoding can write.
TEXTS = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**53), 2**53) | st.floats(allow_nan=False) | TEXTS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXTS, inner, max_size=3),
    max_leaves=6,
)
ROWS = st.lists(st.dictionaries(TEXTS, VALUES, max_size=4), min_size=1, max_size=4)


@contextmanager
def file(name: str, content: bytes) -> Iterator[Path]:
    with TemporaryDirectory() as folder:
        path = Path(folder) / name
        path.write_bytes(content)
        yield path


def read(path: Path) -> list[Row | BadRow] | str:
    """The rows, or the message of the DataError that was raised; every message names the file."""
    try:
        rows = list(read_rows(str(path)))
    except DataError as error:
        assert str(error).startswith(str(path)) and "\n" not in str(error)[:200].replace("\\n", "")
        return str(error)
    assert rows
    for row in rows:
        assert isinstance(row, Row | BadRow) and row.place.file == str(path)
        assert isinstance(row, Row) or (row.reason and str(row).startswith(str(path)))
    return rows


def values(path: Path) -> list[Any]:
    rows = read(path)
    assert isinstance(rows, list) and all(isinstance(row, Row) for row in rows), rows
    return [dict(row.values) for row in rows if isinstance(row, Row)]


@FUZZ
@given(st.sampled_from(NAMES), st.binary(max_size=60))
@example("d.csv", b'a,b\n"x')
@example("d.csv", b"a\r\rb,c")
@example("d.jsonl", b'{"a": 1}\x00\n')
@example("d.parquet", b"PAR1PAR1")
def test_any_bytes(name: str, content: bytes) -> None:
    with file(name, content) as path:
        read(path)


@FUZZ
@given(st.sampled_from(NAMES), st.integers(0, 10_000), st.integers(0, 255), st.booleans(), ROWS)
def test_a_good_file_with_one_byte_changed_or_its_end_cut_off(
    name: str, at: int, byte: int, cut: bool, rows: list[dict[str, Any]]
) -> None:
    whole = encoded(name, rows)
    at %= len(whole)
    # In parquet only the end is cut: its readers trust the sizes that a file claims.
    broken = whole[:at] if cut or name.endswith(".parquet") else whole[:at] + bytes([byte]) + whole[at + 1 :]
    with file(name, broken) as path:
        read(path)


def encoded(name: str, rows: list[dict[str, Any]]) -> bytes:
    if name.endswith(".parquet"):
        sink = io.BytesIO()
        pq.write_table(pa.table({"row": [json.dumps(row) for row in rows]}), sink)
        return sink.getvalue()
    if name.endswith(".csv"):
        return csv_bytes(["a", "b"], [[str(row), "x"] for row in rows])
    if name.endswith(".json"):
        return json.dumps(rows).encode()
    lines = b"".join(json.dumps(row, ensure_ascii=False).encode() + b"\n" for row in rows)
    return gzip.compress(lines) if name.endswith(".gz") else lines


def csv_bytes(header: list[str], rows: list[list[str]]) -> bytes:
    text = io.StringIO()
    csv.writer(text).writerows([header, *rows])
    return text.getvalue().encode()


@FUZZ
@given(st.sampled_from(["d.jsonl", "d.json", "d.jsonl.gz"]), ROWS)
def test_what_json_wrote_is_read_again(name: str, rows: list[dict[str, Any]]) -> None:
    with file(name, encoded(name, rows)) as path:
        assert values(path) == rows


@FUZZ
@given(st.lists(st.lists(TEXTS, min_size=3, max_size=3), min_size=1, max_size=4))
def test_what_csv_wrote_is_read_again_and_lines_are_counted(rows: list[list[str]]) -> None:
    with file("d.csv", csv_bytes(["a", "b", "c"], rows)) as path:
        assert values(path) == [dict(zip("abc", row)) for row in rows]


SCALE = ScoreScale.parse("1-5")


@FUZZ
@given(
    VALUES
    | st.text(max_size=8)
    | st.floats()
    | st.decimals()
    | st.sampled_from([" 3 ", "٣", "1_0", "0x3", "3e0", b"3"])
)
def test_a_label_is_on_the_scale_or_refused(value: object) -> None:
    try:
        label = read_label(value, SCALE)
    except ValueError as error:
        assert "from 1 to 5" in str(error) and len(str(error)) < 400
        return
    assert isinstance(label, float) and math.isfinite(label) and 1 <= label <= 5
    assert not isinstance(value, bool) and float(value) == label  # type: ignore[arg-type]


@FUZZ
@given(st.text("0123456789-,.=aeé٣ ", max_size=12) | st.text(max_size=8))
@example("1-" + "9" * 30)
@example("-" * 40 + "5")
def test_any_text_is_a_scale_or_refused(text: str) -> None:
    try:
        scale = ScoreScale.parse(text)
    except ScaleError as error:
        assert len(str(error)) < 400
        return
    assert len(scale) >= 2 and list(scale.values) == sorted(set(scale.values))
    assert ScoreScale.parse(str(scale)) == scale
