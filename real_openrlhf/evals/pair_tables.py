"""Results on pairs as tables: Markdown, and lines for the CSV file."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence

from real_openrlhf.evals.intervals import Interval
from real_openrlhf.evals.pair_results import SYMBOLS, PairResult, metrics_of
from real_openrlhf.evals.results import READINGS
from real_openrlhf.evals.tables import Notes, comparison_table, markdown, title
from real_openrlhf.judge.pairs import SCORES

_MODES = {SCORES: "each by itself", "one_prompt": "both in one prompt"}


def pair_table(results: Sequence[PairResult], *, tie_margin: float) -> str:
    """A line per benchmark and reading, every metric with its interval; what they mean below."""
    notes = Notes()
    metrics = metrics_of(results[0].mode)
    head = ["Pairs", "Inference", "n", "groups", "tied labels", *(SYMBOLS[metric] for metric in metrics)]
    lines = [
        [
            title(result.name),
            inference,
            *(str(count) for count in (result.n, result.n_groups, result.n_ties)),
            *(notes.cell(result.scores[reading][metric], "interval") for metric in metrics),
        ]
        for result in results
        for reading, inference in READINGS.items()
    ]
    about = (
        f"Answers judged {_MODES[results[0].mode]}. Accuracy: pairs with a tied label are left out, and tied scores "
        f"(no further apart than {tie_margin:g}) are wrong; in the next column they count one half. Three-way: all "
        "pairs, and a tie is right where the label is one."
    )
    return markdown(head, lines, n_text=2) + notes.text() + f"\n\n{about}"


def pair_comparison_table(compared: dict[str, dict[tuple[str, str], Interval]], a: str, b: str) -> str:
    """A line per benchmark, reading and metric: both estimates, b less a and its interval."""
    return comparison_table(compared, a, b, SYMBOLS)


def pair_csv_lines(results: Sequence[PairResult]) -> str:
    """In the columns of `tables.csv_text`, without its head."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    for result in results:
        for reading in READINGS:
            for metric in metrics_of(result.mode):
                found = result.scores[reading][metric]
                numbers = ["" if value is None else repr(value) for value in (found.estimate, found.low, found.high)]
                writer.writerow([f"pairs/{result.name}", reading, metric, *numbers, found.n, found.note or ""])
    return out.getvalue()
