"""The stand-in for a model that a user has: a tiny one that can compare two sentences and has never seen a score.

    python -m examples.own_data.make_model --data runs/own_data/data/train.parquet --output_dir runs/own_data/base

A tokenizer is made from the training texts, and a model of about a million parameters learns to write which words two
sentences share. What it learns is written by rules (`data/overlap_feedback.py`) for pairs of the training sentences:
those of the data, copies with other words in them, and pairs at random. It holds no score.
"""

from __future__ import annotations

# Before torch, whose OpenMP reads it once.
import real_openrlhf.common.quiet_threads  # noqa: F401

# isort: split
import argparse
import json
import random
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from examples.own_data.make_csv import QUESTION
from examples.quickstart import warmup
from examples.quickstart.make_model import EOS, PAD, make_model
from real_openrlhf.data.judge_prompt import JudgeTemplate
from real_openrlhf.data.overlap_feedback import write_feedback
from real_openrlhf.data.row import BadRow, DataError, lookup
from real_openrlhf.data.sources import read_rows

TEMPLATE = "answer"


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="train.parquet, as `real_openrlhf.data` built it")
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--n_pairs", type=int, default=16000, help="pairs of sentences to learn from")
    parser.add_argument("--max_steps", type=int, default=1000)
    parser.add_argument("--device", default="auto")
    args = parser.parse_args(argv)
    rng = random.Random(args.seed)
    template = JudgeTemplate.load(TEMPLATE)
    rows = [
        {
            "prompt": template.render(instruction=QUESTION + first, response=second),
            "response": write_feedback(first, second, rng),
        }
        for first, second in some_pairs(read_pairs(args.data), args.n_pairs, rng)
    ]
    folder = args.output_dir.with_name(args.output_dir.name + "_start")
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = make_tokenizer([text for row in rows for text in row.values()])
    make_model(tokenizer, seed=args.seed, layers=4, hidden=128).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    (folder / "compare.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    words = ["--model_name_or_path", str(folder), "--data", str(folder / "compare.jsonl")]
    words += ["--output_dir", str(args.output_dir), "--learning_rate", "2e-3", "--warmup_steps", "100"]
    words += ["--batch_size", "64", "--max_steps", str(args.max_steps), "--max_len", "256"]
    warmup.run(warmup.parse_args([*words, "--seed", str(args.seed), "--log_steps", "20", "--device", args.device]))


def read_pairs(source: str) -> list[tuple[str, str]]:
    """The sentences of each row. DataError for a row that make_csv's CSV does not lead to."""
    found = []
    for row in read_rows(source):
        if isinstance(row, BadRow):
            raise DataError(str(row))
        try:
            question, answer = (lookup(row.values, f"judged.{name}") for name in ("instruction", "response"))
        except KeyError as error:
            raise DataError(f"{row.place}: {error.args[0]}") from None
        if not isinstance(question, str) or not question.startswith(QUESTION) or not isinstance(answer, str):
            raise DataError(f"{row.place}: no question as make_csv writes it, beginning with {QUESTION!r}")
        found.append((question.removeprefix(QUESTION), answer))
    return found


def some_pairs(pairs: Sequence[tuple[str, str]], n: int, rng: random.Random) -> Iterator[tuple[str, str]]:
    """n pairs: a third of those given, a third a sentence and a changed copy of it, a third two sentences at random."""
    sentences = sorted({sentence for pair in pairs for sentence in pair})
    words = sorted({word for sentence in sentences for word in sentence.split()})
    for number in range(n):
        first = rng.choice(sentences)
        if number % 3 == 0:
            yield rng.choice(pairs)
        elif number % 3 == 1:
            share = rng.random()
            yield first, " ".join(rng.choice(words) if rng.random() < share else word for word in first.split())
        else:
            yield first, rng.choice(sentences)


def make_tokenizer(texts: Sequence[str]) -> PreTrainedTokenizerFast:
    """Byte-level BPE: it can read any text, and " 4" is one token. Digits stay apart, so that "10" is "1" and "0"."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=4096,
        special_tokens=[PAD, EOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token=PAD, eos_token=EOS, model_max_length=256)


if __name__ == "__main__":
    try:
        main()
    except (DataError, warmup.WarmupError) as error:
        sys.exit(f"make_model: {error}")
