"""Results as tables: Markdown in the layout of the paper's Table 2, details with intervals, CSV and JSON."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

from real_openrlhf.evals.predictions import EvaluationError
from real_openrlhf.evals.results import (
    AVERAGE,
    CORRELATIONS,
    RATES,
    READINGS,
    SCORE_METRICS,
    BenchmarkResult,
    Compared,
    Estimate,
    Results,
    keys,
)

# The paper's benchmarks, in its order and with its names; other benchmarks follow with their own names.
PAPER_NAMES = {"feedback_bench": "FB Bench", "flask": "FLASK", "vicuna_bench": "Vic. Bench", "mt_bench": "MT Bench"}
SYMBOLS = {
    "pearson": "r",
    "spearman": "ρ",
    "kendall": "τ",
    "rmse": "RMSE ↓",
    "mae": "MAE ↓",
    "accuracy": "accuracy ↑",
    "ece": "ECE ↓",
    "invalid_rate": "invalid",
    "forced_rate": "forced",
    "undecoded_rate": "no written score",
}
LEGEND = (
    "Correlations ×100 (r Pearson, ρ Spearman, τ Kendall's tau-b); forced: share of responses whose score was read "
    "behind a forced anchor."
)


@dataclass(frozen=True, kw_only=True)
class NamedResults:
    """Results for the lines of Table 2, one per reading. method, training: the first two cells."""

    method: str
    training: str
    results: Results


def paper_table(runs: Sequence[NamedResults]) -> str:
    """Correlations x100: a line per run and reading, three columns per benchmark, the average last.

    A fourth column, which the paper does not have: the share of responses whose score had to be forced.
    """
    shown = _benchmark_names(runs)
    head = ["Method", "Training", "Inference"]
    for name in shown:
        title = "Average" if name == AVERAGE else PAPER_NAMES.get(name, name)
        head += [f"{title} {SYMBOLS['pearson']}", *(SYMBOLS[m] for m in ("spearman", "kendall", "forced_rate"))]
    lines, notes = [], Notes()
    for run in runs:
        found = _by_name(run.results)
        for reading, inference in READINGS.items():
            cells = [run.method, run.training, inference]
            for name in shown:
                if name not in found:
                    cells += [""] * (len(CORRELATIONS) + 1)
                    continue
                cells += [notes.cell(found[name].scores[reading][metric], "100") for metric in CORRELATIONS]
                cells.append(notes.cell(found[name].rates["forced_rate"], "share"))
            lines.append(cells)
    return markdown(head, lines, n_text=3) + notes.text()


def details_table(results: Results) -> str:
    """Every metric with its interval, a line per benchmark and reading; then the rates."""
    notes = Notes()
    everything = [*results.benchmarks, *([results.average] if results.average else [])]
    head = ["Benchmark", "Inference", "n", *(SYMBOLS[m] for m in SCORE_METRICS)]
    lines = [
        [
            title(result.name),
            inference,
            str(result.scores[reading]["mae"].n),
            *(notes.cell(result.scores[reading][metric], "interval") for metric in SCORE_METRICS),
        ]
        for result in everything
        for reading, inference in READINGS.items()
    ]
    rates = [
        [
            title(result.name),
            str(result.n),
            str(result.n_groups),
            *(notes.cell(result.rates[rate], "interval") for rate in RATES),
        ]
        for result in everything
    ]
    return "\n\n".join(
        [
            markdown(head, lines, n_text=2),
            markdown(["Benchmark", "rows", "groups", *(SYMBOLS[rate] for rate in RATES)], rates, n_text=1)
            + notes.text(),
        ]
    )


def comparison_table(compared: Compared, a: str, b: str, symbols: Mapping[str, str] = SYMBOLS) -> str:
    """A line per benchmark, reading and metric: both estimates, b less a and its interval. symbols: metric -> name."""
    lines = []
    for name, table in compared.items():
        for (reading, metric), interval in table.items():
            difference = "undefined" if interval.difference is None else f"{interval.difference:+.3f}"
            bounds = "undefined" if interval.low is None else f"[{interval.low:+.3f}, {interval.high:+.3f}]"
            both = [
                "undefined" if value is None else f"{value:.3f}" for value in (interval.estimate_a, interval.estimate_b)
            ]
            lines.append(
                [title(name), READINGS.get(reading, ""), symbols[metric], str(interval.n), *both, difference, bounds]
            )
    head = ["Benchmark", "Inference", "Metric", "n", a, b, "difference", "interval"]
    return markdown(head, lines, n_text=3)


def csv_text(results: Results) -> str:
    """One line per number: benchmark, reading, metric, estimate, low, high, n, note; an empty cell is undefined."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(["benchmark", "reading", "metric", "estimate", "low", "high", "n", "note"])
    for result in [*results.benchmarks, *([results.average] if results.average else [])]:
        for reading, metric in keys():
            found = result.scores[reading][metric] if reading else result.rates[metric]
            numbers = ["" if value is None else repr(value) for value in (found.estimate, found.low, found.high)]
            writer.writerow([result.name, reading, metric, *numbers, found.n, found.note or ""])
    return out.getvalue()


def to_json(results: Results) -> dict[str, Any]:
    """Values for json.dumps, without NaN: an undefined number is None, and a note says why."""
    return {
        "benchmarks": {result.name: _without_name(result) for result in results.benchmarks},
        "average": None if results.average is None else _without_name(results.average),
    }


def from_json(content: Any) -> Results:
    """Read what `to_json` returned. Raises EvaluationError for anything else."""
    try:
        average = content["average"]
        return Results(
            benchmarks=tuple(_result(name, item) for name, item in content["benchmarks"].items()),
            average=None if average is None else _result(AVERAGE, average),
        )
    except (KeyError, TypeError, AttributeError) as error:
        raise EvaluationError(f"these are no results of an evaluation: {type(error).__name__} {error}") from error


def markdown(head: Sequence[str], lines: Sequence[Sequence[str]], *, n_text: int) -> str:
    """A Markdown table; the first n_text columns are aligned left, the others right."""
    rule = [":---" if i < n_text else "---:" for i in range(len(head))]
    rows = [head, rule, *[[cell.replace("|", "\\|") for cell in line] for line in lines]]
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


class Notes:
    """Footnotes in words for cells without a number or without an interval."""

    def __init__(self) -> None:
        self.notes: list[str] = []

    def cell(self, found: Estimate, form: str) -> str:
        """form "100": the estimate x100 with one decimal; "share": in percent; "interval": three, and bounds."""
        mark = ""
        if found.note and (found.estimate is None or form == "interval"):
            if found.note not in self.notes:
                self.notes.append(found.note)
            mark = f" ({self.notes.index(found.note) + 1})"
        if found.estimate is None:
            return f"-{mark}"
        if form in ("100", "share"):
            return f"{100 * found.estimate:.1f}" + ("%" if form == "share" else "")
        bounds = "" if found.low is None else f" [{found.low:.3f}, {found.high:.3f}]"
        return f"{found.estimate:.3f}{bounds}{mark}"

    def text(self) -> str:
        lines = [f"({number}) {note}" for number, note in enumerate(self.notes, start=1)]
        return "\n\n" + "  \n".join(lines) if lines else ""


def _benchmark_names(runs: Sequence[NamedResults]) -> list[str]:
    names = list(dict.fromkeys(result.name for run in runs for result in run.results.benchmarks))
    ordered = [name for name in PAPER_NAMES if name in names] + [name for name in names if name not in PAPER_NAMES]
    return ordered + ([AVERAGE] if any(run.results.average for run in runs) else [])


def _by_name(results: Results) -> dict[str, BenchmarkResult]:
    found = {result.name: result for result in results.benchmarks}
    return found if results.average is None else {**found, AVERAGE: results.average}


def title(name: str) -> str:
    return "**average**" if name == AVERAGE else name


def _without_name(result: BenchmarkResult) -> dict[str, Any]:
    content = asdict(result)
    del content["name"]
    return content


def _result(name: str, content: Any) -> BenchmarkResult:
    def estimate(values: Any) -> Estimate:
        return Estimate(**{f.name: values[f.name] for f in fields(Estimate)})

    return BenchmarkResult(
        name=name,
        n=content["n"],
        n_groups=content["n_groups"],
        scores={r: {m: estimate(content["scores"][r][m]) for m in SCORE_METRICS} for r in READINGS},
        rates={rate: estimate(content["rates"][rate]) for rate in RATES},
    )
