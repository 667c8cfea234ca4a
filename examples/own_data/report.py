"""What a run of this example came to: results.json, and a part of it as a table.

python -m examples.own_data.report --run runs/own_data/seed_0
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

JUDGES = ("warmup", "real")
READINGS = {"expected": "E[score]", "decoded": "as written"}
METRICS = ("pearson", "spearman", "rmse")
# Digits kept: more than any interval here is worth.
DIGITS = 4


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, required=True, help="folder that run.sh wrote")
    args = parser.parse_args(argv)
    results = collect(args.run)
    (args.run / "results.json").write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    print(table(results))


def collect(run: Path) -> dict[str, Any]:
    manifest = _json(run / "data/manifest.json")
    evaluations = {judge: _json(run / f"eval/{judge}/results.json")["benchmarks"]["test"] for judge in JUDGES}
    (compared,) = _json(run / "eval/comparison.json")["comparisons"]
    return {
        "rows": {split: counts["rows"] for split, counts in manifest["splits"].items()},
        "feedback of the warm-up, by how it ended": feedback_ends(run / "warmup/feedback.jsonl"),
        "test": {
            judge: _rounded({k: found[k] for k in ("n", "scores", "rates")}) for judge, found in evaluations.items()
        },
        "real less warmup": _rounded(compared["benchmarks"]["test"]),
        "largest difference between server and engine": largest_difference(run / "scores.jsonl", run / "served.jsonl"),
    }


def feedback_ends(path: Path) -> dict[str, int]:
    """How the feedback ended that the model wrote; see `real_openrlhf.data.completed.Completed`."""
    return dict(Counter(row["ended"] for row in _lines(path) if "ended" in row))


def largest_difference(first: Path, second: Path) -> float | None:
    """Of E[score] on the same rows; None without a row that both have scored. ValueError for files of other rows."""
    a, b = _lines(first), _lines(second)
    if [(row["question"], row["answer"]) for row in a] != [(row["question"], row["answer"]) for row in b]:
        raise ValueError(f"{first} and {second} hold other rows")
    scores = [(x["judgement"]["score"], y["judgement"]["score"]) for x, y in zip(a, b)]
    return max((abs(x - y) for x, y in scores if x is not None and y is not None), default=None)


def table(results: dict[str, Any]) -> str:
    """Markdown: metrics of both judges on the test split, and their difference with its interval."""
    lines = [
        f"{results['test']['real']['n']} test rows; intervals: 95%, bootstrap over questions",
        "",
        "| score | metric | warm-up | REAL | difference |",
        "|---|---|---:|---:|---:|",
    ]
    for reading, name in READINGS.items():
        for metric in METRICS:
            cells = [_cell(results["test"][judge]["scores"][reading][metric], "estimate") for judge in JUDGES]
            cells.append(_cell(results["real less warmup"][f"{reading}/{metric}"], "difference"))
            lines.append(f"| {name} | {metric} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _cell(found: dict[str, Any], name: str) -> str:
    if found[name] is None:
        return "undefined"
    sign = "+" if name == "difference" else ""
    bounds = "" if found["low"] is None else f" [{found['low']:{sign}.3f}, {found['high']:{sign}.3f}]"
    return f"{found[name]:{sign}.3f}{bounds}"


def _rounded(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _rounded(inner) for name, inner in value.items()}
    return round(value, DIGITS) if isinstance(value, float) else value


def _json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def _lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


if __name__ == "__main__":
    try:
        main()
    except (OSError, ValueError, KeyError) as error:
        sys.exit(f"report: {type(error).__name__}: {error}")
