"""The page of a run: one HTML file without anything outside it, for people who look at a run.

Whatever comes from models or data is text: jinja2 escapes it, pictures are images in which nothing runs, and the page
forbids scripts.
"""

from __future__ import annotations

import base64
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined

from real_openrlhf.common.atomic_file import write_text
from real_openrlhf.controller.output_folder import REPORT_FILE
from real_openrlhf.controller.report import panels
from real_openrlhf.controller.report.charts import Chart, Line, curves, distribution, points, stacked
from real_openrlhf.controller.report.judgements import judgements, number
from real_openrlhf.controller.report.records import Run, read_run

# Metric -> its name in the table.
_TABLE = {
    "eval/reward": "reward of REAL",
    "eval/expected/pearson": "Pearson of E[score]",
    "eval/expected/spearman": "Spearman of E[score]",
    "eval/expected/rmse": "RMSE of E[score]",
    "eval/decoded/pearson": "Pearson of the written score",
    "eval/mass": "mass on the scale",
    "eval/invalid_rate": "share without a score",
}
_FACTS = {
    "model": "actor.model_name_or_path",
    "data": "data.prompt_dataset",
    "held out": "eval.dataset",
    "scale": "real.scale",
    "preset": "real.preset",
    "objective": "real.objective",
    "learning rate": "actor.adam.lr",
    "seed": "train.seed",
}


def write_report(folder: str | Path, path: str | Path | None = None) -> Path:
    """Write the page of the run in this folder, to <folder>/report.html unless a path is given. Returns the path.

    ReportError where the folder is not that of a run. JsonLinesError, OSError: it cannot be read or written.
    """
    path = Path(folder) / REPORT_FILE if path is None else Path(path)
    write_text(path, render(read_run(folder)))
    return path


def render(run: Run) -> str:
    source = resources.files(__package__).joinpath("page.html").read_text(encoding="utf-8")
    template = Environment(autoescape=True, undefined=StrictUndefined).from_string(source)
    return template.render(
        name=run.folder.resolve().name,
        facts=facts(run),
        warnings=warnings(run.warnings),
        table=table(run),
        sections=sections(run),
        judgements=judgements(run),
    )


def facts(run: Run) -> list[tuple[str, str]]:
    lines = [*run.train, *run.evals]
    found = [("steps", str(max((line["step"] for line in lines), default=0)))]
    last = max((t for line in lines if isinstance(t := line.get("time"), (int, float))), default=None)
    if last is not None:
        found.append(("last record", time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(last))))
    named = [(title, run.flag(name)) for title, name in _FACTS.items()]
    return found + [(title, str(value)) for title, value in named if value not in (None, "")]


def warnings(lines: Sequence[Line]) -> list[dict[str, Any]]:
    """One row for each watch, the newest first."""
    last = {str(line.get("watch")): line for line in lines}
    first = {str(line.get("watch")): line for line in reversed(lines)}
    times = Counter(str(line.get("watch")) for line in lines)
    rows = [
        {
            "watch": watch,
            "times": times[watch],
            "first": number(first[watch].get("step")),
            "last": number(line.get("step")),
            "message": str(line.get("message")),
        }
        for watch, line in last.items()
    ]
    return rows[::-1]


def table(run: Run) -> dict[str, Any] | None:
    """Held-out metrics of the first and the last evaluation, their change, and the best evaluation."""
    if not run.evals:
        return None
    first, last = run.evals[0], run.evals[-1]
    columns = [(f"step {first['step']}", first)]
    if last is not first:
        columns.append((f"step {last['step']}", last))
    metric = run.flag("ckpt.best_metric_key")
    best = _best(run.evals, f"eval/{metric}")
    if best is not None and best not in (first, last):
        columns.append((f"best, step {best['step']}", best))
    rows = []
    for name, title in _TABLE.items():
        if not any(name in line for _, line in columns):
            continue
        cells = [_metric(line.get(name)) for _, line in columns]
        rows.append({"title": title, "cells": [*cells, _change(last, name)] if last is not first else cells})
    titles = [title for title, _ in columns] + (["change [95% interval]"] if last is not first else [])
    note = "" if best is None else f"The best evaluation by {metric} is that of step {best['step']}. "
    several = len(panels.benchmarks_of(run.evals)) > 1
    return {"columns": titles, "rows": rows, "note": note + ("Means over the benchmarks." if several else "")}


def _best(evals: Sequence[Line], name: str) -> Line | None:
    known = [line for line in evals if points([line], name)]
    lower = name.endswith(("rmse", "mae", "ece", "rate"))
    return min(known, key=lambda line: line[name] if lower else -line[name]) if known else None


def _change(last: Line, name: str) -> str:
    """Of the last evaluation against the first, if the run measured it."""
    key = name.replace("eval/", "eval/change/", 1)
    parts = [last.get(key), last.get(f"{key}_low"), last.get(f"{key}_high")]
    known = [f"{part:+.3f}" for part in parts if isinstance(part, (int, float))]
    return f"{known[0]} [{known[1]}, {known[2]}]" if len(known) == len(parts) else ""


def _metric(value: Any) -> str:
    return f"{value:.4f}" if isinstance(value, (int, float)) else "undefined"


def sections(run: Run) -> list[dict[str, Any]]:
    held_out = [*panels.HELD_OUT, *panels.by_benchmark(run.evals)]
    return [
        _section("held-out", "Held out", _charts(held_out, run.evals, run.warnings)),
        _section(
            "judging", "Does it still judge?", [*_charts(panels.STILL_JUDGING, run.train, run.warnings), *_scores(run)]
        ),
        _section("training", "Training", _charts(panels.TRAINING, run.train, run.warnings)),
        _section("drift", "Drift", _charts(panels.DRIFT, run.train, run.warnings)),
        _section("speed", "Time", [*_times(run), *_charts(panels.SPEED, run.train, run.warnings)]),
    ]


def _section(id_: str, title: str, charts: Sequence[dict[str, str]]) -> dict[str, Any]:
    return {"id": id_, "title": title, "charts": charts}


def _charts(charts: Iterable[Chart], records: Sequence[Line], warned: Sequence[Line]) -> list[dict[str, str]]:
    drawn = [(chart, curves(chart, records, warned)) for chart in charts]
    return [_picture(chart.title, svg, chart.about, _alt(chart, records)) for chart, svg in drawn if svg is not None]


def _scores(run: Run) -> list[dict[str, str]]:
    """How often each score is given, by benchmark."""
    if run.scale is None or not run.judged:
        return []
    pictures = []
    names = list(dict.fromkeys(str(row.get("benchmark")) for row in run.judged[-1][1]))
    for name in names:
        rows = [(step, [row for row in rows if str(row.get("benchmark")) == name]) for step, rows in run.judged]
        svg = distribution(run.scale, rows)
        if svg is not None:
            about = (
                "Mean probability of each score, and how often the labels have it. A label between two counts for both."
            )
            pictures.append(_picture(f"Scores on held-out prompts: {name}", svg, about, f"scores and labels of {name}"))
    return pictures


def _times(run: Run) -> list[dict[str, str]]:
    svg = stacked(panels.PHASES, run.train)
    return [] if svg is None else [_picture("Seconds of a step", svg, "", "seconds of each phase")]


def _picture(title: str, svg: str, about: str, alt: str) -> dict[str, str]:
    data = base64.b64encode(svg.encode()).decode()
    return {"title": title, "image": f"data:image/svg+xml;base64,{data}", "about": about, "alt": alt}


def _alt(chart: Chart, records: Sequence[Line]) -> str:
    """The first and the last value of each line."""
    ends = [(title, found) for name, title in chart.lines.items() if (found := points(records, name))]
    return "; ".join(
        f"{title}: {found[0][1]:.4g} at step {found[0][0]}, {found[-1][1]:.4g} at step {found[-1][0]}"
        for title, found in ends
    )
