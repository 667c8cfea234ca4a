"""What an engine's settings gain on a CPU: times rollouts of engines that differ in one setting, in turns, in one run.

    python -m examples.benchmark.rollout_timing --model DIR --output FILE --prompts 4 --prompt_tokens 512 --samples 8

Each variant is a separate engine; all keep running, and each samples the same rollouts (the same seeds) once per
repeat. The order changes from repeat to repeat; a first round warms up and does not count. Sampled tokens may differ
where the last bits of a log-prob differ, so seconds are divided by sampled tokens. The output has, by variant, seconds
per 1,000 tokens for each repeat, and "facts".
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch

from real_openrlhf.actors.engine.spec import EngineSpec
from real_openrlhf.algo.bound_scale import bind_scale
from real_openrlhf.algo.sampling import Sampling
from real_openrlhf.algo.score_scale import ScoreScale
from real_openrlhf.common.device import CPU_ALLOCATOR_ENV, Device
from real_openrlhf.data.prompt import Prompt
from real_openrlhf.data.tokenizer import load_tokenizer

SHIPPED = "as shipped"


@dataclass(frozen=True, kw_only=True)
class Variant(Device):
    """A device whose engines differ from the shipped ones.

    block_size    tokens of a KV cache block; None: as shipped
    keeps_memory  glibc keeps what was freed (CPU_ALLOCATOR_ENV)
    """

    block_size: int | None = None
    keeps_memory: bool = True

    def engine_env(self, tensor_parallel_size: int = 1) -> dict[str, str]:
        env = super().engine_env(tensor_parallel_size)
        return env if self.keeps_memory else {key: env[key] for key in env if key not in CPU_ALLOCATOR_ENV}

    def engine_options(self, max_model_len: int) -> dict[str, Any]:
        options = super().engine_options(max_model_len)
        return options if self.block_size is None else {**options, "block_size": self.block_size}


def variants() -> dict[str, tuple[Variant, bool]]:
    """Variants by name: the device, and whether a prompt is computed once for its rollouts."""
    cpu: dict[str, Any] = {"name": "cpu", "dtype_name": "fp32"}
    return {
        SHIPPED: (Variant(**cpu), True),
        "blocks of 128 tokens": (Variant(**cpu, block_size=128), True),
        "blocks of 64 tokens": (Variant(**cpu, block_size=64), True),
        "memory given back": (Variant(**cpu, keeps_memory=False), True),
        "no prefix cache": (Variant(**cpu), False),
    }


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="Hugging Face folder with a tokenizer")
    parser.add_argument("--output", type=Path, required=True, help="JSON file to write")
    parser.add_argument("--prompts", type=int, default=4)
    parser.add_argument("--prompt_tokens", type=int, default=512, help="of the longest prompt; the others lack a few")
    parser.add_argument("--samples", type=int, default=8)
    parser.add_argument("--new_tokens", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=5)
    others = [name for name in variants() if name != SHIPPED]
    parser.add_argument("--against", nargs="+", choices=others, default=others, help="variants besides the shipped one")
    args = parser.parse_args(argv)
    for name in ("prompts", "prompt_tokens", "samples", "new_tokens", "repeats"):
        if getattr(args, name) < 1:
            parser.error(f"--{name} must be at least 1")
    return args


def make_prompts(n: int, longest: int, vocabulary: int) -> list[Prompt]:
    """Random ids; lengths differ by a few tokens, so that prompts end at various places within a block."""
    generator = torch.Generator().manual_seed(0)
    return [
        Prompt(
            token_ids=tuple(torch.randint(5, vocabulary, (max(1, longest - 13 * i),), generator=generator).tolist()),
            label=float("nan"),
            row=i,
            text="",
        )
        for i in range(n)
    ]


def summary(seconds: dict[str, list[float]]) -> dict[str, dict[str, float]]:
    """variant -> median and range over the repeats of its seconds per token, as a share of the shipped engine's."""
    shares = {name: [a / b for a, b in zip(values, seconds[SHIPPED])] for name, values in seconds.items()}
    return {
        name: {"median": round(median(s), 3), "least": round(min(s), 3), "most": round(max(s), 3)}
        for name, s in shares.items()
    }


def start(model: str, variant: Variant, caching: bool, max_model_len: int) -> Any:
    from real_openrlhf.actors.engine.rollout_engine import RolloutEngine

    for name in CPU_ALLOCATOR_ENV:
        os.environ.pop(name, None)
    return RolloutEngine(
        EngineSpec(
            model=model,
            device=variant,
            bound=bind_scale(ScoreScale.parse("1-5"), load_tokenizer(model), ["Score: "]),
            max_model_len=max_model_len,
            enable_prefix_caching=caching,
            load_format="auto",
        )
    )


async def measure(args: argparse.Namespace) -> dict[str, Any]:
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    chosen = {name: how for name, how in variants().items() if name in (SHIPPED, *args.against)}
    length = args.prompt_tokens + args.new_tokens + 1
    engines = {name: start(args.model, *how, max_model_len=length) for name, how in chosen.items()}
    prompts = make_prompts(args.prompts, args.prompt_tokens, vocabulary=4000)
    names = list(engines)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    try:
        for repeat in range(args.repeats + 1):
            sampling = Sampling(n=args.samples, temperature=1.0, top_p=1.0, max_new_tokens=args.new_tokens, seed=repeat)
            for name in names[repeat % len(names) :] + names[: repeat % len(names)]:
                began = time.perf_counter()
                groups = await engines[name].generate(prompts, sampling)
                took = time.perf_counter() - began
                tokens = sum(len(rollout.token_ids) for group in groups for rollout in group.rollouts)
                sys.stderr.write(f"repeat {repeat}: {name}: {took:.2f} s, {tokens} tokens\n")
                if repeat:
                    seconds[name].append(round(1000 * took / tokens, 4))
    finally:
        for engine in engines.values():
            await engine.shutdown()
    facts = {key: value for key, value in vars(args).items() if key not in ("model", "output")}
    return {**seconds, "facts": {**facts, "share_of_shipped": summary(seconds)}}


def main(argv: Sequence[str] | None = None) -> int:
    args = parse_args(argv)
    found = asyncio.run(measure(args))
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    for name, share in found["facts"]["share_of_shipped"].items():
        print(f"{name:24} {share['median']:.3f} of the shipped seconds [{share['least']:.3f}, {share['most']:.3f}]")
    return 0


if __name__ == "__main__":
    sys.exit(main())
