"""Reads a data set (a file, a folder or a hub id) into rows, each with its place in the source."""

from __future__ import annotations

import csv
import gzip
import io
import re
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO, Any

from real_openrlhf.common.paths import expand
from real_openrlhf.common.plain import HALF_CHARACTER, has_half_character
from real_openrlhf.data.json_text import Doubled, read_json
from real_openrlhf.data.row import BadRow, DataError, Place, Row, nearest, shorten

SUFFIXES = (".jsonl", ".json", ".csv", ".parquet")
SPLIT_WORDS = ("train", "validation", "valid", "val", "dev", "test", "eval")
# "owner/name", or "owner/name:config" if the data set has several configurations.
HUB_ID = re.compile(r"([A-Za-z0-9][\w.-]*/[\w.-]+)(?::([\w.-]+))?")
# Fields may have any length; the csv module's own limit is 131,072 characters.
csv.field_size_limit(2**31 - 1)
# The reason given for a text with lone surrogates: Python decodes bytes that are not UTF-8 to these.
_NOT_UTF8 = "not valid Unicode: its bytes are not UTF-8"
# `python -m real_openrlhf.data` writes this file next to its parquet files; it is never data.
MANIFEST = "manifest.json"


def read_rows(source: str) -> Iterator[Row | BadRow]:
    """The rows of a source.

    source: a .jsonl, .json (a list), .csv or .parquet file (text ones also as .gz), a folder of such files, a
    `save_to_disk` folder, or a hub id "owner/name" or "owner/name:config". "@split" after a folder or a hub id chooses
    a split.

    A row that cannot be read is returned as a BadRow; a file that cannot be read raises DataError.
    """
    path, split = locate(source)
    if path.is_file():
        yield from _read_file(path)
    elif path.is_dir():
        yield from _read_folder(path, split)
    else:
        yield from _read_hub(str(path), split)


def locate(source: str) -> tuple[Path, str | None]:
    """The file, the folder, or the hub id as a path, and the split that is asked for.

    DataError where it is none of them; whether a hub id or the split exists is not asked.
    """
    if not source.strip():
        raise DataError("no data set is given; pass a file, a folder or a hub id")
    path, split = Path(expand(source)), None
    if not path.exists() and "@" in source:
        head, _, split = source.rpartition("@")
        path = Path(expand(head))
    name = str(path)
    if path.is_file() and split is not None:
        raise DataError(f"{name} is a file and has no splits; drop '@{split}'")
    hub_id = HUB_ID.fullmatch(name) and _suffix(path) is None and path.suffix != ".gz"
    if not (path.is_file() or path.is_dir() or hub_id):
        found = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
        raise DataError(f"{name}: there is no such file or folder{nearest(path.name, found)}")
    return path, split


def _suffix(path: Path) -> str | None:
    """The known extension, without a final .gz; None for others. A parquet file is never gzipped as a whole."""
    suffixes = [s.lower() for s in path.suffixes]
    zipped = suffixes[-1:] == [".gz"]
    last = suffixes[-2:-1] if zipped else suffixes[-1:]
    if not last or last[0] not in SUFFIXES or (zipped and last[0] == ".parquet"):
        return None
    return last[0]


def _read_file(path: Path) -> Iterator[Row | BadRow]:
    suffix = _suffix(path)
    if suffix is None:
        raise DataError(
            f"{path}: cannot tell the format from the extension {''.join(path.suffixes)!r}; known are "
            f"{', '.join(SUFFIXES)}, and .gz after each but .parquet"
        )
    if path.stat().st_size == 0:
        raise DataError(f"{path}: the file is empty")
    reader = {".jsonl": _read_jsonl, ".json": _read_json, ".csv": _read_csv, ".parquet": _read_parquet}[suffix]
    count = 0
    try:
        for row in reader(path):
            count += 1
            yield row
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise DataError(f"{path}: broken gzip after {count} rows: {error}") from error
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error}") from error
    if count == 0:
        raise DataError(f"{path}: the file is empty: it has no rows")


def _open(path: Path) -> IO[bytes]:
    return gzip.open(path, "rb") if path.suffix.lower() == ".gz" else path.open("rb")  # type: ignore[return-value]


def _row(place: Place, value: object, *, suspect: str | None = None) -> Row | BadRow:
    """suspect: the reason for a BadRow if the row has a text that no encoding can write; None: no need to look."""
    if isinstance(value, Doubled):
        return BadRow(place=place, column=None, reason=f"the key {shorten(value.key)} occurs twice in an object")
    if not isinstance(value, dict):
        return BadRow(place=place, column=None, reason=f"a row must be an object, not {shorten(value)}")
    try:
        column = None if suspect is None else _no_unicode(value, "")
    except RecursionError:
        return BadRow(place=place, column=None, reason="its values are nested too deeply")
    if column is not None:
        return BadRow(place=place, column=column, reason=str(suspect))
    return Row(place=place, values=value)


def _no_unicode(value: object, path: str) -> str | None:
    """The dotted column name of the first text that no encoding can write; None if there is none."""
    if isinstance(value, str):
        return path if has_half_character(value) else None
    inside = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in inside:
        name = f"{path}.{key}" if path else str(key)
        found = _no_unicode(item, name) or (isinstance(key, str) and _no_unicode(key, name)) or None
        if found is not None:
            return found.encode("utf-8", "replace").decode()
    return None


def _read_jsonl(path: Path) -> Iterator[Row | BadRow]:
    with _open(path) as file:
        yield from read_json_lines(file, str(path))


def read_json_lines(file: Iterable[bytes], name: str) -> Iterator[Row | BadRow]:
    """The rows of an open JSONL file, such as standard input; name: for messages."""
    # Read as bytes, so that a line that is not UTF-8 is one bad row, and lines end at "\n" only, not at U+2028.
    for number, line in enumerate(file, start=1):
        place = Place(file=name, index=number, unit="line")
        text, broken = _decode(line, "utf-8-sig" if number == 1 else "utf-8")
        if not text.strip():
            continue
        try:
            value = read_json(text)
            half = HALF_CHARACTER if "\\ud" in text or "\\uD" in text else None
            yield _row(place, value, suspect=half if broken is None else f"{_NOT_UTF8} at byte {broken} of the line")
        except (ValueError, RecursionError) as error:  # an integer of thousands of digits is a ValueError too
            where = "" if broken is None else f"not UTF-8 at byte {broken} of the line, and "
            yield BadRow(place=place, column=None, reason=f"{where}broken JSON: {error}: {shorten(text.strip())}")


def _decode(data: bytes, encoding: str) -> tuple[str, int | None]:
    """The text, and the index of the first byte that is not UTF-8 (None: all are): the rest can still be read."""
    try:
        return data.decode(encoding), None
    except UnicodeDecodeError as error:
        return data.decode(encoding, "surrogateescape"), error.start


def _read_json(path: Path) -> Iterator[Row | BadRow]:
    with _open(path) as file:
        data = file.read()
    text, broken = _decode(data, "utf-8-sig")
    try:
        rows = read_json(text)
    except (ValueError, RecursionError) as error:
        if broken is not None:
            raise DataError(f"{path}: not UTF-8 at byte {broken}, and broken JSON: {error}") from error
        raise DataError(f"{path}: broken JSON: {error}; a file of one object per line is called .jsonl") from error
    if not isinstance(rows, list):
        rows = {} if isinstance(rows, Doubled) else rows
        raise DataError(f"{path}: a .json file must hold a list of objects, not {shorten(rows)}")
    suspect = HALF_CHARACTER if broken is None else _NOT_UTF8
    for index, value in enumerate(rows):
        yield _row(Place(file=str(path), index=index, unit="row"), value, suspect=suspect)


def _read_csv(path: Path) -> Iterator[Row | BadRow]:
    # A byte that is not UTF-8 makes one bad row; reading continues after it.
    with (
        _open(path) as raw,
        io.TextIOWrapper(raw, encoding="utf-8-sig", errors="surrogateescape", newline="") as file,
    ):
        reader = csv.reader(file, strict=True)
        try:
            header = next(reader, [])
            if any(map(has_half_character, header)):
                raise DataError(f"{path}, line 1: the header is not UTF-8; save the file as UTF-8")
            if not any(name.strip() for name in header):
                raise DataError(f"{path}, line 1: there is no header")
            doubled = sorted({name for name in header if header.count(name) > 1})
            if doubled:
                raise DataError(f"{path}, line 1: the columns {doubled} occur more than once")
            start = reader.line_num + 1
            for fields in reader:
                # A quoted field may span several lines: the row's first line is named.
                place = Place(file=str(path), index=start, unit="line")
                start = reader.line_num + 1
                if not fields:
                    continue
                if len(fields) != len(header):
                    reason = f"{len(fields)} fields, but the header has {len(header)}: {header}"
                    yield BadRow(place=place, column=None, reason=reason)
                else:
                    yield _row(place, dict(zip(header, fields)), suspect=f"{_NOT_UTF8}; save the file as UTF-8")
        except csv.Error as error:
            # After a broken quote it is unknown where the next row begins.
            raise DataError(f"{path}, line {reader.line_num}: broken CSV: {error}") from error


def _read_parquet(path: Path) -> Iterator[Row | BadRow]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    index = 0
    try:
        # Opened here, since pyarrow takes some paths for URLs.
        with path.open("rb") as opened, pq.ParquetFile(opened) as file:
            for batch in file.iter_batches(batch_size=1024):
                for read in _rows_of(batch):
                    place = Place(file=str(path), index=index, unit="row")
                    index += 1
                    if isinstance(read, str):
                        yield BadRow(place=place, column=read, reason=_NOT_UTF8)
                    else:
                        yield Row(place=place, values=read)
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{path}: broken parquet at or after row {index} (counted from 0): {error}") from error


def _rows_of(batch: Any) -> Iterator[dict[str, Any] | str]:
    """The rows of a record batch or table; in place of a row with a text that is not UTF-8, the name of its column."""
    try:
        yield from batch.to_pylist()
        return
    except UnicodeDecodeError:
        pass  # some text is not UTF-8: convert one by one
    for index in range(batch.num_rows):
        values: dict[str, Any] = {}
        for name, column in zip(batch.schema.names, batch.columns):
            try:
                values[name] = column[index].as_py()
            except UnicodeDecodeError:
                yield name
                break
        else:
            yield values


def _read_folder(path: Path, split: str | None) -> Iterator[Row | BadRow]:
    if (path / "dataset_dict.json").exists() or (path / "state.json").exists():
        datasets = _datasets(str(path))
        try:
            data = datasets.load_from_disk(str(path))
        except Exception as error:  # the library raises many kinds
            raise DataError(f"{path}: cannot be read as a saved data set: {error}") from error
        yield from _read_dataset(str(path), data, split)
        return
    listed = (p for p in path.iterdir() if p.is_file() and not p.name.startswith(".") and p.name != MANIFEST)
    files = sorted(p for p in listed if _suffix(p))
    if not files:
        raise DataError(f"{path}: the folder has no file that ends in {', '.join(SUFFIXES)}")
    splits = sorted({word for word in map(_split_of, files) if word})
    if split is not None:
        files = [p for p in files if _split_of(p) == split]
        if not files:
            raise DataError(f"{path}: no file is called {split}.*; splits there: {splits or 'none'}")
    elif len(splits) > 1:
        # Reading train and test together would silently leak test data.
        raise DataError(f"{path}: the folder holds several splits, {splits}; name one: '{path}@{splits[-1]}'")
    kinds = sorted({str(_suffix(p)) for p in files})
    if len(kinds) > 1:
        raise DataError(f"{path}: the folder mixes {', '.join(kinds)}; name one of its files")
    for file in files:
        yield from _read_file(file)


def _split_of(path: Path) -> str | None:
    """The split in a file name such as train-00000-of-00002.parquet."""
    word = re.split(r"[^A-Za-z]", path.name, maxsplit=1)[0].lower()
    return word if word in SPLIT_WORDS else None


def _datasets(source: str) -> Any:
    try:
        import datasets
    except ImportError as error:
        raise DataError(f"{source}: reading this needs the package 'datasets'; pip install datasets") from error
    return datasets


def _read_hub(name: str, split: str | None) -> Iterator[Row | BadRow]:
    datasets = _datasets(name)
    try:
        data = datasets.load_dataset(*name.split(":", 1))
    except Exception as error:  # the library raises many kinds: offline, unknown id, broken files
        raise DataError(
            f"{name}: there is no such file or folder, and as a hub id it could not be loaded: {error}"
        ) from error
    yield from _read_dataset(name, data, split)


def _read_dataset(name: str, data: Any, split: str | None) -> Iterator[Row | BadRow]:
    if isinstance(data, dict):
        splits = list(data)
        if split is None and len(splits) != 1:
            raise DataError(f"{name}: the data set has the splits {splits}; name one: '{name}@{splits[0]}'")
        if split is not None and split not in data:
            raise DataError(f"{name}: no split {split!r}; there are {splits}{nearest(split, splits)}")
        data = data[splits[0] if split is None else split]
        name = name if split is None else f"{name}@{split}"
    elif split is not None:
        raise DataError(f"{name}: the saved data set has no splits; drop '@{split}'")
    if len(data) == 0:
        raise DataError(f"{name}: the data set is empty: it has no rows")
    done = 0
    try:
        for values in data:
            yield Row(place=Place(file=name, index=done, unit="row"), values=values)
            done += 1
        return
    except UnicodeDecodeError:
        as_stored = data.with_format("arrow")
    for index in range(done, len(data)):
        place = Place(file=name, index=index, unit="row")
        (read,) = _rows_of(as_stored[index : index + 1])
        if isinstance(read, str):
            yield BadRow(place=place, column=read, reason=_NOT_UTF8)
        else:
            yield Row(place=place, values=data[index])
