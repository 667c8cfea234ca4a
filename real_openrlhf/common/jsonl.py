"""JSONL files in which every line is complete, even after a crash while one was written."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

logger = logging.getLogger(__name__)


class JsonLinesError(ValueError):
    """The file is not what this program writes; the message names file and line."""


class JsonLines:
    """Appends objects. A write that fails halfway is undone and raises OSError."""

    def __init__(self, path: str | Path, *, append: bool) -> None:
        self.path = Path(path)
        # Unbuffered: a line is in the file when write() returns, or not at all.
        self._file = open(path, "ab" if append else "wb", buffering=0)  # noqa: SIM115

    def write(self, line: Mapping[str, Any]) -> None:
        if self._file.closed:
            raise ValueError(f"{self.path.name} is closed")
        data = (json.dumps(line, ensure_ascii=False, allow_nan=False) + "\n").encode("utf-8", "backslashreplace")
        start = self._file.seek(0, os.SEEK_END)
        try:
            if self._file.write(data) != len(data):
                raise OSError("only a part of the line was written")
        except OSError:
            self._file.truncate(start)
            raise

    def close(self) -> None:
        self._file.close()


def read_lines(path: str | Path) -> Iterator[tuple[int, Any]]:
    """Pairs of line number, from 1, and value. An incomplete last line is left out with a warning.

    Raises JsonLinesError for a line that is not JSON.
    """
    for number, line, value in _lines(Path(path)):
        if line is not None:
            yield number, value


def keep_lines(path: str | Path, keep: Callable[[int, Any], bool] = lambda number, value: True) -> None:
    """Drop an incomplete last line, and every line for which keep(number, value) is false. Atomic.

    keep may raise; the file is then as it was. Raises JsonLinesError for a line that is not JSON.
    """
    path = Path(path)
    partial = path.with_name(path.name + ".partial")
    changed = False
    try:
        with open(partial, "wb") as kept:
            for number, line, value in _lines(path):
                if line is None or not keep(number, value):
                    changed = True
                    continue
                kept.write(line)
            kept.flush()
            os.fsync(kept.fileno())
        if changed:
            os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def _lines(path: Path) -> Iterator[tuple[int, bytes | None, Any]]:
    """Number, raw line and value of each line; for an incomplete last line, raw line and value are None."""
    with open(path, "rb") as source:
        for number, line in enumerate(source, start=1):
            if not line.endswith(b"\n"):
                logger.warning("%s: the last line is incomplete and is dropped", path)
                yield number, None, None
                continue
            try:
                yield number, line, json.loads(line)
            except ValueError as error:
                raise JsonLinesError(f"{path}, line {number} is not a record: {error}") from error
