"""Finished evaluations against each other, paired: `python -m real_openrlhf.evaluate --compare`."""

from __future__ import annotations

import argparse
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from real_openrlhf.common.atomic_file import write_text
from real_openrlhf.common.folder_lock import FolderLock
from real_openrlhf.evals.predictions import EvaluationError
from real_openrlhf.evals.report import Run, about, interval_settings, load_run, settings_of
from real_openrlhf.evals.results import compare as compare_predictions
from real_openrlhf.evals.tables import NamedResults, comparison_table, paper_table

COMPARISON = "comparison"


def compare(args: argparse.Namespace) -> str:
    """Compare finished evaluations; returns the Markdown that is also written to --output_dir, if one is given."""
    text, content = compare_runs(
        [load_run(folder) for folder in args.compare],
        seed=args.seed,
        n_resamples=args.n_resamples,
        confidence=args.confidence,
    )
    if args.output_dir is not None:
        with FolderLock(args.output_dir, "--output_dir"):
            write_comparison(args.output_dir, text, content)
    return text


def compare_runs(runs: Sequence[Run], *, seed: int, n_resamples: int, confidence: float) -> tuple[str, dict[str, Any]]:
    """All runs against the first, paired: Markdown, and the same for json.dumps.

    Raises EvaluationError for runs of other rows, labels, scale or reading of the distribution.
    """
    first = runs[0]
    settings = settings_of(first.identity, seed=seed, n_resamples=n_resamples, confidence=confidence)
    lines = Counter((run.method, run.training) for run in runs)
    table = paper_table(
        [
            NamedResults(
                method=run.method if lines[run.method, run.training] == 1 else str(run.folder),
                training=run.training,
                results=run.results,
            )
            for run in runs
        ]
    )
    parts = [f"# Comparison\n\nCorrelations ×100.\n\n{table}"]
    content: dict[str, Any] = {"interval": interval_settings(settings), "comparisons": []}
    for run in runs[1:]:
        for name in ("scale", "renormalise"):
            if run.identity.get(name) != first.identity.get(name):
                raise EvaluationError(
                    f"{first.folder} and {run.folder} cannot be compared: {name} is {first.identity.get(name)} in the "
                    f"first and {run.identity.get(name)} in the second"
                )
        compared = compare_predictions(first.predictions, run.predictions, settings)
        a, b = (first.method, run.method) if first.method != run.method else (str(first.folder), str(run.folder))
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
    return "\n\n".join(parts) + "\n", content


def write_comparison(folder: Path, text: str, content: Mapping[str, Any]) -> None:
    """comparison.md and comparison.json."""
    folder.mkdir(parents=True, exist_ok=True)
    write_text(folder / f"{COMPARISON}.md", text)
    write_text(folder / f"{COMPARISON}.json", json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False) + "\n")
