"""Seconds from the judge command to its first judgement, on transformers and on vLLM, in turns, in one run.

    python -m examples.benchmark.first_judgement --model MODEL --output FILE --repeats 3 [--scale 1-5]

Each turn is `python -m real_openrlhf.judge` in a process of its own, with one row on standard input. The first
judgement is there when its line is on standard output. The order changes from repeat to repeat; what counts is the
ratio within a repeat, since other programs load a shared machine. The two scores are written too.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median

BACKENDS = ("transformers", "vllm")


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="an exported judge, or another model with --scale")
    parser.add_argument("--output", type=Path, required=True, help="JSON file to write")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--scale", help="for a model without settings of its own")
    args = parser.parse_args(argv)
    if args.repeats < 1:
        parser.error("--repeats must be at least 1")
    return args


def first_judgement(model: str, backend: str, scale: str | None) -> tuple[float, float | None]:
    """(seconds to the first line of output, its score). RuntimeError when the command fails."""
    command = [sys.executable, "-m", "real_openrlhf.judge", "--model", model, "--input", "-", "--device", "cpu"]
    command += ["--backend", backend, "--prompt_key", "prompt", *(["--scale", scale] if scale else [])]
    row = json.dumps({"prompt": "Judge the answer to the question.\n\nQuestion: What is 2 + 2?\nAnswer: 4"})
    began = time.perf_counter()
    pipe = subprocess.PIPE
    with (
        tempfile.TemporaryFile("w+") as errors,
        subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=errors, text=True) as process,
    ):
        assert process.stdin is not None and process.stdout is not None
        process.stdin.write(row + "\n")
        process.stdin.close()
        line = process.stdout.readline()
        seconds = time.perf_counter() - began
        process.stdout.read()
        if process.wait() or not line:
            errors.seek(0)
            raise RuntimeError(f"{backend}: exit code {process.returncode}\n{errors.read()[-4000:]}")
    return seconds, json.loads(line)["judgement"]["score"]


def main(argv: Sequence[str] | None = None) -> int:
    args = parse_args(argv)
    turns = list(BACKENDS)
    seconds: dict[str, list[float]] = {name: [] for name in BACKENDS}
    scores: dict[str, list[float | None]] = {name: [] for name in BACKENDS}
    for repeat in range(args.repeats):
        for name in turns:
            taken, score = first_judgement(args.model, name, args.scale)
            sys.stderr.write(f"repeat {repeat}: {name}: first judgement after {taken:.1f} s, score {score}\n")
            seconds[name].append(round(taken, 2))
            scores[name].append(score)
        turns.reverse()
    ratios = sorted(a / b for a, b in zip(seconds["transformers"], seconds["vllm"]))
    facts = {"seconds": seconds, "scores": scores, "ratios": [round(r, 3) for r in ratios]}
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.write_text(json.dumps({**facts, "median_ratio": round(median(ratios), 3)}, indent=2) + "\n")
    print(f"first judgement, transformers / vllm: {median(ratios):.3f} [{ratios[0]:.3f}, {ratios[-1]:.3f}]")
    return 0


if __name__ == "__main__":
    sys.exit(main())
