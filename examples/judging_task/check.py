"""Is it a task worth training on? Ceilings, what the start reaches, and whether the feedback is needed.

    python -m examples.judging_task.check --seeds 0 1 --output_dir runs/judging_task
    python -m examples.judging_task.check --table examples/judging_task/results/start.json

Makes each seed's start and its twin that never saw feedback (warm_up.py), measures them on every split (measure.py),
and writes one JSON. What is there already is not made again.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from scipy import stats

from examples.judging_task import warm_up
from examples.judging_task.items import LABELS, TaskConfig
from examples.judging_task.measure import SPLITS

# Model and ways of judging. Without feedback there is nothing to sample but the score.
MODELS = {"start": ("sampled", "greedy", "careful"), "stage_1": ("sampled",), "score_only": ("greedy",)}


def rule_facts(path: Path) -> dict[str, Any]:
    """What follows from a split's rows without any model."""
    with path.open(encoding="utf-8") as lines:
        rows = [json.loads(line) for line in lines]
    labels = [row["label"] for row in rows]
    config = TaskConfig()
    guesses = {
        "ceiling": [row["true_score"] for row in rows],
        "careful_rounded": [
            min(LABELS[-1], max(LABELS[0], round(config.center + config.slope * row["tally"]))) for row in rows
        ],
        "plain_sum": [row["plain_sum"] for row in rows],
    }
    return {
        "n": len(rows),
        **{name: float(stats.pearsonr(guess, labels).statistic) for name, guess in guesses.items()},
        "labels": {str(label): count / len(rows) for label, count in sorted(Counter(labels).items())},
    }


def of_seed(folder: Path, seed: int, models: Sequence[str]) -> dict[str, Any]:
    """Everything about one seed."""
    warm_up.make_start(folder, seed)
    if "score_only" in models:
        warm_up.make_score_only(folder, seed)
    found: dict[str, Any] = {"rule": {split: rule_facts(folder / f"data/{split}.jsonl") for split in SPLITS}}
    for model in models:
        output = folder / f"{model}.json"
        if not output.is_file():
            paths = ("--model", str(folder / model), "--data", str(folder / "data"), "--output", str(output))
            words = (*paths, "--ways", *MODELS[model])
            warm_up.run(folder / f"{model}_measure.log", "-m", "examples.judging_task.measure", *words)
        found[model] = json.loads(output.read_text(encoding="utf-8"))
    return found


def both(seeds: dict[str, Any], *keys: str) -> str:
    """The value at these keys, of every seed."""
    values = []
    for found in seeds.values():
        for key in keys:
            found = found[key]
        values.append("-" if found is None else f"{found:.3f}")
    return " ".join(values)


def table(results: dict[str, Any]) -> str:
    """Markdown: one row per split, the seeds' values side by side."""
    seeds = results["seeds"]
    (first, *_) = seeds.values()
    columns: dict[str, tuple[str, ...]] = {
        "ceiling": ("rule", "*", "ceiling"),
        "sum without irony": ("rule", "*", "plain_sum"),
        "score alone: E": ("score_only", "*", "greedy", "expected", "pearson"),
        "stage 1: E": ("stage_1", "*", "sampled", "expected", "pearson"),
        "start: sampled score": ("start", "*", "sampled", "decoded", "pearson"),
        "start: E": ("start", "*", "sampled", "expected", "pearson"),
        "start, greedy: E": ("start", "*", "greedy", "expected", "pearson"),
        "start: lines read": ("start", "*", "sampled", "coverage"),
        "start reading careful feedback: E": ("start", "*", "careful", "expected", "pearson"),
    }
    columns = {title: keys for title, keys in columns.items() if keys[0] in first}
    lines = [f"| split | {' | '.join(columns)} |", "|---" * (len(columns) + 1) + "|"]
    for split in SPLITS:
        cells = [both(seeds, *(split if key == "*" else key for key in keys)) for keys in columns.values()]
        lines.append(f"| `{split}` | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description="Check the judging task.", allow_abbrev=False)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS), help="which to make and measure")
    parser.add_argument("--output_dir", type=Path, default=Path("runs/judging_task"))
    parser.add_argument("--table", type=Path, help="print the table of a JSON that is there")
    args = parser.parse_args()
    if args.table:
        print(table(json.loads(args.table.read_text(encoding="utf-8"))))
        return
    results: dict[str, Any] = {"command": shlex.join(["python", "-m", "examples.judging_task.check", *sys.argv[1:]])}
    folders = {seed: args.output_dir.resolve() / f"seed_{seed}" for seed in args.seeds}
    results["seeds"] = {str(seed): of_seed(folder, seed, args.models) for seed, folder in folders.items()}
    path = args.output_dir / "start.json"
    path.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    print(table(results))


if __name__ == "__main__":
    main()
