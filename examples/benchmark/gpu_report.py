"""Makes gpu.md and gpu.png from gpu.json: tables, aims met or not, what was extrapolated, left out and changed."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from examples.benchmark.flops import Shape, needed
from examples.benchmark.gpu_models import NAMES, SIZES
from examples.benchmark.protocol import Case

logger = logging.getLogger(__name__)

AIMED = ("1.7b", "4b")
LEAST_MFU, MOST_RATIO, MOST_MEMORY = 0.4, 0.39, 0.3
GIB = 2**30


def write_report(results: dict[str, Any], folder: Path) -> str:
    """Add the tables to `results` and to gpu.json, write gpu.md and the plot. Returns the text."""
    import json

    results["table"] = table(results["runs"])
    results["memory"] = memory_table(results["runs"])
    results["extrapolated"] = extrapolated(results["runs"])
    results["aims"] = aims(results)
    text = document(results)
    (folder / "gpu.json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    (folder / "gpu.md").write_text(text, encoding="utf-8")
    try:
        plot(results["table"], folder / "gpu.png")
    except Exception:  # the numbers are saved already, and the machine may not have matplotlib
        logger.warning("no plot", exc_info=True)
    return text


def shape_of(model: str, layers: int) -> Shape:
    size = SIZES[model]
    return Shape(
        vocabulary=size.vocabulary,
        hidden=size.hidden,
        intermediate=size.intermediate,
        layers=layers,
        heads=size.heads,
        kv_heads=size.kv_heads,
        head_dim=size.head_dim,
    )


def plain(case: Mapping[str, Any]) -> Case:
    """The case without gradient checkpointing and micro-batches, on which the needed operations do not depend."""
    return Case(prompt=case["prompt"], response=case["response"], samples=case["samples"], micro_batch=1)


def pairs(runs: Iterable[Mapping[str, Any]]) -> list[tuple[Mapping[str, Any], Mapping[str, Any] | None]]:
    """(this project's run, OpenRLHF's) by model and depth."""
    runs = list(runs)
    theirs = {(r["model"], r["layers"]): r for r in runs if r["contestant"] == "openrlhf"}
    return [(r, theirs.get((r["model"], r["layers"]))) for r in runs if r["contestant"] == "real"]


def _same_size(steps: Iterable[Mapping[str, Any]], step: Mapping[str, Any]) -> Mapping[str, Any] | None:
    return next((s for s in steps if s["kind"] == step["kind"] and plain(s["case"]) == plain(step["case"])), None)


def table(runs: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Timed points; values that OpenRLHF did not measure are None."""
    found = []
    for ours, theirs in pairs(runs):
        shape = shape_of(ours["model"], ours["layers"])
        rate = ours.get("gemm", {}).get("flops_per_second")
        for step in ours["steps"]:
            if step["kind"] == "memory":
                continue
            other = _same_size(theirs["steps"], step) if theirs else None
            achieved = needed(shape, plain(step["case"])) / step["median"]
            sums = [s["facts"].get("logprob_sum") for s in (step, other) if s]
            found.append(
                {
                    "model": ours["model"],
                    "layers": ours["layers"],
                    "kind": step["kind"],
                    "case": step["case"],
                    "real_seconds": step["median"],
                    "openrlhf_seconds": other["median"] if other else None,
                    "openrlhf_case": other["case"] if other else None,
                    "ratio": step["median"] / other["median"] if other else None,
                    "needed_flops_per_second": achieved,
                    "mfu": achieved / rate if rate else None,
                    "real_peak": step["peak_passes"],
                    "openrlhf_peak": other["peak_passes"] if other else None,
                    "logprob_sum_gap": abs(sums[0] - sums[1]) / abs(sums[1]) if len(sums) == 2 and sums[1] else None,
                }
            )
    return found


def memory_table(runs: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Points with all rollouts in one micro-batch and gradient checkpointing, if both sides ran them."""
    found = []
    for ours, theirs in pairs(runs):
        for step in ours["steps"]:
            other = _same_size(theirs["steps"], step) if theirs and step["kind"] == "memory" else None
            if other:
                found.append(
                    {
                        "model": ours["model"],
                        "layers": ours["layers"],
                        "case": step["case"],
                        "real_passes": step["peak_passes"],
                        "openrlhf_passes": other["peak_passes"],
                        "ratio": step["peak_passes"] / other["peak_passes"] if other["peak_passes"] else None,
                        "real_all": step["peak_all"],
                        "openrlhf_all": other["peak_all"],
                        "gradient_bytes": ours["facts"]["gradient_bytes"],
                    }
                )
    return found


def extrapolated(runs: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Steps of the whole depth at the centre, extrapolated linearly from two depths."""
    runs = list(runs)
    found = []
    for model in dict.fromkeys(r["model"] for r in runs):
        lines: dict[str, dict[int, float]] = {}
        rate = case = None
        for run in runs:
            step = next((s for s in run["steps"] if s["kind"] == "centre"), None)
            if run["model"] == model and step and run["layers"] != SIZES[model].layers:
                lines.setdefault(run["contestant"], {})[run["layers"]] = step["median"]
                if run["contestant"] == "real":
                    rate, case = run.get("gemm", {}).get("flops_per_second"), plain(step["case"])
        seconds = {name: _whole(points, SIZES[model].layers) for name, points in lines.items() if len(points) == 2}
        if case is None or "real" not in seconds:
            continue
        achieved = needed(shape_of(model, SIZES[model].layers), case) / seconds["real"]
        found.append(
            {
                "model": model,
                "layers": SIZES[model].layers,
                "from_layers": sorted(lines["real"]),
                "case": vars(replace(case, micro_batch=case.samples)),
                "real_seconds": seconds["real"],
                "openrlhf_seconds": seconds.get("openrlhf"),
                "ratio": seconds["real"] / seconds["openrlhf"] if "openrlhf" in seconds else None,
                "mfu": achieved / rate if rate else None,
            }
        )
    return found


def _whole(points: Mapping[int, float], layers: int) -> float:
    (few, less), (many, more) = sorted(points.items())
    return more + (layers - many) * (more - less) / (many - few)


def aims(results: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The aims as {"aim", "limit", "measured", "met"}; met is None if nothing was measured."""
    found = []
    for model in AIMED:
        name = NAMES[model]
        rows = [r for r in results["table"] if r["model"] == model and r["kind"] == "centre"]
        whole = [r for r in rows if r["layers"] == SIZES[model].layers]
        row = next(iter(whole or [r for r in results["extrapolated"] if r["model"] == model]), None)
        how = "" if whole or row is None else f", extrapolated from {row['from_layers']} layers"
        memory = next((m for m in reversed(results["memory"]) if m["model"] == model), None)
        for what, limit, least, value in (
            (f"{name}: needed FLOPs, share of the matrix rate{how}", LEAST_MFU, True, row and row["mfu"]),
            (f"{name}: step seconds, real/openrlhf{how}", MOST_RATIO, False, row and row["ratio"]),
            (f"{name}: memory of the passes, real/openrlhf", MOST_MEMORY, False, memory and memory["ratio"]),
        ):
            met = None if value is None else (value >= limit if least else value <= limit)
            found.append({"aim": what, "limit": limit, "least": least, "measured": value, "met": met})
    return found


# -- text --------------------------------------------------------------------------------------------------------------


def document(results: Mapping[str, Any]) -> str:
    runs = results["runs"]
    facts: dict[str, Any] = next((r["facts"] for r in runs if "facts" in r), {})
    lines = [
        "# Training step on one GPU",
        "",
        f"`{results['command']}`",
        "",
        f"{facts.get('card', 'no contestant was built')}, {facts.get('dtype', '')}, {results['started']}, "
        f"{results.get('seconds', 0):.0f} s in all; {', '.join(f'{k} {v}' for k, v in results['versions'].items())}. "
        f"PYTORCH_CUDA_ALLOC_CONF={results['alloc_conf'] or 'unset'} on both sides.",
        "",
        "Random weights of real shapes. One prompt of P tokens, K rollouts of R tokens; medians of counted steps. A "
        "step of OpenRLHF holds its log-prob pass. Micro-batches are the largest that fit, by estimate from two small "
        "steps. ckpt: gradient checkpointing.",
        "",
        *_aims(results["aims"]),
        "",
        "## Steps",
        *_rows(
            "model|layers|P, R, K|real s|micro|openrlhf s|micro|ratio|needed TFLOP/s|share of matrix rate"
            "|log-prob sums differ by",
            (
                [
                    NAMES[r["model"]], r["layers"], _size(r["case"]), _number(r["real_seconds"]), _micro(r["case"]),
                    _number(r["openrlhf_seconds"]), _micro(r["openrlhf_case"]), _number(r["ratio"]),
                    _number(r["needed_flops_per_second"] / 1e12, 0), _percent(r["mfu"]),
                    "-" if r["logprob_sum_gap"] is None else f"{r['logprob_sum_gap']:.1e}",
                ]
                for r in results["table"]
            ),
        ),
        "",
        "## Extrapolated to the whole depth",
        "Steps of the whole depth were **not run**: they are on the line through two measured depths.",
        *_rows(
            "model|layers|from|P, R, K|real s|openrlhf s|ratio|share of matrix rate",
            (
                [
                    NAMES[r["model"]], r["layers"], r["from_layers"], _size(r["case"]), _number(r["real_seconds"]),
                    _number(r["openrlhf_seconds"]), _number(r["ratio"]), _percent(r["mfu"]),
                ]
                for r in results["extrapolated"]
            ),
        ),
        "",
        "## Memory, GiB above weights and optimizer",
        "All K rollouts in one micro-batch, gradient checkpointing, gradients included. The optimizer's own peak is "
        "the same for both and is in the last two columns only.",
        *_rows(
            "model|layers|P, R, K|real|openrlhf|ratio|bf16 gradients alone|real, whole step|openrlhf, whole step",
            (
                [
                    NAMES[r["model"]], r["layers"], _size(r["case"]), _gib(r["real_passes"]),
                    _gib(r["openrlhf_passes"]), _number(r["ratio"]), _gib(r["gradient_bytes"]), _gib(r["real_all"]),
                    _gib(r["openrlhf_all"]),
                ]
                for r in results["memory"]
            ),
        ),
        "",
        "## Phases, ms",
        *_rows("run|P, R, K|phases", _phases(runs)),
        "",
        "## Matrix rates",
        *(
            f"- {NAMES[r['model']]}, {r['layers']} layers: {r['gemm']['flops_per_second'] / 1e12:.1f} TFLOP/s in "
            f"{r['gemm']['dtype']}, {r['gemm']['rows']} rows"
            for r in runs
            if "gemm" in r
        ),
        "",
        "## Not measured",
        *_missing(runs),
        "",
        "## What was changed in other people's code",
        *(f"- {c}: {o}" for c, o in dict.fromkeys((r["contestant"], o) for r in runs for o in r.get("overrides", []))),
    ]  # fmt: skip
    for run in runs:
        if "profile" in run:
            found = run["profile"]
            lines += [
                "",
                f"## Profile of a step, {NAMES[run['model']]}",
                f"{found['step_seconds']:.3f} s under the profiler, kernels {found['kernel_seconds']:.3f} s; waits for "
                f"the GPU: {found['syncs']}. The whole: {found['file']}.",
                *_rows(
                    "kernel|ms|calls", ([k["name"][:100], _number(k["ms"], 1), k["calls"]] for k in found["kernels"])
                ),
            ]
    return "\n".join(lines) + "\n"


def _aims(found: Sequence[Mapping[str, Any]]) -> list[str]:
    return _rows(
        "at the centre|aim|measured|met",
        (
            [
                a["aim"],
                f"at {'least' if a['least'] else 'most'} {a['limit']}",
                _number(a["measured"]),
                {True: "yes", False: "**no**", None: "not measured"}[a["met"]],
            ]
            for a in found
        ),
    )


def _phases(runs: Iterable[Mapping[str, Any]]) -> list[list[Any]]:
    return [
        [
            f"{run['contestant']}, {NAMES[run['model']]}, {run['layers']} layers",
            _size(step["case"]) + (", one micro-batch" if step["kind"] == "memory" else ""),
            ", ".join(f"{name} {1e3 * seconds:.1f}" for name, seconds in step["phases"].items()),
        ]
        for run in runs
        for step in run["steps"]
    ]


def _missing(runs: Iterable[Mapping[str, Any]]) -> list[str]:
    found = []
    for run in runs:
        name = f"{run['contestant']}, {NAMES[run['model']]}, {run['layers']} layers"
        found += [f"- {name}, {left['point']}: {left['why']}" for left in run["left_out"]]
        for failed in run["failed"]:
            found.append(f"- {name}, {failed['point']}: failed, {' '.join(failed['error'].split())[:200]}")
    return found or ["- nothing was left out"]


def _rows(head: str, rows: Iterable[Sequence[Any]]) -> list[str]:
    lines = [f"| {' | '.join(str(cell) for cell in row)} |" for row in rows]
    names = head.split("|")
    return ["", f"| {' | '.join(names)} |", f"|{'---|' * len(names)}", *lines] if lines else ["", "nothing"]


def _size(case: Mapping[str, Any]) -> str:
    return f"{case['prompt']}, {case['response']}, {case['samples']}"


def _micro(case: Mapping[str, Any] | None) -> str:
    return "-" if case is None else f"{case['micro_batch']}{' ckpt' if case['gradient_checkpointing'] else ''}"


def _number(value: float | None, digits: int = 3) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.1f}%"


def _gib(value: float) -> str:
    return f"{value / GIB:.2f}"


def plot(rows: Sequence[Mapping[str, Any]], file: Path) -> None:
    """Seconds of both sides, a pair of bars per point."""
    both = [r for r in rows if r["openrlhf_seconds"] is not None]
    if not both:
        return
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 0.5 + 0.45 * len(both)), layout="constrained")
    for offset, name, colour in ((-0.2, "real", "#1f77b4"), (0.2, "openrlhf", "#ff7f0e")):
        places = [i + offset for i in range(len(both))]
        axes.barh(places, [r[f"{name}_seconds"] for r in both], height=0.38, label=name, color=colour)
    axes.set_yticks(range(len(both)), [f"{NAMES[r['model']]}, {r['layers']} layers: {_size(r['case'])}" for r in both])
    axes.invert_yaxis()
    axes.set_xlabel("seconds per step; labels are P, R, K")
    axes.legend()
    figure.savefig(file, dpi=120)
    pyplot.close(figure)
