"""How much one-pass RAIL saves compared with generate-then-rescore: both in one run, in turns, on the same engine.

    python examples/benchmark/rail_timing.py --model JUDGE --benchmark vicuna_bench=FILE --max_samples 16 --batch_size 4

One pass reads the score distribution while the feedback is generated. The two other ways generate the same feedback
(same seeds) and then send prompt and feedback again to read the distribution: either computed again, as by a second
program that has only the text, or with the batch still in the engine's prefix cache. The order of the ways changes from
batch to batch; a first batch warms the engine up and does not count. Takes the flags of `real_openrlhf.evaluate`. If a
judge does not write its score, a second pass after a forced anchor is needed in any case: the share of such judgements
is printed, and the larger it is, the less can be saved.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from statistics import median

from real_openrlhf.common.errors import RunError
from real_openrlhf.data.prompt import Prompt
from real_openrlhf.evals.command import load_benchmarks, make_judge
from real_openrlhf.evaluate import parse_args
from real_openrlhf.judge.judge import Judge
from real_openrlhf.judge.scoring import score_given, score_prompts
from real_openrlhf.judge.types import Judgement

ONE_PASS, RESCORED, CACHED = "one pass", "generate, then rescore", "the same, cached"


@dataclass(frozen=True, kw_only=True)
class Timing:
    """
    seconds              way -> one entry per timed batch
    n, n_forced          judgements per way, and those whose anchor was forced
    largest_difference   of E[score] between one pass and the other ways
    """

    seconds: dict[str, list[float]]
    n: int
    n_forced: int
    largest_difference: float

    def factor(self, way: str) -> float:
        """How many times longer than one pass it took, over all batches."""
        return sum(self.seconds[way]) / sum(self.seconds[ONE_PASS])

    def factors(self, way: str) -> list[float]:
        """The same per batch, ascending."""
        return sorted(b / a for a, b in zip(self.seconds[ONE_PASS], self.seconds[way]))


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


def time_all(
    judge: Judge, prompts: Sequence[Prompt], batch_size: int, clock: Callable[[], float] = time.perf_counter
) -> Timing:
    """Raises ValueError for fewer than two batches: the first only warms up."""
    batches = [prompts[i : i + batch_size] for i in range(0, len(prompts), batch_size)]
    if len(batches) < 2:
        raise ValueError(f"{len(prompts)} prompts are one batch of {batch_size}; the first only warms up, give more")
    ways = {
        ONE_PASS: one_pass,
        RESCORED: partial(generate_then_rescore, cached=False),
        CACHED: partial(generate_then_rescore, cached=True),
    }
    ways[RESCORED](judge, batches[0])
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    largest, n_forced, order = 0.0, 0, list(ways)
    for batch in batches[1:]:
        found = {}
        for name in order:
            start = clock()
            found[name] = ways[name](judge, batch)
            seconds[name].append(clock() - start)
        order = order[1:] + order[:1]
        n_forced += sum(judgement.forced for judgement in found[ONE_PASS])
        for name in (RESCORED, CACHED):
            pairs = [(a.expected, b.expected) for a, b in zip(found[ONE_PASS], found[name])]
            largest = max([largest, *(abs(a - b) for a, b in pairs if a is not None and b is not None)])
    n = sum(len(batch) for batch in batches[1:])
    return Timing(seconds=seconds, n=n, n_forced=n_forced, largest_difference=largest)


def main(argv: Sequence[str] | None = None) -> int:
    args = parse_args(argv)
    if not args.model or not args.benchmark:
        sys.stderr.write("error: --model and --benchmark are required\n")
        return 2
    try:
        with make_judge(args) as judge:
            prompts = [prompt for benchmark in load_benchmarks(args, judge) for prompt in benchmark.prompts]
            timing = time_all(judge, prompts, args.batch_size)
    except (ValueError, RunError) as error:
        sys.stderr.write(f"error: {error}\n")
        return 2 if isinstance(error, ValueError) else 1
    tokens = sum(len(prompt.token_ids) for prompt in prompts) / len(prompts)
    print(
        f"{timing.n} judgements in {len(timing.seconds[ONE_PASS])} batches of {args.batch_size}, prompts of "
        f"{tokens:.0f} tokens, {timing.n_forced} with a forced anchor"
    )
    for name, seconds in timing.seconds.items():
        print(f"{name:24} {sum(seconds):8.1f} s  {timing.n / sum(seconds):6.2f} judgements/s")
    for name in (RESCORED, CACHED):
        factors = timing.factors(name)
        print(
            f"{name}: {timing.factor(name):.2f} times as long as one pass (per batch {factors[0]:.2f} to "
            f"{factors[-1]:.2f}, median {median(factors):.2f})"
        )
    print(f"E[score] differs by at most {timing.largest_difference:.1e}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
