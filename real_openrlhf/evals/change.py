"""How a run's held-out metrics changed since its first evaluation, with paired intervals over the prompts."""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from real_openrlhf.algo.score_scale import ScoreScale
from real_openrlhf.evals.intervals import Interval, paired_interval, resample
from real_openrlhf.evals.objective import RewardSettings, prompt_reward
from real_openrlhf.evals.predictions import Prediction
from real_openrlhf.evals.reliability import share
from real_openrlhf.evals.results import REWARD

PEARSON = "expected/pearson"


@dataclass(frozen=True, kw_only=True)
class Change:
    """A held-out metric compared with the run's first evaluation: difference (now minus then) and paired interval."""

    difference: float
    low: float
    high: float


@dataclass(frozen=True)
class Judged:
    """What is compared for one prompt. Prompts of one group are not independent. expected: None without a score."""

    row: int
    group: str
    label: float
    expected: float | None
    reward: float


# Benchmark -> its prompts.
Judgements = Mapping[str, Sequence[Judged]]


def judgements_of(
    predictions: Mapping[str, Sequence[Prediction]], scale: ScoreScale, settings: RewardSettings
) -> dict[str, list[Judged]]:
    return {
        name: [Judged(p.row, p.group, p.label, p.expected, prompt_reward(p, scale, settings)) for p in rows]
        for name, rows in predictions.items()
    }


def changes(start: Judgements, now: Judgements) -> dict[str, Change]:
    """Changes of the mean reward, and of Pearson's correlation of E[score] with the label, averaged over benchmarks.

    A metric is left out if it or its interval is undefined. The intervals are 95% percentile intervals of the
    paired bootstrap over groups of prompts. Raises ValueError unless both judged the same prompts.
    """
    for name in {**start, **now}:
        if [j.row for j in start.get(name, ())] != [j.row for j in now.get(name, ())]:
            raise ValueError(f"benchmark {name}: the two evaluations judged different prompts")
    found: dict[str, Change] = {}
    for metric in (REWARD, PEARSON):
        parts = []
        for name, before in start.items():
            columns: list[tuple[list[float | None], list[float]]] = [
                ([j.reward if metric == REWARD else j.expected for j in side], [j.label for j in side])
                for side in (before, now[name])
            ]
            parts.append(
                resample(
                    share if metric == REWARD else "pearson",
                    columns,
                    seed=zlib.crc32(name.encode()),
                    clusters=[j.group for j in before],
                )
            )
        interval = _bounded(paired_interval(parts)) if parts else None
        if interval is not None:
            found[metric] = interval
    return found


def _bounded(interval: Interval) -> Change | None:
    if interval.difference is None or interval.low is None or interval.high is None:
        return None
    return Change(difference=interval.difference, low=interval.low, high=interval.high)


def to_json(judgements: Judgements) -> dict[str, list[dict[str, Any]]]:
    return {name: [asdict(j) for j in rows] for name, rows in judgements.items()}


def from_json(content: Mapping[str, Sequence[Mapping[str, Any]]]) -> dict[str, list[Judged]]:
    return {name: [Judged(**row) for row in rows] for name, rows in content.items()}


@dataclass(frozen=True, kw_only=True)
class EvalReport:
    """One evaluation of the weights of this version.

    metrics  by flat name ("expected/pearson")
    changes  of "reward" and "expected/pearson" since the first evaluation; empty for that one
    samples  a few judgements for people to read
    plots    name -> path of a PNG
    seconds  how long it took, from its start to its last metric
    """

    version: int
    metrics: dict[str, float | None]
    changes: dict[str, Change] = field(default_factory=dict)
    samples: list[dict[str, Any]] = field(default_factory=list)
    plots: dict[str, str] = field(default_factory=dict)
    seconds: float = 0.0
