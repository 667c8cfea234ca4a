"""GPT-4's judgements of MT-Bench answers as data for the methods, and Vicuna Bench beside them.

    python -m examples.mtbench.prepare --data_dir DIR --tokenizer MODEL --output_dir runs/mtbench/data

DIR holds mtbench_judgments.jsonl or .jsonl.gz (`real_openrlhf/data/builders/mtbench_pool.py` says which columns) and
perhaps vicuna_eval.json (Vicuna Bench in Prometheus's form). Written are {train,dev,test}.jsonl (prompt, label, group),
sft.jsonl (and response: GPT-4's critique, cut before its own verdict, and the score) and vicuna.jsonl.

Splits are by question: a question's two turns and all answers to it are in one split. Vicuna's scores, 1 to 5, are
stretched to 1 to 10 (y -> 1 + 9 (y - 1) / 4), which changes no correlation; errors on it mean nothing. A question of
Vicuna Bench that is in the training split would be left out. --max_prompt and --max_response keep short rows only.
"""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from examples.methods.data import Rows, judged_rows, short, warmup_rows, write_jsonl
from real_openrlhf.algo.score_scale import ScoreScale
from real_openrlhf.data.build import SFT, Built, Settings, build
from real_openrlhf.data.builders import mtbench_pool, vicuna_bench
from real_openrlhf.data.builders.base import Builder
from real_openrlhf.data.judge_prompt import JudgeTemplate
from real_openrlhf.data.row import DataError
from real_openrlhf.data.tokenizer import load_tokenizer

logger = logging.getLogger("mtbench.prepare")

SPLITS = {"train": 0.6, "dev": 0.15, "test": 0.25}
JUDGMENTS = ("mtbench_judgments.jsonl", "mtbench_judgments.jsonl.gz")
VICUNA = "vicuna_eval.json"
TEMPLATE = Path(__file__).resolve().parent / "template.txt"


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="prepare: %(message)s")
    tokenizer = load_tokenizer(args.tokenizer, trust_remote_code=False, name="--tokenizer")

    def count(text: str) -> int:
        return len(tokenizer.encode(text, add_special_tokens=False))

    built = built_from(mtbench_pool.BUILDER, judgments(args.data_dir), args, sft=True)
    if built.skipped:
        logger.info("%d rows cannot be used, the first: %s", len(built.skipped), built.skipped[0])
    args.output_dir.mkdir(parents=True, exist_ok=True)
    for split in SPLITS:
        write(args, split, judged_rows(built.records.get(split, ())), count, prompt=args.max_prompt)
    limits = {"prompt": args.max_prompt, "response": args.max_response}
    write(args, SFT, warmup_rows(built.records[SFT]), count, **limits)
    vicuna = args.data_dir / VICUNA
    if not vicuna.is_file():
        logger.info("no %s: judged on MT-Bench's held-out questions only", vicuna)
        return
    other = built_from(vicuna_bench.BUILDER, vicuna, args)
    known = {record["judged"]["instruction"].strip() for record in built.records["train"]}
    kept = [r for r in other.records["test"] if r["judged"]["instruction"].strip() not in known]
    if len(kept) < len(other.records["test"]):
        logger.info("%d rows of Vicuna Bench have a question of train", len(other.records["test"]) - len(kept))
    rows = [{**row, "label": stretched(row["label"])} for row in judged_rows(kept)]
    write(args, "vicuna", rows, count, prompt=args.max_prompt_vicuna or args.max_prompt)


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data_dir", type=Path, required=True, help="folder with mtbench_judgments.jsonl.gz")
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--tokenizer", required=True, help="model whose tokens count")
    parser.add_argument("--max_prompt", type=int, help="most tokens of a prompt; longer rows are left out")
    parser.add_argument("--max_prompt_vicuna", type=int, help="the same for Vicuna Bench; else as --max_prompt")
    parser.add_argument("--max_response", type=int, help="most tokens of a critique with its score, in sft.jsonl")
    parser.add_argument("--template", default=str(TEMPLATE), help="how a judged answer becomes a prompt")
    parser.add_argument("--seed", type=int, default=3, help="of splits and order")
    return parser.parse_args(argv)


def judgments(folder: Path) -> Path:
    """DataError when the folder has no such file."""
    for name in JUDGMENTS:
        if (folder / name).is_file():
            return folder / name
    raise DataError(f"--data_dir {folder}: there is no {' or '.join(JUDGMENTS)}")


def built_from(builder: Builder, source: Path, args: argparse.Namespace, *, sft: bool = False) -> Built:
    settings = Settings(
        sources=[str(source)],
        scale=ScoreScale.parse(str(builder.scale)),
        template=JudgeTemplate.load(args.template),
        fractions=SPLITS if sft else builder.fractions,
        shuffle=True,
        sft=sft,
        skip_bad_rows=sft,
        seed=args.seed,
    )
    return build(builder, settings)


def stretched(label: float) -> float:
    """From Vicuna's scale 1-5 to 1-10.

    >>> [stretched(y) for y in (1, 3, 5)]
    [1.0, 5.5, 10.0]
    """
    return 1.0 + 9.0 * (label - 1.0) / 4.0


def write(args: argparse.Namespace, name: str, rows: Rows, count: Callable[[str], int], **limits: int | None) -> None:
    """DataError when no row is short enough."""
    kept = short(rows, count, **limits)
    if not kept:
        given = ", ".join(f"--max_{key} {limit}" for key, limit in limits.items() if limit is not None)
        raise DataError(f"{name}: no row of {len(rows)} is within {given or 'the split'}; raise it, or give more rows")
    write_jsonl(args.output_dir / f"{name}.jsonl", kept)
    questions = len({row["group"] for row in kept})
    logger.info(
        "%s: %d rows of %d questions (%d longer ones left out)", name, len(kept), questions, len(rows) - len(kept)
    )


if __name__ == "__main__":
    try:
        main()
    except DataError as error:
        sys.exit(f"prepare: {error}")
