"""What an evaluation writes from its predictions, and what a comparison reads of it again.

predictions.jsonl   every judgement (`predictions`)
results.json        metrics with intervals; null and a note where undefined
results.csv         the same, a line per number
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
from real_openrlhf.evals.pair_results import (
    PairResult,
    compare_pairs,
    evaluate_pairs,
    pairs_from_json,
    pairs_to_json,
)
from real_openrlhf.evals.pair_tables import pair_comparison_table, pair_csv_lines, pair_table
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
    """A finished evaluation, read back. method, training: its first two cells in Table 2."""

    folder: Path
    method: str
    training: str
    identity: Mapping[str, Any]
    predictions: tuple[Prediction, ...]
    results: Results
    pairs: tuple[PairResult, ...] = ()


def write_report(
    folder: Path,
    identity: Mapping[str, Any],
    predictions: Sequence[Prediction],
    settings: Settings,
    *,
    method: str,
    training: str,
) -> str:
    """Everything but the predictions, which are there already. Returns the tables."""
    single, paired = _apart(predictions, settings)
    results = evaluate(single, settings) if single else Results(benchmarks=(), average=None)
    pairs = evaluate_pairs(paired, settings)
    content = {
        "method": method,
        "training": training,
        "identity": dict(identity),
        "interval": _interval_settings(settings),
        **to_json(results),
        **({"pairs": pairs_to_json(pairs), "tie_margin": settings.tie_margin} if pairs else {}),
    }
    write_text(folder / RESULTS, json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False) + "\n")
    write_text(folder / "results.csv", csv_text(results) + pair_csv_lines(pairs))
    parts, tables = [f"# {method}"], []
    if single:
        tables.append(paper_table([NamedResults(method=method, training=training, results=results)]))
        parts += [f"Correlations ×100 (r Pearson, ρ Spearman, τ Kendall's tau-b).\n\n{tables[0]}", _about(settings)]
        parts.append(details_table(results))
        write_plots(folder / "plots", single, results, settings)
    if pairs:
        tables.append(pair_table(pairs, tie_margin=settings.tie_margin))
        parts += ["## Pairs", tables[-1]] + ([] if single else [_about(settings)])
    write_text(folder / "results.md", "\n\n".join(parts) + "\n")
    return "\n\n".join(tables)


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
        pairs=tuple(pairs_from_json(content.get("pairs", {}))),
    )


def compare_runs(
    runs: Sequence[Run], *, seed: int, n_resamples: int, confidence: float, tie_margin: float = 0.0
) -> tuple[str, dict[str, Any]]:
    """All runs against the first, paired: Markdown, and the same for json.dumps.

    Raises EvaluationError for runs of other rows, labels, scale or reading of the distribution.
    """
    first = runs[0]
    settings = settings_of(
        first.identity, seed=seed, n_resamples=n_resamples, confidence=confidence, tie_margin=tie_margin
    )
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
    parts = [f"# Comparison\n\nCorrelations ×100.\n\n{table}"] if first.results.benchmarks else ["# Comparison"]
    content: dict[str, Any] = {"interval": _interval_settings(settings), "comparisons": []}
    for run in runs[1:]:
        for name in ("scale", "renormalise"):
            if run.identity.get(name) != first.identity.get(name):
                raise EvaluationError(
                    f"{first.folder} and {run.folder} cannot be compared: {name} is {first.identity.get(name)} in the "
                    f"first and {run.identity.get(name)} in the second"
                )
        modes = pair_modes_of(run.identity)
        if modes != dict(settings.pair_modes):
            raise EvaluationError(
                f"{first.folder} and {run.folder} cannot be compared: pairs are judged as {dict(settings.pair_modes)} "
                f"in the first and as {modes} in the second"
            )
        (single, paired), (other_single, other_paired) = (_apart(one.predictions, settings) for one in (first, run))
        compared = compare(single, other_single, settings) if single or other_single else {}
        pairs = compare_pairs(paired, other_paired, settings)
        a, b = (first.method, run.method) if first.method != run.method else (str(first.folder), str(run.folder))
        parts.append(
            "\n\n".join(
                [
                    f"## {b} less {a}\n\nPaired on the rows that both have read. {_about(settings)}",
                    *([comparison_table(compared, a, b)] if compared else []),
                    *([pair_comparison_table(pairs, a, b)] if pairs else []),
                ]
            )
        )
        content["comparisons"].append(
            {
                "a": str(first.folder),
                "b": str(run.folder),
                "benchmarks": _named(compared),
                **({"pairs": _named(pairs)} if pairs else {}),
            }
        )
    return "\n\n".join(parts) + "\n", content


def _named(compared: Mapping[str, Mapping[tuple[str, str], Any]]) -> dict[str, Any]:
    return {
        name: {"/".join(filter(None, key)): asdict(interval) for key, interval in table.items()}
        for name, table in compared.items()
    }


def _apart(predictions: Sequence[Prediction], settings: Settings) -> tuple[list[Prediction], list[Prediction]]:
    """(those of single responses, those of pairs)."""
    return (
        [p for p in predictions if p.benchmark not in settings.pair_modes],
        [p for p in predictions if p.benchmark in settings.pair_modes],
    )


def write_comparison(folder: Path, text: str, content: Mapping[str, Any]) -> None:
    """comparison.md and comparison.json."""
    folder.mkdir(parents=True, exist_ok=True)
    write_text(folder / f"{COMPARISON}.md", text)
    write_text(folder / f"{COMPARISON}.json", json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def pair_modes_of(identity: Mapping[str, Any]) -> dict[str, str]:
    """Benchmark -> how its pairs were judged, of those that are pairs."""
    return {name: item["pair_mode"] for name, item in identity["benchmarks"].items() if "pair_mode" in item}


def settings_of(
    identity: Mapping[str, Any], *, seed: int, n_resamples: int, confidence: float, tie_margin: float = 0.0
) -> Settings:
    """How to compute metrics of predictions with this header."""
    return Settings(
        scale=ScoreScale.parse(identity["scale"]),
        renormalise=bool(identity["renormalise"]),
        seed=seed,
        n_resamples=n_resamples,
        confidence=confidence,
        pair_modes=pair_modes_of(identity),
        tie_margin=tie_margin,
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
        "rows. ECE leans upward in resamples, which have fewer different rows."
    )
