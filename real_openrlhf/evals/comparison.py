"""Finished evaluations against each other, paired: `python -m real_openrlhf.evaluate --compare`."""

from __future__ import annotations

import argparse
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from real_openrlhf.common.atomic_file import write_text
from real_openrlhf.common.folder_lock import FolderLock
from real_openrlhf.evals.plots import write_differences
from real_openrlhf.evals.predictions import EvaluationError
from real_openrlhf.evals.report import Run, about, interval_settings, load_run, settings_of
from real_openrlhf.evals.results import Compared, Settings
from real_openrlhf.evals.results import compare as compare_predictions
from real_openrlhf.evals.tables import LEGEND, NamedResults, comparison_table, paper_table

COMPARISON = "comparison"


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """All runs against the first.

    text   Markdown; content: the same for json.dumps
    pairs  "<a run> less <the first>" -> its differences
    """

    text: str
    content: dict[str, Any]
    pairs: dict[str, Compared]
    settings: Settings


def compare(args: argparse.Namespace) -> str:
    """Compare finished evaluations; returns what is to be shown. With --output_dir it is also written there."""
    made = compare_runs(
        [load_run(folder) for folder in args.compare],
        seed=args.seed,
        n_resamples=args.n_resamples,
        confidence=args.confidence,
    )
    if args.output_dir is None:
        return made.text
    with FolderLock(args.output_dir, "--output_dir"):
        plot = write_comparison(args.output_dir, made)
    return f"{made.text}\nplot of the differences: {plot}"


def compare_runs(runs: Sequence[Run], *, seed: int, n_resamples: int, confidence: float) -> Comparison:
    """All runs against the first, paired.

    Raises EvaluationError for runs of other rows, labels, scale or reading of the distribution.
    """
    first = runs[0]
    settings = settings_of(first.identity, seed=seed, n_resamples=n_resamples, confidence=confidence)
    parts = [f"# Comparison\n\n{LEGEND}\n\n{paper_table(_lines(runs))}"]
    content: dict[str, Any] = {"interval": interval_settings(settings), "comparisons": []}
    pairs: dict[str, Compared] = {}
    names = Counter(run.method for run in runs)
    for run in runs[1:]:
        for name in ("scale", "renormalise"):
            if run.identity.get(name) != first.identity.get(name):
                raise EvaluationError(
                    f"{first.folder} and {run.folder} cannot be compared: {name} is {first.identity.get(name)} in the "
                    f"first and {run.identity.get(name)} in the second"
                )
        compared = compare_predictions(first.predictions, run.predictions, settings)
        a, b = (one.method if names[one.method] == 1 else str(one.folder) for one in (first, run))
        pairs[f"{b} less {a}"] = compared
        parts.append(
            f"## {b} less {a}\n\nPaired on the rows that both have read. {about(settings)}\n\n"
            f"{comparison_table(compared, a, b)}"
        )
        content["comparisons"].append(
            {
                "a": str(first.folder),
                "b": str(run.folder),
                "benchmarks": {
                    name: {"/".join(filter(None, key)): asdict(interval) for key, interval in table.items()}
                    for name, table in compared.items()
                },
            }
        )
    return Comparison(text="\n\n".join(parts) + "\n", content=content, pairs=pairs, settings=settings)


def _lines(runs: Sequence[Run]) -> list[NamedResults]:
    """Of the paper's table. Runs of one name are told apart by their folders."""
    lines = Counter((run.method, run.training) for run in runs)
    return [
        NamedResults(
            method=run.method if lines[run.method, run.training] == 1 else str(run.folder),
            training=run.training,
            results=run.results,
        )
        for run in runs
    ]


def write_comparison(folder: Path, made: Comparison) -> Path:
    """comparison.md, comparison.json and comparison.png, whose path is returned."""
    folder.mkdir(parents=True, exist_ok=True)
    content = json.dumps(made.content, indent=2, ensure_ascii=False, allow_nan=False)
    plot = write_differences(folder / f"{COMPARISON}.png", made.pairs, made.settings)
    write_text(folder / f"{COMPARISON}.md", f"{made.text}\n![Differences with their intervals]({plot.name})\n")
    write_text(folder / f"{COMPARISON}.json", content + "\n")
    return plot
