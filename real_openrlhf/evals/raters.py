"""How far the people behind a benchmark's labels agree, beside the metrics of a judge.

Files of `python -m real_openrlhf.data` keep each row's ratings in the column `meta`. On the rows that are judged, every
rater is compared with the mean of the row's others: what a judge of single responses can be held against. It is a
yardstick and no bound, since a label averages one rater more (`data.agreement`).
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import Any

from real_openrlhf.data.agreement import Ratings, agreement
from real_openrlhf.data.row import Row
from real_openrlhf.evals.tables import markdown

META = "meta"
# Benchmark -> aspect ("" without one) -> `data.agreement.agreement`.
Raters = Mapping[str, Mapping[str, Mapping[str, Any]]]


def raters_of(rows: Iterable[Row]) -> dict[str, dict[str, Any]]:
    """Aspect -> how the raters of these rows agree; empty where no row has several."""
    by_aspect: dict[str, list[Ratings]] = {}
    for row in rows:
        aspect, ratings = _ratings(row.values.get(META))
        if ratings:
            by_aspect.setdefault(aspect, []).append(ratings)
    found = {aspect: agreement(ratings) for aspect, ratings in by_aspect.items()}
    return {aspect: each for aspect, each in found.items() if each is not None}


def _ratings(meta: object) -> tuple[str, Ratings]:
    """Aspect and ratings by rater. A column `meta` of another kind holds none."""
    if isinstance(meta, str):
        try:
            meta = json.loads(meta)
        except ValueError:
            return "", {}
    ratings = meta.get("ratings") if isinstance(meta, Mapping) else None
    if not isinstance(meta, Mapping) or not isinstance(ratings, Mapping):
        return "", {}
    if any(isinstance(value, bool) or not isinstance(value, (int, float)) for value in ratings.values()):
        return "", {}
    aspect = meta.get("aspect")
    return aspect if isinstance(aspect, str) else "", {str(name): float(value) for name, value in ratings.items()}


def raters_table(raters: Raters) -> str:
    """A line per benchmark and aspect; empty without raters."""
    lines = [
        [
            f"{name}, {aspect}" if aspect else name,
            str(found["rows"]),
            str(len(found["raters"])),
            f"{found['spread']:.3f}",
            *("-" if found[metric] is None else f"{found[metric]:.3f}" for metric in ("pearson", "spearman")),
        ]
        for name, aspects in raters.items()
        for aspect, found in aspects.items()
    ]
    if not lines:
        return ""
    head = ["The raters themselves", "rows", "raters", "spread in a row", "r, each against the others", "ρ"]
    about = (
        "Each rater against the mean of the row's other raters, on the rows that were judged: a yardstick for the "
        "judge's r and ρ, and no bound, since a label averages one rater more. Spread: mean standard "
        "deviation of a row's ratings."
    )
    return markdown(head, lines, n_text=1) + f"\n\n{about}"
