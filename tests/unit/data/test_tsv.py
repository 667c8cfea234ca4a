"""Tab-separated files: rows with their lines, quotes as text or as CSV's, faults named."""

from __future__ import annotations

import gzip
from pathlib import Path

import pytest

from real_openrlhf.data.row import BadRow, DataError, Row
from real_openrlhf.data.tsv import read_tsv, read_tsv_or_rows


def write(path: Path, text: str) -> Path:
    path.write_bytes(text.encode())
    return path


def test_rows_and_lines(tmp_path: Path) -> None:
    path = write(tmp_path / "a.txt", '\ufeffx\ty\r\n1\t"two" words\r\n\n3\t\n')
    rows = list(read_tsv(path))
    assert [row.values for row in rows if isinstance(row, Row)] == [{"x": "1", "y": '"two" words'}, {"x": "3", "y": ""}]
    assert [row.place.index for row in rows] == [2, 4] and rows[0].place.unit == "line"
    zipped = tmp_path / "a.tsv.gz"
    zipped.write_bytes(gzip.compress(path.read_bytes()))
    assert [row.values for row in read_tsv_or_rows(str(zipped)) if isinstance(row, Row)] == [
        row.values for row in rows if isinstance(row, Row)
    ]


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        (['"He said ""no""."', '"a"'], ['He said "no".', "a"]),  # quoted as CSV is
        (['"Quite so"', "b"], ['"Quite so"', "b"]),  # nothing shows that the quotes are not the text's own
        (['"He said ""no""."', '"Yes," he said'], ['"He said ""no""."', '"Yes," he said']),  # one that is not
        (['"', '"a ""b"" c"'], ['"', '"a ""b"" c"']),
    ],
)
def test_quotes(tmp_path: Path, fields: list[str], expected: list[str]) -> None:
    (row,) = read_tsv(write(tmp_path / "a.tsv", "x\ty\n" + "\t".join(fields) + "\n"))
    assert isinstance(row, Row) and list(row.values.values()) == expected


def test_bad_lines_are_named(tmp_path: Path) -> None:
    path = tmp_path / "a.tsv"
    path.write_bytes(b"x\ty\n1\n2\tb\n3\t\xff\n")
    short, good, broken = read_tsv(path)
    assert isinstance(short, BadRow) and str(short) == f"{path}, line 2: 1 fields, but the header has 2: ['x', 'y']"
    assert isinstance(good, Row) and isinstance(broken, BadRow) and "line 4: not UTF-8 at byte 2" in str(broken)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "the file is empty"),
        (b"x\ty\n", "has no rows"),
        (b"a,b\n1,2\n", "line 1: the header has no tab"),
        (b"x\tx\n1\t2\n", r"the columns \['x'\] occur more than once"),
        (b"\xff\ty\n1\t2\n", "the header is not UTF-8"),
    ],
)
def test_files_that_are_none(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "a.tsv"
    path.write_bytes(content)
    with pytest.raises(DataError, match=message):
        list(read_tsv(path))


def test_a_broken_archive_is_named(tmp_path: Path) -> None:
    whole = gzip.compress(b"x\ty\n" + b"1\t2\n" * 2000)
    for content in (whole[:30], whole[:20] + b"\x00" * 20 + whole[40:], b"no gzip"):
        (tmp_path / "a.tsv.gz").write_bytes(content)
        with pytest.raises(DataError, match="cannot be read"):
            list(read_tsv(tmp_path / "a.tsv.gz"))


def test_other_files_are_read_as_ever(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", '{"x": 1}\n')
    (row,) = read_tsv_or_rows(str(path))
    assert isinstance(row, Row) and row.values == {"x": 1}
    with pytest.raises(DataError, match="there is no such file"):
        list(read_tsv_or_rows(str(tmp_path / "gone.tsv")))
