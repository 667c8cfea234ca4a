"""What is kept of a cell: the judgements of every test row, the learning curve, and the seconds of each phase."""

from __future__ import annotations

import json
import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from real_openrlhf.evals.predictions import Prediction, SampledFeedback

# Decimals of a score and of a probability that are kept.
SCORE_DECIMALS, PROBABILITY_DECIMALS = 4, 4
CURVE = ("expected/pearson", "decoded/pearson", "expected/rmse", "reward", "mass", "invalid_rate")
Columns = Mapping[str, Sequence[Any]]
_SAMPLES = 3


def judged_tests(output: Path) -> dict[str, dict[str, list[Any]]]:
    """Test -> columns: row, group, label, expected, decoded, forced, distribution. FileNotFoundError without any."""
    lines = last_evaluation(output)
    return {name: _columns([line for line in lines if line["benchmark"] == name]) for name in _names(lines)}


def last_evaluation(output: Path) -> list[dict[str, Any]]:
    found = [(int(step[1]), path) for path in (output / "eval").glob("*.jsonl") if (step := _STEP.fullmatch(path.stem))]
    if not found:
        raise FileNotFoundError(f"{output / 'eval'} holds no evaluation")
    return _lines(max(found)[1])


def texts(output: Path) -> list[dict[str, Any]]:
    """The first judgements as text: a rising number can hide feedback that has become gibberish."""
    return [
        {"row": line["row"], "label": line["label"], "text": line["text"]}
        for line in last_evaluation(output)[:_SAMPLES]
    ]


def curve(output: Path) -> dict[str, dict[str, float | None]]:
    """Step -> metrics of the dev rows."""
    return {
        str(line["step"]): {name: line.get(f"eval/{name}") for name in CURVE}
        for line in _lines(output / "metrics.jsonl")
        if line["phase"] == "eval"
    }


def phases(output: Path) -> dict[str, dict[str, float]]:
    """What was timed -> how often, and the mean and sum of its seconds."""
    seconds: dict[str, list[float]] = defaultdict(list)
    for line in _lines(output / "metrics.jsonl"):
        for name, value in line.items():
            if name.startswith("seconds/") and value is not None:
                seconds[name.removeprefix("seconds/")].append(value)
    return {
        name: {"times": len(values), "mean": round(sum(values) / len(values), 3), "sum": round(sum(values), 1)}
        for name, values in sorted(seconds.items())
    }


def predictions(columns: Columns, benchmark: str) -> list[Prediction]:
    """Kept judgements in the form that `real_openrlhf.evals.results` reads; what was not kept is empty."""
    return [
        _prediction(benchmark, **{name: values[i] for name, values in columns.items()})
        for i in range(len(columns["row"]))
    ]


def _prediction(
    benchmark: str,
    *,
    row: int,
    group: str,
    label: float,
    expected: float | None,
    decoded: float | None,
    forced: float,
    distribution: Sequence[float | None] | None,
) -> Prediction:
    probabilities = None if distribution is None else tuple(distribution)
    sample = SampledFeedback(
        feedback="",
        token_ids=(),
        position=None if expected is None else 0,
        distribution=probabilities,
        expected=expected,
        decoded=decoded,
        reason=None,
        forced=bool(forced),
        n_generated=0,
    )
    return Prediction(
        benchmark=benchmark,
        row=row,
        group=group,
        label=label,
        expected=expected,
        decoded=decoded,
        distribution=probabilities,
        mass=None,
        entropy=None,
        reason=None,
        samples=(sample,),
    )


_STEP = re.compile(r"step_(\d+)")


def _lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def _names(lines: Sequence[Mapping[str, Any]]) -> list[str]:
    return list(dict.fromkeys(line["benchmark"] for line in lines))


def _columns(lines: Sequence[Mapping[str, Any]]) -> dict[str, list[Any]]:
    def rounded(values: Sequence[float | None] | None) -> list[float | None] | None:
        return None if values is None else [_rounded(value, PROBABILITY_DECIMALS) for value in values]

    return {
        **{name: [line[name] for line in lines] for name in ("row", "group", "label", "forced")},
        **{name: [_rounded(line[name], SCORE_DECIMALS) for line in lines] for name in ("expected", "decoded")},
        "distribution": [rounded(line["distribution"]) for line in lines],
    }


def _rounded(value: float | None, decimals: int) -> float | None:
    return None if value is None else round(value, decimals)
