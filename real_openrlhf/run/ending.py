"""What a run prints when it is done: held-out metrics before and after, a plot of them, and the next commands."""

from __future__ import annotations

import logging
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from real_openrlhf.common.jsonl import read_lines
from real_openrlhf.controller.output_folder import LIBRARIES_FILE, METRICS_FILE, REPORT_FILE
from real_openrlhf.evals.plots import learning_curve
from real_openrlhf.run.export import exported_step
from real_openrlhf.run.plan import RunPlan

logger = logging.getLogger(__name__)

CURVE_FILE = "learning_curve.png"
# The metrics of the table, if they were measured: name in metrics.jsonl -> name in the table.
SHOWN = {
    "eval/reward": "reward of REAL",
    "eval/expected/pearson": "Pearson of E[score]",
    "eval/expected/spearman": "Spearman of E[score]",
    "eval/expected/rmse": "RMSE of E[score]",
    "eval/decoded/pearson": "Pearson of the written score",
    "eval/mass": "mass on the scale",
    "eval/invalid_rate": "share without a score",
}
Record = dict[str, Any]


def ending(plan: RunPlan) -> str:
    """The table and the next commands; also draws the learning curve into the output folder."""
    output = Path(plan.config.ckpt.output_dir)
    evaluations = evaluations_of(output / METRICS_FILE)
    lines = [f"the judge is in {plan.model_folder}"]
    if evaluations:
        lines += ["", *table(evaluations, exported_step(plan.model_folder))]
    if len({record["step"] for record in evaluations}) > 1:
        lines += ["", f"learning curve: {learning_curve(evaluations, output / CURVE_FILE)}"]
    if (output / REPORT_FILE).exists():
        lines += ["", f"the run on one page: {output / REPORT_FILE}"]
    if (output / LIBRARIES_FILE).exists():
        lines += ["", f"what libraries said: {output / LIBRARIES_FILE}"]
    return "\n".join([*lines, "", *next_commands(plan)])


def evaluations_of(path: Path) -> list[Record]:
    """The evaluations in metrics.jsonl, by step; of several at one step, the last. Empty if there is no such file."""
    if not path.exists():
        return []
    found = {record["step"]: record for _, record in read_lines(path) if record.get("phase") == "eval"}
    return [found[step] for step in sorted(found)]


def table(evaluations: Sequence[Record], exported: int | None) -> list[str]:
    """Held-out metrics at the start, at the end, and of the weights that were exported."""
    first, last = evaluations[0], evaluations[-1]
    chosen = next((record for record in evaluations if record["step"] == exported), None)
    columns = [(f"step {first['step']}", first), (f"step {last['step']}", last)]
    if chosen is not None and chosen is not last:
        columns.append((f"exported, step {exported}", chosen))
    names = [name for name in SHOWN if any(name in record for _, record in columns)]
    width = max(len(SHOWN[name]) for name in names) if names else 0
    lines = [" " * max(width, len("held out")) + "".join(f"  {title:>18}" for title, _ in columns)]
    lines[0] = "held out" + lines[0][len("held out") :]
    for name in names:
        cells = "".join(f"  {_number(record.get(name)):>18}" for _, record in columns)
        lines.append(f"{SHOWN[name]:<{width}}{cells}")
    return lines


def next_commands(plan: RunPlan) -> list[str]:
    """Commands that use the judge, ready to be copied."""
    folder = shlex.quote(str(plan.model_folder))
    results = shlex.quote(str(Path(plan.config.ckpt.output_dir) / "evaluation"))
    lines = [
        "next:",
        f"  python -m real_openrlhf.judge --model {folder} --input ROWS.jsonl --output SCORES.jsonl",
        f"  python -m real_openrlhf.evaluate --model {folder} --benchmark NAME=FILE --output_dir {results}",
    ]
    if plan.config.logger.wandb.mode == "offline":
        lines.append(f"  wandb sync {shlex.quote(str(Path(plan.config.ckpt.output_dir) / 'wandb'))}/offline-run-*")
    return lines


def _number(value: Any) -> str:
    return "undefined" if value is None else f"{value:.4f}"
