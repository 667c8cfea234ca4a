"""Writes the results of an evaluation from its predictions, and reads them again for a comparison.

predictions.jsonl   every judgement (`predictions`)
results.json        metrics with intervals; null and a note where undefined
results.csv         the same, one line per number
results.md          the paper's Table 2 for this judge, and all metrics with intervals
plots/              `plots`
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from real_openrlhf.algo.score_scale import ScoreScale
from real_openrlhf.common.atomic_file import write_text
from real_openrlhf.evals.pair_results import (
    PairResult,
    evaluate_pairs,
    pairs_from_json,
    pairs_to_json,
)
from real_openrlhf.evals.pair_tables import pair_csv_lines, pair_table
from real_openrlhf.evals.plots import write_plots
from real_openrlhf.evals.predictions import EvaluationError, Prediction, read_predictions
from real_openrlhf.evals.raters import Raters, raters_table
from real_openrlhf.evals.results import Results, Settings, evaluate
from real_openrlhf.evals.tables import (
    LEGEND,
    NamedResults,
    csv_text,
    details_table,
    from_json,
    paper_table,
    to_json,
)

PREDICTIONS = "predictions.jsonl"
RESULTS = "results.json"


@dataclass(frozen=True, kw_only=True)
class Run:
    """A finished evaluation, read from its folder. method, training: its first two cells in Table 2."""

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
    raters: Raters | None = None,
) -> str:
    """Everything but the predictions, which are there already. Returns the tables, to be shown.

    raters: see `evals.raters`, of the benchmarks whose rows have several.
    """
    single, paired = apart(predictions, settings)
    results = evaluate(single, settings) if single else Results(benchmarks=(), average=None)
    pairs = evaluate_pairs(paired, settings)
    content = {
        "method": method,
        "training": training,
        "identity": dict(identity),
        "interval": interval_settings(settings),
        **to_json(results),
        **({"raters": raters} if raters else {}),
        **({"pairs": pairs_to_json(pairs), "tie_margin": settings.tie_margin} if pairs else {}),
    }
    write_text(folder / RESULTS, json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False) + "\n")
    write_text(folder / "results.csv", csv_text(results) + pair_csv_lines(pairs))
    parts, shown = [f"# {method}"], []
    if single:
        table = paper_table([NamedResults(method=method, training=training, results=results)])
        shown += [LEGEND, table]
        parts += [LEGEND, table, about(settings), details_table(results)]
        if raters:
            shown.append(raters_table(raters))
            parts.append(shown[-1])
        write_plots(folder / "plots", single, results, settings)
    if pairs:
        table = pair_table(pairs, tie_margin=settings.tie_margin)
        shown.append(table)
        parts += ["## Pairs", table] + ([] if single else [about(settings)])
    write_text(folder / "results.md", "\n\n".join(parts) + "\n")
    return "\n\n".join(shown)


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


def apart(predictions: Sequence[Prediction], settings: Settings) -> tuple[list[Prediction], list[Prediction]]:
    """(those of single responses, those of pairs)."""
    return (
        [p for p in predictions if p.benchmark not in settings.pair_modes],
        [p for p in predictions if p.benchmark in settings.pair_modes],
    )


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


def interval_settings(settings: Settings) -> dict[str, Any]:
    return {
        "confidence": settings.confidence,
        "n_resamples": settings.n_resamples,
        "seed": settings.seed,
        "drawn": "groups of rows (question, pair) within each benchmark",
    }


def about(settings: Settings) -> str:
    return (
        f"{100 * settings.confidence:g}% percentile intervals from {settings.n_resamples} resamples of the groups of "
        "rows. ECE is biased upward in resamples, which have fewer different rows."
    )
