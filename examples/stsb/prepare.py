"""STS-B as data for REAL: {train,dev,test}.jsonl (prompt, label) and sft.jsonl (prompt, response).

    python examples/stsb/prepare.py --data_dir DIR --output_dir runs/stsb/data

DIR holds stsb_train.jsonl, stsb_dev.jsonl and stsb_test.jsonl with the columns `instruction` (sentence 1),
`response` (sentence 2), `criteria` and `score` (0 to 5, fractional). Without --data_dir the hub's
PhilipMay/stsb-multi-mt (English) is tried through `datasets`. GLUE's copy of STS-B will not do: its test
labels are hidden.

Splits are by pair: a pair of sentences, in either order, stays in one split only. Where STS-B itself repeats
a pair, the test split keeps it before dev, and dev before train; the number of dropped rows is reported.
"""

from __future__ import annotations

import argparse
import json
import logging
import math
import random
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from feedback import write_feedback

from real_openrlhf.algo.score_scale import DEFAULT_ANCHOR, ScoreScale

logger = logging.getLogger("stsb.prepare")

SPLITS = ("train", "dev", "test")
SCALE = ScoreScale.parse("0-5")
HUB_ID = "PhilipMay/stsb-multi-mt"
COLUMNS = ("instruction", "response", "criteria", "score")
SYSTEM = "You compare two sentences."
TEMPLATE = (
    "Sentence 1: {first}\nSentence 2: {second}\nScore their {criteria}, 0 to 5. "
    'Compare the words and end with "' + DEFAULT_ANCHOR + 'N".'
)


class DataError(ValueError):
    """The data cannot be used; the message names file, row and column."""


@dataclass(frozen=True, kw_only=True)
class Pair:
    """Two sentences and their mean human similarity on 0 to 5."""

    first: str
    second: str
    criteria: str
    score: float

    @property
    def key(self) -> tuple[str, str]:
        """The same for both orders, and whatever the case and the spacing."""
        one, two = sorted(" ".join(text.lower().split()) for text in (self.first, self.second))
        return one, two


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="prepare: %(message)s")
    raw = {split: read_split(args.data_dir, split) for split in SPLITS}
    splits, dropped = separate(raw)
    for pairs in splits.values():
        # STS-B is sorted by source (captions, news, forums): its first rows stand for nothing else.
        random.Random(args.seed).shuffle(pairs)
    args.output_dir.mkdir(parents=True, exist_ok=True)
    for split, pairs in splits.items():
        rows = [{"prompt": make_prompt(pair), "label": pair.score} for pair in pairs]
        write_jsonl(args.output_dir / f"{split}.jsonl", rows)
        logger.info(
            "%s: %d pairs (%d read, %d repeated ones dropped)", split, len(rows), len(raw[split]), dropped[split]
        )
    rows = warmup_rows(splits["train"], rounding=args.rounding, seed=args.seed)
    write_jsonl(args.output_dir / "sft.jsonl", rows)
    logger.info("sft: %d rows with feedback, labels rounded (%s)", len(rows), args.rounding)


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data_dir", type=Path, help="folder with stsb_{train,dev,test}.jsonl; else the hub")
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument(
        "--rounding",
        choices=tuple(ROUNDINGS),
        default="stochastic",
        help="of the labels in sft.jsonl only. stochastic: 3.8 becomes 4 with probability 0.8, so that the expected "
        "score that the warm-up learns is the label itself; nearest throws the fraction away",
    )
    parser.add_argument("--seed", type=int, default=0, help="of order, rounding and choice of words")
    return parser.parse_args(argv)


def read_split(data_dir: Path | None, split: str) -> list[Pair]:
    """Raises DataError when the split cannot be had, is empty or has a bad row."""
    if data_dir is None:
        name, rows = f"{HUB_ID} [{split}]", read_hub(split)
    else:
        path = data_dir / f"stsb_{split}.jsonl"
        name, rows = str(path), read_jsonl(path)
    pairs = [parse_row(row, f"{name}, row {number}") for number, row in enumerate(rows, start=1)]
    if not pairs:
        raise DataError(f"{name} is empty")
    return pairs


def read_jsonl(path: Path) -> list[Any]:
    if not path.is_file():
        raise DataError(f"--data_dir: {path} does not exist")
    rows = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError as error:
            raise DataError(f"{path}, row {number}: broken JSON ({error})") from error
    return rows


def read_hub(split: str) -> list[Any]:
    from datasets import load_dataset

    try:
        rows = load_dataset(HUB_ID, name="en", split=split)
    except Exception as error:  # the hub's own kinds, which differ between versions
        raise DataError(
            f"{HUB_ID} cannot be had from the hub ({type(error).__name__}: {error}); use --data_dir"
        ) from error
    return [
        {
            "instruction": row["sentence1"],
            "response": row["sentence2"],
            "criteria": "semantic similarity",
            "score": row["similarity_score"],
        }
        for row in rows
    ]


def parse_row(row: Any, where: str) -> Pair:
    """Raises DataError, with `where` and the column in the message, rather than guess."""
    if not isinstance(row, dict):
        raise DataError(f"{where}: expected an object, got {type(row).__name__}")
    for column in COLUMNS:
        if column not in row:
            raise DataError(f"{where}: no column {column!r}, only {sorted(row)}")
    for column in COLUMNS[:3]:
        if not isinstance(row[column], str) or not row[column].strip():
            raise DataError(f"{where}, column {column!r}: expected text, got {row[column]!r}")
    score = row["score"]
    if isinstance(score, bool) or not isinstance(score, (int, float)):
        raise DataError(f"{where}, column 'score': expected a number, got {score!r}")
    try:
        SCALE.target(float(score))
    except ValueError as error:
        raise DataError(f"{where}, column 'score': {error}") from error
    first, second = (" ".join(row[column].split()) for column in ("instruction", "response"))
    return Pair(first=first, second=second, criteria=row["criteria"].strip(), score=float(score))


def separate(raw: dict[str, list[Pair]]) -> tuple[dict[str, list[Pair]], dict[str, int]]:
    """(splits without a common pair, rows dropped per split). Test keeps a pair before dev, dev before train."""
    seen: set[tuple[str, str]] = set()
    kept: dict[str, list[Pair]] = {}
    for split in reversed(SPLITS):
        kept[split] = []
        for pair in raw[split]:
            if pair.key not in seen:
                seen.add(pair.key)
                kept[split].append(pair)
    return {split: kept[split] for split in SPLITS}, {split: len(raw[split]) - len(kept[split]) for split in SPLITS}


def make_prompt(pair: Pair) -> list[dict[str, str]]:
    text = TEMPLATE.format(first=pair.first, second=pair.second, criteria=pair.criteria)
    return [{"role": "system", "content": SYSTEM}, {"role": "user", "content": text}]


def warmup_rows(pairs: Sequence[Pair], *, rounding: str, seed: int) -> list[dict[str, Any]]:
    """prompt and response. Each pair has its own random numbers: a row does not depend on its place."""
    rows = []
    for pair in pairs:
        rng = random.Random(f"{seed}|{pair.first}|{pair.second}")
        feedback = write_feedback(pair.first, pair.second, rng)  # before the label is looked at
        response = f"{feedback} {DEFAULT_ANCHOR}{ROUNDINGS[rounding](pair.score, rng)}"
        rows.append({"prompt": make_prompt(pair), "response": response})
    return rows


def round_stochastic(score: float, rng: random.Random) -> int:
    """3.8 becomes 4 with probability 0.8, else 3: the mean is the score itself."""
    low = math.floor(score)
    return low + (rng.random() < score - low)


def round_nearest(score: float, rng: random.Random) -> int:
    """Halves go up. `rng` is not used."""
    return math.floor(score + 0.5)


ROUNDINGS: dict[str, Callable[[float, random.Random], int]] = {
    "stochastic": round_stochastic,
    "nearest": round_nearest,
}


def write_jsonl(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


if __name__ == "__main__":
    try:
        main()
    except DataError as error:
        sys.exit(f"prepare: {error}")
