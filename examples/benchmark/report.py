"""Makes benchmark.md and plots from benchmark.json; the file of an unfinished run works too.

python -m examples.benchmark.report --results runs/benchmark/results/benchmark.json
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from statistics import median

from examples.benchmark.flops import needed_tokens, rows
from examples.benchmark.plan import AUTHORS, CENTRE, REAL, STOCK
from examples.benchmark.protocol import CONTESTANTS
from examples.benchmark.results import Record, Results

GIB = 2**30
PHASES = ("old_logprobs", "expected_score", "experience", "forward", "backward", "optimizer")


# -- numbers -----------------------------------------------------------------------------------------------------


def models(records: Iterable[Record]) -> list[str]:
    """The models, in the order in which they were measured."""
    return list(dict.fromkeys(record.model for record in records))


def points(records: Iterable[Record]) -> list[str]:
    return list(dict.fromkeys(record.point for record in records))


def select(
    results: Results, *, model: str, point: str | None = None, contestant: str | None = None, purpose: str = "time"
) -> list[Record]:
    return [
        record
        for record in results.records
        if record.model == model
        and record.purpose == purpose
        and point in (None, record.point)
        and contestant in (None, record.contestant)
    ]


def ratios(
    records: Sequence[Record], against: str, value: Callable[[Record], float] = lambda record: record.total
) -> list[float]:
    """This project's value divided by the other's, one for each round in which both did the same case."""
    found = {(record.round, record.contestant): value(record) for record in records}
    rounds = dict.fromkeys(record.round for record in records)
    return [
        found[name, REAL] / found[name, against]
        for name in rounds
        if (name, REAL) in found and (name, against) in found and found[name, against] > 0
    ]


def memory_ratios(records: Sequence[Record], against: str) -> list[float]:
    return ratios(records, against, lambda record: float(record.peak_bytes))


def gemm_rate(results: Results, model: str) -> float | None:
    """Operations per second: median of the measurements before, in the middle of and after the run."""
    rates = [entry["flops_per_second"] for entry in results.gemm if entry["model"] == model]
    return median(rates) if rates else None


def gemm_share(results: Results, model: str, contestant: str) -> float | None:
    """At the centre: needed operations per second of a step (the median), as a share of the GEMM rate."""
    rate = gemm_rate(results, model)
    records = select(results, model=model, point=CENTRE, contestant=contestant)
    if rate is None or not records:
        return None
    return median(record.needed_flops / record.total for record in records) / rate


def disagreement(results: Results, model: str) -> float | None:
    """Largest relative difference between contestants' summed log-probs of the same rollouts, over all rounds."""
    sums: dict[str, list[float]] = {}
    for record in results.records:
        if record.model == model and "logprob_sum" in record.facts:
            sums.setdefault(record.round, []).append(record.facts["logprob_sum"])
    found = [(max(values) - min(values)) / max(map(abs, values)) for values in sums.values() if len(values) > 1]
    return max(found) if found else None


def spread(values: Sequence[float], digits: int = 2, unit: str = "") -> str:
    """Median and, of several, [least, most]; "-" for none."""
    if not values:
        return "-"
    text = f"{median(values):.{digits}f}{unit}"
    return text if len(values) == 1 else f"{text} [{min(values):.{digits}f}, {max(values):.{digits}f}]"


# -- tables ------------------------------------------------------------------------------------------------------


def table(head: Sequence[str], body: Iterable[Sequence[str]]) -> str:
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    return "\n".join([*lines, *("| " + " | ".join(cells) + " |" for cells in body)])


def centre_table(results: Results, model: str) -> str:
    """Phases in seconds, medians over repeats."""
    body = []
    for contestant in CONTESTANTS:
        records = select(results, model=model, point=CENTRE, contestant=contestant)
        if not records:
            continue
        case = records[0].case
        phases = [[record.seconds[name] for record in records if name in record.seconds] for name in PHASES]
        known = [sum(record.seconds.values()) for record in records]
        rest = [record.total - seconds for record, seconds in zip(records, known)]
        tokens = [case.samples * case.response / record.total for record in records]
        share = gemm_share(results, model, contestant)
        body.append(
            [
                contestant,
                str(len(records)),
                str(case.micro_batch),
                spread([record.total for record in records], 1),
                *(f"{median(seconds):.1f}" if seconds else "" for seconds in phases),
                f"{median(rest):.1f}",
                spread(tokens, 1),
                "-" if share is None else f"{share:.1%}",
            ]
        )
    head = ["", "repeats", "rollouts per micro-batch", "step, s", *(name.replace("_", " ") for name in PHASES)]
    return table([*head, "other", "rollout tokens trained per s", "needed FLOPs, share of GEMM rate"], body)


def points_table(results: Results, model: str) -> str:
    """Every point that was timed: seconds and ratios."""
    body = []
    for point in points(select(results, model=model)):
        records = select(results, model=model, point=point)
        case = records[0].case
        seconds = [[record.total for record in records if record.contestant == name] for name in CONTESTANTS]
        body.append(
            [
                point,
                *(str(n) for n in (case.prompt, case.response, case.samples)),
                f"{needed_tokens(case):,} / {rows(case):,}",
                *(spread(values, 1) for values in seconds),
                *(spread(ratios(records, against), 3) for against in (STOCK, AUTHORS)),
            ]
        )
    head = ["point", "P", "R", "K", "tokens: shared / plain", *(f"{name}, s" for name in CONTESTANTS)]
    return table([*head, "real/openrlhf", "real/authors"], body)


def memory_table(results: Results, model: str) -> str:
    """Micro-batches of K rollouts on all sides."""
    body = []
    of_model = select(results, model=model, purpose="memory")
    for point, again in dict.fromkeys((record.point, record.case.gradient_checkpointing) for record in of_model):
        records = [r for r in of_model if r.point == point and r.case.gradient_checkpointing == again]
        case = records[0].case
        peaks = [[r.peak_bytes / GIB for r in records if r.contestant == name] for name in CONTESTANTS]
        compared = [_across(peaks[0], peaks[i]) for i in (1, 2)]
        body.append(
            [
                *(str(n) for n in (case.prompt, case.response, case.samples)),
                "yes" if again else "no",
                *(spread(values) for values in peaks),
                *compared,
            ]
        )
    head = ["P", "R", "K", "gradient checkpointing", *(f"{name}, GiB" for name in CONTESTANTS)]
    return table([*head, "real/openrlhf", "real/authors"], body)


def _across(ours: Sequence[float], theirs: Sequence[float]) -> str:
    """The ratio of the highest values: memory hardly varies, so the rounds need not be the same."""
    return f"{max(ours) / max(theirs):.3f}" if ours and theirs and max(theirs) > 0 else "-"


def flat_table(results: Results, model: str) -> str:
    """This project's peak at every point, all K rollouts in one micro-batch."""
    body = []
    for point in points(select(results, model=model, contestant=REAL)):
        records = select(results, model=model, point=point, contestant=REAL)
        case, peak = records[0].case, max(record.peak_bytes for record in records)
        logits = 4 * case.samples * case.response * results.about["models"][model]["vocabulary"]
        body.append(
            [
                point,
                *(str(n) for n in (case.prompt, case.response, case.samples)),
                f"{peak / GIB:.2f}",
                f"{logits / GIB:.2f}",
            ]
        )
    return table(["point", "P", "R", "K", "real's peak, GiB", "all response logits once in fp32 would be, GiB"], body)


def gemm_table(results: Results) -> str:
    body = []
    for model in dict.fromkeys(entry["model"] for entry in results.gemm):
        by_time = {e["when"]: f"{e['flops_per_second'] / 1e9:.1f}" for e in results.gemm if e["model"] == model}
        records = select(results, model=model, point=CENTRE, contestant=REAL)
        needs = f"{records[0].needed_flops / 1e12:.2f}" if records else "-"
        body.append([model, *(by_time.get(when, "-") for when in ("before", "middle", "after")), needs])
    return table(["GFLOP/s", "before", "middle", "after", "TFLOP needed by a step at the centre"], body)


def sync_table(results: Results) -> str:
    sync = results.sync
    if sync is None:
        return "Not measured."
    ratio = median(sync["real"]) / median(sync["openrlhf"])
    body = [[side, str(len(found)), spread(found)] for side, found in sync.items() if isinstance(found, list)]
    said = "\n".join(f"- {name}: {value}" for name, value in sync.get("facts", {}).items())
    shown = table(["", "repeats", "seconds"], body)
    return f"{shown}\n\n{sync['model']}; real/openrlhf, ratio of the medians: {ratio:.3f}.\n\n{said}".rstrip()


def aims_table(results: Results) -> str:
    """The aims at the centre, per model, and whether they were met."""
    body: list[list[str]] = []

    def row(what: str, found: float | None, bound: float, at_most: bool = True) -> None:
        met = "not measured" if found is None else "yes" if (found <= bound) == at_most or found == bound else "**no**"
        sign = "at most" if at_most else "at least"
        body.append([what, f"{sign} {bound:g}", "-" if found is None else f"{found:.3f}", met])

    for model in models(results.records):
        centre = select(results, model=model, point=CENTRE)
        for against, bound in ((STOCK, 0.2), (AUTHORS, 0.15)):
            found = ratios(centre, against)
            row(f"{model}: training seconds, real/{against}", median(found) if found else None, bound)
        of_memory = select(results, model=model, purpose="memory")
        for k, again in dict.fromkeys((r.case.samples, r.case.gradient_checkpointing) for r in of_memory):
            mine = [r for r in of_memory if r.case.samples == k and r.case.gradient_checkpointing == again]
            found = memory_ratios(mine, STOCK)
            tail = ", gradient checkpointing" if again else ""
            row(f"{model}: peak memory, real/{STOCK}, K={k}{tail}", median(found) if found else None, 0.5)
        row(f"{model}: needed FLOPs, share of the GEMM rate", gemm_share(results, model, REAL), 0.5, at_most=False)
    sync = results.sync
    row("weight sync, real/openrlhf", median(sync["real"]) / median(sync["openrlhf"]) if sync else None, 0.4)
    return table(["at the centre, medians", "aim", "measured", "met"], body)


# -- the report --------------------------------------------------------------------------------------------------


def text(results: Results) -> str:
    about = results.about
    versions = ", ".join(f"{name} {number}" for name, number in about["versions"].items())
    parts = [
        f"`{about['command']}`: {about['wall_minutes']:g} min of at most {about['minutes']:g}; {about['device']}, "
        f"{about['dtype']}, {about['cpu']}, {about['cores']} cores, {about['memory_gib']} GiB; {versions}; seed "
        f"{about['seed']}, learning rate {about['learning_rate']:g}, `--logits_mb {about['logits_mb']}`."
        + ("" if results.finished else " **The run was not finished.**")
    ]
    if not about["small"]:
        parts.append("## Aims\n" + aims_table(results))
    for model in models(results.records):
        parts.append(f"## {model}: training step\n![seconds per step](step_seconds.png)\n\nAt the centre, by phase:\n")
        parts.append(centre_table(results, model))
        differ = disagreement(results, model)
        if differ is not None:
            parts.append(
                f"Contestants' summed log-probs of the same rollouts differ by at most {differ:.1e}, relative."
            )
        parts.append("Every point; ratios are those of runs of the same round:\n\n" + points_table(results, model))
        parts.append(f"## {model}: peak memory above weights, gradients and optimizer\n")
        if select(results, model=model, purpose="memory"):
            parts.append("Micro-batches of all K rollouts on all sides:\n\n" + memory_table(results, model))
        parts.append(f"This project in the timed steps, K rollouts per micro-batch:\n\n{flat_table(results, model)}")
    parts.append("![ratios](ratios.png)\n\n![memory](memory.png)")
    parts.append("## Matrix products of this machine\n" + gemm_table(results))
    parts.append("## Weight sync\n" + sync_table(results))
    parts.append("## Not measured\n" + not_measured(results))
    parts.append("## What the contestants said of themselves\n" + facts(results))
    return "\n\n".join(parts).replace("\n\n\n", "\n\n") + "\n"


def not_measured(results: Results) -> str:
    lines = [f"- not measured: {entry['what']}: {entry['why']}" for entry in results.missing]
    return "\n".join(lines) if lines else "Everything planned was measured."


def facts(results: Results) -> str:
    """Facts and overrides of each worker; for several models, they differ only in the model's name."""
    lines = []
    for worker, said in results.workers.items():
        lines.append(f"- {worker}")
        lines += [f"  - {name}: {value}" for name, value in said.get("facts", {}).items()]
        lines += [f"  - override: {override}" for override in said.get("overrides", [])]
    return "\n".join(lines) or "Nothing."


def write_report(results: Results, output_dir: Path) -> Path:
    """Writes benchmark.md and the plots; returns the former's path."""
    from examples.benchmark.plots import write_plots

    output_dir.mkdir(parents=True, exist_ok=True)
    write_plots(results, output_dir)
    path = output_dir / "benchmark.md"
    path.write_text(text(results), encoding="utf-8")
    return path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, required=True, help="a run's benchmark.json")
    parser.add_argument("--output_dir", type=Path, help="the folder of --results when not given")
    args = parser.parse_args()
    print(write_report(Results.load(args.results), args.output_dir or args.results.parent))


if __name__ == "__main__":
    main()
