"""One contestant in a separate process, which runs a training step on request.

    python -m examples.benchmark.worker --contestant real --model DIR --seed 0

Once built and warmed up it prints {"ready": true, "facts": {...}, "overrides": [...]} on stdout. Then one JSON object a
line, stdin to stdout:

    {"op": "step", "case": {...}, "seed": 1}   -> a `Measured`
    {"op": "quit"}

A request that fails is answered with {"error": "..."}. The process then restarts itself (same id, same pipes, no second
"ready"), since an interrupted step leaves DeepSpeed in an undefined state. A worker that the kernel kills for lack of
memory just ends. All other output is written to stderr. Steps change the weights by about the learning rate.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TextIO

from examples.benchmark.protocol import CONTESTANTS, Case, Measured

logger = logging.getLogger(__name__)

# A step that does not count, in which every contestant allocates its buffers and loads its kernels.
WARM_UP = Case(prompt=8, response=8, samples=2, micro_batch=1)
_RESTARTED = "REAL_BENCHMARK_RESTARTED"


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="One contestant of the benchmark.")
    parser.add_argument("--contestant", choices=CONTESTANTS, required=True)
    parser.add_argument("--model", required=True, help="Hugging Face folder")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--learning_rate", type=float, default=1e-10)
    parser.add_argument("--logits_mb", type=int, default=1024, help="--real.logits_mb of this project's step")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    return parser.parse_args(argv)


class Worker:
    """A contestant, and the measurements around its steps.

    gives_back  release free GPU memory after each step, since contestants in other processes need it
    """

    gives_back = True

    def __init__(self, args: argparse.Namespace) -> None:
        from real_openrlhf.common.device import Device

        self.name: str = args.contestant
        self.device = Device.resolve(args.device)
        os.environ.update(self.device.trainer_env(1))

        import torch

        from examples.benchmark.contestants import Setup, build

        torch.set_num_threads(self.device.trainer_threads(1))
        self.contestant = build(
            args.contestant,
            Setup(
                model=args.model,
                device=self.device,
                seed=args.seed,
                learning_rate=args.learning_rate,
                logits_mb=args.logits_mb,
                liger=getattr(args, "liger", None),
            ),
        )
        network = self.contestant.network
        self.vocabulary: int = network.config.get_text_config().vocab_size
        trained = [p for p in network.parameters() if p.requires_grad]
        # ZeRO-2 makes gradients during the step and drops them at its end, so the baseline does not hold them.
        self.gradient_bytes = sum(p.numel() * p.element_size() for p in trained)
        self.facts = {
            "contestant": self.name,
            "device": self.device.name,
            "dtype": self.device.dtype_name,
            "attention": self.device.attn_implementation,
            "liger": bool(self.contestant.args.ds.use_liger_kernel),
            "threads": torch.get_num_threads(),
            "parameters": sum(p.numel() for p in network.parameters()),
            "gradient_bytes": self.gradient_bytes,
            "vocabulary": self.vocabulary,
        }
        self.step(WARM_UP, seed=0)

    def step(self, case: Case, *, seed: int) -> Measured:
        """Run and measure one step on the rollouts of (case, seed)."""
        from examples.benchmark.memory import PeakMemory, release
        from examples.benchmark.rollouts import make_group

        self.contestant.prepare(case, make_group(case, seed=seed, vocabulary=self.vocabulary))
        timers = self.contestant.timers
        timers.take()
        memory = PeakMemory(self.device)
        timers.on_end = memory.mark
        start = timers.mark()
        outcome = self.contestant.step()
        end = timers.mark()
        self.device.synchronize()
        total = timers.between(start, end)
        memory.mark("experience")
        peaks = {name: max(0, peak - self.gradient_bytes) for name, peak in memory.peaks.items()}
        seconds = timers.take()
        seconds["experience"] = max(0.0, total - sum(seconds.values()))
        release()
        if self.gives_back:
            self.device.empty_cache()
        return Measured(
            contestant=self.name,
            case=case,
            seconds=seconds,
            total=total,
            peak_bytes=max(peaks.values()),
            loss=outcome.loss,
            facts=outcome.facts,
            peaks=peaks,
        )


def answer(worker: Worker, request: dict[str, Any]) -> dict[str, Any]:
    """The answer to a request that is not "quit"."""
    if request.get("op") != "step":
        raise ValueError(f"op must be 'step' or 'quit', got {request.get('op')!r}")
    return worker.step(Case(**request["case"]), seed=int(request["seed"])).to_json()


def serve(worker: Worker, requests: TextIO, answers: TextIO) -> bool:
    """Answer requests until the end. True: a request failed and the process should restart."""
    for line in requests:
        try:
            request = json.loads(line)
            if request.get("op") == "quit":
                return False
            say(answers, answer(worker, request))
        except Exception as error:
            logger.exception("a request failed")
            say(answers, {"error": f"{worker.name}, {line.strip()}: {type(error).__name__}: {error}"})
            return True
    return False


def say(answers: TextIO, what: dict[str, Any]) -> None:
    print(json.dumps(what), file=answers, flush=True)


def private_stdout() -> TextIO:
    """The real stdout, for answers; from now on all other output, also of C code, is written to stderr."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    return answers


def prefer_for_killing() -> None:
    """When memory runs out, the kernel should end this process and not the one that measures."""
    try:
        Path("/proc/self/oom_score_adj").write_text("1000", encoding="ascii")
    except OSError:
        logger.warning("oom_score_adj cannot be set: if memory runs out, anything may be killed")


def main() -> None:
    logging.basicConfig(level=logging.WARNING, stream=sys.stderr)
    args = parse()
    prefer_for_killing()
    answers = private_stdout()
    try:
        worker = Worker(args)
    except Exception as error:
        logger.exception("the contestant cannot be built")
        say(answers, {"error": f"{args.contestant} cannot be built: {type(error).__name__}: {error}"})
        sys.exit(1)
    if not os.environ.pop(_RESTARTED, None):
        say(answers, {"ready": True, "facts": worker.facts, "overrides": worker.contestant.overrides})
    if serve(worker, sys.stdin, answers):
        os.dup2(answers.fileno(), 1)
        os.environ[_RESTARTED] = "1"
        os.execv(sys.executable, [sys.executable, "-m", "examples.benchmark.worker", *sys.argv[1:]])


if __name__ == "__main__":
    main()
