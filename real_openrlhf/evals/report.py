"""Writes the results of an evaluation from its predictions, and reads them again for a comparison.

predictions.jsonl   every judgement (`predictions`)
results.json        metrics with intervals; null and a note where undefined
results.csv         the same, one line per number
results.md          the paper's Table 2 for this judge, and all metrics with intervals
plots/              `plots`
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from real_openrlhf.algo.score_scale import ScoreScale
from real_openrlhf.common.atomic_file import write_text
from real_openrlhf.evals.plots import write_plots
from real_openrlhf.evals.predictions import EvaluationError, Prediction, read_predictions
from real_openrlhf.evals.results import Results, Settings, compare, evaluate
from real_openrlhf.evals.tables import (
    NamedResults,
    comparison_table,
    csv_text,
    details_table,
    from_json,
    paper_table,
    to_json,
)

PREDICTIONS = "predictions.jsonl"
RESULTS = "results.json"
COMPARISON = "comparison"


@dataclass(frozen=True, kw_only=True)
class Run:
    """A finished evaluation, read from its folder. method, training: its first two cells in Table 2."""

    folder: Path
    method: str
    training: str
    identity: Mapping[str, Any]
    predictions: tuple[Prediction, ...]
    results: Results


def write_report(
    folder: Path,
    identity: Mapping[str, Any],
    predictions: Sequence[Prediction],
    settings: Settings,
    *,
    method: str,
    training: str,
) -> Results:
    """Write everything except the predictions, which are already written."""
    results = evaluate(predictions, settings)
    content = {
        "method": method,
        "training": training,
        "identity": dict(identity),
        "interval": _interval_settings(settings),
        **to_json(results),
    }
    write_text(folder / RESULTS, json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False) + "\n")
    write_text(folder / "results.csv", csv_text(results))
    table = paper_table([NamedResults(method=method, training=training, results=results)])
    write_text(
        folder / "results.md",
        f"# {method}\n\nCorrelations ×100 (r Pearson, ρ Spearman, τ Kendall's tau-b).\n\n{table}\n\n"
        f"{_about(settings)}\n\n{details_table(results)}\n",
    )
    write_plots(folder / "plots", predictions, results, settings)
    return results


def load_run(folder: str | Path) -> Run:
    """Raises EvaluationError for a folder that is not one of a finished evaluation."""
    folder = Path(folder)
    path = folder / RESULTS
    if not path.is_file():
        state = "it was interrupted: run the same command again" if (folder / PREDICTIONS).is_file() else "none ran"
        raise EvaluationError(f"{folder}: there is no {RESULTS} of a finished evaluation ({state})")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        method, training = content["method"], content["training"]
    except (ValueError, KeyError, TypeError) as error:
        raise EvaluationError(f"{path} is not what an evaluation writes: {error}") from error
    identity, predictions = read_predictions(folder / PREDICTIONS)
    return Run(
        folder=folder,
        method=method,
        training=training,
        identity=identity,
        predictions=tuple(predictions),
        results=from_json(content),
    )


def compare_runs(runs: Sequence[Run], *, seed: int, n_resamples: int, confidence: float) -> tuple[str, dict[str, Any]]:
    """All runs compared with the first, paired by rows: as Markdown, and as values for json.dumps.

    Raises EvaluationError for runs that differ in rows, labels, scale or renormalise.
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
    content: dict[str, Any] = {"interval": _interval_settings(settings), "comparisons": []}
    for run in runs[1:]:
        for name in ("scale", "renormalise"):
            if run.identity.get(name) != first.identity.get(name):
                raise EvaluationError(
                    f"{first.folder} and {run.folder} cannot be compared: {name} is {first.identity.get(name)} in the "
                    f"first and {run.identity.get(name)} in the second"
                )
        compared = compare(first.predictions, run.predictions, settings)
        a, b = (first.method, run.method) if first.method != run.method else (str(first.folder), str(run.folder))
        parts.append(
            f"## {b} minus {a}\n\nOnly rows where both have the score. {_about(settings)}\n\n"
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
    """Write comparison.md and comparison.json."""
    folder.mkdir(parents=True, exist_ok=True)
    write_text(folder / f"{COMPARISON}.md", text)
    write_text(folder / f"{COMPARISON}.json", json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def settings_of(identity: Mapping[str, Any], *, seed: int, n_resamples: int, confidence: float) -> Settings:
    """Settings for the metrics of predictions with this identity."""
    return Settings(
        scale=ScoreScale.parse(identity["scale"]),
        renormalise=bool(identity["renormalise"]),
        seed=seed,
        n_resamples=n_resamples,
        confidence=confidence,
    )


def _interval_settings(settings: Settings) -> dict[str, Any]:
    return {
        "confidence": settings.confidence,
        "n_resamples": settings.n_resamples,
        "seed": settings.seed,
        "drawn": "groups of rows (question, pair) within each benchmark",
    }


def _about(settings: Settings) -> str:
    return (
        f"{100 * settings.confidence:g}% percentile intervals from {settings.n_resamples} resamples of the groups of "
        "rows. ECE is biased upward in resamples, which have fewer different rows."
    )
