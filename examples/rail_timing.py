"""How much one-pass RAIL saves against generate-then-rescore: both in one run, turn by turn, on the same engine.

    python examples/rail_timing.py --model JUDGE --benchmark vicuna_bench=FILE --max_samples 16 --batch_size 4

One pass reads the score distribution while the feedback is generated. The other way generates the same feedback (same
seeds) and then sends prompt and feedback once more to read the distribution. Which of the two begins alternates from
batch to batch; a first batch warms the engine up and does not count. Takes the flags of `real_openrlhf.evaluate`.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from statistics import median

from real_openrlhf.data.prompt import Prompt
from real_openrlhf.errors import RunError
from real_openrlhf.evaluate import load_benchmarks, make_judge, parse_args
from real_openrlhf.judge.judge import Judge
from real_openrlhf.judge.scoring import score_given, score_prompts


@dataclass(frozen=True, kw_only=True)
class Timing:
    """Seconds per batch, one entry per timed batch; largest difference of E[score] between the two ways."""

    one_pass: list[float]
    rescored: list[float]
    n: int
    largest_difference: float

    @property
    def factor(self) -> float:
        """How many times longer generate-then-rescore took, over all batches."""
        return sum(self.rescored) / sum(self.one_pass)


def one_pass(judge: Judge, prompts: Sequence[Prompt]) -> list[float | None]:
    """E[score] per prompt."""
    judged = score_prompts(judge.backend, prompts, judge.sampling, reader=judge.reader, force=judge.force)
    return [row[0].expected for row in judged]


def generate_then_rescore(judge: Judge, prompts: Sequence[Prompt]) -> list[float | None]:
    """The same by a second pass over prompt and feedback."""
    judged = [
        row[0] for row in score_prompts(judge.backend, prompts, judge.sampling, reader=judge.reader, force=judge.force)
    ]
    read = [i for i, judgement in enumerate(judged) if judgement.position is not None]
    again = score_given(
        judge.backend,
        [prompts[i] for i in read],
        [judged[i].feedback_ids for i in read],
        judge.sampling,
        reader=judge.reader,
    )
    scores: list[float | None] = [None] * len(prompts)
    for i, judgement in zip(read, again):
        scores[i] = judgement.expected
    return scores


def time_both(
    judge: Judge, prompts: Sequence[Prompt], batch_size: int, clock: Callable[[], float] = time.perf_counter
) -> Timing:
    """Raises ValueError for fewer than two batches: the first only warms up."""
    batches = [prompts[i : i + batch_size] for i in range(0, len(prompts), batch_size)]
    if len(batches) < 2:
        raise ValueError(f"{len(prompts)} prompts are one batch of {batch_size}; the first only warms up, give more")
    generate_then_rescore(judge, batches[0])
    seconds: dict[str, list[float]] = {"one": [], "two": []}
    largest = 0.0
    for number, batch in enumerate(batches[1:]):
        ways = [("one", partial(one_pass, judge, batch)), ("two", partial(generate_then_rescore, judge, batch))]
        scores = {}
        for name, way in ways if number % 2 == 0 else ways[::-1]:
            start = clock()
            scores[name] = way()
            seconds[name].append(clock() - start)
        pairs = [(a, b) for a, b in zip(scores["one"], scores["two"]) if a is not None and b is not None]
        largest = max([largest, *(abs(a - b) for a, b in pairs)])
    n = sum(len(batch) for batch in batches[1:])
    return Timing(one_pass=seconds["one"], rescored=seconds["two"], n=n, largest_difference=largest)


def main(argv: Sequence[str] | None = None) -> int:
    args = parse_args(argv)
    if not args.model or not args.benchmark:
        sys.stderr.write("error: --model and --benchmark are required\n")
        return 2
    try:
        with make_judge(args) as judge:
            prompts = [prompt for benchmark in load_benchmarks(args, judge) for prompt in benchmark.prompts]
            timing = time_both(judge, prompts, args.batch_size)
    except (ValueError, RunError) as error:
        sys.stderr.write(f"error: {error}\n")
        return 2 if isinstance(error, ValueError) else 1
    factors = sorted(b / a for a, b in zip(timing.one_pass, timing.rescored))
    tokens = sum(len(prompt.token_ids) for prompt in prompts) / len(prompts)
    print(f"{timing.n} judgements in {len(factors)} batches of {args.batch_size}, prompts of {tokens:.0f} tokens")
    for name, seconds in (("one pass", timing.one_pass), ("generate, then rescore", timing.rescored)):
        print(f"{name:24} {sum(seconds):8.1f} s  {timing.n / sum(seconds):6.2f} judgements/s")
    print(
        f"generate-then-rescore takes {timing.factor:.2f} times as long (per batch {factors[0]:.2f} to "
        f"{factors[-1]:.2f}, median {median(factors):.2f}); E[score] differs by at most {timing.largest_difference:.1e}"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
