"""The table of the STS-B example: start, after warm-up, after REAL; every metric, and the seconds per phase.

    python examples/stsb/report.py --start runs/stsb/start --real runs/stsb/real --output_dir runs/stsb

--start is a run with --train.max_steps 0 on the model before any training; --real is the REAL run on the warmed-up
model, whose first evaluation is "after warm-up" and whose last is "after REAL". Writes report.md.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

from real_openrlhf.evals.intervals import paired_bootstrap
from real_openrlhf.evals.metrics import METRICS, judge_metrics

Rows = list[dict[str, Any]]
READINGS = {"expected": "E[score]", "decoded": "decoded"}
MISSING = {"expected": "invalid_rate", "decoded": "undecoded_rate"}
COLUMNS = ("start", "after warm-up", "after REAL")


class ReportError(ValueError):
    """The files do not belong together, or are not what the evaluator writes."""


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--start", type=Path, required=True, help="output folder of the evaluation of the start model")
    parser.add_argument("--real", type=Path, required=True, help="output folder of the REAL run")
    parser.add_argument("--wall", type=Path, help="file of 'what <tab> seconds' lines, one per part of the example")
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--n_resamples", type=int, default=1000, help="of the paired bootstrap")
    parser.add_argument("--seed", type=int, default=0, help="of the paired bootstrap")
    args = parser.parse_args(argv)
    text = report(args.start, args.real, args.wall, n_resamples=args.n_resamples, seed=args.seed)
    args.output_dir.mkdir(parents=True, exist_ok=True)
    (args.output_dir / "report.md").write_text(text, encoding="utf-8")
    print(text)


def report(start: Path, real: Path, wall: Path | None, *, n_resamples: int, seed: int) -> str:
    """Markdown. Raises ReportError when the evaluations do not hold the same rows."""
    files = [evaluations(start)[0], *first_and_last(real)]
    judged = [by_row(path) for path in files]
    rows = check_same_rows(files, judged)
    lines = [f"{len(rows)} held-out pairs, one sample each; REAL: {files[2].stem.removeprefix('step_')} steps.", ""]
    lines += metric_table(rows, judged, n_resamples=n_resamples, seed=seed)
    lines += ["", *phase_table(read_jsonl(real / "metrics.jsonl"))]
    if wall is not None:
        lines += ["", *wall_table(wall)]
    return "\n".join([*lines, "", *samples(rows, judged)]) + "\n"


def evaluations(run: Path) -> list[Path]:
    """The evaluation files of a run, in the order of their steps."""
    found = sorted((run / "eval").glob("step_*.jsonl"), key=lambda path: int(path.stem.removeprefix("step_")))
    if not found:
        raise ReportError(f"{run / 'eval'} holds no step_<n>.jsonl; was the run given --eval.dataset?")
    return found


def first_and_last(run: Path) -> tuple[Path, Path]:
    found = evaluations(run)
    if len(found) < 2:
        raise ReportError(f"{run / 'eval'} holds one evaluation only; a run of at least one step writes two")
    return found[0], found[-1]


def read_jsonl(path: Path) -> Rows:
    if not path.is_file():
        raise ReportError(f"{path} does not exist")
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]


def by_row(path: Path) -> dict[int, dict[str, Any]]:
    rows = read_jsonl(path)
    found = {row["row"]: row for row in rows}
    if len(found) != len(rows):
        raise ReportError(f"{path} holds a row twice")
    return found


def check_same_rows(files: list[Path], judged: list[dict[int, dict[str, Any]]]) -> list[int]:
    """The row numbers, ascending. All files must judge the same rows with the same labels."""
    labels = [{row: item["label"] for row, item in rows.items()} for rows in judged]
    for path, other in zip(files[1:], labels[1:]):
        if other != labels[0]:
            raise ReportError(f"{files[0]} and {path} do not judge the same rows with the same labels")
    return sorted(labels[0])


def metric_table(rows: list[int], judged: list[dict[int, dict[str, Any]]], *, n_resamples: int, seed: int) -> list[str]:
    labels = [judged[0][row]["label"] for row in rows]
    scores = {key: [[found[row][key] for row in rows] for found in judged] for key in READINGS}
    metrics = [judge_metrics(expected, decoded, labels) for expected, decoded in zip(*scores.values())]
    lines = [f"| metric | score | {' | '.join(COLUMNS)} | REAL - warm-up, 95% interval |", "|---|---|---|---|---|---|"]
    for key, name in READINGS.items():
        for metric in METRICS:
            cells = " | ".join(show(found[f"{key}/{metric}"]) for found in metrics)
            _, warm, final = scores[key]
            interval = paired_bootstrap(metric, warm, final, labels, seed=seed, n_resamples=n_resamples)
            bounds = f"{show(interval.difference, '+')} [{show(interval.low, '+')}, {show(interval.high, '+')}]"
            lines.append(f"| {metric} | {name} | {cells} | {bounds} |")
        lines.append(f"| invalid rate | {name} | {' | '.join(show(found[MISSING[key]]) for found in metrics)} | |")
    masses = [[found[row]["mass"] for row in rows if found[row]["mass"] is not None] for found in judged]
    means = [show(sum(mass) / len(mass) if mass else None) for mass in masses]
    return [*lines, f"| mean mass on the scale | | {' | '.join(means)} | |"]


def show(value: float | None, sign: str = "") -> str:
    return "undefined" if value is None else f"{value:{sign}.3f}"


def phase_table(log: Rows) -> list[str]:
    """Seconds per phase of the REAL run: how often, mean and total."""
    seconds: dict[tuple[str, str], list[float]] = defaultdict(list)
    for line in log:
        for key, value in line.items():
            if key.startswith("seconds/") and value is not None:
                seconds[line["phase"], key.removeprefix("seconds/")].append(value)
    lines = ["| logged with | phase | times | mean, s | total, s |", "|---|---|---|---|---|"]
    for (logged, phase), values in seconds.items():
        lines.append(f"| {logged} | {phase} | {len(values)} | {sum(values) / len(values):.1f} | {sum(values):.0f} |")
    return lines


def wall_table(path: Path) -> list[str]:
    if not path.is_file():
        raise ReportError(f"--wall: {path} does not exist")
    lines = ["| part of the example | wall clock, s |", "|---|---|"]
    for line in path.read_text(encoding="utf-8").splitlines():
        what, _, value = line.rpartition("\t")
        lines.append(f"| {what} | {float(value):.0f} |")
    return lines


def samples(rows: list[int], judged: list[dict[int, dict[str, Any]]], count: int = 3) -> list[str]:
    """The first judgements as text: a rising number can hide feedback that has become gibberish."""
    lines = ["What was written for the first pairs:"]
    for row in rows[:count]:
        lines += ["", f"Row {row}, label {judged[0][row]['label']:g}:", ""]
        lines += [f"- {name}: `{shorten(found[row]['text'])}`" for name, found in zip(COLUMNS, judged)]
    return lines


def shorten(text: str, limit: int = 300) -> str:
    text = " ".join(text.replace("`", "'").split())
    return text if len(text) <= limit else text[:limit] + " ..."


if __name__ == "__main__":
    try:
        main()
    except ReportError as error:
        sys.exit(f"report: {error}")
