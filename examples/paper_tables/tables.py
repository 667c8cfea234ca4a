"""Markdown tables and Figure 2 from the cells' JSON files; no model is needed.

    python -m examples.paper_tables.tables examples/paper_tables/results/small

Two kinds of spread stand apart. Over seeds: the standard deviation of the seeds' values, each with its own data,
base model, warm-up and RL. Over prompts: the 95% bootstrap interval of the mean over seeds and tests, for these models.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from scipy import stats

from examples.judging_task.task import TESTS
from examples.paper_tables import cells as plan
from examples.paper_tables.judged import average, scores
from real_openrlhf.common.atomic_file import write_text
from real_openrlhf.evals.intervals import paired_interval, resample, single_interval

SHORT = {"pearson": "r", "spearman": "ρ", "kendall": "τ", "rmse": "RMSE", "mae": "MAE"}
READINGS = {"decoded": "Standard", "expected": "RAIL"}
TITLES = {
    "2": "Methods",
    "3": "Average of N judgements (REAL)",
    "4": "Rollouts per prompt K, 128 rollouts per update",
    "5": "Weight λ of the label's likelihood",
    "6": "Which groups are kept, by the share of correct scores",
    "7": "What REAL begins with",
    "8": "Weight β of Term 2, and its relatives",
    "9": "Temperature of training and judging",
}
_RESAMPLES = 1000
Columns = Mapping[str, Mapping[str, Sequence[Any]]]


@dataclass(frozen=True, kw_only=True)
class Row:
    """judged: seed -> split -> columns (see `judged.judged_cell`)."""

    title: str
    judged: dict[int, Columns]

    def value(self, reading: str, metric: str, seed: int) -> float | None:
        return average({split: scores(self.judged[seed][split]) for split in TESTS})[reading][metric]

    def values(self, reading: str, metric: str) -> list[float | None]:
        return [self.value(reading, metric, seed) for seed in sorted(self.judged)]

    def split_mean(self, split: str, reading: str, metric: str) -> float | None:
        return mean([scores(columns[split])[reading][metric] for columns in self.judged.values()])


def load(folder: Path) -> dict[str, dict[int, dict[str, Any]]]:
    """Cell -> seed -> its JSON."""
    found: dict[str, dict[int, dict[str, Any]]] = {}
    for path in sorted((folder / "cells").glob("*.json")):
        cell = json.loads(path.read_text(encoding="utf-8"))
        found.setdefault(cell["cell"], {})[cell["seed"]] = cell
    return found


def rows_of(table: str, cells: Mapping[str, dict[int, dict[str, Any]]], rates: Mapping[str, float]) -> list[Row]:
    """The table's rows that were run, if these are two at least; before them the row of what they begin with."""
    own = [cell for cell in plan.tables(rates)[table].values() if cell.name in cells]
    if len(own) < 2:
        return []
    rows = []
    raft = cells.get(plan.START, {})
    if table == "2":
        rows.append(Row(title="Base", judged={seed: cell["before"]["judged"] for seed, cell in raft.items()}))
    elif table != "3":
        rows.append(Row(title="RAFT, the start", judged={seed: cell["judged"] for seed, cell in raft.items()}))
    for title, cell in plan.tables(rates)[table].items():
        found = cells.get(cell.name, {})
        if table == "7" and found and cell.start != plan.START:
            began = {seed: each["before"]["judged"] for seed, each in found.items()}
            rows.append(Row(title=f"{cell.start}, before", judged=began))
        rows.append(Row(title=title, judged={seed: each["judged"] for seed, each in found.items()}))
    return [row for row in rows if row.judged]


def table_2(rows: Sequence[Row]) -> list[str]:
    """Two readings a method; r by test, then the averages."""
    titles = ["method", "inference", *(f"`{split}` r" for split in TESTS), *(f"mean {s}" for s in SHORT.values())]
    lines = [line([*titles, "r: seeds' sd", "r: 95% over prompts"]), "|---" * (len(titles) + 2) + "|"]
    for row in rows:
        for reading, name in READINGS.items():
            cells = [number(row.split_mean(split, reading, "pearson")) for split in TESTS]
            cells += [number(mean(row.values(reading, metric))) for metric in SHORT]
            lines.append(line([row.title, name, *cells, _spread(row, reading), _prompts(row, reading)]))
    return lines


def table_of(rows: Sequence[Row]) -> list[str]:
    """RAIL inference, averaged over the tests."""
    titles = ["setting", *SHORT.values(), "r: seeds' sd", "r: 95% over prompts", "seeds"]
    lines = [line(titles), "|---" * len(titles) + "|"]
    for row in rows:
        cells = [number(mean(row.values("expected", metric))) for metric in SHORT]
        spread = [_spread(row, "expected"), _prompts(row, "expected"), str(len(row.judged))]
        lines.append(line([row.title, *cells, *spread]))
    return lines


def differences(rows: Sequence[Row], main: str) -> list[str]:
    """Pearson of the row `main` less that of every other, RAIL: by seed, and with both intervals."""
    mine = next((row for row in rows if row.title == main), None)
    if mine is None:
        return []
    titles = [f"{main} less", "mean", "by seed", "95% over seeds (t)", "95% over prompts"]
    lines = [line(titles), "|---" * len(titles) + "|"]
    for row in rows:
        seeds = sorted(set(row.judged) & set(mine.judged))
        if row is mine or not seeds:
            continue
        pairs = [(mine.value("expected", "pearson", s), row.value("expected", "pearson", s)) for s in seeds]
        by_seed = [a - b for a, b in pairs if a is not None and b is not None]
        if len(by_seed) < len(seeds):
            continue
        low, high = _paired(mine, row, seeds)
        cells = [signed(mean(by_seed)), " ".join(map(signed, by_seed)), t_interval(by_seed)]
        lines.append(line([row.title, *cells, f"{signed(low)} to {signed(high)}"]))
    return lines if len(lines) > 2 else []


def _paired(mine: Row, other: Row, seeds: Sequence[int]) -> tuple[float | None, float | None]:
    """Both judges on the same resampled prompts, averaged over seeds and tests."""
    parts = []
    for seed in seeds:
        for split in TESTS:
            a, b = other.judged[seed][split], mine.judged[seed][split]
            if list(a["row"]) != list(b["row"]):
                raise ValueError(f"seed {seed}, {split}: {mine.title} and {other.title} judged different rows")
            columns = [(a["expected"], a["label"]), (b["expected"], b["label"])]
            parts.append(resample("pearson", columns, seed=len(parts), n_resamples=_RESAMPLES))
    interval = paired_interval(parts)
    return interval.low, interval.high


def _prompts(row: Row, reading: str) -> str:
    parts = [
        resample("pearson", [(columns[split][reading], columns[split]["label"])], seed=i, n_resamples=_RESAMPLES)
        for i, (columns, split) in enumerate((c, s) for c in row.judged.values() for s in TESTS)
    ]
    interval = single_interval(parts)
    return f"{number(interval.low)} to {number(interval.high)}"


def _spread(row: Row, reading: str) -> str:
    values = [value for value in row.values(reading, "pearson") if value is not None]
    return number(statistics.stdev(values)) if len(values) > 1 else "–"


def t_interval(values: Sequence[float]) -> str:
    n = len(values)
    if n < 2:
        return "–"
    half = float(stats.t.ppf(0.975, n - 1)) * statistics.stdev(values) / math.sqrt(n)
    middle = statistics.fmean(values)
    return f"{signed(middle - half)} to {signed(middle + half)}"


def mean(values: Sequence[float | None]) -> float | None:
    there = [value for value in values if value is not None]
    return statistics.fmean(there) if there and len(there) == len(values) else None


def number(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}"


def signed(value: float | None) -> str:
    return "–" if value is None else f"{value:+.3f}"


def line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def stopped_table(methods: Sequence[tuple[str, dict[int, dict[str, Any]]]]) -> list[str]:
    """What Table 2 would be if validation chose the weights: of the evaluated steps, the best on the validation split.

    r is RAIL's mean over the tests, with the chosen step for each seed; beside it the last step's.
    """
    titles = ["method", "mean r, chosen", "mean r, last", "by seed, chosen (step)", "by seed, last"]
    lines = [line(titles), "|---" * len(titles) + "|"]
    for title, by_seed in methods:
        chosen, last, steps = [], [], []
        for _, cell in sorted(by_seed.items()):
            valid = {step: found["expected"]["pearson"] for step, found in cell["valid_curve"].items()}
            steps.append(max(valid, key=lambda step: valid[step] if valid[step] is not None else -1.0))
            chosen.append(cell["curve"][steps[-1]]["expected"]["pearson"])
            last.append(cell["average"]["expected"]["pearson"])
        with_steps = [f"{number(value)} ({step})" for value, step in zip(chosen, steps, strict=True)]
        shown = [number(mean(chosen)), number(mean(last)), " ".join(with_steps), " ".join(map(number, last))]
        lines.append(line([title, *shown]))
    return lines


def feedback_table(rows: Sequence[tuple[str, list[dict[str, Any]]]]) -> list[str]:
    """What the feedback does, mean over seeds: shares over the four tests, and on each."""
    lines = [line(["method", *(f"`{split}`" for split in TESTS)]), "|---" * (1 + len(TESTS)) + "|"]
    for title, cells in rows:
        shares = [
            " / ".join(
                f"{statistics.fmean(cell['feedback'][split][key] for cell in cells):.2f}"
                for key in ("lines_read", "tally_right")
            )
            for split in TESTS
        ]
        lines.append(line([title, *shares]))
    return lines


def draw_curve(path: Path, cells: Mapping[str, dict[int, dict[str, Any]]], rates: Mapping[str, float]) -> None:
    """Figure 2: mean Pearson of the tests over the steps of RL; a thin line per seed, their mean in bold."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(6, 4), layout="constrained")
    names = {"standard_rl": "standard RL", "jepo": "JEPO", "real": "REAL"}
    for colour, (objective, label) in enumerate(names.items()):
        curves = []
        for cell in cells.get(plan.rl(objective, rates[objective]).name, {}).values():
            curve = {int(step): each["expected"]["pearson"] for step, each in cell["curve"].items()}
            curves.append(curve)
            axes.plot(list(curve), list(curve.values()), color=f"C{colour}", alpha=0.35, linewidth=1)
        if curves:
            steps = sorted(set.intersection(*(set(curve) for curve in curves)))
            means = [statistics.fmean(curve[step] for curve in curves) for step in steps]
            axes.plot(steps, means, color=f"C{colour}", linewidth=2.5, label=label)
    axes.set_xlabel("updates of RL")
    axes.set_ylabel("Pearson of E[score], mean of four tests")
    axes.legend()
    figure.savefig(path, dpi=120)
    plt.close(figure)


def write_tables(folder: Path) -> str:
    """Writes tables.md and figure_2.png into the folder, and returns the Markdown."""
    cells = load(folder)
    chosen = json.loads((folder / "rates.json").read_text(encoding="utf-8"))
    rates: dict[str, float] = chosen["chosen"]
    text: list[str] = []
    for table, title in sorted(TITLES.items()):
        rows = rows_of(table, cells, rates)
        if not rows:
            continue
        text += [f"### Table {table}: {title}", "", *(table_2(rows) if table == "2" else table_of(rows)), ""]
        main = next(name for name, cell in plan.tables(rates)[table].items() if cell == plan.rl("real", rates["real"]))
        text += [*differences(rows, main), ""]
    curves = [(t, cells[c.name]) for t, c in plan.tables(rates)["2"].items() if c.curve and c.name in cells]
    if curves:
        text += ["### Table 2, if validation had chosen the weights", "", *stopped_table(curves), ""]
    means = [(title, list(cells[cell.name].values())) for title, cell in _all_rows(rates) if cell.name in cells]
    text += ["### What the feedback does: share of lines read / of right tallies", "", *feedback_table(means), ""]
    text += ["### The search for learning rates: Pearson on the first seed's validation split", ""]
    text += [f"- {name}: {_rates(found)}; chosen {rates[name]:g}" for name, found in chosen["valid_pearson"].items()]
    markdown = "\n".join(text) + "\n"
    write_text(folder / "tables.md", markdown)
    draw_curve(folder / "figure_2.png", cells, rates)
    return markdown


def _all_rows(rates: Mapping[str, float]) -> list[tuple[str, plan.Cell]]:
    tables = plan.tables(rates)
    return [*tables["2"].items(), *((t, c) for t, c in tables["8"].items() if c not in tables["2"].values())]


def _rates(found: Mapping[str, float | None]) -> str:
    return ", ".join(f"{float(rate):g}: {number(score)}" for rate, score in found.items())


def main() -> None:
    parser = argparse.ArgumentParser(description="Tables and figure from the cells' JSON.", allow_abbrev=False)
    parser.add_argument("folder", type=Path, help="the results of one size")
    print(write_tables(parser.parse_args().folder))


if __name__ == "__main__":
    main()
