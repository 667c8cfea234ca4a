"""The judge that comparisons start from: data, a tiny model, then two stages of supervised training.

    python -m examples.judging_task.warm_up --output_dir runs/judging_task/seed_0 --seed 0

Stage 1 learns to read from careful feedback, as a language model brings that skill along. Stage 2 learns the habits of
a typical annotator, who is sloppy: the start. What is there already is not made again.

    data, init, stage_1, start     folders of --output_dir
    score_only                     with --score_only: stage 1 on the same rows without their feedback
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path

from examples.judging_task.annotators import ANCHOR
from examples.quickstart.task_files import write_jsonl

ROOT = Path(__file__).resolve().parents[2]
COMMON = ("--lr_scheduler", "cosine", "--batch_size", "64", "--max_len", "128", "--log_steps", "20", "--device", "cpu")
STAGE_1 = ("--learning_rate", "3e-3", "--warmup_steps", "50", "--max_steps", "800")
STAGE_2 = ("--learning_rate", "5e-4", "--warmup_steps", "10", "--max_steps", "200")


def run(log: Path, *words: str) -> None:
    """A program of this checkout; RuntimeError with the end of its output when it fails."""
    with log.open("w", encoding="utf-8") as output:
        code = subprocess.run([sys.executable, *words], cwd=ROOT, stdout=output, stderr=subprocess.STDOUT).returncode
    if code:
        raise RuntimeError(f"{' '.join(words[:2])} ended with {code}:\n{log.read_text(encoding='utf-8')[-3000:]}")


def train(folder: Path, name: str, *, model: str, data: str, stage: tuple[str, ...], seed: int) -> None:
    """One supervised training, into folder/name."""
    if (folder / name / "config.json").is_file():
        return
    run(
        folder / f"{name}.log",
        *("examples/quickstart/warmup.py", "--model_name_or_path", str(folder / model)),
        *("--data", str(folder / "data" / f"{data}.jsonl"), "--output_dir", str(folder / name)),
        *(*stage, *COMMON, "--seed", str(seed)),
    )


def make_start(folder: Path, seed: int) -> None:
    """data, init, stage_1 and start of one seed."""
    folder.mkdir(parents=True, exist_ok=True)
    # Its words are written last.
    if not (folder / "data/words.txt").is_file():
        task = ("-m", "examples.judging_task.task", "--output_dir", str(folder / "data"), "--seed", str(seed))
        run(folder / "task.log", *task)
    if not (folder / "init/config.json").is_file():
        words = ("--words", str(folder / "data/words.txt"), "--output_dir", str(folder / "init"))
        run(folder / "init.log", "examples/quickstart/make_model.py", *words, "--seed", str(seed))
    train(folder, "stage_1", model="init", data="sft_careful", stage=STAGE_1, seed=seed)
    train(folder, "start", model="stage_1", data="sft", stage=STAGE_2, seed=seed)


def make_score_only(folder: Path, seed: int) -> None:
    """The same model, rows, steps and rates as stage 1, without feedback."""
    with (folder / "data/sft_careful.jsonl").open(encoding="utf-8") as lines:
        rows = [json.loads(line) for line in lines]
    short = [{"prompt": row["prompt"], "response": f"{ANCHOR}{row['label']}"} for row in rows]
    write_jsonl(folder / "data/score_only.jsonl", short)
    train(folder, "score_only", model="init", data="score_only", stage=STAGE_1, seed=seed)


def main() -> None:
    parser = argparse.ArgumentParser(description="Make the judge that comparisons start from.", allow_abbrev=False)
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--score_only", action="store_true", help="also train on the score alone")
    args = parser.parse_args()
    folder = args.output_dir.resolve()
    make_start(folder, args.seed)
    if args.score_only:
        make_score_only(folder, args.seed)


if __name__ == "__main__":
    main()
