"""WMT's MQM ratings: errors that professional translators marked in translations, as a score per segment.

The form is that of google/wmt-mqm-human-evaluation, whose README has the weights: tab-separated, one row per marked
error with system, doc, seg_id, rater, source, target, category and severity. A rater's score of a segment is the sum
over its errors: -5 major, -1 minor, -0.1 minor in punctuation, -25 for a segment that is no translation, 0 without an
error and for neutral remarks; faults of the source count like any other, as they do in the repository's own averages
(`*.avg_seg_scores.tsv`). The label is the mean over the segment's raters.
"""

from __future__ import annotations

import math
import re
from collections.abc import Hashable, Iterator, Mapping, Sequence
from typing import Any

from real_openrlhf.data.builders.base import (
    Builder,
    FieldError,
    Item,
    Options,
    Parts,
    get,
    group_of,
    mean,
    ratings,
    text,
)
from real_openrlhf.data.builders.merge import merge_rows
from real_openrlhf.data.judge_prompt import Rubric
from real_openrlhf.data.row import BadRow, Row, shorten
from real_openrlhf.data.tsv import read_tsv_or_rows

NOTHING, NEUTRAL, MINOR, MAJOR, ATTENTION_TEST = "no-error", "neutral", "minor", "major", "hotw-test"
SEVERITIES = (NOTHING, NEUTRAL, MINOR, MAJOR)
# What marks the error in source and target. It would give the judge the rater's finding.
_MARKS = re.compile(r"</?v>")
RUBRIC = Rubric(
    criteria="How many errors are in the translation, and how grave are they? From 0 points take 5 for every major "
    "error (the meaning is changed, or grammar makes it hard to understand), 1 for every minor one, and 25 if it is no "
    "translation of the text at all",
    descriptions={"-25": "No translation of the text.", "0": "No error."},
)


def weight(category: str, severity: str) -> float:
    """Points of one marked error, 0 or below. Raises FieldError for a severity without a weight."""
    kind, grade = category.strip().lower().replace("_", " "), severity.strip().lower()
    if grade not in SEVERITIES:
        raise FieldError("severity", f"{shorten(severity)} has no weight; known are {', '.join(SEVERITIES)}")
    if grade in (NOTHING, NEUTRAL):
        return 0.0
    if kind.rstrip("!").replace("-", " ") == "non translation":
        return -25.0
    if grade == MINOR:
        return -0.1 if kind == "fluency/punctuation" else -1.0
    return -5.0


def rows(source: str) -> Iterator[Row | BadRow]:
    """One row per system and segment, `scores` from rater to points."""
    yield from merge_rows(read_tsv_or_rows(source), key=_segment, merge=_merge)


def _segment(values: Mapping[str, Any]) -> Hashable:
    return tuple(str(get(values, name)) for name in ("system", "doc", "seg_id"))


def _merge(found: Sequence[Row]) -> Row | BadRow:
    marked: dict[str, list[float]] = {}
    first = found[0]
    same = {name: _unmarked(first.values, name) for name in ("source", "target")}
    for row in found:
        try:
            rater = text(row.values, "rater")
            category, severity = (text(row.values, name) for name in ("category", "severity"))
            if severity.strip().lower() == ATTENTION_TEST:
                continue  # an error that was put in to test the rater's attention
            marked.setdefault(rater, []).append(weight(category, severity))
            for name, value in same.items():
                if _unmarked(row.values, name) != value:
                    where = f"line {first.place.index} has another text for this system and segment"
                    raise FieldError(name, f"{shorten(_unmarked(row.values, name))}, but {where}")
        except FieldError as error:
            return BadRow(place=row.place, column=error.column, reason=str(error))
    if not marked:
        return BadRow(place=first.place, column="severity", reason="the segment has attention tests alone")
    kept = {name: first.values[name] for name in ("system", "doc", "seg_id")}
    # Rounded: ten times -0.1 is -1.
    scores = {rater: round(math.fsum(points), 6) for rater, points in marked.items()}
    return Row(place=first.place, values={**kept, **same, "scores": scores})


def _unmarked(values: Mapping[str, Any], name: str) -> str:
    return " ".join(_MARKS.sub("", str(values.get(name, ""))).split())


def read(values: Mapping[str, Any], options: Options) -> Item:
    found = ratings(values["scores"], "severity", options.scale)
    source = text(values, "source")
    return Item(
        id="/".join(str(values[name]) for name in ("system", "doc", "seg_id")),
        label=mean(found),
        n=len(found),
        ratings=found,
        group=f"mqm:{group_of(source)}",
        parts=Parts(
            instruction=f"Translate this text.\n\n{source}",
            response=text(values, "target", blank=True),
            rubric=RUBRIC,
        ),
        meta={name: values[name] for name in ("system", "doc", "seg_id")},
    )


BUILDER = Builder(
    name="wmt_mqm",
    about="WMT's MQM ratings of translations, a score of 0 or below per segment and rater, from the errors they marked",
    read=read,
    rows=rows,
    scale="-25-0",
    template="rubric",
)
