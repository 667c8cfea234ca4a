"""Code that the synthetic tasks share: their files and their command line.

A task draws items, labels them and writes feedback; here these become train.jsonl, valid.jsonl and test.jsonl
(prompt, label), sft.jsonl (prompt, response) and words.txt (every word of the task, one a line).
"""

from __future__ import annotations

import argparse
import itertools
import json
import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol


class Task(Protocol):
    """Items are hashable and have a `prompt`; all random choices use the generator that is passed in."""

    anchor: str  # text before the score

    def draw(self, rng: random.Random) -> Any: ...

    def label(self, item: Any, rng: random.Random) -> int: ...

    def feedback(self, item: Any, rng: random.Random, *, careful: bool) -> str:
        """What one annotator writes, without a score."""
        ...

    def words(self) -> list[str]:
        """Every word of the task, in a fixed order."""
        ...


def jumping(length: int, jumps: Sequence[float], rng: random.Random) -> list[int]:
    """Indices, of `length`, that a sloppy annotator reads. jumps: probabilities of moving on by 1, 2, 3, ... places."""
    steps = range(1, len(jumps) + 1)
    visited, at = [], -1
    while (at := at + rng.choices(steps, jumps)[0]) < length:
        visited.append(at)
    return visited


def unique_items(task: Task, rng: random.Random) -> Iterator[Any]:
    seen: set[Any] = set()
    while True:
        item = task.draw(rng)
        if item not in seen:
            seen.add(item)
            yield item


def write_jsonl(path: Path, rows: Sequence[dict[str, object]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def write_files(output_dir: Path, task: Task, *, seed: int, sizes: dict[str, int], careful_share: float) -> None:
    """All files of a task. sizes: rows of train, valid, test and sft. No prompt of one file occurs in another."""
    if not 0.0 <= careful_share <= 1.0:
        raise ValueError(f"--careful_share must be between 0 and 1, got {careful_share}")
    rng = random.Random(seed)
    items = unique_items(task, rng)
    output_dir.mkdir(parents=True, exist_ok=True)
    (output_dir / "words.txt").write_text("".join(f"{word}\n" for word in task.words()), encoding="utf-8")
    for name in ("test", "valid", "train"):
        drawn = itertools.islice(items, sizes[name])
        write_jsonl(output_dir / f"{name}.jsonl", [{"prompt": i.prompt, "label": task.label(i, rng)} for i in drawn])
    rows: list[dict[str, object]] = []
    for item in itertools.islice(items, sizes["sft"]):
        text = task.feedback(item, rng, careful=rng.random() < careful_share)
        rows.append({"prompt": item.prompt, "response": f"{text} {task.anchor}{task.label(item, rng)}"})
    write_jsonl(output_dir / "sft.jsonl", rows)


def command_line(task: Task, description: str) -> None:
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--n_train", type=int, default=4096)
    parser.add_argument("--n_valid", type=int, default=512)
    parser.add_argument("--n_test", type=int, default=1024)
    parser.add_argument("--n_sft", type=int, default=60000)
    parser.add_argument("--careful_share", type=float, default=0.3, help="share of careful feedback in sft.jsonl")
    args = parser.parse_args()
    sizes = {"train": args.n_train, "valid": args.n_valid, "test": args.n_test, "sft": args.n_sft}
    write_files(args.output_dir, task, seed=args.seed, sizes=sizes, careful_share=args.careful_share)
