"""A CSV as people have one: question, answer, score. Its rows are STS-B's, with people's scores from 0 to 5.

    python -m examples.own_data.make_csv --data_dir DIR --output_dir runs/own_data

DIR holds stsb_train.jsonl and stsb_dev.jsonl with the columns `instruction` (sentence 1), `response` (sentence 2) and
`score`. Without --data_dir the hub's PhilipMay/stsb-multi-mt (English) is read. Sentence 1 becomes a request to say
it in other words, sentence 2 the answer. Written are judgments.csv (question, answer, score) of the train split, and
new.csv (question, answer) of the dev split: what a trained judge is to score. Both are cut to short sentences.
"""

from __future__ import annotations

import argparse
import csv
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

from real_openrlhf.data.row import BadRow, DataError
from real_openrlhf.data.sources import read_rows

HUB_ID = "PhilipMay/stsb-multi-mt:en"
QUESTION = "Say it in other words: "
LABELLED, NEW = "judgments.csv", "new.csv"


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data_dir", type=Path, help="folder with stsb_train.jsonl and stsb_dev.jsonl; else the hub")
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--max_words", type=int, default=10, help="longest sentence, so that a tiny model can read it")
    parser.add_argument("--n_new", type=int, default=16, help="rows of new.csv")
    args = parser.parse_args(argv)
    labelled = pairs(_source(args.data_dir, "train"), args.max_words)
    known = {question for question, _, _ in labelled}
    new = [row for row in pairs(_source(args.data_dir, "dev"), args.max_words) if row[0] not in known][: args.n_new]
    args.output_dir.mkdir(parents=True, exist_ok=True)
    write_csv(args.output_dir / LABELLED, ("question", "answer", "score"), labelled)
    write_csv(args.output_dir / NEW, ("question", "answer"), [row[:2] for row in new])
    print(f"{args.output_dir}: {LABELLED} with {len(labelled)} rows, {NEW} with {len(new)}")


def pairs(source: str, max_words: int) -> list[tuple[str, str, float]]:
    """(question, answer, score) of each pair of short sentences, in the source's order. DataError for a bad row."""
    found = []
    for row in read_rows(source):
        if isinstance(row, BadRow):
            raise DataError(str(row))
        names = ("sentence1", "sentence2", "similarity_score") if "sentence1" in row.values else _COLUMNS
        missing = [name for name in names if name not in row.values]
        if missing:
            raise DataError(f"{row.place}: no column {missing[0]!r}; the columns are {list(row.values)}")
        first, second = (" ".join(str(row.values[name]).split()) for name in names[:2])
        if max(len(first.split()), len(second.split())) <= max_words:
            found.append((QUESTION + first, second, float(row.values[names[2]])))
    if not found:
        raise DataError(f"{source}: no pair of sentences of at most {max_words} words; raise --max_words")
    return found


_COLUMNS = ("instruction", "response", "score")


def write_csv(path: Path, header: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(header)
        writer.writerows(rows)


def _source(folder: Path | None, split: str) -> str:
    return f"{HUB_ID}@{split}" if folder is None else str(folder / f"stsb_{split}.jsonl")


if __name__ == "__main__":
    try:
        main()
    except DataError as error:
        sys.exit(f"make_csv: {error}")
