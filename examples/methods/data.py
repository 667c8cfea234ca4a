"""What the examples' prepare.py do with the rows that the package's builders make."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from real_openrlhf.common.atomic_file import write_text

Rows = list[dict[str, Any]]


def judged_rows(records: Iterable[Mapping[str, Any]]) -> Rows:
    """Prompt (text), label and group of built records, whose prompts are one user message each."""
    return [
        {"prompt": record["prompt"][0]["content"], "label": record["label"], "group": record["group"]}
        for record in records
    ]


def warmup_rows(records: Iterable[Mapping[str, Any]]) -> Rows:
    """The same, with the response to learn: feedback, anchor and score."""
    records = list(records)
    return [{**row, "response": record["response"]} for row, record in zip(judged_rows(records), records)]


def short(rows: Sequence[Mapping[str, Any]], count: Callable[[str], int], **limits: int | None) -> Rows:
    """The rows whose columns have at most so many tokens; None: any number.

    >>> short([{"prompt": "a b"}, {"prompt": "a b c"}], lambda text: len(text.split()), prompt=2)
    [{'prompt': 'a b'}]
    """
    return [
        dict(row)
        for row in rows
        if all(limit is None or count(str(row[name])) <= limit for name, limit in limits.items())
    ]


def write_jsonl(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    write_text(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
