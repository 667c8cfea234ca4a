"""Seconds per step by phase, ratios against P, R and K, and memory."""

from __future__ import annotations

from pathlib import Path
from statistics import median
from typing import Any

from examples.benchmark.plan import AUTHORS, CENTRE, REAL, STOCK
from examples.benchmark.protocol import CONTESTANTS
from examples.benchmark.report import GIB, PHASES, models, points, ratios, select
from examples.benchmark.results import Results

NAMES = {REAL: "this project", STOCK: "OpenRLHF", AUTHORS: "authors' passes"}
COLORS = {REAL: "#1f6fb4", STOCK: "#d9772b", AUTHORS: "#7a7a7a"}
PHASE_COLORS = dict(
    zip((*PHASES, "other"), ("#8c6bb1", "#d95f7f", "#c9b037", "#4a90d9", "#2c5f8a", "#5aa469", "#bbbbbb"))
)
FACTORS = (
    ("P", "prompt", "tokens of the prompt"),
    ("R", "response", "tokens per rollout"),
    ("K", "samples", "rollouts"),
)
DPI = 110


def write_plots(results: Results, folder: Path) -> list[Path]:
    """Draw figures of the results; returns their paths."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    paths = []
    for name, draw in (("step_seconds", step_seconds), ("ratios", ratio_lines), ("memory", memory)):
        figure = draw(results)
        paths.append(folder / f"{name}.png")
        figure.savefig(paths[-1], dpi=DPI)
        plt.close(figure)
    return paths


def _figure(columns: int, width: float, height: float, **more: Any) -> tuple[Any, list[Any]]:
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, columns, figsize=(width, height), squeeze=False, constrained_layout=True, **more)
    return figure, list(axes[0])


def _title(results: Results) -> str:
    about = results.about
    return f"{about['device']}, {about['dtype']}, {about['cores']} cores"


def step_seconds(results: Results) -> Any:
    """One bar per contestant at the centre, with medians of the phases; whiskers show the fastest and slowest step."""
    shown = [name for name in models(results.records) if select(results, model=name, point=CENTRE)]
    figure, axes = _figure(max(1, len(shown)), 5.2 * max(1, len(shown)), 3.4)
    used: dict[str, Any] = {}
    for ax, model in zip(axes, shown):
        places = [name for name in CONTESTANTS if select(results, model=model, point=CENTRE, contestant=name)]
        longest = 0.0
        for y, contestant in enumerate(places):
            records = select(results, model=model, point=CENTRE, contestant=contestant)
            totals = [record.total for record in records]
            left = 0.0
            for phase in (*PHASES, "other"):
                if phase == "other":
                    seconds = max(0.0, median(totals) - left)
                else:
                    seconds = median(record.seconds.get(phase, 0.0) for record in records)
                if seconds:
                    used[phase] = ax.barh(y, seconds, left=left, color=PHASE_COLORS[phase], height=0.6)
                left += seconds
            middle, end = median(totals), max(totals)
            ax.errorbar(middle, y, xerr=[[middle - min(totals)], [end - middle]], color="black", capsize=4, lw=1)
            ax.annotate(f"{middle:.3g} s", (end, y), xytext=(7, 0), textcoords="offset points", va="center")
            longest = max(longest, end)
        case = select(results, model=model, point=CENTRE)[0].case
        ax.set_yticks(range(len(places)), [NAMES[name] for name in places])
        ax.invert_yaxis()
        ax.set_xlim(0, 1.2 * longest)
        ax.set_xlabel("seconds per training step, median")
        ax.set_title(f"{model}\nP={case.prompt}, R={case.response}, K={case.samples}", fontsize=10)
        ax.spines[["top", "right"]].set_visible(False)
    order = [phase for phase in (*PHASES, "other") if phase in used]
    if order:
        labels = [phase.replace("_", " ") for phase in order]
        figure.legend([used[p] for p in order], labels, loc="outside lower center", ncols=4, fontsize=9)
    figure.suptitle(f"A training step by phase ({_title(results)})", fontsize=11)
    return figure


def ratio_lines(results: Results) -> Any:
    """One panel per factor: this project's seconds divided by the others', the centre among the points."""
    figure, axes = _figure(len(FACTORS), 11.0, 3.8, sharey=True)
    highest = 0.0
    for ax, (letter, key, what) in zip(axes, FACTORS):
        ticks: set[int] = set()
        for style, marker, model in zip(("-", "--", ":"), "os^", models(results.records)):
            of_model = select(results, model=model)
            for against in (STOCK, AUTHORS):
                line = []
                for point in points(of_model):
                    if point != CENTRE and not point.startswith(f"{letter}="):
                        continue
                    records = select(results, model=model, point=point)
                    found = ratios(records, against)
                    if found:
                        line.append((getattr(records[0].case, key), median(found)))
                if not line:
                    continue
                xs, ys = zip(*sorted(line))
                label = f"{model}, against {NAMES[against]}"
                ax.plot(xs, ys, style, marker=marker, ms=5, color=COLORS[against], label=label)
                ticks |= set(xs)
                highest = max(highest, *ys)
        ax.set_xscale("log", base=2)
        ax.set_xticks(sorted(ticks), [str(x) for x in sorted(ticks)])
        ax.minorticks_off()
        ax.set_xlabel(f"{letter}: {what}")
        ax.grid(alpha=0.3)
    axes[0].set_ylabel("seconds per step,\nthis project / other (lower is faster)")
    axes[0].set_ylim(0, 1.15 * highest if highest else 1)
    handles, labels = max((ax.get_legend_handles_labels() for ax in axes), key=lambda found: len(found[1]))
    if handles:
        figure.legend(handles, labels, loc="outside lower center", ncols=2, fontsize=9)
    figure.suptitle(f"One factor at a time around the centre ({_title(results)})", fontsize=11)
    return figure


def memory(results: Results) -> Any:
    """Left: all sides with K rollouts per micro-batch. Right: this project at every timed point."""
    figure, (left, right) = _figure(2, 11.0, 4.2)
    groups = dict.fromkeys(
        (r.model, r.case.samples, r.case.gradient_checkpointing) for r in results.records if r.purpose == "memory"
    )
    for i, (model, k, again) in enumerate(groups):
        for j, contestant in enumerate(CONTESTANTS):
            records = select(results, model=model, contestant=contestant, purpose="memory")
            peaks = [
                r.peak_bytes / GIB for r in records if (r.case.samples, r.case.gradient_checkpointing) == (k, again)
            ]
            if peaks:
                bar = left.bar(i + 0.27 * (j - 1), max(peaks), 0.25, color=COLORS[contestant])
                left.bar_label(bar, fmt="%.3g", fontsize=8)
    left.set_xticks(
        range(len(groups)),
        [f"{model}\nK={k}" + ("\ncheckpointing" if again else "") for model, k, again in groups],
        fontsize=8,
    )
    from matplotlib.patches import Patch

    patches = [Patch(color=COLORS[name], label=NAMES[name]) for name in CONTESTANTS]
    left.legend(handles=patches, fontsize=8, loc="best")
    left.margins(y=0.25)
    left.set_ylabel("peak above weights, gradients\nand optimizer, GiB")
    left.set_title("K rollouts per micro-batch on all sides", fontsize=10)
    bars = [
        (f"{model}, {point}", max(r.peak_bytes for r in select(results, model=model, point=point, contestant=REAL)))
        for model in models(results.records)
        for point in points(select(results, model=model, contestant=REAL))
    ]
    drawn = right.barh(range(len(bars)), [peak / GIB for _, peak in bars], color=COLORS[REAL], height=0.6)
    right.bar_label(drawn, fmt="%.3g", fontsize=8, padding=3)
    right.set_yticks(range(len(bars)), [name for name, _ in bars], fontsize=8)
    right.invert_yaxis()
    right.locator_params(axis="x", nbins=5)
    right.margins(x=0.15)
    right.set_xlabel("peak, GiB")
    right.set_title(f"this project, --logits_mb {results.about['logits_mb']}", fontsize=10)
    for ax in (left, right):
        ax.spines[["top", "right"]].set_visible(False)
    figure.suptitle(f"Peak memory of a step ({_title(results)})", fontsize=11)
    return figure
