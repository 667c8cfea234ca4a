"""What a run of this example came to: results.json, and the same as a table.

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
METRICS = ("pearson", "spearman", "rmse")


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, required=True, help="folder that run.sh wrote")
    args = parser.parse_args(argv)
    results = collect(args.run)
    (args.run / "results.json").write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    print(table(results))


def collect(run: Path) -> dict[str, Any]:
    manifest = _json(run / "data/manifest.json")
    seconds: dict[str, int] = {}
    for line in (run / "wall.tsv").read_text(encoding="utf-8").splitlines():
        what, taken = line.split("\t")
        seconds[what] = int(taken)
    return {
        "rows": {split: counts["rows"] for split, counts in manifest["splits"].items()},
        "feedback ended by": feedback_ends(run / "warmup/feedback.jsonl"),
        "test": {judge: of_test(_json(run / f"eval/{judge}/results.json")) for judge in JUDGES},
        "real less warmup": difference(_json(run / "eval/comparison.json")),
        "largest difference between server and engine": largest_difference(run / "scores.jsonl", run / "served.jsonl"),
        "seconds": seconds,
    }


def feedback_ends(path: Path) -> dict[str, int]:
    """How the feedback ended that the model wrote; see `real_openrlhf.data.completed.Completed`."""
    return dict(Counter(row["ended"] for row in _lines(path) if "ended" in row))


def of_test(results: dict[str, Any]) -> dict[str, Any]:
    found = results["benchmarks"]["test"]
    return {key: value for key, value in found.items() if key in ("n", "n_groups", "metrics", "rates")} or found


def difference(comparison: dict[str, Any]) -> dict[str, Any]:
    (pair,) = comparison["comparisons"]
    return dict(pair["benchmarks"]["test"])


def largest_difference(first: Path, second: Path) -> float | None:
    """Of E[score] on the same rows. ValueError where the files hold others."""
    a, b = _lines(first), _lines(second)
    if [(row["question"], row["answer"]) for row in a] != [(row["question"], row["answer"]) for row in b]:
        raise ValueError(f"{first} and {second} hold other rows")
    scores = [(x["judgement"]["score"], y["judgement"]["score"]) for x, y in zip(a, b)]
    return max((abs(x - y) for x, y in scores if x is not None and y is not None), default=None)


def table(results: dict[str, Any]) -> str:
    return json.dumps(results["real less warmup"], indent=2)


def _json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def _lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


if __name__ == "__main__":
    try:
        main()
    except (OSError, ValueError, KeyError) as error:
        sys.exit(f"report: {type(error).__name__}: {error}")
