"""What the GPU benchmark measures, in which order, and which micro-batch fits into the GPU's memory."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from examples.benchmark.flops import needed_tokens, rows
from examples.benchmark.protocol import Case, Measured

# Usable share of the GPU's free memory; the rest is for fragmentation in the allocator.
USABLE = 0.9
# The parts of a step whose memory grows with the micro-batch; the optimizer's is the same for every contestant.
PASSES = ("old_logprobs", "forward", "backward", "experience")
COUNTED = {"centre": 3, "around": 2, "memory": 1}


@dataclass(frozen=True, kw_only=True)
class Point:
    """A case for both contestants; each chooses its own micro-batch. kind: "centre", "around" or "memory".

    A memory point has all rollouts in one micro-batch, with gradient checkpointing.
    """

    kind: str
    prompt: int
    response: int
    samples: int
    gradient_checkpointing: bool = False

    def case(self, micro_batch: int | None = None) -> Case:
        return Case(
            prompt=self.prompt,
            response=self.response,
            samples=self.samples,
            micro_batch=micro_batch or self.samples,
            gradient_checkpointing=self.gradient_checkpointing,
        )

    def __str__(self) -> str:
        extra = ", gradient checkpointing" if self.gradient_checkpointing else ""
        return f"{self.kind}: P={self.prompt}, R={self.response}, K={self.samples}{extra}"


def points(
    centre: tuple[int, int, int],
    prompts: Sequence[int],
    responses: Sequence[int],
    samples: Sequence[int],
    *,
    gradient_checkpointing: bool,
    only_centre: bool,
) -> list[Point]:
    """The most important first: the centre, memory, one factor changed at a time, then the rest."""
    prompt, response, k = centre
    sizes = sorted({k, *(n for n in samples if n <= k), max(2, k // 4)}, reverse=True)
    found = [Point(kind="centre", prompt=prompt, response=response, samples=k)]
    found += [
        Point(kind="memory", prompt=prompt, response=response, samples=n, gradient_checkpointing=True) for n in sizes
    ]
    if not only_centre:
        around = {(p, r, n) for p in prompts for r in responses for n in samples} - {centre}

        def distance(point: tuple[int, int, int]) -> tuple[int, int]:
            return sum(a != b for a, b in zip(point, centre)), -(point[0] + point[1]) * point[2]

        found += [Point(kind="around", prompt=p, response=r, samples=n) for p, r, n in sorted(around, key=distance)]
    if gradient_checkpointing:
        found = [replace(point, gradient_checkpointing=True) for point in found]
    return found


# -- memory ------------------------------------------------------------------------------------------------------------


def micro_tokens(contestant: str, case: Case) -> int:
    """Tokens of one micro-batch: a packed row with the prompt once, or separate rows."""
    one = replace(case, samples=case.micro_batch)
    return needed_tokens(one) if contestant == "real" else rows(one)


def probes(contestant: str, point: Point) -> list[Case]:
    """Two small steps from whose memory that of larger ones is estimated. This project's rows are shorter, so it gets
    more rollouts."""
    few, many = (2, 4) if contestant == "real" and point.samples >= 4 else (1, 2)
    return [replace(point.case(), samples=many, micro_batch=n) for n in (few, many)]


@dataclass(frozen=True, kw_only=True)
class Memory:
    """Peak bytes of a step's passes, linear in the tokens of a micro-batch: phase -> (constant, per token)."""

    lines: Mapping[str, tuple[float, float]]

    @classmethod
    def of(cls, contestant: str, first: Measured, second: Measured) -> Memory:
        tokens = [micro_tokens(contestant, m.case) for m in (first, second)]
        lines = {}
        for phase in PASSES:
            if phase in first.peaks and phase in second.peaks:
                slope = max(0.0, (second.peaks[phase] - first.peaks[phase]) / (tokens[1] - tokens[0]))
                lines[phase] = (first.peaks[phase] - slope * tokens[0], slope)
        return cls(lines=lines)

    def bytes(self, tokens: int) -> int:
        return int(max((constant + slope * tokens for constant, slope in self.lines.values()), default=0.0))


def largest_micro_batch(
    contestant: str, point: Point, memory: Memory | None, *, held: int | None, total: int | None
) -> int | None:
    """The first of K, K/2, ... that fits; K if memory is not limited (CPU). None: not even 1 fits."""
    if memory is None or held is None or total is None:
        return point.samples
    micro_batch = point.samples
    while memory.bytes(micro_tokens(contestant, point.case(micro_batch))) > USABLE * total - held:
        if micro_batch == 1 or micro_batch % 2:
            return None
        micro_batch //= 2
    return micro_batch


def pass_peak(peaks: Mapping[str, int]) -> int:
    """Highest memory outside the optimizer."""
    return max((peak for phase, peak in peaks.items() if phase in PASSES), default=0)


# -- the command line --------------------------------------------------------------------------------------------------


def numbers(text: str) -> tuple[int, ...]:
    try:
        found = tuple(int(part) for part in text.split(","))
    except ValueError:
        found = ()
    if not found or min(found) < 1:
        raise argparse.ArgumentTypeError(f"whole numbers from 1 on with commas between them, got {text!r}")
    return found


def centre(text: str) -> tuple[int, ...]:
    found = numbers(text)
    if len(found) != 3 or found[2] < 2:
        raise argparse.ArgumentTypeError(f"prompt,response,samples, with 2 samples at least, got {text!r}")
    return found


def add_arguments(parser: argparse.ArgumentParser, models: Mapping[str, Any]) -> None:
    def names(text: str) -> list[str]:
        found = text.split(",")
        if unknown := set(found) - set(models):
            raise argparse.ArgumentTypeError(f"models are {', '.join(models)}, got {', '.join(sorted(unknown))}")
        return found

    parser.add_argument("--models", type=names, default=["1.7b", "4b", "smollm2"], help="the most important first")
    parser.add_argument("--centre", type=centre, default=(2048, 512, 16), help="P,R,K")
    parser.add_argument("--prompts", type=numbers, default=(1024, 2048))
    parser.add_argument("--responses", type=numbers, default=(128, 512, 1024))
    parser.add_argument("--samples", type=numbers, default=(8, 16))
    parser.add_argument(
        "--layers", type=int, default=0,
        help="measure N and 2 N layers and extrapolate the whole depth; 0: the whole if it fits, else the N that does",
    )  # fmt: skip
    parser.add_argument("--gradient_checkpointing", action="store_true", help="in all timed steps, on both sides")
