"""STS-B as data for the methods: {train,dev,test}.jsonl (prompt, label, group), sft.jsonl (and response).

    python -m examples.stsb.prepare --data_dir DIR --output_dir runs/stsb/data

DIR holds stsb_train.jsonl, stsb_dev.jsonl and stsb_test.jsonl with the columns `instruction` (sentence 1),
`response` (sentence 2), `criteria` and `score` (0 to 5, fractional). Without --data_dir the hub's
PhilipMay/stsb-multi-mt (English) is tried through `datasets`.

The work is done by the package's builder (`python -m real_openrlhf.data stsb --sft` writes the same rows as parquet).
Splits are by pair: a pair of sentences, in either order, is in one split only. If STS-B itself repeats a pair,
the test split keeps it rather than dev, and dev rather than train; the number of dropped rows is reported.
"""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Sequence
from pathlib import Path

from examples.methods.data import judged_rows, warmup_rows, write_jsonl
from real_openrlhf.algo.score_scale import ScoreScale
from real_openrlhf.data.build import SFT, Settings, build
from real_openrlhf.data.builders.stsb import BUILDER
from real_openrlhf.data.judge_prompt import JudgeTemplate
from real_openrlhf.data.rounding import ROUNDINGS
from real_openrlhf.data.row import DataError

logger = logging.getLogger("stsb.prepare")

SPLITS = ("train", "dev", "test")
TEMPLATE = Path(__file__).resolve().parent / "template.txt"


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="prepare: %(message)s")
    local = [f"{split}={args.data_dir / f'stsb_{split}.jsonl'}" for split in SPLITS] if args.data_dir else None
    settings = Settings(
        sources=local or BUILDER.sources,
        scale=ScoreScale.parse(str(BUILDER.scale)),
        template=JudgeTemplate.load(args.template),
        fractions={},
        # STS-B is sorted by source (captions, news, forums): its first rows do not represent the rest.
        shuffle=True,
        sft=True,
        rounding=args.rounding,
        seed=args.seed,
    )
    built = build(BUILDER, settings)
    read = {source["split"]: source["rows"] for source in built.sources}
    args.output_dir.mkdir(parents=True, exist_ok=True)
    for split in SPLITS:
        rows = judged_rows(built.records[split])
        write_jsonl(args.output_dir / f"{split}.jsonl", rows)
        logger.info(
            "%s: %d pairs (%d read, %d repeated ones dropped)", split, len(rows), read[split], read[split] - len(rows)
        )
    rows = warmup_rows(built.records[SFT])
    write_jsonl(args.output_dir / "sft.jsonl", rows)
    logger.info("sft: %d rows with feedback, labels rounded (%s)", len(rows), args.rounding)


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data_dir", type=Path, help="folder with stsb_{train,dev,test}.jsonl; else the hub")
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--template", default=str(TEMPLATE), help="how a pair becomes a prompt")
    parser.add_argument(
        "--rounding",
        choices=tuple(ROUNDINGS),
        default="stochastic",
        help="of the labels in sft.jsonl only. stochastic: 3.8 becomes 4 with probability 0.8, so that the expected "
        "score that the warm-up learns is the label itself; nearest throws the fraction away",
    )
    parser.add_argument("--seed", type=int, default=0, help="of order, rounding and choice of words")
    return parser.parse_args(argv)


if __name__ == "__main__":
    try:
        main()
    except DataError as error:
        sys.exit(f"prepare: {error}")
