"""Bootstrap intervals for a metric and for the difference of two judges on the same rows.

The intervals are percentile intervals. numpy is used instead of scipy.stats.bootstrap, which does not support clusters,
turns one undefined resample (a constant one has no correlation) into a NaN interval, and cannot return both estimates;
where it does apply, the tests compare with it. A resample is a vector of counts per row, so clusters and rows use the
same code, and metrics made of weighted means (of values or ranks) are computed for all resamples at once.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from real_openrlhf.evals.metrics import METRICS, Floats, Metric
from real_openrlhf.evals.reliability import ece, share, weighted_ece, weighted_share

# Most numbers (resamples times rows) in memory at once.
CHUNK = 2_000_000
Scores = Sequence["float | None"] | Floats


@dataclass(frozen=True, kw_only=True)
class SingleInterval:
    """A metric with its percentile interval.

    estimate, low, high  None where undefined
    n, excluded          number of rows used, and of rows left out because a prediction is missing
    undefined            number of resamples without a value. They are left out; if they could make up a whole tail,
                         there are no bounds
    """

    estimate: float | None
    low: float | None
    high: float | None
    n: int
    excluded: int
    undefined: int
    confidence: float


@dataclass(frozen=True, kw_only=True)
class Interval:
    """Two judges on the same rows: difference = estimate_b - estimate_a; low and high are the difference's bounds.

    The other fields are as in SingleInterval.
    """

    estimate_a: float | None
    estimate_b: float | None
    difference: float | None
    low: float | None
    high: float | None
    n: int
    excluded: int
    undefined: int
    confidence: float


@dataclass(frozen=True, kw_only=True)
class Resampled:
    """A metric on one data set and on its resamples, for one column of predictions or several on the same resamples.

    estimates    one per column, None where undefined
    values       [n_resamples] per column, NaN where undefined; empty without rows
    n, excluded  number of rows used, and of rows left out because a prediction is missing
    clusters     number of different clusters
    """

    estimates: tuple[float | None, ...]
    values: tuple[Floats, ...]
    n: int
    excluded: int
    clusters: int


def bootstrap(
    metric: str | Metric,
    predictions: Scores,
    labels: Sequence[float] | Floats,
    *,
    seed: int,
    n_resamples: int = 2000,
    confidence: float = 0.95,
    clusters: Sequence[Hashable] | None = None,
) -> SingleInterval:
    """Interval of one metric.

    metric: a name in METRICS or a function (predictions [n], labels [n]) -> float or None. predictions: None and NaN
    are missing, and their rows are left out. clusters: one key per row; whole clusters are drawn instead of rows.
    Raises ValueError for different lengths, labels that are not finite, and options out of range.
    """
    part = resample(metric, [(predictions, labels)], seed=seed, n_resamples=n_resamples, clusters=clusters)
    return single_interval([part], confidence=confidence)


def paired_bootstrap(
    metric_fn: str | Metric,
    a: Scores,
    b: Scores,
    labels: Sequence[float] | Floats,
    *,
    seed: int,
    n_resamples: int = 2000,
    confidence: float = 0.95,
    clusters: Sequence[Hashable] | None = None,
) -> Interval:
    """Interval of metric(b) - metric(a): every resample draws the same rows (or clusters) for both.

    Rows where either prediction is missing (None or NaN) are left out of both estimates and counted. Arguments and
    errors as in `bootstrap`.
    """
    part = resample(metric_fn, [(a, labels), (b, labels)], seed=seed, n_resamples=n_resamples, clusters=clusters)
    return paired_interval([part], confidence=confidence)


def resample(
    metric: str | Metric,
    columns: Sequence[tuple[Scores, Sequence[float] | Floats]],
    *,
    seed: int,
    n_resamples: int = 2000,
    clusters: Sequence[Hashable] | None = None,
) -> Resampled:
    """The metric of every column (predictions, labels), all on the same resamples; arguments as in `bootstrap`."""
    if n_resamples < 1:
        raise ValueError(f"n_resamples must be at least 1, got {n_resamples}")
    pairs, groups, excluded = _prepare(columns, clusters)
    values = _resampled(metric, pairs, groups, n_resamples, seed) if len(groups) else [np.empty(0)] * len(pairs)
    return Resampled(
        estimates=tuple(_estimate(metric, x, y) for x, y in pairs),
        values=tuple(values),
        n=len(groups),
        excluded=excluded,
        clusters=len(np.unique(groups)),
    )


def single_interval(parts: Sequence[Resampled], *, confidence: float = 0.95) -> SingleInterval:
    """The interval of a metric's mean over data sets; each was resampled separately, with its own seed."""
    estimate, values = _average(parts, 0)
    low, high, undefined = _bounds(values, parts, confidence)
    if estimate is None:
        low = high = None
    return SingleInterval(
        estimate=estimate,
        low=low,
        high=high,
        n=sum(part.n for part in parts),
        excluded=sum(part.excluded for part in parts),
        undefined=undefined,
        confidence=confidence,
    )


def paired_interval(parts: Sequence[Resampled], *, confidence: float = 0.95) -> Interval:
    """The interval of a difference (column 1 minus column 0) of means over data sets; see `single_interval`."""
    estimate_a, values_a = _average(parts, 0)
    estimate_b, values_b = _average(parts, 1)
    low, high, undefined = _bounds(values_b - values_a, parts, confidence)
    difference = None
    if estimate_a is not None and estimate_b is not None:
        difference = estimate_b - estimate_a
    else:
        low = high = None
    return Interval(
        estimate_a=estimate_a,
        estimate_b=estimate_b,
        difference=difference,
        low=low,
        high=high,
        n=sum(part.n for part in parts),
        excluded=sum(part.excluded for part in parts),
        undefined=undefined,
        confidence=confidence,
    )


def _average(parts: Sequence[Resampled], column: int) -> tuple[float | None, Floats]:
    """Means over the parts of the estimate and of every resample; undefined if one part is."""
    estimates = [part.estimates[column] for part in parts]
    values = [part.values[column] for part in parts]
    if not all(len(v) for v in values):
        return None, np.empty(0)
    defined = [e for e in estimates if e is not None]
    estimate = sum(defined) / len(defined) if len(defined) == len(estimates) else None
    return estimate, np.mean(values, axis=0)


def _prepare(
    columns: Sequence[tuple[Scores, Sequence[float] | Floats]], clusters: Sequence[Hashable] | None
) -> tuple[list[tuple[Floats, Floats]], np.ndarray, int]:
    """The rows that are complete in every column: (predictions, labels), each row's cluster, number of rows dropped."""
    pairs = [(np.asarray(x, dtype=np.float64), np.asarray(y, dtype=np.float64)) for x, y in columns]  # None: NaN
    lengths = [len(array) for pair in pairs for array in pair] + ([] if clusters is None else [len(clusters)])
    if len(set(lengths)) != 1:
        raise ValueError(f"predictions, labels (and clusters) must be equally long, got {lengths}")
    for x, y in pairs:
        if not np.isfinite(y).all():
            raise ValueError(f"labels[{int(np.flatnonzero(~np.isfinite(y))[0])}] is not a finite number")
        if np.isinf(x).any():
            raise ValueError("a prediction is infinite")
    keep = np.logical_and.reduce([~np.isnan(x) for x, _ in pairs])
    if clusters is None:
        groups = np.arange(int(keep.sum()))
    else:
        numbers: dict[Hashable, int] = {}
        groups = np.asarray([numbers.setdefault(key, len(numbers)) for key, k in zip(clusters, keep) if k], dtype=int)
    return [(x[keep], y[keep]) for x, y in pairs], groups, int((~keep).sum())


def _function(metric: str | Metric) -> Metric:
    if callable(metric):
        return metric
    if metric not in METRICS:
        raise ValueError(f"there is no metric {metric!r}; known are {', '.join(METRICS)}")
    return METRICS[metric]


def _estimate(metric: str | Metric, x: Floats, y: Floats) -> float | None:
    function = _function(metric)
    value = function(x, y) if len(y) else None
    return None if value is None or not math.isfinite(value) else float(value)


def _resampled(
    metric: str | Metric, columns: list[tuple[Floats, Floats]], groups: np.ndarray, n_resamples: int, seed: int
) -> list[Floats]:
    """The metric of every column on every resample: [n_resamples] each, NaN where undefined."""
    function = _function(metric)
    weighted = WEIGHTED.get(function)
    results: list[list[Floats]] = [[] for _ in columns]
    for counts in _draws(groups, n_resamples, seed):
        if weighted is not None:
            for result, (x, y) in zip(results, columns):
                result.append(weighted(x, y, counts))
            continue
        rows = [np.repeat(np.arange(len(groups)), count) for count in counts]
        for result, (x, y) in zip(results, columns):
            # None becomes NaN here.
            result.append(np.asarray([function(x[r], y[r]) for r in rows], dtype=np.float64))
    return [np.concatenate(result) if result else np.empty(0) for result in results]


def _draws(groups: np.ndarray, n_resamples: int, seed: int) -> Iterator[np.ndarray]:
    """How often every row is drawn, in chunks [resamples, n]; all rows of a cluster are drawn together."""
    rng = np.random.default_rng(seed)
    n_groups = int(groups.max()) + 1
    chunk = max(1, CHUNK // len(groups))
    for start in range(0, n_resamples, chunk):
        size = min(chunk, n_resamples - start)
        drawn = rng.integers(0, n_groups, size=(size, n_groups)) + n_groups * np.arange(size)[:, None]
        yield np.bincount(drawn.ravel(), minlength=size * n_groups).reshape(size, n_groups)[:, groups]


def _bounds(values: Floats, parts: Sequence[Resampled], confidence: float) -> tuple[float | None, float | None, int]:
    if not 0 < confidence < 1:
        raise ValueError(f"confidence must lie between 0 and 1, got {confidence}")
    defined = values[np.isfinite(values)]
    undefined = len(values) - len(defined)
    tail = (1 - confidence) / 2
    # A single row or cluster cannot be resampled.
    if min(part.clusters for part in parts) < 2 or len(defined) == 0 or undefined > tail * len(values):
        return None, None, undefined
    low, high = np.quantile(defined, [tail, 1 - tail])
    return float(low), float(high), undefined


def _means(counts: np.ndarray, *columns: Floats) -> list[Floats]:
    """Mean of every [n] column, weighted by each row of counts [resamples, n]."""
    sums = counts.astype(np.float64) @ np.stack(columns, axis=1)
    return list((sums / counts.sum(axis=1, keepdims=True)).T)


def _weighted_pearson(x: Floats, y: Floats, counts: np.ndarray) -> Floats:
    # Centring on the mean of all rows first keeps differences accurate.
    x, y = x - x.mean(), y - y.mean()
    mx, my, xx, yy, xy = _means(counts, x, y, x * x, y * y, x * y)
    var_x, var_y = xx - mx * mx, yy - my * my
    # In a constant resample, the variance is rounding noise.
    defined = (var_x > 1e-12 * xx) & (var_y > 1e-12 * yy)
    result = np.full(len(counts), np.nan)
    np.divide(xy - mx * my, np.sqrt(np.where(defined, var_x * var_y, 1.0)), out=result, where=defined)
    return np.clip(result, -1.0, 1.0)


def _weighted_spearman(x: Floats, y: Floats, counts: np.ndarray) -> Floats:
    rank_x, rank_y = _centred_ranks(x, counts), _centred_ranks(y, counts)
    var_x, var_y = (counts * rank_x**2).sum(axis=1), (counts * rank_y**2).sum(axis=1)
    defined = (var_x > 0) & (var_y > 0)
    result = np.full(len(counts), np.nan)
    np.divide((counts * rank_x * rank_y).sum(axis=1), np.sqrt(var_x * var_y), out=result, where=defined)
    return np.clip(result, -1.0, 1.0)


def _centred_ranks(x: Floats, counts: np.ndarray) -> Floats:
    """Rank of every row's value within every resample [resamples, n], ties at their mean, minus the mean rank."""
    unique, inverse = np.unique(x, return_inverse=True)
    order = np.argsort(inverse, kind="stable")
    starts = np.searchsorted(inverse[order], np.arange(len(unique)))
    tied = np.add.reduceat(counts[:, order], starts, axis=1)
    ranks = np.cumsum(tied, axis=1) - (tied - 1) / 2
    return (ranks - (counts.sum(axis=1, keepdims=True) + 1) / 2)[:, inverse]


def _weighted_rmse(x: Floats, y: Floats, counts: np.ndarray) -> Floats:
    return np.sqrt(_means(counts, (x - y) ** 2)[0])


def _weighted_mae(x: Floats, y: Floats, counts: np.ndarray) -> Floats:
    return _means(counts, np.abs(x - y))[0]


WEIGHTED: dict[Metric, Callable[[Floats, Floats, np.ndarray], Floats]] = {
    METRICS["pearson"]: _weighted_pearson,
    METRICS["spearman"]: _weighted_spearman,
    METRICS["rmse"]: _weighted_rmse,
    METRICS["mae"]: _weighted_mae,
    ece: weighted_ece,
    share: weighted_share,
}
