"""How far the raters behind labels agree: what a judge's agreement with the labels can be held against."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

Ratings = Mapping[str, float]


def spread(ratings: Ratings) -> float | None:
    """Sample standard deviation of one row's ratings, in units of the scale; None with a single rater.

    >>> spread({"a": 3.0, "b": 5.0})
    1.4142135623730951
    """
    return statistics.stdev(ratings.values()) if len(ratings) > 1 else None


def agreement(rows: Sequence[Ratings]) -> dict[str, Any] | None:
    """Each rater against the mean of the row's others (leave one rater out), over the rows with two raters or more.

    pearson, spearman: mean over the raters that have one, None where none has. It is a yardstick and no bound: the
    label of a row has one rater more in its mean than a rater is compared with here, and is less noisy for it.
    spread: mean over rows of `spread`. raters: rater -> rows, pearson, spearman; None where a rater has fewer than two
    rows, or either side is constant. Returns None where no row has two raters.

    Raters are told apart by their names. Where a file has a list of ratings, the name is the place in the list, which
    need not be one person.
    """
    several = [row for row in rows if len(row) > 1]
    if not several:
        return None
    raters = {}
    for name in dict.fromkeys(name for row in several for name in row):
        rated = [row for row in several if name in row]
        own = [row[name] for row in rated]
        others = [statistics.fmean(value for other, value in row.items() if other != name) for row in rated]
        raters[name] = {"rows": len(rated), **_correlations(own, others)}
    return {
        "rows": len(several),
        "spread": statistics.fmean(statistics.stdev(row.values()) for row in several),
        "pearson": _mean([found["pearson"] for found in raters.values()]),
        "spearman": _mean([found["spearman"] for found in raters.values()]),
        "raters": raters,
    }


def agreement_lines(table: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> list[str]:
    """For people; table: split -> aspect ("" without one) -> `agreement`."""
    lines = []
    for split, aspects in table.items():
        for aspect, found in aspects.items():
            numbers = ", ".join(
                f"{name} {'undefined' if found[key] is None else format(found[key], '.3f')}"
                for name, key in (("Pearson", "pearson"), ("Spearman", "spearman"))
            )
            lines.append(
                f"  raters, {split}{f', {aspect}' if aspect else ''}: each against the mean of the others, {numbers} "
                f"({found['rows']} rows, {len(found['raters'])} raters, mean spread {found['spread']:.2f})"
            )
    return lines


def _correlations(x: Sequence[float], y: Sequence[float]) -> dict[str, float | None]:
    from scipy import stats

    if len(x) < 2 or _constant(x) or _constant(y):
        return {"pearson": None, "spearman": None}
    return {
        "pearson": float(stats.pearsonr(x, y).statistic),
        "spearman": float(stats.spearmanr(x, y).statistic),
    }


def _constant(values: Sequence[float]) -> bool:
    # Means of equal ratings may differ in the last digit.
    return max(values) - min(values) <= 1e-9


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return statistics.fmean(known) if known else None
