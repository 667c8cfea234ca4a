"""A contestant of `examples.benchmark.gpu` in a separate process. Its protocol is that of `worker.py`, and more.

It imports everything at once, without touching the GPU, so that it can be started while another contestant works. It
builds its model on request:

    {"op": "build"}                                             -> {"ready": true, "facts": ..., "overrides": ...}
    {"op": "step", "case": {...}, "seed": 1}                    -> a `Measured`, see below
    {"op": "gemm", "rows": 8192}                                -> the rate of matrix products, see `gemm.py`
    {"op": "profile", "case": {...}, "seed": 1, "file": "..."}  -> where a step's time goes, see `gpu_profile.py`

Its `Measured.peaks` are memory above what is held between steps, by torch's allocator, gradients included.
"""

from __future__ import annotations

import argparse
import importlib
import json
import logging
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TextIO

from examples.benchmark.protocol import Case
from examples.benchmark.worker import Worker, private_stdout, say

logger = logging.getLogger(__name__)

_RESTARTED = "REAL_BENCHMARK_RESTARTED"


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="One contestant of the GPU benchmark.")
    parser.add_argument("--contestant", choices=("real", "openrlhf"), required=True)
    parser.add_argument("--model", required=True, help="folder with config.json")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--learning_rate", type=float, default=1e-10)
    parser.add_argument("--logits_mb", type=int, default=0, help="0: the device's default")
    parser.add_argument("--no_liger", action="store_true")
    return parser.parse_args(argv)


class GpuWorker(Worker):
    """A contestant with random weights and, for OpenRLHF, flash attention."""

    def __init__(self, args: argparse.Namespace) -> None:
        import torch

        from examples.benchmark import flash_shim, gpu_models
        from real_openrlhf.common.device import Device

        device = Device.resolve(args.device)
        args.logits_mb, args.liger = args.logits_mb or None, False if args.no_liger else None
        overrides = [gpu_models.OVERRIDE]
        # This project's attention calls torch's kernels; only OpenRLHF uses flash-attn.
        if device.is_cuda and args.contestant == "openrlhf" and flash_shim.install():
            overrides.append(flash_shim.OVERRIDE)
        gpu_models.make_weights_from_config(device.current())
        super().__init__(args)
        # Alone on its GPU, as a training rank that is not colocated.
        self.gives_back = False
        # Gradients count as part of the step, since it is not known how many of them exist at its peak.
        self.gradient_bytes = 0
        self.overrides = [*self.contestant.overrides, *overrides]
        self.model = Path(args.model)
        logits_mb = args.logits_mb or device.logits_mb()
        self.facts |= {"logits_mb": logits_mb, "held_bytes": None, "total_bytes": None, "card": "CPU"}
        if device.is_cuda:
            self.facts["held_bytes"] = int(torch.cuda.memory_allocated())
            free, _ = torch.cuda.mem_get_info()
            # Memory that is available here: without the CUDA context and other processes.
            self.facts["total_bytes"] = int(torch.cuda.memory_reserved() + free)
            properties = torch.cuda.get_device_properties(0)
            self.facts["card"] = f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB"

    def gemm(self, rows: int) -> dict[str, Any]:
        from examples.benchmark.flops import Shape
        from examples.benchmark.gemm import measure

        return measure(Shape.of(self.model), self.device, rows=rows)

    def profile(self, case: Case, *, seed: int, file: Path) -> dict[str, Any]:
        from examples.benchmark.gpu_profile import profile_step
        from examples.benchmark.rollouts import make_group

        self.contestant.prepare(case, make_group(case, seed=seed, vocabulary=self.vocabulary))
        found = profile_step(self.contestant.step, self.device, file)
        self.contestant.timers.take()
        return found


def answer(worker: GpuWorker, request: dict[str, Any]) -> dict[str, Any]:
    """The answer to a request about a contestant that is built."""
    match request.get("op"):
        case "step":
            return worker.step(Case(**request["case"]), seed=int(request["seed"])).to_json()
        case "gemm":
            return worker.gemm(int(request["rows"]))
        case "profile":
            return worker.profile(Case(**request["case"]), seed=int(request["seed"]), file=Path(request["file"]))
    raise ValueError(f"op must be 'step', 'gemm', 'profile' or 'quit', got {request.get('op')!r}")


def serve(args: argparse.Namespace, requests: TextIO, answers: TextIO, *, restarted: bool) -> bool:
    """Answer requests until the end. True: a step failed, and the process should start anew."""
    worker = GpuWorker(args) if restarted else None
    for line in requests:
        request = json.loads(line)
        try:
            if request.get("op") == "quit":
                return False
            if request.get("op") == "build":
                worker = worker or GpuWorker(args)
                say(answers, {"ready": True, "facts": worker.facts, "overrides": worker.overrides})
                continue
            if worker is None:
                raise ValueError("not built yet")
            say(answers, answer(worker, request))
        except Exception as error:
            logger.exception("a request failed")
            say(answers, {"error": f"{type(error).__name__}: {error}"})
            # An interrupted step leaves DeepSpeed in an undefined state.
            if request.get("op") in ("step", "profile", "build"):
                return request.get("op") != "build"
    return False


def main() -> None:
    logging.basicConfig(level=logging.WARNING, stream=sys.stderr)
    args = parse()
    answers = private_stdout()
    for module in ("torch", "transformers", "deepspeed", f"examples.benchmark.contestants.{args.contestant}"):
        importlib.import_module(module)
    if serve(args, sys.stdin, answers, restarted=bool(os.environ.pop(_RESTARTED, None))):
        os.dup2(answers.fileno(), 1)
        os.environ[_RESTARTED] = "1"
        os.execv(sys.executable, [sys.executable, "-m", "examples.benchmark.gpu_worker", *sys.argv[1:]])


if __name__ == "__main__":
    main()
