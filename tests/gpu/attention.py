"""Attention over packed rows: are the two varlen calls right, and what do they cost against copies of the prompt?"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from real_openrlhf.actors.policy.prompt_attention import _group
from real_openrlhf.actors.policy.varlen_attention import VarlenOps, ops_for, varlen_attention
from real_openrlhf.algo.packing import PromptLayout, layout_of
from tests.gpu.harness import DEVICE, ON_GPU, Report, milliseconds, peak_gib, relative_error, run
from tests.helpers.varlen_ops import PlainOps

DTYPE = torch.bfloat16


@dataclass(frozen=True)
class Heads:
    queries: int
    keys: int
    size: int


HEADS = {"qwen3-32b": Heads(64, 8, 128), "qwen3-1.7b": Heads(16, 8, 128), "smollm2": Heads(9, 3, 64)}
# P, R, K: the audit's shape, and the benchmark's centre.
SHAPES = {"P=2048 R=1024 K=16": (2048, 1024, 16), "P=2048 R=512 K=16": (2048, 512, 16)}
# bf16 rounds outputs by 2^-9; probabilities inside of the kernels are bf16 too.
TOLERANCE = 1e-2


def draw(layout: PromptLayout, heads: Heads, dtype: torch.dtype, seed: int) -> list[Tensor]:
    torch.manual_seed(seed)
    counts = (heads.queries, heads.keys, heads.keys)
    made = [torch.randn(1, layout.n_tokens, n, heads.size, device=DEVICE, dtype=dtype) for n in counts]
    return [x.transpose(1, 2).requires_grad_() for x in made]


def kernels(query: Tensor) -> VarlenOps:
    return ops_for(query) or PlainOps()


def copies(q: Tensor, k: Tensor, v: Tensor, layout: PromptLayout, scale: float) -> Tensor:
    """The path of other devices: the prompt's keys once per rollout, a mask, sdpa."""
    parts = [_group(q, k, v, g, scale, 0.0, None) for g in layout.groups]
    return torch.cat(parts, dim=2).transpose(1, 2).contiguous()


def errors(lengths: list[tuple[int, Sequence[int]]], heads: Heads, window: int | None, seed: int) -> list[float]:
    """Relative errors of output and gradients in bf16, against fp32 maths on the same numbers."""
    layout = layout_of(lengths)
    narrow = draw(layout, heads, DTYPE, seed)
    exact = [x.detach().float().requires_grad_() for x in narrow]
    scale = heads.size**-0.5
    out = varlen_attention(*narrow, layout, scale=scale, window=window, ops=kernels(narrow[0]))
    want = varlen_attention(*exact, layout, scale=scale, window=window, ops=PlainOps())
    upstream = torch.randn_like(out)
    got = [out, *torch.autograd.grad(out, narrow, upstream)]
    wanted = [want, *torch.autograd.grad(want, exact, upstream.float())]
    return [relative_error(a.detach(), b.detach()) for a, b in zip(got, wanted, strict=True)]


def correct(report: Report) -> None:
    """20 random shapes, each new to the kernels: ragged, several groups, one-token rollouts, windows."""
    rng = random.Random(0)
    worst, first_calls = [0.0] * 4, []
    for case in range(20):
        heads = list(HEADS.values())[case % 3]
        groups = [
            (rng.randint(1, 300), [rng.choice([1, 2, rng.randint(3, 200)]) for _ in range(rng.randint(1, 8))])
            for _ in range(rng.randint(1, 3))
        ]
        window = rng.randint(2, 200) if case % 4 == 3 else None
        start = time.perf_counter()
        found = errors(groups, heads, window, seed=case)
        first_calls.append(time.perf_counter() - start)
        if not all(e < TOLERANCE for e in found):
            report.expect(False, f"wrong at {groups}, {heads}, window {window}: relative errors {found}")
        worst = [max(a, b) for a, b in zip(worst, found, strict=True)]
    for name, value in zip(("output", "grad q", "grad k", "grad v"), worst, strict=True):
        report.figure(f"largest relative error over 20 shapes, {name}", value)
    report.figure("slowest new shape, with its fp32 check, s", max(first_calls))


def timed(report: Report) -> None:
    chosen = [
        ("qwen3-32b", "P=2048 R=1024 K=16"),
        ("qwen3-1.7b", "P=2048 R=512 K=16"),
        ("smollm2", "P=2048 R=512 K=16"),
    ]
    for who, shape in chosen:
        prompt, response, samples = SHAPES[shape] if ON_GPU else (32, 16, 4)
        heads, layout = HEADS[who], layout_of([(prompt, [response] * samples)])
        q, k, v = draw(layout, heads, DTYPE, 0)
        scale, ops = heads.size**-0.5, kernels(q)
        ways: dict[str, Callable[[], Tensor]] = {
            "varlen": lambda: varlen_attention(q, k, v, layout, scale=scale, window=None, ops=ops),  # noqa: B023
            "copies": lambda: copies(q, k, v, layout, scale),  # noqa: B023
        }
        pairs = prompt * (prompt + 1) // 2 + samples * (response * prompt + response * (response + 1) // 2)
        flops = 4 * heads.queries * heads.size * pairs
        cost: dict[str, tuple[float, float]] = {}
        for name, way in ways.items():
            upstream = torch.randn_like(way())

            def both(way: Callable[[], Tensor] = way, upstream: Tensor = upstream) -> None:
                torch.autograd.grad(way(), (q, k, v), upstream)  # noqa: B023

            with torch.no_grad():
                forward = milliseconds(way)
            whole = milliseconds(both)
            cost[name] = whole, peak_gib(both)
            label = f"{who} {shape} {name}"
            report.figure(f"{label}: forward ms", forward)
            report.figure(f"{label}: forward and backward ms", whole)
            report.figure(f"{label}: TFLOP/s forward, whole", [flops / forward / 1e9, 3.5 * flops / whole / 1e9])
            report.figure(f"{label}: peak GiB", cost[name][1])
        ratios = [a / b if b else 0.0 for a, b in zip(cost["varlen"], cost["copies"], strict=True)]
        report.figure(f"{who} {shape}: varlen / copies, time and memory", ratios)
        if ON_GPU:
            report.expect(ratios[0] < 1, f"{who} {shape}: copies were faster; look at the merge and the far call")


def check(report: Report) -> None:
    correct(report)
    timed(report)


if __name__ == "__main__":
    run("attention", "Is attention by two varlen calls right, and cheaper than copies of the prompt's keys?", check)
