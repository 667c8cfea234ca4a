"""Plots of predictions: against the label with marginals, reliability, confusion, error by benchmark."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from real_openrlhf.algo.score_scale import ScoreScale
from real_openrlhf.evals.predictions import Prediction
from real_openrlhf.evals.reliability import N_BINS, decide, reliability_bins
from real_openrlhf.evals.results import CORRELATIONS, READINGS, Compared, Results, Settings, by_benchmark, column

COLORS = {"expected": "#1f6fb4", "decoded": "#d9772b"}
NAMES = {"expected": "E[score] (RAIL)", "decoded": "written score (Standard)"}
DPI = 130
# Metrics whose differences are drawn, and which way is better.
COMPARED = {
    **{name: f"{name.capitalize()}, right is better" for name in CORRELATIONS},
    **{name: f"{name.upper()}, left is better" for name in ("rmse", "mae")},
}
COMPARED_PAIRS = {
    "accuracy": "Accuracy, right is better",
    "accuracy_half_ties": "Accuracy, ties as ½, right is better",
    "accuracy_three_way": "Three-way accuracy, right is better",
}
# More different labels than this times the scale's are shown rounded to the scale; means of three scores are not.
MANY = 3


def write_plots(
    folder: str | Path, predictions: Sequence[Prediction], results: Results, settings: Settings
) -> list[Path]:
    """Write the plots of `write_benchmark_plots`, and error_by_benchmark.png. Returns their paths."""
    paths = write_benchmark_plots(folder, predictions, settings)
    return [*paths, _save(folder, "error_by_benchmark", error_by_benchmark(results, settings))]


def write_benchmark_plots(folder: str | Path, predictions: Sequence[Prediction], settings: Settings) -> list[Path]:
    """Write <benchmark>_{scatter,reliability,confusion}.png for each benchmark. Returns their paths."""
    figures: dict[str, Any] = {}
    for name, rows in by_benchmark(predictions).items():
        figures[f"{name}_scatter"] = scatter(name, rows, settings.scale)
        figures[f"{name}_reliability"] = reliability(name, rows, settings)
        figures[f"{name}_confusion"] = confusion(name, rows, settings.scale)
    return [_save(folder, name, figure) for name, figure in figures.items()]


def learning_curve(evaluations: Sequence[Mapping[str, Any]], path: str | Path) -> Path:
    """Held-out Pearson of E[score] and mean reward against the step, from a run's records. Returns the path."""
    figure = _figure(9.0, 3.8)
    names = {"eval/expected/pearson": "Pearson of E[score] and label", "eval/reward": "mean reward of REAL"}
    for number, (name, label) in enumerate(names.items(), start=1):
        axes = figure.add_subplot(1, 2, number)
        points = [(record["step"], record[name]) for record in evaluations if record.get(name) is not None]
        axes.plot([step for step, _ in points], [value for _, value in points], marker="o", color=COLORS["expected"])
        axes.set_xlabel("step")
        axes.set_ylabel(f"{label}, held out")
        axes.grid(alpha=0.3)
        _whole_numbers(axes.xaxis)
    return _save(Path(path).parent, Path(path).stem, figure)


def _save(folder: str | Path, name: str, figure: Any) -> Path:
    path = Path(folder) / f"{name}.png"
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=DPI)
    return path


def scatter(name: str, rows: Sequence[Prediction], scale: ScoreScale) -> Any:
    """E[score] against the label, both with their marginal histograms; invalid rows are counted in the title."""
    figure = _figure(6.0, 6.0)
    grid = figure.add_gridspec(2, 2, width_ratios=(5, 1), height_ratios=(1, 5), wspace=0.03, hspace=0.03)
    main = figure.add_subplot(grid[1, 0])
    top, side = figure.add_subplot(grid[0, 0], sharex=main), figure.add_subplot(grid[1, 1], sharey=main)
    known = np.asarray([(p.label, p.expected) for p in rows if p.expected is not None], dtype=float).reshape(-1, 2)
    labels, scores = known[:, 0], known[:, 1]
    low, high = _limits(scale, scores)
    main.plot([low, high], [low, high], color="0.6", linewidth=1, linestyle="--", zorder=1, label="E[score] = label")
    # Labels repeat: a little horizontal noise shows how many rows are at the same point.
    width = 0.12 * np.diff(scale.values).min() * (len(np.unique(labels)) < len(labels))
    shift = np.random.default_rng(0).uniform(-width, width, len(labels))
    alpha = float(np.clip(60 / np.sqrt(max(1, len(labels))) / 10, 0.12, 0.8))
    main.scatter(labels + shift, scores, s=14, alpha=alpha, color=COLORS["expected"], linewidths=0, zorder=2)
    _mean_line(main, labels, scores, scale)
    if len(labels) == 0:
        _empty(main, "no row has a readable score")
    main.set(xlim=(low, high), ylim=(low, high), xlabel="label (human score)", ylabel="E[score]")
    main.set_xticks(scale.values)
    main.set_yticks(scale.values)
    main.grid(alpha=0.25)
    main.legend(loc="upper left", fontsize=8, framealpha=0.9)
    bins = np.linspace(low, high, 41)
    top.hist([p.label for p in rows], bins=bins, color="0.45")
    side.hist(scores, bins=bins, orientation="horizontal", color=COLORS["expected"])
    for axes in (top, side):
        axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(labelsize=8)
    _whole_numbers(top.yaxis)
    _whole_numbers(side.xaxis)
    top.tick_params(labelbottom=False)
    side.tick_params(labelleft=False)
    top.set_ylabel("rows", fontsize=8)
    side.set_xlabel("rows", fontsize=8)
    missing = len(rows) - len(labels)
    figure.suptitle(f"{name}: {len(labels)} rows" + (f", {missing} without a score are not shown" if missing else ""))
    return figure


def reliability(name: str, rows: Sequence[Prediction], settings: Settings) -> Any:
    """Share of right decisions against their confidence, for both readings; a second panel shows their number."""
    figure = _figure(5.6, 6.4)
    grid = figure.add_gridspec(2, 1, height_ratios=(4, 1), hspace=0.05)
    main = figure.add_subplot(grid[0])
    below = figure.add_subplot(grid[1], sharex=main)
    most, handles = 0, main.plot([0, 1], [0, 1], color="0.6", linewidth=1, linestyle="--", label="calibrated")
    for offset, reading in ((-0.2, "expected"), (0.2, "decoded")):
        pairs = zip(*column(rows, (reading, "ece"), settings))
        known = np.asarray([(a, b) for a, b in pairs if a is not None], dtype=float).reshape(-1, 2)
        bins = reliability_bins(known[:, 0], known[:, 1])
        if not bins:
            continue
        error = sum(b.n * abs(b.confidence - b.accuracy) for b in bins) / sum(b.n for b in bins)
        x, y = [b.confidence for b in bins], [b.accuracy for b in bins]
        main.plot(x, y, color=COLORS[reading], linewidth=1, alpha=0.6)
        # A bin of a few rows says little: the area is its share of the rows.
        sizes = [8 + 250 * b.n / len(known) for b in bins]
        label = f"{NAMES[reading]}: ECE {error:.3f}"
        handles.append(main.scatter(x, y, s=sizes, color=COLORS[reading], alpha=0.8, label=label, zorder=3))
        below.bar(
            [(b.low + b.high) / 2 + offset * (b.high - b.low) for b in bins],
            [b.n for b in bins],
            width=0.4 / N_BINS,
            color=COLORS[reading],
        )
        most = max(most, *(b.n for b in bins))
    if not most:
        _empty(main, "no row has a score with its whole distribution")
    main.set(xlim=(0, 1), ylim=(-0.03, 1.03), ylabel="share of right decisions")
    main.tick_params(labelbottom=False)
    main.grid(alpha=0.25)
    legend = figure.legend(handles=handles, loc="outside lower center", ncols=3, fontsize=8, frameon=False)
    for handle in legend.legend_handles[1:]:
        handle.set_sizes([30])
    _whole_numbers(below.yaxis)
    below.set(xlabel="confidence: probability of the decided label", ylabel="rows", ylim=(0, max(1, most) * 1.1))
    below.grid(alpha=0.25, axis="y")
    figure.suptitle(f"{name}: reliability, {len(rows)} rows")
    return figure


def confusion(name: str, rows: Sequence[Prediction], scale: ScoreScale) -> Any:
    """Decided label against human label, both readings side by side; a column adds up to 1.

    Human labels between two of the scale have separate columns, unless there are too many; then each counts for the
    label nearest to it.
    """
    columns, place, nearest = _columns(rows, scale)
    figure = _figure(3.0 + 0.5 * 2 * max(5, len(columns)), 2.0 + 0.5 * len(scale))
    axes = figure.subplots(1, 2, sharey=True)
    for panel, reading in zip(axes, READINGS):
        counts = np.zeros((len(scale), len(columns)))
        for prediction, i in zip(rows, place):
            score = getattr(prediction, reading)
            if score is not None:
                counts[decide(score, scale), i] += 1
        totals = counts.sum(axis=0, keepdims=True)
        shares = np.divide(counts, totals, out=np.zeros_like(counts), where=totals > 0)
        image = panel.imshow(shares, origin="lower", cmap="Blues", vmin=0, vmax=1, aspect="auto")
        for (k, i), value in np.ndenumerate(counts):
            if value:
                color = "white" if shares[k, i] > 0.55 else "0.2"
                panel.text(i, k, f"{value:.0f}", ha="center", va="center", fontsize=8, color=color)
        if not counts.any():
            _empty(panel, "no row has a score")
        panel.set_xticks(range(len(columns)), [_short(value) for value in columns], fontsize=8)
        panel.set_yticks(range(len(scale)), scale.labels, fontsize=8)
        panel.set_xlabel("label (human score" + (", nearest on the scale)" if nearest else ")"))
        panel.set_title(f"{NAMES[reading]}, {counts.sum():.0f} rows", fontsize=10)
    axes[0].set_ylabel("decided label")
    figure.colorbar(image, ax=axes, label="share of the column", fraction=0.04)
    figure.suptitle(f"{name}: decided label by human label, in rows")
    return figure


def error_by_benchmark(results: Results, settings: Settings) -> Any:
    """RMSE and MAE of both readings with their intervals, a row per benchmark and the average below."""
    everything = [*results.benchmarks, *([results.average] if results.average else [])]
    figure = _figure(8.4, 1.6 + 0.55 * len(everything))
    axes = figure.subplots(1, 2, sharey=True)
    for panel, metric in zip(axes, ("rmse", "mae")):
        for offset, reading in ((-0.13, "expected"), (0.13, "decoded")):
            for i, result in enumerate(everything):
                found = result.scores[reading][metric]
                if found.estimate is None:
                    continue
                if found.low is not None and found.high is not None:
                    panel.plot([found.low, found.high], [i + offset] * 2, color=COLORS[reading], linewidth=2)
                panel.plot(found.estimate, i + offset, marker="o", markersize=5, color=COLORS[reading])
        if all(result.scores[reading][metric].estimate is None for result in everything for reading in READINGS):
            _empty(panel, "no row has a score")
        panel.set_xlabel(f"{metric.upper()} with {100 * settings.confidence:g}% interval")
        panel.set_xlim(left=0)
        panel.grid(alpha=0.25, axis="x")
        panel.spines[["top", "right"]].set_visible(False)
    axes[0].set_yticks(range(len(everything)), [result.name for result in everything])
    axes[0].set_ylim(len(everything) - 0.5, -0.5)
    handles = [axes[0].plot([], [], marker="o", color=COLORS[r], label=NAMES[r])[0] for r in READINGS]
    figure.legend(handles=handles, loc="outside upper center", ncols=2, fontsize=9, frameon=False)
    return figure


def write_differences(
    path: str | Path, compared: Mapping[str, Compared], settings: Settings, metrics: Mapping[str, str] = COMPARED
) -> Path:
    """See `differences`. Returns the path."""
    return _save(Path(path).parent, Path(path).stem, differences(compared, settings, metrics))


def differences(compared: Mapping[str, Compared], settings: Settings, metrics: Mapping[str, str] = COMPARED) -> Any:
    """Differences of metrics (name -> what is said below the panel) with their intervals, against a line at 0.

    A row of panels per pair of runs (its name -> what was compared), a line per benchmark, both readings. A ring has no
    interval; what is undefined is said in words.
    """
    heights = [len(tables) + 1 for tables in compared.values()]
    figure = _figure(1.5 + 2.2 * len(metrics), 1.2 + 0.48 * sum(heights))
    grid = figure.subplots(
        len(compared), len(metrics), squeeze=False, height_ratios=heights, sharex="col", sharey="row"
    )
    for panels, (name, tables) in zip(grid, compared.items()):
        for axes, metric in zip(panels, metrics):
            _differences(axes, tables, metric)
        panels[0].set_yticks(range(len(tables)), list(tables))
        panels[0].set_ylim(len(tables) - 0.5, -0.5)
        panels[0].set_title(name, loc="left", fontsize=9)
    for axes, label in zip(grid[-1], metrics.values()):
        axes.set_xlabel(label, fontsize=9)
        axes.tick_params(axis="x", labelsize=8)
    handles = [grid[0][0].plot([], [], marker="o", color=COLORS[r], label=NAMES[r])[0] for r in READINGS]
    figure.legend(handles=handles, loc="outside lower center", ncols=2, fontsize=9, frameon=False)
    figure.suptitle(f"Differences with {100 * settings.confidence:g}% intervals, paired", fontsize=11)
    return figure


def _differences(axes: Any, compared: Compared, metric: str) -> None:
    axes.axvline(0, color="0.5", linewidth=1, linestyle="--", zorder=1)
    for offset, reading in ((-0.15, "expected"), (0.15, "decoded")):
        for i, table in enumerate(compared.values()):
            found, y, color = table[reading, metric], i + offset, COLORS[reading]
            if found.difference is None:
                place = axes.get_yaxis_transform()
                axes.text(0.5, y, "undefined", transform=place, ha="center", va="center", fontsize=7, color=color)
                continue
            if found.low is not None and found.high is not None:
                axes.plot([found.low, found.high], [y, y], color=color, linewidth=2)
            fill = color if found.low is not None else "white"
            axes.plot(found.difference, y, marker="o", markersize=5, color=color, markerfacecolor=fill)
    axes.grid(alpha=0.25, axis="x")
    axes.spines[["top", "right"]].set_visible(False)


def _figure(width: float, height: float) -> Any:
    # Figure without pyplot: no global state, no display, nothing to close.
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def _limits(scale: ScoreScale, scores: np.ndarray) -> tuple[float, float]:
    """Limits of both axes: the scale, extended to lower values of E[score], which missing mass causes."""
    margin = 0.06 * (scale.values[-1] - scale.values[0])
    return min([scale.values[0], *scores.tolist()]) - margin, scale.values[-1] + margin


def _mean_line(axes: Any, labels: np.ndarray, scores: np.ndarray, scale: ScoreScale) -> None:
    """Mean E[score] per label; labels are rounded to the scale if there are too many."""
    keys, name = labels, "mean per label"
    if len(np.unique(labels)) > MANY * len(scale):
        name += ", rounded"
        keys = np.asarray([scale.values[decide(value, scale)] for value in labels])
    points = [(key, scores[keys == key].mean()) for key in np.unique(keys)]
    if points:
        x, y = zip(*points)
        axes.plot(x, y, color="#b3261e", marker="D", markersize=5, linewidth=1.2, zorder=3, label=name)


def _columns(rows: Sequence[Prediction], scale: ScoreScale) -> tuple[list[float], list[int], bool]:
    """The columns' labels, each row's column, and whether human labels were rounded to the scale."""
    labels = {p.label for p in rows}
    if len(labels) > MANY * len(scale):
        return list(scale.values), [decide(p.label, scale) for p in rows], True
    columns = sorted(labels | set(scale.values))
    return columns, [columns.index(p.label) for p in rows], False


def _whole_numbers(axis: Any) -> None:
    """Ticks for counts."""
    from matplotlib.ticker import MaxNLocator

    axis.set_major_locator(MaxNLocator(nbins=4, integer=True))


def _empty(axes: Any, text: str) -> None:
    axes.text(0.5, 0.5, text, transform=axes.transAxes, ha="center", va="center", color="0.4")


def _short(value: float) -> str:
    return f"{value:.2f}".rstrip("0").rstrip(".")
