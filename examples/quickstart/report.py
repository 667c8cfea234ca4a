"""A run's report: one judgement before and after, a table with paired intervals, what the watches saw, and two curves.

    python examples/quickstart/report.py --run runs/quickstart/seed_0/real --output_dir runs/quickstart/seed_0 \\
        --prompts runs/quickstart/seed_0/data/test.jsonl

compares the first evaluation with that of the exported judge, on the benchmark `test` (--benchmark), and writes
report.md and learning_curve.png.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from real_openrlhf.evals.intervals import Interval, SingleInterval, bootstrap, paired_bootstrap
from real_openrlhf.evals.metrics import METRICS
from real_openrlhf.export.settings import JudgeSettings

Rows = list[dict[str, Any]]
READINGS = {"expected": "E[score]", "decoded": "decoded score"}


class ReportError(ValueError):
    """The files do not belong together, or are not what the evaluator writes."""


@dataclass(frozen=True, kw_only=True)
class Pair:
    """Two judges on the same held-out prompts: labels [n], start and final [n] with None where unreadable."""

    labels: list[float]
    start: list[float | None]
    final: list[float | None]


def read_jsonl(path: Path) -> Rows:
    if not path.is_file():
        raise ReportError(f"{path}: no such file")
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]


def pair(start: Rows, final: Rows, key: str) -> Pair:
    """Match the two files by row. key: "expected", "decoded" or "reward"."""
    by_row = {row["row"]: row for row in final}
    if len(by_row) != len(final) or {row["row"] for row in start} != set(by_row) or len(start) != len(final):
        raise ReportError("the two prediction files do not hold the same rows, each once")
    if any(row["label"] != by_row[row["row"]]["label"] for row in start):
        raise ReportError("the two prediction files differ in their labels: they judge different data")
    return Pair(
        labels=[row["label"] for row in start],
        start=[row[key] for row in start],
        final=[by_row[row["row"]][key] for row in start],
    )


def evaluations(run: Path, benchmark: str) -> dict[int, Rows]:
    """Step -> predictions of a benchmark, in the order of the steps."""
    files = {int(path.stem.removeprefix("step_")): path for path in (run / "eval").glob("step_*.jsonl")}
    if len(files) < 2:
        raise ReportError(f"{run / 'eval'}: two evaluations are needed, found {len(files)}")
    found = {step: read_jsonl(files[step]) for step in sorted(files)}
    names = sorted({row["benchmark"] for rows in found.values() for row in rows})
    if benchmark not in names:
        raise ReportError(f"--benchmark {benchmark}: the run evaluated {', '.join(names)}")
    return {step: [row for row in rows if row["benchmark"] == benchmark] for step, rows in found.items()}


def table(start: Rows, final: Rows, *, seed: int, n_resamples: int) -> str:
    """Markdown: one line per metric and reading of the score."""
    options: dict[str, Any] = dict(seed=seed, n_resamples=n_resamples)
    rewards = pair(start, final, "reward")
    interval = paired_bootstrap(_mean, rewards.start, rewards.final, rewards.labels, **options)
    lines = [
        "| metric | of | start | after REAL | difference | 95% interval |",
        "|---|---|---|---|---|---|",
        f"| mean reward | the objective | {_cells(interval)} |",
    ]
    for key, name in READINGS.items():
        matched = pair(start, final, key)
        for metric in METRICS:
            interval = paired_bootstrap(metric, matched.start, matched.final, matched.labels, **options)
            lines.append(f"| {metric} | {name} | {_cells(interval)} |")
        lines.append(
            f"| without a score | {name} | {sum(x is None for x in matched.start)} | "
            f"{sum(x is None for x in matched.final)} | | |"
        )
    return "\n".join(lines)


def _mean(values: Any, _: Any) -> float | None:
    return statistics.fmean(values) if len(values) else None


def _cells(interval: Interval) -> str:
    def show(value: float | None, sign: str = "") -> str:
        return "undefined" if value is None else f"{value:{sign}.3f}"

    bounds = f"[{show(interval.low, '+')}, {show(interval.high, '+')}]"
    return " | ".join([show(interval.estimate_a), show(interval.estimate_b), show(interval.difference, "+"), bounds])


def curve(judged: dict[int, Rows], what: str, *, seed: int, n_resamples: int) -> list[tuple[int, SingleInterval]]:
    """Per evaluation "pearson" of E[score] or mean "reward", with its interval over the prompts."""
    points = []
    for step, rows in judged.items():
        column = [row["expected" if what == "pearson" else "reward"] for row in rows]
        labels = [row["label"] for row in rows]
        metric: Any = "pearson" if what == "pearson" else _mean
        points.append((step, bootstrap(metric, column, labels, seed=seed, n_resamples=n_resamples)))
    return points


def plot(judged: dict[int, Rows], path: Path, *, seed: int, n_resamples: int) -> None:
    """Held-out Pearson and held-out reward against the step, each with its 95% interval over the prompts."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, panels = plt.subplots(1, 2, figsize=(9, 3.8), constrained_layout=True)
    names = {"pearson": "Pearson of E[score] and label", "reward": "mean reward, the objective"}
    for panel, (what, label) in zip(panels, names.items(), strict=True):
        points = [
            (step, i.estimate, i.low, i.high)
            for step, i in curve(judged, what, seed=seed, n_resamples=n_resamples)
            if i.estimate is not None and i.low is not None and i.high is not None
        ]
        if points:
            steps, values, lows, highs = zip(*points, strict=True)
            errors = [[v - a for v, a in zip(values, lows)], [b - v for v, b in zip(values, highs)]]
            panel.errorbar(steps, values, yerr=errors, marker="o", capsize=4)
        panel.set_xlabel("REAL step")
        panel.set_ylabel(f"{label}, held out")
        panel.grid(alpha=0.3)
    figure.suptitle("bars: 95% interval over the prompts, not over runs", fontsize=9)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def one_judgement(start: Rows, final: Rows, prompts: Rows) -> str:
    """The first held-out prompt, its feedback and score before and after."""
    row = start[0]
    after = next(other for other in final if other["row"] == row["row"])
    lines = [f"    prompt: {prompts[row['row']]['prompt']}", f"    label:  {row['label']:g}"]
    for name, judged in (("start: ", row), ("after: ", after)):
        expected = "none" if judged["expected"] is None else f"{judged['expected']:.2f}"
        lines.append(f"    {name} {judged['text'].strip()}    E[score] {expected}")
    return "\n".join(lines)


def judgements(start: Rows, final: Rows, n: int) -> str:
    """Prompts before and after, to be read by eye: a rising metric does not show broken feedback."""
    by_row = {row["row"]: row for row in final}
    lines = []
    for row in start[1 : n + 1]:
        after = by_row[row["row"]]
        lines.append(f"- row {row['row']}, label {row['label']:g}\n  - start: `{row.get('text', '').strip()}`")
        lines.append(f"  - after: `{after.get('text', '').strip()}`")
    return "\n".join(lines)


def warnings(run: Path) -> str:
    """What the run's watches saw."""
    path = run / "warnings.jsonl"
    seen = read_jsonl(path) if path.is_file() else []
    return "\n".join(f"- step {w['step']}, {w['watch']}: {w['message']}" for w in seen) or "Nothing went wrong."


def write_report(
    run: Path, prompts: Path, output_dir: Path, *, benchmark: str, seed: int, n_resamples: int, n_shown: int = 3
) -> str:
    judged = evaluations(run, benchmark)
    first = min(judged)
    exported = JudgeSettings.load(run / "model").step
    last = max(judged) if exported not in judged else exported
    before, after = judged[first], judged[last]
    text = (
        f"# One judgement, before and after\n\n{one_judgement(before, after, read_jsonl(prompts))}\n\n"
        f"# {len(before)} held-out prompts, step {first} against step {last}, the exported judge\n\n"
        f"{table(before, after, seed=seed, n_resamples=n_resamples)}\n\nOne sample each. Intervals: paired bootstrap "
        f"over the prompts, {n_resamples} resamples; rows without a score in either are left out of both. They say "
        "nothing about the spread over runs.\n\n"
        f"![learning curve](learning_curve.png)\n\n# What the watches saw\n\n{warnings(run)}\n\n"
        f"# More judgements\n\n{judgements(before, after, n_shown)}\n"
    )
    output_dir.mkdir(parents=True, exist_ok=True)
    plot(judged, output_dir / "learning_curve.png", seed=seed, n_resamples=n_resamples)
    (output_dir / "report.md").write_text(text, encoding="utf-8")
    return text


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="One judgement, the before/after table and the curves of a run.")
    parser.add_argument("--run", type=Path, required=True, help="the run's --ckpt.output_dir")
    parser.add_argument("--prompts", type=Path, required=True, help="the benchmark's own file")
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--benchmark", default="test", help="name of the benchmark to report on")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--n_resamples", type=int, default=2000)
    args = parser.parse_args(argv)
    options: dict[str, Any] = dict(benchmark=args.benchmark, seed=args.seed, n_resamples=args.n_resamples)
    try:
        print(write_report(args.run, args.prompts, args.output_dir, **options))
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
