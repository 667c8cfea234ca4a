"""Any JSONL, CSV or parquet file, with a map from the needed fields to the file's columns."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from real_openrlhf.data.builders.base import (
    Builder,
    FieldError,
    Item,
    Options,
    Parts,
    get,
    group_of,
    label,
    question_of,
    text,
)
from real_openrlhf.data.builders.prometheus import asked
from real_openrlhf.data.judge_prompt import Rubric
from real_openrlhf.data.row import DataError, nearest, shorten

FIELDS = (
    "prompt", "label", "group", "id", "split", "feedback", "n",
    "instruction", "response", "reference", "context", "rubric", "criteria",
)  # fmt: skip
SCORE = "score:"


def check(options: Options) -> None:
    columns = options.columns
    for name in columns:
        if name not in FIELDS and not (name.startswith(SCORE) and name.removeprefix(SCORE)):
            known = [*FIELDS, f"{SCORE}1"]
            raise DataError(f"--map: there is no field {name!r}{nearest(name, known)}; there are {', '.join(known)}")
    if "label" not in columns:
        raise DataError("--map: label=COLUMN is missing")
    if "prompt" not in columns and not {"instruction", "response"} <= set(columns):
        raise DataError("--map: name the column of the whole prompt (prompt=COLUMN), or those of its parts")
    if "criteria" in columns and "rubric" in columns:
        raise DataError("--map: give either rubric=COLUMN or criteria=COLUMN with score:N=COLUMN")


def read(values: Mapping[str, Any], options: Options) -> Item:
    columns = options.columns
    whole = get(values, columns["prompt"]) if "prompt" in columns else None
    parts = _parts(values, columns) if {"instruction", "response"} <= set(columns) else None
    if "group" in columns:
        group = get(values, columns["group"])
        if isinstance(group, (list, dict)) or group is None:
            raise FieldError(columns["group"], f"a group is a number or text, not {shorten(group)}")
    else:
        group = group_of(question_of(parts.instruction) if parts else asked(whole))
    n = get(values, columns["n"]) if "n" in columns else 1
    if not str(n).isdecimal() or int(n) < 1:
        raise FieldError(columns["n"], f"expected how many judgements were averaged, got {shorten(n)}")
    return Item(
        id=str(get(values, columns["id"])) if "id" in columns else None,
        label=label(values, options.label_key or columns["label"], options.scale),
        group=str(group),
        whole=whole,
        parts=parts,
        split=text(values, columns["split"]) if "split" in columns else None,
        critique=_blank_is_none(values, columns, "feedback"),
        n=int(n),
    )


def _parts(values: Mapping[str, Any], columns: Mapping[str, str]) -> Parts:
    scores = {name.removeprefix(SCORE): column for name, column in columns.items() if name.startswith(SCORE)}
    rubric: Rubric | str | None = _blank_is_none(values, columns, "rubric")
    if "criteria" in columns:
        descriptions = {score: text(values, column) for score, column in scores.items()}
        rubric = Rubric(criteria=text(values, columns["criteria"]), descriptions=descriptions)
    return Parts(
        instruction=text(values, columns["instruction"]),
        response=text(values, columns["response"], blank=True),
        reference=_blank_is_none(values, columns, "reference"),
        context=_blank_is_none(values, columns, "context"),
        rubric=rubric,
    )


def _blank_is_none(values: Mapping[str, Any], columns: Mapping[str, str], name: str) -> str | None:
    """A mapped column must exist, but may be empty in a row."""
    if name not in columns:
        return None
    value = get(values, columns[name])
    if value is not None and not isinstance(value, str):
        raise FieldError(columns[name], f"expected text or nothing, got {shorten(value)}")
    return value if value and value.strip() else None


BUILDER = Builder(
    name="generic",
    about="any JSONL, JSON, CSV or parquet file, with --map FIELD=COLUMN ... and --scale",
    read=read,
    scale=None,
    template=None,
    fractions={"train": 1.0},
    critiques=True,
    labels_alone=True,
    check=check,
)
