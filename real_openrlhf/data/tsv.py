"""Tab-separated files, which several benchmarks come as: a header, and one row a line."""

from __future__ import annotations

import gzip
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO

from real_openrlhf.common.paths import expand
from real_openrlhf.data.row import BadRow, DataError, Place, Row
from real_openrlhf.data.sources import read_rows

SUFFIXES = (".tsv", ".txt")


def read_tsv_or_rows(source: str) -> Iterator[Row | BadRow]:
    """A .tsv or .txt file (also as .gz) by `read_tsv`; everything else by `read_rows`."""
    path = Path(expand(source))
    suffixes = [suffix.lower() for suffix in path.suffixes]
    last = suffixes[-2:-1] if suffixes[-1:] == [".gz"] else suffixes[-1:]
    yield from read_tsv(path) if path.is_file() and last and last[0] in SUFFIXES else read_rows(source)


def read_tsv(path: Path) -> Iterator[Row | BadRow]:
    """A field holds neither tab nor line break. Quotes are text, unless the whole file is quoted as CSV is: every field
    that begins with one ends with one, and those within are doubled. Lines count from 1, the header's.

    A line that is not UTF-8 or has another number of fields is a BadRow. Raises DataError for a file without a header
    or without rows, or one that cannot be read.
    """
    header: list[str] | None = None
    count = 0
    try:
        with _open(path) as file:
            quoted = _is_quoted(file)
        with _open(path) as file:
            for number, line in enumerate(file, start=1):
                place = Place(file=str(path), index=number, unit="line")
                try:
                    text = line.decode("utf-8-sig" if number == 1 else "utf-8").rstrip("\r\n")
                except UnicodeDecodeError as error:
                    if header is None:
                        raise DataError(f"{place}: the header is not UTF-8; save the file as UTF-8") from error
                    yield BadRow(place=place, column=None, reason=f"not UTF-8 at byte {error.start} of the line")
                    continue
                if header is None:
                    header = _header(text, place)
                elif text.strip():
                    count += 1
                    yield _row([_unquoted(field) if quoted else field for field in text.split("\t")], header, place)
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path}: cannot be read: {error}") from error
    if count == 0:
        raise DataError(f"{path}: the file is empty: it has no rows")


def _open(path: Path) -> IO[bytes]:
    return gzip.open(path, "rb") if path.suffix.lower() == ".gz" else path.open("rb")  # type: ignore[return-value]


def _is_quoted(file: Iterable[bytes]) -> bool:
    """One doubled quote at least has to show it: a text may well be one quotation."""
    shown = False
    for line in file:
        for field in line.rstrip(b"\r\n").split(b"\t"):
            if field.startswith(b'"'):
                inner = field[1:-1]
                if len(field) < 2 or not field.endswith(b'"') or b'"' in inner.replace(b'""', b""):
                    return False
                shown = shown or b'""' in inner
    return shown


def _unquoted(field: str) -> str:
    return field[1:-1].replace('""', '"') if field.startswith('"') else field


def _header(text: str, place: Place) -> list[str]:
    header = text.split("\t")
    doubled = sorted({name for name in header if header.count(name) > 1})
    if len(header) < 2:
        raise DataError(f"{place}: the header has no tab; the columns of a .tsv or .txt file stand between tabs")
    if doubled:
        raise DataError(f"{place}: the columns {doubled} occur more than once")
    return header


def _row(fields: list[str], header: list[str], place: Place) -> Row | BadRow:
    if len(fields) != len(header):
        reason = f"{len(fields)} fields, but the header has {len(header)}: {header}"
        return BadRow(place=place, column=None, reason=reason)
    return Row(place=place, values=dict(zip(header, fields)))
