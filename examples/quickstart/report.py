"""A run's table (before, after, paired 95% intervals of the difference) and its learning curve.

    python examples/quickstart/report.py --run runs/quickstart/seed_0/real --output_dir runs/quickstart/seed_0

compares the first evaluation with the last and writes report.md and learning_curve.png.
`--start` and `--final` name two other prediction files.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from real_openrlhf.evals.intervals import Interval, paired_bootstrap
from real_openrlhf.evals.metrics import METRICS

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
    """Match the two files by row. key: "expected" or "decoded"."""
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


def evaluation_files(run: Path) -> tuple[Path, Path]:
    """The first and the last evaluation of a run."""
    files = sorted((run / "eval").glob("step_*.jsonl"), key=lambda path: int(path.stem.removeprefix("step_")))
    if len(files) < 2:
        raise ReportError(f"{run / 'eval'}: two evaluations are needed, found {len(files)}")
    return files[0], files[-1]


def table(start: Rows, final: Rows, *, seed: int, n_resamples: int) -> str:
    """Markdown: one line per metric and reading of the score."""
    lines = [
        "| metric | of | start | after REAL | difference | 95% interval |",
        "|---|---|---|---|---|---|",
    ]
    for key, name in READINGS.items():
        matched = pair(start, final, key)
        for metric in METRICS:
            interval = paired_bootstrap(
                metric, matched.start, matched.final, matched.labels, seed=seed, n_resamples=n_resamples
            )
            lines.append(f"| {metric} | {name} | {_cells(interval)} |")
        lines.append(
            f"| without a score | {name} | {sum(x is None for x in matched.start)} | "
            f"{sum(x is None for x in matched.final)} | | |"
        )
    return "\n".join(lines)


def _cells(interval: Interval) -> str:
    def show(value: float | None, sign: str = "") -> str:
        return "undefined" if value is None else f"{value:{sign}.3f}"

    bounds = f"[{show(interval.low, '+')}, {show(interval.high, '+')}]"
    return " | ".join([show(interval.estimate_a), show(interval.estimate_b), show(interval.difference, "+"), bounds])


def series(metrics: Rows, phase: str, name: str) -> tuple[list[int], list[float]]:
    """Steps and values of a metric where it is defined."""
    rows = [row for row in metrics if row.get("phase") == phase and row.get(name) is not None]
    return [row["step"] for row in rows], [row[name] for row in rows]


def plot(metrics: Rows, path: Path) -> None:
    """Held-out Pearson (left axis) and mean training reward (right axis) against the step."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, left = plt.subplots(figsize=(7, 4.2), constrained_layout=True)
    right = left.twinx()
    steps, rewards = series(metrics, "train", "reward/mean")
    (reward,) = right.plot(steps, rewards, color="tab:orange", alpha=0.6, linewidth=1, label="training reward")
    steps, pearson = series(metrics, "eval", "eval/expected/pearson")
    (held_out,) = left.plot(steps, pearson, color="tab:blue", marker="o", label="held-out Pearson of E[score]")
    left.set_xlabel("REAL step")
    left.set_ylabel("Pearson of E[score] and label, held out")
    right.set_ylabel("mean reward of the training batch")
    left.grid(alpha=0.3)
    left.legend(handles=[held_out, reward], loc="lower right")
    figure.savefig(path, dpi=130)
    plt.close(figure)


def judgements(start: Rows, final: Rows, n: int) -> str:
    """The same prompts before and after, to be read by eye: a rising metric does not show broken feedback."""
    by_row = {row["row"]: row for row in final}
    lines = []
    for row in start[:n]:
        after = by_row[row["row"]]
        lines.append(f"- row {row['row']}, label {row['label']:g}\n  - start: `{row.get('text', '').strip()}`")
        lines.append(f"  - after: `{after.get('text', '').strip()}`")
    return "\n".join(lines)


def write_report(
    start: Path, final: Path, metrics: Path, output_dir: Path, *, seed: int, n_resamples: int, n_shown: int = 3
) -> str:
    before, after, logged = read_jsonl(start), read_jsonl(final), read_jsonl(metrics)
    text = (
        f"{len(before)} held-out prompts, one sample each; {start.stem} against {final.stem}. Intervals: paired "
        f"bootstrap over prompts, {n_resamples} resamples; rows without a score in either are left out of both.\n\n"
        f"{table(before, after, seed=seed, n_resamples=n_resamples)}\n\n"
        f"![learning curve](learning_curve.png)\n\n{judgements(before, after, n_shown)}\n"
    )
    output_dir.mkdir(parents=True, exist_ok=True)
    plot(logged, output_dir / "learning_curve.png")
    (output_dir / "report.md").write_text(text, encoding="utf-8")
    return text


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Before/after table and learning curve of a run.")
    parser.add_argument("--run", type=Path, required=True, help="the run's --ckpt.output_dir")
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--start", type=Path, help="predictions before; the run's first evaluation when not given")
    parser.add_argument("--final", type=Path, help="predictions after; the run's last evaluation when not given")
    parser.add_argument("--metrics", type=Path, help="metrics.jsonl; the run's own when not given")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--n_resamples", type=int, default=2000)
    args = parser.parse_args(argv)
    try:
        start, final = args.start, args.final
        if start is None or final is None:
            first, last = evaluation_files(args.run)
            start, final = start or first, final or last
        metrics = args.metrics or args.run / "metrics.jsonl"
        print(write_report(start, final, metrics, args.output_dir, seed=args.seed, n_resamples=args.n_resamples))
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
