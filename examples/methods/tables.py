"""Tables and learning curves from the cells' JSON files; no model is needed.

    python -m examples.methods.report stsb examples/stsb/results/cpu

Two kinds of spread stand apart. Over prompts: the 95% bootstrap interval of the mean over seeds, for these models;
pairs, or questions with all their rows, are drawn. Over seeds: Student's t, where there are two or more.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from examples.methods.judged import predictions
from examples.methods.plan import MAIN, METHODS, Example, cells, first_cells
from examples.paper_tables.tables import line, mean, number, signed, t_interval
from real_openrlhf.common.atomic_file import write_text
from real_openrlhf.evals.intervals import paired_interval, resample, single_interval
from real_openrlhf.evals.metrics import METRICS, Metric
from real_openrlhf.evals.predictions import Prediction
from real_openrlhf.evals.reliability import ece, share
from real_openrlhf.evals.results import CORRELATIONS, RATES, SCORE_METRICS, Settings, column
from real_openrlhf.evals.tables import SYMBOLS

READINGS = {"decoded": "Standard", "expected": "RAIL"}
TITLE_OF_START, TITLE_OF_RAFT = (cell.title for cell in first_cells())
_METRICS: dict[str, Metric] = {**METRICS, "accuracy": share, "ece": ece, **dict.fromkeys(RATES, share)}
RESAMPLES = 1000
# JSON of a cell, by seed.
BySeed = Mapping[int, Mapping[str, Any]]


@dataclass(frozen=True, kw_only=True)
class Row:
    """A line of the tables. The start is one model and has one seed, which stands for all."""

    title: str
    by_seed: BySeed

    @property
    def seeds(self) -> list[int]:
        return sorted(self.by_seed)

    def has(self, seed: int) -> bool:
        return seed in self.by_seed or self.title == TITLE_OF_START

    def predictions(self, seed: int, test: str) -> list[Prediction]:
        cell = self.by_seed[seed if seed in self.by_seed else self.seeds[0]]
        return predictions(cell["tests"][test], test)

    def value(self, seed: int, test: str, key: tuple[str, str], settings: Settings) -> float | None:
        """A metric on the rows that have a score. key: reading and metric, the reading "" for a rate."""
        x, y = column(self.predictions(seed, test), key, settings)
        known = np.asarray([(a, b) for a, b in zip(x, y) if a is not None], dtype=np.float64).reshape(-1, 2)
        return _METRICS[key[1]](known[:, 0], known[:, 1]) if len(known) else None

    def values(self, test: str, key: tuple[str, str], settings: Settings) -> list[float | None]:
        return [self.value(seed, test, key, settings) for seed in self.seeds]


def load(folder: Path) -> list[Row]:
    """The rows that are there, in the order of the tables. A method's is that of its chosen learning rate."""
    found: dict[str, dict[int, dict[str, Any]]] = {}
    for path in sorted((folder / "cells").glob("*.json")):
        cell = json.loads(path.read_text(encoding="utf-8"))
        found.setdefault(cell["cell"], {})[cell["seed"]] = cell
    wanted = [(cell.name, cell.title) for cell in (first_cells() if not found else cells(_rates(folder, found)))]
    return [Row(title=title, by_seed=found[name]) for name, title in wanted if name in found]


def _rates(folder: Path, found: Mapping[str, BySeed]) -> dict[str, float]:
    path = folder / "rates.json"
    if path.is_file():
        chosen: dict[str, float] = json.loads(path.read_text(encoding="utf-8"))["chosen"]
        return chosen
    rates = {float(cell["rate"]) for by_seed in found.values() for cell in by_seed.values() if cell["rate"] is not None}
    if len(rates) > 1:
        raise ValueError(f"{folder} has cells of the learning rates {sorted(rates)}, and no rates.json that chooses")
    return dict.fromkeys(METHODS, rates.pop() if rates else 0.0)


def metric_table(rows: Sequence[Row], test: str, settings: Settings, metrics: Sequence[str]) -> list[str]:
    """A line per row and reading: the mean over seeds of every metric, and Pearson's two spreads."""
    titles = ["judge", "inference", *(SYMBOLS[metric] for metric in metrics), "forced", "no score"]
    lines = [line([*titles, "r: seeds' sd", "r: 95% over prompts", "seeds"]), "|---" * (len(titles) + 3) + "|"]
    for row in rows:
        for reading, name in READINGS.items():
            values = [mean(row.values(test, (reading, metric), settings)) for metric in metrics]
            rates = ("forced_rate", "invalid_rate" if reading == "expected" else "undecoded_rate")
            shares = [mean(row.values(test, ("", rate), settings)) for rate in rates]
            pearson = (reading, "pearson")
            low, high = over_prompts([row], row.seeds, test, pearson, settings)
            spread = [_sd(row.values(test, pearson, settings)), f"{number(low)} to {number(high)}", str(len(row.seeds))]
            lines.append(line([row.title, name, *map(number, values), *map(number, shares), *spread]))
    return lines


def differences(rows: Sequence[Row], test: str, settings: Settings, metric: str = "pearson") -> list[str]:
    """REAL's metric, RAIL, less that of every other judge: by seed, and with both intervals."""
    mine = next((row for row in rows if row.title == METHODS[MAIN]), None)
    if mine is None:
        return []
    titles = [f"{mine.title} less", "mean", "by seed", "95% over seeds (t)", "95% over prompts"]
    lines = [line(titles), "|---" * len(titles) + "|"]
    key = ("expected", metric)
    for row in rows:
        seeds = [seed for seed in mine.seeds if row.has(seed)]
        if row is mine or not seeds:
            continue
        pairs = [(mine.value(seed, test, key, settings), row.value(seed, test, key, settings)) for seed in seeds]
        own = [None if a is None or b is None else a - b for a, b in pairs]
        low, high = over_prompts([row, mine], seeds, test, key, settings)
        known = [value for value in own if value is not None]
        over_seeds = t_interval(known) if len(known) == len(own) else "–"
        shown = [signed(mean(own)), " ".join(map(signed, own)), over_seeds, f"{signed(low)} to {signed(high)}"]
        lines.append(line([row.title, *shown]))
    return lines if len(lines) > 2 else []


def over_prompts(
    sides: Sequence[Row], seeds: Sequence[int], test: str, key: tuple[str, str], settings: Settings
) -> tuple[float | None, float | None]:
    """95% interval of the mean over seeds, or, with two sides, of the second's less the first's.

    All judges of all seeds get the same draws of prompts: they have judged the same ones. Prompts that one of them
    gave no score are left out. ValueError when the judges did not judge the same rows.
    """
    judged = [row.predictions(seed, test) for row in sides for seed in seeds]
    rows = [[(p.row, p.label) for p in each] for each in judged]
    if any(each != rows[0] for each in rows):
        raise ValueError(f"{test}: {' and '.join(row.title for row in sides)} judged different rows")
    columns = [column(each, key, settings) for each in judged]
    drawn = resample(
        _METRICS[key[1]], columns, seed=0, n_resamples=settings.n_resamples, clusters=[p.group for p in judged[0]]
    )
    n = len(seeds)
    means = [
        (mean(drawn.estimates[i : i + n]), np.mean(drawn.values[i : i + n], axis=0)) for i in range(0, len(judged), n)
    ]
    averaged = replace(drawn, estimates=tuple(e for e, _ in means), values=tuple(v for _, v in means))
    interval = single_interval([averaged]) if len(sides) == 1 else paired_interval([averaged])
    return interval.low, interval.high


def _sd(values: Sequence[float | None]) -> str:
    known = [value for value in values if value is not None]
    return number(statistics.stdev(known)) if len(known) > 1 else "–"


def curve_table(rows: Sequence[Row]) -> list[str]:
    """Pearson of E[score] on the dev rows while each judge was trained, mean over its seeds."""
    lines = [line(["judge", "step: Pearson on the dev rows"]), "|---|---|"]
    for row in rows:
        curves = [cell["curve"] for cell in row.by_seed.values() if "curve" in cell]
        if curves:
            steps = sorted(set.intersection(*(set(curve) for curve in curves)), key=int)
            values = [(step, mean([curve[step]["expected/pearson"] for curve in curves])) for step in steps]
            lines.append(line([row.title, ", ".join(f"{step}: {number(value)}" for step, value in values)]))
    return lines


def time_table(rows: Sequence[Row]) -> list[str]:
    """Minutes of each cell, its judgements included, and seconds of the phases of its training."""
    lines = [line(["judge", "minutes, by seed", "seconds of a phase: mean (times)"]), "|---|---|---|"]
    for row in rows:
        minutes = " ".join(f"{cell['seconds'] / 60:.0f}" for _, cell in sorted(row.by_seed.items()))
        first = row.by_seed[min(row.by_seed)].get("phases", {})
        shown = ", ".join(f"{name} {each['mean']:.1f} ({each['times']})" for name, each in first.items())
        lines.append(line([row.title, minutes, shown]))
    return lines


def draw_curves(path: Path, rows: Sequence[Row]) -> None:
    """Pearson of E[score] on the dev rows: left the warm-up, right RL; a thin line per seed, their mean in bold."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4), layout="constrained", sharey=True)
    for number_, row in enumerate(row for row in rows if row.title != TITLE_OF_START):
        axes = left if row.title == TITLE_OF_RAFT else right
        curves = [
            {int(step): value["expected/pearson"] for step, value in cell["curve"].items()}
            for cell in row.by_seed.values()
        ]
        for curve in curves:
            known = {step: value for step, value in sorted(curve.items()) if value is not None}
            axes.plot(list(known), list(known.values()), color=f"C{number_}", alpha=0.35, linewidth=1)
        steps = sorted(set.intersection(*(set(curve) for curve in curves)))
        means = [(step, mean([curve[step] for curve in curves])) for step in steps]
        shown = [(step, value) for step, value in means if value is not None]
        axes.plot(*zip(*shown), color=f"C{number_}", linewidth=2.5, label=row.title) if shown else None
    left.set_xlabel("updates of the warm-up")
    right.set_xlabel("updates of RL")
    left.set_ylabel("Pearson of E[score] on the dev rows")
    for axes in (left, right):
        if axes.get_lines():
            axes.legend()
    figure.savefig(path, dpi=120)
    plt.close(figure)


def write_tables(example: Example, folder: Path) -> str:
    """Writes tables.md and curves.png into the folder, and returns the Markdown. ValueError without any cell."""
    rows = load(folder)
    if not rows:
        raise ValueError(f"{folder} has no cells")
    settings = Settings(scale=example.scale, n_resamples=RESAMPLES)
    text: list[str] = []
    for number_, test in enumerate(example.tests):
        there = [row for row in rows if all(test in cell["tests"] for cell in row.by_seed.values())]
        if not there:
            continue
        n = len(next(iter(there[0].by_seed.values()))["tests"][test]["row"])
        metrics = SCORE_METRICS if number_ == 0 else CORRELATIONS
        text += [f"### {test}: {n} rows", "", *metric_table(there, test, settings, metrics), ""]
        text += [*differences(there, test, settings), ""]
        if number_ == 0:
            text += ["RMSE, RAIL:", "", *differences(there, test, settings, "rmse"), ""]
    text += ["### Learning curves", "", *curve_table(rows), "", "### Time", "", *time_table(rows), ""]
    text += _search(folder) + _samples(rows)
    markdown = "\n".join(text) + "\n"
    write_text(folder / "tables.md", markdown)
    draw_curves(folder / "curves.png", rows)
    return markdown


def _search(folder: Path) -> list[str]:
    path = folder / "rates.json"
    if not path.is_file():
        return []
    found = json.loads(path.read_text(encoding="utf-8"))
    lines = ["### The search for learning rates: Pearson on the dev rows of the first seed", ""]
    for name, scores in found["dev_pearson"].items():
        tried = ", ".join(f"{rate}: {number(score)}" for rate, score in scores.items())
        lines.append(f"- {METHODS[name]}: {tried}; chosen {found['chosen'][name]:g}")
    return [*lines, ""]


def _samples(rows: Sequence[Row]) -> list[str]:
    lines = ["### What was written for the first test rows, first seed", ""]
    for row in rows:
        cell = row.by_seed[min(row.by_seed)]
        lines += [f"{row.title}:", ""]
        lines += [f"- label {each['label']:g}: `{_shorten(each['text'])}`" for each in cell["texts"]] + [""]
    return lines


def _shorten(text: str, limit: int = 300) -> str:
    text = " ".join(text.replace("`", "'").split())
    return text if len(text) <= limit else f"{text[:limit]} ..."
