"""Writes files atomically: the new file replaces the old one completely, or not at all."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from real_openrlhf.common.durable import fsync_file


@contextmanager
def atomic_file(path: str | Path) -> Iterator[Path]:
    """Yield a temporary path in the same folder to write to; at the end of the block it takes the file's place.

    An exception in the block leaves the old file as it was. OSError if the folder cannot be written.
    """
    path = Path(path)
    partial = path.with_name(path.name + ".partial")
    try:
        yield partial
        fsync_file(partial)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def write_text(path: str | Path, text: str) -> None:
    """Write text as UTF-8, completely or not at all."""
    with atomic_file(path) as partial:
        partial.write_text(text, encoding="utf-8")
