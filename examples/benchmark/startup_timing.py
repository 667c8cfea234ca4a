"""Seconds from the command to its first training step: this checkout and another one, in turns, in one run.

    git worktree add /tmp/other REVISION
    python -m examples.benchmark.startup_timing --other /tmp/other --output FILE --repeats 3 -- \\
        --actor.model_name_or_path MODEL --data.prompt_dataset FILE ...

After `--` follow flags of `real_openrlhf.train_real` that both must know; --train.max_steps 1 and a folder for the
output are added. Each run is a process with its own Ray cluster; the end of the step is the time of its line in
metrics.jsonl. The order changes from repeat to repeat. The output is {"this": [s], "other": [s], "facts": {...}}, and
also the seconds until the command ended.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median

ROOT = Path(__file__).resolve().parents[2]


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--other", type=Path, required=True, help="another checkout of this project")
    parser.add_argument("--output", type=Path, required=True, help="JSON file to write")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("flags", nargs="+", help="flags of real_openrlhf.train_real, after --")
    args = parser.parse_args(argv)
    if args.repeats < 1:
        parser.error("--repeats must be at least 1")
    if not (args.other / "real_openrlhf" / "train_real.py").is_file():
        parser.error(f"--other {args.other}: no real_openrlhf/train_real.py there; give a checkout of this project")
    return args


def first_step(metrics: Path) -> float:
    """Unix seconds of the first training step's line; ValueError when there is none."""
    for line in metrics.read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        if row["phase"] == "train":
            return float(row["time"])
    raise ValueError(f"{metrics}: no line of phase train")


def run(checkout: Path, flags: Sequence[str], folder: Path) -> tuple[float, float]:
    """Seconds from the start of the command to the end of its first step, and to its exit. Raises when it fails."""
    command = [sys.executable, "-m", "real_openrlhf.train_real", *flags]
    command += ["--train.max_steps", "1", "--ckpt.output_dir", str(folder)]
    began = time.time()
    done = subprocess.run(
        command, cwd=checkout, env={**os.environ, "PYTHONPATH": str(checkout)}, capture_output=True, text=True
    )
    ended = time.time()
    if done.returncode:
        raise RuntimeError(f"{checkout.name}: exit code {done.returncode}\n{done.stdout[-2000:]}{done.stderr[-4000:]}")
    return first_step(folder / "metrics.jsonl") - began, ended - began


def main(argv: Sequence[str] | None = None) -> int:
    args = parse_args(argv)
    turns = [("this", ROOT), ("other", args.other.resolve())]
    steps: dict[str, list[float]] = {name: [] for name, _ in turns}
    ends: dict[str, list[float]] = {name: [] for name, _ in turns}
    with tempfile.TemporaryDirectory() as scratch:
        for repeat in range(args.repeats):
            for name, checkout in turns:
                step, end = run(checkout, args.flags, Path(scratch) / f"{name}_{repeat}")
                sys.stderr.write(f"repeat {repeat}: {name}: first step after {step:.1f} s, ended after {end:.1f} s\n")
                steps[name].append(round(step, 2))
                ends[name].append(round(end, 2))
            turns.reverse()
    ratios = sorted(a / b for a, b in zip(steps["this"], steps["other"]))
    facts = {"ended": ends, "ratios": [round(ratio, 3) for ratio in ratios], "median_ratio": round(median(ratios), 3)}
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.write_text(json.dumps({**steps, "facts": facts}, indent=2) + "\n", encoding="utf-8")
    print(f"command to first step, this / other: {median(ratios):.3f} [{ratios[0]:.3f}, {ratios[-1]:.3f}]")
    return 0


if __name__ == "__main__":
    sys.exit(main())
