"""Charts of a run as SVG, one picture each."""

from __future__ import annotations

import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from real_openrlhf.algo.score_scale import ScaleError, ScoreScale

Line = Mapping[str, Any]
COLORS = ("#1f6fb4", "#d9772b", "#2d8a4e", "#8a56a8", "#b3261e", "#6b6b6b", "#b08900", "#2aa7a7")
# More points than this are drawn as the mean of so many bins, over the range of their values.
MOST = 300
# Scales of more values than this are drawn as lines.
MANY_VALUES = 21


@dataclass(frozen=True, kw_only=True)
class Chart:
    """
    lines    metric -> its name in the legend
    about    a sentence below the picture: what would be a bad sign
    bands    metric -> the metric of its standard deviation, drawn around it
    watches  those that look at these metrics: their warnings are marked
    """

    title: str
    lines: Mapping[str, str]
    about: str = ""
    log: bool = False
    bands: Mapping[str, str] | None = None
    watches: tuple[str, ...] = ()


def points(records: Sequence[Line], metric: str) -> list[tuple[int, float]]:
    """(step, value) where the metric was measured and is finite."""
    return [(record["step"], float(record[metric])) for record in records if _is_number(record.get(metric))]


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def curves(chart: Chart, records: Sequence[Line], warnings: Sequence[Line]) -> str | None:
    """The chart's SVG; None where nothing of it was measured."""
    series = {metric: found for metric in chart.lines if (found := points(records, metric))}
    if not series:
        return None
    figure, axes = _figure()
    for (metric, found), color in zip(series.items(), COLORS):
        if chart.bands and metric in chart.bands:
            _band(axes, found, dict(points(records, chart.bands[metric])), color)
        _curve(axes, found, chart.lines[metric], color)
    positive = [value for found in series.values() for _, value in found if value > 0]
    if chart.log and positive and max(positive) > 20 * min(positive):
        axes.set_yscale("log")
    for step in sorted({w["step"] for w in warnings if w.get("watch") in chart.watches and _is_number(w.get("step"))}):
        axes.axvline(step, color="#b3261e", linewidth=0.8, linestyle=":", zorder=1)
    axes.set_xlabel("step", fontsize=8)
    return _svg(figure, axes, legend=len(series) > 1)


def _curve(axes: Any, found: Sequence[tuple[int, float]], name: str, color: str) -> None:
    parts = _bins(found)
    x = [_mean([step for step, _ in part]) for part in parts]
    if len(parts) < len(found):
        low, high = ([pick(value for _, value in part) for part in parts] for pick in (min, max))
        axes.fill_between(x, low, high, color=color, alpha=0.15, linewidth=0)
    y = [_mean([value for _, value in part]) for part in parts]
    marker = "o" if len(parts) <= 30 else None
    axes.plot(x, y, label=_plain(name), color=color, linewidth=1.3, marker=marker, markersize=2.8, zorder=2)


def _band(axes: Any, found: Sequence[tuple[int, float]], deviation: Mapping[int, float], color: str) -> None:
    known = [(step, value, deviation[step]) for step, value in found if step in deviation]
    parts = _bins(known)
    x, mean, width = ([_mean([row[n] for row in part]) for part in parts] for n in range(3))
    low, high = ([m + sign * w for m, w in zip(mean, width)] for sign in (-1, 1))
    axes.fill_between(x, low, high, color=color, alpha=0.15, linewidth=0)


def _bins(rows: Sequence[Any]) -> list[Sequence[Any]]:
    size = math.ceil(len(rows) / MOST)
    return [rows[start : start + size] for start in range(0, len(rows), size)] if rows else []


def stacked(names: Mapping[str, str], records: Sequence[Line]) -> str | None:
    """Seconds of a step, phase upon phase."""
    used = [name for name in names if points(records, name)]
    if not used:
        return None
    figure, axes = _figure()
    parts = _bins(records)
    x = [_mean([record["step"] for record in part]) for part in parts]
    heights = [
        [_mean([float(r[name]) if _is_number(r.get(name)) else 0.0 for r in part]) for part in parts] for name in used
    ]
    axes.stackplot(x, heights, labels=[names[name] for name in used], colors=COLORS, alpha=0.75, linewidth=0)
    axes.set_xlabel("step", fontsize=8)
    return _svg(figure, axes, legend=True)


def distribution(scale: ScoreScale, evaluations: Sequence[tuple[int, Sequence[Line]]]) -> str | None:
    """How often each score is given: by the labels, and by the judge in these evaluations (mean probability).

    A label between two values of the scale counts for both, as in training. Rows without a distribution are left out
    of the judge's.
    """
    labels = label_shares(scale, evaluations[-1][1]) if evaluations else None
    if labels is None:
        return None
    shown = [("labels", labels)]
    shown += [(f"judge, step {step}", found) for step, rows in evaluations if (found := mean_distribution(scale, rows))]
    figure, axes = _figure()
    colors = (COLORS[5], *(COLORS[1], COLORS[0])[-(len(shown) - 1) :]) if len(shown) > 1 else (COLORS[5],)
    places = range(len(scale))
    for number, ((name, heights), color) in enumerate(zip(shown, colors)):
        if len(scale) > MANY_VALUES:
            axes.plot(scale.values, heights, label=name, color=color, linewidth=1.3)
        else:
            width = 0.8 / len(shown)
            x = [place + (number - (len(shown) - 1) / 2) * width for place in places]
            axes.bar(x, heights, width=width, label=name, color=color)
    if len(scale) <= MANY_VALUES:
        axes.set_xticks(list(places), [_plain(label) for label in scale.labels])
    axes.set_xlabel("score", fontsize=8)
    axes.set_ylabel("share", fontsize=8)
    return _svg(figure, axes, legend=True)


def label_shares(scale: ScoreScale, rows: Sequence[Line]) -> list[float] | None:
    counts, n = [0.0] * len(scale), 0
    for row in rows:
        try:
            target = scale.target(row.get("label"))  # type: ignore[arg-type]
        except (ScaleError, TypeError):
            continue
        counts[target.low] += 1 - target.weight
        counts[target.high] += target.weight
        n += 1
    return [count / n for count in counts] if n else None


def mean_distribution(scale: ScoreScale, rows: Sequence[Line]) -> list[float] | None:
    known = [found for row in rows if (found := probabilities(scale, row)) is not None]
    return [_mean([row[i] for row in known]) for i in range(len(scale))] if known else None


def probabilities(scale: ScoreScale, row: Line) -> list[float] | None:
    """Of the scale's labels, from a line of an evaluation (a list) or of samples.jsonl (by label)."""
    found = row.get("distribution")
    if isinstance(found, Mapping):
        found = [found.get(label) for label in scale.labels]
    if not isinstance(found, list) or len(found) != len(scale) or not all(_is_number(p) for p in found):
        return None
    return [float(p) for p in found]


def _figure() -> tuple[Any, Any]:
    # Not pyplot: no global state, and no display.
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.6, 2.7), layout="constrained")
    axes = figure.add_subplot()
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(labelsize=8)
    axes.yaxis.get_offset_text().set_fontsize(8)
    return figure, axes


def _svg(figure: Any, axes: Any, *, legend: bool) -> str:
    import matplotlib

    if legend:
        handles, names = axes.get_legend_handles_labels()
        # The browser's font may be wider than the one that the picture was laid out with.
        columns = 3 if sum(map(len, names)) <= 55 else 2
        figure.legend(handles=handles, loc="outside upper center", ncols=columns, fontsize=7, frameon=False)
    if axes.get_xlabel() == "step":
        from matplotlib.ticker import MaxNLocator

        axes.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True))
    text = io.StringIO()
    # Text as text, so that a picture is small; the same picture for the same records.
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "real_openrlhf"}):
        figure.savefig(text, format="svg", metadata={"Date": None, "Creator": None})
    return text.getvalue()


def _plain(text: str) -> str:
    """matplotlib reads $...$ as mathematics, and hides what begins with an underscore."""
    return " " * text.startswith("_") + text.replace("$", r"\$")


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
