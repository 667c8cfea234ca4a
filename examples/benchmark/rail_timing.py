"""Judgements and tokens per second: one-pass RAIL against generate-then-rescore, at several batch sizes, in one run.

    python -m examples.benchmark.rail_timing --batch_sizes 1 8 32 --output FILE \\
        --model JUDGE --benchmark vicuna_bench=FILE --max_samples 160

One pass reads the score distribution while the feedback is generated. The two other ways generate the same feedback
(same seeds) and then send prompt and feedback again to read the distribution: either computed again, as by a second
program that has only the text, or with the batch still in the engine's prefix cache.

The prompts are divided into rounds of the largest batch size, and in each round every batch size judges the same
prompts in every way; the order changes from round to round. What counts are ratios within a round, since other programs
load a shared machine. A first round warms the engine up and does not count. Takes the flags of `real_openrlhf.evaluate`
beside its own two, but for --batch_size. If a judge does not write its score, a second pass after a forced anchor is
needed in any case: the number of such judgements is printed, and the larger it is, the less can be saved.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

from real_openrlhf.common.errors import RunError
from real_openrlhf.data.prompt import Prompt
from real_openrlhf.evals.command import load_benchmarks, make_judge
from real_openrlhf.evaluate import parse_args
from real_openrlhf.judge.judge import Judge
from real_openrlhf.judge.scoring import score_given, score_prompts
from real_openrlhf.judge.types import Judgement

ONE_PASS, RESCORED, CACHED = "one pass", "generate, then rescore", "the same, cached"
# Of a batch size and a way of judging.
Key = tuple[int, str]


@dataclass(frozen=True, kw_only=True)
class Timing:
    """
    seconds, tokens      (batch size, way) -> one entry per round: seconds, and tokens that were generated
    n, n_forced          judgements per batch size and way, and those of one pass whose anchor was forced
    largest_difference   of E[score] between one pass and the other ways
    """

    seconds: dict[Key, list[float]]
    tokens: dict[Key, list[int]]
    n: int
    n_forced: int
    largest_difference: float

    def factors(self, key: Key, other: Key) -> list[float]:
        """By round: how many times longer than `other` it took, ascending."""
        return sorted(a / b for a, b in zip(self.seconds[key], self.seconds[other]))

    def to_json(self) -> dict[str, Any]:
        return {
            "judgements": self.n,
            "forced": self.n_forced,
            "largest_difference": self.largest_difference,
            "ways": [self._of(key) for key in self.seconds],
        }

    def _of(self, key: Key) -> dict[str, Any]:
        size, way = key
        total = sum(self.seconds[key])
        return {
            "batch_size": size,
            "way": way,
            "seconds": [round(each, 4) for each in self.seconds[key]],
            "judgements_per_second": self.n / total,
            "generated_tokens_per_second": sum(self.tokens[key]) / total,
            "times_one_pass": [round(factor, 4) for factor in self.factors(key, (size, ONE_PASS))],
            "median_times_one_pass": median(self.factors(key, (size, ONE_PASS))),
        }


def one_pass(judge: Judge, prompts: Sequence[Prompt]) -> list[Judgement]:
    judged = score_prompts(judge.backend, prompts, judge.sampling, reader=judge.reader, force=judge.force)
    return [row[0] for row in judged]


def generate_then_rescore(judge: Judge, prompts: Sequence[Prompt], *, cached: bool) -> list[Judgement]:
    """The same judgements by a second pass over prompt and feedback."""
    judged = one_pass(judge, prompts)
    read = [i for i, judgement in enumerate(judged) if judgement.position is not None]
    again = score_given(
        judge.backend,
        [prompts[i] for i in read],
        [judged[i].feedback_ids for i in read],
        judge.sampling,
        reader=judge.reader,
        continues=cached,
    )
    for i, judgement in zip(read, again):
        judged[i] = judgement
    return judged


WAYS: dict[str, Callable[[Judge, Sequence[Prompt]], list[Judgement]]] = {
    ONE_PASS: one_pass,
    RESCORED: partial(generate_then_rescore, cached=False),
    CACHED: partial(generate_then_rescore, cached=True),
}


def time_all(
    judge: Judge,
    prompts: Sequence[Prompt],
    batch_sizes: Sequence[int],
    clock: Callable[[], float] = time.perf_counter,
) -> Timing:
    """Whole rounds only. Raises ValueError for fewer prompts than two rounds: the first only warms up."""
    largest = max(batch_sizes)
    uneven = [size for size in batch_sizes if largest % size]
    if uneven:
        raise ValueError(f"--batch_sizes: {uneven[0]} does not divide {largest}; a round is {largest} prompts")
    rounds = [prompts[i : i + largest] for i in range(0, len(prompts) - largest + 1, largest)]
    if len(rounds) < 2:
        raise ValueError(
            f"{len(prompts)} prompts are fewer than two rounds of {largest}; the first only warms up, give more"
        )
    keys: list[Key] = [(size, way) for size in batch_sizes for way in WAYS]
    seconds: dict[Key, list[float]] = {key: [] for key in keys}
    tokens: dict[Key, list[int]] = {key: [] for key in keys}
    difference, n_forced, order = 0.0, 0, keys
    _judge_round(judge, rounds[0], (largest, RESCORED))
    for number, batch in enumerate(rounds[1:]):
        found = {}
        for key in order:
            start = clock()
            found[key] = _judge_round(judge, batch, key)
            seconds[key].append(clock() - start)
            sys.stderr.write(f"round {number}: batches of {key[0]}, {key[1]}: {seconds[key][-1]:.2f} s\n")
        order = order[1:] + order[:1]
        for size in batch_sizes:
            first = found[size, ONE_PASS]
            n_forced += sum(judgement.forced for judgement in first)
            for way in WAYS:
                # Of the feedback, which is the same; what a second pass reads again does not count.
                tokens[size, way].append(sum(judgement.n_generated for judgement in first))
                difference = max(difference, largest_difference(first, found[size, way]))
    n = sum(len(batch) for batch in rounds[1:])
    return Timing(seconds=seconds, tokens=tokens, n=n, n_forced=n_forced, largest_difference=difference)


def _judge_round(judge: Judge, prompts: Sequence[Prompt], key: Key) -> list[Judgement]:
    size, way = key
    return [j for i in range(0, len(prompts), size) for j in WAYS[way](judge, prompts[i : i + size])]


def largest_difference(a: Sequence[Judgement], b: Sequence[Judgement]) -> float:
    """Of E[score], on the judgements that both have; 0 without any."""
    pairs = [(x.expected, y.expected) for x, y in zip(a, b)]
    return max((abs(x - y) for x, y in pairs if x is not None and y is not None), default=0.0)


def shown(timing: Timing, batch_sizes: Sequence[int]) -> str:
    """Markdown: a line per batch size and way, and below it one pass in the smallest batches against the others."""
    lines = ["| batch | way | judgements/s | generated tokens/s | seconds, one pass = 1 |", "|---:|---|---:|---:|---|"]
    for each in timing.to_json()["ways"]:
        factors = each["times_one_pass"]
        lines.append(
            f"| {each['batch_size']} | {each['way']} | {each['judgements_per_second']:.2f} | "
            f"{each['generated_tokens_per_second']:.0f} | {median(factors):.2f} [{factors[0]:.2f}, {factors[-1]:.2f}] |"
        )
    smallest = min(batch_sizes)
    for size in sorted(set(batch_sizes) - {smallest}):
        factors = timing.factors((smallest, ONE_PASS), (size, ONE_PASS))
        lines += ["", f"One pass, batches of {smallest} against {size}: {median(factors):.2f} times the seconds "]
        lines[-1] += f"[{factors[0]:.2f}, {factors[-1]:.2f}]"
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    own = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    own.add_argument("--batch_sizes", type=int, nargs="+", default=[1, 8, 32], help="each divides the largest")
    own.add_argument("--output", type=Path, help="JSON file to write")
    mine, rest = own.parse_known_args(argv)
    args = parse_args(rest)
    try:
        if not args.model or not args.benchmark:
            raise ValueError("--model and --benchmark are required")
        if min(mine.batch_sizes) < 1 or len(set(mine.batch_sizes)) < len(mine.batch_sizes):
            raise ValueError(f"--batch_sizes must be different numbers of at least 1, got {mine.batch_sizes}")
        with make_judge(args) as judge:
            prompts = [prompt for benchmark in load_benchmarks(args, judge) for prompt in benchmark.prompts]
            timing = time_all(judge, prompts, mine.batch_sizes)
            backend = judge.backend_name
    except (ValueError, RunError) as error:
        sys.stderr.write(f"error: {error}\n")
        return 2 if isinstance(error, ValueError) else 1
    length = sum(len(prompt.token_ids) for prompt in prompts) / len(prompts)
    if mine.output is not None:
        content = {"backend": backend, "mean_prompt_tokens": round(length, 1), **timing.to_json()}
        mine.output.parent.mkdir(parents=True, exist_ok=True)
        mine.output.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    print(f"{timing.n} judgements each on {backend}, prompts of {length:.0f} tokens, ", end="")
    print(f"{timing.n_forced} with a forced anchor; E[score] differs by at most {timing.largest_difference:.1e}\n")
    print(shown(timing, mine.batch_sizes))
    return 0


if __name__ == "__main__":
    sys.exit(main())
