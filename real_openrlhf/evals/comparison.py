"""Finished evaluations against each other, paired: `python -m real_openrlhf.evaluate --compare`."""

from __future__ import annotations

import argparse
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from real_openrlhf.common.atomic_file import write_text
from real_openrlhf.common.folder_lock import FolderLock
from real_openrlhf.evals.pair_results import compare_pairs
from real_openrlhf.evals.pair_tables import pair_comparison_table
from real_openrlhf.evals.plots import COMPARED, COMPARED_PAIRS, write_differences
from real_openrlhf.evals.predictions import EvaluationError
from real_openrlhf.evals.report import Run, about, apart, interval_settings, load_run, pair_modes_of, settings_of
from real_openrlhf.evals.results import Compared, Settings
from real_openrlhf.evals.results import compare as compare_predictions
from real_openrlhf.evals.tables import LEGEND, NamedResults, comparison_table, paper_table

COMPARISON = "comparison"


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """All runs against the first.

    text    Markdown; content: the same for json.dumps
    single  "<a run> less <the first>" -> differences on benchmarks of single responses; none where there are no such
    pairs   the same on benchmarks of pairs
    """

    text: str
    content: dict[str, Any]
    single: dict[str, Compared]
    pairs: dict[str, Compared]
    settings: Settings


def compare(args: argparse.Namespace) -> str:
    """Compare finished evaluations; returns what is to be shown. With --output_dir it is also written there."""
    made = compare_runs(
        [load_run(folder) for folder in args.compare],
        seed=args.seed,
        n_resamples=args.n_resamples,
        confidence=args.confidence,
        tie_margin=args.tie_margin,
    )
    if args.output_dir is None:
        return made.text
    with FolderLock(args.output_dir, "--output_dir"):
        plots = write_comparison(args.output_dir, made)
    return "\n".join([made.text, *(f"plot of the differences: {plot}" for plot in plots)])


def compare_runs(
    runs: Sequence[Run], *, seed: int, n_resamples: int, confidence: float, tie_margin: float = 0.0
) -> Comparison:
    """All runs against the first, paired.

    Raises EvaluationError for runs of other rows, labels, scale, reading of the distribution or way to judge pairs.
    """
    first = runs[0]
    settings = settings_of(
        first.identity, seed=seed, n_resamples=n_resamples, confidence=confidence, tie_margin=tie_margin
    )
    parts = ["# Comparison", *([LEGEND, paper_table(_lines(runs))] if first.results.benchmarks else [])]
    content: dict[str, Any] = {"interval": interval_settings(settings), "comparisons": []}
    singles: dict[str, Compared] = {}
    paired: dict[str, Compared] = {}
    names = Counter(run.method for run in runs)
    for run in runs[1:]:
        _check_judged_alike(first, run)
        (single_a, pairs_a), (single_b, pairs_b) = (apart(one.predictions, settings) for one in (first, run))
        single = compare_predictions(single_a, single_b, settings) if single_a or single_b else {}
        pairs = compare_pairs(pairs_a, pairs_b, settings)
        a, b = (one.method if names[one.method] == 1 else str(one.folder) for one in (first, run))
        parts.append(f"## {b} less {a}\n\nPaired on the rows that both have read. {about(settings)}")
        if single:
            singles[f"{b} less {a}"] = single
            parts.append(comparison_table(single, a, b))
        if pairs:
            paired[f"{b} less {a}"] = pairs
            parts.append(pair_comparison_table(pairs, a, b))
        content["comparisons"].append(
            {
                "a": str(first.folder),
                "b": str(run.folder),
                "benchmarks": _for_json(single),
                **({"pairs": _for_json(pairs)} if pairs else {}),
            }
        )
    return Comparison(text="\n\n".join(parts) + "\n", content=content, single=singles, pairs=paired, settings=settings)


def _check_judged_alike(first: Run, run: Run) -> None:
    for name in ("scale", "renormalise"):
        if run.identity.get(name) != first.identity.get(name):
            raise EvaluationError(
                f"{first.folder} and {run.folder} cannot be compared: {name} is {first.identity.get(name)} in the "
                f"first and {run.identity.get(name)} in the second"
            )
    modes, others = pair_modes_of(first.identity), pair_modes_of(run.identity)
    if modes != others:
        raise EvaluationError(
            f"{first.folder} and {run.folder} cannot be compared: pairs are judged as {modes} in the first and as "
            f"{others} in the second"
        )


def _for_json(compared: Compared) -> dict[str, Any]:
    return {
        name: {"/".join(filter(None, key)): asdict(interval) for key, interval in table.items()}
        for name, table in compared.items()
    }


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


def write_comparison(folder: Path, made: Comparison) -> list[Path]:
    """comparison.md, comparison.json and plots, whose paths are returned: comparison.png, comparison_pairs.png."""
    folder.mkdir(parents=True, exist_ok=True)
    content = json.dumps(made.content, indent=2, ensure_ascii=False, allow_nan=False)
    drawn: tuple[tuple[str, dict[str, Compared], Mapping[str, str]], ...] = (
        (f"{COMPARISON}.png", made.single, COMPARED),
        (f"{COMPARISON}_pairs.png", made.pairs, COMPARED_PAIRS),
    )
    plots = [write_differences(folder / name, found, made.settings, metrics) for name, found, metrics in drawn if found]
    images = [f"![Differences with their intervals]({plot.name})\n" for plot in plots]
    write_text(folder / f"{COMPARISON}.md", "\n".join([made.text, *images]))
    write_text(folder / f"{COMPARISON}.json", content + "\n")
    return plots
