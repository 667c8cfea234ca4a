"""What is kept of a cell: the judgements of every held-out row, and numbers that are read from them."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from examples.judging_task.measure import coverage, last_tally
from examples.judging_task.task import TESTS
from real_openrlhf.evals.metrics import judge_metrics

SPLITS = ("valid", *TESTS)
READINGS = ("expected", "decoded")
METRICS = ("pearson", "spearman", "kendall", "rmse", "mae")
# Decimals of a judgement that is kept.
_DECIMALS = 4


def judged_cell(output: Path, data: Path) -> dict[str, Any]:
    """
    judged    split -> "row", "label", "expected", "decoded": a list each, in the evaluation's order
    feedback  split -> share of the response's lines that the feedback names, share that ends at the right tally
    valid     reading -> metric, on the validation split
    average   reading -> metric, the mean over the tests
    before    average, before training
    curve     step -> average
    valid_curve  step -> reading -> metric, on the validation split
    """
    steps = evaluations(output)
    last = max(steps)
    rows = {split: _by_split(steps[last], split) for split in SPLITS}
    columns = {split: _columns(found) for split, found in rows.items()}
    found: dict[str, Any] = {
        "steps": last,
        "judged": columns,
        "feedback": {split: _feedback(found, data / f"{split}.jsonl") for split, found in rows.items()},
        "valid": scores(columns["valid"]),
        "average": average({split: scores(columns[split]) for split in TESTS}),
        "curve": {str(step): _average_of(lines) for step, lines in steps.items()},
        "valid_curve": {str(step): scores(_columns(_by_split(lines, "valid"))) for step, lines in steps.items()},
    }
    first = {split: _columns(_by_split(steps[min(steps)], split)) for split in SPLITS}
    found["before"] = {"judged": first} if min(steps) != last else {}
    return found


def evaluations(output: Path) -> dict[int, list[dict[str, Any]]]:
    """Step -> the rows of its evaluation. FileNotFoundError without any."""
    found = {}
    for path in sorted((output / "eval").glob("step_*.jsonl")):
        step = re.fullmatch(r"step_(\d+)", path.stem)
        if step:
            lines = path.read_text(encoding="utf-8").splitlines()
            found[int(step[1])] = [json.loads(line) for line in lines]
    if not found:
        raise FileNotFoundError(f"{output / 'eval'} holds no evaluation")
    return dict(sorted(found.items()))


def scores(columns: Mapping[str, Sequence[Any]]) -> dict[str, dict[str, float | None]]:
    """Reading -> metric of one split."""
    flat = judge_metrics(columns["expected"], columns["decoded"], columns["label"])
    return {reading: {metric: flat[f"{reading}/{metric}"] for metric in METRICS} for reading in READINGS}


def average(splits: Mapping[str, dict[str, dict[str, float | None]]]) -> dict[str, dict[str, float | None]]:
    """Reading -> metric, the mean over the splits; None where a split has none."""

    def mean(values: list[float | None]) -> float | None:
        there = [value for value in values if value is not None]
        return sum(there) / len(there) if len(there) == len(values) else None

    return {
        reading: {metric: mean([split[reading][metric] for split in splits.values()]) for metric in METRICS}
        for reading in READINGS
    }


def chosen_rate(by_rate: Mapping[str, float | None]) -> float:
    """The rate with the best score. ValueError when none has any."""
    there = {rate: score for rate, score in by_rate.items() if score is not None}
    if not there:
        raise ValueError(f"no learning rate gave a correlation: {dict(by_rate)}")
    return float(max(there, key=lambda rate: there[rate]))


def _average_of(lines: Sequence[dict[str, Any]]) -> dict[str, dict[str, float | None]]:
    return average({split: scores(_columns(_by_split(lines, split))) for split in TESTS})


def _by_split(lines: Sequence[dict[str, Any]], split: str) -> list[dict[str, Any]]:
    return [line for line in lines if line["benchmark"] == split]


def _columns(lines: Sequence[dict[str, Any]]) -> dict[str, list[Any]]:
    def rounded(value: float | None) -> float | None:
        return None if value is None else round(value, _DECIMALS)

    return {
        "row": [line["row"] for line in lines],
        "label": [line["label"] for line in lines],
        **{reading: [rounded(line[reading]) for line in lines] for reading in READINGS},
    }


def _feedback(lines: Sequence[dict[str, Any]], path: Path) -> dict[str, float]:
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    pairs = [(rows[line["row"]], line["text"]) for line in lines]
    return {
        "lines_read": sum(coverage(row, text) for row, text in pairs) / len(pairs),
        "tally_right": sum(last_tally(text) == row["tally"] for row, text in pairs) / len(pairs),
    }
