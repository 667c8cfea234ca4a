"""Several rows of a file as one: the votes or marked errors of several raters on the same response."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from real_openrlhf.data.builders.base import FieldError
from real_openrlhf.data.row import BadRow, DataError, Row


def merge_rows(
    rows: Iterable[Row | BadRow],
    *,
    key: Callable[[Mapping[str, Any]], Hashable],
    merge: Callable[[Sequence[Row]], Row | BadRow],
) -> Iterator[Row | BadRow]:
    """Rows of the same key, wherever they stand, as `merge` joins them, in the order in which keys first occur.

    Raises DataError for a row that cannot be read or has no key, also where bad rows are skipped: nobody could say
    whose label lacks it.
    """
    found: dict[Hashable, list[Row]] = {}
    for row in rows:
        if isinstance(row, BadRow):
            raise DataError(f"{row}. Repair the row: it may belong to any of the others, so that it cannot be skipped.")
        try:
            found.setdefault(key(row.values), []).append(row)
        except FieldError as error:
            bad = BadRow(place=row.place, column=error.column, reason=str(error))
            raise DataError(
                f"{bad}. Repair the row: it may belong to any of the others, so that it cannot be skipped."
            ) from None
    for same in found.values():
        yield merge(same)
