"""Writes the data of the judging task: every split, and the words that occur in them.

    python -m examples.judging_task.task --output_dir runs/judging_task/data --seed 0

| file         | rows   | holds                                                                                       |
|--------------|--------|---------------------------------------------------------------------------------------------|
| sft_careful  | 60,000 | careful feedback; 15% longer responses, 15% by writers with one habit of test_writers each  |
| sft          | 16,000 | feedback of a typical annotator: 90% sloppy, 10% careful                                    |
| train        |  8,192 | prompts for RL                                                                              |
| valid        |  1,024 | the same, for settings                                                                      |
| test_id      |  2,000 | the same, for results                                                                       |
| test_rubrics |  2,000 | rubrics with pairs of criteria that meet in no other file                                   |
| test_longer  |  2,000 | responses of 10 to 13 lines instead of 5 to 8                                               |
| test_writers |  2,000 | writers with all three habits: other words, fillers, line numbers that count down           |

Each is FILE.jsonl. No two rows of any files have the same rubric and lines, whatever the line numbers and words.
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from examples.judging_task.annotators import ANCHOR, CAREFUL, SLOPPY, feedback, tally_words
from examples.judging_task.items import (
    CRITERIA,
    FILLERS,
    FLIP,
    FLIP_SYNONYM,
    HOUSE,
    LABELS,
    SYNONYMS,
    TAGS,
    Item,
    TaskConfig,
    Writer,
    draw_item,
    draw_label,
    tally_of,
    true_score,
)
from examples.quickstart.task_files import write_jsonl

USUAL, LONGER = (5, 8), (10, 13)
STRANGERS = Writer(name="strangers", synonyms=0.8, fillers=0.3, downwards=True)
# One habit each: stage 1 shows every habit, and never two together.
GUESTS = (
    Writer(name="synonyms", synonyms=0.8),
    Writer(name="fillers", fillers=0.3),
    Writer(name="downwards", downwards=True),
)


@dataclass(frozen=True, kw_only=True)
class Split:
    """
    rows           how many
    lines          fewest and most lines of a response
    writer         who writes the responses
    unseen         rubrics of pairs that never met
    longer_share   share of responses with LONGER lines
    guest_share    share of responses by GUESTS
    careful_share  share of feedback by the careful annotator; None: no feedback
    """

    rows: int
    lines: tuple[int, int] = USUAL
    writer: Writer = HOUSE
    unseen: bool = False
    longer_share: float = 0.0
    guest_share: float = 0.0
    careful_share: float | None = None


# Tests are drawn first: other sizes of the training files leave them as they are.
SPLITS = {
    "test_id": Split(rows=2000),
    "test_rubrics": Split(rows=2000, unseen=True),
    "test_longer": Split(rows=2000, lines=LONGER),
    "test_writers": Split(rows=2000, writer=STRANGERS),
    "valid": Split(rows=1024),
    "train": Split(rows=8192),
    "sft": Split(rows=16000, careful_share=0.1),
    "sft_careful": Split(rows=60000, careful_share=1.0, longer_share=0.15, guest_share=0.15),
}
TESTS = tuple(name for name in SPLITS if name.startswith("test_"))


def draw_items(split: Split, rng: random.Random, config: TaskConfig, seen: set[object]) -> Iterator[Item]:
    """Items whose content is not in `seen`, which grows."""
    while True:
        lines = LONGER if rng.random() < split.longer_share else split.lines
        writer = rng.choice(GUESTS) if rng.random() < split.guest_share else split.writer
        item = draw_item(rng, config, lines=lines, writer=writer, unseen=split.unseen)
        if item.content not in seen:
            seen.add(item.content)
            yield item


def row_of(item: Item, split: Split, rng: random.Random, config: TaskConfig) -> dict[str, object]:
    """One line of a file: what training reads, then facts for analysis."""
    tally, weights = tally_of(item), dict(item.rubric)
    label = draw_label(tally, rng, config)
    row: dict[str, object] = {"prompt": item.prompt, "label": label}
    if split.careful_share is not None:
        annotator = CAREFUL if rng.random() < split.careful_share else SLOPPY
        row["response"] = f"{feedback(item, annotator, rng)} {ANCHOR}{label}"
        row["annotator"] = annotator.name
    return row | {
        "true_score": round(true_score(tally, config), 4),
        "tally": tally,
        "criteria": [CRITERIA.index(criterion) for criterion, _ in item.rubric],
        "weights": list(weights.values()),
        "tags": list(item.tags),
        "flips": item.shown.count(FLIP),
        "plain_sum": sum(weights.get(shown, 0) for shown in item.shown),
        # Nothing of it is left to chance, and the split's generator stays where it is.
        "careful_feedback": feedback(item, CAREFUL, random.Random(0)),
        "writer": item.writer,
    }


def make_splits(seed: int, rows: dict[str, int], config: TaskConfig) -> dict[str, list[dict[str, object]]]:
    """All files. rows: how many of each split. Every split has a generator of its own."""
    seen: set[object] = set()
    files = {}
    for name, split in SPLITS.items():
        rng = random.Random(f"{seed}/{name}")
        items = draw_items(split, rng, config, seen)
        files[name] = [row_of(next(items), split, rng, config) for _ in range(rows[name])]
    return files


def vocabulary() -> list[str]:
    """Every word of the task, in a fixed order."""
    fixed = ["rubric", "response", "judge", ANCHOR.strip(), FLIP, FLIP_SYNONYM]
    return [*map(str, LABELS), *fixed, *CRITERIA, *SYNONYMS.values(), *FILLERS, *TAGS, *tally_words()]


def count(text: str) -> int:
    if not (text.isdecimal() and int(text) > 0):
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number of at least 1")
    return int(text)


def main() -> None:
    parser = argparse.ArgumentParser(description="Write the data of the judging task.", allow_abbrev=False)
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=0)
    for name, split in SPLITS.items():
        parser.add_argument(f"--n_{name}", type=count, default=split.rows, help=f"rows of {name}.jsonl")
    args = parser.parse_args()
    rows = {name: getattr(args, f"n_{name}") for name in SPLITS}
    files = make_splits(args.seed, rows, TaskConfig())
    try:
        args.output_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        parser.error(f"--output_dir {args.output_dir}: {error.strerror}; give a folder that can be made")
    for name, found in files.items():
        write_jsonl(args.output_dir / f"{name}.jsonl", found)
    (args.output_dir / "words.txt").write_text("".join(f"{word}\n" for word in vocabulary()), encoding="utf-8")


if __name__ == "__main__":
    main()
