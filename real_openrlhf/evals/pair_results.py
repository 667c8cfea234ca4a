"""How often a judge prefers the response that people prefer, with intervals over groups of pairs.

A judge's preference is the sign of the difference of two scores; what differs by no more than the tie margin is a tie
(`judge.pairs.verdict`). Each of the two readings (E[score], written score) has its own. Pairs without both scores are
left out of a reading and counted.

    accuracy            of the pairs with a preferred response, the share on which the judge prefers it; a tie of the
                        scores is wrong, as RewardBench counts (chosen > rejected)
    accuracy_half_ties  the same, a tie of the scores counting one half
    accuracy_three_way  of all pairs, the share of right verdicts: a, b, or a tie where people had one
    tie_rate            share of the pairs on which the scores tie
    swap_consistency    both in one prompt: share of the pairs on which both orders have the same winner
    first_rate          both in one prompt: share of prompts in which the response that comes first wins, a tie counting
                        one half; 0.5 for a judge without a preference for a place
    unscored_rate       share of the pairs without both scores
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from real_openrlhf.data.preferences import TIE, A, B
from real_openrlhf.evals.intervals import Interval, Resampled, paired_interval, resample, single_interval
from real_openrlhf.evals.predictions import EvaluationError, Prediction
from real_openrlhf.evals.reliability import share
from real_openrlhf.evals.results import (
    AVERAGE,
    READINGS,
    Estimate,
    Settings,
    by_benchmark,
    check_same_rows,
    to_estimate,
)
from real_openrlhf.judge.pairs import ONE_PROMPT, Verdict, verdict

Pair = tuple[Prediction, Prediction]
Key = tuple[str, str]
UNSCORED = "unscored_rate"
_ALWAYS = ("accuracy", "accuracy_half_ties", "accuracy_three_way", "tie_rate")
_BOTH_ORDERS = ("swap_consistency", "first_rate")
SYMBOLS = {
    "accuracy": "accuracy ↑",
    "accuracy_half_ties": "ties as ½ ↑",
    "accuracy_three_way": "three-way ↑",
    "tie_rate": "ties",
    "swap_consistency": "both orders agree ↑",
    "first_rate": "first wins",
    UNSCORED: "no score",
}


@dataclass(frozen=True, kw_only=True)
class PairResult:
    """n: pairs; n_groups: groups of pairs; n_ties: pairs on which people had a tie. scores: reading -> metric ->
    Estimate, the metrics of `metrics_of(mode)`."""

    name: str
    mode: str
    n: int
    n_groups: int
    n_ties: int
    scores: dict[str, dict[str, Estimate]]


def metrics_of(mode: str) -> tuple[str, ...]:
    return (*_ALWAYS, *(_BOTH_ORDERS if mode == ONE_PROMPT else ()), UNSCORED)


def evaluate_pairs(predictions: Sequence[Prediction], settings: Settings) -> list[PairResult]:
    """One result per benchmark of pairs, and with several their average under the name "average"."""
    if not predictions:
        return []
    grouped = {name: pair_up(rows) for name, rows in by_benchmark(predictions).items()}
    parts = {name: _resample_all([pairs], settings, name) for name, pairs in grouped.items()}
    results = []
    for name, pairs in grouped.items():
        scores = {
            key: to_estimate(single_interval([part], confidence=settings.confidence), _why(pairs, key, settings, name))
            for key, part in parts[name].items()
        }
        results.append(_result(name, settings.pair_modes[name], [(name, pair) for pair in pairs], scores))
    if len(results) > 1:
        mode = results[0].mode
        averaged = {
            key: to_estimate(
                single_interval([table[key] for table in parts.values()], confidence=settings.confidence),
                "it is undefined on one of them",
            )
            for key in parts[results[0].name]
        }
        everything = [(name, pair) for name, pairs in grouped.items() for pair in pairs]
        results.append(_result(AVERAGE, mode, everything, averaged))
    return results


def compare_pairs(
    a: Sequence[Prediction], b: Sequence[Prediction], settings: Settings
) -> dict[str, dict[Key, Interval]]:
    """Benchmark (and "average") -> (reading, metric) -> b less a, on the pairs that both runs have scored.

    Raises EvaluationError when the runs did not judge the same pairs.
    """
    if not a and not b:
        return {}
    check_same_rows(a, b)
    rows_a, rows_b = by_benchmark(a), by_benchmark(b)
    parts = {
        name: _resample_all([pair_up(rows), pair_up(rows_b[name])], settings, name) for name, rows in rows_a.items()
    }
    compared = {
        name: {key: paired_interval([part], confidence=settings.confidence) for key, part in table.items()}
        for name, table in parts.items()
    }
    if len(parts) > 1:
        compared[AVERAGE] = {
            key: paired_interval([table[key] for table in parts.values()], confidence=settings.confidence)
            for key in next(iter(parts.values()))
        }
    return compared


def pair_up(predictions: Sequence[Prediction]) -> list[Pair]:
    """Rows 2i and 2i + 1 of one benchmark, in ascending order. EvaluationError where one lacks the other."""
    rows = {p.row: p for p in predictions}
    pairs = []
    for row in sorted({row - row % 2 for row in rows}):
        if row not in rows or row + 1 not in rows:
            raise EvaluationError(
                f"{predictions[0].benchmark}: of the pair in row {row // 2} one judgement is missing; run it to the end"
            )
        pairs.append((rows[row], rows[row + 1]))
    return pairs


def pair_value(pair: Pair, key: Key, mode: str, settings: Settings) -> float | None:
    """What a metric is the mean of; None for a pair that does not count."""
    reading, metric = key
    found = _verdict(pair, reading, mode, settings)
    if metric == UNSCORED:
        return float(found is None)
    if found is None:
        return None
    wanted = _wanted(pair)
    if metric == "tie_rate":
        return float(found.winner == TIE)
    if metric == "accuracy_three_way":
        return float(found.winner == wanted)
    if metric in ("accuracy", "accuracy_half_ties"):
        if wanted == TIE:
            return None
        half = metric == "accuracy_half_ties" and found.winner == TIE
        return 0.5 if half else float(found.winner == wanted)
    assert found.in_order is not None
    if metric == "swap_consistency":
        return float(found.in_order[0] == found.in_order[1])
    points = {(0, A): 1.0, (1, B): 1.0}
    return sum(0.5 if winner == TIE else points.get((i, winner), 0.0) for i, winner in enumerate(found.in_order)) / 2


def _verdict(pair: Pair, reading: str, mode: str, settings: Settings) -> Verdict | None:
    first, second = (getattr(prediction, reading) for prediction in pair)
    return verdict(first, second, mode=mode, scale=settings.scale, tie_margin=settings.tie_margin)


def _wanted(pair: Pair) -> str:
    label = pair[0].label
    return TIE if label == 0 else A if label > 0 else B


def _resample_all(sides: Sequence[Sequence[Pair]], settings: Settings, benchmark: str) -> dict[Key, Resampled]:
    """Every metric on the same draws; sides: one run, or two on the same pairs."""
    mode = settings.pair_modes[benchmark]
    return {
        (reading, metric): resample(
            share,
            [
                ([pair_value(pair, (reading, metric), mode, settings) for pair in side], [0.0] * len(side))
                for side in sides
            ],
            seed=zlib.crc32(f"{settings.seed}/{benchmark}".encode()),
            n_resamples=settings.n_resamples,
            clusters=[pair[0].group for pair in sides[0]],
        )
        for reading in READINGS
        for metric in metrics_of(mode)
    }


def _result(name: str, mode: str, pairs: Sequence[tuple[str, Pair]], scores: dict[Key, Estimate]) -> PairResult:
    return PairResult(
        name=name,
        mode=mode,
        n=len(pairs),
        n_groups=len({(benchmark, pair[0].group) for benchmark, pair in pairs}),
        n_ties=sum(_wanted(pair) == TIE for _, pair in pairs),
        scores={reading: {metric: scores[reading, metric] for metric in metrics_of(mode)} for reading in READINGS},
    )


def _why(pairs: Sequence[Pair], key: Key, settings: Settings, benchmark: str) -> str | None:
    mode = settings.pair_modes[benchmark]
    if all(_verdict(pair, key[0], mode, settings) is None for pair in pairs):
        return "no pair has both scores"
    if all(_wanted(pair) == TIE for pair in pairs):
        return "no pair has a preferred response"
    return "no scored pair has a preferred response"


def pairs_to_json(results: Sequence[PairResult]) -> dict[str, Any]:
    """By name, for json.dumps; an undefined number is null beside a note in words."""
    return {result.name: {k: v for k, v in asdict(result).items() if k != "name"} for result in results}


def pairs_from_json(content: Any) -> list[PairResult]:
    """What `pairs_to_json` gave. Raises EvaluationError for anything else."""
    try:
        return [
            PairResult(
                name=name,
                scores={
                    reading: {
                        metric: Estimate(**item["scores"][reading][metric]) for metric in metrics_of(item["mode"])
                    }
                    for reading in READINGS
                },
                **{key: item[key] for key in ("mode", "n", "n_groups", "n_ties")},
            )
            for name, item in content.items()
        ]
    except (KeyError, TypeError, AttributeError) as error:
        raise EvaluationError(f"these are no results of pairs: {type(error).__name__} {error}") from error
