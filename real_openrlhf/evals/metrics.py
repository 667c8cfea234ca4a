"""How well scores agree with human labels. Undefined values are None, never NaN; missing ones are left out."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import stats

from real_openrlhf.common.numeric import CONSTANT

Floats = NDArray[np.float64]
Metric = Callable[[Floats, Floats], "float | None"]


def pearson(predictions: Floats, labels: Floats) -> float | None:
    """Pearson's r of two [n] arrays; None when n < 2 or either is constant."""
    return _correlation(lambda: stats.pearsonr(predictions, labels).statistic, predictions, labels)


def spearman(predictions: Floats, labels: Floats) -> float | None:
    """Spearman's rho, ties at their mean rank; None when n < 2 or either is constant."""
    return _correlation(
        lambda: stats.pearsonr(stats.rankdata(predictions), stats.rankdata(labels)).statistic, predictions, labels
    )


def kendall(predictions: Floats, labels: Floats) -> float | None:
    """Kendall's tau-b; None when n < 2 or either is constant."""
    return _correlation(lambda: stats.kendalltau(predictions, labels, variant="b").statistic, predictions, labels)


def rmse(predictions: Floats, labels: Floats) -> float | None:
    """Root of the mean squared error, in units of the scale; None without rows."""
    return float(np.sqrt(np.mean((predictions - labels) ** 2))) if len(labels) else None


def mae(predictions: Floats, labels: Floats) -> float | None:
    """Mean absolute error, in units of the scale; None without rows."""
    return float(np.mean(np.abs(predictions - labels))) if len(labels) else None


METRICS: dict[str, Metric] = {"pearson": pearson, "spearman": spearman, "kendall": kendall, "rmse": rmse, "mae": mae}


def score_metrics(predictions: ArrayLike, labels: ArrayLike) -> dict[str, float | None]:
    """Every metric of [n] predictions against [n] labels: pearson, spearman, kendall, rmse, mae, n.

    Raises ValueError for different lengths and for anything that is not a finite number.
    """
    x, y = _finite("predictions", predictions), _finite("labels", labels)
    if len(x) != len(y):
        raise ValueError(f"{len(x)} predictions, but {len(y)} labels")
    return {**{name: metric(x, y) for name, metric in METRICS.items()}, "n": len(y)}


def judge_metrics(
    expected: Sequence[float | None], decoded: Sequence[float | None], labels: Sequence[float]
) -> dict[str, float | None]:
    """Metrics of a judge on n judgements.

    expected: E[score], None where no score could be read. decoded: the written score, None where it is not on the
    scale. Each set of metrics ("expected/pearson", "decoded/rmse", "expected/n", ...) is over its own readable rows;
    the shares "invalid_rate" (no expected) and "undecoded_rate" (no decoded) are over all n, None when n is 0.
    """
    if not len(expected) == len(decoded) == len(labels):
        raise ValueError(f"{len(expected)} expected scores, {len(decoded)} decoded ones, {len(labels)} labels")
    result: dict[str, float | None] = {}
    for name, scores in (("expected", expected), ("decoded", decoded)):
        rows = [(score, label) for score, label in zip(scores, labels) if score is not None]
        metrics = score_metrics([score for score, _ in rows], [label for _, label in rows])
        result.update({f"{name}/{key}": value for key, value in metrics.items()})
    n = len(labels)
    result["invalid_rate"] = sum(score is None for score in expected) / n if n else None
    result["undecoded_rate"] = sum(score is None for score in decoded) / n if n else None
    result["n"] = n
    return result


def _correlation(compute: Callable[[], float], x: Floats, y: Floats) -> float | None:
    if len(x) < 2 or _is_constant(x) or _is_constant(y):
        return None
    value = float(compute())
    return value if math.isfinite(value) else None


def _is_constant(x: Floats) -> bool:
    return bool(np.ptp(x) <= CONSTANT * np.abs(x).max())


def _finite(name: str, values: ArrayLike) -> Floats:
    array = np.asarray(values, dtype=np.float64)
    if array.ndim != 1:
        raise ValueError(f"{name} must be one list of numbers, got shape {array.shape}")
    wrong = np.flatnonzero(~np.isfinite(array))
    if len(wrong):
        raise ValueError(f"{name}[{wrong[0]}] is {array[wrong[0]]}, not a finite number ({len(wrong)} such)")
    return array
