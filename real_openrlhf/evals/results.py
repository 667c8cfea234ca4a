"""Metrics of predictions, with intervals, per benchmark and averaged over benchmarks.

A judgement is read in two ways (paper, section 2.2): "expected" is E[score], the RAIL prediction; "decoded" is the
score that was written, standard decoding. Every metric of a reading is over the rows that have it; n is their number.

    pearson, spearman, kendall (tau-b), rmse, mae    `metrics`
    accuracy   share of rows whose score decides for the label nearest to y: `reliability.is_right`
    ece        expected calibration error of those decisions: `reliability`
    invalid_rate     share of generations without a readable score, even after a forced anchor
    forced_rate      share of generations whose score was read after a forced anchor
    undecoded_rate   share of rows without a decoded score in any generation

Intervals are percentile bootstrap intervals; groups of rows (a question, a pair) are drawn, not single rows.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from real_openrlhf.algo.score_scale import ScoreScale
from real_openrlhf.evals.intervals import (
    Interval,
    Resampled,
    SingleInterval,
    paired_interval,
    resample,
    single_interval,
)
from real_openrlhf.evals.metrics import METRICS, Metric
from real_openrlhf.evals.predictions import EvaluationError, Prediction
from real_openrlhf.evals.reliability import confidence, ece, is_right, share

READINGS = {"expected": "RAIL", "decoded": "Standard"}
CORRELATIONS = ("pearson", "spearman", "kendall")
SCORE_METRICS = (*METRICS, "accuracy", "ece")
RATES = ("invalid_rate", "forced_rate", "undecoded_rate")
# Only evaluations of a training run have this metric, the mean reward: see `objective.mean_reward`.
REWARD = "reward"
AVERAGE = "average"

Column = tuple[list["float | None"], list[float]]
# Benchmark (and "average") -> (reading, metric) -> second run less first.
Compared = dict[str, dict[tuple[str, str], Interval]]


@dataclass(frozen=True, kw_only=True)
class Settings:
    """How predictions become numbers. renormalise: as it was for E[score]; confidence: of the intervals.
    pair_modes: of the benchmarks that are pairs, how they were judged; tie_margin: see `pair_results`."""

    scale: ScoreScale
    renormalise: bool = False
    seed: int = 0
    n_resamples: int = 2000
    confidence: float = 0.95
    pair_modes: Mapping[str, str] = field(default_factory=dict)
    tie_margin: float = 0.0


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """A number with its interval. note: why the number or its bounds are None, in words; None when nothing is."""

    estimate: float | None
    low: float | None
    high: float | None
    n: int
    note: str | None = None


@dataclass(frozen=True, kw_only=True)
class BenchmarkResult:
    """
    n, n_groups  number of rows, and of groups of rows
    scores       reading -> metric -> Estimate
    rates        rate -> Estimate
    """

    name: str
    n: int
    n_groups: int
    scores: dict[str, dict[str, Estimate]]
    rates: dict[str, Estimate]


@dataclass(frozen=True, kw_only=True)
class Results:
    """benchmarks: in the order of the evaluation. average: over them; None if there is only one."""

    benchmarks: tuple[BenchmarkResult, ...]
    average: BenchmarkResult | None


def evaluate(predictions: Sequence[Prediction], settings: Settings) -> Results:
    """All metrics of all benchmarks that occur in the predictions. Raises EvaluationError without any."""
    grouped = by_benchmark(predictions)
    parts = {name: _resample_all([rows], settings, name) for name, rows in grouped.items()}
    benchmarks = []
    for name, rows in grouped.items():
        estimates = {
            key: to_estimate(
                single_interval([part], confidence=settings.confidence), why_undefined(rows, key, settings)
            )
            for key, part in parts[name].items()
        }
        benchmarks.append(_result(name, rows, estimates))
    if len(benchmarks) == 1:
        return Results(benchmarks=tuple(benchmarks), average=None)
    averaged = {
        key: to_estimate(
            single_interval([part[key] for part in parts.values()], confidence=settings.confidence),
            _undefined_on(benchmarks, key),
        )
        for key in keys()
    }
    average = _result(AVERAGE, predictions, averaged)
    return Results(benchmarks=tuple(benchmarks), average=average)


def compare(a: Sequence[Prediction], b: Sequence[Prediction], settings: Settings) -> Compared:
    """Paired: b less a, on the rows that both runs have read.

    Raises EvaluationError when the runs did not judge the same rows with the same labels.
    """
    check_same_rows(a, b)
    rows_a, rows_b = by_benchmark(a), by_benchmark(b)
    parts = {}
    for name, rows in rows_a.items():
        other = {row.row: row for row in rows_b[name]}
        parts[name] = _resample_all([rows, [other[row.row] for row in rows]], settings, name)
    compared = {
        name: {key: paired_interval([part], confidence=settings.confidence) for key, part in table.items()}
        for name, table in parts.items()
    }
    if len(parts) > 1:
        compared[AVERAGE] = {
            key: paired_interval([table[key] for table in parts.values()], confidence=settings.confidence)
            for key in keys()
        }
    return compared


def flat_metrics(predictions: Sequence[Prediction], settings: Settings) -> dict[str, float | None]:
    """One benchmark's numbers without intervals, for a training log.

    "expected/pearson", ..., "expected/n", the same for "decoded", the rates, "mass" (mean probability on the scale) and
    "n". Undefined values are None.
    """
    metrics: dict[str, float | None] = {}
    for reading, name in keys():
        x, y = column(predictions, (reading, name), settings)
        known = [(a, b) for a, b in zip(x, y) if a is not None]
        values = np.asarray(known, dtype=np.float64).reshape(-1, 2)
        value = _function(name)(values[:, 0], values[:, 1]) if len(known) else None
        metrics[f"{reading}/{name}" if reading else name] = value
    for reading in READINGS:
        metrics[f"{reading}/n"] = sum(getattr(p, reading) is not None for p in predictions)
    masses = [p.mass for p in predictions if p.mass is not None]
    metrics["mass"] = sum(masses) / len(masses) if masses else None
    metrics["n"] = len(predictions)
    return metrics


def average_metrics(tables: Sequence[dict[str, float | None]]) -> dict[str, float | None]:
    """Mean over benchmarks of each number of `flat_metrics`, None if one of them is; counts (n) are summed."""
    result: dict[str, float | None] = {}
    for name in tables[0]:
        values = [table[name] for table in tables]
        known = [value for value in values if value is not None]
        total = sum(known) if len(known) == len(values) else None
        counts = name == "n" or name.endswith("/n")
        result[name] = total if counts or total is None else total / len(values)
    return result


def metric_names(benchmarks: Sequence[str]) -> list[str]:
    """Names of a training run's evaluation metrics: those of `flat_metrics`, and the reward; with several benchmarks,
    also those of each with "<benchmark>/" in front."""
    names = [*(f"{reading}/{metric}" for reading in READINGS for metric in (*SCORE_METRICS, "n")), *RATES, "mass", "n"]
    names.append(REWARD)
    prefixes = [f"{benchmark}/" for benchmark in benchmarks] if len(benchmarks) > 1 else []
    return [prefix + name for prefix in ["", *prefixes] for name in names]


def by_benchmark(predictions: Sequence[Prediction]) -> dict[str, list[Prediction]]:
    """Predictions by benchmark, in the order in which benchmarks first occur. EvaluationError without predictions."""
    if not predictions:
        raise EvaluationError("there is no prediction to evaluate")
    table: dict[str, list[Prediction]] = {}
    for prediction in predictions:
        table.setdefault(prediction.benchmark, []).append(prediction)
    return table


def keys() -> list[tuple[str, str]]:
    """(reading, metric) of every number; for rates, the reading is ""."""
    return [(reading, metric) for reading in READINGS for metric in SCORE_METRICS] + [("", rate) for rate in RATES]


def column(predictions: Sequence[Prediction], key: tuple[str, str], settings: Settings) -> Column:
    """The two columns that a metric is computed from: a value per row, None if it has none, and what that is compared
    with, such as the label."""
    reading, metric = key
    if metric in METRICS:
        return [getattr(p, reading) for p in predictions], [p.label for p in predictions]
    if metric == "accuracy":
        return [_right(p, reading, settings) for p in predictions], [0.0] * len(predictions)
    if metric == "ece":
        return (
            [_confidence(p, reading, settings) for p in predictions],
            [_right(p, reading, settings) or 0.0 for p in predictions],
        )
    rate = {
        "invalid_rate": lambda p: p.invalid_share,
        "forced_rate": lambda p: p.forced_share,
        "undecoded_rate": lambda p: float(p.decoded is None),
    }[metric]
    return [rate(p) for p in predictions], [0.0] * len(predictions)


def check_same_rows(a: Sequence[Prediction], b: Sequence[Prediction]) -> None:
    """EvaluationError unless both runs judged the same rows of the same benchmarks, with the same labels."""
    labels_a, labels_b = ({p.key: p.label for p in side} for side in (a, b))
    for there, missing, side in ((labels_a, labels_b, "second"), (labels_b, labels_a, "first")):
        lost = [key for key in there if key not in missing]
        if lost:
            raise EvaluationError(
                f"the runs cannot be paired: row {lost[0][1]} of {lost[0][0]} and {len(lost) - 1} others are not in "
                f"the {side} run; judge the same benchmarks with both, to the end, and --max_samples with one --seed"
            )
    for key, label in labels_a.items():
        if labels_b[key] != label:
            raise EvaluationError(
                f"the runs cannot be paired: the label of row {key[1]} of {key[0]} is {label:g} in the first and "
                f"{labels_b[key]:g} in the second: they judged different data"
            )


def why_undefined(predictions: Sequence[Prediction], key: tuple[str, str], settings: Settings) -> str | None:
    """Why a metric has no value, in words; None when it has one."""
    reading, metric = key
    x, y = column(predictions, key, settings)
    known = [(a, b) for a, b in zip(x, y) if a is not None]
    if not known:
        return {"expected": "no row has a readable score", "decoded": "no row has a written score"}[reading]
    if metric not in CORRELATIONS:
        return None
    if len(known) == 1:
        return "one row only"
    for name, values in (("labels", [b for _, b in known]), ("predictions", [a for a, _ in known])):
        if np.ptp(values) <= 1e-9:
            return f"all {name} are {values[0]:.4g}"
    return None


def _right(prediction: Prediction, reading: str, settings: Settings) -> float | None:
    score = getattr(prediction, reading)
    return None if score is None else float(is_right(score, prediction.label, settings.scale))


def _confidence(prediction: Prediction, reading: str, settings: Settings) -> float | None:
    score, distribution = getattr(prediction, reading), prediction.distribution
    known = [p for p in distribution or () if p is not None]
    if score is None or len(known) != len(settings.scale):
        return None
    return confidence(score, known, settings.scale, renormalise=settings.renormalise)


def _function(metric: str) -> Metric:
    if metric in METRICS:
        return METRICS[metric]
    return ece if metric == "ece" else share


def _resample_all(
    sides: Sequence[Sequence[Prediction]], settings: Settings, benchmark: str
) -> dict[tuple[str, str], Resampled]:
    """Every metric on the same resamples; sides: one run, or two on the same rows."""
    return {
        key: resample(
            _function(key[1]),
            [column(side, key, settings) for side in sides],
            # Benchmarks are independent, so their resamples must be too: each has its own seed.
            seed=zlib.crc32(f"{settings.seed}/{benchmark}".encode()),
            n_resamples=settings.n_resamples,
            clusters=[p.group for p in sides[0]],
        )
        for key in keys()
    }


def _result(name: str, rows: Sequence[Prediction], estimates: dict[tuple[str, str], Estimate]) -> BenchmarkResult:
    return BenchmarkResult(
        name=name,
        n=len(rows),
        n_groups=len({(row.benchmark, row.group) for row in rows}),
        scores={reading: {m: estimates[reading, m] for m in SCORE_METRICS} for reading in READINGS},
        rates={rate: estimates["", rate] for rate in RATES},
    )


def to_estimate(interval: SingleInterval, why: str | None) -> Estimate:
    """why: the reason, should it have no value."""
    note = None
    if interval.estimate is None:
        note = f"undefined: {why or 'no value'}"
    elif interval.low is None:
        note = "no interval: " + (
            f"undefined on {interval.undefined} resamples" if interval.undefined else "a single group of rows"
        )
    return Estimate(estimate=interval.estimate, low=interval.low, high=interval.high, n=interval.n, note=note)


def _undefined_on(benchmarks: Sequence[BenchmarkResult], key: tuple[str, str]) -> str | None:
    reading, metric = key
    for result in benchmarks:
        found = result.scores[reading][metric] if reading else result.rates[metric]
        if found.estimate is None and found.note:
            return f"on {result.name} {found.note.removeprefix('undefined: ')}"
    return None
