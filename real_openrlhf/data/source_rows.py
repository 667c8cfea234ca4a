"""The rows of several sources in turn, each handed to whoever uses it; bad ones end the build or are listed."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from real_openrlhf.common.paths import expand
from real_openrlhf.data.row import BadRow, DataError, Row
from real_openrlhf.data.splits import check_split

LISTED = 20
_NAMED = re.compile(r"([A-Za-z]+)=(.+)", re.DOTALL)


def read_sources(
    sources: Sequence[str],
    read: Callable[[str], Iterator[Row | BadRow]],
    use: Callable[[Row, str | None], BadRow | None],
    *,
    skip_bad_rows: bool,
) -> tuple[list[BadRow], list[dict[str, Any]]]:
    """(bad rows left out, the manifest's lines of the sources).

    sources: SOURCE or SPLIT=SOURCE; either all name a split or none does. read: the rows of a source. use: takes a row
    and its source's split, and returns what is wrong with it. Raises DataError at the first bad row (file, row,
    column, reason) unless they are skipped.
    """
    named = [_NAMED.fullmatch(source) if not Path(expand(source)).exists() else None for source in sources]
    if any(named) and not all(named):
        raise DataError("--source: either every source names its split (train=...), or none does")
    skipped: list[BadRow] = []
    read_from = []
    for source, match in zip(sources, named):
        split = None if match is None else check_split(match[1])
        name = source if match is None else match[2]
        digest, count = hashlib.sha256(), 0
        for row in read(name):
            count += 1
            bad: BadRow | None
            if isinstance(row, Row):
                digest.update(json.dumps(row.values, sort_keys=True, default=str).encode())
                bad = use(row, split)
            else:
                bad = row
            if bad is not None and not skip_bad_rows:
                raise DataError(f"{bad}. Repair the row, or pass --skip_bad_rows to leave such rows out.")
            if bad is not None:
                skipped.append(bad)
        read_from.append({"source": shown(name), "split": split, "rows": count, "rows_sha256": digest.hexdigest()})
    return skipped, read_from


def no_rows(sources: Sequence[str], skipped: Sequence[BadRow]) -> DataError:
    bad = "\n".join(f"  {row}" for row in skipped[:LISTED])
    return DataError(f"{', '.join(sources)}: no usable row is left; all {len(skipped)} are bad:\n{bad}")


def shown(source: str) -> str:
    """A local path by its name alone: where a file lies on one machine says nothing on another."""
    path = Path(expand(source))
    return path.name if path.exists() else source
